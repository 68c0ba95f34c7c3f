"""Every supported family, from transformers' own random models: tensors, configurations, logits, pruning."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_prune.checkpoint.layout import weights
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.writer import CheckpointWriter
from megatron_prune.convert.config import config_from_args
from megatron_prune.convert.families import FAMILIES, REFUSED
from megatron_prune.convert.huggingface import export_hf, import_hf
from megatron_prune.errors import CheckpointError
from megatron_prune.masks import open_masks, write_single
from megatron_prune.structured import plan
from megatron_prune.structured.apply import apply_plan
from tests.checkpoint import ranks
from tests.convert import family_models
from tests.convert.family_models import FAMILY_MODELS
from tests.masks.ranks import random_masks
from tests.tiny import VOCABULARY


@pytest.fixture(scope="session")
def family_hf(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = family_models.write(tmp_path_factory.mktemp("family") / name, name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def family_parent(tmp_path_factory, family_hf):
    made = {}

    def get(name):
        if name not in made:
            made[name] = import_hf(family_hf(name), tmp_path_factory.mktemp("imported") / name).root
        return made[name]

    return get


def tensors(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def meaning(folder):
    """A configuration as transformers reads it, without stamps and what it derives."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).to_dict()
    # transformers 5 has RoPE's entries in rope_parameters only.
    ignored = ("transformers_version", "_name_or_path", "rope_theta", "n_ctx", "partial_rotary_factor", "rotary_pct")
    return {k: v for k, v in config.items() if k not in ignored}


def test_every_family_has_a_model():
    kinds = {prefix.lower() for prefix, _ in FAMILY_MODELS.values()}
    assert {kind.replace("_", "") for kind in FAMILIES} == kinds


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_export_after_import_is_bit_identical(name, family_hf, family_parent, tmp_path):
    export_hf(family_parent(name), tmp_path / "back")
    source, back = tensors(family_hf(name)), tensors(tmp_path / "back")
    assert source.keys() == back.keys()
    for key, tensor in source.items():
        assert torch.equal(tensor.view(torch.int32), back[key].view(torch.int32)), key
    assert meaning(tmp_path / "back") == meaning(family_hf(name))


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_without_its_configuration_the_export_computes_the_same(name, family_hf, family_parent, tmp_path):
    """A checkpoint that was trained here has no ``config.json``: the family is found from Megatron's arguments."""
    config = config_from_args(open_checkpoint(family_parent(name)).args, torch.float32)
    source = tensors(family_hf(name))
    folder = tmp_path / "hf"
    export_hf(family_parent(name), folder)
    (folder / "config.json").write_text(json.dumps(config))
    if config["model_type"] == json.loads((family_hf(name) / "config.json").read_text())["model_type"]:
        tokens = torch.arange(60)[None] % VOCABULARY
        assert torch.equal(family_models.logits(folder, tokens), family_models.logits(family_hf(name), tokens))
    assert source


LAYOUTS = ((1, 1), (2, 1), (1, 2))


@pytest.mark.parametrize("name", FAMILY_MODELS)
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_logits_equal_transformers(name, tp, pp, family_hf, family_parent, distributed):
    tokens = torch.randint(VOCABULARY, (2, 100), generator=torch.Generator().manual_seed(5))
    expected = family_models.logits(family_hf(name), tokens)
    found = distributed(ranks.logits, tp * pp, str(family_parent(name)), tp, pp, tokens)[-1]
    assert expected.std() > 0.1
    assert (found[..., :VOCABULARY] - expected).abs().max() < 1e-4


