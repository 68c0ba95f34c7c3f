"""Advice from made-up ledgers with a known truth: its answers, and when it answers "don't know"."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prune import artifacts, verbs
from megatron_prune.__main__ import main
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.cli.study_commands import advise_parser
from megatron_prune.errors import EXIT_REFUSED, UsageError
from megatron_prune.study.advise import answer, ledgers, question
from megatron_prune.study.advise.answer import Advice
from tests.convert import family_models
from tests.study import made_up

BUDGETS = (100_000, 200_000, 400_000, 800_000, 1_600_000)
PARENT = {"params": 1_000_000, "tokens_train": 5_000_000}
Gap = Callable[[str, float, int], float]  # scratch minus pruned of a method at a ratio and a budget


def ledger(
    gap: Gap,
    *,
    seeds: int = 3,
    noise: float = 0.005,
    methods: tuple[str, ...] = ("a", "b"),
    ratios: tuple[float, ...] = (0.5,),
    pattern: str | None = None,
    against: str = "dense",
    setting: str = "equal-training",
    rng: int = 0,
) -> dict[str, Any]:
    """A ``results.json``: scratch falls from 3 nats with the budget, pruned is ``gap`` below it."""
    generator = np.random.default_rng(rng)
    rows: list[dict[str, Any]] = [
        {"cell": "parent", "arm": "parent", "status": "finished", "seed": None, "shape": None,
         "removed_linears": None, "removed_all": None, "flops_train": 1, "test_loss": 2.0, **PARENT}
    ]  # fmt: skip
    comparisons = []
    for method in methods:
        for ratio in ratios:
            for budget in BUDGETS:
                for seed in range(1, seeds + 1):
                    scratch = 2 + (budget / BUDGETS[0]) ** -0.5 + (0 if method == "a" else 0.01)
                    losses = {"pruned": scratch - gap(method, ratio, budget), "scratch": scratch}
                    cells = {arm: f"{arm}-{method}-{ratio}-{budget}-{seed}" for arm in losses}
                    for arm, loss in losses.items():
                        rows.append(
                            {"cell": cells[arm], "arm": arm, "status": "finished", "seed": seed, "params": 600_000,
                             "tokens_train": budget, "flops_train": 3_000_000 * budget, "removed_linears": ratio,
                             "removed_all": 0.8 * ratio, "shape": "L2h64H4G2d16F128",
                             "test_loss": loss + float(generator.normal(0, noise))}
                        )  # fmt: skip
                    comparisons.append(
                        {"method": method, "pattern": pattern, "ratio": ratio, "setting": setting, "against": against,
                         "objective": "lm",
                         "sparse": pattern is not None, "tokens": budget, "seed": seed, "status": "finished", **cells}
                    )  # fmt: skip
    return {"version": 1, "study": "made-up", "one_parent": True, "rows": rows, "comparisons": comparisons}


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., Advice]:
    """``ask(ledger, "--ratio", …)``: the advice."""

    def get(content: dict[str, Any], *argv: object) -> Advice:
        (tmp_path / "results.json").write_text(json.dumps(content))
        read = ledgers.read(tmp_path / "results.json")
        options = verbs.AdviseSettings.of(advise_parser().read(["--ledger", "read above", *map(str, argv)])[0])
        return answer.advise(read, question.from_settings(options, read.parent_params))

    return get


def lead(method: str, ratio: float, budget: int) -> float:
    """Pruned is ahead at first, method b by slightly more; scratch catches up near 450,000 tokens."""
    return 0.3 * (1 - np.log(budget / BUDGETS[0]) / np.log(4.5)) + (0.06 if method == "b" else 0.0)


def test_prune_scratch_and_which(ask) -> None:
    at = ask(ledger(lead), "--ratio", 0.5, "--tokens", 100_000)
    assert (at.answer, at.method, at.as_good) == ("prune", "b", ()) and at.confidence > 0.95
    assert at.gap.mean == pytest.approx(0.35, abs=0.03) and at.reasons == ()
    late = ask(ledger(lead), "--ratio", 0.5, "--tokens", "1.6M")
    assert late.answer == "scratch" and late.gap.high < 0
    assert "scratch catches up" in late.break_evens[0]


def test_methods_that_the_seeds_do_not_tell_apart_are_named(ask) -> None:
    found = ask(ledger(lambda *_: 0.3, noise=0.02), "--ratio", 0.5, "--tokens", 200_000)
    assert found.answer == "prune" and {found.method, *found.as_good} == {"a", "b"}


def test_another_shapes_scratch_run_is_a_rival_too(ask) -> None:
    """Method b beats its own scratch run; a's scratch run, of the same ratio, beats b."""
    content = ledger(lambda method, *_: -0.3 if method == "a" else 0.2, noise=0.002)
    for row in content["rows"]:
        if "-b-" in row["cell"]:
            row["test_loss"] += 0.5
    assert ask(content, "--ratio", 0.5, "--tokens", 200_000).answer == "scratch"
    assert ask(content, "--ratio", 0.5, "--tokens", 200_000, "--method", "b").answer == "prune"


