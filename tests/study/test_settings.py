"""Chains of prunings, equal FLOPs, sweeps of the learning rate, a parent for each seed: on a made-up study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.cli.study_commands import study_main
from megatron_prune.errors import AccountError, RunError, UsageError
from megatron_prune.masks import open_masks
from megatron_prune.structured import plan
from megatron_prune.study import estimate, grid, prunings, schema, validate
from megatron_prune.study.analysis import results
from megatron_prune.study.evidence import Ledger
from megatron_prune.study.outlook import look
from megatron_prune.study.prunings import Places
from megatron_prune.study.report import page
from tests.study import made_up

DEPTH_THEN_SPARSE = {"chain": [{"name": "shortgpt", "ratio": 0.5}, {"name": "wanda", "pattern": "2:4"}]}
RATES = [1e-3, 2e-3]


pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


def records(places: Places) -> dict[str, dict[str, Any]]:
    found = Ledger(places.ledger).read()
    return {
        cell: {k: v for k, v in record.items() if k not in ("seconds", "artifacts")} for cell, record in found.items()
    }


def tamper(places: Places, cell: str, **changes: Any) -> None:
    path = places.account(cell)
    account = json.loads(path.read_text())
    account["arguments"] |= changes.pop("arguments", {})
    path.write_text(json.dumps(account | changes))


# ------------------------------------------------------------------ chains


def test_a_chain_starts_from_its_first_link_and_shares_it(prefixes) -> None:
    study = made_up.study(prefixes, methods=[{"name": "shortgpt"}, DEPTH_THEN_SPARSE], settings=["equal-training"])
    launcher = made_up.FakeLauncher()
    places = made_up.run(study, Path("runs"), launcher)
    found = records(places)
    chained, name = "pruning-shortgpt-r50-then-wanda-2-4-r50-s1", "shortgpt-r50-then-wanda-2-4-r50-s1"
    assert [cell for cell in found if cell.startswith("pruning")] == ["pruning-shortgpt-r50-s1", chained]
    sparsify = next(command for command in launcher.commands if command.stage == "sparsify")
    assert made_up.words(list(sparsify.argv[1:]))["load"] == str(places.checkpoint("pruning-shortgpt-r50-s1"))
    masks = open_masks(places.checkpoint(chained) / "masks")
    whole = look(study, places).targets["shortgpt-r50-s1"]
    parent = whole.linear_parameters() * 2  # half of its layers are removed
    assert found[chained]["base"] == "pruning-shortgpt-r50-s1" and found[chained]["masks"] == masks.hash
    assert found[chained]["removed_linears"] == pytest.approx(1 - (whole.linear_parameters() - masks.removed) / parent)
    assert found[chained]["removed_linears"] == pytest.approx(0.75)

    rows = [row for row in results.collect(places).rows if row["arm"] == "pruned"]
    assert [(row["method"], row["pattern"], row["ratio"]) for row in rows] == [
        ("shortgpt", None, 0.5), ("shortgpt 50% + wanda", "2:4", None)
    ]  # fmt: skip
    # Both links read calibration text; the chain's FLOPs are those of both, and of the one calibration.
    assert [row["tokens_pruning"] for row in rows] == [128, 256]
    calibration = found["calibration-s1"]["flops"]
    assert [row["flops_pruning"] for row in rows] == [calibration, calibration + 10**9]
    assert rows[1]["cell"] == f"pruned-{name}-t1280" and rows[1]["params_nonzero"] < rows[0]["params_nonzero"]
    (item,) = [item for item in results.collect(places).compared if item.comparison.pruning.base]
    assert item.comparison.scratch == "scratch-masked-shortgpt-r50-then-wanda-2-4-r50-equal-training-t1280-s1"
    assert {line.field: line.pruned for line in item.match}["masks"] == masks.hash


def test_a_structured_link_after_another_has_statistics_of_its_own(prefixes) -> None:
    links = [{"name": "shortgpt", "ratio": 0.5},
             {"name": "minitron-width", "ratio": 0.5, "settings": {"divisible-by": 8}}]  # fmt: skip
    study = made_up.study(prefixes, methods=[{"label": "both", "chain": links}], seeds=[1, 2])
    expected = records(made_up.run(study, Path("whole"), made_up.FakeLauncher()))
    assert [cell for cell, record in expected.items() if record["kind"] == "calibration"] == [
        "calibration-s1", "calibration-s2", "calibration-shortgpt-r50-s1", "calibration-shortgpt-r50-s2",
    ]  # fmt: skip
    target = expected["pruning-both-r50-s1"]["target"]
    assert target["num_layers"] == 2 and target["hidden_size"] < 32
    places = made_up.run_killed(study, Path("killed"))
    assert records(places) == expected
    (verdict, _) = results.collect(places).verdicts
    assert (verdict.method, verdict.ratio, verdict.test.seeds) == ("both", None, 2)


FLAP = {"name": "flap", "ratio": 0.3, "settings": {"allocation": "global", "divisible-by": 1}}


def test_layers_that_differ_are_pruned_on(prefixes) -> None:
    """Channels, after a retraining layers, then single weights: each shape is known once it is planned."""
    links = [{**FLAP, "retrain": 1_280}, {"name": "shortgpt", "ratio": 0.25},
             {"name": "wanda", "pattern": "unstructured", "ratio": 0.5}]  # fmt: skip
    study = made_up.study(prefixes, methods=[{"label": "three", "chain": links}], settings=["equal-training"])
    before = look(study, Places(Path("nothing")), planned=True)
    assert not before.targets
    launcher = made_up.FakeLauncher()
    places = made_up.run(study, Path("runs"), launcher)
    first, second, third = prunings.links(study)[:3]
    known = look(study, places).targets
    cut, fewer = (open_checkpoint(places.checkpoint(one.cell)) for one in (first, second))
    assert known[first.name] == cut.shape and len(set(cut.shape.by_layer())) > 1
    assert cut.shape.linear_bias and fewer.shape.linear_bias
    kept = plan.read(places.plan(second)).kept_layers
    assert fewer.shape.by_layer() == tuple(cut.shape.by_layer()[layer] for layer in kept) and len(kept) == 3
    assert known[second.name] == known[third.name] == fewer.shape
    chain = open_checkpoint(places.checkpoint(third.cell)).pruning
    assert [entry["method"] for entry in chain] == ["shortgpt", "wanda"]  # after the retraining of what flap cut
    record, masks = records(places)[third.cell], open_masks(places.masks(third))
    whole = look(study, places).source
    assert whole is not None
    left = fewer.shape.linear_parameters() - masks.removed
    assert record["removed_linears"] == pytest.approx(1 - left / whole.linear_parameters())
    (item,) = results.collect(places).compared
    assert item.status == "finished" and {line.field: line.pruned for line in item.match}["masks"] == masks.hash


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ({"name": "minitron-width", "ratio": 0.3}, "--method: expected flap, .* got one that cuts hidden channels"),
        ({"name": "flap", "target": {"ffn-hidden-size": 8}}, "--target-ffn-hidden-size: expected --ratio"),
        ({"name": "wanda", "ratio": 0.5, "pattern": "unstructured", "settings": {"allocation": "search"}},
         "--allocation: expected global, owl or uniform, got search"),
    ],
)  # fmt: skip
def test_what_cannot_follow_layers_that_differ_is_refused_before_they_are_made(
    prefixes, link: dict[str, Any], message: str
) -> None:
    study = made_up.study(prefixes, methods=[{"chain": [FLAP, link]}])
    with pytest.raises(UsageError, match=message):
        validate.check(study, Places(Path("runs/x")))


def test_what_a_chain_cannot_be_is_refused(prefixes) -> None:
    chain = [{"name": "shortgpt", "ratio": 0.5}, {"name": "wanda", "pattern": "3:6"}]
    study = made_up.study(prefixes, methods=[{"chain": chain}])
    with pytest.raises(UsageError, match=r"--pattern: expected an M that divides the inputs.*, got 3:6"):
        validate.check(study, Places(Path("runs/x")))
    other = [{"name": "shortgpt", "settings": {"distance": "euclid"}}, DEPTH_THEN_SPARSE]
    with pytest.raises(UsageError, match="two prunings called shortgpt-r50-s1 with different settings"):
        prunings.links(made_up.study(prefixes, methods=other))


# ------------------------------------------------------------------ equal FLOPs


def test_equal_flops_counts_what_the_whole_pruned_arm_executed(prefixes) -> None:
    methods = [{"name": "shortgpt"}, {"name": "wanda", "pattern": "2:4"}]
    study = made_up.study(prefixes, methods=methods, settings=["equal-flops"], scratch=["dense"])
    places = made_up.run(study, Path("runs"), made_up.FakeLauncher())
    found = results.collect(places)
    assert [item.status for item in found.compared] == ["finished"] * 2
    for pruned, scratch in zip(found.rows[1::2], found.rows[2::2], strict=True):
        account = json.loads(places.account(scratch["cell"]).read_text())
        one_step = account["flops_executed"] // account["steps"]
        parent, spent = found.rows[0]["flops_total"], pruned["flops_pruning"]
        assert pruned["flops_total"] == parent + spent + pruned["flops_train"]
        counted = spent if spent >= 0.001 * (parent + pruned["flops_train"]) else 0
        assert 0 <= scratch["flops_total"] - (parent + pruned["flops_train"] + counted) < one_step
        assert account["range"][0] == 0
    # The smaller shape trains on more tokens than its pruned arm and parent, whose tokens cost more FLOPs.
    assert found.rows[2]["tokens_total"] > found.rows[1]["tokens_total"]
    again = made_up.FakeLauncher()
    made_up.run(study, Path("runs"), again)
    assert not again.commands

    cell = found.rows[2]["cell"]
    account = json.loads(places.account(cell).read_text())
    fewer = account["steps"] - 2
    tamper(places, cell, steps=fewer, range=[0, fewer * 8], tokens=fewer * 128,
           flops_executed=account["flops_executed"] * fewer // account["steps"],
           arguments={"train_iters": fewer, "lr_decay_iters": fewer})  # fmt: skip
    with pytest.raises(AccountError, match=rf"{cell}/checkpoint/account.json: expected a finished run with range"):
        results.collect(places)
    places.account(cell).write_text(json.dumps(account))
    tamper(places, "parent", flops_executed=1)
    with pytest.raises(AccountError, match="FLOPs of the parent"):
        results.collect(places)


def test_equal_flops_waits_for_what_a_pruning_spends(prefixes) -> None:
    study = made_up.study(prefixes, settings=["equal-flops"], methods=[{"name": "shortgpt"}])
    outlook = validate.check(study, Places(Path("runs/made-up")))
    laid = outlook.grid(study)
    assert [cell.kind for cell in laid.cells] == ["pruned"] and laid.comparisons[0].scratch is None
    with pytest.raises(made_up.Killed):
        made_up.run(study, Path("runs"), made_up.FakeLauncher(kill_at=4))
    assert [item.status for item in results.collect(Places(Path("runs/made-up"))).compared] == ["pending"]


# ------------------------------------------------------------------ sweeps


def swept(prefixes, **changes: Any) -> Any:
    parent = {"pretrain": {"tokens": 2560, "arguments": made_up.SHAPE_FLAGS, "lr": 1e-3}}
    recipe = made_up.mapping(prefixes)["recipe"] | {"lr": RATES}
    changes = {"parent": parent, "recipe": recipe, "methods": [{"name": "shortgpt"}], "seeds": [1, 2], **changes}
    return made_up.study(prefixes, **changes)


def test_a_sweep_trains_both_arms_at_every_rate_and_validation_chooses(prefixes) -> None:
    places = made_up.run(swept(prefixes), Path("runs"), made_up.FakeLauncher())
    found = records(places)
    names = [f"{name}-lr{rate:g}" for rate in RATES for name in (
        "pruned-shortgpt-r50-s1-t1280", "scratch-L2h32H4G2d8F64-equal-training-t1280-s2")]  # fmt: skip
    assert set(names) < set(found) and len([r for r in found.values() if r["kind"] in ("pruned", "scratch")]) == 12
    made = results.collect(places)

    def mean(pattern: str, rate: float) -> float:
        runs = [cell for cell in found if cell.startswith(pattern) and cell.endswith(f"-lr{rate:g}")]
        losses = [found[cell]["validation_loss"] for cell in runs]
        assert len(losses) == 2
        return sum(losses) / 2

    for item in made.compared:
        arms = {"pruned": "pruned-shortgpt", "scratch": f"scratch-L2h32H4G2d8F64-{item.comparison.setting}"}
        for which, pattern in arms.items():
            best = min(RATES, key=lambda rate, pattern=pattern: mean(pattern, rate))
            assert getattr(item.comparison, which).endswith(f"-lr{best:g}")
            assert found[getattr(item.comparison, which)]["lr"] == best
        lines = {line.field: line for line in item.match}
        assert lines["learning rates tried"].pruned == RATES
    assert [row["lr"] in RATES for row in made.rows[1:]] == [True] * 8
    assert {(one.arm, one.setting) for one in made.sweeps} == {
        ("pruned", None), ("scratch", "equal-training"), ("scratch", "equal-total")
    }  # fmt: skip
    assert all(one.chosen in RATES and set(one.validation) == set(RATES) for one in made.sweeps)
    assert json.loads(json.dumps(results.to_json(made), allow_nan=False))["sweeps"]


def test_a_rate_at_the_end_of_its_grid_is_flagged_in_the_verdict(prefixes) -> None:
    """Of three rates; the next beyond is as far from the chosen one as its neighbour is."""
    recipe = made_up.mapping(prefixes)["recipe"] | {"lr": [2e-3, 1e-3, 4e-3]}
    places = made_up.run(swept(prefixes, recipe=recipe), Path("runs"), made_up.FakeLauncher())
    made = results.collect(places)
    data, by_arm = results.to_json(made), {(one.arm, one.setting): one for one in made.sweeps}
    expected = {1e-3: ("smallest", 5e-4), 4e-3: ("largest", 8e-3)}
    seen = 0
    for verdict, item in zip(made.verdicts, data["verdicts"], strict=True):
        arms = {"pruned": by_arm["pruned", None], "scratch": by_arm["scratch", verdict.setting]}
        chosen = {arm: one.chosen for arm, one in arms.items()}
        ends = [(arm, rate, *expected[rate]) for arm, rate in chosen.items() if rate in expected]
        assert [(edge.arm, edge.rate, edge.end, edge.add) for edge in verdict.edges] == ends
        assert [edge["add"] for edge in item["edges"]] == [add for *_, add in ends]
        for arm, rate, end, add in ends:
            words = f"The {arm} arm's learning rate, {rate:g}, is the {end} that was tried: add {add:g}."
            assert words in verdict.words and words in item["words"]
        seen += len(ends)
    assert 0 < seen < 2 * len(made.verdicts)  # some are at an end, some are not
    text = page.render(made, [])
    edge = next(edge for verdict in made.verdicts for edge in verdict.edges)
    assert f"the {edge.end}: add {edge.add:g}" in text and "is the smallest or largest one tried" in text
    assert [one["edge"] is None for one in data["sweeps"]] == [one.chosen == 2e-3 for one in made.sweeps]


def test_a_run_of_the_sweep_that_differs_in_more_than_its_rate_is_refused(prefixes) -> None:
    places = made_up.run(swept(prefixes, settings=["equal-training"]), Path("runs"), made_up.FakeLauncher())
    item = results.collect(places).compared[0]
    other = next(str(scratch) for _, _, scratch in item.comparison.swept if scratch != item.comparison.scratch)
    whole = places.account(other).read_text()
    own = rf"cells/{other}/checkpoint/account.json: expected a finished run with "
    for message, changes in {
        f"{own}range": {"range": [168, 248]},
        f"{own}seed": {"seed": 7},
        f"{item.comparison.scratch} may not be compared: arguments.weight_decay: ": {
            "arguments": {"weight_decay": "0.2"}
        },
        f"{own}lr": {"arguments": {"lr": 3e-3}},
    }.items():
        tamper(places, other, **changes)
        with pytest.raises(AccountError, match=message):
            results.collect(places)
        places.account(other).write_text(whole)


def test_an_arm_has_no_rate_before_all_of_its_runs_are_finished(prefixes) -> None:
    study = swept(prefixes, settings=["equal-training"])
    with pytest.raises(made_up.Killed):
        made_up.run(study, Path("runs"), made_up.FakeLauncher(kill_at=22))
    found = results.collect(Places(Path("runs/made-up")))
    assert any(one.chosen is None for one in found.sweeps) and not found.verdicts
    assert {item.status for item in found.compared} == {"pending"}


# ------------------------------------------------------------------ a parent for each seed


def test_a_parent_for_each_seed(prefixes) -> None:
    methods = [{"name": "shortgpt"}, {"name": "wanda", "pattern": "2:4"}]
    study = made_up.study(prefixes, methods=methods, seeds=[1, 2], parent_per_seed=True)
    places = made_up.run(study, Path("runs"), launcher := made_up.FakeLauncher())
    found = records(places)
    assert [record["cell"] for record in found.values() if record["kind"] == "parent"] == ["parent-s1", "parent-s2"]
    for ran in launcher.commands:
        text = " ".join(ran.argv)
        assert not ("-s1" in text and "parent-s2" in text)
    seeds = [json.loads(places.account(f"parent-s{seed}").read_text())["seed"] for seed in (1, 2)]
    assert seeds == [1235, 1236]
    made = results.collect(places)
    assert [(row["arm"], row["seed"]) for row in made.rows[:2]] == [("parent", 1235), ("parent", 1236)]
    assert made.parent is not None
    assert made.parent["test_loss"] == pytest.approx(sum(found[f"parent-s{s}"]["test_loss"] for s in (1, 2)) / 2)
    assert all(item.status == "finished" for item in made.compared)
    assert all("conditional on this parent" not in verdict.words for verdict in made.verdicts)
    # Masks fit the initial weights of their parent. Parents have seeds 2 and 3 here, and their scratch runs
    # under masks have 1 and 2: none has the seed of its own parent.
    parent = {"pretrain": {"tokens": 2560, "arguments": made_up.SHAPE_FLAGS, "seed": 1}}
    per_seed = {"methods": methods, "parent": parent, "seeds": [1, 2]}
    validate.check(made_up.study(prefixes, **per_seed, parent_per_seed=True), Places(Path("runs/x")))
    with pytest.raises(UsageError, match="seeds: expected a seed other than the parent.s.*, got 1"):
        validate.check(made_up.study(prefixes, **per_seed), Places(Path("runs/x")))
    assert grid.shape_tag(found["pruning-shortgpt-r50-s1"]["target"]) == found["pruning-shortgpt-r50-s1"]["shape"]


# ------------------------------------------------------------------ several parents


def test_several_parents_are_a_study_each(prefixes, capsys) -> None:
    content = made_up.mapping(prefixes, methods=[{"name": "shortgpt"}])
    pretrain = content.pop("parent")["pretrain"]
    content["parents"] = {"short": {"pretrain": pretrain}, "long": {"pretrain": pretrain | {"tokens": 3840}}}
    path = Path("study.yaml")
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    studies = schema.load_all(path)
    assert [study.name for study in studies] == ["made-up.short", "made-up.long"]
    assert study_main(["plan", "study.yaml"]) == 0
    printed = capsys.readouterr().out
    assert printed.index("study made-up.short") < printed.index("0:160") < printed.index("study made-up.long")
    study_main(["plan", "study.yaml", "--parent", "long"])
    assert "made-up.short" not in capsys.readouterr().out
    for study in studies:
        made_up.run(study, Path("runs"), made_up.FakeLauncher())
    study_main(["report", "study.yaml"])
    assert Path("runs/made-up.long/report/index.html").is_file() and "1,280 of retraining" in capsys.readouterr().out
    # A failed one does not prevent the report of the other.
    Path("runs/made-up.short/study.json").unlink()
    with pytest.raises(RunError, match="made-up.short: study report: expected .*, got runs/made-up.short"):
        study_main(["report", "study.yaml"])
    assert "wrote runs/made-up.long/report/index.html" in capsys.readouterr().out
    with pytest.raises(
        UsageError, match="--parent: expected a label that stands under parents in .*study.yaml, got wide"
    ):
        study_main(["status", "study.yaml", "--parent", "wide"])
    with pytest.raises(UsageError, match="expected a study with one parent, got .*study.yaml with 2"):
        schema.load(path)
    path.write_text(yaml.safe_dump(content | {"parent": {"load": "x"}}))
    with pytest.raises(UsageError, match="parents: expected either parent, or parents by their labels, got both"):
        schema.load_all(path)


# ------------------------------------------------------------------ gradients


def test_only_a_method_that_reads_gradients_pays_for_them(prefixes, capsys) -> None:
    """Its calibration is a cell of its own: the others' command, and what they are charged, do not change."""
    methods = [{"name": "shortgpt"}, {"name": "llm-pruner", "settings": {"taylor": "mixed", "divisible-by": 8}}]
    content = made_up.mapping(prefixes, methods=methods)
    Path("study.yaml").write_text(json.dumps(content))
    assert study_main(["plan", "study.yaml", "--commands"]) == 0
    lines = capsys.readouterr().out.splitlines()
    calibrations = [line for line in lines if " calibrate " in line]
    assert [("--gradients" in line, "cells/gradients" in line) for line in calibrations] == [
        (False, False),
        (True, True),
    ]
    plans = [line for line in lines if " plan " in line and "--method" in line]
    assert ["cells/gradients" in line for line in plans] == [False, True]
    assert "--method llm-pruner" in plans[1] and "--taylor mixed" in plans[1]
    study = schema.from_mapping(content)
    places = Places(Path("runs/made-up"))
    flops = {one.cell: one.flops for one in estimate.of_study(study, look(study, places))}
    (plain,), (dear,) = ([flops[c] for c in flops if c.startswith(kind)] for kind in ("calibration", "gradients"))
    assert plain and dear == 3 * plain


