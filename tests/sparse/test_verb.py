"""The ``sparsify`` verb: its results, their use in other verbs, and refusals before any work."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.convert.huggingface import export_hf, import_hf
from megatron_prune.masks import open_masks
from tests.checkpoint import ranks as megatron_ranks
from tests.checkpoint import small as small_checkpoint
from tests.checkpoint.test_writer import global_name, shard
from tests.sparse import small


def test_only_what_was_chosen_goes(
    job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    save = tmp_path / "pruned"
    more = ["--ratio", 0.5, "--layers", "1,3", "--modules", "proj,fc1", "--module-ratio", "fc1=0.25"]
    more += small.layout("tp2pp2")
    job(small.flags(tiny_parent, save, "wanda", *more, corpus=tiny_corpus), nproc=4).ok()
    found, parent = small.result(save), open_checkpoint(tiny_parent)
    assert set(found) == {(layer, matrix) for layer in (1, 3) for matrix in ("o", "gate", "up")}
    for (_, matrix), (weight, kept) in found.items():
        assert set((~kept).sum(1).tolist()) == {kept.shape[1] // (2 if matrix == "o" else 4)}
        assert torch.equal(weight == 0, ~kept)  # no weight of the parent is zero
    checkpoint, masks = open_checkpoint(save), open_masks(save / "masks")
    for name in parent.names:
        kept = masks.read(name) if name in masks.entries else True
        assert torch.equal(checkpoint.read(name), parent.read(name) * kept), name

    entry = checkpoint.pruning[-1]
    removed = sum(int((~kept).sum()) for _, kept in found.values())
    assert entry["removed"] == removed == masks.removed
    assert entry["removed_linears"] == removed / parent.shape.linear_parameters()
    assert (entry["method"], entry["ratio"], entry["seed"]) == ("wanda", None, None)
    assert entry["settings"]["ratios"] == {"proj": 0.5, "fc1": 0.25}
    assert entry["parent"]["fingerprint"] == parent.fingerprint() and entry["masks"] == masks.hash
    assert entry["calibration"]["calibrations"][0]["windows"] == list(range(small.SEQUENCES))
    assert entry["tokens"] == small.SEQUENCES * small.LENGTH
    # Layers 0 to 2 passed the stream on, 1 and 3 also had hooks; no output layer.
    output = 2 * small.LENGTH * parent.shape.hidden_size * parent.shape.padded_vocab_size
    block = (parent.shape.forward_flops(small.LENGTH) - output) // 4
    assert entry["flops"] == 5 * small.SEQUENCES * block

    table = json.loads((save / "pruning" / "sparsity.json").read_text())
    assert [(row["layer"], row["matrix"], row["removed"]) for row in table["matrices"]] == [
        (layer, matrix, int((~found[layer, matrix][1]).sum())) for layer in (1, 3) for matrix in ("o", "gate", "up")
    ]
    assert all(0 < row["error"] < 0.2 for row in table["matrices"])
    assert (save / "huggingface" / "tokenizer.json").is_file()
    assert checkpoint.args["tokenizer_model"] == str(save / "huggingface")
    assert checkpoint.release and checkpoint.args["consumed_train_samples"] == 0


def test_the_error_of_a_matrix_is_that_of_its_outputs(
    job: Callable[..., Any], tiny_hf: Callable[..., Path], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    """‖X·ΔWᵀ‖² / ‖X·Wᵀ‖² of the first block, from transformers' own activations."""
    import transformers

    from tests.sparse.oracle import INPUTS, hessians

    save = tmp_path / "pruned"
    argv = small.flags(tiny_parent, save, "sparsegpt", "--ratio", 0.5, *small.layout("tp2dp2"), corpus=tiny_corpus)
    job(argv, nproc=4).ok()
    found = small.result(save)
    table = json.loads((save / "pruning" / "sparsity.json").read_text())
    errors = {row["matrix"]: row["error"] for row in table["matrices"] if row["layer"] == 0}
    folder = tiny_hf("llama-gqa", layers=4)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    block = model.model.layers[0]
    for paths, h in zip(INPUTS, hessians(model, block, small.corpus_windows(tiny_corpus)), strict=True):
        for matrix, path in paths.items():
            before = block.get_submodule(path).weight.detach()
            change = before - found[0, matrix][0]
            expected = (change @ h @ change.T).trace() / (before @ h @ before.T).trace()
            assert errors[matrix] == pytest.approx(expected.item(), rel=1e-4), matrix


