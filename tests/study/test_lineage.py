"""The whole lineage of a parent: stages add up, links are checked, unknown parts are named.

Forgeries and mistakes, each of which a study must refuse by name or detect. Checkpoints are real and tiny; their
trainings are made up (``made_up``).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_prune import artifacts
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.cli.study_commands import study_main
from megatron_prune.data import indexed
from megatron_prune.errors import AccountError, DataError, UsageError
from megatron_prune.structured import apply
from megatron_prune.study import estimate, outlook, prunings, validate
from megatron_prune.study.analysis import results
from megatron_prune.study.analysis import results as origins
from megatron_prune.study.evidence import Ledger
from megatron_prune.study.prunings import Places
from megatron_prune.study.report import page
from megatron_prune.training import lineage
from tests.study import made_up

BATCH = 8
LENGTH = 16
TOKENS = BATCH * LENGTH  # of a step


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return made_up.corpora(tmp_path_factory.mktemp("corpora"), train=24_000)


pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


def train(
    save: str, prefix: str, steps: int, *, first: int = 0, source: Path | None = None, **changes: Any
) -> Path:  # fmt: skip
    """A finished training of ``steps``, from random weights or from ``source``, on samples from ``first`` on."""
    folder = Path(save)
    given = {
        "data_path": prefix, "stream_range": f"{first}:{first + steps * BATCH}", "stream_seed": "1",
        "stream_epochs": "1", "seq_length": str(LENGTH), "global_batch_size": str(BATCH), "micro_batch_size": "4",
        "seed": "1234", "lr": "0.001", "min_lr": "0.0001", "weight_decay": "0.1", "lr_decay_style": "cosine",
        "lr_warmup_fraction": "0.05", "save": save,
        **{name.replace("-", "_"): str(value) for name, value in made_up.SHAPE_FLAGS.items()},
    }  # fmt: skip
    steps_done = f"iter_{steps:07d}"
    if source is None:
        made_up._write_parent(folder, given)
        (folder / "release").rename(folder / steps_done)
        (folder / "latest_checkpointed_iteration.txt").write_text(str(steps))
    else:
        folder.mkdir()
        made_up.write_weights(folder, str(source), steps)
    made = made_up.account(given, open_checkpoint(folder).shape)
    if source is not None:
        made_up.begins_with(made, source)
    args, shape = open_checkpoint(folder).args, (name.replace("-", "_") for name in made_up.SHAPE_FLAGS)
    made["arguments"] |= {name: args.get(name) for name in shape} | changes.pop("arguments", {})
    made_up.write_losses(folder, made, [made_up.number(save, step) for step in range(steps)])
    artifacts.write_json(folder / "account.json", made | {"final": made_up.weights_of(folder)} | changes)
    return folder


def prune(parent: Path, save: str) -> Path:
    """Half of the layers of ``parent``, without any text."""
    from megatron_prune.cli.pruning_commands import apply_main, plan_main

    plan_main(["--load", str(parent), "--method", "random", "--axis", "depth", "--ratio", "0.5", "--seed", "1",
                       "--output", f"{save}.json"])  # fmt: skip
    apply_main(["--load", str(parent), "--plan", f"{save}.json", "--save", save])
    return Path(save)


def study(prefixes: dict[str, str], path: Path, data: dict[str, Any] | None = None, **changes: Any) -> Any:
    own = {"load": str(path), **changes.pop("parent", {})}
    extra = {"data": {**prefixes, "seq_length": LENGTH, **(data or {})}} if data else {}
    return made_up.study(prefixes, **{"methods": [{"name": "shortgpt"}], "parent": own, **extra, **changes})


def check(made: Any) -> outlook.Outlook:
    return validate.check(made, Places(Path("runs") / made.name))


def change(path: Path, **changes: Any) -> None:
    artifacts.write_json(path, artifacts.read_json(path) | changes)


def said(found: results.Results) -> str:
    return " ".join(page.render(found, []).split())


# ------------------------------------------------------------------ stages


def test_all_stages_of_a_parent_are_counted(prefixes) -> None:
    first = train("first", prefixes["train"], 20)
    second = train("second", prefixes["train"], 10, first=160, source=first)
    shutil.rmtree(first)  # the second one's account has it all
    made = study(prefixes, second, parent={"equal_total": "run"})
    lay = check(made).lay
    flops = open_checkpoint(second).shape.training_flops(LENGTH)
    assert (lay.parent_tokens, lay.parent_end) == (30 * TOKENS, 240)
    assert (lay.parent_flops, lay.declared) == (240 * flops, 0)
    found = results.collect(made_up.run(made, Path("runs"), made_up.FakeLauncher()))
    assert [item.status for item in found.compared] == ["finished"] * 2
    scratch = found.rows[-1]
    assert scratch["tokens_total"] == (30 + 10 + 1) * TOKENS  # parent, retraining, calibration
    assert found.rows[1]["tokens_total"] == scratch["tokens_total"] and found.rows[0]["tokens_total"] == 30 * TOKENS
    assert "Behind the parent are 2 stages, all of them counted: a training on 2,560 tokens, then" in said(found)
    with pytest.raises(
        UsageError, match=r"declared_tokens: expected 3840, the sum in the accounts of its 2 stage.*, got 99"
    ):
        check(study(prefixes, second, parent={"declared_tokens": 99}))


def test_a_pruned_parent_that_was_trained_on_counts_what_was_before_the_pruning(prefixes) -> None:
    first = train("first", prefixes["train"], 20)
    pruned = prune(first, "pruned")
    again = train("again", prefixes["train"], 5, first=160, source=pruned)
    stages = lineage.of(open_checkpoint(again))
    assert [stage["kind"] for stage in stages] == ["trained", "pruned", "trained"]
    small, large = (open_checkpoint(path).shape.training_flops(LENGTH) for path in (pruned, first))
    assert lineage.flops(stages) == 160 * large + 40 * small
    for parent, tokens in ((pruned, 20 * TOKENS), (again, 25 * TOKENS)):
        assert check(study(prefixes, parent)).lay.parent_tokens == tokens
    with pytest.raises(AccountError, match="pruned holds the weights .* the files next to it say that x were written"):
        change(pruned / "release" / "pruning.json", fingerprint="x")
        lineage.of(open_checkpoint(pruned))


def test_an_earlier_iteration_counts_its_own_steps(prefixes) -> None:
    parent = train("parent", prefixes["train"], 20)
    (parent / "iter_0000020").rename(parent / "iter_0000005")
    (stage,) = lineage.of(open_checkpoint(parent / "iter_0000005"))
    assert (stage["steps"], stage["tokens"], stage["range"]) == (5, 5 * TOKENS, [0, 160])


def test_a_rewritten_checkpoint_keeps_its_account(prefixes) -> None:
    parent = train("parent", prefixes["train"], 20)
    apply.rewrite(parent, "rewritten")
    assert lineage.tokens(lineage.of(open_checkpoint("rewritten"))) == 20 * TOKENS


def test_what_is_declared_comes_before_what_is_accounted(prefixes) -> None:
    origin = made_up.foreign(Path("elsewhere"))
    second = train("second", prefixes["train"], 10, source=origin)
    assert check(study(prefixes, second)).lay.parent_tokens is None
    lay = check(study(prefixes, second, parent={"declared_tokens": 12_800})).lay
    assert (lay.parent_tokens, lay.parent_end, lay.declared) == (12_800 + 10 * TOKENS, 80, 12_800)
    one = open_checkpoint(origin).shape.training_flops(LENGTH)
    assert (lay.parent_flops, lay.declared_flops) == (880 * one, 800 * one)
    pruned = prune(origin, "pruned")  # the declared tokens were spent on the larger shape
    assert check(study(prefixes, pruned, parent={"declared_tokens": 12_800})).lay.parent_flops == 800 * one
    made = study(prefixes, second, parent={"declared_tokens": 12_800, "equal_total": "run"})
    found = results.collect(made_up.run(made, Path("runs"), made_up.FakeLauncher()))
    total = {line.field: line for line in found.compared[1].match}["total tokens"]
    assert "(the parent's are declared)" in total.pruned and found.rows[0]["tokens_declared"] is True


def test_declared_tokens_count_at_the_shape_that_read_them(prefixes) -> None:
    """Imported, trained on, pruned, retrained, pruned: what was declared was spent before the first pruning."""
    origin = made_up.foreign(Path("elsewhere"))
    second = train("second", prefixes["train"], 10, source=origin)
    once = prune(second, "once")
    again = train("again", prefixes["train"], 5, first=80, source=once)
    twice = prune(again, "twice")
    large, middle, small = (open_checkpoint(path).shape.training_flops(LENGTH) for path in (origin, once, twice))
    assert large > middle > small
    own = {once: 80 * large, again: 80 * large + 40 * middle, twice: 80 * large + 40 * middle}
    sparse = [{"name": "wanda", "pattern": "2:4"}]
    for parent, executed in own.items():
        lay = check(study(prefixes, parent, parent={"declared_tokens": 3_200}, methods=sparse)).lay
        assert (lay.declared_flops, lay.parent_flops) == (200 * large, 200 * large + executed), parent
    made = study(prefixes, twice, parent={"declared_tokens": 3_200, "equal_total": "run"}, settings=["equal-flops"],
                 methods=sparse)  # fmt: skip
    found = results.collect(made_up.run(made, Path("runs"), made_up.FakeLauncher()))
    sequence = open_checkpoint(twice).shape.training_flops(LENGTH)
    total = 280 * large + 40 * middle + 80 * sequence
    assert 0 <= found.rows[-1]["flops_total"] - total - 10**9 <= BATCH * sequence  # the last term: the pruning's


def learned_on(parent: Path, save: str, prefix: str, steps: int, first: int) -> Path:
    """``parent`` cut by masks that were learned on samples from ``first`` on."""
    masks = train(f"{save}-masks", prefix, steps, first=first, source=parent)
    folder = prune(parent, save)
    path = open_checkpoint(folder).directory / "pruning.json"
    (*chain, entry) = artifacts.read_json(path)["chain"]
    stage = lineage.trained(artifacts.read_json(masks / "account.json"), run=str(masks), end="masked")
    spent = {"tokens": stage["tokens"], "flops": stage["flops"], "learned": stage}
    change(path, chain=[*chain, entry | spent])
    return folder


def test_what_a_parents_masks_were_learned_on_was_seen(prefixes) -> None:
    """By where retraining begins, by which text is compared, and by whether the masks' run has finished."""
    first = train("first", prefixes["train"], 20)
    parent = learned_on(first, "cut", prefixes["train"], 5, first=320)
    lay = check(study(prefixes, parent)).lay
    assert (lay.parent_tokens, lay.parent_end) == (25 * TOKENS, 360)
    made = study(prefixes, parent, parent={"equal_total": "run"}, settings=["equal-total"])
    found = results.collect(made_up.run(made, Path("runs"), made_up.FakeLauncher()))
    fields = {line.field: line for line in found.compared[0].match}
    assert fields["range against cut-masks's"].scratch == "320:360"
    other = corpus("other", other_documents())
    for name in ("validation", "test", "train"):
        elsewhere = learned_on(train(f"{name}-0", other, 2), f"{name}-cut", prefixes[name], 2, first=0)
        with pytest.raises((DataError, UsageError), match=f"of data.{name} .*behind the parent, read|the stream of"):
            check(study(prefixes, elsewhere, data={"stream_seed": 2}))


