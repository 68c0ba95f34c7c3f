"""Sparse methods in a study: their cells, their comparisons, and the rows and accounts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.cli.study_commands import study_main
from megatron_prune.data import indexed
from megatron_prune.errors import AccountError, UsageError
from megatron_prune.masks import open_masks
from megatron_prune.study import grid, prunings, schema, validate
from megatron_prune.study.analysis import results
from megatron_prune.study.evidence import Ledger
from megatron_prune.study.execution import Check
from megatron_prune.study.prunings import Places
from megatron_prune.study.sample_ranges import Batch, Lay
from tests.study import made_up
from tests.study.test_config import GOOD
from tests.study.test_grid import LAY, SHAPE

BOTH = ["masked", "dense"]
METHODS: list[dict[str, Any]] = [
    {"name": "shortgpt"},
    {"name": "wanda", "pattern": "2:4", "compare": {"equal-training": ["dense"]}},
    {"name": "wanda", "pattern": "unstructured", "compare": {"equal-training": BOTH, "equal-total": BOTH}},
    {"name": "magnitude", "pattern": "1:4", "compare": ["equal-training"]},
    {"name": "random", "pattern": "unstructured", "label": "floor", "compare": ["equal-training"]},
]
PARENT = "L4h32H4G2d8F64"


@pytest.fixture(scope="module")
def places(prefixes: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Places:
    study = made_up.study(prefixes, methods=METHODS)
    return made_up.run(study, tmp_path_factory.mktemp("runs"), made_up.FakeLauncher())


def records(places: Places) -> dict[str, dict[str, Any]]:
    return Ledger(places.root / "ledger.jsonl").read()


def test_a_pattern_fixes_its_ratio_and_others_take_the_studys() -> None:
    study = schema.from_mapping(GOOD | {"methods": METHODS[1:], "ratios": [0.25, 0.5]})
    assert [pruning.name for pruning in prunings.prunings(study)] == [
        "wanda-2-4-r50-s1",
        "wanda-unstructured-r25-s1",
        "wanda-unstructured-r50-s1",
        "magnitude-1-4-r75-s1",
        "floor-r25-s1",
        "floor-r50-s1",
    ]
    assert grid.notes(study) == [
        "wanda-2-4 runs once, at 50%: 2:4 says how much is removed, not ratios: [0.25, 0.5]",
        "magnitude-1-4 runs once, at 75%: 1:4 says how much is removed, not ratios: [0.25, 0.5]",
    ]
    assert not grid.notes(schema.from_mapping(GOOD | {"methods": METHODS[:2], "ratios": [0.5]}))


def test_masked_scratch_is_a_pruning_s_own_and_dense_scratch_is_shared() -> None:
    methods = [{"name": "wanda", "pattern": pattern} for pattern in ("2:4", "4:8", "unstructured")]
    study = schema.from_mapping(GOOD | {"methods": methods, "scratch": ["masked", "dense"], "seeds": [1, 2]})
    shapes = {pruning.name: SHAPE for pruning in prunings.prunings(study)}
    laid = grid.expand(study, LAY, shapes, dict.fromkeys(shapes, 8))
    cells = {cell.id: cell for cell in laid.cells}
    assert len(cells) == len(laid.cells) == 3 * 2 + 2 * 3 * 2 + 2 * 2  # pruned, masked scratch, dense scratch
    assert len(laid.comparisons) == 3 * 2 * 2 * 2
    for made in laid.comparisons:
        pruned, scratch = cells[made.pruned], cells[made.scratch or ""]
        assert pruned.masked and scratch.masked == (made.against == "masked")
        if scratch.masked:
            assert scratch.source == made.pruning  # its seed's masks
    # Before the shapes are known there are cells of the same kinds.
    unknown = grid.expand(study, LAY, {}, {})
    assert sorted({cell.id.split("-")[1] for cell in unknown.cells if cell.kind == "scratch"}) == ["as", "masked"]


def test_an_outside_parents_equal_total_is_not_run_for_any_kind_of_scratch() -> None:
    parent = {"load": "x", "declared_tokens": "2T"}
    study = schema.from_mapping(GOOD | {"parent": parent, "methods": METHODS[2:3]})
    laid = grid.expand(study, Lay(Batch(16, 8), 0, 2 * 10**12), {}, {})
    assert [(c.setting, c.against, c.scratch is None) for c in laid.comparisons] == [
        ("equal-training", "masked", False),
        ("equal-training", "dense", False),
        ("equal-total", "masked", True),
        ("equal-total", "dense", True),
    ]


def test_commands_of_the_cells(prefixes, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    content = made_up.mapping(prefixes, methods=METHODS, ratios=[0.25], launch={"nproc": 2, "tensor_parallel": 2})
    Path("study.yaml").write_text(json.dumps(content))
    assert study_main(["plan", "study.yaml", "--commands"]) == 0
    printed = capsys.readouterr().out
    pruning = "runs/made-up/cells/pruning-wanda-2-4-r50-s1/checkpoint"
    sparsify = next(line for line in printed.splitlines() if " sparsify " in line and pruning in line)
    for words in (
        "torchrun --nproc-per-node 2 -m megatron_prune sparsify --load runs/made-up/cells/parent/checkpoint",
        "--tensor-model-parallel-size 2",
        "--calibration-sequences 8 --calibration-seq-length 16 --calibration-sampling random --seed 1",
        "--method wanda --pattern 2:4",
    ):
        assert words in sparsify, words
    assert "--ratio" not in sparsify and "--ratio 0.25" in printed
    assert f"pretrain --pretrained-checkpoint {pruning} --masks {pruning}/masks" in printed
    magnitude = "runs/made-up/cells/pruning-magnitude-1-4-r75-s1/checkpoint"
    assert f"pretrain --shape-from {magnitude} --masks {magnitude}/masks" in printed
    assert f"--shape-from {pruning}" not in printed  # a dense run does not wait for it
    without_text = [line for line in printed.splitlines() if " sparsify " in line and "--calibration" not in line]
    assert [("magnitude" in line, "--seed 1" in line) for line in without_text] == [(True, False), (False, True)]
    assert "wanda-2-4 runs once, at 50%: 2:4 says how much is removed, not ratios: [0.25]" in printed


def test_shared_work_is_done_once(places: Places) -> None:
    kinds = [record["kind"] for record in records(places).values()]
    # 1280 tokens of retraining; equal total 2560 + 1280 + 128 of calibration = 31 steps of 128 tokens
    assert set(records(places)) == {
        "parent",
        "calibration-s1",
        "pruning-shortgpt-r50-s1",
        "pruning-wanda-2-4-r50-s1",
        "pruning-wanda-unstructured-r50-s1",
        "pruning-magnitude-1-4-r75-s1",
        "pruning-floor-r50-s1",
        "pruned-shortgpt-r50-s1-t1280",
        "pruned-wanda-2-4-r50-s1-t1280",
        "pruned-wanda-unstructured-r50-s1-t1280",
        "pruned-magnitude-1-4-r75-s1-t1280",
        "pruned-floor-r50-s1-t1280",
        "scratch-L2h32H4G2d8F64-equal-training-t1280-s1",
        "scratch-L2h32H4G2d8F64-equal-total-t3968-s1",
        f"scratch-{PARENT}-equal-training-t1280-s1",  # of both wandas
        f"scratch-{PARENT}-equal-total-t3968-s1",
        "scratch-masked-wanda-unstructured-r50-equal-training-t1280-s1",
        "scratch-masked-wanda-unstructured-r50-equal-total-t3968-s1",
        "scratch-masked-magnitude-1-4-r75-equal-training-t1280-s1",
        "scratch-masked-floor-r50-equal-training-t1280-s1",
    }
    assert kinds.count("calibration") == 1


def test_rows_are_the_accounts_and_the_masks(places: Places) -> None:
    found = results.collect(places)
    parameters, linears = found.rows[0]["params"], 4 * (32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 64)
    compared = [(row["method"], row["pattern"], row["setting"], row["against"]) for row in found.rows[1::2]]
    assert compared == [(row["method"], row["pattern"], row["setting"], row["against"]) for row in found.rows[2::2]]
    assert compared == [
        ("shortgpt", None, "equal-training", "dense"),
        ("shortgpt", None, "equal-total", "dense"),
        ("wanda", "2:4", "equal-training", "dense"),
        ("wanda", "unstructured", "equal-training", "masked"),
        ("wanda", "unstructured", "equal-training", "dense"),
        ("wanda", "unstructured", "equal-total", "masked"),
        ("wanda", "unstructured", "equal-total", "dense"),
        ("magnitude", "1:4", "equal-training", "masked"),
        ("floor", "unstructured", "equal-training", "masked"),
    ]
    for row in found.rows[3:]:
        account = json.loads(places.account(row["cell"]).read_text())
        assert (row["params"], row["params_nonzero"]) == (account["parameters"], account["parameters_nonzero"])
        assert row["flops_train"] == account["flops_executed"]
        assert row["flops_train_theoretical"] == account["flops_theoretical"]
        ratio = {"2:4": 0.5, "1:4": 0.75}.get(row["pattern"], 0.5)
        if row["pattern"] is None:
            continue
        assert row["params"] == parameters and row["shape"] == PARENT and row["ratio_of"] == "linears"
        assert row["ratio"] == row["removed_linears"] == ratio
        assert row["removed_all"] == pytest.approx(ratio * linears / parameters)
        sparse = row["arm"] == "pruned" or row["against"] == "masked"
        assert row["params_nonzero"] == parameters - sparse * ratio * linears
        assert (row["flops_train_theoretical"] < row["flops_train"]) == sparse
        if row["arm"] == "pruned":
            reads = row["method"] == "wanda"
            assert row["tokens_pruning"] == reads * 8 * 16
            assert row["tokens_total"] == 2560 + 1280 + reads * 8 * 16
            assert row["flops_total"] == found.rows[0]["flops_total"] + row["flops_train"] + reads * 10**9
            assert row["test_loss_unretrained"] is not None
    assert [(v.label, v.setting, v.dense) for v in found.verdicts[3:5]] == [
        ("wanda unstructured, 50% removed", "equal-training", False),
        ("wanda unstructured, 50% removed", "equal-training", True),
    ]
    assert found.verdicts[4].subject.endswith("equal training tokens, 1,280 of retraining, against dense scratch")


def test_matches_say_which_zeros_were_held(places: Places) -> None:
    for item in results.collect(places).compared:
        made = item.comparison
        lines = {line.field: line for line in item.match}
        if made.pruning.method.pattern is None:
            assert "masks" not in lines
            continue
        masks = open_masks(places.masks(made.pruning)).hash
        assert lines["masks"].pruned == masks
        expected = (
            (masks, "equal") if made.against == "masked" else ("none", "may differ: the study asks for dense scratch")
        )
        assert (lines["masks"].scratch, lines["masks"].verdict) == expected


@pytest.mark.parametrize(
    ("cell", "masks"),
    [
        ("pruned-wanda-2-4-r50-s1-t1280", None),
        ("pruned-wanda-2-4-r50-s1-t1280", "other"),
        (f"scratch-{PARENT}-equal-training-t1280-s1", "other"),
        ("scratch-masked-magnitude-1-4-r75-equal-training-t1280-s1", None),
        ("scratch-masked-magnitude-1-4-r75-equal-training-t1280-s1", "other"),
        ("scratch-L2h32H4G2d8F64-equal-total-t3968-s1", "other"),
    ],
)
def test_other_masks_stop_the_report(places: Places, cell: str, masks: str | None) -> None:
    path = places.account(cell)
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"masks": masks}))
    try:
        with pytest.raises(AccountError, match=f"{cell}: it was trained under masks {masks or 'none'}, but evaluated"):
            results.collect(places)
    finally:
        path.write_text(before)


def test_killed_before_any_command_ends_with_the_same_ledger(prefixes, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    method = METHODS[2] | {"compare": ["equal-training"]}
    study = made_up.study(prefixes, methods=[method], seeds=[1, 2])
    whole = made_up.run(study, Path("whole"), made_up.FakeLauncher())
    spent = []
    while True:
        launcher = made_up.FakeLauncher(kill_at=1)
        try:
            places = made_up.run(study, Path("killed"), launcher)
        except made_up.Killed:
            spent += launcher.commands
            continue
        break
    without = [
        {cell: r | {"seconds": None, "artifacts": None} for cell, r in records(p).items()} for p in (whole, places)
    ]
    assert without[0] == without[1]
    assert [command.stage for command in spent].count("sparsify") == 2
    hashes = {record["masks"] for record in without[0].values() if record["kind"] == "pruning"}
    assert len(hashes) == 2  # a seed has its own windows, and its scratch runs its own masks


def test_a_half_written_pruning_does_not_count(prefixes, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = made_up.study(prefixes, methods=METHODS[3:4])
    places = made_up.run(study, Path("runs"), made_up.FakeLauncher())
    (pruning,) = prunings.prunings(study)

    checkpoint = places.checkpoint(pruning.cell)
    method = pruning.method

    def sparsified(folder: Path = checkpoint, pattern: str | None = method.pattern) -> bool:
        return Check("sparsified", {"checkpoint": str(folder), "method": method.name, "pattern": pattern})()

    assert sparsified()
    assert not sparsified(pattern="2:4")
    (checkpoint / "masks").rename(checkpoint / "elsewhere")
    assert not sparsified()
    assert not sparsified(checkpoint.parent / "nowhere")


def sparse(settings: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {"name": "wanda", "pattern": "unstructured", "settings": settings or {}, **changes}


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ({"name": "wanda"}, {}, r"methods\.wanda\.pattern: expected unstructured or N:M, got nothing"),
        ({"name": "shortgpt", "pattern": "2:4"}, {}, r"methods\.shortgpt-2-4\.pattern: expected no such key, got 2:4"),
        (sparse(name="wandering"), {}, r"--method: expected one of magnitude, .*wanda, got wandering"),
        (sparse(pattern="3:5"), {}, r"--pattern: expected an M that divides the inputs .*, got 3:5 .* has 32"),
        (sparse({"axis": "depth"}), {}, r"wanda-unstructured\.settings\.axis: .*unknown key"),
        (sparse({"divisible-by": 8}), {}, r"settings\.divisible-by: .*unknown key"),
        (sparse({"layers": "0-9"}), {}, r"--layers: expected layers (from )?0 to 3, got 9"),
        (sparse({"modules": "fc3"}), {}, r"--modules: expected .*, got fc3"),
        (sparse({"allocation": "owl"}, pattern="2:4"), {}, r"--allocation: expected uniform with an N:M --pattern"),
        (sparse({"allocation": "owl", "owl-bound": 0.3}), {}, r"--owl-bound: expected .* less than 0\.25, got 0\.3"),
        (sparse({"allocation": "global"}, pattern="2:4"), {}, r"--allocation: expected uniform .*, got global"),
        (sparse({"allocation": "global", "least-kept": 0.6}), {}, r"--least-kept: expected at most 0\.5, got 0\.6"),
        (sparse({"module-ratio": ["fc2=0.3"]}, pattern="2:4"), {}, r"--module-ratio: .*or 0\.5, got 0\.3"),
        (sparse(), {"optimizer": "muon"}, r"--optimizer: expected adam or sgd.* that holds masks, got muon"),
        (sparse(), {"optimizer": "sgdd"}, r"recipe\.arguments: .*got argument --optimizer: invalid choice: 'sgdd'"),
        (sparse(), {"fp4-format": "e2m1"}, r"--fp4-format: expected"),
        (sparse(), {"wait-decay": 0.1}, r"recipe\.arguments: .*got unrecognized arguments: --wait-decay 0\.1"),
    ],
)  # fmt: skip
def test_refuses(prefixes, tmp_path: Path, method: dict, changes: dict[str, Any], message: str) -> None:
    content = made_up.mapping(prefixes, methods=[method])
    content["recipe"]["arguments"] |= changes
    with pytest.raises(UsageError, match=message):
        validate.check(schema.from_mapping(content), Places(tmp_path / "runs" / "made-up"))
    assert not (tmp_path / "runs").exists()


def test_scratch_under_masks_begins_with_other_weights_than_the_parent(prefixes, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    places = Places(Path("runs/made-up"))
    parent = {"pretrain": {"tokens": 2560, "arguments": made_up.SHAPE_FLAGS, "seed": 2}}
    study = made_up.study(prefixes, parent=parent, seeds=[1, 2], methods=METHODS[:2])
    validate.check(study, places)  # no scratch run is under masks
    study = made_up.study(prefixes, parent=parent, seeds=[1, 2], methods=METHODS[2:])
    with pytest.raises(UsageError, match="seeds: expected a seed other than the parent's.*, got 2"):
        validate.check(study, places)
    # The account of a parent that another study trained has its seed too.
    trained = made_up.run(made_up.study(prefixes, methods=METHODS[:1]), Path("runs"), made_up.FakeLauncher())
    account = json.loads(trained.account("parent").read_text())
    account["stream"]["corpora"] = [indexed.fingerprint(prefixes["train"])]
    trained.account("parent").write_text(json.dumps(account))
    parent = {"load": str(trained.checkpoint("parent"))}
    validate.check(made_up.study(prefixes, name="second", parent=parent, methods=METHODS[3:4]), places)
    with pytest.raises(UsageError, match="seeds: expected .*, got 1234"):
        study = made_up.study(prefixes, name="second", parent=parent, methods=METHODS[3:4], seeds=[1234])
        validate.check(study, places)


def test_a_dense_study_may_use_any_optimizer(prefixes, tmp_path: Path) -> None:
    content = made_up.mapping(prefixes, methods=METHODS[:1])
    content["recipe"]["arguments"] |= {"optimizer": "muon"}
    validate.check(schema.from_mapping(content), Places(tmp_path / "runs" / "made-up"))


def test_what_is_known_beforehand(prefixes, tmp_path: Path) -> None:
    study = made_up.study(prefixes, methods=METHODS)
    outlook = validate.check(study, Places(tmp_path / "runs" / "made-up"))
    assert all(outlook.targets[p.name] == outlook.source for p in prunings.prunings(study) if p.method.pattern)
    assert list(outlook.consumed(study).values()) == [128, 128, 128, 0, 0]


def test_outliers_are_counted_on_calibration_text(prefixes, tmp_path: Path, monkeypatch, capsys) -> None:
    """Whatever the method reads itself; the settings are words of ``sparsify``, and the text counts as tokens."""
    monkeypatch.chdir(tmp_path)
    plain = {"name": "magnitude", "pattern": "unstructured"}
    owl = plain | {"label": "outliers", "settings": {"allocation": "owl", "owl-bound": 0.1}}
    content = made_up.mapping(prefixes, methods=[plain, owl])
    outlook = validate.check(schema.from_mapping(content), Places(tmp_path / "runs" / "made-up"))
    assert [needs.text for needs in outlook.needs.values()] == [False, True]
    Path("study.yaml").write_text(json.dumps(content))
    assert study_main(["plan", "study.yaml", "--commands"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " sparsify " in line]
    assert ["--calibration-data-path" in line for line in lines] == [False, True]
    assert "--allocation owl --owl-bound 0.1" in lines[1]


def test_one_ranking_of_all_weights_is_a_setting_of_the_method(prefixes, tmp_path: Path, monkeypatch, capsys) -> None:
    """Magnitudes are ranked without text; Wanda reads the same text as without the ranking."""
    monkeypatch.chdir(tmp_path)
    methods = [
        {"name": name, "pattern": "unstructured", "settings": {"allocation": "global", "least-kept": 0.25}}
        for name in ("magnitude", "wanda")
    ]
    content = made_up.mapping(prefixes, methods=methods)
    outlook = validate.check(schema.from_mapping(content), Places(tmp_path / "runs" / "made-up"))
    assert [needs.text for needs in outlook.needs.values()] == [False, True]
    Path("study.yaml").write_text(json.dumps(content))
    assert study_main(["plan", "study.yaml", "--commands"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " sparsify " in line]
    assert ["--calibration-data-path" in line for line in lines] == [False, True]
    assert all("--allocation global --least-kept 0.25" in line for line in lines)
