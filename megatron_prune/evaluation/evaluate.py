"""Mean token loss and perplexity of a checkpoint on fixed windows of corpora, and lm-eval's tasks.

Window *k* predicts tokens k·S+1 … (k+1)·S from the S before, so the windows of a corpus are the same for every
checkpoint, layout and run. Results are compared by these losses, never by the loop's own validation. The scores
record the text: the corpus's fingerprint, windows and their length.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_prune import screen, storage, verbs
from megatron_prune.artifacts import device, json_bytes, read_json, refuse_unwritable, versions, write_results
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.engine import cpu, fp8, runtime
from megatron_prune.errors import CheckpointError, UsageError
from megatron_prune.evaluation import tasks
from megatron_prune.masks import missing_masks
from megatron_prune.masks.required import MISSING
from megatron_prune.settings import value_of


def evaluate(own: verbs.EvaluateSettings, words: Sequence[str]) -> dict[str, Any]:
    """Score one checkpoint on every corpus and every task in one load of the model; ``words`` are Megatron's flags.

    Every rank calls it. Returns what rank 0 writes to ``own.output``.
    """
    if value_of(words, "--load") is None:
        raise UsageError("--load", got="nothing", expected="a checkpoint to evaluate")
    if not tasks.names(own) and value_of(words, "--data-path") is None:
        raise UsageError(
            "--data-path", got="nothing", expected="prefixes of tokenized corpora, or --tasks in its place"
        )
    if screen.rank() == 0:
        refuse_unwritable("--output", own.output)
    args = runtime.start("evaluate", words, own, complete=_complete)
    from megatron_prune.data.indexed import check_fits_model
    from megatron_prune.data.windows import windows

    prefixes = args.data_path or []
    corpora = {
        label: windows(prefix, args.seq_length, args.windows)
        for label, prefix in zip(args.labels or prefixes, prefixes, strict=True)
    }
    for prefix in prefixes:
        check_fits_model(prefix, args.vocab_size)
    held = _held(own, args)
    asked = tasks.prepare(args, words, held.get("tasks", {}))
    runtime.initialize(args)
    from megatron_prune.data.indexed import fingerprint
    from megatron_prune.engine import forward
    from megatron_prune.training.zeros import check_loaded

    model = runtime.load_model(args)
    masks = check_loaded(model, runtime.loaded_directory(args), allow_missing=args.allow_missing_masks)
    missing = missing_masks(open_checkpoint(runtime.loaded_directory(args)))
    scored = runtime.identity(runtime.loaded_directory(args))
    kept = _kept(held, corpora, scored) if own.extend else {}
    scores: dict[str, Any] = {}
    cpu.fuse(model)
    for label, selected in corpora.items():
        if label in kept:
            continue
        losses = score(model, selected, args.micro_batch_size)
        loss = sum(losses) / len(losses)
        scores[label] = {
            "prefix": selected.prefix,
            "windows": len(selected),
            "seq_length": selected.seq_length,
            "predictions": selected.predictions,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "window_losses": losses,
        }
    answers = tasks.run(asked, args, model) if tasks.names(args) else held.get("tasks", {})
    nonzero = forward.count_nonzero(model)
    found: dict[str, Any] = {
        "version": 1,
        "checkpoint": {"path": str(runtime.loaded_directory(args)), **scored},
        "corpora": {label: {**kept, **scores}[label] for label in dict.fromkeys([*corpora, *kept])},
        **({"tasks": answers} if answers else {}),
        "vocabulary": {"words": args.vocab_size, "padded": args.padded_vocab_size},
        "parameters": ModelShape.from_args(vars(args)).parameters(),
        "parameters_nonzero": nonzero,
        "masks": masks,
        **({} if missing is None else {MISSING: missing}),
        "versions": versions(),
        "device": device(),
    }
    if args.rank == 0:
        for corpus in scores.values():
            corpus["fingerprint"] = fingerprint(corpus["prefix"])
        write_results(own.output, json_bytes(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return found


def _held(own: verbs.EvaluateSettings, args: argparse.Namespace) -> dict[str, Any]:
    """On rank 0, with ``--extend``: the file to extend, if its fingerprint is that of these weights; else nothing."""
    if not own.extend or args.rank != 0 or not storage.path(own.output).is_file():
        return {}
    found: dict[str, Any] = read_json(own.output)
    checkpoint = open_checkpoint(runtime.loaded_directory(args))
    return found if found.get("checkpoint", {}).get("fingerprint") == checkpoint.fingerprint() else {}


def _kept(held: Mapping[str, Any], corpora: Mapping[str, Any], scored: Mapping[str, Any]) -> dict[str, Any]:
    """The scores in ``held``, rank 0's, that stay: those of other labels, and of the same windows of the same text.

    Collective. CheckpointError if the file is of other weights, ``scored`` being these.
    """
    from megatron_prune.data.indexed import fingerprint

    kept = dict(held.get("corpora", {}))
    for label, selected in corpora.items():
        if label in kept:
            asked = {"windows": len(selected), "seq_length": selected.seq_length}
            asked["fingerprint"] = fingerprint(selected.prefix)
            if any(kept[label][key] != value for key, value in asked.items()):
                del kept[label]
    box = [(kept, held.get("checkpoint", scored)["full_hash"])]
    torch.distributed.broadcast_object_list(box, src=0)
    kept, full_hash = box[0]
    if full_hash != scored["full_hash"]:
        raise CheckpointError(
            f"--output is of weights with full_hash {full_hash}, --load has {scored['full_hash']}: remove the file"
        )
    return kept


def score(model: list[torch.nn.Module], selected: Any, batch: int = 1) -> list[float]:
    """Mean loss of every window, in order, the same on every rank.

    Windows are run ``batch`` at a time. Data-parallel replica r of R scores batches r, r + R, …: which windows share
    a batch, and so the rounding of their losses, does not depend on R.
    """
    from megatron.core import parallel_state as mpu

    from megatron_prune.engine import forward

    replica, replicas = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    batches = list(itertools.batched(range(len(selected)), batch))
    mine = list(itertools.chain.from_iterable(batches[replica::replicas]))
    shown = screen.progress(mine, len(mine), f"evaluating {selected.prefix}", "window")
    losses = forward.run(model, (selected[number] for number in shown), batch=batch)
    gathered = torch.zeros(len(selected), dtype=torch.float64, device=torch.cuda.current_device())
    if losses is not None and mpu.get_tensor_model_parallel_rank() == 0:
        gathered[mine] = torch.tensor(losses, dtype=torch.float64, device=gathered.device)
    torch.distributed.all_reduce(gathered)
    return gathered.tolist()


def _refuse_unscaled(args: argparse.Namespace) -> None:
    """Under delayed scaling a checkpoint must contain the scales from its training."""
    if not args.fp8:
        return
    checkpoint = open_checkpoint(runtime.loaded_directory(args))
    trained = not checkpoint.release and bool(checkpoint.args.get("fp8"))
    if not trained or str(checkpoint.args.get("fp8_recipe")) != "delayed":
        fp8.refuse_delayed(args, "this checkpoint was not trained under delayed scaling, so it holds no scales")


def _complete(args: argparse.Namespace, argv: list[str]) -> None:
    _refuse_unscaled(args)
    tasks.refuse_unfit(args, argv)
    prefixes = args.data_path or []
    if args.labels and (len(args.labels) != len(prefixes) or len(set(args.labels)) != len(args.labels)):
        raise UsageError(
            "--labels", got=" ".join(args.labels), expected="one name per prefix of --data-path, all different"
        )
    if args.windows is not None and not prefixes:
        raise UsageError("--windows", got=f"{args.windows} alone", expected="--data-path with it")
    if args.seq_length is None and not prefixes:
        args.seq_length = args.max_position_embeddings
    if args.seq_length is None:
        raise UsageError("--seq-length", got="nothing", expected="the number of tokens per window")
    if args.seq_length > (args.max_position_embeddings or 0) and args.position_embedding_type == "rope":
        args.max_position_embeddings = args.seq_length  # RoPE has no longest position
    if (
        args.micro_batch_size is None or args.fp8
    ):  # windows that share a scale would have losses that depend on the batch
        args.micro_batch_size = 1
    args.global_batch_size = None
    args.train_iters = 1  # Megatron validates a schedule although nothing is trained
    args.lr = args.lr or 1.0
    runtime.refuse_layouts(args)