# ------------------------------------------------------------------ forgeries


def _unfit_link(first: Path, second: Path) -> None:
    account = artifacts.read_json(second / "account.json")
    account["lineage"][0]["end"] = "other weights"
    artifacts.write_json(second / "account.json", account)


def _no_account(first: Path, second: Path) -> None:
    (second / "account.json").unlink()


def _no_lineage(first: Path, second: Path) -> None:
    account = artifacts.read_json(second / "account.json")
    del account["lineage"]
    artifacts.write_json(second / "account.json", account)


def _a_stage_without_tokens(first: Path, second: Path) -> None:
    account = artifacts.read_json(second / "account.json")
    account["lineage"][0]["tokens"] = None
    artifacts.write_json(second / "account.json", account)


def _not_finished(first: Path, second: Path) -> None:
    account = artifacts.read_json(second / "account.json")
    account["lineage"][0]["complete"] = False
    artifacts.write_json(second / "account.json", account)


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (
            _unfit_link,
            r"second: its stages do not fit together: .*second began with the weights \w+, .*first before it",
        ),
        (_no_account, r"second: its stored arguments say that it was trained here .*account\.json is missing"),
        (
            _no_lineage,
            r"account\.json is damaged: lineage: expected this key, got nothing",
        ),
        (_a_stage_without_tokens, r"lineage.0.trained.tokens: expected a valid integer, got None"),
        (_not_finished, r"parent\.load: expected a run whose account is complete, got second"),
    ],
)
def test_a_forged_lineage_is_refused(prefixes, forge: Any, message: str) -> None:
    first = train("first", prefixes["train"], 20)
    second = train("second", prefixes["train"], 10, first=160, source=first)
    check(study(prefixes, second))
    forge(first, second)
    for declared in ({}, {"declared_tokens": "1M", "declared_unseen": "I say so"}):
        with pytest.raises((AccountError, UsageError), match=message):
            check(study(prefixes, second, parent=declared))


