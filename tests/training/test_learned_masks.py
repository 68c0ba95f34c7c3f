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
from tests.checkpoint import ranks
from tests.training import sheared
from tests.training.small import layout, recipe, train_and_record

STEPS, BATCH = 10, 8
ALL_KINDS = {
    "target-num-layers": 3, "target-hidden-size": 64, "target-num-attention-heads": 4, "target-num-query-groups": 4,
    "target-ffn-hidden-size": 96, "divisible-by": 4,
}  # fmt: skip
OF_MHA = {
    "target-num-layers": 3, "target-hidden-size": 80, "target-num-attention-heads": 8, "target-num-query-groups": 8,
    "target-ffn-hidden-size": 128, "divisible-by": 4,
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


def assert_same_units(one, other, state):
    """Each row keeps the same units in both, but for those that are listed as near-ties."""
    rows = differing = 0
    for kind in sheared_llama.kinds(state.source, state.target):
        for ours, theirs in zip(one[kind.name].view(-1, kind.size), other[kind.name].view(-1, kind.size), strict=True):
            kept, near = sheared_llama.keep(ours.double(), kind)
            also, _ = sheared_llama.keep(theirs.double(), kind)
            listed = {unit for tie in near for unit in (tie.kept, tie.removed, *tie.others)}
            assert set(kept) ^ set(also) <= listed, kind
            rows, differing = rows + 1, differing + bool(near)
    assert differing < rows / 4, "most rows have to be decided"


def publisheds(parent, record, file, steps, rate, multiplier_rate=1.0):
    """Trajectories of the published algorithm on the weights of ``parent`` and what a run recorded of its data."""
    kinds = sheared.kinds(file.state.source, file.state.target)
    lines = [json.loads(line) for file in record.glob("*.jsonl") for line in file.read_text().splitlines()]
    batches = [[] for _ in range(steps)]
    for line in lines:
        batches[line["step"] - 1].append((torch.tensor(line["tokens"]), torch.tensor(line["labels"])))
    rates = [sheared.cosine(step, steps, 0.1 * steps, rate, rate / 10) for step in range(steps)]
    return sheared.learn(
        sheared.Model(parent), kinds, batches, sheared.noise(7, {kind: shape for kind, (shape, _) in kinds.items()}),
        [(each, each / rate, multiplier_rate * each / rate) for each in rates], round(0.2 * steps),
        {"betas": (0.9, 0.95), "eps": 1e-8}, 0.1, 1.0,
    )  # fmt: skip


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
    masks, multipliers, expected = publisheds(tiny_parent, log, file, STEPS, 1e-2, multiplier_lr or 1.0)
    assert losses(again) == pytest.approx(expected, rel=1e-5)
    for kind, values in file.state.log_alpha.items():
        torch.testing.assert_close(values.double(), masks[-1][kind], rtol=0, atol=2e-3)
        torch.testing.assert_close(file.state.multipliers[kind].double(), multipliers[-1][kind], rtol=1e-3, atol=1e-4)
    assert len({round(float(v), 3) for v in file.state.log_alpha["ffn"].flatten()}) > 100  # they have moved apart


@pytest.mark.slow
def test_a_whole_run_on_multi_head_attention_is_the_published_algorithms(tiny_hf, tiny_corpus, tmp_path, distributed):
    """Forty steps on the attention that the paper knows: the whole way of losses, expected sizes and multipliers, log α
    at four saves, and the masks at the end."""
    parent, save, log, steps = tmp_path / "parent", tmp_path / "run", tmp_path / "log", 40
    log.mkdir()
    import_hf(tiny_hf("llama-mha-tied", layers=4), parent)
    argv = words(
        parent, tiny_corpus, save, "--save-interval", 10, "--lr", 1e-3, "--min-lr", 1e-4, target=OF_MHA, steps=steps
    )
    distributed(train_and_record, 1, [str(word) for word in argv], str(log), verb="learn-masks")
    file = learned_file.read(save / learned_file.FILE)
    assert file.state.source.heads_per_group == 1 and set(file.state.log_alpha) == {"layer", "group", "ffn", "hidden"}
    masks, multipliers, expected = publisheds(parent, log, file, steps, 1e-3)
    assert losses(save) == pytest.approx(expected, rel=2e-5)
    for step in range(1, steps):  # what stood before each step is what the one before it left
        for number, kind in enumerate(multipliers[0]):
            size, _, *lambdas = file.state.history[step, number].tolist()
            assert size == pytest.approx(float(sheared.removed(masks[step - 1][kind]).mean()), abs=1e-4)
            assert lambdas == pytest.approx(multipliers[step - 1][kind].tolist(), rel=1e-3, abs=1e-3)
    for step in (10, 20, 30, 40):
        state = learned_file.read_state(learned_file.at_step(save, step))
        for kind, values in state.log_alpha.items():
            torch.testing.assert_close(values.double(), masks[step - 1][kind], rtol=0, atol=2e-2)
    for kind in sheared_llama.kinds(file.state.source, file.state.target):
        theirs = masks[-1][kind.name].view(-1, kind.size)
        for ours, row in zip(file.state.log_alpha[kind.name].view(-1, kind.size), theirs, strict=True):
            kept, cut = set(sheared_llama.keep(ours, kind)[0]), float(row.sort(descending=True).values[kind.kept - 1])
            surely = {unit for unit, value in enumerate(row.tolist()) if value > cut + 4e-2}
            perhaps = {unit for unit, value in enumerate(row.tolist()) if value > cut - 4e-2}
            assert surely <= kept <= perhaps and len(kept) == kind.kept


OVERLAPPED = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
VIRTUAL = ["--num-layers-per-virtual-pipeline-stage", "1"]


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "more"),
    [
        pytest.param(3, 1, 1, [], id="TP 3", marks=pytest.mark.slow),
        pytest.param(1, 2, 1, [], id="PP 2", marks=pytest.mark.slow),
        pytest.param(1, 1, 2, OVERLAPPED, id="DP 2 overlapped"),
        pytest.param(2, 2, 1, [], id="TP 2 x PP 2"),
        pytest.param(1, 2, 1, VIRTUAL, id="PP 2 x 2 virtual stages"),
    ],
)
def test_every_layout_learns_the_same_masks(tp, pp, dp, more, learned, tiny_parent, tiny_corpus, tmp_path, job):
    """Of layers, groups, heads in groups, FFN and hidden channels; two or four micro-batches accumulate."""
    save = tmp_path / "run"
    job(["learn-masks", *words(tiny_parent, tiny_corpus, save, *layout(tp, pp), *more)], nproc=tp * pp * dp).ok()
    assert losses(save) == pytest.approx(losses(learned), rel=2e-5)
    assert max(differences(learned, save).values()) < 1e-3
    ours, theirs = (learned_file.read(run / learned_file.FILE).state for run in (save, learned))
    assert_same_units(ours.log_alpha, theirs.log_alpha, theirs)


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


@pytest.mark.parametrize("name", ["llama-gqa", pytest.param("llama-mha-tied", marks=pytest.mark.slow)])
def test_the_applied_model_computes_what_the_masked_one_did(
    name, learned, tiny_hf, tiny_parent, tiny_corpus, tmp_path, job, distributed
):
    """Logits of the plan's model at two layouts, against the oracle's masked model and Megatron's."""
    save, target = learned, ALL_KINDS
    if name != "llama-gqa":
        parent, save = tmp_path / "parent", tmp_path / "run"
        import_hf(tiny_hf(name, layers=4), parent)
        target = OF_MHA
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


@pytest.mark.slow
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
