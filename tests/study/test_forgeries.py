"""Forgeries of a finished study: each is refused by name or detected.

The study is made up (two methods, both settings, three seeds): its weights, accounts and scores are real files without
training. Tests forge step by step: the weights, then also the scores, the account, the losses, the ledger.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from megatron_prune import artifacts
from megatron_prune.checkpoint.layout import weights
from megatron_prune.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_prune.checkpoint.writer import CheckpointWriter
from megatron_prune.cli.study_commands import study_main
from megatron_prune.errors import AccountError, RunError, UsageError
from megatron_prune.study import custody, verification
from megatron_prune.study.analysis import results
from megatron_prune.study.analysis.unfinished import Unfinished
from megatron_prune.study.evidence import Ledger
from megatron_prune.study.prunings import Places
from megatron_prune.study.report import page
from tests.study import made_up

PRUNED = "pruned-shortgpt-r50-s{}-t1280"
SCRATCH = "scratch-L2h32H4G2d8F64-equal-training-t1280-s{}"
TOTAL = "scratch-L2h32H4G2d8F64-equal-total-t3968-s{}"
Change = Callable[[Any], Any]


@pytest.fixture
def places(finished_copy: Places) -> Places:
    return finished_copy


@pytest.fixture
def honest(places: Places) -> results.Results:
    return results.collect(places)


def edit(path: Path, change: Change) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def edit_line(places: Places, cell: str, **changes: Any) -> None:
    """Change a cell's line in the ledger; ``None`` as the only change removes it."""
    lines = Ledger(places.ledger).lines()
    kept = [line | (changes if line["cell"] == cell else {}) for line in lines]
    places.ledger.write_text("".join(json.dumps(line) + "\n" for line in kept if line["kind"] is not None))


def copy_weights(places: Places, source: str, target: str) -> None:
    """The checkpoint of one cell in place of another's; account and losses stay."""
    held, saved = open_checkpoint(places.checkpoint(source)), open_checkpoint(places.checkpoint(target))
    shutil.rmtree(saved.directory)
    shutil.copytree(held.directory, saved.directory)