def test_a_pruned_checkpoint_without_its_provenance_was_still_trained_here(prefixes) -> None:
    pruned = prune(train("first", prefixes["train"], 20), "pruned")
    (pruned / "release" / "pruning.json").unlink()
    with pytest.raises(AccountError, match=r"pruned: its stored arguments say that it was trained here"):
        check(study(prefixes, pruned))


FORGED = {"kind": "pruned", "run": "x", "start": None, "end": None, "tokens": 9, "flops": 0, "method": "m",
          "source": {}}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 1280}, "lineage: tokens of .*parent is 1280 now, pruned-shortgpt-r50-s1-t1280 began with 2560"),
        ({"lineage": [FORGED]},
         "stages do not fit together"),
    ],
)  # fmt: skip
def test_a_parent_that_was_changed_after_the_study_is_named(prefixes, changes: dict[str, Any], message: str) -> None:
    parent = train("parent", prefixes["train"], 20)
    places = made_up.run(study(prefixes, parent), Path("runs"), made_up.FakeLauncher())
    results.collect(places)
    change(parent / "account.json", **changes)
    with pytest.raises(AccountError, match=message):
        results.collect(places)


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (lambda stages: stages[:1], "lineage: pruned-shortgpt-r50-s1-t1280: its stages do not fit together|holds the"),
        (lambda stages: [stages[0] | {"range": [0, 80]}, stages[1]], r"lineage: range of .* is \[0, 160\] now"),
        (lambda stages: [stages[0], stages[1] | {"start": "x"}], "stages do not fit together"),
    ],
)
def test_a_pruned_account_with_another_lineage_is_refused(prefixes, forge: Any, message: str) -> None:
    parent = train("parent", prefixes["train"], 20)
    places = made_up.run(study(prefixes, parent), Path("runs"), made_up.FakeLauncher())
    path = places.account("pruned-shortgpt-r50-s1-t1280")
    change(path, lineage=forge(artifacts.read_json(path)["lineage"]))
    with pytest.raises(AccountError, match=message):
        results.collect(places)


