"""Methods that use only weights, streamed: against a sort of whole matrices, for checkpoints of any writer.

The oracle sorts |w| in float64, or the draws of the seed; of equal scores the later go first.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prune import verbs
from megatron_prune.checkpoint import reader
from megatron_prune.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_prune.errors import CheckpointError, UsageError
from megatron_prune.masks import open_masks
from megatron_prune.pruning import sparsify
from megatron_prune.settings import add_flags
from megatron_prune.sparse import request, result, scratch, weights_only
from megatron_prune.sparse.request import SparsifyTask
from megatron_prune.sparse.scratch import Scratch
from tests.checkpoint import ranks as megatron_ranks
from tests.checkpoint import small as small_checkpoint
from tests.sparse import oracle, small

SEED = 3
NAMES = ("q", "k", "v", "o", "gate", "up", "down")
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AMOUNTS = {
    "half": ["--ratio", "0.5"],
    "most": ["--ratio", "0.8125"],
    "next to nothing": ["--ratio", "0.0001"],
    "2:4": ["--pattern", "2:4"],
    "3:8": ["--pattern", "3:8"],
}


SIZES = {"row by row": 1, "some rows": 700, "all at once": 1 << 20}


@pytest.fixture(params=SIZES)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of rows that are read at a time."""
    size = SIZES[request.param]
    monkeypatch.setattr(weights_only, "RECORD_BYTES", size)
    monkeypatch.setattr(weights_only, "CHUNK_BYTES", max(1, size // 3))
    return size


def parent(root: Path, kind: str) -> Checkpoint:
    """Weights of few values, so that all thresholds tie; zeros of both signs among them."""

    def values(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor * 4).round() / 64 if kind != "fp32" else (tensor * 40).round() / 640

    args = small_checkpoint.ARGS | {"params_dtype": KINDS[kind]}
    with small_checkpoint.CheckpointWriter(root, args=args, dtype=KINDS[kind]) as writer:
        for name, tensor in small_checkpoint.tensors(args).items():
            writer.add(name, tensor.shape, values(tensor).split(5))
    return open_checkpoint(root)


def asked(method: str, amount: list[str]) -> request.SparsifyRequest:
    parser = argparse.ArgumentParser()
    add_flags(parser, verbs.SparsitySettings)
    return request.choose(method, verbs.SparsitySettings.of(parser.parse_args(amount)), SEED)


def prune(
    of: Checkpoint, save: Path, method: str, amount: list[str], params_dtype: torch.dtype = torch.float32
) -> Path:
    wanted = asked(method, amount)
    wanted.check(of.shape)
    task = SparsifyTask(of, wanted, None, {"what": [method, *amount]}, save)
    weights_only.run(task, params_dtype)
    result.write(task, None)
    return save


def expected_mask(weight: torch.Tensor, method: str, amount: list[str], layer: int, matrix: str) -> torch.Tensor:
    scores = weight.double().abs()
    if method == "random":
        draws = np.random.Generator(np.random.PCG64((SEED, layer, NAMES.index(matrix)))).random(weight.shape)
        scores = torch.from_numpy(draws.astype(np.float32))
    if amount[0] == "--pattern":
        n, m = map(int, amount[1].split(":"))
        return oracle.lowest_stay_out(scores.reshape(-1, m), m - n).view(weight.shape)
    count = int(Fraction(amount[1]) * weight.numel())
    return oracle.lowest_stay_out(scores.reshape(1, -1), count).view(weight.shape)


def check(save: Path, of: Checkpoint, method: str, amount: list[str], computed: torch.dtype = torch.float32) -> None:
    """Masks, weights and table of a pruning are the oracle's; everything else is the parent's, bit by bit."""
    made, found = open_checkpoint(save), small.result(save)
    shape = of.shape
    sizes = (shape.num_attention_heads, shape.num_query_groups)
    table = {(row["layer"], row["matrix"]): row for row in json.loads((save / result.TABLE).read_text())["matrices"]}
    seen = set()
    for name in of.names:
        if not of.layout(name).is_linear:
            assert torch.equal(bits(made.read(name)), bits(of.read(name))), name
            continue
        layer = int(name.split(".")[2])
        for matrix, stored in small.split(of.read(name), name.split(".")[-2], *sizes).items():
            seen.add((layer, matrix))
            before = stored.to(computed)
            kept = expected_mask(before, method, amount, layer, matrix)
            weight, ours = found[layer, matrix]
            assert torch.equal(ours, kept), (layer, matrix)
            left = before.masked_fill(~kept, 0).to(stored.dtype)
            assert torch.equal(bits(weight), bits(left)), (layer, matrix)
            row, exact = table[layer, matrix], before.double()
            assert row["removed"] == int((~kept).sum())
            lost = (exact - left.double()).square().sum() / exact.square().sum()
            assert row["error"] == pytest.approx(lost.item(), rel=1e-6)
    assert seen == table.keys() == found.keys()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """−0 is not +0 here."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.itemsize])


CASES = [
    *(("magnitude", "bf16", amount) for amount in AMOUNTS),
    *(("magnitude", "fp32", amount) for amount in ("half", "next to nothing", "3:8")),
    *(("magnitude", "fp16", amount) for amount in ("most", "2:4")),
    *(("random", kind, amount) for kind, amount in (("bf16", "half"), ("fp32", "most"), ("fp32", "2:4"))),
]


# How the rows are cut matters to a method, a width of digits and a pattern, not to all that these are combined with.
CUT = [("magnitude", "bf16", "2:4"), ("magnitude", "fp32", "half"), ("random", "bf16", "half")]


@pytest.mark.parametrize(
    ("blocks", "method", "kind", "amount"),
    [
        *(("some rows", *case) for case in CASES),
        *((size, *case) for size in ("row by row", "all at once") for case in CUT),
    ],
    indirect=["blocks"],
)
def test_it_is_a_sort_of_whole_matrices(tmp_path: Path, blocks: int, method: str, kind: str, amount: str) -> None:
    of = parent(tmp_path / "parent", kind)
    save = prune(of, tmp_path / "pruned", method, AMOUNTS[amount])
    check(save, of, method, AMOUNTS[amount])


@pytest.mark.parametrize("computed", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_what_the_model_computes_in(tmp_path: Path, kind: str, computed: str) -> None:
    """``--bf16`` rounds fp32 weights to bf16, ranks the rounded values, and keeps them."""
    small_checkpoint.write(tmp_path / "parent", dtype=KINDS[kind])
    of = open_checkpoint(tmp_path / "parent")
    for name, amount in AMOUNTS.items():
        save = prune(of, tmp_path / name, "magnitude", amount, KINDS[computed])
        check(save, of, "magnitude", amount, KINDS[computed])


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("homogeneous", [True, False])
def test_megatron_wrote_it_at_some_layout(
    distributed: Callable[..., Any],
    tmp_path: Path,
    tp: int,
    pp: int,
    homogeneous: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights_only, "RECORD_BYTES", 700)
    metadata = {"non_homogeneous_layers": not homogeneous}
    distributed(megatron_ranks.save, tp * pp, str(tmp_path / "iter_0000020"), tp, pp, metadata)
    of = open_checkpoint(tmp_path / "iter_0000020")
    for method, amount in (("magnitude", AMOUNTS["most"]), ("magnitude", AMOUNTS["2:4"]), ("random", AMOUNTS["half"])):
        check(prune(of, tmp_path / f"{method}{amount[1]}", method, amount), of, method, amount)


def test_no_flag_of_the_model_is_needed_and_ranks_share_the_blocks(
    job: Callable[..., Any], tiny_parent: Path, tmp_path: Path
) -> None:
    words = ["--load", tiny_parent, "--method", "magnitude", "--ratio", 0.5, "--save"]
    job(["sparsify", *words, tmp_path / "bare"]).ok()
    finished = job(["sparsify", *words, tmp_path / "three"], nproc=3).ok()
    assert all(f"block {number} of 4" in finished.output for number in range(1, 5))
    job(["prune", *words, tmp_path / "layout", "--use-checkpoint-args", *small.layout("tp2pp2")], nproc=4).ok()
    one, *others = (
        (open_checkpoint(save).full_hash(), open_masks(save / "masks").hash, (save / result.TABLE).read_text())
        for save in (tmp_path / "bare", tmp_path / "three", tmp_path / "layout")
    )
    assert others == [one, one]
    check(tmp_path / "bare", open_checkpoint(tiny_parent), "magnitude", AMOUNTS["half"])


def test_files_of_ranks_are_pruned_at_any_layout(job: Callable[..., Any], tiny_parent: Path, tmp_path: Path) -> None:
    """Legacy checkpoints that Megatron loads only at TP=3."""
    words = "--mock-data --seq-length 64 --micro-batch-size 1 --global-batch-size 2 --train-iters 1 --lr 0.1"
    argv = ["pretrain", "--load", tiny_parent, "--use-checkpoint-args", "--finetune", *words.split()]
    argv += ["--ckpt-convert-format", "torch", "--ckpt-convert-save", tmp_path / "legacy", *small.layout("tp3")]
    job(argv, nproc=3).ok()
    load = tmp_path / "legacy" / "torch"
    assert open_checkpoint(load).rank_layout == (3, 1, 1)
    job(["sparsify", "--load", load, "--method", "magnitude", "--ratio", 0.5, "--save", tmp_path / "save"]).ok()
    check(tmp_path / "save", open_checkpoint(tiny_parent), "magnitude", AMOUNTS["half"])


def test_flags_of_another_model_are_refused(job: Callable[..., Any], tiny_parent: Path, tmp_path: Path) -> None:
    argv = ["sparsify", "--load", tiny_parent, "--method", "magnitude", "--ratio", 0.5, "--save", tmp_path / "save"]
    argv += ["--num-layers", 5, "--hidden-size", 96, "--num-attention-heads", 12, "--max-position-embeddings", 64]
    refused = job([*argv, "--vocab-size", 100])
    assert refused.returncode == 2 and "--num-layers: expected 4, as in" in refused.output
    assert not list(tmp_path.iterdir())


def test_masks_must_fit_the_weights(job: Callable[..., Any], tiny_parent: Path, tmp_path: Path) -> None:
    """Those that stay are written again, and would get a new, valid hash; those that are replaced show that the parent
    is another."""
    of = open_checkpoint(tiny_parent)
    one, other = (prune(of, tmp_path / method, method, AMOUNTS["half"]) for method in ("magnitude", "random"))
    masks = shutil.move(one / "masks", tmp_path / "masks")
    again = ["sparsify", "--load", one, "--method", "magnitude", "--ratio", 0.5, "--save", tmp_path / "save"]
    lost = job(again)
    assert lost.returncode == 2 and "got none: restore them from a copy, or add --allow-missing-masks" in lost.output
    shutil.copytree(other / "masks", one / "masks")
    refused = job(again)
    assert refused.returncode == 2 and "which are of another pruning" in refused.output
    (one / "release" / "pruning.json").unlink()  # so that only the weights can tell
    for flags in (["--modules", "fc1,fc2,proj"], []):
        refused = job([*again, *flags])
        assert refused.returncode == 2, refused.output
        assert "masks do not fit these weights: decoder.layers.0.self_attention.linear_qkv" in refused.output
    assert not (tmp_path / "save").exists()
    shutil.rmtree(one / "masks")
    shutil.move(masks, one / "masks")
    job(again).ok()


def test_nodes_that_share_no_disk_do_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of, first = parent(tmp_path / "parent", "bf16"), Scratch(tmp_path / "save")
    task = SparsifyTask(of, asked("magnitude", AMOUNTS["half"]), None, {}, tmp_path / "elsewhere" / "save")
    first.open({})  # on the first rank's machine
    monkeypatch.setattr(weights_only, "_from_first", lambda done: done)
    monkeypatch.setattr(scratch, "SEEN_SECONDS", 0.0)
    first.refuse_unseen()
    with pytest.raises(UsageError, match="--save: .*all nodes share"):
        weights_only.run(task, torch.float32, rank=1, ranks=2)


@pytest.mark.parametrize("ranks", [1, 3, 1000])
def test_ranks_divide_the_weights_that_are_checked_before_they_meet(tmp_path: Path, ranks: int) -> None:
    """Rank 0 read all of them alone, and the others timed out on large parents."""
    of = parent(tmp_path / "parent", "bf16")
    parts = [sparsify.weights_of_rank(of, rank, ranks) for rank in range(ranks)]
    assert sorted(name for names in parts for name in names) == sorted(of.names)
    sizes = [sum(of.spec(name).nbytes for name in names) for names in parts]
    assert max(sizes) <= sum(sizes) / ranks + max(of.spec(name).nbytes for name in of.names)


def test_the_last_rank_finds_what_is_not_finite(job: Callable[..., Any], tiny_parent: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    of = open_checkpoint(tiny_parent)
    name = sparsify.weights_of_rank(of, 1, 2)[-1]
    with small_checkpoint.CheckpointWriter(broken, args=of.args, dtype=torch.float32) as writer:
        for each in of.names:
            weight = torch.cat([block.clone() for block in of.row_blocks(each)])
            if each == name:
                weight.view(-1)[5] = float("nan")
            writer.add(each, weight.shape, [weight])
    command = ["sparsify", "--load", broken, "--method", "magnitude", "--ratio", "0.5", "--save", tmp_path / "save"]
    refused = job(command, nproc=2)
    assert refused.returncode and f"{name}[" in refused.output and "expected finite weights" in refused.output


@pytest.mark.parametrize("amount", ["half", "2:4"])
@pytest.mark.parametrize("broken", [float("inf"), float("nan")])
def test_what_is_not_finite_is_named(tmp_path: Path, amount: str, broken: float) -> None:
    name = "decoder.layers.2.mlp.linear_fc1.weight"
    with small_checkpoint.CheckpointWriter(
        tmp_path / "parent", args=small_checkpoint.ARGS, dtype=torch.bfloat16
    ) as writer:
        for weight, tensor in small_checkpoint.tensors().items():
            if weight == name:
                tensor[-1, -1] = broken
            writer.add(weight, tensor.shape, [tensor])
    of = open_checkpoint(tmp_path / "parent")
    with pytest.raises(CheckpointError, match=f"{name}: its weights are not finite"):
        prune(of, tmp_path / "save", "magnitude", AMOUNTS[amount])
    assert not (tmp_path / "save").exists()
    prune(of, tmp_path / "other", "random", AMOUNTS[amount])  # which ranks draws


def test_never_more_than_some_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = parent(tmp_path / "parent", "bf16")
    largest = max(of.spec(name).nbytes for name in of.names if of.layout(name).is_linear)
    monkeypatch.setattr(weights_only, "RECORD_BYTES", 1000)
    monkeypatch.setattr(weights_only, "CHUNK_BYTES", 500)
    monkeypatch.setattr(reader, "_BLOCK_BYTES", 1000)  # of what is copied
    sizes = [0]

    def read_rows(self: Checkpoint, *asked: Any, real: Any = Checkpoint.read_rows) -> torch.Tensor:
        rows = real(self, *asked)
        sizes.append(rows.nbytes)
        return rows

    monkeypatch.setattr(Checkpoint, "read_rows", read_rows)
    for method, amount in (("magnitude", "half"), ("random", "2:4")):
        sizes[:] = [0]
        prune(of, tmp_path / method, method, AMOUNTS[amount])
        assert max(sizes) <= 1000 < largest and len(sizes) > 100


def test_bounded_on_matrices_that_cut_unevenly(tmp_path: Path, blocks: int) -> None:
    """Heads and groups whose rows do not fill blocks, a model without a gate, tied output, biases."""
    args = small_checkpoint.ARGS | {"num_query_groups": 1, "swiglu": False, "add_bias_linear": True}
    of = open_checkpoint(small_checkpoint.write(tmp_path / "parent", args, dtype=torch.bfloat16))
    save = prune(of, tmp_path / "pruned", "magnitude", AMOUNTS["half"])
    made, masks = open_checkpoint(save), open_masks(save / "masks")
    for name in masks.entries:
        weight, kept = of.read(name), masks.read(name)
        for part in pieces(weight, name, args["kv_channels"]):
            expected = expected_mask(weight[part], "magnitude", AMOUNTS["half"], 0, "q")
            assert torch.equal(kept[part], expected), name
        assert torch.equal(bits(made.read(name)), bits(weight.masked_fill(~kept, 0)))


def pieces(weight: torch.Tensor, name: str, head: int) -> Iterator[slice]:
    """The matrices of a weight with one query group and no gate: rows of q, then k, then v, ``head`` per head."""
    edges = [0, len(weight) - 2 * head, len(weight) - head, len(weight)] if "linear_qkv" in name else [0, len(weight)]
    yield from (slice(a, b) for a, b in zip(edges, edges[1:], strict=False))
