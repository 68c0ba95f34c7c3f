"""Learns masks while Megatron trains the model that they are on (``methods/sheared_llama.py``, ``gates.py``).

log α of FFN channels, heads and groups is sharded with the weights that it is on (``mask_shards.py``); that of layers
and hidden channels, and the Lagrange multipliers, are on every rank. Gradients are summed where Megatron sums its own
(``zeros.after_gradients``), so that copies stay equal to the bit (``mask_gradients.py``). What is learned does not
depend on the layout, and a run can resume at another one.

A micro-batch has one draw of u for all its sequences. The draw is a function of ``--seed``, the step, the micro-batch's
number within the step over all replicas, and the unit's place in the model.

Megatron's optimizer changes in two ways. Its gradient norm includes the gradients of masks and multipliers, since the
paper clips all of them together. After its step, the masks' own AdamW takes one, without decay, at a learning rate that
follows Megatron's schedule from ``--mask-lr``. The multipliers ascend.

Before each of Megatron's saves the masks' state is written next to it, each rank its shards:
``learned_masks/iter_0000010`` in the save directory. At the end of the run ``learned_masks.safetensors`` is written for
``plan`` (``learned_file.py``).
"""

from __future__ import annotations

import argparse
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_prune import screen, storage
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.errors import CheckpointError
from megatron_prune.methods import sheared_llama
from megatron_prune.training import learned_file, mask_gradients
from megatron_prune.training.learned_file import FOLDER
from megatron_prune.training.mask_shards import REPLICATED, MaskShards
from megatron_prune.training.zeros import after_gradients

_GROUPS = ("masks", "multipliers")


@dataclass(frozen=True)
class LearnerSettings:
    """What is learned, and how fast: the verb's own flags."""

    source: ModelShape
    target: ModelShape
    learning_rate: float  # of masks, at its highest
    ramp: float  # the target is reached after this fraction of the steps
    multiplier_rate: float | None = None  # of multipliers, at its highest; None: that of masks

    @property
    def rates(self) -> tuple[float, float]:
        """Of masks and of multipliers."""
        return self.learning_rate, self.multiplier_rate or self.learning_rate


