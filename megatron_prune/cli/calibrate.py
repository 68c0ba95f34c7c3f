"""``torchrun … -m megatron_prune calibrate``: statistics from one forward pass over calibration text."""

from __future__ import annotations

from megatron_prune import verbs
from megatron_prune.cli import mentions
from megatron_prune.cli.parser import Parser, start_engine
from megatron_prune.screen import say


def parser() -> Parser:
    return Parser(
        "calibrate",
        "Runs a checkpoint once over calibration text and writes the statistics that every forward-only method needs, "
        "at every ratio. With --score it adds the losses of the candidates that plan wrote.",
        verbs.CalibrateSettings,
        mentioned=(mentions.LOAD, *mentions.TOKENIZER, *mentions.LAYOUT, mentions.FP8),
        example="""
megatron-prune calibrate --load checkpoints/parent \\
    --calibration-data-path data/calibration --output statistics.safetensors
torchrun --nproc-per-node 8 -m megatron_prune calibrate --load checkpoints/parent \\
    --tensor-model-parallel-size 2 --calibration-data-path data/calibration --output statistics.safetensors""",
    )


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    options, words = parser().read(argv)
    own = verbs.CalibrateSettings.of(options)
    start_engine()
    from megatron_prune.pruning.calibrate import calibrate
    from megatron_prune.structured.statistics import json_path

    made = calibrate(own, words)
    found = made.statistics
    if made.scored is None:
        did = f"calibrated on {found.sequences} sequences of {found.seq_length} tokens, loss {found.loss:.4f}"
    else:
        did = f"scored {made.scored} candidates"
    say(f"{did}; wrote {made.output} and {json_path(made.output)}")
    return 0
