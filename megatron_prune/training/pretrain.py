"""Megatron's own training loop on a range of a token stream, with an account.

All of Megatron's flags work as in Megatron. Ours say which samples are trained on (``--stream-range`` and the other
stream flags), where a from-scratch run takes its shape (``--shape-from``), which zeros are held (``--masks``), and
whether a teacher is learned from (``--objective``).
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_prune import screen, storage, verbs
from megatron_prune.artifacts import bound_workers, copy_directory, explain_failed_save
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.reader import HUGGINGFACE_FOLDER, open_checkpoint
from megatron_prune.checkpoint.tracker import find_iteration
from megatron_prune.claims import writing
from megatron_prune.data.streams import parse_range
from megatron_prune.engine import argument_checks, from_checkpoint, optimizer_layout, resume, runtime
from megatron_prune.errors import CheckpointError, NotFiniteError, UsageError
from megatron_prune.masks import missing_masks, require_masks
from megatron_prune.masks.required import MISSING
from megatron_prune.training import batch_flags, distillation, lineage, not_finite
from megatron_prune.training.account import (
    ACCOUNT,
    Account,
    AccountRecorder,
    close,
    is_complete,
    refuse_other_recipe,
    refuse_other_run,
)
from megatron_prune.training.cached_targets import CachedTargets
from megatron_prune.training.data import (
    Provider,
    complete_arguments,
    refuse_empty_parts,
    refuse_unfit_cache,
    refuse_unfit_range,
    unique_tokens,
)
from megatron_prune.training.hidden_states import HiddenStates
from megatron_prune.training.learned_file import FILE as LEARNED
from megatron_prune.training.masked import (
    MaskChoice,
    choose,
    refuse_unfit_arguments,
    refuse_zeros_that_fill,
    say_that_masks_know_the_start,
)
from megatron_prune.training.recomputation import recomputed_flops
from megatron_prune.training.scheduled_batches import ScheduledBatches
from megatron_prune.training.teacher import OnlineTeacher
from megatron_prune.training.teacher_cache import TeacherCache, open_cache

if TYPE_CHECKING:
    from megatron_prune.training.learned_masks import Learner


def train(own: verbs.PretrainSettings, words: Sequence[str]) -> int:
    """Train; 0 when the run is complete, also when it was so before. ``words`` are Megatron's flags."""
    return run(runtime.start("pretrain", words, own, complete=complete))


def run(args: argparse.Namespace, learner: Learner | None = None) -> int:
    """The same for parsed arguments; ``learner`` learns masks as it goes on."""
    args.num_workers = bound_workers("--num-workers", args.num_workers, least=0)
    save = storage.path(args.save) if args.save else None
    with nullcontext() if save is None else writing(save, "training", args.rank):
        return _run(args, save, learner)


def _run(args: argparse.Namespace, save: Path | None, learner: Learner | None) -> int:
    if save is not None:
        resume.move_old_run(args)
    objective = distillation.stated(args) if _speaks(args) else None
    if save is not None:
        own = _identity(args) | {"parameters": ModelShape.from_args(vars(args)).parameters()}
        refuse_other_run(save, own | ({} if objective is None else {"objective": objective}))
        if args.load is not None and find_iteration(save) is not None:
            refuse_other_recipe(save, _resolved(args))
    chosen = choose(args)
    if chosen is None:
        refuse_zeros_that_fill(args)
    if save is not None and _already_finished(args, save):
        if args.rank == 0:
            if not is_complete(save):
                close(save, open_checkpoint(save))
            if learner is not None and not (save / LEARNED).exists():
                learner.finish(save, open_checkpoint(save).fingerprint(), _spent(args))
            screen.say(f"{save}: the run is complete at step {args.train_iters}; nothing to do")
        return 0
    initial, first = _initial(args), None
    if args.rank == 0:
        if initial is not None and initial["flag"] == "--load":
            _refuse_finished(args)
        # A run that resumes from its own checkpoint has been through this.
        starts = initial is not None and initial["flag"] == "--pretrained-checkpoint"
        first = refuse_unfit_range(args, lineage.seen(initial["lineage"]) if starts and initial else [])
    batches = ScheduledBatches(args, first, learner) if batch_flags.asked(args) else None
    cache = _cache(args)
    teacher = OnlineTeacher(args) if distillation.asked(args) and cache is None else None
    if args.rank == 0 and teacher is not None:
        require_masks(open_checkpoint(args.teacher), allow_missing=args.allow_missing_masks)
        runtime.refuse_unfit_checkpoint(teacher.args, args.teacher, distillation.TEACHER)
    if args.rank == 0 and initial is not None:
        runtime.refuse_unfit_checkpoint(args, initial["path"], initial["flag"])
    if args.rank == 0 and chosen is not None:
        say_that_masks_know_the_start(args, chosen)
    unique = unique_tokens(args) if save is not None else 0  # for the account alone
    return _train(args, save, initial, chosen, unique, learner, batches, objective, teacher, cache)