@pytest.mark.parametrize(
    ("argv", "reason", "measurement"),
    [
        (["--ratio", 0.5, "--tokens", "10M"], "budgets that were run, 100,000 to 1,600,000", "at 10,000,000"),
        (["--ratio", 0.5, "--tokens", "10k"], "beyond the budgets", "both arms at 10,000 tokens"),
        (["--ratio", 0.8, "--tokens", "200k"], "beyond the ratios that were measured: 50%", "at 80% removed"),
        (["--ratio", 0.5, "--tokens", "200k", "--parent-params", "8B"], "parent has 8,000,000,000", "parent.load"),
        (["--ratio", 0.5, "--tokens", "200k", "--parent-tokens", "9M"], "9,000,000 tokens of training", "parent.load"),
        (["--ratio", 0.5, "--tokens", "200k", "--setting", "equal-total"], "ledger has equal-training", "study run"),
        (["--ratio", 0.5, "--tokens", "200k", "--method", "c"], "with c was not measured", "study run"),
        (["--pattern", "2:4", "--tokens", "200k"], "2:4 was not measured", "50% 2:4 removed"),
        (["--ratio", 0.5, "--gpu-hours", 1, "--gpu-flops", 1e14], "120,000,000,000 tokens are beyond", "seeds"),
    ],
)  # fmt: skip
def test_it_does_not_know_beyond_what_was_measured(ask, argv, reason: str, measurement: str) -> None:
    found = ask(ledger(lead), *argv)
    assert found.answer == answer.UNKNOWN and found.gap is None and found.confidence is None
    assert reason in " ".join(found.reasons) and measurement in " ".join(found.settle)


def learning(content: dict[str, Any], method: str, masks: int) -> dict[str, Any]:
    """Like ``content``, but ``method`` learned its masks on ``masks`` tokens, and scratch has as many more."""
    for row in content["rows"]:
        if f"-{method}-" in row["cell"]:
            pruned = row["arm"] == "pruned"
            row |= {"tokens_learned": masks, "flops_pruning": 6_000_000 * masks} if pruned else {}
            row["tokens_train"] += 0 if pruned else masks
    return content


