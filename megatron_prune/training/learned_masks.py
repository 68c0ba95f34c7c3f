"""Learns masks while Megatron trains the model that they are on (``methods/sheared_llama.py``, ``gates.py``).

Every rank holds log α of the whole model, which is small next to the weights, with the Lagrange multipliers and AdamW's
moments of both. All ranks update them in the same way, so the layout does not change the masks, and a run can resume at
another layout. Gradients of the loss differ: each rank has those of its own layers, heads, channels and samples. One
all-reduce sums them where Megatron sums its own (``zeros.after_gradients``). The Lagrangian's gradient, which is the
same on every rank, is then added.

A micro-batch has one draw of u for all its sequences. The draw is a function of ``--seed``, the step and the
micro-batch's number within the step over all replicas, so it does not depend on how a batch is divided.

Megatron's optimizer changes in two ways. Its gradient norm includes the gradients of masks and multipliers, since the
paper clips all of them together. After its step, the masks' own AdamW takes one, without decay, at a learning rate that
follows Megatron's schedule from ``--mask-lr``. The multipliers ascend.

Before each of Megatron's saves the masks' state is written next to it, in one file whatever the layout:
``learned_masks/iter_0000010.safetensors`` in the save directory. At the end of the run ``learned_masks.safetensors`` is
written for ``plan`` (``learned_file.py``).
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from megatron_prune import screen, storage
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.errors import CheckpointError
from megatron_prune.methods import sheared_llama
from megatron_prune.training import learned_file
from megatron_prune.training.learned_file import FOLDER, LearnerState
from megatron_prune.training.zeros import after_gradients

_GROUPS = ("masks", "multipliers")


@dataclass(frozen=True)
class LearnerSettings:
    """What is learned, and how fast: the verb's own flags."""

    source: ModelShape
    target: ModelShape
    learning_rate: float  # of masks and multipliers, at its highest
    ramp: float  # the target is reached after this fraction of the steps


@dataclass
class _Draw:
    """One micro-batch: its factors, the leaves that its gradients end in, and dz/d(log α) of these."""

    factors: Any  # gates.Factors
    leaves: dict[str, torch.Tensor]
    slopes: dict[str, torch.Tensor]


