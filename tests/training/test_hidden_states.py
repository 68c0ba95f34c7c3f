"""Hidden states of matched blocks as a term of the loss, with projections that are trained too."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from megatron_prune.convert.huggingface import import_hf
from megatron_prune.errors import UsageError
from megatron_prune.training import hidden_states
from tests.conftest import WITH_TE
from tests.training import distillation_oracle as oracle
from tests.training.small import GLOBAL_BATCH, layout, recipe
from tests.training.small_masked import losses, run_function
from tests.training.test_masked_oracle import record_batches

STEPS, CLIP, WEIGHT = 4, 0.5, 3.0
RANGE = f"64:{64 + STEPS * GLOBAL_BATCH}"
PAIRS = [(1, 1), (2, 3)]


def plain_loop(student, teacher, batches, rates, width):
    """CE and gradient norm of every step: transformers in float64, torch's AdamW, projections with one of their own."""
    model, parent, optimizer = oracle.student_and_teacher(student, teacher)
    parameters = list(model.parameters())
    matrices = [  # one after the other, from the run's seed on
        (torch.randn(96, width, generator=torch.Generator().manual_seed(7 + number)) / width**0.5).double()
        for number in range(len(PAIRS))
    ]
    matrices = [each.requires_grad_() for each in matrices]
    own = torch.optim.AdamW(matrices, betas=(0.9, 0.999), weight_decay=0)
    found = []
    for step in range(STEPS):
        tokens, labels = (
            torch.tensor(np.concatenate([batch[place] for batch in batches if batch[0] == step])) for place in (1, 2)
        )
        optimizer.zero_grad()
        own.zero_grad()
        with torch.no_grad():
            theirs = parent(tokens, output_hidden_states=True)
        ours = model(tokens, output_hidden_states=True)
        mixed, lm, _ = oracle.full(ours.logits, theirs.logits, labels, 0.5, 1.0, False)
        apart = sum(  # of transformers' list, entry n is what block n returns
            (ours.hidden_states[s] @ matrix.T - theirs.hidden_states[t]).square().mean()
            for (s, t), matrix in zip(PAIRS, matrices, strict=True)
        ) / len(PAIRS)
        (mixed.mean() + WEIGHT * apart).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, CLIP))
        for group in [*optimizer.param_groups, *own.param_groups]:
            group["lr"] = rates[step]
        optimizer.step()
        own.step()
        found.append((float(lm.mean().detach()), norm))
    return [list(column) for column in zip(*found, strict=True)], [matrix.detach() for matrix in matrices]


def check(save, expected):
    import safetensors.torch

    (lm, norms), matrices = expected
    np.testing.assert_allclose(losses(save), lm, rtol=2e-5)
    np.testing.assert_allclose(losses(save, "grad_norm"), norms, rtol=1e-4)
    held = safetensors.torch.load_file(save / hidden_states.FOLDER / f"iter_{STEPS:07d}.safetensors")
    for number, matrix in enumerate(matrices):
        torch.testing.assert_close(held[f"{number}"].double(), matrix, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_a_run_is_a_plain_loop_also_when_resumed_at_another_layout(tiny_hf, tiny_parent, tiny_corpus, tmp_path, job):
    source, checkpoint = tiny_hf("llama-gqa", layers=3, seed=6, hidden_size=72), tmp_path / "student"
    import_hf(source, checkpoint)

    def flags(save):
        start = ["--pretrained-checkpoint", checkpoint, "--teacher", tiny_parent, "--objective", "distill"]
        start += ["--distill-alpha", "0.5", hidden_states.WEIGHT, WEIGHT, hidden_states.FLAG, "1:1", "2:3"]
        return [str(word) for word in [*start, *recipe(tiny_corpus, RANGE, save), "--clip-grad", CLIP]]

    save, batches = tmp_path / "run", tmp_path / "batches.json"
    code, output = run_function(record_batches, tmp_path / "ranks", 1, flags(save), str(batches))
    assert code == 0, output[-4000:]
    assert "hidden states loss" in output
    rates = [0.0, *losses(save, "learning_rate")]  # Megatron logs the next step's; the warm-up begins at 0
    teacher = tiny_hf("llama-gqa", layers=4)
    expected = plain_loop(source, teacher, json.loads(batches.read_text()), rates, 72)
    check(save, expected)
    assert json.loads((save / "account.json").read_text())["objective"]["hidden_states"] == ["1:1", "2:3"]

    other = tmp_path / "other"
    stop = ["--exit-interval", "2", "--save-interval", "2"]
    job(["pretrain", *flags(other), *stop, "--micro-batch-size", "1"], nproc=2).ok()
    split = ["--sequence-parallel"] if WITH_TE else []
    job(["pretrain", *flags(other), *layout(2), *split], nproc=2).ok()
    check(other, expected)


@pytest.mark.parametrize("words", [["1"], ["0:1"], ["1:x"], ["1:2", "1:3"], ["-1:2"]])
def test_pairs_that_are_none_are_refused(words):
    with pytest.raises(UsageError, match=f"^{hidden_states.FLAG}: expected "):
        hidden_states.pairs(words)


def test_pairs():
    assert hidden_states.pairs(["1:1", "2:3"]) == PAIRS