def test_tokens_that_masks_were_learned_on_are_part_of_the_budget(ask) -> None:
    """Method b retrains on 200,000 of 300,000 tokens; a was run at 200,000 and 400,000, and is read between them."""
    content = learning(ledger(lead), "b", 100_000)
    found = ask(content, "--ratio", 0.5, "--tokens", 300_000, "--method", "b")
    at = ask(ledger(lead), "--ratio", 0.5, "--tokens", 200_000, "--method", "b")
    assert found.pruned_loss == at.pruned_loss and found.scratch_loss == at.scratch_loss
    assert "b: 100,000 of the tokens learn its masks, 200,000 retrain it" in found.caveats
    assert not any(
        "learn its masks" in caveat for caveat in ask(content, "--ratio", 0.5, "--tokens", 300_000).caveats[2:]
    )
    short = ask(content, "--ratio", 0.5, "--tokens", 150_000, "--method", "b")
    assert "150,000 tokens are beyond the budgets that were run, 200,000 to 1,700,000 (b, its masks" in short.reasons[0]
    hours = ["--gpu-hours", 1, "--gpu-flops", 1.2e12 / 3600]  # 200,000 tokens at 3e6 FLOPs, and 100,000 at 6e6
    by_time = ask(content, "--ratio", 0.5, *hours, "--method", "b")
    assert by_time.pruned_loss == at.pruned_loss
    alone = learning(ledger(lead, seeds=1), "b", 100_000)
    (cost,) = ask(alone, "--ratio", 0.5, "--tokens", 300_000, "--method", "b").settle
    # two seeds of 100,000 for masks and 200,000 for retraining, and of 300,000 for scratch
    assert "1,200,000 tokens, 4.20e+12 FLOPs" in cost


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            ["--method", "shortgpt", "--target-ffn-hidden-size", 64],
            "--target-ffn-hidden-size: expected --target-num-la",
        ),
        (["--method", "minitron-width", "--target-num-layers", 2], "--target-num-layers: expected --target-hidden-si"),
        (["--method", "sheared-llama", "--pattern", "2:4"], "--pattern: expected a sparse method, got .*sheared-llama"),
        (["--method", "wanda", "--target-num-layers", 2], "--target-num-layers: expected a method that cuts it, got"),
    ],
)
def test_a_method_of_another_granularity_is_refused(ask, argv: list[object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ask(ledger(lead), *argv, "--tokens", 200_000)


def test_learned_masks_cut_depth_and_width(ask, tmp_path) -> None:
    """The question is understood; this ledger has no such method."""
    parent = made_up.foreign(tmp_path / "parent")
    sizes = ["--target-num-layers", 2, "--target-ffn-hidden-size", 32]
    content = ledger(lead) | {}
    content["rows"][0]["params"] = open_checkpoint(parent).shape.parameters()
    found = ask(content, "--parent", parent, "--method", "sheared-llama", *sizes, "--tokens", 200_000)
    assert "with sheared-llama was not measured" in found.reasons[0]


def test_one_seed_is_a_lean_and_no_answer(ask) -> None:
    found = ask(ledger(lead, seeds=1), "--ratio", 0.5, "--tokens", 100_000)
    assert (found.answer, found.lean, found.method) == (answer.UNKNOWN, "prune", "b")
    assert "1 seed: how far others would scatter" in found.reasons[0]
    assert found.settle[0].startswith("2 more seeds of b, a, 3 in all: ") and found.more_seeds == 2


def test_what_the_seeds_leave_open_says_how_many_would_do(ask) -> None:
    found = ask(ledger(lambda *_: 0.03, noise=0.02, rng=4), "--ratio", 0.5, "--tokens", 100_000)
    assert found.answer == answer.UNKNOWN and "do not tell" in found.reasons[0]
    assert found.more_seeds in (3, 9, 21, 45) and f"{found.more_seeds} more seeds" in found.settle[0]


def test_between_two_ratios_only_where_both_say_the_same(ask) -> None:
    agree = ask(ledger(lead, ratios=(0.25, 0.5)), "--ratio", 0.4, "--tokens", 100_000)
    assert agree.answer == "prune" and "40% was not measured: at 25% and 50%" in agree.caveats[0]
    differ = ledger(lambda _, ratio, __: 0.3 if ratio == 0.25 else -0.3, ratios=(0.25, 0.5))
    found = ask(differ, "--ratio", 0.4, "--tokens", 100_000)
    assert found.answer == answer.UNKNOWN and "at 25%: prune; at 50%: scratch" in found.reasons[0]
    assert ask(differ, "--ratio", 0.26, "--tokens", 100_000).answer == "prune"
    assert ask(differ, "--ratio", 0.4, "--ratio-of", "all", "--tokens", 100_000).answer == "scratch"
    assert ask(differ, "--target-params", 600_000, "--tokens", 100_000).answer == "scratch"  # 40% of all, as above


def test_between_budgets_it_reads_the_laws(ask) -> None:
    found = ask(ledger(lambda *_: 0.2), "--ratio", 0.5, "--tokens", 300_000)
    assert found.answer == "prune" and found.caveats[0].startswith("a, b: not run at this budget")
    assert found.scratch_loss == pytest.approx(2 + 3**-0.5, abs=0.01)
    exact = ask(ledger(lambda *_: 0.2), "--ratio", 0.5, "--tokens", 200_000)
    assert not any("not run" in caveat for caveat in exact.caveats)


def test_gpu_hours_are_tokens_by_the_flops_of_the_pruned_model(ask) -> None:
    hours = 200_000 * 3_000_000 / 4e14 / 3600
    found = ask(ledger(lead), "--ratio", 0.5, "--gpu-hours", hours, "--gpu-flops", 4e14)
    assert found == ask(ledger(lead), "--ratio", 0.5, "--tokens", 200_000)


def test_dense_scratch_beside_sparse_models_is_said(ask) -> None:
    dense = ask(ledger(lead, pattern="2:4", methods=("b",)), "--pattern", "2:4", "--tokens", 100_000)
    assert dense.answer == "prune" and dense.method == "b 2:4"
    assert any("scratch has no masks" in caveat for caveat in dense.caveats)
    masked = ledger(lead, pattern="2:4", methods=("b",), against="masked")
    assert not any("no masks" in c for c in ask(masked, "--pattern", "2:4", "--tokens", 100_000).caveats)


def test_what_more_seeds_cost_is_both_arms_of_each_method(ask) -> None:
    """Two seeds more of both methods at equal total tokens, where scratch has the parent's tokens too."""
    content = ledger(lead, seeds=1, setting="equal-total")
    for row in content["rows"]:
        if row["arm"] == "scratch":
            row["tokens_train"] += 5_000_000
    found = ask(content, "--ratio", 0.5, "--tokens", 100_000, "--setting", "equal-total")
    tokens = 2 * 2 * (100_000 + 100_000 + 5_000_000)
    assert found.settle[0].endswith(f": 8 runs at most, {tokens:,} tokens, {3e6 * tokens:.2e} FLOPs")


@pytest.mark.parametrize(("factor", "same"), [(1.09, True), (0.91, True), (1.11, False), (0.89, False)])
@pytest.mark.parametrize(("flag", "value"), [("--parent-params", 1_000_000), ("--parent-tokens", 5_000_000)])
def test_a_parent_within_a_tenth_is_the_same(ask, flag: str, value: int, factor: float, same: bool) -> None:
    found = ask(ledger(lead), "--ratio", 0.5, "--tokens", 100_000, flag, round(value * factor))
    assert (found.answer == "prune") == same and (found.answer == answer.UNKNOWN) == (not same)


@pytest.mark.parametrize(("ratio", "same"), [(0.519, True), (0.481, True), (0.521, False), (0.479, False)])
def test_a_ratio_within_two_hundredths_is_the_same(ask, ratio: float, same: bool) -> None:
    found = ask(ledger(lead), "--ratio", ratio, "--tokens", 100_000)
    assert (found.answer == "prune") == same and ("beyond the ratios" in " ".join(found.reasons)) == (not same)


@pytest.mark.parametrize(("tokens", "measured"), [(201_900, True), (198_100, True), (202_100, False), (197_900, False)])
def test_a_budget_within_a_hundredth_is_the_one_that_was_run(ask, tokens: int, measured: bool) -> None:
    found = ask(ledger(lead), "--ratio", 0.5, "--tokens", tokens)
    assert any("not run at this budget" in caveat for caveat in found.caveats) == (not measured)


def test_seeds_between_two_looks_wait_for_the_next(ask) -> None:
    five = ask(ledger(lambda *_: 0.05, seeds=5, noise=0.02, rng=1), "--ratio", 0.5, "--tokens", 100_000)
    content = ledger(lambda *_: 0.05, seeds=5, noise=0.02, rng=1)
    content["rows"] = [row for row in content["rows"] if row["seed"] not in (4, 5)]
    content["comparisons"] = [made for made in content["comparisons"] if made["seed"] not in (4, 5)]
    first = ask(content, "--ratio", 0.5, "--tokens", 100_000)
    assert (five.gap, five.confidence, five.look) == (first.gap, first.confidence, 1)
    assert "5 seeds are there and the first 3 are used" in five.caveats[0] and not any(
        "used" in c for c in first.caveats
    )
    assert first.more_seeds and five.more_seeds == first.more_seeds - 2


def test_wrong_answers_are_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the arms do not differ, any answer is wrong; if they do, its sign can be."""
    monkeypatch.setattr(ledgers.Curve, "break_even", lambda self: None)  # words alone, and slow
    wrong: Counter[str] = Counter()
    right = 0
    generator = np.random.default_rng(0)
    for _ in range(150):
        seeds = int(generator.integers(3, 6))
        for name, gap in (("none", 0.0), ("real", 0.02), ("large", 0.1)):
            content = ledger(lambda *_, gap=gap: gap, seeds=seeds, noise=0.02, rng=int(generator.integers(1 << 30)))
            for row in content["rows"]:  # one shape for both methods
                if row["arm"] == "scratch" and "-b-" in row["cell"]:
                    row["test_loss"] -= 0.01
                elif row["arm"] == "pruned" and "-b-" in row["cell"]:
                    row["test_loss"] -= 0.01
            curves = ledgers._curves(content["comparisons"], {row["cell"]: row for row in content["rows"]})
            read = ledgers.Measurements("made-up", 1_000_000, 5_000_000, True, curves)
            said = answer.advise(read, question.AdvisedTarget(0.5, "linears", "equal-training", tokens=400_000)).answer
            wrong[name] += said == "scratch" or (said == "prune" and not gap)
            right += name == "large" and said == "prune"
    assert wrong["none"] < 0.05 * 150 and wrong["real"] < 0.05 * 150
    assert right > 0.6 * 150  # false answers are not rare because there are no answers


def test_an_explicit_shape_is_a_ratio_of_its_parent_and_what_it_cuts(ask, tmp_path: Path) -> None:
    given = {flag.replace("-", "_"): str(value) for flag, value in made_up.SHAPE_FLAGS.items()} | {"seed": "1"}
    shape = made_up._write_parent(tmp_path / "parent", given)
    whole = {"initial": None, "lineage": [], "complete": True, "stream": None, "range": None, "steps": 1, "seed": 1}
    whole |= {
        "global_batch_size": 1,
        "seq_length": 1,
        "flops_executed": 1,
        "masks": None,
        "arguments": {},
        "final": None,
    }

    def accounted(tokens: int) -> None:
        (tmp_path / "parent" / "account.json").write_text(json.dumps(whole | {"tokens": tokens}))

    accounted(PARENT["tokens_train"])
    content = ledger(lead)
    content["rows"][0]["params"] = shape.parameters()
    argv = ("--parent", tmp_path / "parent", "--tokens", 100_000)
    for row in content["rows"][1:]:
        row["shape"] = "L2h32H4G2d8F64" if "-a-" in row["cell"] else "L4h32H4G2d8F8"
    found = ask(content, *argv, "--target-num-layers", 2)
    assert (found.answer, found.method) == ("prune", "a")  # b, the better one, is not cut in depth
    assert ask(content, *argv, "--target-ffn-hidden-size", 8).answer == answer.UNKNOWN  # 38% of the linears
    assert "a shape cut in hidden_size" in ask(content, *argv, "--target-hidden-size", 16).reasons[0]
    accounted(1)
    assert "1 tokens of training" in ask(content, *argv, "--target-num-layers", 2).reasons[0]
    for wrong, text in ((4, "the parent's"), (5, "expected 1 to 4")):
        with pytest.raises(UsageError, match=text):
            ask(content, *argv, "--target-num-layers", wrong)


@pytest.mark.parametrize("name", family_models.PUBLISHED)
def test_the_parent_may_be_a_config_alone(ask, name: str, tmp_path: Path) -> None:
    """Half of the layers of a published model are half of the blocks' linear weights."""
    folder = family_models.write_published(tmp_path / name, name)
    config, parameters = family_models.PUBLISHED[name]
    half = config.get("num_hidden_layers", config.get("n_layer")) // 2
    found = ask(ledger(lead), "--hf", folder, "--target-num-layers", half, "--tokens", "200k")
    assert found.answer == "don't know" and f"the parent has {parameters:,} parameters" in found.reasons[0]
    assert "50% removed" in found.settle[0]
    with pytest.raises(UsageError, match="--hf, --parent-params: expected at most one"):
        ask(ledger(lead), "--hf", folder, "--parent-params", 5, "--ratio", 0.5, "--tokens", "200k")


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        ([], "--ratio: expected .*, got no target"),
        (
            ["--ratio", 0.5, "--target-params", 1000, "--tokens", "1M"],
            "--ratio: expected .*, got --ratio and --target-params",
        ),
        (["--ratio", 1.5, "--tokens", "1M"], "--ratio: expected .*, got 1.5"),
        (["--ratio", 0.5], "--tokens, --gpu-hours: expected .*, got neither"),
        (["--ratio", 0.5, "--tokens", "1M", "--gpu-hours", 3], "--tokens, --gpu-hours: expected .*, got both"),
        (["--ratio", 0.5, "--gpu-hours", 3], "--gpu-hours: expected .*, got 3.0"),
        (["--ratio", 0.5, "--tokens", "1M", "--gpu-flops", 3], "--gpu-flops: expected .*, got 3.0"),
        (
            ["--target-num-layers", 2, "--tokens", "1M"],
            "--target-num-layers: expected --parent CKPT or --hf HF with it, got none",
        ),
        (["--target-params", "2M", "--tokens", "1M"], "--target-params: expected 1 to 999999.*, got 2000000"),
        (["--target-params", 1000, "--ratio-of", "all", "--tokens", "1M"], "--ratio-of: expected .*, got all"),
        (["--pattern", "4:2", "--tokens", "1M"], "--pattern: expected .*, got 4:2"),
        (
            ["--pattern", "unstructured", "--target-params", 1000, "--tokens", "1M"],
            "--pattern: expected .*, got unstructured",
        ),
    ],
)
def test_targets_that_make_no_sense_are_refused(ask, argv, flag: str) -> None:
    with pytest.raises(UsageError, match=f"^{flag}".replace("(", r"\(")):
        ask(ledger(lead), *argv)


