"""An online teacher: a checkpoint that runs, frozen, in the job of the student that learns from it.

It is built at the student's tensor, context and pipeline parallel sizes and in its 16- or 32-bit type, never in FP8,
without DDP and without an optimizer. Its depth and width are its own; its vocabulary must be the student's. It is not
part of the model that Megatron trains, so checkpoints are free of it. The student's random states are left as they are.

On one pipeline stage it runs just before the student, micro-batch by micro-batch. On several, Megatron's schedule sends
the hidden states of one model between stages. So the teacher first takes all micro-batches of a step through its own
stages, under Megatron's schedule for forward passes. The last stage keeps the final hidden states, [s, b, h] of each
micro-batch (s / TP under sequence parallelism); they become logits when the student's loss needs them.
"""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from megatron_prune import screen
from megatron_prune.checkpoint.layer_shapes import ENCODED, IN_WORDS, PATH
from megatron_prune.checkpoint.layout import vocabulary
from megatron_prune.checkpoint.model_arguments import refuse_unrestored, restored
from megatron_prune.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_prune.data.tokenizers import HuggingFaceTokenizer
from megatron_prune.engine import from_checkpoint, runtime
from megatron_prune.errors import UsageError
from megatron_prune.training.distillation_loss import FullTargets

FLAG = "--teacher"
# How the student's stages divide its layers, and what belongs to one model's captured or low-precision passes.
_OWN_DEFAULTS = {
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "cuda_graph_impl": "none",
    "fp8": None,
    "fp4": None,
    "fp8_param_gather": False,
    "perform_initialization": False,  # every weight is loaded
    "pretrained_checkpoint": None,
    "finetune": True,  # weights alone
    "no_load_optim": True,
    "no_load_rng": True,
    "exit_on_missing_checkpoint": True,
    "non_persistent_global_ckpt_dir": None,
}


def arguments(args: argparse.Namespace) -> argparse.Namespace:
    """Megatron's arguments of the teacher of ``args``, which Megatron has validated.

    UsageError or CheckpointError where it cannot teach this student.
    """
    checkpoint = open_checkpoint(args.teacher)
    shape = checkpoint.shape
    stages = args.pipeline_model_parallel_size
    if shape.num_layers % stages:
        raise UsageError(
            FLAG, got=f"{args.teacher} with {shape.num_layers} layers",
            expected=f"a number of layers that divides by the {stages} pipeline stages",
        )  # fmt: skip
    ranks = args.tensor_model_parallel_size
    for layer in dict.fromkeys(shape.by_layer()):
        for name, size in layer.unshared(ranks).items():
            fits = "a multiple or a divisor of" if name == "num_query_groups" else "a number of them that divides by"
            raise UsageError(
                FLAG, got=f"{args.teacher} with {size} {IN_WORDS[name]}",
                expected=f"{fits} --tensor-model-parallel-size {ranks}",
            )  # fmt: skip
    if shape.positions and shape.positions < args.seq_length:
        raise UsageError(
            FLAG, got=f"{args.teacher} with {shape.positions} positions",
            expected=f"at least the {args.seq_length} of --seq-length",
        )  # fmt: skip
    refuse_other_vocabulary(args, checkpoint)
    found = copy.copy(args)
    vars(found).update(restored(checkpoint.args))
    vars(found).update({PATH: None, ENCODED: None} | shape.to_args(), encoder_num_layers=shape.num_layers)
    vars(found).update(_OWN_DEFAULTS)
    found.load = str(checkpoint.root)
    found.ckpt_step = None if checkpoint.release else checkpoint.iteration
    refuse_unrestored(checkpoint.args, f"{FLAG} {args.teacher}", vars(found))
    return found