class Learner:
    """The masks of one run: ``attach`` before Megatron's ``pretrain``, ``finish`` after it."""

    def __init__(self, args: argparse.Namespace, settings: LearnerSettings):
        self.args, self.settings = args, settings
        self.kinds = sheared_llama.kinds(settings.source, settings.target)
        self.log_alpha: dict[str, torch.nn.Parameter] = {}  # this rank's shards, by kind, once the model is there
        self.multipliers: dict[str, torch.nn.Parameter] = {}
        self.history: list[list[tuple[float, ...]]] = []  # of every step, by kind: ŝ, t, λ₁, λ₂
        self._gated: Any = None
        self._ranks = mask_gradients.Ranks()
        self._square = torch.zeros(())  # of the norm of the gradients of masks and multipliers
        self._factors: dict[int, Any] = {}  # of micro-batches that a virtual stage has yet to begin
        self._of_loss: dict[str, torch.Tensor] = {}  # the loss's gradients of this step, by kind
        self._scheduler: Any = None
        self._optimizer: torch.optim.AdamW | None = None
        self._evaluated: Any = None  # the factors of an evaluation, until the next step
        self._present = False

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
        self._gated = Gated(chunks, self.settings.source, self.kinds)
        self._ranks = mask_gradients.Ranks.of_megatron()
        for kind in self.kinds:
            shard = self._shards.cut(kind, sheared_llama.start(kind))
            self.log_alpha[kind.name] = torch.nn.Parameter(shard.to(device))
            self._of_loss[kind.name] = torch.zeros_like(self.log_alpha[kind.name].data)
            self.multipliers[kind.name] = torch.nn.Parameter(torch.zeros(2, device=device))
        self._counts = [0] * len(chunks)
        for number, model in enumerate(self._gated.models):
            model.register_forward_pre_hook(functools.partial(self._begin_micro_batch, number))
            model.register_forward_hook(self._in_its_backward_pass)
        return chunks

    @property
    def _shards(self) -> MaskShards:
        shards: MaskShards = self._gated.shards
        return shards

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
        if not any(self._counts):
            for gradient in self._of_loss.values():
                gradient.zero_()
        self._counts[chunk] += 1
        if number not in self._factors:
            self._factors[number] = self._draw(self.args.curr_iteration, number)
        self._gated.current = self._factors[number]
        if min(self._counts) > number:  # what its backward pass needs, autograd holds, and no longer than that
            del self._factors[number]

    def _in_its_backward_pass(self, model: Any, _args: Any, out: Any) -> None:
        """Other micro-batches come between this one's forward and backward pass."""
        current = self._gated.current
        if model.training and isinstance(out, torch.Tensor) and out.requires_grad:

            def again(_gradient: torch.Tensor) -> None:
                self._gated.current = current

            out.register_hook(again)  # type: ignore[no-untyped-call]

    def _draw(self, step: int, number: int) -> Any:
        """A micro-batch's factors; their gradients are added to those of log α in its backward pass."""
        from megatron_prune.training.gates import Factors

        place = number * self._ranks.replicas + self._ranks.replica
        # What tensor-parallel ranks hold in common has the same gradient on each; by tokens, each has a part of it.
        counts_common = self.args.sequence_parallel or self._ranks.tensor == 0
        leaves = {}
        for name, drawn in self._shards.uniform(self.args.seed, step, place).items():
            log_alpha = self.log_alpha[name].detach()
            u = drawn.to(log_alpha.device)
            leaves[name] = leaf = sheared_llama.sample(log_alpha, u).requires_grad_()
            if name not in REPLICATED or counts_common:
                slope = sheared_llama.slope(log_alpha, u)
                add = functools.partial(_add, self._of_loss[name], slope)
                leaf.register_post_accumulate_grad_hook(add)  # type: ignore[no-untyped-call]
        return Factors.of(leaves)

    def _evaluation(self) -> Any:
        if self._evaluated is None:
            self._evaluated = self._gated.evaluation(self.log_alpha, present=self._present)
        return self._evaluated

    @contextmanager
    def as_it_is(self) -> Iterator[None]:
        """Evaluate with as many units as are expected to stay now: the target's say little before they are reached."""
        self._present, self._evaluated = True, None
        try:
            yield
        finally:
            self._present, self._evaluated = False, None

    # -- a step ---------------------------------------------------------------------------------------------------

    def _take_gradients(self) -> None:
        """Gradients of masks and multipliers, from the loss and the Lagrangian's terms. Collective."""
        self._counts = [0] * len(self._counts)
        self._gated.current = None
        step, ramp = self.args.curr_iteration, round(self.settings.ramp * self.args.train_iters)
        targets = [sheared_llama.ramped(kind.sparsity, step, ramp) for kind in self.kinds]
        found = mask_gradients.take(self._shards, self._ranks, self.log_alpha, self.multipliers, self._of_loss, targets)
        self._square = found.square
        del self.history[step:]  # a step that is run again
        self.history.append(found.history)

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [*self.log_alpha.values(), *self.multipliers.values()]

    def _with_own_norm(self, norm: Callable[[], float]) -> Callable[[], float]:
        @functools.wraps(norm)
        def joint() -> float:
            return float((float(norm()) ** 2 + float(self._square)) ** 0.5)

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
        for group, rate in zip(self._optimizer.param_groups, self.settings.rates, strict=True):
            lowest = rate * self.args.min_lr / self.args.lr
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
            self._save(learned_file.at_step(storage.path(self.args.save), step))
            return save(*positional, **named)

        return saved

    def _settings(self) -> dict[str, Any]:
        return {"learning_rate": self.settings.learning_rate, "ramp": self.settings.ramp,
                "multiplier_rate": self.settings.rates[1],
                "steps": self.args.train_iters, "seed": self.args.seed}  # fmt: skip

    def _save(self, folder: Path) -> None:
        """Write all that going on needs, and the history for people. Collective."""
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing import ShardedTensor

        settings = self.settings
        state: dict[str, Any] = {"about": learned_file.about(settings.source, settings.target, self._settings())}
        history = torch.tensor(self.history, dtype=torch.float64).view(-1, len(self.kinds), 4)
        whole, shards = {"history": history}, dict[str, tuple[sheared_llama.Kind, torch.Tensor]]()
        for kind in self.kinds:
            of_masks = {f"log_alpha.{kind.name}": self.log_alpha[kind.name].detach()}
            of_masks |= self._moments("masks", kind.name, self.log_alpha[kind.name])
            whole[f"multipliers.{kind.name}"] = self.multipliers[kind.name].detach()
            whole |= self._moments("multipliers", kind.name, self.multipliers[kind.name])
            for key, values in of_masks.items():
                if kind.name in REPLICATED or key.endswith(".step"):
                    whole[key] = values
                else:
                    shards[key] = kind, values
        rank = torch.distributed.get_rank()
        for key, values in whole.items():
            state[key] = ShardedTensor.from_rank_offsets(key, values, replica_id=rank)
        for key, (kind, values) in shards.items():
            state[key] = self._shards.sharded(key, kind, values, self._ranks.replica)
        if rank == 0:
            if not storage.is_stored(folder):
                folder.mkdir(parents=True, exist_ok=True)
            (folder / ".metadata").unlink(missing_ok=True)  # of a run that was killed: what follows replaces it
        torch.distributed.barrier()
        dist_checkpointing.save(state, str(folder), async_strategy="mcore")

    def _moments(self, group: str, name: str, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        assert self._optimizer is not None
        state = self._optimizer.state[parameter]
        return {
            f"moments.{group}.{name}.{key}": value.detach().float().view(-1) if value.ndim == 0 else value
            for key, value in state.items()
        }

    def _resume(self, load: Path, step: int) -> None:
        """Take up what was saved with this iteration; CheckpointError where it is not there, or of another run."""
        path = learned_file.at_step(load, step)
        found, settings = learned_file.read_state(path), self._settings()
        for what, was, now in (
            ("target", found.target, self.settings.target), ("source", found.source, self.settings.source),
            *((name, found.settings[name], settings[name]) for name in settings),
        ):  # fmt: skip
            if was != now:
                raise CheckpointError(
                    f"{path}: expected masks with {what} {now}, got masks with {what} {was}: go on with the flags that "
                    f"the run began with, or give another --save; {FOLDER} belongs to the run"
                )
        for kind in self.kinds:
            self._take_up("masks", kind, self.log_alpha[kind.name], found.log_alpha[kind.name], found.moments)
            self._take_up("multipliers", kind, self.multipliers[kind.name], found.multipliers[kind.name], found.moments)
        self.history = [[tuple(row) for row in rows] for rows in found.history.tolist()]

    def _take_up(
        self,
        group: str,
        kind: sheared_llama.Kind,
        parameter: torch.nn.Parameter,
        values: torch.Tensor,
        moments: Mapping[str, torch.Tensor],
    ) -> None:
        """A parameter's values and moments, of which this rank takes its shard."""
        assert self._optimizer is not None

        def here(whole: torch.Tensor) -> torch.Tensor:
            return (self._shards.cut(kind, whole) if group == "masks" else whole).to(parameter.device)

        parameter.data.copy_(here(values))
        prefix = f"{group}.{kind.name}."
        state = {key.removeprefix(prefix): value for key, value in moments.items() if key.startswith(prefix)}
        self._optimizer.state[parameter] = {
            key: value.view(()) if key == "step" else here(value) for key, value in state.items()
        }

    def finish(self, save: Path, fingerprint: str, spent: dict[str, Any]) -> None:
        """Write the file for ``plan`` next to its checkpoint and name the rows that have not settled. Rank 0.

        It holds the state of the last save: a run killed after that save is finished when it is started again.
        """
        state = learned_file.read_state(learned_file.at_step(save, self.args.train_iters))
        learned = learned_file.LearnedMasks(state, fingerprint, spent)
        learned.write(save / learned_file.FILE)
        for row in learned.unsettled()[:20]:
            screen.say(f"not settled: {row}")


def _add(gradient: torch.Tensor, slope: torch.Tensor, leaf: torch.Tensor) -> None:
    """Add the gradient of a leaf, times its slope, and forget it: recomputation may add to it again."""
    assert leaf.grad is not None
    gradient.addcmul_(leaf.grad, slope)
    leaf.grad = None
