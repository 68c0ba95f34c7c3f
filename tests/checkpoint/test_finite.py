"""NaN and infinities among the weights: each verb that writes weights refuses them with their place, unless allowed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.__main__ import main
from megatron_prune.checkpoint.parallel import finite
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.writer import CheckpointWriter
from megatron_prune.errors import CheckpointError
from tests.checkpoint import small
from tests.training.small import any_plan

NAME = "decoder.layers.2.mlp.linear_fc2.weight"
PLACE = f"{NAME}[29, 7] is nan: expected finite weights"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_place_is_named(dtype: torch.dtype, value: float) -> None:
    whole = torch.randn(37, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(torch.cat(list(finite("w", whole.split(5)))), whole)
    for row, column in ((0, 0), (17, 10), (36, 3)):
        broken = whole.clone()
        broken[row, column] = broken[36, 10] = value
        with pytest.raises(CheckpointError, match=rf"^w\[{row}, {column}\] is {value}: expected finite weights"):
            list(finite("w", broken.split(5)))
        with pytest.raises(CheckpointError, match=rf"^w\[{100 + row}\] is {value}:"):
            list(finite("w", [broken[:, column]], 100))


def test_a_sum_that_overflows_is_no_infinity() -> None:
    largest = torch.full((100, 3), torch.finfo(torch.float32).max)
    assert torch.equal(next(finite("w", [largest])), largest)
    assert len(next(finite("w", [torch.empty(0, 3)]))) == 0


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("broken") / "checkpoint"
    with CheckpointWriter(root, args=small.ARGS, dtype=torch.float32) as writer:
        for name, tensor in small.tensors().items():
            if name == NAME:
                tensor[29, 7] = math.nan
            writer.add(name, tensor.shape, [tensor])
    any_plan(open_checkpoint(root)).write(root.parent / "plan.json")
    return root


VERBS = {
    "rewrite": "convert rewrite --load {root} --save {out}",
    "rewrite with workers": "convert rewrite --load {root} --save {out} --workers 2",
    "export": "convert export --load {root} --hf {out}",
    "apply": "apply --load {root} --plan {root}/../plan.json --save {out}",
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_that_writes_weights_refuses_it(broken: Path, tmp_path: Path, capsys: Any, verb: str) -> None:
    words = VERBS[verb].format(root=broken, out=tmp_path / "out").split()
    place = PLACE.replace("layers.2", "layers.1") if verb == "apply" else PLACE  # the second layer is cut out
    place = place.replace(NAME, "model.layers.2.mlp.down_proj.weight") if verb == "export" else place
    assert main(words) == 2
    said = capsys.readouterr().err
    assert place in said and "--allow-non-finite" in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_it_passes_for_those_who_must_look(broken: Path, tmp_path: Path) -> None:
    words = VERBS["rewrite"].format(root=broken, out=tmp_path / "out").split()
    assert main([*words, "--allow-non-finite"]) == 0
    assert math.isnan(float(open_checkpoint(tmp_path / "out").read(NAME)[29, 7]))
    hf = VERBS["export"].format(root=broken, out=tmp_path / "hf").split()
    assert main([*hf, "--allow-non-finite"]) == 0
    back = ["convert", "import", "--hf", str(tmp_path / "hf"), "--save", str(tmp_path / "back")]
    assert main(back) == 2 and not (tmp_path / "back").exists()
    assert main([*back, "--allow-non-finite"]) == 0
