"""``learn-masks`` on every family: what is cut computes what the masked model did, or a refusal says why not."""

from __future__ import annotations

import pytest
import torch

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.convert.huggingface import import_hf
from megatron_prune.training import learned_file
from tests.checkpoint import ranks
from tests.convert import family_models
from tests.tiny import VOCABULARY
from tests.training.small import recipe

STEPS, BATCH = 10, 8
LAYER_NORM = {"nemotron", "starcoder2", "gpt2", "gpt-neox", "pythia"}
# In every run: LayerNorm, biases, no gate, tied embeddings and learned positions.
QUICK = {"gpt2"}
FAMILIES = [
    pytest.param(name, id=name, marks=[] if name in QUICK else pytest.mark.slow) for name in family_models.FAMILY_MODELS
]


def target_flags(shape, *, hidden):
    """Every kind of unit has less in the target: also heads in a group, where groups share heads."""
    groups = shape.num_query_groups // 2
    sizes = {"num-layers": 3, "num-query-groups": groups, "num-attention-heads": groups, "ffn-hidden-size": 80}
    sizes |= {"hidden-size": 64} if hidden else {}
    return [str(word) for key, size in sizes.items() for word in (f"--target-{key}", size)] + ["--divisible-by", "1"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_cut_model_computes_what_the_masked_one_did(name, tiny_corpus, tmp_path, job, distributed):
    parent = import_hf(family_models.write(tmp_path / "hf", name), tmp_path / "parent")
    flags = target_flags(parent.shape, hidden=name not in LAYER_NORM)
    save, plan, cut = tmp_path / "run", tmp_path / "plan.json", tmp_path / "cut"
    training = ["--pretrained-checkpoint", parent.root, *recipe(tiny_corpus, f"0:{STEPS * BATCH}", save)]
    job(["learn-masks", *training, *flags]).ok()
    file = save / learned_file.FILE
    job(["plan", "--method", "sheared-llama", "--load", save, "--statistics", file, "--output", plan, *flags]).ok()
    job(["apply", "--load", save, "--plan", plan, "--save", cut]).ok()
    learned = learned_file.read(file)
    assert open_checkpoint(cut).shape == learned.target
    expected = {"layer", "group", "ffn"} | ({"hidden"} if name not in LAYER_NORM else set())
    assert set(learned.state.log_alpha) >= expected
    tokens = torch.randint(VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(5))
    without, masked, made = (
        distributed(function, 1, str(model), 1, 1, tokens)[-1][..., :VOCABULARY]
        for function, model in ((ranks.logits, save), (ranks.masked_logits, save), (ranks.logits, cut))
    )
    assert (without - masked).abs().max() > 0.1
    assert (made - masked).abs().max() < 1e-4


@pytest.mark.parametrize("name", sorted(LAYER_NORM))
def test_a_layer_norm_is_not_narrowed(name, tiny_corpus, tmp_path, job):
    """Its mean counts every channel, also those whose factor is 0."""
    parent = import_hf(family_models.write(tmp_path / "hf", name), tmp_path / "parent")
    training = ["--pretrained-checkpoint", parent.root, *recipe(tiny_corpus, f"0:{BATCH}", tmp_path / "run")]
    refused = job(["learn-masks", *training, *target_flags(parent.shape, hidden=True)])
    assert refused.returncode == 2 and "--target-hidden-size" in refused.output and "LayerNorm" in refused.output
    assert not (tmp_path / "run").exists()
