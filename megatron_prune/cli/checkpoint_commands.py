"""The verbs for checkpoints: ``convert``, ``inspect``, ``reshard-optimizer``."""

from __future__ import annotations

import json
import signal

from megatron_prune import verbs
from megatron_prune.cli.parser import Parser, Verbs

CONVERT_PARTS = {
    "import": "Hugging Face → Megatron",
    "export": "Megatron → Hugging Face",
    "rewrite": "any Megatron checkpoint, legacy per-rank files too → torch_dist, weights only",
}


def convert_group() -> Verbs:
    return Verbs(
        "convert",
        "Converts a checkpoint to another format. Weights are streamed, and masks are converted too.",
        CONVERT_PARTS,
    )


def convert_parser(part: str) -> Parser:
    """The parser of ``convert import`` and the others."""
    if part == "import":
        return Parser(
            "convert import",
            "Writes a Hugging Face model of the Llama family as a Megatron checkpoint, which loads at any layout. "
            "The tokenizer and the model's config are copied.",
            verbs.ImportSettings,
            example="megatron-prune convert import --hf HuggingFaceTB/SmolLM2-135M --save checkpoints/parent",
        )
    if part == "export":
        return Parser(
            "convert export",
            "Writes a Megatron checkpoint as a Hugging Face model. Masks next to it become masks.safetensors.",
            verbs.ExportSettings,
            example="megatron-prune convert export --load checkpoints/pruned --hf exported",
        )
    return Parser(
        "convert rewrite",
        "Writes the weights of any Megatron checkpoint, legacy per-rank files too, as one that loads at any layout. "
        "Optimizer state is left out.",
        verbs.RewriteSettings,
        example="megatron-prune convert rewrite --load legacy --save checkpoints/parent",
    )


def convert_main(argv: list[str]) -> int:
    """Convert checkpoints between formats.

    Masks are converted too: CKPT/masks is HF_DIR/masks.safetensors (``convert/masks.py``). Megatron itself writes
    legacy per-rank files: pretrain … --ckpt-convert-format torch --ckpt-convert-save DIR, at their intended layout.
    """
    part, words = convert_group().read(argv)
    options = convert_parser(part).read(words)[0]
    if part == "import":
        made = _import(verbs.ImportSettings.of(options))
    elif part == "export":
        made = _export(verbs.ExportSettings.of(options))
    else:
        made = _rewrite(verbs.RewriteSettings.of(options))
    print(f"wrote {made}")
    return 0


def _import(asked: verbs.ImportSettings) -> str:
    from megatron_prune.api.checkpoints import import_hf

    made = import_hf(
        asked.hf,
        asked.save,
        dtype=asked.dtype,
        make_vocab_size_divisible_by=asked.make_vocab_size_divisible_by,
        tensor_model_parallel_size=asked.tensor_model_parallel_size,
        max_position_embeddings=asked.max_position_embeddings,
        workers=asked.workers,
        allow_non_finite=asked.allow_non_finite,
    )
    return f"{made.path}: {made.parameters:,} parameters"


def _export(asked: verbs.ExportSettings) -> str:
    from megatron_prune.api.checkpoints import export_hf

    _verify(asked)
    made = export_hf(
        asked.load,
        asked.hf,
        workers=asked.workers,
        allow_non_finite=asked.allow_non_finite,
        allow_missing_masks=asked.allow_missing_masks,
        gguf=asked.gguf,
    )
    return str(made.path)


def _rewrite(asked: verbs.RewriteSettings) -> str:
    from megatron_prune.checkpoint.parallel import keep_freed_memory
    from megatron_prune.structured.apply import rewrite

    keep_freed_memory()
    _verify(asked)
    made = rewrite(
        asked.load,
        asked.save,
        workers=asked.workers,
        allow_non_finite=asked.allow_non_finite,
        allow_missing_masks=asked.allow_missing_masks,
    )
    return f"{made.root}: {made.shape.parameters():,} parameters"


def _verify(asked: verbs.ExportSettings | verbs.RewriteSettings) -> None:
    from megatron_prune.checkpoint.reader import open_checkpoint

    if asked.verify_integrity:
        open_checkpoint(asked.load).verify(hashes=True)


def inspect_parser() -> Parser:
    return Parser(
        "inspect",
        "Shows what a Megatron checkpoint holds: shape, weights, masks and origin. Reads only the index, "
        "unless zeros or hashes are requested.",
        verbs.InspectSettings,
        example="megatron-prune inspect checkpoints/parent",
    )


def inspect_main(argv: list[str]) -> int:
    """Show what a Megatron checkpoint holds."""
    asked = verbs.InspectSettings.of(inspect_parser().read(argv)[0])
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    from megatron_prune.checkpoint.reader import open_checkpoint
    from megatron_prune.convert import inspect

    checkpoint = open_checkpoint(asked.checkpoint)
    if asked.verify_integrity:
        checkpoint.verify(hashes=True)
    found = inspect.describe(checkpoint, sparsity=asked.sparsity, full_hash=asked.full_hash)
    if asked.json:
        print(json.dumps(found, indent=2))
    else:
        inspect.show(found, inspect.warnings(checkpoint))
    return 0


def reshard_optimizer_parser() -> Parser:
    return Parser(
        "reshard-optimizer",
        "Lets a run continue at another TP or PP; another number of data-parallel ranks does not need this. Reads and "
        "writes the optimizer's state once, in bounded memory, and needs 12 more bytes per parameter on disk until "
        "that save is removed. If killed, start it again: the save is unchanged until it is done.",
        verbs.ReshardOptimizerSettings,
        example="megatron-prune reshard-optimizer runs/retrained",
    )


def reshard_optimizer_main(argv: list[str]) -> int:
    """Let a run continue at another TP or PP."""
    asked = verbs.ReshardOptimizerSettings.of(reshard_optimizer_parser().read(argv)[0])
    from megatron_prune.checkpoint.reshard import reshard

    directory = reshard(asked.save)
    what = "already" if directory is None else f"now ({directory.name})"
    print(f"{asked.save} loads at every layout {what}")
    return 0