def cut(parent, save):
    """Three of four layers, one head of each group, half of the FFN and hidden channels."""
    shape = parent.shape
    heads = tuple(range(0, shape.num_attention_heads, 2))
    target = dataclasses.replace(
        shape, num_layers=3, hidden_size=48, ffn_hidden_size=80, num_attention_heads=len(heads),
        num_query_groups=min(shape.num_query_groups, len(heads)),
    )  # fmt: skip
    made = plan.PruningPlan(
        method="by-hand", settings={}, seed=None, ratio=None, ratio_of="linears", source=shape, target=target,
        parent=parent.fingerprint(), kept_layers=(0, 2, 3), kept_hidden=tuple(range(1, 96, 2)), kept_heads=(heads,) * 3,
        kept_ffn=(tuple(range(0, 160, 2)),) * 3,
    )  # fmt: skip
    apply_plan(parent.root, made, save)


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_a_cut_model_computes_in_transformers_what_it_computes_in_megatron(name, family_parent, distributed, tmp_path):
    cut(open_checkpoint(family_parent(name)), tmp_path / "cut")
    export_hf(tmp_path / "cut", tmp_path / "hf")
    tokens = torch.randint(VOCABULARY, (2, 100), generator=torch.Generator().manual_seed(7))
    expected = family_models.logits(tmp_path / "hf", tokens)
    found = distributed(ranks.logits, 1, str(tmp_path / "cut"), 1, 1, tokens)[-1]
    assert expected.std() > 0.1
    assert (found[..., :VOCABULARY] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["phi3", "gpt2", "gpt-neox", "starcoder2"])  # fused, transposed, per head, no gate
def test_masks_go_to_hugging_face_and_back(name, family_parent, tmp_path):
    parent = open_checkpoint(family_parent(name))
    kept = random_masks("2:4", shape=parent.shape)
    with CheckpointWriter(
        tmp_path / "sparse", args=parent.args, dtype=torch.float32, huggingface=parent.huggingface
    ) as w:
        write_single(w.beside("masks"), parent.shape, ((weight, mask, "2:4") for weight, mask in kept.items()))
        for layout in weights(parent.shape):
            tensor = parent.read(layout.name)
            tensor = tensor * kept[layout.name] if layout.name in kept else tensor
            w.add(layout.name, tensor.shape, [tensor])
    export_hf(tmp_path / "sparse", tmp_path / "hf")
    stored = tensors(tmp_path / "hf")
    with safe_open(tmp_path / "hf" / "masks.safetensors", framework="pt") as handle:
        for key in handle.keys():  # noqa: SIM118
            packed = handle.get_tensor(key).numpy()
            mask = torch.from_numpy(numpy.unpackbits(packed, axis=1, bitorder="little")).bool()
            weight = stored[key].T if name == "gpt2" else stored[key]
            assert not weight[~mask[:, : weight.shape[1]]].any() and weight.any()
    back = import_hf(tmp_path / "hf", tmp_path / "back")
    assert open_masks(tmp_path / "back" / "masks").hash == open_masks(tmp_path / "sparse" / "masks").hash
    assert back.fingerprint() == open_checkpoint(tmp_path / "sparse").fingerprint()


@pytest.mark.parametrize("kind", REFUSED)
def test_what_megatron_cannot_express_is_refused_with_the_reason(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(CheckpointError, match="Megatron has no option for it, because") as refused:
        import_hf(tmp_path, tmp_path / "checkpoint")
    assert REFUSED[kind] in str(refused.value)


@pytest.mark.parametrize(("page", "of_type", "first"), [("docs/pages/models.md", 0, 3), ("README.md", 1, 2)])
def test_the_tables_of_models_are_of_these_families(page: str, of_type: int, first: int) -> None:
    cells = [line.split("|")[1:-1] for line in (Path(__file__).parents[2] / page).read_text().splitlines()]
    rows = [row for row in cells if len(row) == first + 6 and row[of_type].strip().strip("`") in FAMILIES]
    assert [row[of_type].strip().strip("`") for row in rows] == list(FAMILIES)
    for row, family in zip(rows, FAMILIES.values(), strict=True):
        learned = "not hidden" if family.required["normalization"] == "LayerNorm" else "yes"
        assert [cell.strip() for cell in row[first:]] == ["yes", "yes", "yes", learned, "yes", "not run"]
