"""What Megatron would answer with a traceback per rank, or train with in silence, is refused with the flag's name."""

from __future__ import annotations

import argparse
import os
from typing import Any

import pytest

from megatron_prune.engine import argument_checks
from megatron_prune.errors import CommandLineError, NotFiniteError, UsageError
from megatron_prune.training import not_finite
from tests.engine import unreached as source
from tests.training.small import MODEL

RECIPE = "--seq-length 32 --micro-batch-size 2 --global-batch-size 8 --lr 1e-2 --min-lr 1e-3 --train-iters 6".split()


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return source.parser()


def check(parser: argparse.ArgumentParser, line: str, world_size: int = 1) -> None:
    args = parser.parse_args([*MODEL, *RECIPE, *line.split()])
    args.world_size = world_size
    argument_checks.check_finite(parser, args)
    argument_checks.check_numbers(args)
    argument_checks.check_shape(args)
    argument_checks.check_recipe(args)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--lr nan", "--lr: expected a finite number, got nan"),
        ("--lr inf", "--lr: expected a finite number, got inf"),
        ("--lr -1", "--lr: expected at least 0, got -1.0"),
        ("--min-lr 5", "--min-lr: expected at most --lr 0.01, got 5.0"),
        ("--lr-warmup-init 3", "--lr-warmup-init: expected at most --lr 0.01"),
        ("--weight-decay nan", "--weight-decay: expected a finite number"),
        ("--weight-decay -1", "--weight-decay: expected at least 0"),
        ("--clip-grad nan", "--clip-grad: expected a finite number"),
        ("--clip-grad -1", "--clip-grad: expected at least 0"),
        ("--adam-beta1 1.5", "--adam-beta1: expected a number from 0 to less than 1"),
        ("--adam-eps -1", "--adam-eps: expected at least 0"),
        ("--hidden-dropout 1.5", "--hidden-dropout: expected a fraction from 0 to 1"),
        ("--init-method-std -1", "--init-method-std: expected at least 0"),
        ("--rotary-percent nan", "--rotary-percent: expected a finite number"),
        ("--lr-warmup-fraction 2", "--lr-warmup-fraction: expected a number from 0 to less than 1"),
        ("--lr-warmup-iters 6", "--lr-warmup-iters: expected fewer than the 6 of --train-iters, got 6"),
        ("--lr-warmup-iters 3 --lr-decay-iters 3", "--lr-warmup-iters: expected fewer than the 3 of --lr-decay-iters"),
        ("--lr-decay-iters 0", "--lr-decay-iters: expected at least 1"),
        ("--lr-decay-style WSD", "--lr-wsd-decay-iters: expected a number with --lr-decay-style WSD"),
        ("--seq-length 256", "--seq-length: expected at most 128, got 256"),
        ("--micro-batch-size 16", "--global-batch-size: expected a multiple of 16, got 8"),
        ("--micro-batch-size 3", "--global-batch-size: expected a multiple of 3, got 8"),
        ("--squared-relu", "--swiglu, --squared-relu: expected one activation"),
        ("--num-query-groups 4", "--num-query-groups: expected a divisor of --num-attention-heads 6"),
        ("--kv-channels 9", "--kv-channels: expected an even number"),
        ("--hidden-size -5", "--hidden-size: expected at least 1"),
        ("--num-workers -1", "--num-workers: expected at least 0"),
    ],
)
def test_it_is_refused_by_name(parser: argparse.ArgumentParser, line: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        check(parser, line)
    assert str(refused.value).startswith(said)


def test_every_flag_that_is_a_number_is_finite(parser: argparse.ArgumentParser) -> None:
    numbers = [action for action in parser._actions if action.type is float and action.nargs is None]
    assert len(numbers) > 50
    for action in numbers:
        with pytest.raises(UsageError, match="expected a finite number, got nan"):
            args = parser.parse_args([*MODEL, *RECIPE, action.option_strings[0], "nan"])
            argument_checks.check_finite(parser, args)


@pytest.mark.parametrize(
    "line", ["", "--lr-warmup-iters 5", "--lr-warmup-fraction 0.99", "--lr 0 --min-lr 0", "--clip-grad 0"]
)
def test_what_works_passes(parser: argparse.ArgumentParser, line: str) -> None:
    check(parser, line)
    check(parser, line, world_size=4)


def test_the_batch_is_divided_among_replicas(parser: argparse.ArgumentParser) -> None:
    check(parser, "--tensor-model-parallel-size 2", world_size=8)
    with pytest.raises(UsageError, match="a multiple of 16, got 8 .*on 8 data-parallel replicas"):
        check(parser, "", world_size=8)


def test_only_what_megatron_asserts_is_its_refusal() -> None:
    from megatron.core.utils import divide

    with pytest.raises(
        CommandLineError, match=r"Megatron refuses these arguments: 7 is not divisible by 2 \(megatron/"
    ):
        with argument_checks.explain_assertions():
            divide(7, 2)
    with pytest.raises(AssertionError), argument_checks.explain_assertions():
        raise AssertionError("our own bug")


@pytest.mark.parametrize(
    ("error", "is_explained"),
    [
        (SystemExit(16), True),
        (SystemExit(17), True),
        (SystemExit(1), False),
        (RuntimeError("Rank 0: Unexpected result nan (message='found NaN in local forward loss calculation')"), True),
        (RuntimeError("out of memory"), False),
    ],
)
def test_the_ways_in_which_megatron_ends_a_run_that_diverged(error: BaseException, is_explained: bool) -> None:
    expected = NotFiniteError if is_explained else type(error)
    with pytest.raises(expected), not_finite.explain_failed_validation(None, lambda: 3):
        raise error


def test_what_megatron_refuses_is_said_once_by_one_rank(job: Any) -> None:
    words = [*MODEL, *RECIPE, "--mock-data", "--recompute-granularity", "full"]
    refused = job(["pretrain", *words], nproc=2)
    assert refused.returncode == 2 and "Traceback" not in refused.output
    assert refused.output.count("Megatron refuses these arguments: Using recompute_granularity") == 1


def test_a_run_that_diverges_keeps_its_last_finite_weights(job: Any, tiny_corpus: Any, tmp_path: Any) -> None:
    """The first update makes the weights infinite, and no step is left in which Megatron would see it."""
    from megatron_prune.artifacts import read_json
    from tests.training.small import recipe

    words = ["pretrain", *MODEL, *recipe(tiny_corpus, "0:8", tmp_path / "run"), "--optimizer", "sgd"]
    ended = job([*words, "--lr-warmup-fraction", "0", "--lr", "1e38", "--weight-decay", "1e4"], nproc=2)
    assert ended.returncode == 4 and "Traceback" not in ended.output
    assert ended.output.count("weights are not finite after step 1: nothing was saved") == 1
    account = read_json(tmp_path / "run" / "account.json")
    assert not account["complete"] and account["attempts"][0]["ended"].startswith("weights are not finite")
    assert not list((tmp_path / "run").glob("iter_*")) and os.path.exists(tmp_path / "run" / "losses.csv")
