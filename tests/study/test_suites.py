"""Suites in a study: what is asked for, what is recorded, what is refused before anything runs."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_prune import artifacts
from megatron_prune.cli.data_commands import prepare_suite_main
from megatron_prune.data import indexed
from megatron_prune.data.tokenizers import load_tokenizer
from megatron_prune.errors import AccountError, DataError, UsageError
from megatron_prune.evaluation import suites
from megatron_prune.study import estimate, evidence, outlook, questions, validate
from megatron_prune.study.analysis import results
from megatron_prune.study.prunings import Places
from tests.study import made_up

OWN = {"mine": {"first": "acc_norm", "second": "acc"}}
ASKED = {"windows": 16, "tasks": ["mine", "third"], "suites": OWN, "few_shot": 2, "limit": 80}


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return made_up.corpora(tmp_path_factory.mktemp("corpora"), more=("c4", "wikitext"))


@pytest.fixture(autouse=True)
def no_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """The made-up tasks are nobody's; their questions are looked for in another test."""
    monkeypatch.setattr(questions, "check", lambda study, places: None)


def study(prefixes: dict[str, str], **changes: Any) -> Any:
    own = {name: prefix for name, prefix in prefixes.items() if name not in ("c4", "wikitext")}
    corpora = {name: prefixes[name] for name in ("c4", "wikitext")}
    evaluation = {**ASKED, "corpora": corpora, **changes.pop("evaluation", {})}
    return made_up.study(own, methods=[{"name": "shortgpt"}], evaluation=evaluation, **changes)


def test_the_papers_suites_have_its_tasks_metrics_and_windows() -> None:
    zero_shot, perplexity = suites.known()["paper-zero-shot"], suites.known()["paper-perplexity"]
    by_metric = {
        metric: {task for task, own in zero_shot.tasks.items() if own == metric} for metric in ("acc", "acc_norm")
    }
    assert by_metric["acc"] == {"winogrande", "sciq", "boolq"}
    assert by_metric["acc_norm"] == {"arc_easy", "arc_challenge", "hellaswag", "piqa", "openbookqa"}
    assert list(perplexity.corpora) == ["c4", "wikitext-103", "wikitext-2", "cnn-dailymail"]
    assert (perplexity.windows, perplexity.seq_length, zero_shot.few_shot) == (256, 8192, 0)
    assert suites.tasks_of(["piqa", "paper-zero-shot", "x"])[:2] == ["piqa", "winogrande"]


def test_lm_eval_has_every_task_of_the_papers_suite_with_its_metric() -> None:
    """By lm-eval's own files: its list of tasks takes half a minute to make."""
    folder = Path(pytest.importorskip("lm_eval.tasks").__file__).parent
    texts = [
        path.read_text()
        for room in ("winogrande", "sciq", "super_glue/boolq", "arc", "hellaswag", "piqa", "openbookqa")
        for path in (folder / room).glob("*.yaml")
    ]
    for task, metric in suites.known()["paper-zero-shot"].tasks.items():
        [own] = [text for text in texts if re.search(rf"^task: {task}$", text, re.MULTILINE)]
        own += "".join(text for text in texts if "task: arc_easy" in text) * ("include: arc_easy.yaml" in own)
        assert re.search(rf"metric: {metric}$", own, re.MULTILINE), task


def test_every_model_is_scored_on_all_of_them_and_the_ledger_says_so(prefixes: dict[str, str], tmp_path: Path) -> None:
    made = study(prefixes)
    launcher = made_up.FakeLauncher()
    places = made_up.run(made, tmp_path / "runs", launcher)
    asked = [made_up.words(list(command.argv[1:])) for command in launcher.commands if command.stage == "evaluate"]
    assert len(asked) == 1 + 1 + 1 + 2  # the parent, the pruning, its retraining, scratch in both settings
    for words in asked:
        assert words["labels"] == "validation test c4 wikitext"
        assert words["data_path"].split()[2:] == [prefixes["c4"], prefixes["wikitext"]]
        assert (words["tasks"], words["num_fewshot"], words["limit"]) == ("first,second,third", "2", "80")
    for record in evidence.Ledger(places.ledger).read().values():
        if record["kind"] == "calibration":
            continue
        scores = artifacts.read_json(places.scores(record["cell"]))
        assert record["corpora"] == {name: scores["corpora"][name]["loss"] for name in ("c4", "wikitext")}
        for task in ("first", "second", "third"):
            result = record["tasks"][task]
            assert (result["version"], result["samples"], result["num_fewshot"]) == (1.0, 80, 2)
            assert result["metrics"]["acc"] == scores["tasks"]["results"][task]["metrics"]["acc"]
            assert result["metrics"]["acc"]["stderr"] > 0
    assert not results.collect(places).disbelieved


