"""A search whose best candidates are retrained: against the same commands run by hand; refusals; resumption."""

from __future__ import annotations

import contextlib
import io
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_prune import artifacts
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.cli.pruning_commands import plan_main, retrain_candidates_main
from megatron_prune.convert.huggingface import import_hf
from megatron_prune.errors import EXIT_NEEDS_SCORES, EXIT_REFUSED, MegatronPruneError
from megatron_prune.structured import apply, candidates, plan, retrain_candidates
from megatron_prune.structured import statistics as statistics_file
from tests import tiny
from tests.data.corpora import write_corpus

SEQ, BATCH, STEPS = 32, 4, 3
TOKENS = SEQ * BATCH * STEPS
SEARCH = ["--method", "minitron-width", "--search", "hidden", "ffn", "--ratio", "0.4", "--tolerance", "0.1"]
SEARCH += ["--divisible-by", "4", "--max-candidates", "4"]
RETRAIN = ["--retrain-candidates", "2", "--retrain-tokens", str(TOKENS)]
RECIPE = ["--seq-length", SEQ, "--global-batch-size", BATCH, "--micro-batch-size", 2, "--lr", "1e-2", "--seed", 7]
RECIPE += ["--stream-seed", 3, "--num-workers", 0, "--attention-dropout", 0, "--hidden-dropout", 0]


@dataclass
class Called:
    """A plain-python verb that was called in this process."""

    returncode: int
    output: str

    def ok(self) -> Called:
        assert self.returncode == 0, self.output
        return self


def call(main: Callable[[list[str]], int], words: list[Any]) -> Called:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            code = main([str(word) for word in words])
        except MegatronPruneError as error:
            return Called(EXIT_REFUSED, str(error))
    return Called(code, out.getvalue())


class Files:
    """A parent with statistics and scored candidates, and the verbs on them."""

    def __init__(self, job: Callable[..., Any], parent: Path, corpus: Path, text: Path, folder: Path):
        self.job, self.parent, self.corpus, self.text, self.folder = job, parent, corpus, text, folder
        self.statistics, self.plan = folder / "s.safetensors", folder / "plan.json"
        load = ["--load", parent]
        window = ["--calibration-sequences", 4, "--calibration-seq-length", 64]
        job(["calibrate", *load, "--calibration-data-path", corpus, *window, "--output", self.statistics]).ok()
        assert self.make(*SEARCH).returncode == EXIT_NEEDS_SCORES
        job(["calibrate", *load, "--score", folder / "candidates.json", "--statistics", self.statistics]).ok()

    def make(self, *choice: object, output: Path | None = None) -> Called:
        files = ["--statistics", self.statistics, "--output", output or self.plan]
        return call(plan_main, ["--load", self.parent, *files, *choice])

    def training(self, first: int = 0) -> list[Any]:
        return [*RECIPE, "--data-path", self.text, "--stream-range", f"{first}:{first + BATCH * STEPS}"]

    def retrain(self, *more: object, pretrain: list[Any] | None = None, nproc: int = 1) -> Called:
        words = ["--load", self.parent, "--candidates", self.folder / "candidates.json"]
        words += ["--statistics", self.statistics, "--scratch", self.folder / "scratch", "--nproc", nproc, *more]
        return call(
            retrain_candidates_main, [*words, "--pretrain", *(self.training() if pretrain is None else pretrain)]
        )


@pytest.fixture
def files(job: Callable[..., Any], tiny_hf: Callable[..., Path], tiny_corpus: Path, tmp_path: Path) -> Files:
    import_hf(tiny_hf("llama-gqa", layers=2), tmp_path / "parent")
    draw = np.random.default_rng(0)
    text = write_corpus(tmp_path / "text", [draw.integers(1, tiny.VOCABULARY, 90) for _ in range(40)])
    return Files(job, tmp_path / "parent", tiny_corpus, text, tmp_path)