# ------------------------------------------------------------------ the parent's recipe


def test_a_parent_of_another_recipe_is_named_at_the_head_of_the_report(prefixes) -> None:
    recipe = {"lr": 2e-3, "adam_beta2": 0.95, "bf16": True, "clip_grad": 0.5, "recompute_granularity": "full"}
    parent = train("parent", prefixes["train"], 20, arguments=recipe)
    made = study(prefixes, parent, parent={"equal_total": "run"})
    found = results.collect(made_up.run(made, Path("runs"), made_up.FakeLauncher()))
    by_setting = {item.comparison.setting: {line.field: line for line in item.match} for item in found.compared}
    assert not [field for field in by_setting["equal-training"] if "recipe" in field]  # its tokens do not count there
    lines = by_setting["equal-total"]
    of = {field.rpartition(": ")[2]: line for field, line in lines.items() if "recipe" in field}
    named = {key: (line.pruned, line.scratch) for key, line in of.items()}
    assert named == {
        "lr": (2e-3, 1e-3), "adam_beta2": (0.95, "not set"), "bf16": (True, "not set"), "clip_grad": (0.5, "not set"),
        "other arguments": ("recompute_granularity full", "recompute_granularity not set"),
    }  # fmt: skip
    head = said(found).split("<h2>Verdicts")[0]
    for words in ("as its own recipe spent them", "lr 0.002 against 0.001", "adam_beta2 0.95 against not set"):
        assert words in head


