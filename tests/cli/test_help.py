"""Help of every verb: short, quick to print, complete; and the answer to an unknown flag."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping

import pytest

from megatron_prune import verbs
from megatron_prune.__main__ import NAMES, VERBS, command, main
from megatron_prune.cli.parser import HELP_MEGATRON, Parser
from megatron_prune.errors import CommandLineError
from megatron_prune.methods import options
from megatron_prune.settings import Settings
from tests.cli import helps

MOST_LINES = 80
HEAVY = {"torch", "megatron", "numpy", "scipy", "transformers", "pydantic", "rich"}
IN_PROCESS = [words for words in helps.commands() if words]


def parser_of(words: tuple[str, ...]) -> Parser | None:
    if words[0] in helps.PARTS:
        return command(words[0], "parser")(words[1]) if len(words) > 1 else None
    made: Parser = command(words[0], "parser")()
    return made


@pytest.mark.parametrize(
    "words", [(), ("prune",), ("pretrain",), ("study", "plan"), ("convert", "import"), ("advise",)]
)
def test_help_imports_nothing_that_is_slow(words: tuple[str, ...]) -> None:
    text, imported = helps.ask(words)
    assert text.startswith("usage: megatron-prune") and "megatron_prune" in imported
    assert not imported & HEAVY


@pytest.mark.parametrize("words", IN_PROCESS, ids=" ".join)
def test_help_fits_a_screen(words: tuple[str, ...], capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and text.startswith(f"usage: megatron-prune {' '.join(words)}")
    lines = text.splitlines()
    assert len(lines) <= MOST_LINES and max(map(len, lines)) <= 120
    parser = parser_of(words)
    if parser is None:
        return
    for option in parser._option_string_actions:
        assert re.search(rf"^  {re.escape(option)}\b", text, re.MULTILINE), f"{option} is not explained"
    assert "\nexample:\n" in text
    assert (HELP_MEGATRON in text) == parser.megatron


def test_the_overview_names_every_verb_and_each_can_be_called(capsys) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= MOST_LINES
    for group in VERBS.values():
        for verb, about in group.items():
            assert re.search(rf"^  {verb} +{re.escape(about)}$", text, re.MULTILINE)
            assert callable(command(verb, "main"))


@pytest.mark.parametrize("words", [words for words in IN_PROCESS if parser_of(words)], ids=" ".join)
def test_the_example_is_understood(words: tuple[str, ...]) -> None:
    """Every line of the example belongs to this verb, and the parser accepts its flags and misses none."""
    parser = parser_of(words)
    assert parser is not None
    for line in parser.example.strip().replace("\\\n", " ").splitlines():
        given = shlex.split(line)
        begin = [place for place, word in enumerate(given) if word in ("megatron-prune", "megatron_prune")][0] + 1
        assert tuple(given[begin : begin + len(words)]) == words
        rest = given[begin + len(words) :]
        for stop in ("--", "--pretrain", "pretrain"):
            if stop in rest and words != ("study", "stage"):
                rest = rest[: rest.index(stop)]
        if words == ("study", "stage"):
            rest = rest[: rest.index("--")]
        found, left = parser.read(rest)
        assert parser.megatron or not left
        for settings in parser.settings:
            settings.of(found)  # raises where a required one is missing


@pytest.mark.parametrize(("verb", "known"), [("plan", options.STRUCTURED), ("prune", options.PRUNED)])
def test_the_settings_of_all_methods_are_in_the_help(verb: str, known: Mapping[str, type[Settings]]) -> None:
    parser = parser_of((verb,))
    assert parser is not None
    text = parser.format_help()
    for name, own in known.items():
        assert name in text
        assert not own.flags() or f"\n{own.TITLE}:\n" in text
        assert all(f"  {flag.option}" in text for flag in own.flags())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("plna", "there is no verb 'plna': did you mean plan?"),
        ("plan --laod x", "--laod is not a flag of plan; did you mean --load?"),
        ("plan --load=x --ouput=y", "--ouput is not a flag of plan; did you mean --output?"),
        ("apply --zzz", "--zzz is not a flag of apply; `megatron-prune apply --help`"),
        ("apply x", "x is one word too many of apply"),
        ("apply --load", "--load"),
        ("apply --load a --save b", "--plan PLAN.json is required (the plan, as written by plan)"),
        ("apply --load a --save b --plan c --workers many", "--workers: "),
        ("convert imprt", "did you mean megatron-prune convert import?"),
        ("study pln x", "did you mean megatron-prune study plan?"),
        (
            "plan --load a --output b --method shortgpt --axis depth",
            "--axis: expected --method random with it, got --method shortgpt",
        ),
        ("preprocess --input-format jsonlines", "one of auto, jsonl, parquet, array_record, text"),
        ("inspect", "CKPT is required"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(line: str, said: str, capsys) -> None:
    assert main(line.split()) == 2
    printed = capsys.readouterr()
    assert not printed.out and len(printed.err.splitlines()) == 1
    assert said in printed.err and printed.err.startswith("megatron-prune")


def wrong_for_megatron() -> list[str]:
    """Errors of Megatron's parser for an unknown flag, or one without its value."""
    from megatron_prune.engine import arguments, cpu

    cpu.prepare()
    parser = arguments.megatron_parser()
    said = []
    for words in (["--seq-lenght", "8"], ["--stream-rnage", "0:8"], ["--seq-length", "many"]):
        try:
            arguments.refuse_unknown(parser, "pretrain", words, verbs.PretrainSettings())
            parser.parse_args(words)
        except CommandLineError as error:
            said.append(str(error))
    return said


