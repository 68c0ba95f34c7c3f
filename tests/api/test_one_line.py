"""From Hugging Face to Hugging Face: every stage equal to the verbs by hand, killed anywhere, refused early."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import megatron_prune as mp
from megatron_prune import verbs
from megatron_prune.api.hf_source import HFSource
from megatron_prune.convert.huggingface import export_hf, import_hf
from megatron_prune.data.preprocess import preprocess
from megatron_prune.data.tokenizers import load_tokenizer
from tests import reference, tiny
from tests.convert import family_models

S, SEQUENCES, WINDOWS = 32, 5, 7
SIZES = {"seq_length": S, "calibration_sequences": SEQUENCES, "windows": WINDOWS}
WIDTH = {"ratio": 0.25, "divisible_by": 8, "tolerance": 0.05}


@pytest.fixture(scope="module")
def hf(tiny_hf: Callable[..., Path]) -> Path:
    return tiny_hf("llama-gqa", layers=4)


@pytest.fixture(scope="module")
def prune(hf: Path, tiny_jsonl: Path) -> Callable[..., mp.Pruned]:
    """``mp.prune`` of the tiny model on the tiny text, silent."""

    def run(out: Path, method: str, **more: Any) -> mp.Pruned:
        given = {"hf": hf, "text": tiny_jsonl, "tell": lambda line: None, **SIZES, **more}
        return mp.prune(out=out, method=method, **given)

    return run


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "phi3"])
def test_a_model_of_any_family_is_read(name: str, tmp_path: Path) -> None:
    """Embeddings have other names in GPT-2 and GPT-NeoX."""
    folder = family_models.write(tmp_path / "hf", name)
    asked = verbs.PruneHFSettings.of(argparse.Namespace(hf=str(folder), out="x", method="magnitude"))
    source = HFSource.read(asked)
    assert source.shape == import_hf(folder, tmp_path / "parent").shape and source.dtype == "float32"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "nemotron", "qwen3"])
def test_a_model_of_another_family_is_pruned_in_one_line(
    name: str, tiny_tokenizer: Path, tiny_jsonl: Path, tmp_path: Path
) -> None:
    folder = family_models.write(tmp_path / "hf", name)
    for file in tiny_tokenizer.iterdir():
        shutil.copy(file, folder)
    made = mp.prune(hf=folder, text=tiny_jsonl, out=tmp_path / "out", method="shortgpt", ratio=0.5, tell=print, **SIZES)
    assert made.removed_linears == pytest.approx(0.5) and (tmp_path / "out" / "config.json").is_file()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors")
            for name, tensor in safetensors.torch.load_file(path).items()}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "settings", "nproc", "retrain"),
    [
        ("wanda", {"pattern": "2:4"}, 1, 0),
        pytest.param("minitron-width", WIDTH, 2, 0, marks=pytest.mark.slow),
        pytest.param("shortgpt", {"ratio": 0.5}, 1, 512, marks=pytest.mark.slow),
        pytest.param("sparsegpt", {"ratio": 0.5}, 2, 256, marks=pytest.mark.slow),
    ],
)
def test_it_is_the_verbs_by_hand(
    prune, hf, job, tmp_path, method: str, settings: dict[str, Any], nproc: int, retrain: int
) -> None:
    more = {"retrain_tokens": retrain, "retrain_batch_size": 4} if retrain else {}
    made = prune(tmp_path / "out", method, **settings, **more, nproc=nproc, keep=True)
    hand, text = tmp_path / "hand", tmp_path / "out.work" / "text"

    import_hf(hf, hand / "parent")
    tokenizer = load_tokenizer("HuggingFaceTokenizer", hf)
    parts = ["calibration", "held_out", *(["train"] if retrain else [])]
    for part in parts:
        preprocess([text / f"{part}.jsonl"], hand / part, tokenizer, append_eod=True)
        assert (hand / f"{part}.bin").read_bytes() == (text / f"{part}.bin").read_bytes()

    def loss(name: str) -> list[float]:
        words = ["--use-checkpoint-args", "--seq-length", S, "--windows", WINDOWS, "--data-path", hand / "held_out"]
        job(["evaluate", "--load", hand / name, *words, "--output", hand / f"{name}.json"], nproc=nproc).ok()
        (scores,) = json.loads((hand / f"{name}.json").read_text())["corpora"].values()
        return scores["window_losses"]

    calibration = ["--calibration-data-path", hand / "calibration", "--calibration-sequences", SEQUENCES]
    calibration += ["--calibration-seq-length", S]
    asked = ["--method", method, *(str(w) for k, v in settings.items() for w in (f"--{k.replace('_', '-')}", v))]
    parent = ["--load", hand / "parent"]
    last = "pruned"
    if method in ("wanda", "sparsegpt"):
        job(["sparsify", *parent, "--use-checkpoint-args", *calibration, *asked, "--save", hand / "pruned"], nproc).ok()
    else:
        statistics = hand / "s.safetensors"
        job(["calibrate", *parent, "--use-checkpoint-args", *calibration, "--output", statistics], nproc).ok()
        job(["plan", *parent, "--statistics", statistics, *asked, "--output", hand / "plan.json"]).ok()
        job(["apply", *parent, "--plan", hand / "plan.json", "--save", hand / "pruned"]).ok()
    if retrain:
        last, steps = "retrained", retrain // (4 * S)
        masks = ["--masks", hand / "pruned" / "masks"] if method == "sparsegpt" else []
        recipe = ["--lr", 1e-4, "--min-lr", 1e-5, "--lr-decay-style", "cosine", "--lr-warmup-fraction", 0.05]
        recipe += ["--weight-decay", 0.1, "--adam-beta2", 0.95, "--global-batch-size", 4, "--micro-batch-size", 1]
        stream = ["--data-path", hand / "train", "--stream-range", f"0:{4 * steps}", "--seq-length", S]
        start = ["--pretrained-checkpoint", hand / "pruned", "--use-checkpoint-args", *masks]
        place = ["--save", hand / "retrained", "--load", hand / "retrained"]
        job(["pretrain", *start, *stream, *recipe, "--train-iters", steps, *place], nproc).ok()
    export_hf(hand / last, hand / "out")

    assert list(made.before.window_losses) == loss("parent") and list(made.after.window_losses) == loss(last)
    assert made.before.perplexity == np.exp(np.mean(loss("parent")))
    ours, theirs = tensors(made.path), tensors(hand / "out")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ("masks.safetensors" in {path.name for path in made.path.iterdir()}) == (method in ("wanda", "sparsegpt"))
    assert made.retrained_tokens == retrain

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float64).eval()
    expected = reference.window_losses(model, text / "held_out", S, WINDOWS)
    np.testing.assert_allclose(made.after.window_losses, expected, rtol=2e-5)


@pytest.mark.slow
def test_masks_are_learned_before_the_cut_as_by_hand(prune, hf, job, tmp_path) -> None:
    """Ten whole steps of the 1,300 tokens, and the retraining on the samples that follow."""
    learning = {"mask_tokens": 1300, "mask_batch_size": 4, "mask_weight_lr": 1e-3, "mask_ramp": 0.5}
    retraining = {"retrain_tokens": 256, "retrain_batch_size": 4}
    made = prune(tmp_path / "out", "sheared-llama", **WIDTH, **learning, **retraining, keep=True)
    hand, text, asked = tmp_path / "hand", tmp_path / "out.work" / "text", []
    for name, size in WIDTH.items():
        asked += [f"--{name.replace('_', '-')}", size]
    assert not (tmp_path / "out.work" / "pruned.learning").exists() and not list(text.glob("calibration*"))

    import_hf(hf, hand / "parent")
    recipe = ["--lr-decay-style", "cosine", "--adam-beta2", 0.95, "--global-batch-size", 4, "--micro-batch-size", 1]
    recipe += ["--data-path", text / "train", "--seq-length", S, "--use-checkpoint-args"]
    masked = ["--lr", 1e-3, "--min-lr", 1e-4, "--lr-warmup-fraction", 0.1, "--weight-decay", 0, "--mask-ramp", 0.5]
    start = ["--pretrained-checkpoint", hand / "parent", "--stream-range", "0:40", "--save", hand / "learned"]
    job(["learn-masks", *start, *recipe, *masked, *asked]).ok()
    masks = ["--method", "sheared-llama", "--statistics", hand / "learned" / "learned_masks.safetensors"]
    job(["plan", "--load", hand / "learned", *masks, *asked, "--output", hand / "plan.json"]).ok()
    job(["apply", "--load", hand / "learned", "--plan", hand / "plan.json", "--save", hand / "pruned"]).ok()
    trained = ["--lr", 1e-4, "--min-lr", 1e-5, "--lr-warmup-fraction", 0.05, "--weight-decay", 0.1]
    start = ["--pretrained-checkpoint", hand / "pruned", "--stream-range", "40:48", "--save", hand / "retrained"]
    job(["pretrain", *start, *recipe, *trained]).ok()
    export_hf(hand / "retrained", hand / "out")

    ours, theirs = tensors(made.path), tensors(hand / "out")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert made.record["pruning"][-1]["tokens"] == 1280 and made.retrained_tokens == 256


class Killed(BaseException):
    """Raised where a process would be killed."""


def test_killed_after_every_stage_it_goes_on_and_ends_as_if_it_had_not_been(prune, tmp_path) -> None:
    whole = prune(tmp_path / "whole", "shortgpt", ratio=0.5, retrain_tokens=256, retrain_batch_size=4)
    stages = ["import", "text", "before", "prune", "retrain", "after"]

    def told(lines: list[str], until: str) -> Callable[[str], None]:
        def tell(line: str) -> None:
            lines.append(line)
            if line.startswith(until):
                raise Killed

        return tell

    for last in stages:
        lines: list[str] = []
        with pytest.raises(Killed):
            prune(tmp_path / "out", "shortgpt", ratio=0.5, retrain_tokens=256, retrain_batch_size=4,
                  tell=told(lines, last))  # fmt: skip
        assert not (tmp_path / "out").exists() and (tmp_path / "out.work").is_dir()
        known = [line.split()[0] for line in lines if line.endswith("from before") or line.endswith("(from before)")]
        expected = [stage for stage in stages[: stages.index(last)] if stage != "text"]
        assert known == expected
    made = prune(tmp_path / "out", "shortgpt", ratio=0.5, retrain_tokens=256, retrain_batch_size=4)
    assert {**made.record, "question": 0, "pruning": 0} == {**whole.record, "question": 0, "pruning": 0}
    ours, theirs = tensors(made.path), tensors(whole.path)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]  # no work folder is left

    again: list[str] = []
    same = prune(tmp_path / "out", "shortgpt", ratio=0.5, retrain_tokens=256, retrain_batch_size=4, tell=again.append)
    assert same == made and again == [f"{tmp_path / 'out'} is finished; nothing to do"]
    with pytest.raises(mp.MegatronPruneError, match="--out: .*holds another pruning \\(seq_length: 32, now 16\\)"):
        prune(tmp_path / "out", "shortgpt", ratio=0.5, retrain_tokens=256, retrain_batch_size=4, seq_length=16)


def test_the_work_of_another_question_is_refused(prune, tmp_path) -> None:
    def stop(line: str) -> None:
        if line.startswith("import"):
            raise Killed

    with pytest.raises(Killed):
        prune(tmp_path / "out", "wanda", pattern="2:4", tell=stop)
    with pytest.raises(mp.MegatronPruneError, match="out.work holds another pruning \\(pruning: .*wanda.*shortgpt"):
        prune(tmp_path / "out", "shortgpt", ratio=0.5)


@pytest.mark.slow
def test_the_command_line_gives_the_same(prune, hf, tiny_jsonl, tmp_path) -> None:
    made = prune(tmp_path / "out", "magnitude", pattern="4:8")
    record = (made.path / "megatron_prune.json").read_bytes()
    ours = tensors(made.path)
    shutil.rmtree(made.path)
    words = ["--hf", hf, "--out", made.path, "--text", tiny_jsonl, "--method", "magnitude", "--pattern", "4:8"]
    words += ["--seq-length", S, "--calibration-sequences", SEQUENCES, "--windows", WINDOWS]
    done = subprocess.run([sys.executable, "-m", "megatron_prune", "prune", *map(str, words)], capture_output=True,
                          text=True, stdin=subprocess.DEVNULL)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (made.path / "megatron_prune.json").read_bytes() == record
    theirs = tensors(made.path)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert f"{made.before.perplexity:.3f} before, {made.after.perplexity:.3f} after" in done.stdout
    assert len(done.stdout.splitlines()) <= 40


def test_without_text_it_says_by_name_what_it_reads(prune, tmp_path) -> None:
    lines: list[str] = []
    made = prune(tmp_path / "out", "magnitude", ratio=0.5, text=(), tell=lines.append)
    assert made.text.startswith("English text of this machine") and any(made.text in line for line in lines)


LEARNED = {"method": "sheared-llama", "pattern": None, **WIDTH}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hf": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"method": "wandering"}, "--method: .*wanda.*, got wandering"),
        (
            {"method": "shortgpt", "pattern": "2:4"},
            "--pattern: expected a sparse --method.*shortgpt",
        ),
        ({"pattern": "2:5"}, "5"),
        ({"pattern": "unstructured"}, "--ratio"),
        ({"calibration_sequences": 5000}, "--calibration-sequences: expected 5000 sequences of 32 tokens"),
        ({"windows": 5000}, "--windows: expected 5000 sequences"),
        ({"windows": 0}, "--windows"),
        ({"seq_length": 129}, "--seq-length: .*129.*128|--seq-length: .*128.*129"),
        ({"retrain_tokens": 100}, "--retrain-tokens: .*256"),
        ({"nproc": 3, "tensor_model_parallel_size": 2}, "--nproc: .*multiple of 2"),
        ({"text": "/nowhere.jsonl"}, "/nowhere.jsonl"),
        ({"dataset": "some/set"}, "--text, --dataset"),
        ({"dtype": "int8"}, "int8"),
        ({"ratoi": 0.5}, "ratoi"),
        (LEARNED, "--mask-tokens: expected the tokens .*sheared-llama learns its masks on, got nothing"),
        (LEARNED | {"mask_tokens": 100}, "--mask-tokens: expected 256 or more, got 100"),
        (LEARNED | {"mask_tokens": 10**6}, "--retrain-tokens, --mask-tokens: expected 31248 sequences"),
        ({"mask_tokens": 1000}, "--mask-tokens: expected --method sheared-llama with it, got --method wanda"),
    ],
)
def test_bad_questions_are_refused_in_one_line(prune, tmp_path, changes: dict[str, Any], says: str) -> None:
    given = {"method": "wanda", "pattern": "2:4", **changes}
    with pytest.raises(mp.MegatronPruneError, match=says) as refused:
        prune(tmp_path / "out", **given)
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists()  # the next command may ask for something else


def test_a_directory_that_is_no_model_and_a_family_that_is_not_known_are_refused(prune, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        mp.MegatronPruneError, match="empty: expected a Hugging Face model directory, got one without config.json"
    ):
        prune(tmp_path / "out", "wanda", pattern="2:4", hf=tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bloom"}')
    with pytest.raises(mp.MegatronPruneError, match="'bloom' is not supported: .*ALiBi"):
        prune(tmp_path / "out", "wanda", pattern="2:4", hf=tmp_path / "other")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(mp.MegatronPruneError, match="--out: .*full.*no pruning of megatron_prune"):
        prune(tmp_path / "full", "wanda", pattern="2:4")


def test_a_disk_that_is_too_small_is_refused_first(prune, tmp_path, monkeypatch) -> None:
    def usage(_: object) -> Any:
        return shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(mp.MegatronPruneError, match="expected .* GB free, .*got 0.00 GB"):
        prune(tmp_path / "out", "wanda", pattern="2:4")
    assert not (tmp_path / "out.work" / "parent").exists()


def test_documents_of_a_plain_text_file(prune, tmp_path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(tiny.documents(60)))
    with pytest.raises(mp.MegatronPruneError, match="--text-documents paragraph"):
        prune(tmp_path / "out", "wanda", ratio=0.5, text=book)
    # A method that reads no text asks for none: all of the text is held out.
    more = {"text_documents": "paragraph", "calibration_sequences": 5000}
    made = prune(tmp_path / "out2", "magnitude", ratio=0.5, text=book, **more)
    assert made.text == str(book) and list(made.record["text"]["parts"]) == ["held_out"]
