"""Refusals of a study before anything runs, and the output of `study plan` and `study status`."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_prune import artifacts
from megatron_prune.cli.study_commands import study_main
from megatron_prune.data import contamination, indexed
from megatron_prune.errors import DataError, MegatronPruneError, UsageError
from megatron_prune.study import validate
from megatron_prune.study.analysis import results
from megatron_prune.study.outlook import Outlook
from megatron_prune.study.prunings import Places
from tests.study import made_up


def check(prefixes: dict[str, str], tmp_path: Path, **changes: Any) -> Outlook:
    return validate.check(made_up.study(prefixes, **changes), Places(tmp_path / "runs" / "made-up"))


def test_what_is_known_beforehand(prefixes, tmp_path: Path) -> None:
    outlook = check(prefixes, tmp_path)
    assert outlook.source is not None and outlook.source.num_layers == 4
    assert {name: shape.num_layers for name, shape in outlook.targets.items()} == {
        "shortgpt-r50-s1": 2, "minitron-width-r50-s1": 4
    }  # fmt: skip
    assert outlook.lay.parent_end == 160 and outlook.lay.parent_tokens == 2560
    grid = outlook.grid(made_up.study(prefixes))
    samples = {cell.id: str(cell.samples) for cell in grid.cells}
    assert samples["pruned-shortgpt-r50-s1-t1280"] == "160:240"
    # 2560 + 1280 + 8 calibration windows of 16 tokens, in batches of 128
    assert samples["scratch-L2h32H4G2d8F64-equal-total-t3968-s1"] == "0:248"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"budgets": [12_000]},
            r"data\.train is not enough for scratch-.*equal-total.* has 749 samples of 16 tokens in each of 1 epoch",
        ),
        ({"budgets": [60]}, r"budgets: expected at least half a global batch of 8 x 16 = 128 tokens, got 60"),
        ({"methods": [{"name": "wandering"}]}, r"--method: expected one of .*shortgpt.*, got wandering"),
        (
            {"methods": [{"name": "shortgpt", "settings": {"axis": "depth"}}]},
            r"settings\.axis: expected --method random with it",
        ),
        ({"methods": [{"name": "random"}]}, r"--axis: expected .*, got nothing"),
        ({"methods": [{"name": "shortgpt", "settings": {"divisible-by": "many"}}]}, r"divisible-by: .*whole number"),
        ({"ratios": [0.95]}, r"--ratio: expected .*, got 0\.95"),
        ({"methods": [{"name": "shortgpt", "target": {"num-layers": 9}}]}, r"--target-num-layers: expected .*, got 9"),
        ({"calibration": {"sequences": 999}}, r"calibration\.sequences: expected 1 to 124, got 999"),
        ({"evaluation": {"windows": 125}}, r"evaluation\.windows: expected 1 to 124, got 125"),
    ],
)
def test_refuses(prefixes, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((UsageError, DataError), match=message):
        check(prefixes, tmp_path, **changes)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits-load-dir": "/x"}, r"recipe\.arguments\.logits-load-dir: expected .*, got /x .*would train without"),
        ({"use-megatron-fsdp": True}, r"recipe\.arguments\.use-megatron-fsdp: .*could not resume"),
        (
            {"ckpt-format": "torch_dcp"},
            r"recipe\.arguments\.ckpt-format: expected .*, got torch_dcp .*could not resume",
        ),
        ({"fim-data": True}, r"recipe\.arguments\.fim-data: .*so it would have no effect"),
    ],
)
def test_refuses_flags_that_would_do_nothing(prefixes, tmp_path: Path, arguments, message: str) -> None:
    recipe = {"lr": 1e-3, "global_batch_size": 8, "micro_batch_size": 4}
    check(prefixes, tmp_path, recipe=recipe | {"arguments": dict.fromkeys(arguments, False) | {"bf16": False}})
    with pytest.raises(UsageError, match=message):
        check(prefixes, tmp_path, recipe=recipe | {"arguments": arguments})


def test_refuses_a_copy_of_the_training_text(prefixes, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(prefixes["train"] + suffix, tmp_path / f"copy{suffix}")
    data = prefixes | {"test": str(tmp_path / "copy")}
    with pytest.raises(DataError, match="data.test and data.train .*got the same tokens"):
        check(data, tmp_path)


def test_refuses_documents_of_the_training_text(prefixes, tmp_path: Path) -> None:
    corpus = indexed.open_indexed(prefixes["train"])
    builder = IndexedDatasetBuilder(str(tmp_path / "leak.bin"), dtype=np.uint16)
    for document in (*range(20, 0, -1), *range(40, 60)):
        builder.add_document(torch.from_numpy(corpus[document].astype(np.int64)), [100])
    builder.finalize(str(tmp_path / "leak.idx"))
    with pytest.raises(DataError, match="40 document.s. of .*leak are in .*train too"):
        check(prefixes | {"calibration": str(tmp_path / "leak")}, tmp_path)


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(("calibration", "validation", "test"), 2)))
def test_refuses_a_document_that_two_held_out_corpora_share(prefixes, tmp_path: Path, first: str, second: str) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "leak.bin"), dtype=np.uint16)
    for name, documents in ((second, range(20)), (first, [7])):
        corpus = indexed.open_indexed(prefixes[name])
        for document in documents:
            builder.add_document(torch.from_numpy(corpus[document].astype(np.int64)), [100])
    builder.finalize(str(tmp_path / "leak.idx"))
    with pytest.raises(
        DataError, match=rf"1 document.s. of .*leak are in .*{first} too .document 20 is its document 7"
    ):
        check(prefixes | {second: str(tmp_path / "leak")}, tmp_path)


def test_refuses_near_copies_of_the_training_text_when_asked_to(prefixes, tmp_path: Path) -> None:
    corpus = indexed.open_indexed(prefixes["train"])
    builder = IndexedDatasetBuilder(str(tmp_path / "near.bin"), dtype=np.uint16)
    for number in range(40):
        document = torch.from_numpy(corpus[number].astype(np.int64))
        document[50] = (document[50] + 1) % made_up.VOCABULARY
        builder.add_document(document, [100])
    builder.finalize(str(tmp_path / "near.idx"))
    data: dict[str, Any] = prefixes | {"calibration": str(tmp_path / "near")}
    check(data, tmp_path)
    check(data | {"max_near_duplicates": 1.0}, tmp_path)
    with pytest.raises(DataError, match="0 are in train .* and 40 nearly so"):
        check(data | {"max_near_duplicates": 0.01}, tmp_path)


def test_the_report_on_near_duplicates_is_kept_and_reused(prefixes, tmp_path: Path, monkeypatch) -> None:
    compared = []
    compare = contamination.compare
    monkeypatch.setattr(contamination, "compare", lambda *given: compared.append(given) or compare(*given))
    data: dict[str, Any] = prefixes | {"max_near_duplicates": 0.01}
    check(data, tmp_path)
    assert len(compared) == 6 and not (tmp_path / "runs").exists()  # as in the plan of a study that has not begun
    path = Places(tmp_path / "runs" / "made-up").overlap
    path.parent.mkdir(parents=True)
    for calls in (12, 12):
        check(data, tmp_path)
        assert len(compared) == calls
    report = artifacts.read_json(path)
    assert report["accepted"] and len(report["pairs"]) == 6
    assert report["corpora"]["train"] == [indexed.fingerprint(prefixes["train"])]
    check(data | {"max_near_duplicates": 0.02}, tmp_path)  # other arguments
    assert len(compared) == 18
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{prefixes['train']}{suffix}", tmp_path / f"copy{suffix}")
    check(data | {"max_near_duplicates": 0.02, "train": str(tmp_path / "copy")}, tmp_path)  # the same text elsewhere
    assert len(compared) == 18
    other = tmp_path / "other"
    other.mkdir()
    near = made_up.corpora(other, train=12_100)  # one document more before them: the others are new
    check(data | {"max_near_duplicates": 0.02, "test": near["test"]}, tmp_path)
    assert len(compared) == 24


def test_refuses_tokens_that_the_model_has_no_embedding_for(prefixes, tmp_path: Path) -> None:
    for sizes in ({"padded-vocab-size": 64, "vocab-size": 64}, {"vocab-size": 64}):  # the rest is padding
        arguments = made_up.SHAPE_FLAGS | sizes
        with pytest.raises(DataError, match="expected token ids up to 63"):
            check(prefixes, tmp_path, parent={"pretrain": {"tokens": 2560, "arguments": arguments}})


def test_a_missing_corpus_is_named(prefixes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere.bin does not exist"):
        check(prefixes | {"validation": str(tmp_path / "nowhere")}, tmp_path)


@pytest.fixture
def trained(prefixes, tmp_path: Path, monkeypatch) -> Path:
    """A parent that another study has trained: its checkpoint, with an account next to it."""
    monkeypatch.chdir(tmp_path)
    made_up.run(made_up.study(prefixes), Path("runs"), made_up.FakeLauncher())
    return Path("runs/made-up/cells/parent/checkpoint")


def load(path: Path, **more: Any) -> dict[str, Any]:
    return {"name": "second", "parent": {"load": str(path), **more}}


def test_a_loaded_parent_is_accounted_by_its_account(prefixes, trained: Path, tmp_path: Path) -> None:
    outlook = check(prefixes, tmp_path, **load(trained))
    assert outlook.lay.parent_end == 160 and outlook.lay.parent_tokens == 2560
    with pytest.raises(UsageError, match=r"declared_tokens: expected 2560.*, got 99"):
        check(prefixes, tmp_path, **load(trained, declared_tokens=99))
    data = prefixes | {"seq_length": 16, "stream_seed": 7}
    with pytest.raises(UsageError, match="stream seed 7.*would overlap what the parent was trained on"):
        check(prefixes, tmp_path, data=data, **load(trained))


def test_a_loaded_iteration_has_the_account_of_its_run(prefixes, trained: Path, tmp_path: Path) -> None:
    assert check(prefixes, tmp_path, **load(trained / "release")).lay.parent_tokens == 2560
    (trained / "release").rename(trained / "iter_0000010")
    with pytest.raises(UsageError, match=r"parent\.load: expected iteration 20.*, got iteration 10 of .*checkpoint"):
        check(prefixes, tmp_path, **load(trained / "iter_0000010"))
    (trained / "iter_0000010").rename(trained / "iter_0000020")
    plan = check(prefixes, tmp_path, **load(trained / "iter_0000020")).grid(made_up.study(prefixes, **load(trained)))
    assert {c.not_run for c in plan.comparisons if c.not_run} == {
        "parent.equal_total does not say that a scratch run on the parent's 2,560 tokens is to be made"
    }
    study = made_up.study(prefixes, **load(trained / "iter_0000020", equal_total="run"), methods=[{"name": "shortgpt"}])
    found = results.collect(made_up.run(study, Path("runs"), made_up.FakeLauncher()))
    assert len(found.compared) == 2 and all(item.status == "finished" for item in found.compared)
    for item in found.compared:  # equal total ran, since its tokens are accounted, and no range was seen before
        assert {line.field: line.verdict for line in item.match}["range against the parent's"] == "disjoint"


def test_an_outside_parents_tokens_are_only_declared(prefixes, tmp_path: Path) -> None:
    trained = made_up.foreign(tmp_path / "elsewhere")
    outlook = check(prefixes, tmp_path, **load(trained, declared_tokens="2T"))
    assert outlook.lay.parent_end == 0 and outlook.lay.parent_tokens == 2 * 10**12
    study = made_up.study(prefixes, **load(trained, declared_tokens="2T"))
    assert [c.scratch is None for c in outlook.grid(study).comparisons] == [False, True, False, True]
    with pytest.raises(DataError, match="data.train is not enough for scratch-"):
        check(prefixes, tmp_path, **load(trained, declared_tokens="2M", equal_total="run"))


def test_an_imported_parent_has_a_shape_once_it_is_imported(
    prefixes, tiny_hf, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    parent = {"import_hf": str(tiny_hf("llama-gqa", layers=4)), "declared_tokens": "2T"}
    methods = [{"name": "shortgpt"}, {"name": "minitron-width", "settings": {"divisible-by": 8}}]
    study = made_up.study(prefixes, parent=parent, methods=methods)
    Path("study.yaml").write_text(yaml.safe_dump(made_up.mapping(prefixes, parent=parent, methods=methods)))
    study_main(["plan", "study.yaml"])  # its config says the shape
    printed = capsys.readouterr().out
    assert "scratch-L2h96H12G6d12F192-equal-training-t1280-s1" in printed
    assert "the parent is not there yet: its shape is what the config of" in printed
    assert "not run: equal-total for pruned-shortgpt-r50-s1-t1280" in printed
    elsewhere = made_up.mapping(prefixes, parent=parent | {"import_hf": "not/here"}, methods=methods)
    Path("elsewhere.yaml").write_text(yaml.safe_dump(elsewhere))
    study_main(["plan", "elsewhere.yaml"])
    printed = capsys.readouterr().out
    assert "not known yet" in printed and "scratch-as-shortgpt-r50-equal-training" in printed
    assert "the parent's shape will be known after its import" in printed
    launcher = made_up.FakeLauncher()
    places = made_up.run(study, Path("runs"), launcher)
    assert launcher.commands[0].argv[:2] == ("convert", "import")
    cells = {path.name for path in (places.root / "cells").iterdir()}
    assert "scratch-L2h96H12G6d12F192-equal-training-t1280-s1" in cells
    assert not [cell for cell in cells if "equal-total" in cell]


def test_plan_and_status_print_every_cell(prefixes, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(yaml.safe_dump(made_up.mapping(prefixes)))
    assert study_main(["plan", "study.yaml", "--commands"]) == 0
    printed = capsys.readouterr().out
    assert not Path("runs").exists()
    for words in (
        "pruned-minitron-width-r50-s1-t1280",
        "160:240",
        "megatron_prune pretrain --pretrained-checkpoint runs/made-up/cells/pruning-shortgpt-r50-s1/checkpoint",
        "--num-layers 2",  # scratch of half of the layers
        "--stream-range 0:248",
        "--lr-decay-style cosine --lr-warmup-fraction 0.05",
        "together",
    ):
        assert words in printed, words
    study_main(["status", "study.yaml"])
    assert "nothing has been run" in capsys.readouterr().out
    study = made_up.study(prefixes)
    with pytest.raises(made_up.Killed):
        made_up.run(study, Path("runs"), made_up.FakeLauncher(kill_at=10))
    study_main(["status", "study.yaml"])
    printed = capsys.readouterr().out
    rows = {words[1]: line for line in printed.splitlines() if len(words := line.split()) > 2 and words[0] == "│"}
    assert "finished" in rows["parent"]
    assert any("1 of 2 stages" in line for cell, line in rows.items() if cell.startswith("scratch"))


@pytest.mark.parametrize("argv", [["report", "study.yaml"], ["run", "nowhere.yaml"]])
def test_command_refuses(prefixes, tmp_path: Path, monkeypatch, argv: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(yaml.safe_dump(made_up.mapping(prefixes)))
    with pytest.raises(MegatronPruneError, match="study that has begun|nowhere.yaml"):
        study_main(argv)
