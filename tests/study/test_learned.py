"""A method that learns its masks by training, in a study: its samples, commands and comparisons."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import yaml

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.errors import UsageError
from megatron_prune.study import jobs, outlook, validate
from megatron_prune.study.analysis import results
from megatron_prune.study.prunings import Places
from tests.study import made_up, test_end_to_end

SETTINGS = {"divisible-by": 8, "tolerance": 0.2, "mask-lr": 0.5, "lr": 3e-4, "global-batch-size": 4}
METHOD = {"name": "sheared-llama", "tokens": 640, "settings": SETTINGS}


def study(folder: Path, *others, **changes):
    return made_up.study(made_up.corpora(folder), methods=[METHOD, *others], **changes)


def commands_of(study, cell: str) -> list[list[str]]:
    places = Places(Path("runs/made-up"))
    cells = {cell.id: cell for cell in jobs.all_cells(study, places, outlook.look(study, places))}
    return [stage.command.words for stage in cells[cell].stages]


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_masks_are_learned_after_the_longest_retraining(tmp_path: Path) -> None:
    """The parent takes 0:160, budgets 160:240 and 160:320; masks the 40 samples that follow."""
    made = study(tmp_path, budgets=[1280, 2560])
    learn, plan, apply, evaluate = commands_of(made, "pruning-sheared-llama-r50-s1")
    learned = "runs/made-up/cells/pruning-sheared-llama-r50-s1/learned"
    assert learn[3] == "learn-masks" and value(learn, "--stream-range") == "320:360"
    assert (value(learn, "--train-iters"), value(learn, "--global-batch-size")) == ("10", "4")
    flags = [word for word in learn if word.startswith("--")]
    assert len(flags) == len(set(flags))
    assert value(learn, "--save") == value(learn, "--load") == learned
    assert (value(learn, "--lr"), value(learn, "--min-lr"), value(learn, "--mask-lr")) == ("0.0003", "3e-05", "0.5")
    assert (value(learn, "--ratio"), value(learn, "--divisible-by")) == ("0.5", "8") and "--method" not in learn
    assert value(plan, "--load") == value(apply, "--load") == learned and "--mask-lr" not in plan
    assert value(plan, "--statistics") == f"{learned}/learned_masks.safetensors"
    assert evaluate[3] == "evaluate"


def test_scratch_has_what_masks_were_learned_on_too(tmp_path: Path) -> None:
    made = study(tmp_path, {"name": "minitron-width", "settings": {"divisible-by": 8, "tolerance": 0.2}})
    found = outlook.look(made, Places(Path("runs/made-up"))).grid(made)
    samples = {(c.pruning.method.name, c.setting): c.scratch for c in found.comparisons}
    cells = {cell.id: cell.samples for cell in found.cells}

    def range_of(method: str, setting: str) -> tuple[int, int]:
        return cells[samples[method, setting]].samples

    assert range_of("minitron-width", "equal-training") == (160, 240)
    assert range_of("sheared-llama", "equal-training") == (160, 280)
    assert range_of("sheared-llama", "equal-total") == (0, 280)  # calibration, which it does not read, is not in it


def test_the_stream_must_hold_what_masks_are_learned_on(tmp_path: Path) -> None:
    made = made_up.study(made_up.corpora(tmp_path, train=5_000), methods=[METHOD], settings=["equal-flops"])
    with pytest.raises(Exception, match="samples"):
        validate.check_ranges(made, outlook.look(made, Places(Path("runs/made-up"))), outlook.stream_of(made))


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (METHOD | {"tokens": 650}, "a multiple of the 128 of a global batch, got 650"),
        ({"name": "sheared-llama", "settings": SETTINGS}, "got nothing"),
        ({"name": "shortgpt", "tokens": 640}, "shortgpt learns no masks"),
        (METHOD | {"settings": {"mask-lr": "fast"}}, "mask-lr"),
        (METHOD | {"settings": SETTINGS | {"global-batch-size": 6}}, "a multiple of micro_batch_size .* got 6"),
        (METHOD | {"settings": {"masks-lr": 1.0}}, "masks-lr"),
    ],
)
def test_entries_that_cannot_be_meant_are_refused(tmp_path: Path, method: dict, says: str) -> None:
    made = made_up.study(made_up.corpora(tmp_path), methods=[method])
    with pytest.raises(UsageError, match=says):
        outlook.look(made, Places(Path("runs/made-up")))


def test_a_layout_that_changes_the_shape_is_refused(tmp_path: Path) -> None:
    method = METHOD | {"settings": {"divisible-by": 2, "tolerance": 0.2}}
    launch = {"nproc": 4, "tensor_parallel": 4}
    recipe = made_up.mapping({})["recipe"] | {"micro_batch_size": 8}
    made = made_up.study(made_up.corpora(tmp_path), methods=[method], launch=launch, recipe=recipe, ratios=[0.55])
    with pytest.raises(UsageError, match="a multiple of 4"):
        outlook.look(made, Places(Path("runs/made-up")))


LINK = {key: METHOD[key] for key in ("name", "settings")} | {"ratio": 0.25}
CHAIN = [LINK | {"tokens": 640, "retrain": 256}, LINK | {"tokens": 256}]


def test_each_link_of_a_chain_learns_on_samples_of_its_own(tmp_path: Path) -> None:
    """The parent takes 0:160, the retraining between the links 160:176, the last one 176:256, masks 256:296:312."""
    launcher = made_up.FakeLauncher()
    made = study(tmp_path, {"chain": CHAIN}, settings=["equal-training", "equal-total"], ratios=[0.5])
    with contextlib.chdir(tmp_path):
        places = made_up.run(made, Path("runs"), launcher)
        found = results.collect(places)
    learned = {value(list(c.argv), "--save"): value(list(c.argv), "--stream-range") for c in launcher.commands
               if c.stage == "learn-masks"}  # fmt: skip
    first = "pruning-sheared-llama-r25-s1"
    second = "pruning-sheared-llama-r25-t256-then-sheared-llama-r25-s1"
    assert learned == {
        "runs/made-up/cells/pruning-sheared-llama-r50-s1/learned": "256:296",
        f"runs/made-up/cells/{first}/learned": "256:296",
        f"runs/made-up/cells/{second}/learned": "296:312",
    }
    assert not found.disbelieved and not found.left_out
    rows = {(row["arm"], row["setting"]): row for row in found.rows if row["ratio"] is None and row["method"]}
    assert rows["pruned", "equal-training"]["tokens_pruning"] == 640 + 256 + 256
    assert rows["pruned", "equal-total"]["tokens_total"] == 2560 + 1280 + 640 + 256 + 256
    assert rows["pruned", "equal-total"]["tokens_learned"] == 640 + 256
    parent, smaller = (open_checkpoint(tmp_path / places.checkpoint(cell)).shape for cell in ("parent", first))
    flops = 40 * parent.training_flops(16) + (16 + 16) * smaller.training_flops(16)
    assert rows["pruned", "equal-total"]["flops_pruning"] == flops  # no calibration is in it
    assert rows["scratch", "equal-training"]["tokens_train"] == 1280 + 640 + 256
    lines = {item.comparison.setting: {line.field: line.pruned for line in item.match} for item in found.compared
             if item.comparison.pruning.base}  # fmt: skip
    assert lines["equal-training"]["tokens"] == "2,176 = 1,280 retraining + 896 learning masks"
    assert lines["equal-total"]["lineage"] == ("trained on 2,560 → sheared-llama → trained on 256 → sheared-llama")


def test_masks_are_not_learned_on_a_sparse_link(tmp_path: Path) -> None:
    chain = [{"name": "wanda", "pattern": "2:4"}, LINK | {"tokens": 640}]
    with pytest.raises(UsageError, match="chain: expected learned masks before sparse ones, got .* after wanda-2-4"):
        study(tmp_path, {"chain": chain})


def test_the_stream_must_hold_what_the_last_link_learns_on(tmp_path: Path) -> None:
    corpora = made_up.corpora(tmp_path, train=16 * 311 + 1)
    made = made_up.study(corpora, methods=[{"chain": CHAIN}], settings=["equal-training"])
    with pytest.raises(Exception, match="masks, samples 296:312"):
        validate.check_ranges(made, outlook.look(made, Places(Path("runs/made-up"))), outlook.stream_of(made))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_study_learns_masks_and_is_believed(tmp_path: Path) -> None:
    """On the real engine: masks, plan, cut, retraining, scratch; both settings count the tokens of the masks."""
    content = made_up.mapping(
        made_up.corpora(tmp_path, train=20_000),
        parent={"pretrain": {"tokens": 5_120, "arguments": test_end_to_end.ARGUMENTS}},
        methods=[METHOD | {"tokens": 1_280}],
        budgets=[2_560],
        launch={"threads": 1},
    )
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    test_end_to_end.finish(tmp_path)
    with contextlib.chdir(tmp_path):
        found = results.collect(Places(Path("runs/made-up")))
    assert not found.disbelieved and not found.left_out
    lines = {item.comparison.setting: {line.field: line.pruned for line in item.match} for item in found.compared}
    assert lines["equal-training"]["tokens"] == "3,840 = 2,560 retraining + 1,280 learning masks"
    assert lines["equal-total"]["total tokens"] == "8,960 = 5,120 parent + 2,560 retraining + 1,280 pruning"
    assert lines["equal-total"]["lineage"] == "trained on 5,120 → sheared-llama"