def test_the_best_are_retrained_and_the_best_of_those_is_chosen(files: Files, tmp_path: Path) -> None:
    asked = files.make(*SEARCH, *RETRAIN)
    assert asked.returncode == EXIT_NEEDS_SCORES
    assert f"2 candidates have not been retrained yet: wrote {tmp_path / 'candidates.json'}" in asked.output
    assert f"Train each on {TOKENS:,} tokens" in asked.output and not files.plan.exists()
    printed = files.retrain("--commands").ok().output
    assert printed.count("-m megatron_prune pretrain") == 2 and not list((tmp_path / "scratch").glob("*/pruned"))
    before = statistics_file.read(files.statistics)
    assert "retrained 2 candidates" in files.retrain().ok().output

    after = statistics_file.read(files.statistics)
    question, _ = candidates.read(tmp_path / "candidates.json")
    offered = question.candidates(after)
    losses = [after.scores[c.selection.key].loss for c in offered]
    best_two = sorted(range(4), key=lambda i: losses[i])[:2]
    assert all(before.scores[key].loss == score.loss for key, score in after.scores.items())
    expected: dict[int, float] = {}
    for i in best_two:  # by hand, from the explicit shape on
        sizes = offered[i].target
        shape = ["--target-hidden-size", sizes.hidden_size, "--target-ffn-hidden-size", sizes.ffn_hidden_size]
        cut = ["--method", "minitron-width", "--divisible-by", 4, *shape]
        files.make(*cut, output=tmp_path / f"{i}.json").ok()
        pruned, trained, scores = (tmp_path / f"{kind}-{i}" for kind in ("pruned", "trained", "scores"))
        apply.apply_plan(files.parent, plan.read(tmp_path / f"{i}.json"), pruned)
        start = ["--pretrained-checkpoint", pruned, "--save", trained, "--load", trained]
        files.job(["pretrain", *start, *files.training()]).ok()
        text = ["--data-path", files.corpus, "--seq-length", 64, "--windows", 4]
        files.job(["evaluate", "--load", trained, *text, "--output", scores]).ok()
        (corpus,) = artifacts.read_json(scores)["corpora"].values()
        expected[i] = corpus["loss"]
    found = {i: one.loss for i, c in enumerate(offered) if (one := after.scores[c.selection.key].retrained)}
    assert found == pytest.approx(expected, rel=1e-7)  # evaluate has other windows in a batch: fp32 rounding
    assert all(abs(found[i] - losses[i]) > 1e-2 for i in best_two), "training that changes nothing shows nothing"

    shown = files.make(*SEARCH, *RETRAIN).ok().output
    made = plan.read(files.plan)
    assert made.chosen == min(expected, key=lambda i: expected[i]) and made.target == offered[made.chosen].target
    assert [row.loss for row in made.candidates] == losses
    assert {i: row.retrained_loss for i, row in enumerate(made.candidates) if row.retrained_loss} == found
    assert f"by the loss of the best 2 after {TOKENS} tokens" in " ".join(shown.split())
    account = artifacts.read_json(tmp_path / f"trained-{best_two[0]}" / "account.json")
    assert made.calibration is not None
    spent = made.calibration["retraining"]
    assert (spent["candidates"], spent["tokens"]) == (2, 2 * TOKENS) and account["tokens"] == TOKENS
    targets = [offered[i].target for i in best_two]
    assert spent["flops"] == sum(BATCH * STEPS * t.training_flops(SEQ) + 4 * t.forward_flops(64) for t in targets)

    apply.apply_plan(files.parent, made, tmp_path / "cut")
    cut = open_checkpoint(tmp_path / "cut")
    assert cut.fingerprint() == open_checkpoint(tmp_path / f"pruned-{made.chosen}").fingerprint()  # nothing trained
    assert cut.pruning[-1]["tokens"] == 4 * 64 + 2 * TOKENS and cut.pruning[-1]["lineage"] == []
    flops = made.calibration["flops"] + made.calibration["scoring"]["flops"] + spent["flops"]
    assert cut.pruning[-1]["flops"] == flops
    files.make(*SEARCH).ok()  # without retraining the un-retrained loss decides
    assert plan.read(files.plan).chosen == best_two[0]


def test_what_is_done_stays_done_and_other_recipes_are_not_mixed_in(files: Files, tmp_path: Path) -> None:
    assert files.make(*SEARCH, *RETRAIN).returncode == EXIT_NEEDS_SCORES
    printed = files.retrain("--commands", nproc=2).ok().output
    for line in printed.splitlines():  # as on a cluster
        if "megatron_prune" in line and not line.startswith("#"):
            words = shlex.split(line)
            files.job(words[words.index("megatron_prune") + 1 :], nproc=2 if words[0] == "torchrun" else 1).ok()
    accounts = list((tmp_path / "scratch").glob("*/retrained/account.json"))
    stamps = [path.stat().st_mtime_ns for path in accounts]
    assert "retrained 2 candidates" in files.retrain(nproc=2).ok().output
    assert len(accounts) == 2 and [path.stat().st_mtime_ns for path in accounts] == stamps
    first = statistics_file.read(files.statistics)

    # One more candidate: only it is trained. With other samples all are.
    three = ["--retrain-candidates", 3, "--retrain-tokens", TOKENS]
    asked = files.make(*SEARCH, *three)
    assert asked.returncode == EXIT_NEEDS_SCORES and "1 candidates have not been retrained" in asked.output
    files.retrain(nproc=2).ok()
    assert len(list((tmp_path / "scratch").glob("*/retrained"))) == 3
    assert [path.stat().st_mtime_ns for path in accounts] == stamps
    second = statistics_file.read(files.statistics)
    kept = {key: score for key, score in first.scores.items() if score.retrained}
    assert len(kept) == 2 and all(second.scores[key] == score for key, score in kept.items())
    files.make(*SEARCH, *three).ok()
    mixed = files.retrain(pretrain=files.training(first=BATCH), nproc=2)
    assert mixed.returncode == 2 and re.search("--scratch: .*the flags that it was begun with", mixed.output)
    more = ["--retrain-candidates", 2, "--retrain-tokens", 2 * TOKENS]
    assert files.make(*SEARCH, *more).returncode == EXIT_NEEDS_SCORES


