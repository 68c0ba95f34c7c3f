"""Start Megatron, build the model, load it, and verify that all of it was loaded.

Every verb that runs a model calls ``start``. ``pretrain`` then passes control to Megatron's own loop; the forward-only
verbs call ``initialize`` and ``load_model``, and, if they need text, ``tokenizer``.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_prune import screen, storage
from megatron_prune.checkpoint.layout import ModelShape, weights
from megatron_prune.checkpoint.model_arguments import refuse_unrestored
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.tracker import iteration_directory
from megatron_prune.data import tokenizers
from megatron_prune.data.tokenizers import Tokenizer
from megatron_prune.engine import (
    argument_checks,
    cpu,
    from_checkpoint,
    layers,
    network,
    parallel_residual,
    patches,
    safe_loading,
)
from megatron_prune.engine.arguments import Complete, parse
from megatron_prune.engine.vocabulary import mask_padding
from megatron_prune.errors import CheckpointError, UsageError
from megatron_prune.settings import Settings


def start(
    verb: str, words: Sequence[str], own: Settings | None = None, *, complete: Complete | None = None
) -> argparse.Namespace:
    """Parse, validate and set Megatron's globals. Starts no process group.

    ``words`` are Megatron's part of the command line, ``own`` the verb's settings (``arguments.parse``). Call before
    any other ``megatron`` import, and after ``cpu.prepare``.
    """
    network.check_launcher()
    os.environ.setdefault("RANK", "0")  # a one-process verb also runs without torchrun
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0" if os.environ["WORLD_SIZE"] == "1" else "29500")
    import megatron.training

    network.make_private()
    cpu.prepare_megatron()
    network.guard(megatron.training.training)
    patches.apply()
    safe_loading.install()
    args = parse(verb, words, own, complete=complete)
    source = from_checkpoint.source(args) if args.rank == 0 else None
    if source is not None:
        shape = source.shape
        screen.say(f"read {source.directory}: {shape.num_layers} layers, {shape.parameters():,} parameters; running in "
                   f"{str(args.params_dtype).removeprefix('torch.')}")  # fmt: skip
    return args


def model_config(args: argparse.Namespace) -> Any:
    """Megatron's model config from its arguments, with what it omits: RoPE's factor, and parallel residuals."""
    from megatron.training.argument_utils import gpt_config_from_args

    with argument_checks.explain_assertions():
        if layers.differ(args):
            config = gpt_config_from_args(args, layers.transformer_config(args))
            config.transformer_layer_spec = layers.layer_spec
        else:
            config = gpt_config_from_args(args)
    config.rope_scaling_factor = args.rope_scaling_factor
    if args.parallel_residual:
        config.pre_wrap_hooks.append(parallel_residual.attach)
    return config


def initialize(args: argparse.Namespace) -> None:
    """Process groups and seeds, for the verbs that do not use Megatron's loop."""
    from megatron.training import training

    training.initialize_megatron(store=_store())


_groups = itertools.count()


def _store() -> Any:
    """The store for rendezvous: None (Megatron's own) for the first verb of a process, a new prefix for later ones
    (``api/launching.py``), because the launch's store still has the addresses of the earlier groups."""
    number = next(_groups)
    if number == 0:
        return None
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]  # public, but not in __all__

    store, _, _ = next(rendezvous("env://"))
    return PrefixStore(f"megatron_prune/{number}", store)


