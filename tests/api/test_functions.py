"""``import megatron_prune`` is quick, and its functions can be called again, in any order, from a clean process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_prune as mp
from megatron_prune.checkpoint.reader import open_checkpoint

S = 32
CALIBRATION = {"calibration_sequences": 5, "calibration_seq_length": S}


def test_the_import_loads_nothing_and_names_everything() -> None:
    script = (
        "import sys; before = set(sys.modules); import megatron_prune as mp\n"
        "assert set(mp.__all__) <= set(dir(mp))\n"
        "heavy = {'torch', 'numpy', 'megatron', 'transformers', 'pydantic', 'rich'} & set(sys.modules)\n"
        "ours = [name for name in set(sys.modules) - before if name.startswith('megatron_prune.')]\n"
        "assert not heavy and not ours, (heavy, ours)\n"
        "assert mp.prune.__module__ == 'megatron_prune.api.prune_checkpoint' and 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in mp.__all__:
        found = getattr(mp, name)
        assert found.__name__ == name and found.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'prnue'"):
        mp.prnue  # noqa: B018
    # A subpackage of the same name would hide a function once anything imports it.
    rooms = {path.stem for path in Path(mp.__file__).parent.iterdir()}
    assert not rooms & set(mp.__all__)


def test_functions_are_their_verbs_in_any_order_and_leave_the_process_clean(
    job, tiny_hf, tiny_corpus, tmp_path
) -> None:
    environment, stand_ins = dict(os.environ), (torch.cuda.current_device, torch.Tensor.cuda, torch.compile)
    source = tiny_hf("llama-gqa", layers=4)
    parent = mp.import_hf(source, tmp_path / "parent")
    first = mp.evaluate(parent.path, tiny_corpus, seq_length=S, windows=6, labels=["text"])
    calibration = mp.calibrate(parent.path, tmp_path / "s.safetensors", tiny_corpus, **CALIBRATION, nproc=2)
    plan = mp.plan(parent.path, "shortgpt", statistics=calibration.path, ratio=0.5, output=tmp_path / "p.json")
    cut = mp.apply(parent.path, plan, tmp_path / "cut")
    sparse = mp.sparsify(
        parent.path, tmp_path / "sparse", "wanda", pattern="2:4", calibration_data_path=tiny_corpus, **CALIBRATION
    )
    again = mp.evaluate(
        parent.path, tiny_corpus, seq_length=S, windows=6, labels=["text"], output=tmp_path / "scores.json", nproc=2
    )
    out = mp.export_hf(cut.path, tmp_path / "out")
    mp.export_hf(sparse.path, tmp_path / "sparse-out")
    card = (tmp_path / "sparse-out" / "README.md").read_text()
    removed = sparse.shape.linear_parameters() // 2
    assert f"{removed:,} of {2 * removed:,} weights of the linears are removed\n(2:4)" in card
    assert "1. pruned by wanda with masks; read 160 tokens" in card
    assert (torch.cuda.current_device, torch.Tensor.cuda, torch.compile) == stand_ins
    changed = {name for name in {*environment, *os.environ} if environment.get(name) != os.environ.get(name)}
    assert changed <= {"TORCHINDUCTOR_CACHE_DIR"}  # torch's own, when its compiler is imported
    assert not torch.distributed.is_initialized()

    common = ["--load", parent.path, "--use-checkpoint-args"]
    words = ["--calibration-data-path", tiny_corpus, "--calibration-sequences", 5, "--calibration-seq-length", S]
    job(["calibrate", *common, *words, "--output", tmp_path / "t.safetensors"], nproc=2).ok()
    assert (tmp_path / "t.safetensors").read_bytes() == calibration.path.read_bytes()
    job(["plan", "--load", parent.path, "--statistics", tmp_path / "t.safetensors", "--method", "shortgpt",
         "--ratio", 0.5, "--output", tmp_path / "q.json"]).ok()  # fmt: skip
    assert (tmp_path / "q.json").read_bytes() == plan.path.read_bytes()
    job(["evaluate", *common, "--data-path", tiny_corpus, "--labels", "text", "--seq-length", S, "--windows", 6,
         "--output", tmp_path / "by-hand.json"]).ok()  # fmt: skip
    (by_hand,) = json.loads((tmp_path / "by-hand.json").read_text())["corpora"].values()
    assert list(first.corpora["text"].window_losses) == by_hand["window_losses"]
    assert first.loss == by_hand["loss"] and first.perplexity == by_hand["perplexity"]
    assert again.loss == pytest.approx(first.loss, rel=1e-5) and again.path == tmp_path / "scores.json"
    assert first.path is None

    # What they print: what was made, where, figures.
    assert str(parent.path) in repr(parent) and f"{parent.parameters:,}" in repr(parent)
    assert f"perplexity {first.perplexity:.3f}" in repr(first) and "192 tokens" in repr(first)
    assert "5 sequences of 32 tokens" in repr(calibration) and f"{calibration.loss:.4f}" in repr(calibration)
    assert "50.00%" in repr(plan) and "to" in repr(plan) and "2 layers" in repr(plan)
    assert "wanda 2:4, 50.00%" in repr(sparse) and repr(out).startswith(f"Hugging Face directory {tmp_path / 'out'}")
    assert open_checkpoint(sparse.path).shape == parent.shape and cut.shape.num_layers == 2
    with pytest.raises(AttributeError):
        parent.path = tmp_path  # type: ignore[misc]


def test_what_a_verb_refuses_is_raised_in_its_words(tiny_parent, tiny_corpus, tmp_path) -> None:
    with pytest.raises(mp.MegatronPruneError, match="^--windows: .*100000") as refused:
        mp.evaluate(tiny_parent, tiny_corpus, seq_length=S, windows=100000)
    assert "\n" not in str(refused.value)
    with pytest.raises(mp.MegatronPruneError, match="^--context-parallel-size"):
        mp.calibrate(tiny_parent, tmp_path / "s.safetensors", tiny_corpus, megatron={"context_parallel_size": 2})
    with pytest.raises(mp.MegatronPruneError, match="one of them"):
        mp.prune(hf="a", out="b", load="c", save="d", method="wanda")
    with pytest.raises(mp.MegatronPruneError, match="sparse"):
        mp.plan(tiny_parent, "wanda", ratio=0.5, output=tmp_path / "plan.json")


def twice(parent: Path, corpus: Path, folder: Path) -> list[Any]:
    """In every rank of a launch: the results of two evaluations with a calibration between them."""
    import megatron_prune as mp

    one = mp.evaluate(parent, corpus, seq_length=S, windows=6, output=folder / "one.json")
    between = mp.calibrate(parent, folder / "s.safetensors", corpus, calibration_sequences=4, calibration_seq_length=S)
    two = mp.evaluate(parent, corpus, seq_length=S, windows=6, output=folder / "two.json",
                      megatron={"tensor_model_parallel_size": 2})  # fmt: skip
    try:
        mp.prune(hf=parent, out=folder / "out", method="wanda", pattern="2:4")
        refused = ""
    except mp.MegatronPruneError as error:
        refused = str(error)
    return [one.loss, between.loss, two.loss, refused]


def test_inside_a_launch_verbs_run_in_place_one_after_another(distributed, tiny_parent, tiny_corpus, tmp_path) -> None:
    ranks = distributed(twice, 2, tiny_parent, tiny_corpus, tmp_path)
    assert ranks[0][:3] == ranks[1][:3]
    expected = mp.evaluate(tiny_parent, tiny_corpus, seq_length=S, windows=6, nproc=2).loss
    assert ranks[0][0] == expected and ranks[0][2] == pytest.approx(expected, rel=1e-5)
    assert all("--hf: " in rank[3] and "distributed launch" in rank[3] for rank in ranks)
