"""Dry run of a verb's command line as a rank of another machine: parse, validate, build its pipeline stages.

``rehearse`` runs the verb itself until it would start Megatron, so that its own refusals, the checkpoint's arguments
and Megatron's validation all apply. The world has the cluster's size, in a fake process group whose collectives do
nothing, and the GPU is simulated. Weights are allocated but never written, so a stage of an 8B model takes no memory.
Nothing is written to disk, and no tracker is repaired.

Each dry run is a forked child, because Megatron's globals can be set only once. Call it where ``engine.cpu.prepare``
was called. Stages use the local spec, whatever the command asks for: the weights are the same. The caller states what
is installed on the cluster, which has the same effect as there (``engine.installed``).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import Pipe
from types import SimpleNamespace
from typing import Any, NoReturn

import torch

from megatron_prune import screen
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.engine import cpu
from megatron_prune.engine.installed import Installed
from megatron_prune.errors import MegatronPruneError, RunError

# The exceptions of Megatron's refusals; anything else is a bug and keeps its traceback.
REFUSALS = (MegatronPruneError, AssertionError, ValueError, RuntimeError, NotImplementedError)
ASSUMED_TE = "2.9.0"  # on a cluster with Transformer Engine


class MegatronRefused(Exception):
    """The command would not start; the text is the reason."""


@dataclass(frozen=True)
class PipelineStage:
    """The parameters of one pipeline stage on one tensor-parallel rank, by kind."""

    layers: int
    linears: int
    vocabulary: int  # embedding and output layer
    others: int
    chunks: tuple[int, ...]  # layers of each virtual stage
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)  # of the whole tensor, by stored key

    @property
    def parameters(self) -> int:
        return self.linears + self.vocabulary + self.others


@dataclass(frozen=True)
class Rehearsal:
    """``args`` as validated by Megatron; ``stages`` in order, or why they cannot be built; ``off``: what is
    switched off because the cluster lacks its packages."""

    args: argparse.Namespace
    microbatches: int
    stages: tuple[PipelineStage, ...]
    unbuilt: str | None = None
    off: tuple[str, ...] = ()

    @property
    def shape(self) -> ModelShape:
        return ModelShape.from_args(vars(self.args))


def rehearse(
    verb: Callable[[list[str]], int],
    argv: list[str],
    *,
    gpus: int,
    per_node: int,
    capability: tuple[int, int],
    has: Installed,
) -> Rehearsal:
    """Run ``verb(argv)``, a verb of the command line, as a rank of ``gpus``, until it has its arguments.

    Raises MegatronRefused with the reason if it would not start.
    """

    def work() -> Rehearsal:
        os.environ.update(
            RANK="0", WORLD_SIZE=str(gpus), LOCAL_RANK="0", LOCAL_WORLD_SIZE=str(per_node),
            MASTER_ADDR="127.0.0.1", MASTER_PORT="29500",
        )  # fmt: skip
        off = _pretend_gpu(capability, has)
        args = _parse(verb, argv)
        microbatches = _microbatches(args)
        try:
            stages = [in_child(partial(_build, args, p)) for p in range(args.pipeline_model_parallel_size)]
        except MegatronRefused as refused:
            return Rehearsal(args, microbatches, (), str(refused), tuple(off))
        return Rehearsal(args, microbatches, tuple(stages), off=tuple(off))

    return in_child(work)


def _pretend_gpu(capability: tuple[int, int], has: Installed) -> list[str]:
    """From now on, apply the cluster's flags and refusals; the returned list collects what its packages lack."""
    import megatron.core.utils
    import megatron.training  # noqa: F401
    from packaging.version import Version

    from megatron_prune.engine import installed

    cpu.prepare_megatron()
    cpu._cuda_is_available = lambda: True
    properties = SimpleNamespace(major=capability[0], minor=capability[1], name="", total_memory=0)
    torch.cuda.get_device_capability = lambda *_: capability
    torch.cuda.get_device_properties = lambda *_: properties  # type: ignore[assignment]
    megatron.core.utils._te_version = Version(ASSUMED_TE if has.te else "0.0.0")
    installed.assume(has)
    switched_off: list[str] = []

    def keep(args: argparse.Namespace, off: list[str]) -> None:
        switched_off.extend(off)

    installed.say = keep
    return switched_off


class _Parsed(BaseException):
    """Ends a verb when it has its arguments, past all error handlers."""

    def __init__(self, args: argparse.Namespace):
        self.arguments = args


def _parse(verb: Callable[[list[str]], int], argv: list[str]) -> argparse.Namespace:
    """The arguments that ``verb`` passes to Megatron, validated."""
    from megatron.training import global_vars

    from megatron_prune.data import tokenizers
    from megatron_prune.engine import arguments

    def stop(args: argparse.Namespace, *_: Any, **__: Any) -> NoReturn:
        raise _Parsed(args)

    global_vars.set_global_variables = stop  # the last step of `arguments.parse` does
    tokenizers.refuse_absent = lambda *_: True  # it may exist on the cluster only
    arguments._refuse_absent = lambda *_: None  # so may a checkpoint that `--load` names
    arguments._repair = lambda *_: None  # the job that owns these files may be running
    try:
        verb(argv)
    except _Parsed as parsed:
        _complete_vocabulary(parsed.arguments)
        return parsed.arguments
    raise RunError("the verb ended before it parsed its arguments: this is a bug in the verb")