def test_a_training_that_fails_is_shown(files: Files) -> None:
    assert files.make(*SEARCH, *RETRAIN).returncode == EXIT_NEEDS_SCORES
    failed = files.retrain(pretrain=[*files.training(), "--train-iters", 99])
    assert failed.returncode == EXIT_REFUSED
    assert re.search("pretrain of hidden .* ended with 2.*--train-iters: expected .*, got 99", failed.output, re.DOTALL)


def test_a_training_that_diverges_is_a_score(files: Files) -> None:
    assert files.make(*SEARCH, *RETRAIN).returncode == EXIT_NEEDS_SCORES
    wild = ["--lr", "1e30", "--clip-grad", 0]
    printed = files.retrain(pretrain=[*files.training(), *wild]).ok().output
    assert printed.count("before, not finite after") == 2
    scores = statistics_file.read(files.statistics).scores.values()
    assert sorted(one.retrained.loss for one in scores if one.retrained) == [math.inf, math.inf]
    refused = files.make(*SEARCH, *RETRAIN)
    assert refused.returncode == EXIT_REFUSED and "no candidate that was retrained has a finite loss" in refused.output


def test_what_does_not_fit_is_refused_before_anything_starts(files: Files, tmp_path: Path) -> None:
    for choice, message in (
        ([*SEARCH, "--retrain-candidates", 2], "--retrain-tokens: expected .*, got nothing"),
        (
            [*SEARCH, "--retrain-tokens", 9],
            "--retrain-candidates: expected a number from 2 to --max-candidates 4, got nothing",
        ),
        ([*SEARCH, "--retrain-candidates", 5, "--retrain-tokens", 9], "--retrain-candidates: expected .*, got 5"),
        ([*SEARCH, "--retrain-candidates", 1, "--retrain-tokens", 9], "--retrain-candidates: expected .*, got 1"),
        ([*SEARCH, "--retrain-candidates", 2, "--retrain-tokens", 0], "--retrain-tokens: expected .*, got 0"),
        (["--method", "minitron-width", "--ratio", 0.4, *RETRAIN], "--retrain-candidates: expected --search or"),
        (
            ["--method", "minitron-depth", "--ratio", 0.5, *RETRAIN],
            "--retrain-candidates: expected --method minitron-width with it",
        ),
    ):
        finished = files.make(*choice)
        assert finished.returncode == 2 and re.search(message, finished.output), finished.output[-2000:]
    pruned = ["prune", "--load", files.parent, "--calibration-data-path", files.corpus]
    pruned += ["--calibration-sequences", 4, "--calibration-seq-length", 64, "--save", tmp_path / "cut"]
    finished = files.job([*pruned, *SEARCH, *RETRAIN])
    assert finished.returncode == 2
    assert "--retrain-candidates is not a flag of prune, nor of Megatron" in finished.output

    files.make(*SEARCH)
    finished = files.retrain()
    assert finished.returncode == 2 and "--candidates: expected" in finished.output
    files.make(*SEARCH, *RETRAIN)
    train = files.training()
    leaks = [files.corpus if word == files.text else word for word in train]
    for more, pretrain, message in (
        (
            ["--bf16"],
            train,
            "--bf16, --fp16: expected the precision of --statistics, float32, before --pretrain, got --bf16",
        ),
        ([], [*train, "--save", "x"], "--save: expected no such flag, got it for all candidates"),
        (
            [],
            [*train, "--stream-range", "0:4"],
            "--stream-range: expected the 384 tokens.*12 samples, got 0:4, which is 128 tokens",
        ),
        ([], RECIPE, "--stream-range: expected .*, got nothing"),
        ([], leaks, "document"),
        (["--load", tmp_path / "scratch"], train, "scratch"),
        (["--nproc", 0], train, "--nproc: expected .*, got 0"),
    ):
        finished = files.retrain(*more, pretrain=pretrain)
        assert finished.returncode == 2 and re.search(message, finished.output), finished.output[-2000:]
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("diverged", [True, False])
def test_a_candidates_teacher_is_in_what_its_retraining_cost(tmp_path: Path, monkeypatch, diverged: bool) -> None:
    artifacts.write_json(tmp_path / "account.json", {"tokens": 8, "flops_executed": 100, "flops_teacher": 30})
    after = SimpleNamespace(loss=2.0, provenance=lambda: {"flops": 7})
    monkeypatch.setattr(retrain_candidates.statistics_file, "read", lambda path: after)
    trial: Any = SimpleNamespace(stages=[], _diverged=diverged, retrained=tmp_path, statistics=tmp_path,
                                 recipe=SimpleNamespace(id="recipe"))  # fmt: skip
    found = retrain_candidates._Trial.run(trial)
    assert (found.tokens, found.flops) == (8, 130 if diverged else 137)