def test_unmodified_megatron_loads_the_result(
    job: Callable[..., Any], distributed: Callable[..., Any], tmp_path: Path
) -> None:
    """Strictly, with its own loader and hashes, at layouts that did not write it."""
    args = small_checkpoint.ARGS | {"max_position_embeddings": 64, "seq_length": 64}
    parent = small_checkpoint.write(tmp_path / "parent", args)
    save = tmp_path / "pruned"
    argv = small.flags(parent, save, "magnitude", "--pattern", "2:4", "--tensor-model-parallel-size", 2)
    job([*argv, "--position-embedding-type", "rope"], nproc=2).ok()
    checkpoint = open_checkpoint(save)
    expected = {name: checkpoint.read(name) for name in checkpoint.names}
    for tp, pp in ((1, 1), (2, 2)):
        loaded = distributed(megatron_ranks.load, tp * pp, str(checkpoint.directory), tp, pp)
        for rank, parameters in enumerate(loaded):
            for name, value in parameters.items():
                full = global_name(name, rank // tp * 4 // pp)
                assert torch.equal(value, shard(full, expected[full], tp, rank % tp)), (rank, name)


def test_the_result_trains_on_and_leaves_for_hugging_face(
    job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    save, run = tmp_path / "pruned", tmp_path / "run"
    job(small.flags(tiny_parent, save, "sparsegpt", "--pattern", "2:4", "--bf16", corpus=tiny_corpus)).ok()
    job([
        "pretrain", "--pretrained-checkpoint", save, "--masks", save / "masks", "--save", run,
        "--load", run, "--train-data-path", tiny_corpus, "--stream-range", "0:8", "--stream-seed", 1, "--lr", 1e-3,
        "--seq-length", 32, "--micro-batch-size", 2, "--global-batch-size", 4, "--num-workers", 0,
        *small.layout("pp2"),
    ], nproc=2).ok()  # fmt: skip
    account = json.loads((run / "account.json").read_text())
    assert account["complete"] and account["start"] == "pruned"
    assert account["masks"] == open_masks(save / "masks").hash
    trained, masks = open_checkpoint(run), open_masks(save / "masks")
    for name in masks.entries:
        weight, kept = trained.read(name), masks.read(name)
        assert not weight[~kept].any() and not torch.equal(weight, open_checkpoint(save).read(name))
    export_hf(save, tmp_path / "hf")
    again = import_hf(tmp_path / "hf", tmp_path / "again")
    assert all(torch.equal(again.read(name), open_checkpoint(save).read(name)) for name in again.names)
    assert open_masks(tmp_path / "again" / "masks").hash == masks.hash


def test_a_sparse_parent_keeps_the_masks_of_what_is_left_alone(
    job: Callable[..., Any], tiny_parent: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    job(small.flags(tiny_parent, first, "magnitude", "--pattern", "2:4", "--modules", "fc2")).ok()
    more = ("--ratio", 0.25, "--modules", "qkv", *small.layout("tp2pp2"))
    job(small.flags(first, second, "random", *more), nproc=4).ok()
    one, both = small.result(first), small.result(second)
    assert set(both) == set(one) | {(layer, matrix) for layer in range(4) for matrix in "qkv"}
    assert all(torch.equal(both[key][1], one[key][1]) for key in one)
    assert [entry["method"] for entry in open_checkpoint(second).pruning] == ["magnitude", "random"]
    entries = open_masks(second / "masks").entries.values()
    assert {entry.pattern for entry in entries} == {"2:4", "unstructured"}


def test_verbs_that_run_a_model_require_its_masks(
    job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    save, other, run = tmp_path / "pruned", tmp_path / "other", tmp_path / "run"
    job(small.flags(tiny_parent, save, "magnitude", "--ratio", 0.5)).ok()
    job(small.flags(tiny_parent, other, "random", "--ratio", 0.5)).ok()
    recorded = open_masks(save / "masks").hash
    shutil.rmtree(save / "masks")
    text = ["--calibration-data-path", tiny_corpus, "--calibration-sequences", 2, "--calibration-seq-length", 32]
    calibrate = ["calibrate", "--load", save, *text, "--output", tmp_path / "s.safetensors"]
    evaluate = [
        "evaluate", "--load", save, "--data-path", tiny_corpus, "--seq-length", 32, "--windows", 2, "--output",
        tmp_path / "scores.json",
    ]  # fmt: skip
    pretrain = [
        "pretrain", "--pretrained-checkpoint", save, "--save", run, "--load", run, "--train-data-path", tiny_corpus,
        "--stream-range", "0:8", "--stream-seed", 1, "--lr", 1e-3, "--seq-length", 32, "--micro-batch-size", 2,
        "--global-batch-size", 4, "--num-workers", 0,
    ]  # fmt: skip
    for argv in (calibrate, evaluate, pretrain):
        refused = job(argv)
        assert refused.returncode == 2 and f"expected the masks {recorded}" in refused.output, refused.output
        job([*argv, "--allow-missing-masks"]).ok()
    account, scores = (json.loads(path.read_text()) for path in (run / "account.json", tmp_path / "scores.json"))
    assert account["masks"] is None and account["initial"]["missing_masks"] == recorded
    assert scores["masks"] is None and scores["missing_masks"] == recorded
    shutil.copytree(other / "masks", save / "masks")
    (save / "release" / "pruning.json").unlink()  # so that only the weights can tell whose masks these are
    refused = job(calibrate)
    assert refused.returncode == 2 and "although its mask removes them" in refused.output, refused.output


def test_prune_is_the_same_verb(job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    for save, verb in ((tmp_path / "one", "sparsify"), (tmp_path / "two", "prune")):
        job([verb, *small.flags(tiny_parent, save, "wanda", "--ratio", 0.5, corpus=tiny_corpus)[1:]]).ok()
    assert open_masks(tmp_path / "one" / "masks").hash == open_masks(tmp_path / "two" / "masks").hash
    job(["prune", *small.flags(tiny_parent, tmp_path / "three", "random", "--pattern", "1:4")[1:]]).ok()
    assert {e.pattern for e in open_masks(tmp_path / "three" / "masks").entries.values()} == {"1:4"}
    refused = job(
        ["plan", "--load", tiny_parent, "--method", "wanda", "--ratio", "0.5", "--output", tmp_path / "p.json"]
    )
    assert refused.returncode == 2 and "wanda is sparse: run it with sparsify" in refused.output


def test_more_ranks_than_query_groups(
    job: Callable[..., Any], tiny_hf: Callable[..., Path], tiny_corpus: Path, tmp_path: Path
) -> None:
    """A rank then holds a piece of a group's rows."""
    import_hf(tiny_hf("llama-gqa", num_key_value_heads=2), tmp_path / "parent")
    found = []
    for tp in (1, 4):
        argv = small.flags(tmp_path / "parent", tmp_path / str(tp), "sparsegpt", "--ratio", 0.5, corpus=tiny_corpus)
        job([*argv, "--tensor-model-parallel-size", tp], nproc=tp).ok()
        found.append(small.result(tmp_path / str(tp)))
    assert small.agreement(*found) >= 0.97
    assert all(torch.equal(found[0][0, matrix][1], found[1][0, matrix][1]) for matrix in "qkv")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ratio", "1"], "--ratio: expected the fraction to remove, a number between 0 and 1, got 1.0"),
        (["--ratio", "0"], "--ratio: expected .*, got 0.0"),
        ([], "--ratio: expected .*, got nothing"),
        (["--ratio", "0.25", "--pattern", "2:4"], "--ratio: expected no such flag, or 0.5, got 0.25"),
        (["--pattern", "4:4"], "--pattern: expected .*, got 4:4"),
        (["--pattern", "16:64"], "--pattern: expected .*, got 16:64"),
        (["--pattern", "3:9"], "--pattern: expected an M that divides .*, got 3:9 .* has 96"),
        (["--pattern", "2:4", "--module-ratio", "fc1=0.3"], "--module-ratio: expected .*, got 0.3"),
        (["--ratio", "0.5", "--module-ratio", "fc2=2"], "--module-ratio: expected .*, got 2.0"),
        (["--ratio", "0.5", "--module-ratio", "fc2"], "--module-ratio: expected .*, got fc2"),
        (
            ["--ratio", "0.5", "--modules", "proj", "--module-ratio", "fc2=0.3"],
            "--module-ratio: expected .*, got fc2=0.3",
        ),
        (["--ratio", "0.5", "--modules", "proj,gate"], "--modules: expected .*, got proj,gate"),
        (["--ratio", "0.5", "--layers", "2-4"], "--layers: expected layers from 0 to 3, got 4"),
        (["--ratio", "0.5", "--layers", "3-1"], "--layers: expected .*, got 3-1"),
        (["--ratio", "0.5", "--method", "shortgpt"], "--method: expected .*, got shortgpt .*shortgpt is structured"),
        (["--ratio", "0.5", "--method", "magnitude"], "--calibration-data-path: expected .*, got it"),
        (["--ratio", "0.5", "--calibration-sequences", "100000"], "--calibration-sequences: expected .*, got 100000"),
        (["--ratio", "0.5", "--seq-length", "32"], "--seq-length: expected .*, got 32"),
        (["--ratio", "0.5", "--micro-batch-size", "2"], "--micro-batch-size: expected .*, got 2"),
        (["--ratio", "0.5", "--context-parallel-size", "2"], "--context-parallel-size: expected .*, got 2"),
        (["--ratio", "0.5", "--num-layers-per-virtual-pipeline-stage", "1"], "--num-layers-per-virtual"),
    ],
    ids=itertools.count(),
)
def test_refused_before_it_begins(
    job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    finished = job(small.flags(tiny_parent, tmp_path / "save", "wanda", *more, corpus=tiny_corpus))
    assert finished.returncode == 2
    assert re.search("megatron-prune sparsify: " + message, finished.output), finished.output[-2000:]
    assert "distributed checkpoint from" not in finished.output and not list(tmp_path.iterdir())