def test_a_mistyped_flag_of_megatron_or_ours_has_its_nearest(distributed) -> None:
    [[megatrons, ours, value]] = distributed(wrong_for_megatron, 1)
    assert megatrons == "--seq-lenght is not a flag of pretrain, nor of Megatron; did you mean --seq-length?"
    assert ours == "--stream-rnage is not a flag of pretrain, nor of Megatron; did you mean --stream-range?"
    assert value.startswith(
        "argument --seq-length: invalid int value: 'many'; `megatron-prune pretrain --help-megatron`"
    )


def test_all_names_are_dashed_files() -> None:
    assert len(NAMES) == len(set(NAMES)) and all(re.fullmatch("[a-z]+(-[a-z]+)*", name) for name in NAMES)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("prune --method wanda --target-params 5", "--target-params: expected a structured --method with it, got"),
        ("prune --method shortgpt --ratio 0.5 --layers 0", "--layers: expected a sparse --method with it, got"),
        (
            "prune --method random --pattern 2:4 --axis depth --load x",
            "--axis: expected no --pattern with it, got --method random",
        ),
        ("prune --method shortgpt --load x", "--ratio: expected exactly one of"),
        ("prune --method minitron-width --ratio 0.5 --max-candidates 3", "--max-candidates: "),
        (
            "prune --method flap --ratio 0.5 --ffn-exponent 1",
            "--ffn-exponent: expected --ratio or --target-p",
        ),
        (
            "prune --method minitron-width --ratio 0.5 --search hidden --ffn-exponent 1",
            "--ffn-exponent: expected",
        ),
        (
            "prune --method minitron-width --ratio 0.5 --ffn-exponent 0",
            "--ffn-exponent: expected a number above 0",
        ),
        (
            "prune --method random --pattern unstructured --ratio 0.5 --allocation global",
            "--allocation: expected owl or uniform with --method random, got global",
        ),
        (
            "prune --method flap --ratio 0.5 --allocation owl --owl-threshold 4",
            "--owl-threshold: expected one of 3, 5, 7, 10 with a structured method, got 4",
        ),
        (
            "prune --method shortgpt --ratio 0.5 --allocation global",
            "--allocation: expected a --method that lets layers differ .magnitude, random, sparsegpt, wanda, flap, "
            "llm-pruner or wanda-sp., got global with --method shortgpt",
        ),
        ("prune --method flap --ratio 0.5 --least-kept 0.3", "--least-kept: expected --allocation owl, global or "),
        ("prune --method flap --ratio 0.5 --allocation global --least-kept 1", "--least-kept: expected a fraction, "),
        (
            "prune --method flap --ratio 0.5 --search-generations 9",
            "--search-generations: expected --allocation search with it, got --allocation uniform",
        ),
        (
            "prune --method shortgpt --ratio 0.5 --search-generations 9",
            "--search-generations: expected a sparse --method with it, got --method shortgpt",
        ),
        (
            "prune --method shortgpt --ratio 0.5 --least-kept 0.3",
            "--least-kept: expected a sparse --method with it, got --method shortgpt",
        ),
        ("prune --method wanda-sp --ratio 0.5 --no-compensate", "--no-compensate: expected --method flap with it, got"),
        (
            "plan --load a --output b --method shortgpt --ratio 0.5 --allocation global",
            "--allocation: expected --method flap or llm-pruner or wanda-sp with it, got --method shortgpt",
        ),
        ("prune --method magic --ratio 0.5", "--method: expected one of .*, got magic"),
        ("sparsify --method magnitude --ratio 2", "--ratio: expected the fraction to remove"),
        ("sparsify --method shortgpt --ratio 0.5", "--method: expected .*, got shortgpt"),
        ("calibrate --output x.json", r"--output: expected a file name that ends in \.safetensors"),
        ("calibrate --score x --output x.safetensors", "--score, --statistics: "),
    ],
)
def test_our_own_flags_are_found_sound_before_megatron_is_asked(line: str, said: str, monkeypatch, capsys) -> None:
    from megatron_prune.engine import runtime

    def start(*_: object, **__: object) -> None:
        raise AssertionError("Megatron is asked")

    monkeypatch.setattr(runtime, "start", start)
    assert main(line.split()) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert re.search(said, printed[-1]), printed


def test_a_reader_that_has_gone_gets_no_traceback() -> None:
    """As in ``megatron-prune prune --help | head -1``."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "megatron_prune", "prune", "--help"], stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert done.returncode == 1 and not done.stderr, done.stderr