def refuse_other_vocabulary(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """UsageError unless the same ids mean the same words to the teacher ``checkpoint`` and to the model of ``args``.

    What they mean is compared where both came with their Hugging Face tokenizers.
    """
    words, padded = vocabulary(checkpoint.args), checkpoint.shape.padded_vocab_size
    for what, got, expected in (
        ("words", words, args.vocab_size),
        ("embeddings, with padding", padded, args.padded_vocab_size),
    ):
        if got != expected:
            raise UsageError(
                FLAG, got=f"{args.teacher} with {got} {what}", expected=f"the student's {expected}",
                why="the divergence is over the words of one vocabulary",
            )  # fmt: skip
    own = from_checkpoint.source(args)
    folders = [from_checkpoint.tokenizer_folder(each) for each in (checkpoint, own) if each is not None]
    if len(folders) == 2 and None not in folders:
        theirs, ours = (HuggingFaceTokenizer(folder).fingerprint() for folder in folders if folder is not None)
        if theirs != ours:
            raise UsageError(
                FLAG, got=f"{args.teacher}, whose tokenizer is another", expected="the student's tokenizer",
                why="the same ids mean other text",
            )  # fmt: skip


class OnlineTeacher:
    """Make one before Megatron's ``pretrain``, and ``attach`` it; ``targets`` are for each micro-batch in turn."""

    def __init__(self, args: argparse.Namespace):
        self.args = arguments(args)
        self._stages = args.pipeline_model_parallel_size
        self.model: Any = None  # this rank's stage, once Megatron has set up
        self._hidden: deque[torch.Tensor] = deque()  # of the step's micro-batches that are still to come

    def attach(self, training: Any) -> None:
        """Hook into what Megatron's module ``training`` calls to set up and for a step."""
        training.setup_model_and_optimizer = self._then_load(training.setup_model_and_optimizer)
        if self._stages > 1:
            training.train_step = self._before_step(training.train_step)

    def targets(self, batch: Mapping[str, Any]) -> FullTargets:
        """The teacher's logits for a micro-batch; see ``TargetProvider``."""
        with torch.no_grad():
            hidden = self._hidden.popleft() if self._stages > 1 else self._forward(batch)
            model = self.model
            tied = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
            logits = model._scale_logits(model.output_layer(hidden, weight=tied)[0])
        return FullTargets(logits.transpose(0, 1))  # [s, b, V / TP] -> [b, s, V / TP]

    def _forward(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """This stage's output: hidden states [s, b, h], final ones on the last stage."""
        found: torch.Tensor = self.model(
            batch["tokens"], batch["position_ids"], batch["attention_mask"], output_processor=_hidden_states
        )
        return found

    # -- the model ------------------------------------------------------------------------------------------------

    def _then_load(self, setup: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(setup)
        def set_up(*positional: Any, **named: Any) -> Any:
            found = setup(*positional, **named)
            self._load()
            return found

        return set_up

    def _load(self) -> None:
        """Build this rank's stage and load it, frozen. Collective."""
        from megatron.core.utils import unwrap_model
        from megatron.training.checkpointing import load_checkpoint

        with _as_megatrons(self.args), _same_random_numbers():
            model = runtime.build_model(self.args)
            load_checkpoint(model, None, None)
        (self.model,) = unwrap_model(model)
        self.model.eval().requires_grad_(False)
        if torch.distributed.get_rank() == 0:
            screen.say(f"teacher: {self.args.teacher}, {self.args.num_layers} layers of {self.args.hidden_size}")

    # -- on several stages ----------------------------------------------------------------------------------------

    def _before_step(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's ``train_step``, in which the teacher sees every micro-batch before the student does."""
        signature = inspect.signature(train_step)

        @functools.wraps(train_step)
        def stepped(*positional: Any, **named: Any) -> Any:
            bound = signature.bind(*positional, **named)
            schedule = bound.arguments["forward_backward_func"]
            bound.arguments["forward_backward_func"] = functools.partial(self._taught, schedule)
            return train_step(*bound.args, **bound.kwargs)

        return stepped

    def _taught(self, schedule: Callable[..., Any], *, data_iterator: Any, **named: Any) -> Any:
        count = named["num_microbatches"]
        samples = None if data_iterator is None else [next(data_iterator) for _ in range(count)]
        self._through_the_pipeline(samples, count, named["seq_length"], named["micro_batch_size"])
        found = schedule(data_iterator=None if samples is None else iter(samples), **named)
        assert not self._hidden
        return found

    def _through_the_pipeline(self, samples: list[Any] | None, count: int, length: int, size: int) -> None:
        """Take a step's micro-batches through all stages; the last one keeps its hidden states."""
        from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving

        from megatron_prune.engine import forward

        self._hidden.clear()

        def keep(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
            self._hidden.append(output)
            return forward.no_loss(output)

        def step(iterator: Iterator[Any], stage: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            return self._forward(forward.get_batch(iterator, None)), keep

        with torch.no_grad():
            forward_backward_pipelining_without_interleaving(
                forward_step_func=step,
                data_iterator=None if samples is None else iter(samples),
                model=self.model,
                num_microbatches=count,
                seq_length=length,
                micro_batch_size=size,
                forward_only=True,
            )


def _hidden_states(*, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
    """Megatron's ``output_processor``: no logits yet."""
    return hidden_states


@contextmanager
def _as_megatrons(args: argparse.Namespace) -> Iterator[None]:
    """With ``args`` as Megatron's global arguments, and the iteration that it has loaded left as it was."""
    from megatron.training import get_args, global_vars
    from megatron.training.checkpointing import get_loaded_iteration, set_loaded_iteration

    before, iteration = get_args(), get_loaded_iteration()
    global_vars.set_args(args)
    try:
        yield
    finally:
        global_vars.set_args(before)
        set_loaded_iteration(iteration)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Leave torch's and Megatron's random states as they were."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield
    tracker.set_states(states)
