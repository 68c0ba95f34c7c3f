"""Dynamic batch loading in Megatron's loop: by the formula, the same at any layout, after a kill, for a follower."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.reshard import reshard
from megatron_prune.data import indexed
from megatron_prune.data.schedule import FILE, Schedule
from megatron_prune.data.streams import Stream
from megatron_prune.engine.launch import start_function
from megatron_prune.training import learned_file
from tests.data.corpora import write_corpus
from tests.distributed_work import FunctionCall
from tests.training import sheared
from tests.training.small import GLOBAL_BATCH, MODEL, SEQ_LENGTH, consumed, layout, recipe, train_and_record
from tests.waiting import GENEROUS

STEPS, EVERY, SAMPLES = 8, 2, 5  # five samples: no whole number of micro-batches
RANGE = f"6:{6 + STEPS * GLOBAL_BATCH}"
REFERENCES = (5.0, 4.5)


@dataclass(frozen=True)
class Corpora:
    """Two corpora, one of which has few words and is soon learned, with validation text of the same kind. Words of the
    easy one are below 100, those of the hard one from 100 on."""

    easy: str
    hard: str
    validation: tuple[str, str]
    parent: Path  # every layout begins with its weights

    def words(self, save: Path, *more: object, model: list[str] | None = None) -> list[str]:
        model = ["--use-checkpoint-args", "--pretrained-checkpoint", str(self.parent)] if model is None else model
        argv = [*model, *recipe(Path(self.easy), RANGE, save, "--stream-permutation-seed", 4)]
        place = argv.index("--train-data-path")
        argv[place + 1 : place + 2] = ["2", self.easy, "1", self.hard]
        return [*argv, *map(str, more)]

    def dynamic(self, save: Path, *more: object) -> list[str]:
        return self.words(
            save, "--dynamic-batch-every", EVERY, "--domain-validation", *self.validation, "--domain-samples", SAMPLES,
            "--reference-losses", *REFERENCES, *more,
        )  # fmt: skip


def easy(generator: np.random.Generator, size: int) -> np.ndarray:
    return generator.integers(0, 8, size)


def hard(generator: np.random.Generator, size: int) -> np.ndarray:
    return generator.integers(100, 370, size)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory, tiny_parent) -> Corpora:
    folder, generator = tmp_path_factory.mktemp("corpora"), np.random.default_rng(0)
    sizes = generator.integers(20, 90, 120)
    train = [write_corpus(folder / of.__name__, [of(generator, size) for size in sizes]) for of in (easy, hard)]
    held = [
        write_corpus(folder / f"{of.__name__}-validation", [of(generator, SAMPLES * SEQ_LENGTH + 1)])
        for of in (easy, hard)
    ]
    return Corpora(*train, tuple(held), tiny_parent)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """``record(argv, nproc, kill_at)``: a run that writes down what it consumes; its exit code and the folder."""

    def run(argv: list[str], nproc: int = 1, kill_at: int | None = None, folder: Path | None = None, verb="pretrain"):
        folder = folder or tmp_path_factory.mktemp("records")
        call = FunctionCall(
            file=str(sys.modules[train_and_record.__module__].__file__), module=train_and_record.__module__,
            function="train_and_record", arguments=pickle.dumps(((argv, str(folder), kill_at, verb), {})),
            results=str(folder),
        )  # fmt: skip
        with start_function(call, nproc=nproc, log=folder / "log.txt") as job:
            return job.wait(GENEROUS), folder

    return run


@pytest.fixture(scope="module")
def reference(corpora, record, tmp_path_factory):
    """The run in one process, never interrupted: its save directory and what it consumed."""
    save = tmp_path_factory.mktemp("reference") / "run"
    code, folder = record(corpora.dynamic(save, "--save-interval", EVERY))
    assert code == 0, (folder / "log.txt").read_text()[-4000:]
    return save, consumed(folder)


def account(save: Path) -> dict:
    return json.loads((save / "account.json").read_text())


def published(p: np.ndarray, losses: np.ndarray) -> np.ndarray:
    raised = p * np.exp(np.clip(losses - np.array(REFERENCES), 0, None))
    return (1 - 1e-4) * raised / raised.sum() + 1e-4 / len(p)


def test_proportions_follow_the_losses_by_the_formula(reference, corpora):
    schedule = Schedule.read(reference[0] / FILE)
    assert [block.step for block in schedule.blocks] == [0, 2, 4, 6]
    p = np.array([2, 1]) / 3
    for block in schedule.blocks:
        if block.losses is not None:
            p = published(p, np.array(block.losses))
        np.testing.assert_allclose(block.proportions, p, rtol=1e-12)
    shares = [block.counts[1] / sum(block.counts) for block in schedule.blocks]
    assert shares[0] == pytest.approx(1 / 3, abs=1 / 16) and shares[-1] > shares[0] + 0.2  # the hard one, more and more


def test_the_losses_are_those_of_the_weights_at_that_step(reference, corpora, tmp_path, job):
    """``evaluate`` on the checkpoint of the same step and the same text, which is one document."""
    save, _ = reference
    scores = tmp_path / "scores.json"
    job(["evaluate", "--load", save / "iter_0000004", "--data-path", *corpora.validation, "--labels", "easy", "hard",
         "--seq-length", SEQ_LENGTH, "--micro-batch-size", 1, "--output", scores]).ok()  # fmt: skip
    found = json.loads(scores.read_text())["corpora"]
    (block,) = [block for block in Schedule.read(save / FILE).blocks if block.step == 4]
    assert block.losses == pytest.approx([found["easy"]["loss"], found["hard"]["loss"]], abs=5.1e-4)
    assert [found[name]["windows"] for name in ("easy", "hard")] == [SAMPLES, SAMPLES]


def test_what_a_run_consumes_is_what_it_records(reference, corpora):
    save, steps = reference
    schedule = Schedule.read(save / FILE)
    rows = [[tuple(row) for row in steps[step]] for step in range(1, STEPS + 1)]
    for block in schedule.blocks:
        found = Counter(int(row[0] >= 100) for step in rows[block.step : block.step + EVERY] for row in step)
        assert tuple(found[i] for i in range(2)) == block.counts
    stream = Stream.build(["2", corpora.easy, "1", corpora.hard], SEQ_LENGTH, 3)
    first = Counter(stream[i]["dataset_id"] for i in range(6))
    assert schedule.begins == (first[0], first[1])  # after what the stream's first six samples are
    expected = [
        tuple(stream.members[i][number]["labels"].tolist())
        for i, (begin, end) in enumerate(schedule.domains) for number in range(begin, end)
    ]  # fmt: skip
    assert sorted(row for step in rows for row in step) == sorted(expected)


def test_the_account_says_what_was_read_and_measured(reference, corpora):
    save, _ = reference
    found, schedule = account(save), Schedule.read(save / FILE)
    shape = open_checkpoint(save).shape
    assert found["domains"] == schedule.domains
    assert sum(end - first for first, end in found["domains"]) == STEPS * GLOBAL_BATCH
    assert found["tokens"] == found["unique_tokens"] == STEPS * GLOBAL_BATCH * SEQ_LENGTH
    assert found["flops_executed"] == STEPS * GLOBAL_BATCH * shape.training_flops(SEQ_LENGTH)
    assert found["schedule"]["evaluation_flops"] == 3 * 2 * SAMPLES * shape.forward_flops(SEQ_LENGTH)
    assert found["schedule"]["blocks"] == schedule.to_json()["blocks"] and found["schedule"]["hash"] == schedule.hash
    assert found["batching"] == {
        "every": EVERY, "samples": SAMPLES, "references": list(REFERENCES),
        "validation": [indexed.fingerprint(prefix) for prefix in corpora.validation],
    }  # fmt: skip


OVERLAP = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "more"),
    [
        pytest.param(2, 1, 1, [], id="tensor", marks=pytest.mark.slow),
        pytest.param(1, 2, 1, ["--num-layers-per-virtual-pipeline-stage", "1"], id="virtual stages"),
        pytest.param(1, 1, 2, OVERLAP, id="data, overlapped"),
    ],
)
def test_every_layout_reads_the_same_samples(tp, pp, dp, more, reference, corpora, record, tmp_path):
    save = tmp_path / "run"
    code, folder = record(corpora.dynamic(save, *layout(tp, pp), *more), tp * pp * dp)
    assert code == 0, (folder / "log.txt").read_text()[-4000:]
    assert consumed(folder) == reference[1]
    assert account(save)["schedule"]["hash"] == account(reference[0])["schedule"]["hash"]


@pytest.mark.parametrize("kill_at", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_killed_and_resumed_at_another_layout_it_reads_the_same_samples(kill_at, reference, corpora, record, tmp_path):
    """Killed before the first save, and after one at whose step the proportions changed. What was measured by then is
    not measured again: the last loss is marked, in a digit that changes no sample."""
    save, folder = tmp_path / "run", tmp_path / "records"
    folder.mkdir()
    argv = corpora.dynamic(save, "--save-interval", "4", "--use-distributed-optimizer")
    assert record([*argv, *layout(2, 1)], 2, kill_at, folder)[0] != 0
    assert not account(save)["complete"]
    begun = json.loads((save / FILE).read_text())
    assert [block["step"] for block in begun["blocks"]] == list(range(0, kill_at, EVERY))
    begun["blocks"][-1]["losses"][0] += 1e-6
    (save / FILE).write_text(json.dumps(begun))
    if kill_at > 4:
        assert reshard(save) == save / "iter_0000004"
    assert record([*argv, *layout(1, 2)], 2, None, folder)[0] == 0, (folder / "log.txt").read_text()[-4000:]
    assert consumed(folder) == reference[1]
    found = account(save)
    assert found["schedule"]["blocks"][: len(begun["blocks"])] == begun["blocks"]
    assert found["complete"] and found["schedule"]["hash"] == account(reference[0])["schedule"]["hash"]


def test_a_run_that_follows_reads_the_same_samples_in_the_same_order(reference, corpora, record, tmp_path):
    """From other weights, and without measuring anything."""
    save, more = tmp_path / "run", ["--seed", "8", "--lr", "1e-3"]
    code, folder = record(corpora.words(save, *more, "--batch-schedule", reference[0] / FILE, model=MODEL))
    assert code == 0, (folder / "log.txt").read_text()[-4000:]
    assert consumed(folder) == reference[1]
    ours, theirs = account(save), account(reference[0])
    assert ours["schedule"]["hash"] == theirs["schedule"]["hash"] and ours["domains"] == theirs["domains"]
    assert ours["batching"] == {"follows": theirs["schedule"]["hash"]} and ours["schedule"]["evaluation_flops"] == 0


def test_masks_are_learned_under_dynamic_batches(corpora, tmp_path, job):
    """What is measured is the model that its masks expect at that step: float64 oracle, its weights and log α of it."""
    save = tmp_path / "run"
    target = ["--target-hidden-size", "64", "--target-ffn-hidden-size", "96", "--divisible-by", "4"]
    more = [*target, "--save-interval", EVERY, *layout(2, 1)]
    job(["learn-masks", *corpora.dynamic(save, *more)], nproc=2).ok()
    schedule = Schedule.read(save / FILE)
    log_alpha = learned_file.read_state(learned_file.at_step(save, 6)).log_alpha
    model, z = sheared.Model(save / "iter_0000006"), {}
    for kind, values in log_alpha.items():
        soft = torch.sigmoid(0.8 * values.double() * 1.5)
        stays = (values.shape[-1] * (1 - sheared.removed(values.double()))).round()
        assert (stays < values.shape[-1]).any()  # on the way to the target
        rank = values.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        z[kind] = torch.where(rank < stays[..., None], soft, 0)
    for loss, prefix in zip(schedule.blocks[-1].losses, corpora.validation, strict=True):
        text = torch.from_numpy(np.fromfile(f"{prefix}.bin", np.uint16).astype(np.int64))
        tokens, labels = (part.view(SAMPLES, SEQ_LENGTH) for part in (text[:-1], text[1:]))
        with torch.no_grad():
            logits = model.logits(tokens, z)
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        assert loss == pytest.approx(float(expected), abs=6e-4)
    p = np.array([2, 1]) / 3
    for block in schedule.blocks[1:]:
        p = published(p, np.array(block.losses))
        np.testing.assert_allclose(block.proportions, p, rtol=1e-12)
    assert account(save)["schedule"]["blocks"] == schedule.to_json()["blocks"]


def test_a_run_goes_on_after_what_its_start_has_read(reference, corpora, tmp_path, job):
    """A second dynamic run over the same range begins, corpus by corpus, where the first one ended; a plain one is
    refused where it would read a sample again, and told from where on it may."""
    save, start = tmp_path / "run", ["--pretrained-checkpoint", reference[0]]
    job(["pretrain", *corpora.dynamic(save, *start), "--stream-range", f"6:{6 + 3 * GLOBAL_BATCH}"]).ok()
    before, after = account(reference[0])["domains"], account(save)["domains"]
    assert [first for first, _ in after] == [end for _, end in before]

    plain = corpora.words(tmp_path / "plain", *start)
    refused = job(["pretrain", *plain, "--stream-range", "70:78"])
    assert refused.returncode == 2
    assert "which loaded its batches dynamically" in refused.output
    free = int(refused.output.split("samples from ")[1].split(" on")[0])
    job(["pretrain", *plain, "--stream-range", f"{free}:{free + GLOBAL_BATCH}"]).ok()
    found = account(tmp_path / "plain")["domains"]
    assert all(first >= end for (first, _), (_, end) in zip(found, before, strict=True))


def refusals(corpora: Corpora, reference: Path, folder: Path) -> dict[str, tuple[list[object], str]]:
    """Words after the data of a run, and what is said."""
    v, scores = corpora.validation, folder / "scores.json"
    scores.write_text(json.dumps({v[0]: 3.0}))
    every, held = ["--dynamic-batch-every", "2"], ["--domain-validation", *v]
    few, losses = ["--domain-samples", "5"], ["--reference-losses", "1", "2"]
    schedule = ["--batch-schedule", reference / FILE]
    return {
        "one corpus": ([*every, "--train-data-path", corpora.easy], "--data-path: expected at least two"),
        "no validation": ([*every, *losses], "--domain-validation: expected 2 corpora"),
        "too little validation": ([*every, *held, *losses], "--domain-samples: expected at most 5, got 500"),
        "text that is trained on": (
            [*every, *few, *losses, "--domain-validation", v[0], corpora.hard],
            r"document\(s\) of .* are in .*hard too",
        ),
        "no references": ([*every, *held, *few], "--reference-losses: expected 2, one for each"),
        "one reference": ([*every, *held, *few, "--reference-losses", "1.5"], "--reference-losses: expected 2"),
        "a reference that is not finite": (
            [*every, *held, *few, "--reference-losses", "1", "nan"], "expected a finite loss per token, .* got nan",
        ),
        "a file that lacks one": (
            [*every, *held, *few, "--reference-losses", scores], f"for {v[1]} in {scores}, got nothing",
        ),
        "never": (["--dynamic-batch-every", "8", *held, *few, *losses], "fewer than the 8 steps"),
        "epochs": ([*every, *held, *few, *losses, "--stream-epochs", "2"], "--stream-epochs: expected 1"),
        "workers": ([*every, *held, *few, *losses, "--num-workers", "1"], "--num-workers: expected 0"),
        "both": ([*every, *held, *few, *losses, *schedule], "--dynamic-batch-every, --batch-schedule: expected one"),
        "alone": ([*losses], "--reference-losses: expected --dynamic-batch-every STEPS with it"),
        "no schedule": (["--batch-schedule", scores], "scores.json is not a batch schedule"),
        "another start": ([*schedule, "--stream-range", "7:71"], "with a first sample of 7, got .* first sample of 6"),
        "another batch": (
            [*schedule, "--global-batch-size", "4", "--stream-range", "6:38"], "--global-batch-size 4, got",
        ),
        "another order": ([*schedule, "--stream-permutation-seed", "5"], "--stream-permutation-seed 5, got"),
        "other corpora": ([*schedule, "--train-data-path", corpora.hard, corpora.easy], "one with corpora"),
        "fewer steps": ([*schedule, "--stream-range", "6:62"], "of 8 steps for a run of 7"),
        "too little text": (
            [*every, *held, *few, *losses, "--stream-range", "6:4806"],
            "--stream-range: expected at most .* got 6:4806",
        ),
    }  # fmt: skip


def test_what_cannot_work_is_refused_before_anything_starts(reference, corpora, tmp_path, job):
    for name, (more, says) in refusals(corpora, reference[0], tmp_path).items():
        save = tmp_path / name.replace(" ", "-")
        found = job(["pretrain", *corpora.words(save), *more])
        assert found.returncode == 2, (name, found.output[-3000:])
        assert re.search(says, found.output), (name, found.output[-1500:])
        assert not (save / "account.json").exists()


def test_a_run_does_not_resume_under_another_schedule(reference, corpora, tmp_path, job):
    save = tmp_path / "run"
    shutil.copytree(reference[0], save)
    refused = job(["pretrain", *corpora.dynamic(save, "--reference-losses", "5", "4")])
    assert refused.returncode == 2 and "which holds a run with batching" in refused.output
    refused = job(["pretrain", *corpora.words(save)])
    assert refused.returncode == 2 and "which holds a run with batching" in refused.output