class Learner:
    """The masks of one run: ``attach`` before Megatron's ``pretrain``, ``finish`` after it."""

    def __init__(self, args: argparse.Namespace, settings: LearnerSettings):
        self.args, self.settings = args, settings
        self.kinds = sheared_llama.kinds(settings.source, settings.target)
        self.log_alpha = {kind.name: torch.nn.Parameter(sheared_llama.start(kind)) for kind in self.kinds}
        self.multipliers = {kind.name: torch.nn.Parameter(torch.zeros(2)) for kind in self.kinds}
        self.history: list[list[tuple[float, ...]]] = []  # of every step, by kind: ŝ, t, λ₁, λ₂
        self._gated: Any = None
        self._draws: list[_Draw] = []
        self._scheduler: Any = None
        self._optimizer: torch.optim.AdamW | None = None
        self._evaluated: Any = None  # the factors of an evaluation, until the next step

    # -- on Megatron ----------------------------------------------------------------------------------------------

    def attach(self, config: Any, training: Any) -> None:
        """Hang on Megatron: its model config, and what its module ``training`` calls to set up, to log and to save."""
        after_gradients(config, self._take_gradients)
        config.post_wrap_hooks.append(self._take_model)
        training.setup_model_and_optimizer = self._then_begin(training.setup_model_and_optimizer)
        training.save_checkpoint = self._save_before(training.save_checkpoint)
        training.training_log = self._log_after(training.training_log)

    def _take_model(self, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """A post-wrap hook: put the hooks on this rank's chunks, and the masks where they compute."""
        from megatron_prune.training.gates import Gated

        device = torch.device(torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        for parameters in (self.log_alpha, self.multipliers):
            for parameter in parameters.values():
                parameter.data = parameter.data.to(device)
        self._gated = Gated(chunks, self.settings.source)
        self._counts = [0] * len(chunks)
        for number, model in enumerate(self._gated.models):
            model.register_forward_pre_hook(functools.partial(self._begin_micro_batch, number))
            model.register_forward_hook(self._in_its_backward_pass)
        return chunks

    def _then_begin(self, setup: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's set-up, which loads the checkpoint last; then the masks that were saved with it are read."""

        @functools.wraps(setup)
        def set_up(*positional: Any, **named: Any) -> Any:
            model, optimizer, scheduler = found = setup(*positional, **named)
            self._scheduler = scheduler
            self._optimizer = self._new_optimizer()
            if self.args.iteration:
                self._resume(storage.path(self.args.load), self.args.iteration)
            optimizer.get_grad_norm = self._with_own_norm(optimizer.get_grad_norm)
            optimizer.step = self._then_step(optimizer.step)
            return found

        return set_up

    def _new_optimizer(self) -> torch.optim.AdamW:
        groups: list[dict[str, Any]] = [
            {"params": list(self.log_alpha.values()), "maximize": False},
            {"params": list(self.multipliers.values()), "maximize": True},
        ]
        betas = (self.args.adam_beta1, self.args.adam_beta2)
        rate = self.settings.learning_rate
        return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=self.args.adam_eps, weight_decay=0)

    # -- a micro-batch --------------------------------------------------------------------------------------------

    def _begin_micro_batch(self, chunk: int, model: Any, _args: Any) -> None:
        if not model.training:
            self._gated.current = self._evaluation()
            return
        number = self._counts[chunk]
        self._counts[chunk] += 1
        if number == len(self._draws):
            self._draws.append(self._draw(self.args.curr_iteration, number))
        self._gated.current = self._draws[number].factors

    def _in_its_backward_pass(self, model: Any, _args: Any, out: Any) -> None:
        """Other micro-batches come between this one's forward and backward pass."""
        current = self._gated.current
        if model.training and isinstance(out, torch.Tensor) and out.requires_grad:

            def again(_gradient: torch.Tensor) -> None:
                self._gated.current = current

            out.register_hook(again)  # type: ignore[no-untyped-call]

    def _draw(self, step: int, number: int) -> _Draw:
        from megatron.core import parallel_state as mpu

        from megatron_prune.training.gates import Factors

        place = number * mpu.get_data_parallel_world_size() + mpu.get_data_parallel_rank()
        leaves, slopes = {}, {}
        with torch.no_grad():
            for kind, u in zip(self.kinds, self.uniform(step, place), strict=True):
                whole = self.log_alpha[kind.name].detach()
                log_alpha, u = (self._gated.rows(kind.name, values) for values in (whole, u.to(whole.device)))
                leaves[kind.name] = sheared_llama.sample(log_alpha, u)
                slopes[kind.name] = sheared_llama.slope(log_alpha, u)
        for leaf in leaves.values():
            leaf.requires_grad_()
        return _Draw(Factors.of(leaves), leaves, slopes)

    def uniform(self, step: int, micro_batch: int) -> list[torch.Tensor]:
        """u of every kind, fp32 on the CPU, for a micro-batch of a step: both counted from 0, over all replicas."""
        sizes = [torch.Size(kind.shape).numel() for kind in self.kinds]
        key = hashlib.sha256(f"{self.args.seed} {step} {micro_batch}".encode()).digest()[:16]
        generator = numpy.random.Generator(numpy.random.Philox(key=int.from_bytes(key, "little")))
        flat = torch.from_numpy(generator.random(sum(sizes), dtype=numpy.float32))
        return [part.view(kind.shape) for part, kind in zip(torch.split(flat, sizes), self.kinds, strict=True)]

    def _evaluation(self) -> Any:
        if self._evaluated is None:
            self._evaluated = self._gated.evaluation(self.log_alpha, self.kinds)
        return self._evaluated

    # -- a step ---------------------------------------------------------------------------------------------------

    def _take_gradients(self) -> None:
        """Gradients of masks and multipliers, whole and the same on every rank. Collective."""
        from megatron.core import parallel_state as mpu

        whole = {name: torch.zeros_like(parameter) for name, parameter in self.log_alpha.items()}
        # What tensor-parallel ranks hold in common has the same gradient on each; by tokens, each has a part of it.
        counts_common = self.args.sequence_parallel or mpu.get_tensor_model_parallel_rank() == 0
        for draw in self._draws:
            for name, leaf in draw.leaves.items():
                if leaf.grad is None or (name in ("hidden", "layer") and not counts_common):
                    continue
                gradient = leaf.grad * draw.slopes[name]
                if name == "hidden":
                    whole[name] += gradient
                else:
                    whole[name][self._gated.layers] += gradient
        self._draws.clear()
        self._counts = [0] * len(self._counts)
        self._gated.current = None
        flat = torch.cat([part.flatten() for part in whole.values()])
        torch.distributed.all_reduce(flat)
        flat /= mpu.get_data_parallel_world_size()
        sizes = [part.numel() for part in whole.values()]
        for (name, parameter), part in zip(self.log_alpha.items(), torch.split(flat, sizes), strict=True):
            parameter.grad = part.view_as(parameter)
            self.multipliers[name].grad = None
        self._penalty().backward()  # type: ignore[no-untyped-call]

    def _penalty(self) -> torch.Tensor:
        step, ramp = self.args.curr_iteration, round(self.settings.ramp * self.args.train_iters)
        total, row = torch.zeros((), device=next(iter(self.log_alpha.values())).device), []
        for kind in self.kinds:
            log_alpha, multipliers = self.log_alpha[kind.name], self.multipliers[kind.name]
            target = sheared_llama.ramped(kind.sparsity, step, ramp)
            total = total + sheared_llama.penalty(log_alpha, multipliers, target)
            expected = sheared_llama.expected_sparsity(log_alpha.detach()).mean()
            row.append((float(expected), target, *multipliers.detach().tolist()))
        del self.history[step:]  # a step that is run again
        self.history.append(row)
        return total

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [*self.log_alpha.values(), *self.multipliers.values()]

    def _with_own_norm(self, norm: Callable[[], float]) -> Callable[[], float]:
        @functools.wraps(norm)
        def joint() -> float:
            own = sum(float(p.grad.double().square().sum()) for p in self._parameters() if p.grad is not None)
            return float((float(norm()) ** 2 + own) ** 0.5)

        return joint

    def _then_step(self, step: Callable[[], Any]) -> Callable[[], Any]:
        @functools.wraps(step)
        def stepped() -> Any:
            found = successful, norm, _ = step()
            if successful:
                self._step(float(norm))
            return found

        return stepped

    @torch.no_grad()
    def _step(self, norm: float) -> None:
        assert self._optimizer is not None
        clip = self.args.clip_grad
        if clip > 0 and clip / (norm + 1e-6) < 1:  # as Megatron clips
            for parameter in self._parameters():
                assert parameter.grad is not None
                parameter.grad *= clip / (norm + 1e-6)
        rate = self.settings.learning_rate
        lowest = rate * self.args.min_lr / self.args.lr
        for group in self._optimizer.param_groups:
            group["lr"] = self._scheduler.get_lr({"max_lr": rate, "min_lr": lowest})
        self._optimizer.step()
        for parameter in self.log_alpha.values():
            parameter.clamp_(*sheared_llama.BOUNDS)
        self._evaluated = None

    def _log_after(self, training_log: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(training_log)

        @functools.wraps(training_log)
        def logged(*positional: Any, **named: Any) -> Any:
            found = training_log(*positional, **named)
            step = signature.bind(*positional, **named).arguments["iteration"]
            if step % self.args.log_interval == 0 and self.args.rank == self.args.world_size - 1 and self.history:
                screen.say(f"masks at step {step}: {self._words()}", everywhere=True)
            return found

        return logged

    def _words(self) -> str:
        return "; ".join(
            f"{kind.name} {expected:.4f} removed of {target:.4f} (λ {one:.3g}, {two:.3g})"
            for kind, (expected, target, one, two) in zip(self.kinds, self.history[-1], strict=True)
        )

    # -- what is kept ---------------------------------------------------------------------------------------------

    def _save_before(self, save: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(save)

        @functools.wraps(save)
        def saved(*positional: Any, **named: Any) -> Any:
            step = signature.bind(*positional, **named).arguments["iteration"]
            if self.args.rank == 0:
                self.state().write(learned_file.at_step(storage.path(self.args.save), step))
            return save(*positional, **named)

        return saved

    def state(self) -> LearnerState:
        """All that going on needs, and the history for people."""
        assert self._optimizer is not None
        moments: dict[str, torch.Tensor] = {}
        for group, parameters in zip(_GROUPS, (self.log_alpha, self.multipliers), strict=True):
            for name, parameter in parameters.items():
                for key, value in self._optimizer.state[parameter].items():
                    moments[f"{group}.{name}.{key}"] = value.detach().float().cpu()
        return LearnerState(
            source=self.settings.source,
            target=self.settings.target,
            settings={"learning_rate": self.settings.learning_rate, "ramp": self.settings.ramp,
                      "steps": self.args.train_iters, "seed": self.args.seed},
            log_alpha={name: p.detach().cpu() for name, p in self.log_alpha.items()},
            multipliers={name: p.detach().cpu() for name, p in self.multipliers.items()},
            moments=moments,
            history=torch.tensor(self.history, dtype=torch.float64).view(-1, len(self.kinds), 4),
        )  # fmt: skip

    def _resume(self, load: Path, step: int) -> None:
        """Take up what was saved with this iteration; CheckpointError where it is not there, or of another run."""
        path = learned_file.at_step(load, step)
        found, mine = learned_file.read_state(path), self.state()
        for what, was, now in (
            ("target", found.target, mine.target), ("source", found.source, mine.source),
            *((name, found.settings[name], mine.settings[name]) for name in mine.settings),
        ):  # fmt: skip
            if was != now:
                raise CheckpointError(
                    f"{path}: expected masks with {what} {now}, got masks with {what} {was}: go on with the flags that "
                    f"the run began with, or give another --save; {FOLDER} belongs to the run"
                )
        assert self._optimizer is not None
        for group, parameters, held in zip(
            _GROUPS, (self.log_alpha, self.multipliers), (found.log_alpha, found.multipliers), strict=True
        ):
            for name, parameter in parameters.items():
                parameter.data.copy_(held[name])
                prefix = f"{group}.{name}."
                state = {k.removeprefix(prefix): v for k, v in found.moments.items() if k.startswith(prefix)}
                self._optimizer.state[parameter] = {
                    key: value.clone() if key == "step" else value.to(parameter.device) for key, value in state.items()
                }
        self.history = [[tuple(row) for row in rows] for rows in found.history.tolist()]

    def finish(self, save: Path, fingerprint: str, spent: dict[str, Any]) -> None:
        """Write the file for ``plan`` next to its checkpoint and name the rows that have not settled. Rank 0.

        It holds the state of the last save: a run killed after that save is finished when it is started again.
        """
        state = learned_file.read_state(learned_file.at_step(save, self.args.train_iters))
        learned = learned_file.LearnedMasks(state, fingerprint, spent)
        learned.write(save / learned_file.FILE)
        for row in learned.unsettled()[:20]:
            screen.say(f"not settled: {row}")
