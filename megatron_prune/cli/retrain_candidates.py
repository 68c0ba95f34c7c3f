"""``megatron-prune retrain-candidates``: briefly retrain the best candidates of a search and score them again."""

from __future__ import annotations

from megatron_prune import verbs
from megatron_prune.cli.parser import Parser
from megatron_prune.screen import say

PRETRAIN = "--pretrain"  # everything after it goes to pretrain


def parser() -> Parser:
    return Parser(
        "retrain-candidates",
        "Briefly trains the best candidates of a search and scores them again, for plan to choose between; plan "
        "--retrain-candidates asks for it. Megatron flags before --pretrain go to pretrain and calibrate (layout, "
        "precision), those after it only to pretrain; finished work is not repeated.",
        verbs.RetrainCandidatesSettings,
        mentioned=(
            ("training", PRETRAIN, "FLAG …", "flags of pretrain, to the end of the line: data, batch, learning rate"),
        ),
        after=" --pretrain FLAG …",
        example="""
megatron-prune retrain-candidates --load checkpoints/parent --candidates candidates.json \\
    --statistics statistics.safetensors --scratch scratch --pretrain --data-path data/train \\
    --seq-length 2048 --stream-range 0:4096 --global-batch-size 64 --micro-batch-size 4 --lr 3e-4""",
    )


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    place = argv.index(PRETRAIN) if PRETRAIN in argv else len(argv)
    options, shared = parser().read(argv[:place])
    asked = verbs.RetrainCandidatesSettings.of(options)
    from megatron_prune.structured.retrain_candidates import retrain_candidates

    number = retrain_candidates(asked, shared, argv[place + 1 :], say)
    if not asked.commands:
        say(f"retrained {number} candidates; wrote {asked.output or asked.statistics}. Now plan again")
    return 0
