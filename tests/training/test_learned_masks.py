"""``learn-masks``: against the published algorithm in one float64 process, at other layouts, and cut by ``apply``."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.convert.huggingface import import_hf
from megatron_prune.methods import sheared_llama
from megatron_prune.training import learned_file
from megatron_prune.training.mask_shards import MaskShards
from tests.checkpoint import ranks
from tests.training import sheared
from tests.training.small import layout, recipe, train_and_record

STEPS, BATCH = 10, 8
ALL_KINDS = {
    "target-num-layers": 3, "target-hidden-size": 64, "target-num-attention-heads": 4, "target-num-query-groups": 4,
    "target-ffn-hidden-size": 96, "divisible-by": 4,
}  # fmt: skip


def words(parent, corpus, save, *more, target=ALL_KINDS, steps=STEPS):
    target_flags = [word for name, size in target.items() for word in (f"--{name}", size)]
    return [
        "--use-checkpoint-args", "--pretrained-checkpoint", parent, *recipe(corpus, f"0:{steps * BATCH}", save),
        "--adam-beta2", "0.95", *target_flags, *more,
    ]  # fmt: skip


def losses(save: Path) -> list[float]:
    with open(save / "losses.csv") as table:
        return [float(row["loss"]) for row in csv.DictReader(table)]


@pytest.fixture(scope="module")
def learned(tmp_path_factory, tiny_parent, tiny_corpus, job):
    """A run of ten steps in one process, with masks of all kinds."""
    save = tmp_path_factory.mktemp("learned") / "run"
    job(["learn-masks", *words(tiny_parent, tiny_corpus, save, "--save-interval", "5")]).ok()
    return save


def differences(one: Path, other: Path) -> dict[str, float]:
    """The largest difference of log α, by kind."""
    a, b = (learned_file.read(save / learned_file.FILE).state.log_alpha for save in (one, other))
    return {kind: float((a[kind] - b[kind]).abs().max()) for kind in a}


@pytest.mark.parametrize("multiplier_lr", [None, 3.0])
def test_a_run_is_the_published_algorithms(multiplier_lr, learned, tiny_parent, tiny_corpus, tmp_path, distributed):
    """Losses, masks and multipliers of ten steps, with layers, groups, heads, FFN and hidden channels all masked."""
    again, log = tmp_path / "again", tmp_path / "log"
    log.mkdir()
    more = ["--multiplier-lr", multiplier_lr] if multiplier_lr else []
    argv = [str(word) for word in words(tiny_parent, tiny_corpus, again, *more)]
    distributed(train_and_record, 1, argv, str(log), verb="learn-masks")
    file = learned_file.read(again / learned_file.FILE)
    if multiplier_lr is None:
        assert losses(again) == losses(learned)  # the record is of the same run
    model = sheared.Model(tiny_parent)
    source, target = file.state.source, file.state.target
    cut = sheared_llama.kinds(source, target)
    shards = MaskShards(cut, range(source.num_layers))

    def uniform(step, number):
        found = shards.uniform(7, step, number)
        return {kind.name: found[kind.name].view(kind.shape) for kind in cut}

    lines = [json.loads(line) for file in log.glob("*.jsonl") for line in file.read_text().splitlines()]
    batches = [[] for _ in range(STEPS)]
    for line in lines:
        batches[line["step"] - 1].append((torch.tensor(line["tokens"]), torch.tensor(line["labels"])))
    rates = [sheared.cosine(step, STEPS, 0.1 * STEPS, 1e-2, 1e-3) for step in range(STEPS)]
    masks, multipliers, expected = sheared.learn(
        model, sheared.kinds(source, target), batches, uniform,
        [(rate, rate / 1e-2, (multiplier_lr or 1) * rate / 1e-2) for rate in rates], 2,
        {"betas": (0.9, 0.95), "eps": 1e-8}, 0.1, 1.0,
    )  # fmt: skip
    assert losses(again) == pytest.approx(expected, rel=1e-5)
    for kind, values in file.state.log_alpha.items():
        torch.testing.assert_close(values.double(), masks[kind], rtol=0, atol=2e-3)
        torch.testing.assert_close(file.state.multipliers[kind].double(), multipliers[kind], rtol=1e-3, atol=1e-4)
    assert len({round(float(v), 3) for v in file.state.log_alpha["ffn"].flatten()}) > 100  # they have moved apart


@pytest.mark.parametrize(("tp", "pp", "dp"), [(3, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1)])
def test_every_layout_learns_the_same_masks(tp, pp, dp, learned, tiny_parent, tiny_corpus, tmp_path, job):
    save = tmp_path / "run"
    job(["learn-masks", *words(tiny_parent, tiny_corpus, save, *layout(tp, pp))], nproc=tp * pp * dp).ok()
    assert losses(save) == pytest.approx(losses(learned), rel=2e-5)
    assert max(differences(learned, save).values()) < 1e-3


def test_a_run_that_stopped_goes_on_at_another_layout(learned, tiny_parent, tiny_corpus, tmp_path, job):
    save = tmp_path / "run"
    argv = words(tiny_parent, tiny_corpus, save, "--save-interval", "5")
    job(["learn-masks", *argv, "--exit-interval", "5"]).ok()
    assert not (save / learned_file.FILE).exists()
    job(["learn-masks", *argv, *layout(2, 1)], nproc=2).ok()
    assert losses(save) == pytest.approx(losses(learned), rel=2e-5)
    assert max(differences(learned, save).values()) < 1e-3
    assert learned_file.read(save / learned_file.FILE).state.history.shape == (STEPS, 5, 4)


def test_a_run_that_was_killed_after_its_last_save_is_finished(learned, tiny_parent, tiny_corpus, tmp_path, job):
    save = tmp_path / "run"
    shutil.copytree(learned, save)
    (save / learned_file.FILE).unlink()
    (save / learned_file.FILE).with_suffix(".json").unlink()
    argv = words(tiny_parent, tiny_corpus, save, "--save-interval", "5")
    assert "nothing to do" in job(["learn-masks", *argv]).ok().output
    assert learned_file.read(save / learned_file.FILE).hash == learned_file.read(learned / learned_file.FILE).hash


def test_a_run_does_not_go_on_with_other_masks(learned, tiny_parent, tiny_corpus, tmp_path, job):
    save = tmp_path / "run"
    argv = words(tiny_parent, tiny_corpus, save, "--save-interval", "5")
    job(["learn-masks", *argv, "--exit-interval", "5"]).ok()
    for more, says in (
        (["--mask-lr", "0.5"], "expected masks with learning_rate 0.5, got masks with learning_rate 1.0"),
        (["--target-ffn-hidden-size", "128"], "expected masks with target"),
    ):
        refused = job(["learn-masks", *argv, *more])
        assert refused.returncode == 2 and says in refused.output, refused.output[-2000:]
    state = learned_file.at_step(save, 5)
    state.rename(state.with_suffix(".away"))
    refused = job(["learn-masks", *argv])
    assert refused.returncode == 2 and f"{state} is missing" in refused.output


def test_activations_that_are_recomputed_see_the_same_masks(learned, tiny_parent, tiny_corpus, tmp_path, job):
    save = tmp_path / "run"
    recompute = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    job(["learn-masks", *words(tiny_parent, tiny_corpus, save, *recompute, *layout(1, 2))], nproc=2).ok()
    assert losses(save) == pytest.approx(losses(learned), rel=2e-5)
    assert max(differences(learned, save).values()) < 1e-3


def test_masks_stay_fp32_beside_a_bf16_model(learned, tiny_parent, tiny_corpus, tmp_path, job):
    """With the distributed optimizer, everything overlapped, and accumulation."""
    save = tmp_path / "run"
    more = ["--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    argv = words(tiny_parent, tiny_corpus, save, *more)
    job(["learn-masks", *argv], nproc=2).ok()
    state = learned_file.read(save / learned_file.FILE).state
    assert {values.dtype for values in state.log_alpha.values()} == {torch.float32}
    assert losses(save) == pytest.approx(losses(learned), rel=0.02)
    ours, theirs = (learned_file.read(s / learned_file.FILE).state.history for s in (save, learned))
    torch.testing.assert_close(ours[:, :, 0], theirs[:, :, 0], rtol=0, atol=0.05)


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mha-tied"])
def test_the_applied_model_computes_what_the_masked_one_did(
    name, learned, tiny_hf, tiny_parent, tiny_corpus, tmp_path, job, distributed
):
    """Logits of the plan's model at two layouts, against the oracle's masked model and Megatron's."""
    save, target = learned, ALL_KINDS
    if name != "llama-gqa":
        parent, save = tmp_path / "parent", tmp_path / "run"
        import_hf(tiny_hf(name, layers=4), parent)
        target = {"target-num-layers": 3, "target-hidden-size": 80, "target-num-attention-heads": 8,
                  "target-num-query-groups": 8, "target-ffn-hidden-size": 128, "divisible-by": 4}  # fmt: skip
        job(["learn-masks", *words(parent, tiny_corpus, save, target=target)]).ok()
    flags = [word for key, size in target.items() for word in (f"--{key}", size)]
    plan, cut = tmp_path / "plan.json", tmp_path / "cut"
    found = job(["plan", "--method", "sheared-llama", "--load", save, "--statistics", save / learned_file.FILE,
                 "--output", plan, *flags]).ok()  # fmt: skip
    assert "not settled: " in found.output  # after ten steps
    job(["apply", "--load", save, "--plan", plan, "--save", cut]).ok()
    file = learned_file.read(save / learned_file.FILE)
    assert open_checkpoint(cut).shape == file.target

    tokens = torch.randint(379, (2, 60), generator=torch.Generator().manual_seed(5))
    z = {}
    for kind, (_, sparsity) in sheared.kinds(file.shape, file.target).items():
        log_alpha = file.state.log_alpha[kind].double()
        stays = round(log_alpha.shape[-1] * (1 - sparsity))
        soft = torch.sigmoid(0.8 * log_alpha * 1.5)
        rank = soft.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        z[kind] = torch.where(rank < stays, soft, 0)
    with torch.no_grad():
        expected = sheared.Model(save).logits(tokens, z)
        without = sheared.Model(save).logits(tokens, {})
    assert (without - expected).abs().max() > 0.1
    logits = distributed(ranks.logits, 2, str(cut), 2, 1, tokens)[-1]
    assert (logits[..., :379] - expected).abs().max() < 1e-4
    masked = distributed(ranks.masked_logits, 4, str(save), 2, 2, tokens)[-1]
    assert (masked[..., :379] - expected).abs().max() < 1e-4


