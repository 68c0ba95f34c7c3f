"""Intermediate states in distillation: the outputs of matched blocks, the student's through learned projections.

To each token's loss comes weight · mean over pairs of mean over channels of (W h - h')²: h is what the student's block
returns, h' what the teacher's returns, and every pair has its own W [teacher's hidden size, student's] (Minitron, arXiv
2407.14679, section 3). It starts as the identity where both sizes are equal, and else at random. Projections are
trained with the model by an AdamW of their own, at the model's learning rate, without decay or clipping. They are no
part of the model: ``hidden_states/iter_0000010.safetensors`` in the save directory holds them for a run that resumes.

Both blocks must compute where the loss is, so there is one pipeline stage.
"""

from __future__ import annotations

import argparse
import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_prune import storage
from megatron_prune.artifacts import write_bytes
from megatron_prune.errors import CheckpointError, UsageError
from megatron_prune.training.zeros import after_gradients

FLAG, WEIGHT = "--distill-hidden-states", "--distill-hidden-weight"
FOLDER = "hidden_states"


def pairs(words: Sequence[str]) -> list[tuple[int, int]]:
    """``S:T`` …: blocks of student and teacher, counted from 1."""
    found = []
    for word in words:
        student, colon, teacher = word.partition(":")
        if not (colon and student.isdecimal() and teacher.isdecimal() and int(student) and int(teacher)):
            raise UsageError(FLAG, got=word, expected="STUDENT:TEACHER, two numbers of blocks from 1")
        found.append((int(student), int(teacher)))
    if len({student for student, _ in found}) < len(found):
        raise UsageError(FLAG, got=" ".join(words), expected="each block of the student once")
    return found


def refuse_unfit(args: argparse.Namespace) -> None:
    """UsageError for flags with which these terms cannot be computed; before Megatron validates."""
    pairs(args.distill_hidden_states)
    for unfit, flag, got, expected, why in (
        (not 0 < args.distill_hidden_weight < float("inf"), WEIGHT, args.distill_hidden_weight, "a number above 0", ""),
        (
            args.pipeline_model_parallel_size > 1, "--pipeline-model-parallel-size", args.pipeline_model_parallel_size,
            "1", "the loss is on the last stage, and other blocks are not",
        ),
        (
            args.recompute_granularity == "full", "--recompute-granularity", "full", "selective, or no such flag",
            "blocks that are computed again return nothing with a gradient the first time",
        ),
        (args.fp16, "--fp16", "on", "--bf16 or neither", "the loss scale stays in the projections' gradients"),
        (
            args.calculate_per_token_loss, "--calculate-per-token-loss", "on", "off",
            "projections' gradients are means over micro-batches",
        ),
        (args.use_torch_fsdp2, "--use-torch-fsdp2", "on", "off", "not proven"),
    ):  # fmt: skip
        if unfit:
            raise UsageError(flag, got=got, expected=f"{expected} with {FLAG}", why=why)


