"""Every method on every family: pruned, retrained, exported; transformers computes what Megatron does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.convert.config import kind_of, why_unexportable
from megatron_prune.convert.huggingface import export_hf, import_hf
from megatron_prune.errors import CheckpointError
from tests import reference
from tests.convert import family_models
from tests.convert.family_models import FAMILY_MODELS

S, WINDOWS = 32, 4
RECIPE = "--train-iters 2 --global-batch-size 2 --micro-batch-size 1 --lr 1e-2 --seq-length 64".split()
SPARSE = {
    "magnitude": ["--method", "magnitude", "--ratio", "0.5"],
    "wanda": ["--method", "wanda", "--pattern", "2:4"],
    "sparsegpt": ["--method", "sparsegpt", "--ratio", "0.5"],
}


def structured(shape: ModelShape) -> dict[str, list[str]]:
    """Heads still divide the hidden size and have no size of their own there, so that every family can state them."""
    heads = ["--target-num-attention-heads", str(shape.num_attention_heads // 2)]
    width = ["--target-hidden-size", "48", "--target-ffn-hidden-size", "80", "--divisible-by", "2", *heads]
    groups = ["--target-num-query-groups", str(shape.num_query_groups // 2)]
    channels = ["--target-ffn-hidden-size", "80", "--divisible-by", "2", *groups]
    return {
        "flap": ["--method", "flap", *channels],
        "wanda-sp": ["--method", "wanda-sp", *channels],
        "depth": ["--method", "shortgpt", "--target-num-layers", "2"],
        "width": ["--method", "minitron-width", *width],
        "random": ["--method", "random", "--target-num-layers", "3"],
    }


# In every run the family that has most of what Llama lacks: no gate, biases, LayerNorm, learned positions.
CASES = [
    pytest.param("gpt2", ("width", "wanda"), id="gpt2-in-short"),
    *(pytest.param(name, None, id=name, marks=pytest.mark.slow) for name in FAMILY_MODELS),
]


@pytest.mark.parametrize(("name", "some"), CASES)
def test_pruned_retrained_and_exported_it_computes_the_same(name, some, job, tiny_corpus, tmp_path):
    parent = import_hf(family_models.write(tmp_path / "hf", name), tmp_path / "parent")
    load, statistics = ["--load", parent.root], tmp_path / "statistics.safetensors"
    text = ["--calibration-data-path", tiny_corpus, "--calibration-sequences", "4", "--calibration-seq-length", "64"]
    job(["calibrate", *load, *text, "--output", statistics]).ok()
    methods = {**structured(parent.shape), **SPARSE}
    for method in some or methods:
        save = ["--save", tmp_path / method]
        if method in SPARSE:
            job(["sparsify", *load, *methods[method], *([] if method == "magnitude" else text), *save]).ok()
            continue
        own = [] if method == "random" else ["--statistics", statistics]
        job(["plan", *load, *own, *methods[method], "--output", tmp_path / f"{method}.json"]).ok()
        job(["apply", *load, "--plan", tmp_path / f"{method}.json", *save]).ok()
    for method, masks in {"width": [], "wanda": ["--masks", tmp_path / "wanda" / "masks"]}.items():
        start = ["pretrain", "--pretrained-checkpoint", tmp_path / method, *masks, *RECIPE]
        job(
            [*start, "--data-path", tiny_corpus, "--stream-range", "0:4", "--save", tmp_path / f"{method}-trained"]
        ).ok()
    losses = {}
    for model in (*(some or methods), "width-trained", "wanda-trained"):
        if model in ("flap", "wanda-sp") and (why := unexportable(tmp_path / model)):
            with pytest.raises(CheckpointError) as refused:
                export_hf(tmp_path / model, tmp_path / "exported" / model)
            assert str(refused.value).startswith(why)
            continue
        expected = exported_losses(tmp_path, model, tiny_corpus)
        scores = tmp_path / f"{model}.json"
        data = ["--data-path", tiny_corpus, "--labels", "text", "--seq-length", S, "--windows", WINDOWS]
        job(["evaluate", "--load", tmp_path / model, *data, "--output", scores]).ok()
        found = json.loads(scores.read_text())["corpora"]["text"]["window_losses"]
        np.testing.assert_allclose(found, expected, rtol=2e-5, err_msg=model)
        losses[model] = float(np.mean(expected))
    assert len({round(loss, 5) for loss in losses.values()}) == len(losses), losses  # each is another model


def unexportable(checkpoint: Path) -> str | None:
    """Why no family has the model: its biases, or heads that have a size of their own."""
    found = open_checkpoint(checkpoint)
    return why_unexportable(found.args, kind_of(found))


def exported_losses(folder: Path, model: str, corpus: Path) -> Any:
    export_hf(folder / model, folder / "exported" / model)
    exported = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "exported" / model, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    return reference.window_losses(exported, corpus, S, WINDOWS)