def test_expected_sizes_reach_their_target(tiny_parent, tiny_corpus, tmp_path, job):
    """Within a hundredth, after 160 steps; the masks then remove the target."""
    save, target = tmp_path / "run", {"target-hidden-size": 64, "target-ffn-hidden-size": 96, "divisible-by": 4}
    job(["learn-masks", *words(tiny_parent, tiny_corpus, save, target=target, steps=160)]).ok()
    state = learned_file.read(save / learned_file.FILE).state
    for number, (kind, (_, wanted)) in enumerate(sheared.kinds(state.source, state.target).items()):
        assert float(sheared.removed(state.log_alpha[kind]).mean()) == pytest.approx(wanted, abs=0.01)
        ramp = state.history[:, number, 1]
        assert (
            ramp[0] == 0 and float(ramp[16]) == pytest.approx(wanted / 2) and float(ramp[-1]) == pytest.approx(wanted)
        )


def test_the_mask_phase_is_the_prunings_own(learned, tiny_parent, tmp_path, job):
    """Its tokens, FLOPs and samples are in the pruning's entry, which starts from the parent."""
    plan, cut = tmp_path / "plan.json", tmp_path / "cut"
    flags = [word for key, size in ALL_KINDS.items() for word in (f"--{key}", size)]
    job(["plan", "--method", "sheared-llama", "--load", learned, "--statistics", learned / learned_file.FILE,
         "--output", plan, *flags]).ok()  # fmt: skip
    job(["apply", "--load", learned, "--plan", plan, "--save", cut]).ok()
    (entry,) = open_checkpoint(cut).pruning
    source = open_checkpoint(tiny_parent)
    assert entry["parent"]["fingerprint"] == source.fingerprint()
    assert entry["tokens"] == STEPS * BATCH * 32
    assert entry["flops"] == STEPS * BATCH * source.shape.training_flops(32)
    assert entry["learned"]["range"] == [0, STEPS * BATCH] and entry["lineage"] == []
    other = [word for key, size in (ALL_KINDS | {"target-ffn-hidden-size": 128}).items() for word in (f"--{key}", size)]
    refused = job(["plan", "--method", "sheared-llama", "--load", learned, "--statistics",
                   learned / learned_file.FILE, "--output", plan, *other])  # fmt: skip
    assert refused.returncode == 2 and "masks that were learned for" in refused.output


def test_retraining_does_not_see_the_samples_of_the_mask_phase_again(learned, tiny_corpus, tmp_path, job):
    plan, cut = tmp_path / "plan.json", tmp_path / "cut"
    flags = [word for key, size in ALL_KINDS.items() for word in (f"--{key}", size)]
    job(["plan", "--method", "sheared-llama", "--load", learned, "--statistics", learned / learned_file.FILE,
         "--output", plan, *flags]).ok()  # fmt: skip
    job(["apply", "--load", learned, "--plan", plan, "--save", cut]).ok()
    again = ["pretrain", "--use-checkpoint-args", "--pretrained-checkpoint", cut]
    refused = job([*again, *recipe(tiny_corpus, "72:88", tmp_path / "retrained")])
    assert refused.returncode == 2 and "72" in refused.output, refused.output[-2000:]
    job([*again, *recipe(tiny_corpus, "80:96", tmp_path / "retrained")]).ok()
