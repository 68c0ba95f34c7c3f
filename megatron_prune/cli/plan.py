"""``megatron-prune plan``: make ``plan.json`` and a table from statistics and a target.

If the model must decide between candidates (minitron-depth, minitron-width --search or --target-shapes), those without
a score in the statistics are written to candidates.json next to the future plan, and the exit code is 3. `calibrate
--score candidates.json --statistics FILE` adds their scores; then the same plan command chooses. With
--retrain-candidates it exits with code 3 once more: `retrain-candidates` retrains the best ones and adds their losses.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from megatron_prune import verbs
from megatron_prune.cli import structured
from megatron_prune.cli.parser import Parser
from megatron_prune.errors import EXIT_NEEDS_SCORES
from megatron_prune.methods import options as methods

if TYPE_CHECKING:
    from megatron_prune.pruning.make_plan import Unscored

LINES = 20  # of masks that have not settled


def parser() -> Parser:
    return Parser(
        "plan",
        "Chooses what to keep of a checkpoint, from statistics and a target, and writes a plan; needs no model "
        "and no GPU. If the model must decide between candidates, it writes those, exits with code 3, and prints "
        "the command to run before planning again.",
        verbs.PlanSettings,
        *methods.STRUCTURED.values(),
        methods=structured.NAMES,
        example="""
megatron-prune plan --load checkpoints/parent --statistics statistics.safetensors --method minitron-width \\
    --ratio 0.25 --output plan.json""",
    )


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    options, _ = parser().read(argv)
    asked = verbs.PlanSettings.of(options)
    own = structured.own_settings(asked.method, options)
    from megatron_prune.checkpoint.reader import open_checkpoint
    from megatron_prune.cli import plan_table
    from megatron_prune.convert.config import unexportable
    from megatron_prune.pruning.make_plan import Unscored, make_plan, unsettled

    made = make_plan(asked, own)
    if isinstance(made, Unscored):
        _say_what_to_run(asked, made)
        return EXIT_NEEDS_SCORES
    plan_table.show(made)
    if (reason := unexportable(open_checkpoint(asked.load), made.target)) is not None:
        print(f"this shape cannot be exported to Hugging Face: {reason}")
    for row in unsettled(asked)[:LINES]:
        print(f"not settled: {row}")
    print(f"wrote {asked.output}")
    return 0


def _say_what_to_run(asked: verbs.PlanSettings, made: Unscored) -> None:
    load, found = ["--load", asked.load], ["--statistics", *asked.statistics]
    if made.retraining is not None:
        lack, run = "have not been retrained", f"Train each on {made.retraining:,} tokens"
        words = ["megatron-prune", "retrain-candidates", *load, *found, "--candidates", str(made.file)]
        command = f"{shlex.join(words)} --scratch … --nproc … --pretrain …"
    else:
        lack, run = "have no score", "Run the model with each of them"
        words = ["-m", "megatron_prune", "calibrate", *load, "--score", str(made.file), *found]
        command = f"torchrun … {shlex.join(words)}"
    print(f"{len(made.missing)} candidates {lack} yet: wrote {made.file}. {run}, then plan again:\n  {command}")
