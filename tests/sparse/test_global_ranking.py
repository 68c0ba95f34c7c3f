"""``sparsify --allocation global`` against a small model's scores, all of them sorted, by transformers in float64."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune import verbs
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.errors import UsageError
from megatron_prune.masks import open_masks
from megatron_prune.sparse import request as requests
from tests.reference import float64
from tests.sparse import oracle, small
from tests.sparse.test_resume import finished, kill, same, scratch_of
from tests.structured import layered

RATIO = 0.6
GLOBAL = ("--ratio", RATIO, "--allocation", "global")
SCALES = (1.0, 0.01, 2.5, 0.4)  # of the layers' linears: the second loses nearly everything
MODULES = dict(zip(("qkv", "proj", "fc1", "fc2"), oracle.INPUTS, strict=True))


@pytest.fixture(scope="module")
def folder(tiny_hf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face model whose layers have weights of different sizes."""
    import transformers

    folder = tmp_path_factory.mktemp("scaled") / "hf"
    shutil.copytree(tiny_hf("llama-gqa", layers=4), folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for block, scale in zip(model.model.layers, SCALES, strict=True):
        for paths in oracle.INPUTS:
            for path in paths.values():
                block.get_submodule(path).weight.data *= scale
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parent(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from megatron_prune.convert.huggingface import import_hf

    checkpoint = tmp_path_factory.mktemp("scaled") / "parent"
    import_hf(folder, checkpoint)
    return checkpoint


@pytest.fixture(scope="module")
def scores(folder: Path, tiny_corpus: Path) -> Callable[[str], list[torch.Tensor]]:
    """All scores of every layer of the dense model, float64."""

    @functools.cache
    def get(method: str) -> list[torch.Tensor]:
        model, windows, found = float64(folder), small.corpus_windows(tiny_corpus), []
        for block in model.model.layers:
            of_layer = []
            for paths, h in zip(oracle.INPUTS, oracle.hessians(model, block, windows), strict=True):
                norms = torch.ones(len(h)).double() if method == "magnitude" else (h.diagonal() / 2).sqrt()
                of_layer += [(block.get_submodule(path).weight.abs() * norms).flatten() for path in paths.values()]
            found.append(torch.cat(of_layer).detach())
        return found

    return get


def shares(scores: list[torch.Tensor], ratio: float = RATIO) -> tuple[list[float], list[float]]:
    """The share of each layer that is among the lowest of all; and the share that is within a hundredth of the last."""
    every = torch.cat(scores).sort().values
    last = every[int(len(every) * ratio)]
    near = [float(((layer > last * 0.99) & (layer < last * 1.01)).double().mean()) for layer in scores]
    return [float((layer < last).double().mean()) for layer in scores], near


def argv_of(parent: Path, save: Path, method: str, layout: str, corpus: Path, *more: object) -> list[Any]:
    text = None if method == "magnitude" else corpus
    return small.flags(parent, save, method, *GLOBAL, *more, *small.layout(layout), corpus=text)


@pytest.fixture(scope="module")
def pruned(
    job: Callable[..., Any], parent: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """``pruned(method, layout)``, made on first use."""
    folder = tmp_path_factory.mktemp("ranked")

    @functools.cache
    def get(method: str, layout: str) -> Path:
        save = folder / f"{method}-{layout}"
        job(argv_of(parent, save, method, layout, tiny_corpus), nproc=small.LAYOUTS[layout][0]).ok()
        return save

    return get


QUICK = (("magnitude", "tp1"), ("wanda", "tp1"), ("wanda", "tp2pp2"), ("sparsegpt", "dp2"))
CASES = [
    pytest.param(method, layout, marks=() if (method, layout) in QUICK else pytest.mark.slow)
    for method in ("magnitude", "wanda", "sparsegpt")
    for layout in small.LAYOUTS
]


@pytest.mark.parametrize(("method", "layout"), CASES)
def test_every_layer_loses_what_is_among_the_lowest_of_all(
    pruned: Callable[[str, str], Path], scores: Callable[[str], list[torch.Tensor]], method: str, layout: str
) -> None:
    save = pruned(method, layout)
    found, table = small.result(save), json.loads((save / "pruning" / "sparsity.json").read_text())
    expected, near = shares(scores(method))
    assert min(expected) < 0.25 and max(expected) > 0.95 and max(near) < 0.02
    for module, paths in MODULES.items():
        (inputs,) = {found[0, name][1].shape[1] for name in paths}
        removed = []
        for layer, (share, more) in enumerate(zip(expected, near, strict=True)):
            count = round(table["layer_ratios"][layer]["ratios"][module] * inputs)
            limit = inputs * min(share, 1 - 1 / 96)  # hidden channels, the fewest inputs of a linear
            assert abs(count - limit) < 1 + inputs * more
            removed.append(count)
            for name in paths:
                kept = found[layer, name][1]
                assert int((~kept).sum()) == count * len(kept)
                if method == "wanda":
                    assert set((~kept).sum(1).tolist()) == {count}
        assert sum(removed) == int(4 * inputs * RATIO)
    (entry,) = open_checkpoint(save).pruning
    assert entry["settings"]["allocation"] == table["allocation"] == {"name": "global"}
    assert entry["ratio"] == RATIO and 0 <= RATIO - entry["removed_linears"] < 1 / (4 * 96)
    shape = open_checkpoint(save).shape
    block = shape.layer_flops(0, small.LENGTH)
    if method == "magnitude":
        assert entry["tokens"] == entry["flops"] == 0 and entry["calibration"] is None
    elif method == "wanda":  # a pass that counts, one that prunes; a pruned block runs again for those after it
        assert entry["flops"] == (4 + 4 + 3) * small.SEQUENCES * block


def test_layouts_agree(
    pruned: Callable[[str, str], Path], parent: Path, tiny_corpus: Path, tmp_path: Path, job
) -> None:
    """Wanda's ratios at any layout; with magnitudes, which ranks share out, every bit. ``prune`` does the same."""
    one, other = (
        json.loads((pruned("wanda", layout) / "pruning" / "sparsity.json").read_text()) for layout in ("tp1", "tp2pp2")
    )
    assert one["layer_ratios"] == other["layer_ratios"]
    argv = argv_of(parent, tmp_path / "shared", "magnitude", "tp2pp2", tiny_corpus, "--pattern", "unstructured")
    job(["prune", *argv[1:]], nproc=4).ok()
    assert same(tmp_path / "shared", pruned("magnitude", "tp1"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("layout", [layout for layout in small.LAYOUTS if layout != "tp1"])
def test_all_layouts_agree(pruned: Callable[[str, str], Path], method: str, layout: str) -> None:
    one, other = (
        json.loads((pruned(method, name) / "pruning" / "sparsity.json").read_text()) for name in ("tp1", layout)
    )
    assert one["layer_ratios"] == other["layer_ratios"]
    if method == "magnitude":
        assert same(pruned(method, "tp1"), pruned(method, layout))


def test_a_floor_for_every_layer(
    job: Callable[..., Any],
    parent: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    scores: Callable[[str], list[torch.Tensor]],
) -> None:
    """What the second and the last layer keep, the others lose: their threshold is that of a larger ratio."""
    job(argv_of(parent, tmp_path / "save", "magnitude", "tp1", tiny_corpus, "--least-kept", "0.2")).ok()
    table = json.loads((tmp_path / "save" / "pruning" / "sparsity.json").read_text())
    assert table["allocation"] == {"name": "global", "least_kept": 0.2}
    ratios = [row["ratios"]["fc1"] for row in table["layer_ratios"]]
    assert ratios[1] == ratios[3] == 76 / 96  # 20 inputs stay: 19.2 are 0.2
    of_others = (4 * RATIO - 2 * 76 / 96) / 2
    expected, near = shares([scores("magnitude")[number] for number in (0, 2)], of_others)
    for found, share, more in zip((ratios[0], ratios[2]), expected, near, strict=True):
        assert abs(found - share) < 1 / 96 + more and found < 76 / 96


@pytest.mark.parametrize(
    ("method", "layout", "where"),
    [
        ("magnitude", "dp2", "block 2"),
        ("wanda", "tp2pp2", "block 2"),
        ("wanda", "tp2pp2", "counts 2"),
        pytest.param("magnitude", "dp2", "counts 2", marks=pytest.mark.slow),
    ],
)
def test_killed_and_given_again(
    pruned: Callable[[str, str], Path], parent: Path, tiny_corpus: Path, tmp_path: Path, job: Callable[..., Any],
    scores: Callable[[str], list[torch.Tensor]], method: str, layout: str, where: str,
) -> None:  # fmt: skip
    """Scores are counted once, if all were; half a count of a model's inputs is discarded."""
    save, nproc = tmp_path / "killed", small.LAYOUTS[layout][0]
    argv = argv_of(parent, save, method, layout, tiny_corpus)
    kill(tmp_path / "kill", argv, nproc, where)
    held = [scratch_of(save) / f"counts-{layer:04d}.json" for layer in range(4)]
    if where == "block 2":
        for path, layer in zip(held, scores(method), strict=True):
            counts = torch.zeros(1 << 15, dtype=torch.int64)
            for number, count in json.loads(path.read_text())["scores"]:
                counts[number] = count
            expected = torch.bincount(layer.float().view(torch.int32) >> 16, minlength=1 << 15)
            assert counts.sum() == len(layer) and (counts - expected).abs().sum() < len(layer) / 1000
    assert held[2].exists() == (where == "block 2")
    assert len(finished(save)) < 4
    printed = job(argv, nproc=nproc).ok().output
    assert (" scores" in printed) == (where == "counts 2")
    assert same(save, pruned(method, layout))


def test_zeros_of_the_parents_masks_are_the_lowest(job: Callable[..., Any], parent: Path, tmp_path: Path) -> None:
    """Where each layer has as many zeros as all lose together, these are what goes: the masks stay."""
    half = ("--ratio", 0.5)
    job(small.flags(parent, tmp_path / "half", "magnitude", *half)).ok()
    job(small.flags(tmp_path / "half", tmp_path / "again", "magnitude", *half, "--allocation", "global")).ok()
    assert open_masks(tmp_path / "half" / "masks").hash == open_masks(tmp_path / "again" / "masks").hash


def test_layers_that_differ_lose_together_what_was_asked_for(
    job: Callable[..., Any], parent: Path, tmp_path: Path
) -> None:
    """One layer has no attention, one no MLP; and only some linears and layers are ranked."""
    layered.cut(parent, tmp_path / "cut")
    job(small.flags(tmp_path / "cut", tmp_path / "save", "magnitude", *GLOBAL, "--modules", "qkv,fc2")).ok()
    cut, masks = open_checkpoint(tmp_path / "cut"), open_masks(tmp_path / "save" / "masks")
    weights: dict[int, list[torch.Tensor]] = {}
    for name in masks.entries:
        weights.setdefault(int(name.split(".")[2]), []).append(cut.read(name).double().abs().flatten())
    layers = [torch.cat(weights[layer]) for layer in sorted(weights)]
    expected, near = shares(layers)
    table = json.loads((tmp_path / "save" / "pruning" / "sparsity.json").read_text())
    for row, share, more in zip(table["layer_ratios"], expected, near, strict=True):
        for matrix in (one for one in table["matrices"] if one["layer"] == row["layer"]):
            gone = matrix["removed"] / matrix["rows"]
            assert gone <= matrix["inputs"] - 1
            if share < 0.9:
                assert abs(gone - share * matrix["inputs"]) < 1 + matrix["inputs"] * (more + 0.02)
    total, removed = sum(map(len, layers)), sum(matrix["removed"] for matrix in table["matrices"])
    assert 0 <= RATIO * total - removed < 3 * 96 + 3 * 48 and len(table["layer_ratios"]) == 4


def test_broken_weights_are_named(job: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    import transformers

    from megatron_prune.convert.huggingface import import_hf

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[2].mlp.down_proj.weight.data[3, 5] = -torch.inf
    shutil.copytree(folder, tmp_path / "hf")
    model.save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "parent", allow_non_finite=True)
    refused = job(small.flags(tmp_path / "parent", tmp_path / "save", "magnitude", *GLOBAL, "--allow-non-finite"))
    assert refused.returncode and "layer 2: weights or the inputs they see are not finite" in refused.output


def asked(method: str = "wanda", **settings: Any) -> requests.SparsifyRequest:
    return requests.choose(method, verbs.SparsitySettings.read({"allocation": "global", **settings}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "random", "ratio": 0.5}, "--allocation: expected owl or uniform with --method random, got global"),
        ({"pattern": "2:4"}, "--allocation: expected uniform with an N:M --pattern, got global"),
        ({"ratio": 0.5, "owl_bound": 0.1}, "--owl-bound: expected --allocation owl with it, got --allocation global"),
        ({"ratio": 0.5, "owl_threshold": 5}, "--owl-threshold: expected --allocation owl with it"),
        ({"ratio": 0.5, "search_generations": 9}, "--search-generations: expected --allocation search with it"),
        ({"ratio": 0.5, "module_ratio": "fc2=0.3"}, "--module-ratio: expected another --allocation with it"),
        ({"ratio": 0.5, "least_kept": 0.6}, r"--least-kept: expected at most 0\.5, got 0\.6"),
        ({"ratio": 0.5, "least_kept": 0.2, "allocation": "owl"}, "--least-kept: expected --allocation global with it"),
    ],
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        asked(**settings)


def test_every_row_keeps_an_input(tiny_parent: Path) -> None:
    shape = open_checkpoint(tiny_parent).shape
    asked(ratio=0.989).check(shape)
    with pytest.raises(
        UsageError, match=r"--ratio: expected at most 0\.9895 .*, got 0\.99 .* at least one input of a row"
    ):
        asked(ratio=0.99).check(shape)
    assert not asked("magnitude", ratio=0.5).reads_text and asked("wanda", ratio=0.5).reads_text
    assert asked(ratio=0.5).most(shape, asked(ratio=0.5).allocation) == [Fraction(95, 96)] * 4  # type: ignore[arg-type]