def _complete_vocabulary(args: argparse.Namespace) -> None:
    """Set what building the tokenizer would set."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer, vocab_size_with_padding

    if args.padded_vocab_size is not None:
        return
    if args.vocab_size is not None:
        args.padded_vocab_size = vocab_size_with_padding(args.vocab_size, args, False)
        return
    try:
        build_tokenizer(args)
    except Exception as error:
        raise MegatronRefused(
            f"--padded-vocab-size is not given, and the tokenizer {args.tokenizer_type} {args.tokenizer_model} "
            f"cannot be built on this machine: {error}"
        ) from error


def _microbatches(args: argparse.Namespace) -> int:
    """Micro-batches per step on each replica; Megatron refuses batch sizes that do not divide evenly."""
    from megatron.core import num_microbatches_calculator as calculator

    calculator.init_num_microbatches_calculator(
        rank=1,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        data_parallel_size=args.data_parallel_size * args.gtp_weight_remat_size,
        decrease_batch_size_if_needed=args.decrease_batch_size_if_needed,
        step_batch_size_schedule=args.step_batch_size_schedule,
        seq_length=args.seq_length,
    )
    return int(calculator.get_num_microbatches())


def _build(args: argparse.Namespace, number: int) -> PipelineStage:
    """Pipeline stage ``number``, built by Megatron on its first rank."""
    from megatron.core import parallel_state as mpu
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.utils import unwrap_model
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_prune.engine import runtime

    rank = number * (args.world_size // args.pipeline_model_parallel_size)
    torch.distributed.init_process_group("fake", store=FakeStore(), world_size=args.world_size, rank=rank)
    mpu.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        create_gloo_process_groups=False,
    )
    chunks = unwrap_model(runtime.build_model(_buildable(args)))
    sizes = {"linears": 0, "vocabulary": 0, "others": 0}
    shapes: dict[str, tuple[int, ...]] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if getattr(parameter, "shared", False):
                kind = "vocabulary"  # the last stage's copy of tied embeddings takes memory too
            elif parameter.dim() < 2:
                kind = "others"
            else:
                kind = "linears" if name.startswith("decoder.layers.") else "vocabulary"
            sizes[kind] += parameter.numel()
        state = chunk.sharded_state_dict()
        apply_factories(state)  # gate and up rows are two shards
        shapes |= {
            entry.key: tuple(entry.global_shape) for entry in nested_values(state) if isinstance(entry, ShardedTensor)
        }
    layers = tuple(len(chunk.decoder.layers) for chunk in chunks)
    return PipelineStage(layers=sum(layers), chunks=layers, shapes=shapes, **sizes)


def _buildable(args: argparse.Namespace) -> argparse.Namespace:
    """``args`` for a model that can be built on this machine and has the same weights."""
    args = copy.copy(args)
    for name, value in {
        "transformer_impl": "local", "use_cpu_initialization": True, "perform_initialization": False,
        "sequence_parallel": False, "tp_comm_overlap": False, "context_parallel_size": 1, "fp8": None, "fp4": None,
        "fp8_param_gather": False, "first_last_layers_bf16": False, "no_persist_layer_norm": True,
        "gradient_accumulation_fusion": False, "bias_swiglu_fusion": False, "bias_gelu_fusion": False,
        "masked_softmax_fusion": False, "bias_dropout_fusion": False, "apply_rope_fusion": False,
        "cuda_graph_impl": "none", "cuda_graph_modules": [], "recompute_granularity": None,
        "recompute_method": None, "recompute_num_layers": None, "recompute_modules": None,
        "distribute_saved_activations": False, "attention_backend": _unfused(args),
    }.items():  # fmt: skip
        if hasattr(args, name):
            setattr(args, name, value)
    return args


def _unfused(args: argparse.Namespace) -> Any:
    return type(args.attention_backend).unfused


def in_child[T](work: Callable[[], T]) -> T:
    """The result of ``work`` in a forked child, which shares no state with this process and prints nothing.

    MegatronRefused if Megatron or this package refused; RunError with the traceback for a bug.
    """
    reader, writer = Pipe(duplex=False)
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as printed:
        child = os.fork()
        if child == 0:
            screen.leave()
            reader.close()
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            with contextlib.suppress(BaseException):
                writer.send(_outcome(work, printed.fileno()))
            os._exit(0)
        writer.close()
        try:
            outcome, value = reader.recv()
        except EOFError as error:
            raise RunError(
                "a dry run was killed before it answered: check that this machine has free memory"
            ) from error
        finally:
            reader.close()
            os.waitpid(child, 0)
    if outcome == "refused":
        raise MegatronRefused(value)
    if outcome == "bug":
        raise RunError(f"a dry run failed:\n{value}")
    answer: T = value
    return answer


def _outcome(work: Callable[[], Any], printed: int) -> tuple[str, Any]:
    try:
        return "done", work()
    except MegatronRefused as error:
        return "refused", str(error)
    except SystemExit as leaving:  # argparse prints and exits
        sys.stderr.flush()
        return "refused", _last_words(os.pread(printed, 1 << 20, 0).decode(errors="replace")) or f"exit {leaving.code}"
    except RunError:  # from a nested dry run
        return "bug", traceback.format_exc()
    except REFUSALS as error:
        return "refused", str(error).strip() or _source_line(error)
    except BaseException:
        return "bug", traceback.format_exc()


def _last_words(text: str) -> str:
    errors = re.findall(r"error: (.*)", text)
    return errors[-1] if errors else ""


def _source_line(error: BaseException) -> str:
    """The source line of an assertion: many of Megatron's have no message."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.line} ({os.path.basename(frame.filename)}:{frame.lineno})"
