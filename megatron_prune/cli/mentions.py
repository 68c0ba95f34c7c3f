"""Megatron flags named in the help of verbs that take Megatron's flags: (title, flag, metavar, text)."""

from __future__ import annotations

from megatron_prune import verbs

Mention = tuple[str, str, str | None, str]
MODEL = verbs.ModelSettings.TITLE

LOAD: Mention = (MODEL, "--load", "CKPT", "the checkpoint to read; an iter_… folder selects that step")
SAVE: Mention = (MODEL, "--save", "CKPT", "where the pruned checkpoint goes")
TOKENIZER: tuple[Mention, ...] = (
    (MODEL, "--tokenizer-type", "TYPE", ", ".join(verbs.TOKENIZERS)),
    (MODEL, "--tokenizer-model", "PATH", "its files, if the checkpoint has none"),
)
LAYOUT: tuple[Mention, ...] = (
    (MODEL, "--tensor-model-parallel-size", "TP", "ranks that share each layer (default: 1)"),
    (MODEL, "--pipeline-model-parallel-size", "PP", "stages of layers (default: 1)"),
    (MODEL, "--bf16", None, "compute in bf16 (--fp16, --fp32; default: as the checkpoint)"),
)
SHAPE_FROM, FP8 = (
    (MODEL, flag.option, flag.shown.partition(" ")[2], flag.help)
    for flag in verbs.ModelSettings.flags()
    if flag.name != "fp32"
)
SEED: Mention = (MODEL, "--seed", "N", "seed of random windows and of the method random (default: 1234)")