def test_a_least_share_of_every_layer_reaches_plan_or_is_refused(prefixes, capsys) -> None:
    own = {"allocation": "global", "divisible-by": 1, "least-kept": 0.35}
    content = made_up.mapping(prefixes, methods=[{"name": "wanda-sp", "settings": own}])
    Path("study.yaml").write_text(json.dumps(content))
    assert study_main(["plan", "study.yaml", "--commands"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " plan " in line and "wanda-sp" in line]
    assert "--allocation global" in line and "--least-kept 0.35" in line
    for wrong, said in (
        ({"least-kept": 0.8}, "--least-kept: expected at most .*, got 0.8"),
        ({"least-kept": 1.5}, r"settings\.least-kept: expected a fraction"),
        ({"allocation": "uniform"}, "--least-kept: expected --allocation owl, global or search with it"),
    ):
        methods = [{"name": "wanda-sp", "settings": own | wrong}]
        with pytest.raises(UsageError, match=said):
            validate.check(made_up.study(prefixes, methods=methods), Places(Path("runs/made-up")))


# ------------------------------------------------------------------ biases that a pruning adds


def test_scratch_runs_have_the_biases_of_the_pruned_model(prefixes, capsys) -> None:
    methods = [
        {"name": "flap", "settings": {"divisible-by": 8, "metric": "ifv"}},
        {"name": "flap", "label": "plain", "settings": {"divisible-by": 8, "compensate": False}},
    ]
    content = made_up.mapping(prefixes, methods=methods)
    Path("study.yaml").write_text(json.dumps(content))
    assert study_main(["plan", "study.yaml", "--commands"]) == 0
    lines = capsys.readouterr().out.splitlines()
    plans = [line for line in lines if " plan " in line and "--method flap" in line]
    assert ["--no-compensate" in line for line in plans] == [False, True]
    assert all("--compensate" not in line for line in plans) and "--metric ifv" in plans[0]
    scratch = [line for line in lines if "cells/scratch-" in line and " pretrain " in line]
    biased = {line for line in scratch if "F" in line and "b-equal" in line}
    assert biased and all(("--disable-bias-linear" in line) == (line not in biased) for line in scratch)
    assert len([line for line in lines if " calibrate " in line]) == 1
    study = schema.from_mapping(content)
    targets = look(study, Places(Path("runs/made-up"))).targets
    with_biases, plain = (targets[name] for name in sorted(targets))
    assert with_biases == plain.with_biases() != plain
    with pytest.raises(UsageError, match="settings.compensate: expected true or false, got off"):
        methods[1]["settings"]["compensate"] = "off"
        look(schema.from_mapping(made_up.mapping(prefixes, methods=methods)), Places(Path("runs/made-up")))
