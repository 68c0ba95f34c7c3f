"""``evaluate``: the loss of transformers at every layout, and refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_prune import artifacts
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.data import indexed
from tests import reference
from tests.tiny import PADDING, VOCABULARY
from tests.training.small import layout

S, WINDOWS = 32, 11


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("llama-gqa", marks=pytest.mark.slow),
        "llama-gqa-tied-rope",
        pytest.param("mistral-mha-tied", marks=pytest.mark.slow),
    ],
)
def imported(request, tiny_hf, tmp_path_factory):
    """A Hugging Face directory and the checkpoint made of it."""
    from megatron_prune.convert.huggingface import import_hf

    checkpoint = tmp_path_factory.mktemp("imported") / "checkpoint"
    source = tiny_hf(request.param, layers=4)
    import_hf(source, checkpoint)
    return source, checkpoint


def _transformers_losses(source: Path, corpus: Path) -> list[float]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64).eval()
    return reference.window_losses(model, corpus, S, WINDOWS)


def _evaluate(job, checkpoint: Path, corpus: Path, output: Path, *more: object, nproc: int = 1) -> dict:
    argv = ["evaluate", "--load", checkpoint, "--data-path", corpus, "--labels", "text",
            "--seq-length", S, "--windows", WINDOWS, "--output", output, *more]  # fmt: skip
    job(argv, nproc=nproc).ok()
    return json.loads(output.read_text())


def test_every_layout_gives_the_losses_of_transformers(imported, tiny_corpus, tmp_path, job):
    source, checkpoint = imported
    expected = _transformers_losses(source, tiny_corpus)
    layouts = (
        ("1", 1, 1, 1, 3), ("tp2", 2, 1, 1, 1), ("pp2", 1, 2, 1, 4), ("dp2", 1, 1, 2, 4), ("tp2pp2", 2, 2, 1, 16),
    )  # fmt: skip
    for name, tp, pp, dp, batch in layouts:  # batches that divide the windows, that do not, and that hold them all
        flags = [*layout(tp, pp), "--micro-batch-size", batch]
        scores = _evaluate(job, checkpoint, tiny_corpus, tmp_path / name, *flags, nproc=tp * pp * dp)
        text = scores["corpora"]["text"]
        np.testing.assert_allclose(text["window_losses"], expected, rtol=2e-5, err_msg=name)
        assert text["loss"] == pytest.approx(np.mean(expected), rel=1e-5)
        assert text["perplexity"] == pytest.approx(math.exp(np.mean(expected)), rel=1e-4)
        assert text["windows"] == WINDOWS and text["predictions"] == WINDOWS * S
        assert text["fingerprint"] == indexed.fingerprint(tiny_corpus)
        scored, held = scores["checkpoint"], open_checkpoint(checkpoint)
        assert (scored["fingerprint"], scored["full_hash"]) == (held.fingerprint(), held.full_hash())
        assert scores["device"] == artifacts.device()
        assert scores["vocabulary"] == {"words": VOCABULARY, "padded": 384}
        rows = 1 if open_checkpoint(checkpoint).shape.tied else 2
        assert scores["parameters_nonzero"] == scores["parameters"] - rows * PADDING * 96


def test_several_corpora_in_one_load(tiny_parent, tiny_corpus, tmp_path, job):
    argv = ["evaluate", "--load", tiny_parent / "release", "--seq-length", S, "--windows", 4,
            "--data-path", tiny_corpus, tiny_corpus, "--labels", "a", "b", "--output", tmp_path / "s"]  # fmt: skip
    job(argv).ok()
    corpora = json.loads((tmp_path / "s").read_text())["corpora"]
    assert corpora["a"]["window_losses"] == corpora["b"]["window_losses"] and list(corpora) == ["a", "b"]


def test_scores_are_extended_by_what_they_lack(tiny_parent, tiny_corpus, tmp_path, job):
    """The file says what was kept: a loss that no model gives."""
    output, flags = tmp_path / "s", ["--load", tiny_parent, "--seq-length", S, "--windows", 4]
    argv = ["evaluate", *flags, "--data-path", tiny_corpus, "--labels", "a", "--output", output]
    job([*argv, "--extend"]).ok()
    whole = artifacts.read_json(output)
    kept = {**whole["corpora"]["a"], "loss": -1.0}
    artifacts.write_json(output, whole | {"corpora": {"a": kept, "other": {**kept, "loss": 2.0}}})
    more = ["evaluate", *flags, "--data-path", tiny_corpus, tiny_corpus, "--labels", "b", "a", "--output", output]
    job([*more, "--extend"], nproc=2).ok()  # every rank knows what is kept
    found = artifacts.read_json(output)["corpora"]
    assert list(found) == ["b", "a", "other"] and found["a"] == kept and found["other"]["loss"] == 2.0
    np.testing.assert_allclose(found["b"]["window_losses"], whole["corpora"]["a"]["window_losses"], rtol=1e-6)
    job([*argv, "--extend", "--windows", 5]).ok()  # of other windows nothing is kept
    assert artifacts.read_json(output)["corpora"]["a"]["windows"] == 5
    job(more).ok()
    assert artifacts.read_json(output)["corpora"]["a"]["loss"] == pytest.approx(whole["corpora"]["a"]["loss"])
    other = whole | {"checkpoint": whole["checkpoint"] | {"full_hash": "0" * 64}}
    artifacts.write_json(output, other)
    refused = job([*more, "--extend"])
    assert refused.returncode != 0 and "--output is of weights with full_hash 000" in refused.output
    assert artifacts.read_json(output) == other


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--windows", "1000000"], "--windows"),
        (["--labels", "a", "b"], "--labels"),
        (["--num-layers-per-virtual-pipeline-stage", "1"], "--num-layers-per-virtual-pipeline-stage"),
        (["--context-parallel-size", "2"], "--context-parallel-size"),
        (["--tensor-model-parallel-size", "5"], "divides the number of ranks, 1, got 5"),
    ],
)
def test_refused(tiny_parent, tiny_corpus, tmp_path, job, flags, says):
    argv = ["evaluate", "--load", tiny_parent, "--data-path", tiny_corpus,
            "--seq-length", S, "--output", tmp_path / "s", *flags]  # fmt: skip
    refused = job(argv)
    assert refused.returncode != 0 and says in refused.output
    assert not (tmp_path / "s").exists()


def test_text_of_another_tokenizer_is_refused(tiny_parent, tmp_path, job):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "other.bin"), dtype=np.uint16)
    builder.add_document(torch.full((200,), 5000), [200])
    builder.finalize(str(tmp_path / "other.idx"))
    argv = ["evaluate", "--load", tiny_parent, "--data-path", tmp_path / "other",
            "--seq-length", S, "--output", tmp_path / "s"]  # fmt: skip
    refused = job(argv)
    assert refused.returncode == 2 and "another tokenizer" in refused.output