def test_a_parent_of_the_same_recipe_is_not_spoken_of(prefixes) -> None:
    found = results.collect(made_up.run(made_up.study(prefixes), Path("runs"), made_up.FakeLauncher()))
    assert "own recipe" not in said(found) and "Behind the parent" not in said(found)


def test_tokens_of_another_tokenizer_are_not_added_up(prefixes) -> None:
    parent = train("parent", prefixes["train"], 20, arguments={"tokenizer_type": "TikTokenizer"})
    made = study(prefixes, parent, parent={"equal_total": "run"})
    with pytest.raises(AccountError, match="recipe of the parent: tokenizer_type: TikTokenizer .* not the same unit"):
        results.collect(made_up.run(made, Path("runs"), made_up.FakeLauncher()))


# ------------------------------------------------------------------ seen text


def corpus(name: str, documents: list[np.ndarray]) -> str:
    builder = IndexedDatasetBuilder(f"{name}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(torch.from_numpy(document.astype(np.int64)), [len(document)])
    builder.finalize(f"{name}.idx")
    return name


def other_documents(seed: int = 9) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, made_up.VOCABULARY, (60, 100)))


def test_a_parent_of_another_corpus_is_compared_document_by_document(prefixes) -> None:
    parent = train("parent", corpus("other", other_documents()), 20)
    made = study(prefixes, parent, parent={"equal_total": "run"})
    lay = check(made).lay
    assert (lay.parent_tokens, lay.parent_end) == (20 * TOKENS, 0)  # counted, and none of the study's samples is seen
    found = results.collect(made_up.run(made, Path("runs"), made_up.FakeLauncher()))
    assert [item.status for item in found.compared] == ["finished"] * 2
    assert "other corpora" in {line.field: line.verdict for line in found.compared[0].match}["text of the parent"]


@pytest.mark.parametrize("name", ["train", "test"])
def test_a_parent_that_has_read_a_document_of_the_study_is_refused(prefixes, name: str) -> None:
    opened = indexed.open_indexed(prefixes[name])
    leaked = np.array(opened[7])
    parent = train("parent", corpus("other", [*other_documents(), leaked]), 20)
    for declared in ({}, {"declared_unseen": "I say so"}):
        with pytest.raises(
            DataError, match=rf"1 document\(s\) of data\.{name} .* are in other, .*document 7 is its doc"
        ):
            check(study(prefixes, parent, parent=declared))


def test_a_parent_whose_corpus_is_gone_needs_a_word_that_the_report_prints(prefixes) -> None:
    parent = train("parent", corpus("other", other_documents()), 20)
    Path("other.bin").unlink()
    with pytest.raises(
        UsageError, match=r"parent\.declared_unseen: expected .*, got nothing .*its corpus other is not there any"
    ):
        check(study(prefixes, parent))
    corpus("other", other_documents(seed=10))
    with pytest.raises(
        UsageError, match=r"parent\.declared_unseen: expected .*, got nothing .*other is another corpus now"
    ):
        check(study(prefixes, parent))
    made = study(prefixes, parent, parent={"declared_unseen": "it ends in 2019, data.train begins in 2024."})
    found = results.collect(made_up.run(made, Path("runs"), made_up.FakeLauncher()))
    words = "seen no text of this study is declared, not accounted: it ends in 2019, data.train begins in 2024."
    assert words in said(found)


