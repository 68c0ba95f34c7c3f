"""``--objective distill``: a run that also learns from a teacher's probabilities of the next token.

The loss of a micro-batch is (1 - α) · CE + α · T² · KL (``distillation_loss.py``), summed over its tokens with their
number, so that Megatron weighs it as it weighs cross entropy; ``hidden_states.py`` may add a term. "lm loss" stays the
cross entropy in Megatron's log, in ``losses.csv`` and in validation, which has nothing else; T² · KL is next to it as
"distillation loss".

The teacher runs in the same job (``teacher.py``), or its probabilities are read (``TargetProvider``).
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.errors import UsageError
from megatron_prune.training import batch_flags, hidden_states, objective, teacher, teacher_cache
from megatron_prune.training.distillation_loss import Mixture, Shard, TargetProvider, TokenLosses, losses

OBJECTIVE, ALPHA, TEMPERATURE, KL = "--objective", "--distill-alpha", "--distill-temperature", "--distill-kl"
TEACHER, CACHE = teacher.FLAG, teacher_cache.FLAG


def asked(args: argparse.Namespace) -> bool:
    """Whether a run distils."""
    return bool(getattr(args, "objective", objective.LM["name"]) == "distill")


def complete_arguments(args: argparse.Namespace, given: Callable[[str], bool]) -> None:
    """Refuse (UsageError) flags of distillation that contradict each other; before Megatron validates."""
    if not asked(args):
        for flag in (TEACHER, CACHE, ALPHA, TEMPERATURE, KL, hidden_states.FLAG, hidden_states.WEIGHT):
            if given(flag):
                raise UsageError(flag, got="it alone", expected=f"{OBJECTIVE} distill with it")
        return
    if args.teacher_cache is not None:
        _refuse_unfit_with_cache(args)
    elif args.teacher is None:
        raise UsageError(OBJECTIVE, got="distill alone", expected=f"{TEACHER} CHECKPOINT or {CACHE} DIR with it")
    ends(ALPHA, args.distill_alpha)
    ends(TEMPERATURE, args.distill_temperature)
    if args.distill_hidden_states:
        hidden_states.refuse_unfit(args)
    elif given(hidden_states.WEIGHT):
        raise UsageError(hidden_states.WEIGHT, got="it alone", expected=f"{hidden_states.FLAG} with it")
    for unfit, flag, got, expected, why in (
        (
            args.cuda_graph_impl == "full_iteration", "--cuda-graph-impl", args.cuda_graph_impl, "another",
            "a captured step would repeat the targets of the first",
        ),
        (
            args.logits_save_dir is not None, "--logits-save-dir", args.logits_save_dir, "no such flag with it",
            "Megatron writes a teacher's logits with it, and the student's would be overwritten by their gradient",
        ),
        (
            args.teacher_cache is None and _virtual(args) is not None,
            "--" + str(_virtual(args)).replace("_", "-"), "it", f"no such flag with {TEACHER}",
            "Megatron's schedule of virtual stages runs one model",
        ),
    ):  # fmt: skip
        if unfit:
            raise UsageError(flag, got=got, expected=expected, why=why)


def _refuse_unfit_with_cache(args: argparse.Namespace) -> None:
    """UsageError for flags with which a cache does not say what the teacher would on this run's samples."""
    plain = "no such flag"
    for unfit, flag, got, expected, why in (
        (
            args.stream_range is None, "--stream-range", "nothing", "START:END",
            "samples are found by their numbers in the stream",
        ),
        (
            batch_flags.asked(args), batch_flags.FOLLOWS if args.batch_schedule else batch_flags.EVERY, "it", plain,
            "a schedule of batches reads samples of corpora, which need not be in the stream's range",
        ),
        (
            bool(args.distill_hidden_states), hidden_states.FLAG, " ".join(args.distill_hidden_states), plain,
            "a cache holds probabilities alone; run the teacher",
        ),
        *(
            (getattr(args, name), f"--{name.replace('_', '-')}", "it", plain,
             "teach ran the teacher with positions from 0, and with attention across documents")
            for name in ("reset_position_ids", "reset_attention_mask")
        ),
    ):  # fmt: skip
        if unfit:
            raise UsageError(flag, got=got, expected=f"{expected} with {CACHE}", why=why)


def _virtual(args: argparse.Namespace) -> str | None:
    """The flag that asks for virtual stages."""
    names = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")
    found = next((name for name in names if getattr(args, name) is not None), None)
    return "pipeline_model_parallel_layout" if found is None and args.pipeline_model_parallel_layout else found


def ends(flag: str, text: str) -> tuple[float, float]:
    """``A`` or ``A:B`` of ``ALPHA`` or ``TEMPERATURE``: the values at the first and the last step."""
    first, _, last = text.partition(":")
    try:
        found = float(first), float(last or first)
    except ValueError:
        found = (math.nan, math.nan)
    if flag == ALPHA and not all(0 <= one <= 1 for one in found):
        raise UsageError(flag, got=text, expected="a share from 0 to 1, or two as FIRST:LAST")
    if flag == TEMPERATURE and not all(0 < one < math.inf for one in found):
        raise UsageError(flag, got=text, expected="a number above 0, or two as FIRST:LAST")
    return found