def build_model(args: argparse.Namespace) -> list[torch.nn.Module]:
    """This rank's stage as Megatron builds it, without DDP; one chunk per virtual stage. Loads nothing."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    config = model_config(args)
    built: list[torch.nn.Module] = config.get_builder_cls()(config).build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        wrap_with_ddp=False,
        data_parallel_random_init=False,
    )
    return built


def load_model(args: argparse.Namespace) -> list[torch.nn.Module]:
    """Build this rank's stage in evaluation mode, without DDP, and load ``args.load`` into it.

    Padding of the vocabulary gets no probability (``engine/vocabulary.py``).

    Raises CheckpointError naming weights that the checkpoint lacks or has in another shape.
    """
    from megatron.training.checkpointing import load_checkpoint

    refuse_unfit_checkpoint(args, args.load, "--load")
    model = build_model(args)
    mask_padding(model, args)
    args.finetune, args.no_load_optim, args.no_load_rng = True, True, True
    args.exit_on_missing_checkpoint = True
    load_checkpoint(model, None, None)
    for chunk in model:
        chunk.eval()
    return model


def loaded_directory(args: argparse.Namespace) -> Path:
    """The checkpoint that Megatron will load: ``--load``, at ``--ckpt-step`` if given."""
    return iteration_directory(args.load, args.ckpt_step) if args.ckpt_step else storage.path(args.load)


def identity(path: str | Path) -> dict[str, Any]:
    """A checkpoint's weights: iteration, fingerprint, and the hash of all numbers.

    Every rank calls it and reads a share of the weights: a single reader would keep the others waiting in NCCL.
    """
    from megatron_prune.checkpoint.reader import open_checkpoint

    checkpoint = open_checkpoint(path)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    shares: list[dict[str, str]] = [{}] * ranks
    names = screen.progress(checkpoint.names[rank::ranks], len(checkpoint.names[rank::ranks]), "hashing", "weight")
    own = {name: checkpoint.weight_hash(name) for name in names}
    torch.distributed.all_gather_object(shares, own)
    hashes = {name: value for share in shares for name, value in share.items()}
    return {
        "iteration": checkpoint.iteration,
        "fingerprint": checkpoint.fingerprint(),
        "full_hash": checkpoint.full_hash(hashes),
    }


def refuse_unfit_checkpoint(args: argparse.Namespace, path: str, flag: str) -> None:
    """CheckpointError unless every weight of the model is in the checkpoint, whole, in its shape.

    Megatron retries a failed strict load non-strictly and continues with random weights, so check first.
    """
    from megatron_prune.checkpoint.reader import open_checkpoint

    checkpoint = open_checkpoint(loaded_directory(args) if flag == "--load" else path)
    checkpoint.verify()
    refuse_unrestored(checkpoint.args, f"{flag} {path}", vars(args))
    virtual = args.virtual_pipeline_model_parallel_size or 1
    ours = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, virtual)
    if checkpoint.rank_layout not in (None, ours):
        tp, pp, vpp = checkpoint.rank_layout or ours
        raise CheckpointError(
            f"{flag} {path}: legacy per-rank files of TP={tp}, PP={pp}, {vpp} chunks per stage load at that "
            "layout only; run `megatron-prune convert rewrite` to make a checkpoint that loads at any layout"
        )
    wanted = ModelShape.from_args(vars(args))
    held = set(checkpoint.names)
    for weight in weights(wanted):
        if weight.name not in held:
            raise CheckpointError(
                f"{flag} {path}: expected {weight.name}, which this model needs, got a checkpoint without it: "
                "check the flags that give the model's shape"
            )
        found = tuple(checkpoint.spec(weight.name).shape)
        if found != weight.shape:
            raise CheckpointError(
                f"{flag} {path}: {weight.name}: expected shape {list(weight.shape)} for this model, got {list(found)}: "
                "omit the flags that give the model's size, and it is taken from the checkpoint"
            )
    if checkpoint.shape.num_layers != wanted.num_layers:
        raise CheckpointError(
            f"{flag} {path}: expected {wanted.num_layers} layers for this model, got "
            f"{checkpoint.shape.num_layers}: omit --num-layers"
        )
    if held - {weight.name for weight in weights(wanted)}:
        raise CheckpointError(
            f"{flag} {path}: expected the layers of this model, got some with attention or an MLP that it lacks: omit "
            f"{layers.FLAG}"
        )


def refuse_layouts(args: argparse.Namespace) -> None:
    """Refuse layouts that split stages or sequences further, for forward-only verbs. Call before validation."""
    for name in ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"):
        if getattr(args, name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')}",
                got=getattr(args, name),
                expected="no such flag with this verb",
                why="the model is read one pipeline stage per rank; any checkpoint loads without virtual stages",
            )
    if args.context_parallel_size > 1:
        raise UsageError(
            "--context-parallel-size",
            got=args.context_parallel_size,
            expected="1 with this verb",
            why="sequences are not split among ranks",
        )


def refuse_fixed_lengths(args: argparse.Namespace) -> None:
    """UsageError if the model's kernels need lengths in multiples: a task's sequences keep their lengths."""
    if args.fp8:
        raise UsageError(
            "--fp8-format", got=args.fp8, expected="no FP8 with a task",
            why="the sequences of a task keep their lengths, and FP8 kernels take multiples of 16",
        )  # fmt: skip
    if args.sequence_parallel:
        raise UsageError(
            "--sequence-parallel", got="on", expected="off with a task",
            why="the sequences of a task keep their lengths, which the ranks cannot split evenly",
        )  # fmt: skip


def tokenizer(args: argparse.Namespace) -> Tokenizer:
    """The tokenizer for the checkpoint ``--load``: that of ``--tokenizer-type`` and ``--tokenizer-model``, or else the
    one that an imported checkpoint contains. UsageError or DataError if there is none, or it does not fit.
    """
    checkpoint = open_checkpoint(loaded_directory(args))
    if args.tokenizer_type in (None, "NullTokenizer"):
        if checkpoint.huggingface is None:
            raise UsageError(
                "--tokenizer-type", got="nothing", expected="one of " + ", ".join(tokenizers.TYPES),
                why="a task is text, and this checkpoint holds no tokenizer",
            )  # fmt: skip
        found = tokenizers.load_tokenizer("HuggingFaceTokenizer", checkpoint.huggingface)
    elif args.tokenizer_model is None:
        raise UsageError(
            "--tokenizer-model", got="nothing", expected="the files of the tokenizer, with --tokenizer-type"
        )
    else:
        settings: dict[str, Any] = {}
        if args.tokenizer_type == "TikTokenizer":
            settings = {
                "vocab_size": args.vocab_size,
                "pattern": args.tiktoken_pattern,
                "num_special_tokens": args.tiktoken_num_special_tokens,
                "special_tokens": args.tokenizer_special_tokens,
            }
        found = tokenizers.load_tokenizer(args.tokenizer_type, args.tokenizer_model, **settings)
    tokenizers.check_fits_checkpoint(found, checkpoint, args.vocab_size)
    return found
