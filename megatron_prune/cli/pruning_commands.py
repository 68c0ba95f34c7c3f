"""The verbs that prune: ``prune``, ``calibrate``, ``plan``, ``apply``, ``sparsify``, ``retrain-candidates``."""

from __future__ import annotations

import argparse
import contextlib
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_prune import verbs
from megatron_prune.cli.parser import FP8, LAYOUT, LOAD, SAVE, SEED, TOKENIZER, Parser, start_engine
from megatron_prune.errors import EXIT_NEEDS_SCORES
from megatron_prune.methods import options as methods
from megatron_prune.screen import say
from megatron_prune.settings import Settings, value_of

if TYPE_CHECKING:
    from megatron_prune.pruning.make_plan import Unscored


STRUCTURED_NAMES = ", ".join(methods.STRUCTURED)


def own_settings(
    verb: type[Settings],
    method: str,
    given: argparse.Namespace,
    known: Mapping[str, type[Settings]] = methods.STRUCTURED,
) -> Settings:
    """The settings of ``method`` among the flags ``given``; UsageError for a flag of another method.

    ``verb``: its own settings, which some methods share; ``known``: the methods' that it takes.
    """
    shared = {flag.name for flag in verb.flags()}
    methods.refuse_others(
        method, [name for name in vars(given) if name not in shared], known=known
    )  # the first is named
    return methods.whole(method, known).of(given)


def prune_parser() -> Parser:
    return Parser(
        "prune",
        "Calibrates a checkpoint, chooses what to keep and writes the pruned checkpoint, loading the model once. A "
        "sparse method, or random with --pattern, zeroes weights and writes masks. sheared-llama first trains masks on "
        "--mask-tokens of --train-data-path, and takes the flags of pretrain. From Hugging Face to Hugging Face: "
        "see `megatron-prune prune --hf --help`.",
        verbs.PruneSettings,
        *methods.PRUNED.values(),
        methods=f"{STRUCTURED_NAMES}; sparse: {', '.join(methods.SPARSE)}",
        mentioned=(LOAD, SAVE, *LAYOUT, FP8, SEED),
        example="""
megatron-prune prune --load parent --method minitron-width --ratio 0.25 --calibration-data-path text --save pruned""",
    )  # fmt: skip


def prune_main(argv: list[str]) -> int:
    """Calibrate, plan and apply in one command; or sparsify; with ``--hf``, from Hugging Face to Hugging Face."""
    if any(word.partition("=")[0] == "--hf" for word in argv):
        return prune_hf_main(argv)
    options, words = prune_parser().read(argv)
    asked = verbs.PruneSettings.of(options)
    own = own_settings(verbs.PruneSettings, asked.method, options, methods.PRUNED)
    start_engine()
    from megatron_prune.cli import pruning_tables
    from megatron_prune.pruning.prune import prune

    made = prune(asked, own, words)
    if made is None:
        return 0
    if made.plan is None:
        report_sparsity(made.sparsity or {}, str(made.save))
        return 0
    pruning_tables.show_plan(made.plan)
    say(f"wrote {made.save}")
    return 0


def prune_hf_parser() -> Parser:
    return Parser(
        "prune",
        "Imports a Hugging Face model, prunes it, optionally retrains it, and writes a Hugging Face directory. Its "
        "perplexity on held-out text is measured before and after. If killed, run the same command to resume.",
        verbs.PruneHFSettings,
        *methods.ONE_LINE.values(),
        methods=f"structured: {STRUCTURED_NAMES}; sparse: {', '.join(methods.SPARSE)}",
        example="megatron-prune prune --hf HuggingFaceTB/SmolLM2-135M --method wanda --pattern 2:4 --out pruned",
    )


def prune_hf_main(argv: list[str]) -> int:
    """From Hugging Face to Hugging Face in one command: import, prune, retrain if asked, export."""
    options, _ = prune_hf_parser().read(argv)
    verbs.PruneHFSettings.of(options)  # reports missing flags
    start_engine()
    from rich.console import Console

    from megatron_prune.api.prune_checkpoint import prune

    console = Console(highlight=False, soft_wrap=True)

    def during(stage: str) -> contextlib.AbstractContextManager[object]:
        return console.status(f"{stage} …") if console.is_terminal else contextlib.nullcontext()

    made = prune(**vars(options), tell=lambda line: console.print(line, markup=False), during=during)
    console.print(repr(made), markup=False)
    return 0


def calibrate_parser() -> Parser:
    return Parser(
        "calibrate",
        "Runs a checkpoint once over calibration text and writes the statistics that every forward-only method needs, "
        "at every ratio. With --score it adds the losses of the candidates that plan wrote.",
        verbs.CalibrateSettings,
        mentioned=(LOAD, *TOKENIZER, *LAYOUT, FP8),
        example="""
megatron-prune calibrate --load checkpoints/parent \\
    --calibration-data-path data/calibration --output statistics.safetensors
torchrun --nproc-per-node 8 -m megatron_prune calibrate --load checkpoints/parent \\
    --tensor-model-parallel-size 2 --calibration-data-path data/calibration --output statistics.safetensors""",
    )