def test_the_same_corpus_in_another_order_is_refused(prefixes) -> None:
    parent = train("parent", prefixes["train"], 20)
    with pytest.raises(UsageError, match="stream seed 7.*would overlap what the parent was trained on"):
        check(study(prefixes, parent, data={"stream_seed": 7}))


def test_what_a_foreign_parent_has_seen_is_said_to_be_unknown(prefixes) -> None:
    made = study(prefixes, made_up.foreign(Path("elsewhere")))
    found = results.collect(made_up.run(made, Path("runs"), made_up.FakeLauncher()))
    assert "whether it has seen text of this study is not known" in said(found)


# ------------------------------------------------------------------ ranges of every cell


def test_epochs_that_pretrain_would_refuse_are_refused_before_the_parent_is_paid_for(prefixes, tmp_path: Path) -> None:
    small = made_up.corpora(tmp_path, train=4_000)  # 249 samples an epoch
    data = {**small, "seq_length": LENGTH, "epochs": 2}
    fits = made_up.study(small, data=data, budgets=[640])
    check(fits)
    crossing = made_up.study(small, data=data, budgets=[640, 1536])  # 160:256
    with pytest.raises(DataError, match=r"pruned-\S+-t1536, samples 160:256: .*different epochs of one stream"):
        check(crossing)
    assert not Path("runs").exists()


# ------------------------------------------------------------------ chains that retrain


CHAIN: dict[str, Any] = {
    "chain": [
        {"name": "shortgpt", "ratio": 0.5, "retrain": 640},
        {"name": "minitron-width", "ratio": 0.25, "settings": {"divisible-by": 8}, "retrain": 256},
        {"name": "wanda", "pattern": "2:4"},
    ]
}
FIRST, SECOND = "retrained-shortgpt-r50-s1-t640", "retrained-shortgpt-r50-t640-then-minitron-width-r25-s1-t256"
LAST = "shortgpt-r50-t640-then-minitron-width-r25-t256-then-wanda-2-4-r50-s1"