def test_arms_that_were_asked_other_questions_are_not_compared(prefixes: dict[str, str], tmp_path: Path) -> None:
    places = made_up.run(study(prefixes), tmp_path / "runs", made_up.FakeLauncher())
    cell = next(path.name for path in (places.root / "cells").iterdir() if path.name.startswith("scratch"))
    scores = artifacts.read_json(places.scores(cell))
    for change in ({"limit": 79}, {"lm_eval": "1"}, {"tokenizer": {"model": "m", "fingerprint": "g"}}):
        made_up.edit(places.scores(cell), tasks=scores["tasks"] | change)
        with pytest.raises(AccountError, match="evaluation text: tasks"):
            results.collect(places)


def test_a_cell_without_an_answer_to_every_task_is_not_finished(prefixes: dict[str, str], tmp_path: Path) -> None:
    places = made_up.run(study(prefixes), tmp_path / "runs", made_up.FakeLauncher())
    cell = next(path.name for path in (places.root / "cells").iterdir() if path.name.startswith("pruned"))
    tasks = artifacts.read_json(places.scores(cell))["tasks"]
    made_up.edit(places.scores(cell), tasks=tasks | {"single": {"first": ["first"]}})
    assert cell not in results.collect(places).records


NONE = {"tasks": [], "few_shot": None, "limit": None, "suites": {}}


def smaller(prefixes: dict[str, str], **changes: Any) -> Any:
    """The study before corpora and tasks were added."""
    own = {**NONE, "corpora": {"c4": prefixes["c4"]}}
    return study(prefixes, evaluation={**own, **changes.pop("evaluation", {})}, **changes)


def test_corpora_and_tasks_are_added_to_a_study_that_has_run(prefixes: dict[str, str], tmp_path: Path) -> None:
    places = made_up.run(smaller(prefixes), tmp_path / "runs", made_up.FakeLauncher())
    ledger = evidence.Ledger(places.ledger)
    before, accounts = ledger.lines(), {path: path.read_bytes() for path in places.root.rglob("account.json")}
    assert len(accounts) == 4
    asked = results.collect(places, study(prefixes))
    assert not asked.disbelieved and not asked.left_out and not asked.verdicts  # not scored on them yet
    launcher = made_up.FakeLauncher()
    made_up.run(study(prefixes), tmp_path / "runs", launcher)
    assert {command.stage for command in launcher.commands} == {"evaluate"} and len(launcher.commands) == 5
    assert all("--extend" in command.argv for command in launcher.commands)
    assert {path: path.read_bytes() for path in places.root.rglob("account.json")} == accounts
    lines = ledger.lines()
    assert lines[: len(before)] == before and len(lines) == len(before) + 5
    earlier = {line["cell"]: line for line in before}
    for line in lines[len(before) :]:
        old = earlier[line["cell"]]
        assert all(line[key] == old[key] for key in ("validation_loss", "test_loss", "fingerprint"))
        assert line["corpora"]["c4"] == old["corpora"]["c4"] and {*line["corpora"]} == {"c4", "wikitext"}
        assert {*line["tasks"]} == {"first", "second", "third"} and "tasks" not in old
    found = results.collect(places)
    assert not found.disbelieved and not found.left_out and found.verdicts
    assert {one.measure.name for one in found.measured} >= {"mine", "third", "c4", "wikitext"}
    # A runner that is killed between the scores and the line: the next one writes the line, and evaluates nothing.
    text = places.ledger.read_text().splitlines(keepends=True)
    places.ledger.write_text("".join(text[:-1]))
    launcher = made_up.FakeLauncher()
    made_up.run(study(prefixes), tmp_path / "runs", launcher)
    assert not launcher.commands and places.ledger.read_text().splitlines(keepends=True)[-1] == text[-1]