def stated(args: argparse.Namespace) -> dict[str, Any]:
    """The objective for the run's account (``objective.py``). Reads the teacher's fingerprint, or its cache's."""
    if not asked(args):
        return dict(objective.LM)
    alpha, temperature = (
        first if first == last else [first, last]
        for first, last in (ends(ALPHA, args.distill_alpha), ends(TEMPERATURE, args.distill_temperature))
    )
    of = {"alpha": alpha, "temperature": temperature, "kl": args.distill_kl}
    if args.teacher_cache is not None:
        taught = teacher_cache.open_cache(args.teacher_cache, check_shards=False).taught
        if temperature != 1 and taught.k < taught.vocabulary:
            raise UsageError(
                TEMPERATURE, got=args.distill_temperature, expected=f"1 with {CACHE}",
                why=f"it has {taught.k} words per token and the sum of the others, which cannot be softened one by one",
                do=f"run the {TEACHER}, or teach with --top-k {taught.vocabulary}",
            )  # fmt: skip
        top_k = None if taught.k == taught.vocabulary else taught.k
        return objective.distill(**of, teacher=taught.teacher["fingerprint"], top_k=top_k, cache=taught.described())
    further: dict[str, Any] = {}
    if args.distill_hidden_states:
        further = {"hidden_states": list(args.distill_hidden_states), "hidden_weight": args.distill_hidden_weight}
    return objective.distill(**of, teacher=open_checkpoint(args.teacher).fingerprint(), **further)


def teacher_flops(args: argparse.Namespace, said: objective.Objective) -> int:
    """FLOPs of the teacher's forward pass over all samples of the run, whose objective is ``said``; 0 without one."""
    if not asked(args):
        return 0
    samples = int(args.global_batch_size * args.train_iters)
    if "cache" in said:
        return objective.flops_in_cache(said["cache"], samples)
    shape: ModelShape = open_checkpoint(args.teacher).shape
    return shape.forward_flops(args.seq_length) * samples


class Distillation:
    """The objective of one run: ``forward_step`` is for Megatron's ``pretrain``."""

    def __init__(
        self, args: argparse.Namespace, provider: TargetProvider, hidden: hidden_states.HiddenStates | None = None
    ):
        self.args, self.provider, self.hidden = args, provider, hidden
        self._alpha = ends(ALPHA, args.distill_alpha)
        self._temperature = ends(TEMPERATURE, args.distill_temperature)

    def mixture(self, step: int) -> Mixture:
        """The settings of a step, from 0; linear from the first step to the last."""
        share = step / max(1, self.args.train_iters - 1)
        alpha, temperature = (first + (last - first) * share for first, last in (self._alpha, self._temperature))
        return Mixture(alpha, temperature, self.args.distill_kl == "reverse")

    def forward_step(self, data_iterator: Iterator[Any], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        """One micro-batch through this stage, as Megatron's schedules call it; without the teacher in validation."""
        from megatron.core.utils import get_attr_wrapped_model
        from megatron.training import get_timers

        from megatron_prune.engine import forward

        if not model.training or not get_attr_wrapped_model(model, "post_process"):
            return forward.forward_step(data_iterator, model)
        timers = get_timers()
        timers("batch-generator", log_level=2).start()
        batch = forward.get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
        timers("batch-generator").stop()
        mixture = self.mixture(self.args.curr_iteration)
        targets = self.provider.targets(batch)
        found: list[TokenLosses] = []
        apart: list[torch.Tensor] = []  # distance of hidden states

        def process(
            *, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, labels: torch.Tensor,
            scale_logits: Callable[[torch.Tensor], torch.Tensor], **_: Any,
        ) -> torch.Tensor:  # fmt: skip
            logits = scale_logits(output_layer(hidden_states, weight=output_weight)[0])  # [s, b, V / TP]
            shard = Shard.of_megatron(self.args.vocab_size)
            found.append(losses(logits, labels, targets, mixture, shard))
            if self.hidden is None:
                return found[0].mixed
            apart.append(self.hidden.loss())
            mixed: torch.Tensor = found[0].mixed + self.hidden.weight * apart[0]
            return mixed

        output = model(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
            output_processor=process,
        )
        report = {"lm loss": found[0].lm, "distillation loss": found[0].distillation}
        if apart:
            report["hidden states loss"] = apart[0].detach()
        return output, functools.partial(self._loss, batch["loss_mask"], report)

    @staticmethod
    def _loss(
        loss_mask: torch.Tensor, tokens_losses: dict[str, torch.Tensor], output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Sum of the mixed token losses, the number of tokens, and the pairs for Megatron's log."""
        from megatron_prune.engine import forward

        loss, tokens, _ = forward.loss_function(loss_mask, output)
        report = {
            name: torch.cat([torch.sum(each.reshape(-1) * loss_mask.view(-1)).view(1), tokens.view(1)])
            for name, each in tokens_losses.items()
        }
        return loss, tokens, report