@pytest.fixture(scope="module")
def chained(prefixes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a study of a chain that retrains twice, and of its first method alone, has been run."""
    folder = tmp_path_factory.mktemp("chained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        made_up.run(chain_study(prefixes), Path("runs"), made_up.FakeLauncher())
    return folder


def chain_study(prefixes: dict[str, str], **changes: Any) -> Any:
    settings = ["equal-training", "equal-total", "equal-flops"]
    asked = {"methods": [{"name": "shortgpt"}, CHAIN], "settings": settings, "scratch": ["dense"]}
    return made_up.study(prefixes, **{**asked, **changes})


@pytest.fixture
def places(chained: Path, tmp_path: Path) -> Places:
    shutil.copytree(chained, tmp_path, dirs_exist_ok=True)
    return Places(Path("runs/made-up"))


def test_no_sample_is_seen_twice_by_a_chain_and_all_are_counted(prefixes, places: Places) -> None:
    records = Ledger(places.ledger).read()
    assert [cell for cell, record in records.items() if record["kind"] == "retrained"] == [FIRST, SECOND]
    last = f"pruned-{LAST}-t1280"
    ranges = [records[cell]["range"] for cell in ("parent", FIRST, SECOND, last)]
    assert ranges == [[0, 160], [160, 200], [200, 216], [216, 296]]
    assert records["pruned-shortgpt-r50-s1-t1280"]["range"] == [160, 240]
    made_of = [
        records[cell]["made_of"] for cell in (FIRST, f"pruning-{SECOND[10:-5]}", SECOND, f"pruning-{LAST}", last)
    ]
    left = [records[cell]["fingerprint"] for cell in ("pruning-shortgpt-r50-s1", FIRST, f"pruning-{SECOND[10:-5]}",
                                                      SECOND, f"pruning-{LAST}")]  # fmt: skip
    assert made_of == left and len(set(left)) == 5

    found = results.collect(places)
    rows = {(row["arm"], row["setting"]): row for row in found.rows if row["method"] != "shortgpt"}
    pruned, read = rows["pruned", "equal-total"], 3 * TOKENS  # each link reads calibration text
    assert pruned["method"] == "shortgpt 50% + 640 tokens + minitron-width 25% + 256 tokens + wanda"
    assert pruned["tokens_pruning"] == 640 + 256 + read
    assert pruned["tokens_total"] == 2560 + 640 + 256 + 1280 + read == rows["scratch", "equal-total"]["tokens_total"]
    assert rows["scratch", "equal-training"]["tokens_total"] == 1280
    shapes = [open_checkpoint(places.checkpoint(f"pruning-{name}")).shape for name in
              ("shortgpt-r50-s1", "shortgpt-r50-t640-then-minitron-width-r25-s1")]  # fmt: skip
    between = 40 * shapes[0].training_flops(LENGTH) + 16 * shapes[1].training_flops(LENGTH)
    assert records[FIRST]["flops"] + records[SECOND]["flops"] == between
    calibrations = [record["flops"] for record in records.values() if record["kind"] == "calibration"]
    assert pruned["flops_pruning"] == between + sum(calibrations) + 10**9
    assert pruned["flops_total"] == records["parent"]["flops"] + pruned["flops_pruning"] + pruned["flops_train"]
    scratch = rows["scratch", "equal-flops"]
    one_step = scratch["flops_train"] // (scratch["tokens_train"] // TOKENS)
    assert 0 <= scratch["flops_total"] - pruned["flops_total"] < one_step
    assert all(item.status == "finished" for item in found.compared)
    (item,) = [c for c in found.compared if c.comparison.setting == "equal-total" and c.comparison.pruning.base]
    lines = {line.field: line for line in item.match}
    assert lines["lineage"].pruned == (
        "trained on 2,560 → shortgpt → trained on 640 → minitron-width → trained on 256 → wanda"
    )
    assert lines["total tokens"].pruned.endswith("384 pruning + 896 retraining between prunings")


def test_a_chain_that_was_killed_ends_with_the_same_records(prefixes, places: Places) -> None:
    def lines(where: Places) -> dict[str, Any]:
        found = Ledger(where.ledger).read()
        return {
            cell: {k: v for k, v in record.items() if k not in ("seconds", "artifacts")}
            for cell, record in found.items()
        }

    killed = made_up.run_killed(chain_study(prefixes), Path("killed"))
    assert lines(killed) == lines(places)
    again = made_up.FakeLauncher()
    made_up.run(chain_study(prefixes, retention="none"), Path("killed"), again)
    assert not again.commands
    assert open_checkpoint(killed.checkpoint(SECOND)).names  # other prunings can still start from it


def test_the_plan_of_a_chain_shows_and_prices_its_retrainings(prefixes, capsys) -> None:
    made = chain_study(prefixes)
    cells = {one.cell: one for one in estimate.of_study(made, check(made))}
    order = list(cells)
    assert cells[FIRST].tokens == 640 and cells[FIRST].flops and cells[FIRST].after == ("pruning-shortgpt-r50-s1",)
    calibration = "calibration-shortgpt-r50-s1-t640"
    assert cells[calibration].after == (FIRST,)
    assert cells[f"pruning-{SECOND[10:-5]}"].after == (FIRST, calibration)
    for cell, one in cells.items():
        assert all(order.index(name) < order.index(cell) for name in one.after), cell
    content = made_up.mapping(prefixes, methods=[CHAIN], launch={"launcher": "slurm"})
    Path("study.yaml").write_text(yaml.safe_dump(content))
    study_main(["plan", "study.yaml", "--scripts", "--commands"])
    printed = capsys.readouterr().out
    assert "--stream-range 160:200" in printed and "--stream-range 200:216" in printed and FIRST in printed
    script = Path(f"runs/made-up/cells/{FIRST}/job.sh").read_text()
    assert "pretrain" in script and "pruning-shortgpt-r50-s1" in script
    known = json.loads(Path(f"runs/made-up/cells/{calibration}/cell.json").read_text())
    assert f"runs/made-up/cells/{FIRST}/checkpoint" in known["stages"][0]["argv"]


def test_masks_of_an_earlier_link_are_held_while_it_is_retrained(prefixes) -> None:
    chain = [{"name": "wanda", "pattern": "2:4", "retrain": 256}, {"name": "shortgpt", "ratio": 0.5}]
    made = made_up.study(prefixes, methods=[{"chain": chain}], settings=["equal-training"])
    launcher = made_up.FakeLauncher()
    places = made_up.run(made, Path("runs"), launcher)
    cell = "retrained-wanda-2-4-r50-s1-t256"
    (argv,) = [c.argv for c in launcher.commands if c.stage == "pretrain" and str(places.checkpoint(cell)) in c.argv]
    assert made_up.words(list(argv[1:]))["masks"] == str(places.checkpoint("pruning-wanda-2-4-r50-s1") / "masks")
    assert artifacts.read_json(places.account(cell))["masks"]
    assert all(item.status == "finished" for item in results.collect(places).compared)


def test_a_retraining_between_links_that_is_another_is_refused(places: Places) -> None:
    path = places.account(f"pruned-{LAST}-t1280")
    account = artifacts.read_json(path)
    account["lineage"][2]["range"] = [296, 336]
    artifacts.write_json(path, account)
    with pytest.raises(AccountError, match=r"retraining between prunings: .* on \[\[296, 336\], \[200, 216\]\] after"):
        results.collect(places)


def test_a_retraining_that_was_made_again_stops_the_report(places: Places) -> None:
    made_up.remake(places, FIRST)
    with pytest.raises(AccountError, match=f"was made of other weights than {FIRST} has now "):
        results.collect(places)


def test_the_start_of_a_retraining_is_held_against_the_ledger(prefixes, places: Places) -> None:
    made = chain_study(prefixes)
    (last,) = [pruning for pruning in prunings.prunings(made) if pruning.base]
    records = Ledger(places.ledger).read()
    origins.refuse_others(made, last, records)
    records[FIRST] = records[FIRST] | {"made_of": "x"}
    with pytest.raises(AccountError, match=f"{FIRST} was made of other weights than pruning-shortgpt-r50-s1 has now"):
        origins.refuse_others(made, last, records)


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ([{"name": "shortgpt", "ratio": 0.5}, {"name": "wanda", "pattern": "2:4", "retrain": 640}],
         r"chain\.retrain: expected tokens between two links.*, got 640 after the last link"),
        ([{"name": "shortgpt", "ratio": 0.5, "retrain": 60}, {"name": "wanda", "pattern": "2:4"}],
         r"methods\.shortgpt-t60-then-wanda-2-4\.chain\.retrain: expected at least half a global batch"),
    ],
)  # fmt: skip
def test_a_retraining_that_cannot_be_is_refused(prefixes, chain: list[dict[str, Any]], message: str) -> None:
    with pytest.raises((UsageError, DataError), match=message):
        check(made_up.study(prefixes, methods=[{"chain": chain}]))


@pytest.mark.parametrize(
    ("args", "iteration", "here"),
    [
        ({}, 7, False),  # our pretrain always stores the flag
        ({"stream_range": None}, 0, False),  # Megatron's converter of formats, before any step
        ({"stream_range": None}, 7, True),
        ({"stream_range": None, "consumed_train_samples": 16}, 0, True),
        ({"stream_range": "0:16"}, 0, True),
    ],
)
def test_what_says_that_a_checkpoint_was_trained_here(args: dict[str, Any], iteration: int, here: bool) -> None:
    assert lineage._trained_here(SimpleNamespace(args=args, iteration=iteration)) is here