def test_what_was_scored_may_not_change(prefixes: dict[str, str], tmp_path: Path) -> None:
    asked: dict[str, Any] = {"tasks": ["mine"], "few_shot": 2, "limit": 80, "suites": OWN}
    places = made_up.run(smaller(prefixes, evaluation=asked), tmp_path / "runs", made_up.FakeLauncher())
    held = {path: path.read_bytes() for path in places.root.rglob("cell.json")}
    changes: list[tuple[dict[str, Any], str]] = [
        ({"corpora": {}}, "--data-path"),
        ({"corpora": {"c4": prefixes["wikitext"]}}, "wikitext"),
        ({"corpora": {"c5": prefixes["c4"]}}, "c5"),
        ({"windows": 17}, "--windows 17 in place of 16"),
        (NONE, "no --limit in place of 80"),
        ({"tasks": ["mine"], "few_shot": 3}, "--num-fewshot 3 in place of 2"),
        ({"tasks": ["third", "mine"], "limit": 79}, "--limit 79 in place of 80"),
    ]
    for change, says in changes:
        other = smaller(prefixes, evaluation=asked | change)
        with pytest.raises(UsageError, match=r"expected the commands that it was begun with, got parent with") as why:
            made_up.run(other, places.root.parent, made_up.FakeLauncher())
        assert says in str(why.value)
    with pytest.raises(UsageError, match="got parent with"):
        results.collect(places, other)
    assert {path: path.read_bytes() for path in places.root.rglob("cell.json")} == held


def test_weights_that_were_removed_cannot_be_scored_on_more(prefixes: dict[str, str], tmp_path: Path) -> None:
    places = made_up.run(smaller(prefixes, retention="none"), tmp_path / "runs", made_up.FakeLauncher())
    with pytest.raises(UsageError, match=r"that it was scored on, got corpora or tasks that .* \(retention: none\)"):
        made_up.run(study(prefixes, retention="none"), tmp_path / "runs", made_up.FakeLauncher())
    launcher = made_up.FakeLauncher()
    made_up.run(smaller(prefixes, retention="none"), tmp_path / "runs", launcher)
    assert not launcher.commands and not results.collect(places).disbelieved


def test_further_corpora_are_no_stage_s_text(prefixes: dict[str, str], tmp_path: Path) -> None:
    for name in ("train", "calibration", "validation"):
        corpora = {"c4": prefixes["c4"], "again": prefixes[name]}
        with pytest.raises(DataError, match=f"evaluation.corpora.again and data.{name}.* hold the same tokens"):
            validate.check(study(prefixes, evaluation={"corpora": corpora}), Places(tmp_path))
    for name in ("test", "c4"):  # nothing is trained or chosen on these
        corpora = {"c4": prefixes["c4"], "again": prefixes[name]}
        validate.check(study(prefixes, evaluation={"corpora": corpora}), Places(tmp_path))
    with pytest.raises(UsageError, match="evaluation.windows"):
        validate.check(study(prefixes, evaluation={"windows": 126}), Places(tmp_path))


def write_task(folder: Path, texts: list[str]) -> None:
    lines = [{"query": one[:60], "choices": [one[60:], "no"], "gold": 0} for one in texts]
    (folder / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    task = {
        "task": "own_task", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}}, "doc_to_text": "{{query}}",
        "doc_to_choice": "choices", "doc_to_target": "gold", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (folder / "own.yaml").write_text(yaml.safe_dump(task))