def of_an_earlier_version() -> dict[str, Any]:
    content = ledger(lead)
    for made in content["comparisons"]:
        del made["sparse"]
    return content


@pytest.mark.parametrize("content", [{}, [1], {"study": "x", "rows": [], "comparisons": []}, of_an_earlier_version()])
def test_what_is_no_ledger_is_refused(tmp_path: Path, content: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text(json.dumps(content))
    for path in (tmp_path / "x.json", tmp_path / "missing"):
        assert main(["advise", "--ledger", str(path), "--ratio", "0.5", "--tokens", "1M"]) == EXIT_REFUSED
        assert "--ledger: expected" in capsys.readouterr().err


def test_the_verb_prints_and_writes_the_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report").mkdir()
    content = ledger(lead)
    (tmp_path / "report" / "results.json").write_text(json.dumps(content))
    output = tmp_path / "advice.json"
    argv = ["advise", "--ledger", str(tmp_path), "--ratio", "0.5", "--tokens", "100k", "--json", str(output)]
    assert main(argv) == 0
    printed = capsys.readouterr().out.splitlines()
    written = artifacts.read_json(output)
    assert printed[0] == "Prune: b." and written["answer"] == "prune" and written["words"] == printed
    assert written["target"]["tokens"] == 100_000 and written["gap"]["seeds"] == 3
    assert "conditional on one parent" in " ".join(printed)
    said = next(line for line in printed if "confidence" in line)
    assert "corrected for asking again with more seeds, look 1 of 5, for picking the best of 2 arms" in said
    assert f"{written['gap']['freedom']:.3g} degrees of freedom" in said and written["picked_from"] == 2


def test_a_compact_ledger_says_the_same(ask) -> None:
    content = ledger(lead) | {"verdicts": [{"long": "text"}], "stages": {}}
    for row in content["rows"]:
        row |= {"validation_loss": 3.0, "tokens_declared": False}
    short = ledgers.compact(content)
    assert "verdicts" not in short
    argv = ("--ratio", 0.5, "--tokens", 100_000)
    assert ask(short, *argv) == ask(content, *argv)


def test_the_shipped_ledger_answers_and_knows_its_limits(capsys: pytest.CaptureFixture[str]) -> None:
    shipped = ledgers.read(ledgers.SHIPPED)
    curve = shipped.curves[0]
    assert len(curve.arms.seeds) >= 3
    asked = ["--ratio", f"{curve.removed_linears:.3f}", "--setting", curve.setting]
    assert main(["advise", *asked, "--tokens", str(curve.arms.tokens[0])]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"  from study {shipped.study}")
    page = " ".join((Path(__file__).parents[3] / "docs" / "pages" / "reports.md").read_text().split())
    for setting, tokens, said in (
        ("equal-training", "1.4M", ["Prune: shortgpt", "+0.777 nats"]),
        ("equal-total", "7200768", ["Don't know", "-0.001 nats"]),
    ):
        assert main(["advise", "--ratio", "0.5", "--tokens", tokens, "--setting", setting]) == 0
        printed = capsys.readouterr().out
        assert all(text in printed and text.replace("-0", "−0") in page for text in said)
    assert main(["advise", *asked, "--tokens", "1T"]) == 0
    assert capsys.readouterr().out.startswith("Don't know")


def test_the_ledger_module_shortens_a_report(tmp_path: Path) -> None:
    content = ledger(lead)
    for row in content["rows"]:
        row |= {"validation_loss": 3.0, "tokens_declared": False}
    (tmp_path / "results.json").write_text(json.dumps(content))
    ledgers.shorten(tmp_path / "results.json", tmp_path / "short.json")
    assert ledgers.read(tmp_path / "short.json").curves[0].label == "a, 50% removed"
    assert len((tmp_path / "short.json").read_text().splitlines()) > 60  # one row per line, so that diffs are readable


def test_a_faster_shape_pays_from_a_number_of_served_tokens(tmp_path, capsys) -> None:
    """By hand: scratch falls by 1 / sqrt(tokens); at 25% removed the same loss needs 3 times fewer tokens."""
    flops = {0.25: 4_500_000, 0.5: 3_000_000}  # per token of training
    offset = {0.25: 0.0, 0.5: 0.5}
    content = ledger(lambda *_: -0.05, noise=0.0, methods=("a",), ratios=(0.25, 0.5))
    for row in content["rows"]:
        if row["arm"] != "parent":
            row["flops_train"] = flops[row["removed_linears"]] * row["tokens_train"]
            row["test_loss"] += offset[row["removed_linears"]]
            row["shape"] = f"L{4 * row['removed_linears']:g}h64H4G2d16F128"
    content["rows"][0] |= {"flops_train": 6_000_000 * PARENT["tokens_train"], "test_loss": 1.9}
    # At 50% and 800,000 tokens scratch has 2.5 + 8 ** -0.5 = 2.854; at 25% that loss lies between 100,000 tokens (3)
    # and 200,000 (2.707), on a line in log(tokens).
    loss, ends = 2.5 + 8**-0.5, (3.0, 2 + 2**-0.5)
    needed = 100_000 * 2 ** ((ends[0] - loss) / (ends[0] - ends[1]))
    spent, other = 800_000 * 3_000_000, needed * 4_500_000
    (tmp_path / "results.json").write_text(json.dumps(content))
    words = ["advise", "--ledger", str(tmp_path / "results.json"), "--ratio", "0.5", "--tokens", "800k"]
    assert main([*words, "--served-tokens", "2M", "--json", str(tmp_path / "advice.json")]) == 0
    printed = capsys.readouterr().out
    found = artifacts.read_json(tmp_path / "advice.json")["served"]
    best, rivals = found["advised"], {rival["name"]: rival for rival in found["rivals"]}
    assert best["name"] == "scratch of shape L2h64H4G2d16F128" and best["loss"] == pytest.approx(loss)
    assert (best["training"], best["serving"]) == (spent, 1_000_000)
    slower = rivals["scratch of shape L1h64H4G2d16F128"]
    assert slower["tokens"] == pytest.approx(needed) and slower["loss"] == pytest.approx(loss)
    even = (spent - other) / (1_500_000 - 1_000_000)
    assert slower["break_even"] == pytest.approx(even) and even > 2_000_000
    assert rivals["the parent as it is"]["break_even"] == pytest.approx(spent / (2_000_000 - 1_000_000))
    assert f"scratch of shape L2h64H4G2d16F128 costs less from {even:,.0f} served tokens on" in printed
    assert f"{spent + 2e6 * 1e6:.3g} with 2,000,000 served" in printed
    total = [rival["training"] + rival["serving"] * 2e6 for rival in found["rivals"]]
    assert total == sorted(total)


def test_served_tokens_at_equal_total_or_beyond_the_ledger(tmp_path, capsys) -> None:
    content = ledger(lead, setting="equal-total")
    (tmp_path / "results.json").write_text(json.dumps(content))
    words = ["advise", "--ledger", str(tmp_path / "results.json"), "--ratio", "0.5", "--served-tokens", "1B"]
    assert main([*words, "--tokens", "200k", "--setting", "equal-total"]) == EXIT_REFUSED
    assert "--served-tokens: expected --setting equal-training, got --setting equal-total" in capsys.readouterr().err
    assert main([*words, "--tokens", "200k"]) == 0
    assert "the ledger does not reach this target" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("one", "other", "tokens"),
    [((9.0, 1.0), (3.0, 3.0), 3.0), ((3.0, 3.0), (9.0, 1.0), 3.0), ((1.0, 1.0), (3.0, 3.0), 0.0),
     ((1.0, 2.0), (3.0, 2.0), None)],
)  # fmt: skip
def test_break_even_in_served_tokens(one, other, tokens) -> None:
    from megatron_prune.study.advise.lifetime import Served, break_even

    made = [Served("x", 2.0, 1.0, training, serving) for training, serving in (one, other)]
    assert break_even(*made) == tokens
    if tokens:
        assert made[0].lifetime(tokens) == made[1].lifetime(tokens)