class HiddenStates:
    """The terms of one run: ``attach`` before Megatron's ``pretrain``; ``loss`` after both models' forward pass."""

    def __init__(self, args: argparse.Namespace, teacher: argparse.Namespace):
        """``teacher``: its arguments."""
        self.args, self.weight = args, args.distill_hidden_weight
        self.pairs = pairs(args.distill_hidden_states)
        for student, parent in self.pairs:
            if student > args.num_layers or parent > teacher.num_layers:
                raise UsageError(
                    FLAG, got=f"{student}:{parent}",
                    expected=f"blocks up to {args.num_layers}:{teacher.num_layers}, which student and teacher have",
                )  # fmt: skip
        self.projections = [
            torch.nn.Parameter(_start(teacher.hidden_size, args.hidden_size, args.seed + number))
            for number in range(len(self.pairs))
        ]
        self._outputs: dict[tuple[str, int], torch.Tensor] = {}  # of this micro-batch: [s, b, h], s / TP with SP
        self._optimizer = self._scheduler = None  # type: Any

    def attach(self, config: Any, training: Any, teacher: Callable[[], torch.nn.Module]) -> None:
        """Hook into Megatron; after the ``teacher``, which is there when Megatron has set up, has hooked in."""
        after_gradients(config, self._reduce)
        training.setup_model_and_optimizer = self._then_begin(training.setup_model_and_optimizer, teacher)
        training.save_checkpoint = self._save_before(training.save_checkpoint)

    def loss(self) -> torch.Tensor:
        """The mean over pairs for each token [b, s], without the weight."""
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        found = []
        for (student, parent), projection in zip(self.pairs, self.projections, strict=True):
            own, others = self._outputs.pop(("student", student)), self._outputs[("teacher", parent)]
            projected = torch.nn.functional.linear(own.float(), projection)
            found.append((projected - others.float()).square().mean(-1))
        mean = torch.stack(found).mean(0)
        if self.args.sequence_parallel:  # every rank has all tokens' losses, and its own tokens' gradients
            mean = gather_from_sequence_parallel_region(mean, tensor_parallel_output_grad=False)
        return mean.t()

    # -- on Megatron ----------------------------------------------------------------------------------------------

    def _then_begin(self, setup: Callable[..., Any], teacher: Callable[[], torch.nn.Module]) -> Callable[..., Any]:
        @functools.wraps(setup)
        def set_up(*positional: Any, **named: Any) -> Any:
            from megatron.core.utils import unwrap_model

            model, optimizer, self._scheduler = found = setup(*positional, **named)
            (student,) = unwrap_model(model)
            for number, (own, others) in enumerate(self.pairs):
                self._watch("student", own, student)
                self._watch("teacher", others, teacher())
                device = next(student.parameters()).device
                self.projections[number].data = self.projections[number].data.to(device)
            self._optimizer = torch.optim.AdamW(
                self.projections, lr=self.args.lr, betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_eps, weight_decay=0,
            )  # fmt: skip
            if self.args.iteration:
                self._resume(_at_step(storage.path(self.args.load), self.args.iteration))
            optimizer.step = self._then_step(optimizer.step)
            return found

        return set_up

    def _watch(self, whose: str, block: int, model: Any) -> None:
        def keep(_: Any, __: Any, output: Any) -> None:
            if whose == "teacher" or model.training:
                self._outputs[whose, block] = output[0] if isinstance(output, tuple) else output

        model.decoder.layers[block - 1].register_forward_hook(keep)

    def _reduce(self) -> None:
        """Average the projections' gradients over replicas, as Megatron does with the model's. Collective."""
        from megatron.core import parallel_state as mpu

        replicas = mpu.get_data_parallel_group(with_context_parallel=True)
        for projection in self.projections:
            assert projection.grad is not None
            if self.args.sequence_parallel:  # each rank has those of its tokens
                torch.distributed.all_reduce(projection.grad, group=mpu.get_tensor_model_parallel_group())
            torch.distributed.all_reduce(projection.grad, group=replicas)
            projection.grad /= replicas.size()

    def _then_step(self, step: Callable[[], Any]) -> Callable[[], Any]:
        @functools.wraps(step)
        def stepped() -> Any:
            found = step()
            if found[0]:
                for group in self._optimizer.param_groups:
                    group["lr"] = self._scheduler.get_lr({"max_lr": self.args.lr, "min_lr": self.args.min_lr})
                self._optimizer.step()
            self._optimizer.zero_grad()
            return found

        return stepped

    # -- what is kept ---------------------------------------------------------------------------------------------

    def _save_before(self, save: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(save)

        @functools.wraps(save)
        def saved(*positional: Any, **named: Any) -> Any:
            if self.args.rank == 0:
                import safetensors.torch

                step = signature.bind(*positional, **named).arguments["iteration"]
                path = _at_step(storage.path(self.args.save), step)
                if not storage.is_stored(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(path, safetensors.torch.save({name: each.cpu() for name, each in self._state().items()}))
            return save(*positional, **named)

        return saved

    def _state(self) -> dict[str, torch.Tensor]:
        """Projections and their moments, which are the same on every rank."""
        found = {}
        for number, projection in enumerate(self.projections):
            found[f"{number}"] = projection.detach()
            found |= {f"{number}.{key}": value for key, value in self._optimizer.state[projection].items()}
        return found

    def _resume(self, path: Path) -> None:
        import safetensors.torch

        if not path.exists():
            raise CheckpointError(f"{path}: expected the projections of this iteration, got no such file")
        found = safetensors.torch.load(path.read_bytes())
        for number, projection in enumerate(self.projections):
            projection.data.copy_(found.pop(f"{number}"))
            self._optimizer.state[projection] = {
                key: found[f"{number}.{key}"].to("cpu" if key == "step" else projection.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }


def _start(rows: int, columns: int, seed: int) -> torch.Tensor:
    if rows == columns:
        return torch.eye(rows)
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).mul_(columns**-0.5)


def _at_step(folder: Path, step: int) -> Path:
    return folder / FOLDER / f"iter_{step:07d}.safetensors"