def complete(args: argparse.Namespace, argv: list[str]) -> None:
    """Fill in what follows from the flags, and refuse what cannot work. Before Megatron validates."""
    complete_arguments(args, argv)
    if args.rank == 0:
        refuse_empty_parts(args)
    refuse_unfit_arguments(args)
    distillation.complete_arguments(args, functools.partial(from_checkpoint.given, argv))
    begin_with_checkpoint(args)
    optimizer_layout.prepare(args)
    argument_checks.check_recipe(args)
    if args.save is not None and args.save_interval is None:
        args.save_interval = args.train_iters or sys.maxsize  # at least the last step is saved
    if args.eval_interval is None:
        args.eval_interval = args.train_iters or 1000  # Megatron divides by it even when it evaluates nothing


def _identity(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags alone say about which run this is."""
    return {
        "range": list(parse_range(args.stream_range)) if args.stream_range else None,
        "permutation_seed": args.stream_permutation_seed,
        "global_batch_size": args.global_batch_size,
        "seq_length": args.seq_length,
        "steps": args.train_iters,
        "seed": args.seed,
        "batching": batch_flags.identity(args),
    }


def _resolved(args: argparse.Namespace) -> dict[str, Any]:
    """Every argument, as JSON."""
    resolved: dict[str, Any] = json.loads(json.dumps(vars(args), default=str))
    return resolved


def _already_finished(args: argparse.Namespace, save: Path) -> bool:
    """Megatron's sampler would fail on a run whose samples are all consumed, so return before it is made."""
    from megatron_prune.checkpoint.tracker import find_iteration

    found = find_iteration(save)
    return found is not None and found.iteration == args.train_iters and (save / ACCOUNT).exists()


def _refuse_finished(args: argparse.Namespace) -> None:
    """UsageError if the run that ``--load`` goes on with has no steps left: Megatron's sampler would fail."""
    held = open_checkpoint(runtime.loaded_directory(args))
    if held.release or args.finetune:  # Megatron counts steps from 0
        return
    asked, done, unit, longer = args.train_iters, held.iteration, "step", "--train-iters"
    if args.train_samples is not None:
        asked, done, unit = args.train_samples, held.args.get("consumed_train_samples", 0), "sample"
        longer = "--train-samples"
    if asked is None or done < asked:
        return
    if args.stream_range is not None:
        longer = "--stream-range"
    raise UsageError(
        "--load", got=f"{args.load}, which is at {unit} {done}",
        expected=f"a run with {unit}s left of the {asked} that are asked for",
        do=f"to go on with it, give a longer {longer}; to begin a new run with its weights, give "
        f"--pretrained-checkpoint {args.load}, and --load and --save the new run's directory",
    )  # fmt: skip


def _speaks(args: argparse.Namespace) -> bool:
    """Whether this rank refuses (the first) or keeps the account (the last)."""
    return args.rank in (0, args.world_size - 1)


def _cache(args: argparse.Namespace) -> TeacherCache | None:
    """The teacher's cache that the run reads, if it does; rank 0 refuses one that is not of this run or is damaged."""
    if not distillation.asked(args) or args.teacher_cache is None:
        return None
    found = open_cache(args.teacher_cache, check_shards=args.rank == 0)
    if args.rank == 0:
        refuse_unfit_cache(args, found, open_checkpoint(args.teacher).fingerprint() if args.teacher else None)
    return found


def _initial(args: argparse.Namespace) -> dict[str, Any] | None:
    """Where the weights come from: the run's own checkpoint, a pretrained one, or nowhere."""
    from megatron_prune.checkpoint.tracker import find_iteration

    own = args.load is not None and storage.path(args.load).is_dir() and find_iteration(args.load) is not None
    if not _speaks(args):
        return None
    flag, path = ("--load", args.load) if own else ("--pretrained-checkpoint", args.pretrained_checkpoint)
    if path is None:
        return None
    checkpoint = open_checkpoint(path)
    missing = missing_masks(checkpoint)
    return {
        "flag": flag,
        "path": str(path),
        "fingerprint": checkpoint.fingerprint(),
        "pruning": checkpoint.pruning,
        "lineage": lineage.of(checkpoint),
        **({} if missing is None else {MISSING: missing}),
    }


def _train(
    args: argparse.Namespace,
    save: Path | None,
    initial: dict[str, Any] | None,
    chosen: MaskChoice | None,
    unique: int,
    learner: Learner | None,
    batches: ScheduledBatches | None,
    objective: dict[str, Any] | None,
    teacher: OnlineTeacher | None,
    cache: TeacherCache | None,
) -> int:
    from megatron.core.enums import ModelType
    from megatron.core.utils import unwrap_model
    from megatron.training import pretrain, training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_prune.engine.forward import count_nonzero, forward_step
    from megatron_prune.engine.vocabulary import clear_padding, mask_padding
    from megatron_prune.training.zeros import Zeros

    optimizer_layout.install(args)
    provider = Provider(args, batches, cache)
    config = runtime.model_config(args)
    zeros = None if chosen is None else Zeros(args, chosen)
    if zeros is not None:
        zeros.attach(config, training)
    if learner is not None:
        learner.attach(config, training)
    if batches is not None:
        batches.attach(training)
    step = forward_step
    if teacher is not None:
        teacher.attach(training)
        hidden = HiddenStates(args, teacher.args) if args.distill_hidden_states else None
        if hidden is not None:
            hidden.attach(config, training, lambda: teacher.model)
        step = distillation.Distillation(args, teacher, hidden).forward_step
    elif cache is not None:
        step = distillation.Distillation(args, CachedTargets(cache)).forward_step
    recorder = _OnFirstStep(args, save, initial, provider, zeros, unique, objective)
    training.training_log = recorder.wrap(training.training_log)
    guarded = not_finite.guard_save(training.save_checkpoint, recorder.is_loss_finite, save)
    training.save_checkpoint = recorder.settle_before(guarded)
    training.print_rank_last = _on_the_screen_too(training.print_rank_last)
    model: list[torch.nn.Module] = []

    def keep(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        model.extend(chunks)
        return chunks

    def without_padding(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        clear_padding(chunks, args)
        mask_padding(chunks, args)
        return chunks

    config.post_wrap_hooks += [keep, without_padding]
    try:
        with (
            explain_failed_save(save),
            argument_checks.explain_assertions(AssertionError, ImportError),
            not_finite.explain_failed_validation(save, lambda: recorder.last_step),
        ):
            pretrain(pretrain_cfg_container_from_args(args, config), provider, ModelType.encoder_or_decoder, step)
            if save is None:
                not_finite.refuse_not_finite(model, recorder.is_loss_finite(), recorder.last_step, save)
    except NotFiniteError as error:
        if recorder.recorder is not None:
            recorder.recorder.end_attempt(str(error))
        raise

    if zeros is not None:
        zeros.audit("at the end")
    if save is not None:
        nonzero = count_nonzero(unwrap_model(model))
        final = _saved(save, args.train_iters) if recorder.last_step == args.train_iters else None
        if recorder.recorder is not None:
            recorder.take_schedule()
            recorder.recorder.finish(final=final, parameters_nonzero=nonzero)
        if learner is not None and final is not None and args.rank == 0:
            learner.finish(save, final["fingerprint"], _spent(args))
        torch.distributed.barrier()
        screen.say(f"wrote {save}: step {recorder.last_step}")
    torch.distributed.destroy_process_group()
    return 0


def _on_the_screen_too(print_rank_last: Callable[[str], None]) -> Callable[[str], None]:
    """Megatron's lines on steps and validation, which its last rank prints, are what a person waits for."""

    @functools.wraps(print_rank_last)
    def printing(message: str) -> None:
        print_rank_last(message)
        is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        if screen.is_diverted() and is_last and message.strip("- \n"):
            screen.say(message.strip(), everywhere=True)

    return printing


def _saved(save: Path, steps: int) -> dict[str, Any]:
    """Which weights are in ``save`` now that training has returned: Megatron has ended asynchronous saves by then."""
    final = runtime.identity(save)
    if final["iteration"] != steps:
        raise CheckpointError(
            f"{save}: expected the weights of step {steps}, at which the run ended, got those of step "
            f"{final['iteration']}"
        )
    return final


def _spent(args: argparse.Namespace) -> dict[str, Any]:
    """What learning masks took, and on which samples."""
    shape, samples = ModelShape.from_args(vars(args)), args.global_batch_size * args.train_iters
    return {
        **_identity(args),
        "tokens": samples * args.seq_length,
        "flops": shape.training_flops(args.seq_length) * samples,
    }


class _OnFirstStep:
    """Listens to Megatron's log; opens the account at the first step, when all that it says is known."""

    def __init__(
        self,
        args: argparse.Namespace,
        save: Path | None,
        initial: dict[str, Any] | None,
        provider: Provider,
        zeros: Any,
        unique: int,
        objective: dict[str, Any] | None,
    ):
        self.args, self.save, self.initial, self.provider, self.zeros = args, save, initial, provider, zeros
        self.unique, self.objective = unique, objective
        self.recorder: AccountRecorder | None = None
        self.last_step = 0
        self.loss_is_finite = True

    def wrap(self, training_log: Any) -> Any:
        """Megatron's ``training_log`` with our listener before it; the last rank has the reduced loss."""
        signature = inspect.signature(training_log)

        @functools.wraps(training_log)
        def listening(*positional: Any, **named: Any) -> Any:
            values = signature.bind(*positional, **named).arguments
            self.last_step = values["iteration"]
            loss = values["loss_dict"].get("lm loss")  # on the last pipeline stage
            self.loss_is_finite = loss is None or bool(torch.isfinite(loss))
            if self.save is not None and self.args.rank == self.args.world_size - 1:
                if self.recorder is None:
                    self.recorder = self._open()
                self.recorder.step(
                    values["iteration"],
                    float("nan") if loss is None else loss.item(),
                    values["learning_rate"],
                    values["grad_norm"],
                )
            return training_log(*positional, **named)

        return listening

    def settle_before(self, save: Any) -> Any:
        """Megatron's ``save_checkpoint``, and before it every loss in the table: a run that goes on lacks none."""

        @functools.wraps(save)
        def settled(*positional: Any, **named: Any) -> Any:
            if self.recorder is not None:
                self.recorder.settle()
                if self.take_schedule():
                    self.recorder.account.write(self.recorder.save)
            return save(*positional, **named)

        return settled

    def is_loss_finite(self) -> bool:
        """False on the rank that has the loss, if that of its last step is NaN or infinite."""
        return self.loss_is_finite

    def take_schedule(self) -> bool:
        """Bring the account up to the schedule of batches, if there is one."""
        if self.recorder is None or self.provider.batches is None:
            return False
        self.recorder.account.schedule = self.provider.batches.described()
        self.recorder.account.domains = self.provider.domains()
        return True

    def _open(self) -> AccountRecorder:
        assert self.save is not None and self.objective is not None  # of the last rank
        args = self.args
        shape = ModelShape.from_args(vars(args))
        train = self.provider.train
        samples = args.global_batch_size * args.train_iters
        removed = self.zeros.removed if self.zeros is not None else 0
        if self.initial is None:
            start = "random"
        else:
            start = "pruned" if self.initial["pruning"] else "continued"
        account = Account(
            start=start,
            stream=train.stream.describe() if train is not None else None,
            **_identity(args),
            objective=self.objective,
            flops_teacher=distillation.teacher_flops(args, self.objective),
            micro_batch_size=args.micro_batch_size,
            parameters=shape.parameters(),
            flops_executed=shape.training_flops(args.seq_length) * samples,
            flops_recomputed=recomputed_flops(args, shape) * samples,
            flops_theoretical=shape.training_flops(args.seq_length, removed) * samples,
            unique_tokens=self.unique,
            arguments=_resolved(args),
            initial=None
            if self.initial is None
            else {k: self.initial[k] for k in ("path", "fingerprint", "pruning", MISSING) if k in self.initial},
            lineage=[] if self.initial is None else self.initial["lineage"],
            masks=self.zeros.hash if self.zeros is not None else None,
            domains=self.provider.domains(),
            schedule=None if self.provider.batches is None else self.provider.batches.described(),
        )
        began = account.adopt(self.save)
        _carry_tokenizer(args, self.save)
        return AccountRecorder(account, self.save, began)


def _carry_tokenizer(args: argparse.Namespace, save: Path) -> None:
    """Copy the tokenizer and Hugging Face config that came with the model, for evaluation and export."""
    source = args.pretrained_checkpoint or args.shape_from
    folder = open_checkpoint(source).huggingface if source else None
    # In a store, what is there may be a part of it: a run before this one may have been killed.
    if folder is not None and (storage.is_stored(save) or not (save / HUGGINGFACE_FOLDER).exists()):
        copy_directory(folder, save / HUGGINGFACE_FOLDER)


def begin_with_checkpoint(args: argparse.Namespace) -> None:
    """Have fp32 masters begin with the checkpoint's values where weights are FP8 (``--fp8-param-gather``).

    Megatron makes the masters of weights that were loaded without their optimizer from the weights as they are then:
    FP8, dequantized. A run from a pruned checkpoint would begin with an FP8 rounding of it; one from random weights
    would not. ``load_main_params_from_ckpt`` fixes this where the checkpoint is not streamed into FP8, and works only
    with ``no_load_optim``. That would lose the moments of a run that resumes from its own checkpoint, so all three are
    set for the launch that begins a run, and for no other.

    Call before Megatron validates. UsageError where masters cannot take those values.
    """
    if not args.fp8_param_gather or not _loads_weights_alone(args):
        return
    if args.use_precision_aware_optimizer and (args.fp8_recipe == "delayed" or args.main_params_dtype != "fp32"):
        raise UsageError(
            "--use-precision-aware-optimizer", got="it with --fp8-param-gather and --fp8-recipe " + args.fp8_recipe,
            expected="no such flag where a run starts from a checkpoint",
            why="this optimizer makes its master weights from the FP8 weights, which are rounded",
            do="leave it out, or take another recipe and fp32 masters",
        )  # fmt: skip
    args.load_main_params_from_ckpt = args.no_load_optim = True
    args.stream_ckpt_dequant = False  # streaming would hand over the FP8 weights again


def _loads_weights_alone(args: argparse.Namespace) -> bool:
    if args.load is None or not storage.path(args.load).is_dir() or find_iteration(args.load) is None:
        return args.pretrained_checkpoint is not None
    return args.finetune or args.no_load_optim or open_checkpoint(args.load).release