def test_questions_in_the_training_text_are_refused(
    tiny_corpus: Path,
    tiny_documents: list[str],
    prefixes: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.undo()  # the real check
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    known = [one for one in tiny_documents if len(one) > 200][:3]
    new = [
        f"{number} zebras ate {number + 7} violet xylophones, quoth Zyx, while {number * 3} quaggas vexed jolly "
        "wombats from Qom to Uzbek and jazzed up the fjords"
        for number in range(7)
    ]
    write_task(tmp_path, known + new)
    here = prefixes | {"train": str(tiny_corpus)}

    def asked(**changes: Any) -> Any:
        given = {"tasks": ["own"], "suites": {"own": {"own_task": "acc"}}, "tasks_path": str(tmp_path), "limit": None,
                 "few_shot": None, **changes}  # fmt: skip
        return study(here, evaluation=given)

    places = Places(tmp_path / "runs")
    places.root.mkdir()
    with pytest.raises(DataError, match=r"of 10 questions of own_task, 3 are in the train text \(question 0\)"):
        questions.check(asked(), places)
    with pytest.raises(DataError, match=r"at most 29.00%"):
        questions.check(asked(max_contaminated=0.29), places)
    questions.check(asked(max_contaminated=0.3), places)
    report = artifacts.read_json(places.quoted)
    assert report["found"]["train"]["own_task"]["quoted"] == 3
    assert report["found"]["calibration"]["own_task"]["quoted"] == 0
    monkeypatch.setattr(questions, "quoted", lambda *_: 1 / 0)  # the report is there
    questions.check(asked(max_contaminated=0.3), places)
    with pytest.raises(UsageError, match=r"evaluation.suites.own.own_task: expected acc, got acc_norm"):
        questions.check(asked(suites={"own": {"own_task": "acc_norm"}}), places)


def test_the_plan_prices_the_tasks(
    tiny_corpus: Path, tiny_documents: list[str], prefixes: dict[str, str], tmp_path: Path, monkeypatch: Any
) -> None:
    """Lengths by hand: both choices of a question without their last token, and no more than the model reads."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = [one for one in tiny_documents if len(one) > 200][:5]
    write_task(tmp_path, [*texts, texts[0]])  # the same question twice is run once
    own = {"tasks": ["own_task"], "suites": {}, "tasks_path": str(tmp_path), "limit": None, "few_shot": None}
    asked = study(prefixes | {"train": str(tiny_corpus)}, evaluation={**own, "seq_length": 40})
    seen = outlook.look(asked, Places(tmp_path))
    counted, why = estimate.with_questions(asked, seen)
    sidecar = indexed.sidecar(tiny_corpus)
    assert sidecar is not None and not why
    tokenizer = load_tokenizer(sidecar["tokenizer"]["type"], sidecar["tokenizer"]["model"])
    lengths = [min(40, len(tokenizer.encode(one[:60] + choice)) - 1) for one in texts for choice in (one[60:], "no")]
    assert counted.questions == Counter(lengths) and {40} < set(lengths)
    before, after = ({one.cell: one for one in estimate.of_study(asked, known)} for known in (seen, counted))
    (cell,) = (cell for cell in after if cell.startswith("pruned"))
    shape = next(iter(seen.targets.values()))
    assert after[cell].evaluation - before[cell].evaluation == sum(map(shape.forward_flops, lengths))
    assert before[cell].evaluation == 4 * 16 * shape.forward_flops(40), "validation, test and two more corpora"
    lost = study(prefixes | {"train": str(tiny_corpus)}, evaluation={**own, "tasks": ["no_such_task"]})
    same, why = estimate.with_questions(lost, seen)
    assert same is seen and "the tasks of the evaluation are not in these FLOPs and times" in why[0]


def test_prepare_suite_tokenizes_local_text(
    tiny_jsonl: Path,
    tiny_tokenizer: Path,
    tiny_documents: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps({"page": one}) + "\n" for one in tiny_documents[:5]))
    corpora = {
        "hub": {"dataset": str(folder), "split": "train", "column": "page"},
        "file": {"files": [str(tiny_jsonl)]},
    }
    own = {"tiny": {"about": "two", "windows": 3, "seq_length": 64, "corpora": corpora}}
    (tmp_path / "suites.yaml").write_text(yaml.safe_dump(own))
    words = ["tiny", "--suites", str(tmp_path / "suites.yaml"), "--output", str(tmp_path / "out"), "--append-eod"]
    with pytest.raises(UsageError, match="--tokenizer-type, --tokenizer-model: expected a folder and a tokenizer"):
        prepare_suite_main(words)
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tiny_tokenizer)]
    assert prepare_suite_main([*words, *tokenizer]) == 0
    sidecars = {name: artifacts.read_json(tmp_path / "out" / f"{name}.json") for name in corpora}
    assert sidecars["hub"]["documents"] == 5 and sidecars["file"]["documents"] == len(tiny_documents)
    printed = capsys.readouterr().out
    section = yaml.safe_load(printed[printed.index("evaluation:") :])["evaluation"]
    assert section == {
        "windows": 3,
        "seq_length": 64,
        "corpora": {name: str(tmp_path / "out" / name) for name in corpora},
    }
    with pytest.raises(UsageError, match="expected tiny, got other"):
        prepare_suite_main(["other", "--suites", str(tmp_path / "suites.yaml")])
