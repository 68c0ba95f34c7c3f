"""Statistics files: round trips, sums of merged files, and refusals of files that do not belong together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.errors import MegatronPruneError
from megatron_prune.structured.statistics import Statistics, StatisticsError, json_path, merge, read, tensor_shapes

SHAPE = ModelShape(2, 8, 4, 2, 3, 10, 16, tied=False)


def statistics(seed: int = 0, windows: tuple[int, ...] = (0, 1), **changes: object) -> Statistics:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.rand(size, generator=generator, dtype=torch.float64)
        for name, size in tensor_shapes(SHAPE, outliers=True).items()
    }
    calibration = {"prefix": "p", "corpus": "c", "sampling": "random", "seed": seed, "windows": list(windows)}
    made = Statistics(tensors, SHAPE, "parent", 5, len(windows), 7.5, (calibration,))
    return replace(made, **changes)  # type: ignore[arg-type]


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    written = statistics()
    written.write(path)
    found = read(path)
    assert found.hash == written.hash
    assert all(torch.equal(found.tensors[name], t) for name, t in written.tensors.items())
    assert (found.tokens, found.loss, found.calibrations) == (10, 0.75, written.calibrations)
    meta = json.loads((tmp_path / "s.json").read_text())
    assert (meta["sequences"], meta["tokens"], meta["sha256"]) == (2, 10, written.hash)
    assert meta["flops"] == 2 * SHAPE.forward_flops(5)


def test_merging_adds_sums_and_counts() -> None:
    one, other = statistics(0, (0, 1)), statistics(1, (5,))
    both = merge([one, other])
    assert (both.sequences, both.tokens, both.loss_sum) == (3, 15, 15.0)
    assert [c["windows"] for c in both.calibrations] == [[0, 1], [5]]
    assert one.tensors.keys() - both.tensors.keys() == {"outliers"}  # which no sum of two says
    for name, tensor in both.tensors.items():
        of_weights = name.split(".")[-1].startswith("weight_")  # of the same parent: the same in all
        assert torch.equal(tensor, one.tensors[name] if of_weights else one.tensors[name] + other.tensors[name])
    assert merge([one]).hash == one.hash


def under(seed: int, windows: tuple[int, ...], **precision: object) -> Statistics:
    made = statistics(seed, windows)
    return replace(made, calibrations=({**made.calibrations[0], **precision},))


CURRENT = {"format": "hybrid", "recipe": "tensorwise", "bf16_layers": [1, 1]}


def test_merging_keeps_one_precision() -> None:
    merge(
        [under(0, (0, 1), params_dtype="bfloat16", fp8=CURRENT), under(1, (5,), params_dtype="bfloat16", fp8=CURRENT)]
    )
    with pytest.raises(StatisticsError, match="fp8 is None in one and .*tensorwise"):
        merge([under(0, (0, 1), fp8=None), under(1, (5,), fp8=CURRENT)])
    with pytest.raises(StatisticsError, match="fp8 is .*tensorwise.* in one and .*blockwise"):
        merge([under(0, (0, 1), fp8=CURRENT), under(1, (5,), fp8={**CURRENT, "recipe": "blockwise"})])
    with pytest.raises(StatisticsError, match="params_dtype is float32 in one and bfloat16"):
        merge([under(0, (0, 1), params_dtype="float32"), under(1, (5,), params_dtype="bfloat16")])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (statistics(1, (5,), parent="another"), "parent is parent in one and another"),
        (statistics(1, (5,), seq_length=6), "seq_length is 5 in one and 6"),
        (statistics(1, (1, 5)), "1 windows of p are in more than one"),
    ],
)
def test_merging_is_refused(other: Statistics, message: str) -> None:
    with pytest.raises(StatisticsError, match=message):
        merge([statistics(), other])


def test_same_windows_of_another_corpus_merge() -> None:
    other = statistics(1)
    made = merge([statistics(), replace(other, calibrations=({**other.calibrations[0], "corpus": "d"},))])
    assert [run["corpus"] for run in made.calibrations] == [statistics().calibrations[0]["corpus"], "d"]


def test_files_of_two_runs_are_refused(tmp_path: Path) -> None:
    statistics(0).write(tmp_path / "a.safetensors")
    statistics(1).write(tmp_path / "b.safetensors")
    (tmp_path / "b.json").rename(tmp_path / "a.json")
    with pytest.raises(StatisticsError, match="expected two files of one run"):
        read(tmp_path / "a.safetensors")


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    with pytest.raises(MegatronPruneError, match=r"s\.json does not exist"):
        read(path)
    statistics().write(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(StatisticsError, match="expected two files of one run"):
        read(path)
    path.unlink()
    with pytest.raises(StatisticsError, match="expected statistics from calibrate"):
        read(path)
    json_path(path).write_text("[]")
    with pytest.raises(StatisticsError, match="expected the JSON of a statistics file"):
        read(path)


def test_incomplete_or_overflown_tensors_are_refused() -> None:
    good = statistics()
    with pytest.raises(StatisticsError, match="odd|too many or too few"):
        replace(good, tensors={k: v for k, v in good.tensors.items() if k != "mlp.sum"})
    with pytest.raises(StatisticsError, match=r"block_influence: expected float64 \[2\]"):
        replace(good, tensors={**good.tensors, "block_influence": torch.zeros(3, dtype=torch.float64)})
    with pytest.raises(StatisticsError, match="expected finite numbers"):
        replace(good, tensors={**good.tensors, "block_influence": torch.tensor([1.0, float("inf")]).double()})
    with pytest.raises(StatisticsError, match="at least one sequence"):
        replace(good, sequences=0)
