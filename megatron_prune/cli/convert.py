"""``megatron-prune convert import|export|rewrite``: convert checkpoints between formats.

Masks are converted too: CKPT/masks is HF_DIR/masks.safetensors (``convert/masks.py``). Megatron itself writes legacy
per-rank files: pretrain … --ckpt-convert-format torch --ckpt-convert-save DIR, at their intended layout.
"""

from __future__ import annotations

from megatron_prune import verbs
from megatron_prune.cli.parser import Parser, Verbs

PARTS = {
    "import": "Hugging Face → Megatron",
    "export": "Megatron → Hugging Face",
    "rewrite": "any Megatron checkpoint, legacy per-rank files too → torch_dist, weights only",
}


def group() -> Verbs:
    return Verbs(
        "convert", "Converts a checkpoint to another format. Weights are streamed, and masks are converted too.", PARTS
    )


def parser(part: str) -> Parser:
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


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    part, words = group().read(argv)
    options = parser(part).read(words)[0]
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
    return str(export_hf(asked.load, asked.hf, workers=asked.workers, allow_non_finite=asked.allow_non_finite).path)


def _rewrite(asked: verbs.RewriteSettings) -> str:
    from megatron_prune.checkpoint.parallel import keep_freed_memory
    from megatron_prune.structured.apply import rewrite

    keep_freed_memory()
    _verify(asked)
    made = rewrite(asked.load, asked.save, workers=asked.workers, allow_non_finite=asked.allow_non_finite)
    return f"{made.root}: {made.shape.parameters():,} parameters"


def _verify(asked: verbs.ExportSettings | verbs.RewriteSettings) -> None:
    from megatron_prune.checkpoint.reader import open_checkpoint

    if asked.verify_integrity:
        open_checkpoint(asked.load).verify(hashes=True)
