"""The objective of distillation in float64 and plain torch, written from the papers' formulas with autograd."""

from __future__ import annotations

import torch


def kl(log_p: torch.Tensor, log_q: torch.Tensor, reverse: bool) -> torch.Tensor:
    """KL(p ‖ q), or KL(q ‖ p): float64 [...]."""
    if reverse:
        log_p, log_q = log_q, log_p
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def full(student, teacher, labels, alpha, temperature, reverse):
    """Mixed loss, CE and T² · KL of each token; logits [b, s, words]."""
    student, teacher = student.double(), teacher.double()
    lm = -student.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    found = kl((teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1), reverse)
    distillation = temperature**2 * found
    return (1 - alpha) * lm + alpha * distillation, lm, distillation


def lumped(log_probabilities: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of ``ids`` and of all other words together: [..., words] -> [..., k + 1]."""
    others = torch.ones_like(log_probabilities).scatter(-1, ids, 0)
    rest = (log_probabilities.exp() * others).sum(-1, keepdim=True).log()
    return torch.cat([log_probabilities.gather(-1, ids), rest], dim=-1)


def top_k(student, teacher, ids, labels, alpha, temperature, reverse):
    """The same with the teacher's ``ids`` [b, s, k] and the rest as one event; softened after that."""
    own, others = (lumped(logits.double().log_softmax(-1), ids) for logits in (student, teacher))
    distillation = full(own, others, torch.zeros_like(labels), 1, temperature, reverse)[2]
    lm = -student.double().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return (1 - alpha) * lm + alpha * distillation, lm, distillation


def student_and_teacher(student, teacher):
    """Hugging Face models in float64, and the student's AdamW, which decays matrices as Megatron does."""
    import transformers

    model, parent = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
        for folder in (student, teacher)
    )
    decayed, others = ([p for p in model.parameters() if (p.ndim > 1) is matrix] for matrix in (True, False))
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return model, parent, torch.optim.AdamW(groups, betas=(0.9, 0.999))