def calibrate_main(argv: list[str]) -> int:
    """Statistics of a checkpoint from one forward pass over calibration text."""
    options, words = calibrate_parser().read(argv)
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


LINES = 20  # of masks that have not settled


def plan_parser() -> Parser:
    return Parser(
        "plan",
        "Chooses what to keep of a checkpoint, from statistics and a target, and writes a plan; needs no model "
        "and no GPU. If the model must decide between candidates, it writes those, exits with code 3, and prints "
        "the command to run before planning again.",
        verbs.PlanSettings,
        *methods.STRUCTURED.values(),
        methods=STRUCTURED_NAMES,
        example="""
megatron-prune plan --load checkpoints/parent --statistics statistics.safetensors --method minitron-width \\
    --ratio 0.25 --output plan.json""",
    )


def plan_main(argv: list[str]) -> int:
    """Make ``plan.json`` and a table from statistics and a target.

    If the model must decide between candidates (minitron-depth, minitron-width --search or --target-shapes), those
    without a score in the statistics are written to candidates.json next to the future plan, and the exit code is 3.
    ``calibrate --score candidates.json --statistics FILE`` adds their scores; then the same plan command chooses. With
    ``--retrain-candidates`` it exits with code 3 once more: ``retrain-candidates`` retrains the best ones and adds
    their losses.
    """
    options, _ = plan_parser().read(argv)
    asked = verbs.PlanSettings.of(options)
    own = own_settings(verbs.PlanSettings, asked.method, options)
    from megatron_prune.checkpoint.reader import open_checkpoint
    from megatron_prune.cli import pruning_tables
    from megatron_prune.convert.config import unexportable
    from megatron_prune.pruning.make_plan import Unscored, make_plan, unsettled

    made = make_plan(asked, own)
    if isinstance(made, Unscored):
        _say_what_to_run(asked, made)
        return EXIT_NEEDS_SCORES
    pruning_tables.show_plan(made)
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


def apply_parser() -> Parser:
    return Parser(
        "apply",
        "Cuts a checkpoint according to a plan and writes the smaller one. Weights are streamed, so memory stays small "
        "whatever the model's size; masks next to the parent are cut too.",
        verbs.ApplySettings,
        example="megatron-prune apply --load checkpoints/parent --plan plan.json --save checkpoints/pruned",
    )


def apply_main(argv: list[str]) -> int:
    """Cut a parent checkpoint according to a plan."""
    options, _ = apply_parser().read(argv)
    asked = verbs.ApplySettings.of(options)
    from megatron_prune.structured.apply import apply

    made = apply(asked)
    print(f"wrote {asked.save}: {made.target.parameters():,} of {made.source.parameters():,} parameters")
    return 0


def sparsify_parser() -> Parser:
    return Parser(
        "sparsify",
        "Zeroes weights of a checkpoint and writes it in the same shape, with masks that mark them. magnitude and "
        "random use only the weights; wanda and sparsegpt read calibration text, block by block.",
        verbs.SparsifySettings,
        methods=", ".join(methods.SPARSE),
        mentioned=(LOAD, SAVE, *LAYOUT, FP8, SEED),
        example="""
megatron-prune sparsify --load checkpoints/parent --method wanda --pattern 2:4 \\
    --calibration-data-path data/calibration --save checkpoints/sparse""",
    )  # fmt: skip


def sparsify_main(argv: list[str]) -> int:
    """Zero weights of a checkpoint block by block and write masks."""
    options, words = sparsify_parser().read(argv)
    own = verbs.SparsifySettings.of(options)
    start_engine()
    from megatron_prune.pruning.sparsify import sparsify

    table = sparsify(own, words)
    if table is not None:
        report_sparsity(table, value_of(words, "--save") or "")
    return 0


def report_sparsity(table: dict[str, Any], save: str) -> None:
    """Print what was removed and where the result is."""
    if not table:
        say(f"{save}: this pruning is complete; nothing to do")
        return
    from megatron_prune.cli import pruning_tables

    pruning_tables.show_sparsity(table)
    say(f"wrote {save}")


PRETRAIN = "--pretrain"  # everything after it goes to pretrain


def retrain_candidates_parser() -> Parser:
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


def retrain_candidates_main(argv: list[str]) -> int:
    """Briefly retrain the best candidates of a search and score them again."""
    place = argv.index(PRETRAIN) if PRETRAIN in argv else len(argv)
    options, shared = retrain_candidates_parser().read(argv[:place])
    asked = verbs.RetrainCandidatesSettings.of(options)
    from megatron_prune.structured.retrain_candidates import retrain_candidates

    number = retrain_candidates(asked, shared, argv[place + 1 :], say)
    if not asked.commands:
        say(f"retrained {number} candidates; wrote {asked.output or asked.statistics}. Now plan again")
    return 0