def write_weights(held: Checkpoint, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Other numbers in the same files."""
    made = held.root.parent / "made"
    with CheckpointWriter(made, args=held.args, dtype=torch.float32, pruning=held.pruning) as writer:
        for weight in weights(held.shape):
            writer.add(weight.name, weight.shape, [change(weight.name, held.read(weight.name))])
    shutil.rmtree(held.directory)
    (made / "release").rename(held.directory)


def copy_run(places: Places, source: str, target: str) -> None:
    """All files of one run in place of another's."""
    for path in (places.checkpoint(target), places.scores(target)):
        (shutil.rmtree if path.is_dir() else Path.unlink)(path)
    shutil.copytree(places.checkpoint(source), places.checkpoint(target))
    shutil.copy(places.scores(source), places.scores(target))


def as_seed(places: Places, cell: str, seed: int) -> None:
    """An account with another seed in every place."""

    def change(account: Any) -> None:
        account.update(seed=seed, permutation_seed=seed)
        account["arguments"].update(seed=seed, stream_permutation_seed=seed)

    edit(places.account(cell), change)


def shift_scores(places: Places, cell: str, by: float, *, windows: bool = True) -> None:
    def change(scores: Any) -> None:
        for corpus in scores["corpora"].values():
            if windows:
                corpus["window_losses"] = [loss + by for loss in corpus["window_losses"]]
                corpus["loss"] = sum(corpus["window_losses"]) / len(corpus["window_losses"])
            else:
                corpus["loss"] += by

    edit(places.scores(cell), change)


def test_an_honest_study_has_nothing_to_say(honest: results.Results) -> None:
    assert not honest.disbelieved and not honest.left_out
    assert all(item.status == "finished" for item in honest.compared)


# ------------------------------------------------------------------ weights, account and scores


def test_1_the_pruned_checkpoint_in_the_scratch_cell(places: Places) -> None:
    copy_weights(places, PRUNED.format(1), TOTAL.format(1))
    with pytest.raises(
        AccountError, match=rf"{TOTAL.format(1)}/scores.json is of weights with fingerprint .*checkpoint"
    ):
        results.collect(places)


def test_2_and_then_evaluated_again(places: Places, corpora: dict[str, str]) -> None:
    """With scores and the ledger's line removed, `study run` must not report one run against itself."""
    cell = TOTAL.format(1)
    copy_weights(places, PRUNED.format(1), cell)
    places.scores(cell).unlink()
    edit_line(places, cell, kind=None)
    with pytest.raises(RunError, match=rf"{cell}/scores.json is of weights .*{cell}/checkpoint/account.json has"):
        made_up.run(made_up.study(corpora, seeds=[1, 2, 3]), Path("runs"), launcher := made_up.FakeLauncher())
    assert [done.stage for done in launcher.commands] == ["evaluate"]
    with pytest.raises(AccountError, match=rf"{cell}/scores.json is of weights"):
        results.collect(places)


def test_3_and_then_written_into_the_account(places: Places) -> None:
    source, cell = PRUNED.format(1), TOTAL.format(1)
    copy_weights(places, source, cell)
    final = artifacts.read_json(places.account(source))["final"]
    edit(places.account(cell), lambda account: account.update(final=final))
    edit(places.scores(cell), lambda scores: scores.update(checkpoint=final))
    with pytest.raises(AccountError, match=rf"{source} and {cell} have the same weights .*different runs .*\(start: "):
        results.collect(places)


def test_4_the_pruned_scores_in_the_scratch_cell(places: Places) -> None:
    shutil.copy(places.scores(PRUNED.format(2)), places.scores(SCRATCH.format(2)))
    with pytest.raises(AccountError, match=rf"{SCRATCH.format(2)}/scores.json is of weights with fingerprint"):
        results.collect(places)


def test_5_weights_that_are_equal_where_a_fingerprint_looks(places: Places, corpora: dict[str, str]) -> None:
    """A fingerprint covers 64 elements of each weight: a forger keeps the scratch run's and changes the rest."""
    cell = SCRATCH.format(1)
    held = open_checkpoint(places.checkpoint(cell))
    before = held.fingerprint()

    def forged(name: str, tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.clone().view(-1)
        looked_at = {i * (flat.numel() - 1) // 63 for i in range(64)} if flat.numel() > 64 else set(range(64))
        for position in range(flat.numel()):
            if position not in looked_at:
                flat[position] = 0.0
        return flat.view_as(tensor)

    write_weights(held, forged)
    assert open_checkpoint(places.checkpoint(cell)).fingerprint() == before
    places.scores(cell).unlink()
    with pytest.raises(RunError, match=rf"{cell}/scores.json is of weights with full_hash .*account.json has"):
        made_up.run(made_up.study(corpora, seeds=[1, 2, 3]), Path("runs"), made_up.FakeLauncher())


@pytest.mark.parametrize("cell", ["parent", "pruning-shortgpt-r50-s1"])
def test_6_other_weights_behind_the_pruned_arm(places: Places, cell: str) -> None:
    write_weights(open_checkpoint(places.checkpoint(cell)), lambda name, tensor: tensor * 2)
    with pytest.raises(AccountError, match=rf"{cell}/scores.json is of weights with fingerprint"):
        results.collect(places)


# ------------------------------------------------------------------ numbers


def test_7_losses_lowered_in_the_ledger(places: Places, honest: results.Results) -> None:
    """A "lower by 0.159" next to a bootstrap interval of −0.261 to −0.220."""
    for seed in (1, 2, 3):
        cell = PRUNED.format(seed)
        edit_line(places, cell, test_loss=honest.records[cell]["test_loss"] - 0.4)
    found = results.collect(places)
    assert found.rows == honest.rows and found.verdicts == honest.verdicts
    loss = honest.records[PRUNED.format(1)]["test_loss"]
    assert found.disbelieved[0] == f"{PRUNED.format(1)}: the ledger says test_loss {loss - 0.4}, its artifacts {loss}"
    assert len(found.disbelieved) == 3 and f"Not believed: {PRUNED.format(1)}" in page.render(found, [])


def test_8_a_loss_lowered_in_the_scores(places: Places) -> None:
    shift_scores(places, PRUNED.format(1), -0.4, windows=False)
    with pytest.raises(
        AccountError, match=rf"{PRUNED.format(1)}/scores.json: the loss of validation: expected .*, the mean of"
    ):
        results.collect(places)


def test_9_with_all_of_its_windows(places: Places) -> None:
    """The files of the cell agree; the ledger knows what they were."""
    shift_scores(places, PRUNED.format(1), -0.4)
    (said,) = results.collect(places).disbelieved
    assert said.startswith(f"{PRUNED.format(1)}: the ledger says test_loss ")
    assert said.endswith("(scores.json changed after the line was written)")


def test_10_what_prunings_cost_lowered_in_the_ledger(places: Places, honest: results.Results) -> None:
    for cell in ("calibration-s1", "pruning-shortgpt-r50-s1"):
        edit_line(places, cell, flops=1)
    found = results.collect(places)
    assert found.rows == honest.rows and len(found.disbelieved) == 2


def test_7b_where_retention_has_left_no_weights(places: Places, honest: results.Results) -> None:
    for cell in honest.records:
        if cell.startswith(("pruned", "scratch")):
            for path in places.checkpoint(cell).glob("iter_*"):
                shutil.rmtree(path)
            (places.checkpoint(cell) / "latest_checkpointed_iteration.txt").unlink()
    edit_line(places, PRUNED.format(1), test_loss=1.0)
    found = results.collect(places)
    assert found.rows == honest.rows and len(found.disbelieved) == 1
    shutil.copy(places.scores(PRUNED.format(2)), places.scores(SCRATCH.format(2)))
    with pytest.raises(AccountError, match=rf"{SCRATCH.format(2)}/scores.json is of weights with fingerprint"):
        results.collect(places)


def test_11_a_ledger_that_is_gone(places: Places, honest: results.Results) -> None:
    places.ledger.unlink()
    found = results.collect(places)
    assert sorted(map(str, found.rows)) == sorted(map(str, honest.rows)) and found.verdicts == honest.verdicts


def test_12_a_finished_line_of_a_run_that_is_not_there(places: Places) -> None:
    cell = PRUNED.format(1)
    shutil.rmtree(places.checkpoint(cell))
    found = results.collect(places)
    assert [item.status for item in found.compared if item.comparison.pruned == cell] == ["pending"] * 2
    assert found.disbelieved == (f"{cell}: the ledger has a line for it, but its artifacts are missing or incomplete",)


def test_13_better_losses_of_training(places: Places) -> None:
    path = places.losses(PRUNED.format(1))
    lines = path.read_text().splitlines()
    lines[-1] = lines[-1].replace(lines[-1].split(",")[2], "1.5")
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(
        AccountError, match=rf"{PRUNED.format(1)}/checkpoint/account.json: final_loss: expected 1.5, as in"
    ):
        results.collect(places)


def test_14_fewer_steps_than_the_budget(places: Places) -> None:
    path = places.losses(SCRATCH.format(1))
    path.write_text("\n".join(path.read_text().splitlines()[:-2]) + "\n")
    with pytest.raises(
        AccountError, match=rf"{SCRATCH.format(1)}/checkpoint/losses.csv: expected a row for each of the"
    ):
        results.collect(places)


# ------------------------------------------------------------------ one run as several seeds


def test_15_one_seeds_run_in_the_place_of_anothers(places: Places) -> None:
    copy_run(places, PRUNED.format(1), PRUNED.format(2))
    with pytest.raises(AccountError, match=rf"{PRUNED.format(2)}/.*: expected a finished run with seed 2, got 1"):
        results.collect(places)


@pytest.mark.parametrize("further", range(4))
def test_16_to_19_with_an_account_that_says_the_other_seed(places: Places, further: int) -> None:
    """Each step is refused by the next thing that is still equal: weights, losses of training, losses of windows."""
    source, cell = PRUNED.format(1), PRUNED.format(2)
    copy_run(places, source, cell)
    as_seed(places, cell, 2)
    expected = "the same weights (fingerprint)"
    if further > 0:  # other weights, and all files agree with them
        write_weights(open_checkpoint(places.checkpoint(cell)), lambda name, tensor: tensor + 1e-3)
        final = made_up.weights_of(places.checkpoint(cell))
        edit(places.account(cell), lambda account: account.update(final=final))
        edit(places.scores(cell), lambda scores: scores.update(checkpoint=final))
        expected = "losses of training that are equal to the last digit"
    if further > 1:  # other losses of training
        account = artifacts.read_json(places.account(cell))
        made_up.write_losses(places.checkpoint(cell), account, [made_up.number(step) for step in range(10)])
        artifacts.write_json(places.account(cell), account)
        expected = "the same validation loss on every window"
    if further > 2:  # and losses of windows that differ by less than any two models do
        shift_scores(places, cell, 1e-7)
    with pytest.raises(AccountError) as caught:
        results.collect(places)
    assert str(caught.value).startswith(f"{source} and {cell} have {expected}, but are different runs")
    assert "(initial: " in str(caught.value) or "seed: 1 against 2" in str(caught.value)


# ------------------------------------------------------------------ what the plan has and the report lacks


def shown(places: Places, corpora: dict[str, str], capsys: Any) -> tuple[str, str, dict[str, Any]]:
    """What the page, the terminal and results.json say; the former two with single spaces."""
    report(corpora)
    page = (places.root / "report" / "index.html").read_text()
    data = artifacts.read_json(places.root / "report" / "results.json")
    return " ".join(page.split()), " ".join(capsys.readouterr().out.split()), data


def test_the_ledger_is_deleted(places: Places, corpora: dict[str, str], capsys: Any) -> None:
    cells = len(Ledger(places.ledger).read())
    places.ledger.unlink()
    words = f"ledger.jsonl is missing, with the lines of {cells} finished cells: nothing says whether they are as"
    page, terminal, data = shown(places, corpora, capsys)
    assert words in page and f"not believed: runs/made-up/{words}" in terminal and words in data["disbelieved"][0]


def test_a_line_is_taken_out_of_the_ledger(places: Places, corpora: dict[str, str], capsys: Any) -> None:
    edit_line(places, PRUNED.format(1), kind=None)
    page, terminal, data = shown(places, corpora, capsys)
    assert all(f"the ledger has no line for {PRUNED.format(1)}: " in text for text in (page, terminal, str(data)))


@pytest.mark.parametrize("seeds", [(3,), (1, 2, 3)])
def test_an_arm_is_deleted_with_its_lines(places: Places, corpora: dict[str, str], capsys: Any, seeds: Any) -> None:
    """Beside the conclusion that it weakens, or in its place: on the page, on the terminal, in results.json."""
    for seed in seeds:
        for cell in (PRUNED.format(seed), TOTAL.format(seed)):
            shutil.rmtree(places.cell(cell))
            edit_line(places, cell, kind=None)
    page, terminal, data = shown(places, corpora, capsys)
    of = "shortgpt, 50% removed, 1,280 tokens, seed"
    words = f"Not finished: {len(seeds)} of 3 comparisons ({'; '.join(f'{of} {seed}' for seed in seeds)})."
    conclusion = page[: page.index("</section>")]
    assert conclusion.count(f"<em>{words}</em>") == 2
    assert conclusion.count("<b>No conclusion</b>. <em>") == (2 if len(seeds) == 3 else 0)
    for setting in ("equal training tokens", "equal total tokens"):
        assert f"Depth, {setting}: {words}" in terminal
        assert f"Depth, {setting}: {words}" in [one["words"] for one in data["unfinished"]]
    beside = {(one["granularity"], one["unfinished"]) for one in data["conclusions"]}
    assert beside == {("width", None), *([("depth", words)] if len(seeds) == 1 else [])}


def test_a_setting_that_lost_every_conclusion_stays_on_the_page() -> None:
    concluded = SimpleNamespace(setting="equal-training", subject="Depth", winner="pruned", claim="c", words="w")
    lost = Unfinished(question=False, subject="Depth", setting="equal-total", planned=1, missing=("a run",))
    found: Any = SimpleNamespace(headlines=[concluded], unfinished=[lost])
    assert [(group["setting"], group["lines"]) for group in page._headlines(found)] == [
        ("Equal training tokens", [("Depth", "pruned", "c", "w", None)]),
        ("Equal total tokens", [("Depth", "neither", "No conclusion", ".", lost.words)]),
    ]


def test_a_question_that_lost_an_arm_says_so(places: Places, corpora: dict[str, str], capsys: Any) -> None:
    shutil.rmtree(places.cell(PRUNED.format(2)))
    edit_line(places, PRUNED.format(2), kind=None)
    asked = {
        "kind": "larger",
        "of": {"methods": ["shortgpt"]},
        "than": {"methods": ["minitron-width"]},
        "label": "the question",
    }
    found = report(corpora, compare=[asked])
    own = [one for one in found.unfinished if one.question]
    assert {one.subject for one in own} == {"the question"} and {one.planned for one in own} == {6}
    assert "the question, equal total tokens: Not finished: 1 of 6 comparisons (shortgpt" in capsys.readouterr().out


# ------------------------------------------------------------------ what was published, read again


def test_verify_reads_again_what_fingerprints_sample(places: Places, monkeypatch: Any, capsys: Any) -> None:
    """A study's folder is an argument. Changed weights are named on the page, on the terminal and in results.json."""
    assert study_main(["report", str(places.root), "--verify"]) == 0
    assert re.search(r"read again: \d+ checkpoints, 0 masks, \d corpora; none changed", capsys.readouterr().out)
    sampled = Checkpoint.fingerprint(open_checkpoint(places.checkpoint(PRUNED.format(1))))
    write_weights(open_checkpoint(places.checkpoint(PRUNED.format(1))), lambda name, values: values + 1e-3)
    honest = Checkpoint.fingerprint

    def unseen(held: Checkpoint) -> str:  # as if the sample had missed what was changed
        return sampled if held.root.parent.name == PRUNED.format(1) else honest(held)

    monkeypatch.setattr(Checkpoint, "fingerprint", unseen)
    assert study_main(["report", str(places.root)]) == 0
    capsys.readouterr()
    with pytest.raises(RunError, match="--verify: 1 of these are not what the results are of"):
        study_main(["report", str(places.root.absolute()), "--verify"])
    words = f"{PRUNED.format(1)}: its weights are not those that were evaluated (full_hash"
    page = (places.root / "report" / "index.html").read_text()
    data = artifacts.read_json(places.root / "report" / "results.json")
    assert words in page and words in capsys.readouterr().out and words in data["disbelieved"][0]
    assert data["verified"]["changed"] == 1


def test_verify_reads_corpora_and_masks(places: Places, corpora: dict[str, str], monkeypatch: Any) -> None:
    record = {"parent": {"text": {"test": {"fingerprint": "another"}}}}
    study = made_up.study(corpora)
    read, found = verification.verify_files(study, places, record)
    assert read["corpora"] == 2 and found == [f"{corpora['test']}: it is not the text on which parent was scored"]
    held = open_checkpoint(places.checkpoint("parent"))
    monkeypatch.setattr(verification.masks, "find_masks", lambda root: root / "masks")
    monkeypatch.setattr(verification.masks, "open_masks", lambda path: SimpleNamespace(hash="m"))
    monkeypatch.setattr(verification.with_weights, "verify", lambda masks, checkpoint: held.verify())
    _, found = verification.verify_files(study, places, {"parent": {}})
    assert found == ["parent: its masks are not those that were evaluated (none then, m now)"]


@pytest.mark.parametrize("part", ["report", "status", "plan"])
def test_a_folder_is_a_study_only_where_one_has_begun(places: Places, part: str) -> None:
    Path("elsewhere").mkdir()
    Path("elsewhere/study.yaml").write_text("name: made-up")
    message = "STUDY.yaml: expected .*the folder of one that has begun, got elsewhere, a folder without study.json"
    with pytest.raises(UsageError, match=f"{message}.*give elsewhere/study.yaml"):
        study_main([part, "elsewhere"])
    assert study_main([part, str(places.root)]) == 0


# ------------------------------------------------------------------ runs that study.yaml no longer asks for


def report(corpora: dict[str, str], **changes: Any) -> results.Results:
    """`study report` with another study.yaml than the one that was run."""
    asked = {"seeds": [1, 2, 3]} | changes
    Path("study.yaml").write_text(yaml.safe_dump(made_up.mapping(corpora, **asked)))
    assert study_main(["report", "study.yaml"]) == 0
    return results.collect(Places(Path("runs/made-up")), made_up.study(corpora, **asked))


def test_20_a_method_that_lost_is_taken_out(places: Places, corpora: dict[str, str], capsys: Any) -> None:
    found = report(corpora, methods=[{"name": "shortgpt"}])
    assert [(verdict.method, verdict.family) for verdict in found.verdicts] == [("shortgpt", 4)] * 2
    left_out = {one.cell: one for one in found.left_out}
    pruned, pruning = "pruned-minitron-width-r50-s1-t1280", "pruning-minitron-width-r50-s1"
    assert left_out[pruned].why == "study.yaml no longer has method minitron-width"
    assert left_out[pruned].record["test_loss"] == artifacts.read_json(places.scores(pruned))["corpora"]["test"]["loss"]
    assert len(left_out) == 3 * (1 + 1 + 2) and left_out[pruning].why == "no run of study.yaml needs it now"
    assert f"not shown: {pruned}: study.yaml no longer has method minitron-width" in capsys.readouterr().out
    text = (places.root / "report" / "index.html").read_text()
    assert "12 more finished in this folder and are not shown" in text and left_out[pruned].why in text
    data = artifacts.read_json(places.root / "report" / "results.json")
    assert [one["cell"] for one in data["left_out"]] == list(left_out)


def test_21_a_seed_that_lost_is_taken_out(places: Places, corpora: dict[str, str]) -> None:
    found = report(corpora, seeds=[1, 2])
    assert all(verdict.test.seeds == 2 for verdict in found.verdicts)
    assert {one.why for one in found.left_out if one.cell.startswith(("pruned", "scratch"))} == {
        "study.yaml no longer has seed 3"
    }
    assert all(one.cell.rsplit("-t")[0].endswith("-s3") or "-s3" in one.cell for one in found.left_out)


def test_22_a_setting_is_taken_out(places: Places, corpora: dict[str, str]) -> None:
    found = report(corpora, settings=["equal-training"])
    assert [verdict.family for verdict in found.verdicts] == [4] * 2
    assert {one.why for one in found.left_out} == {"study.yaml no longer has setting equal-total (dense scratch)"}


def test_23_the_family_is_narrowed_to_what_came_out_well(places: Places, corpora: dict[str, str]) -> None:
    found = report(corpora, family={"methods": ["shortgpt"], "settings": ["equal-total"]})
    assert [verdict.family for verdict in found.verdicts if verdict.corrected is not None] == [4]


def test_24_with_the_folders_of_its_cells_removed(places: Places, corpora: dict[str, str]) -> None:
    """The ledger still has their lines."""
    for path in places.root.glob("cells/*minitron-width*"):
        shutil.rmtree(path)
    shape = "scratch-L4h24H4G2d8F32"
    for path in places.root.glob(f"cells/{shape}*"):
        shutil.rmtree(path)
    found = report(corpora, methods=[{"name": "shortgpt"}])
    assert [verdict.family for verdict in found.verdicts] == [4] * 2
    why = {one.cell: one.why for one in found.left_out}
    assert why["pruned-minitron-width-r50-s1-t1280"] == (
        "study.yaml no longer has method minitron-width; its artifacts are gone, or not finished"
    )


def test_25_a_run_that_is_repeated_until_it_wins(places: Places, corpora: dict[str, str]) -> None:
    cell = PRUNED.format(1)
    before = artifacts.read_json(places.scores(cell))["corpora"]["test"]["loss"]
    shutil.rmtree(places.cell(cell))

    class Luckier(made_up.FakeLauncher):
        def _evaluate(self, argv: list[str]) -> None:
            made_up.write_scores(made_up.words(argv), dict.fromkeys(("validation", "test"), 1.9))

    made_up.run(made_up.study(corpora, seeds=[1, 2, 3]), Path("runs"), Luckier())
    found = results.collect(places)
    assert found.records[cell]["test_loss"] == pytest.approx(1.9) and not found.disbelieved
    (trace,) = found.left_out
    assert (trace.cell, trace.why) == (cell, "this cell was made again since") and trace.record["test_loss"] == before


@pytest.mark.usefixtures("places")
def test_26_a_recipe_that_was_not_run(corpora: dict[str, str]) -> None:
    recipe = made_up.mapping(corpora)["recipe"]
    with pytest.raises(UsageError, match="parent with --weight-decay 0.2 in place of 0.1"):
        report(corpora, recipe=recipe | {"arguments": {"weight-decay": 0.2}})
    with pytest.raises(UsageError, match="parent with --lr 0.002 in place of 0.001"):
        report(corpora, recipe=recipe | {"lr": 2e-3})
    assert all(item.match for item in report(corpora, recipe=recipe | {"save_interval": 7}).compared)


# ------------------------------------------------------------------ machines and versions


def test_27_arms_on_other_machines(places: Places) -> None:
    def change(account: Any) -> None:
        account["attempts"][0]["device"] = {"kind": "cuda", "name": "H100", "capability": "9.0"}
        account["attempts"][0]["versions"] = {**account["attempts"][0]["versions"], "torch": "9.9"}

    edit(places.account(TOTAL.format(1)), change)
    found = results.collect(places)
    text = page.render(found, [])
    differing = [line for item in found.compared for line in item.match if line.verdict == "differs"]
    assert {line.field for line in differing} == {"device", "torch"} and {line.scratch for line in differing} == {
        "H100 (cuda 9.0)", "9.9"
    }  # fmt: skip
    assert (
        f"in 1 comparison ({PRUNED.format(1)} and {TOTAL.format(1)})" in text
        and "Compared runs differ in torch" in text
    )
    assert "1 run: " in text and "torch 9.9, on H100 (cuda 9.0)" in text  # the footer says what ran


def test_what_a_copy_is_measured_by_is_far_below_what_seeds_differ_by(honest: results.Results, places: Places) -> None:
    windows = [artifacts.read_json(places.scores(PRUNED.format(s)))["corpora"]["test"]["window_losses"] for s in (1, 2)]
    assert min(abs(a - b) for a, b in zip(*windows, strict=True)) > 1000 * custody.CLOSE
