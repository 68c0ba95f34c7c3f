"""Tampering with an account: the comparison is refused, naming both runs and the field."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest

from megatron_prune.errors import AccountError
from megatron_prune.study import match, pair
from megatron_prune.training import lineage, objective

STREAM = {
    "id": "s", "seed": 1, "seq_length": 32, "epochs": 1, "blend": [[None, "a"]], "corpora": ["text of a"],
    "samples": 9000,
}  # fmt: skip


def account(start: str, first: int, end: int, **arguments: Any) -> dict[str, Any]:
    steps = (end - first) // 16
    return {
        "complete": True,
        "start": start,
        "stream": STREAM,
        "range": [first, end],
        "permutation_seed": 1,
        "global_batch_size": 16,
        "micro_batch_size": 4,
        "seq_length": 32,
        "steps": steps,
        "tokens": (end - first) * 32,
        "unique_tokens": (end - first) * 32,
        "seed": 1,
        "parameters": 1000,
        "masks": None,
        "initial": None,
        "lineage": [],
        "flops_executed": steps * 10**6,
        "arguments": {
            "lr": 1e-3,
            "weight_decay": 0.1,
            "train_iters": steps,
            "lr_decay_iters": steps,
            "stream_range": f"{first}:{end}",
            "save": f"runs/{start}",
            **arguments,
        },
    }


PARENT = account("random", 0, 1600)
PRUNED = account("pruned", 1600, 2400, pretrained_checkpoint="p", finetune=True, shape_from=None)
PRUNED["initial"] = {"fingerprint": "w"}
PRUNING = {"kind": "pruned", "run": "pruning", "start": "p", "end": "w", "method": "m", "tokens": 0, "flops": 0}
TEXT = {name: {"fingerprint": f"{name} text", "windows": 16, "seq_length": 32} for name in ("test", "validation")}
TEXTS = dict.fromkeys(("run-p", "run-s", "parent"), TEXT)


def runs(
    pruned: dict, scratch: dict, texts: dict = TEXTS, warmup: Any = lambda steps: 0, parent: dict | None = PARENT,
) -> pair.Runs:  # fmt: skip
    """With a lineage that agrees with the parent's account."""
    stages = [] if parent is None else [lineage.trained(parent, run="parent", end="p")]
    pruned = pruned | {"lineage": [*stages, PRUNING]}
    return pair.Runs("run-p", "run-s", pruned, scratch, weights="w", texts=texts, warmup=warmup, parent=stages)


EQUAL_TRAINING = account("random", 1600, 2400, pretrained_checkpoint=None, finetune=False, shape_from="p")
EQUAL_TOTAL = account("random", 0, 2400, pretrained_checkpoint=None, finetune=False, shape_from="p")


def training(pruned: dict = PRUNED, scratch: dict = EQUAL_TRAINING, parent: dict | None = PARENT) -> list[pair.Line]:
    return match.equal_training(runs(pruned, scratch, parent=parent))


def total(
    pruned: dict = PRUNED, scratch: dict = EQUAL_TOTAL, parent: dict | None = PARENT, consumed: int = 0,
    parent_tokens: int = 51_200,
) -> list[pair.Line]:  # fmt: skip
    return match.equal_total(runs(pruned, scratch, parent=parent), parent_tokens, consumed)


def flops(
    pruned: dict = PRUNED, scratch: dict | None = None, parent: dict | None = PARENT, spent: int = 0,
    parent_flops: int = 100 * 10**6,
) -> list[pair.Line]:  # fmt: skip
    """The parent executed the FLOPs of 100 steps, the pruned arm 50; scratch has 150 by default."""
    return match.equal_flops(runs(pruned, scratch or EQUAL_TOTAL, parent=parent), parent_flops, spent)


def test_what_matches_is_listed() -> None:
    lines = {line.field: line for line in training()}
    assert lines["range"].verdict == "equal" and lines["range"].pruned == [1600, 2400]
    assert lines["arguments.save"].verdict == "may differ: output path"
    assert lines["arguments.shape_from"].verdict == lines["arguments.finetune"].verdict == "may differ: start"
    assert lines["all other resolved arguments"].pruned == 5
    assert lines["range against the parent's"].verdict == "disjoint"
    lines = {line.field: line for line in total()}
    assert lines["total tokens"].verdict == "equal"
    assert lines["arguments.train_iters"].verdict == "may differ: own steps"
    lines = {line.field: line for line in flops()}
    assert lines["total FLOPs"].verdict == "equal" and lines["total FLOPs"].scratch == "150,000,000"
    assert lines["evaluation text"].pruned == "test test text 16 x 32, validation validation t 16 x 32"
    assert (lines["weights at the start"].pruned, lines["weights at the start"].scratch) == ("w", "random")


ONLINE = objective.distill(alpha=0.5, temperature=2.0, kl="forward", teacher="p")


def distilled(made: dict, asked: dict = ONLINE, **arguments: Any) -> dict:
    """The same run, distilled; its teacher's forward pass costs 10**5 FLOPs per step."""
    own = {"objective": "distill", "distill_alpha": "0.5", "teacher": "parent", **arguments}
    return made | {
        "objective": asked, "flops_teacher": made["steps"] * 10**5, "arguments": made["arguments"] | own
    }  # fmt: skip


def test_runs_match_only_with_the_same_objective() -> None:
    lines = {line.field: line for line in training(distilled(PRUNED), distilled(EQUAL_TRAINING))}
    assert lines["objective"].pruned == "distill: alpha 0.5, temperature 2, forward KL, online"
    assert lines["teacher"].verdict == "equal" and "the teacher's training" not in lines
    assert "objective" not in {line.field for line in training()}
    for change, field in (
        ({"alpha": 0.25}, "alpha"), ({"temperature": 1.0}, "temperature"), ({"kl": "reverse"}, "kl"),
        ({"teacher": "q"}, "teacher"), ({"hidden": 0.1}, "hidden"),
    ):  # fmt: skip
        with pytest.raises(AccountError, match=f"objective: {field}: "):
            training(distilled(PRUNED), distilled(EQUAL_TRAINING, ONLINE | change))
    for pruned, scratch in ((distilled(PRUNED), EQUAL_TRAINING), (PRUNED, distilled(EQUAL_TRAINING))):
        with pytest.raises(AccountError, match="objective: name: "):
            training(pruned, scratch)


def test_runs_may_read_different_caches_of_one_teacher() -> None:
    """Of one k and type: scratch at equal total reads a longer range than the retraining."""
    cache = {"hash": "a", "range": [1600, 2400], "dtype": "float16", "bytes": 1, "flops": 800}
    given = {"alpha": 0.5, "temperature": 2.0, "kl": "forward", "teacher": "p"}
    ours = objective.distill(**given, top_k=8, cache=cache)
    theirs = objective.distill(**given, top_k=8, cache=cache | {"hash": "b", "range": [0, 2400]})
    pruned = distilled(PRUNED, ours, teacher_cache="a")
    lines = {line.field: line for line in total(pruned, distilled(EQUAL_TOTAL, theirs, teacher_cache="b"))}
    assert lines["objective"].scratch.endswith("cache of the top 8")
    assert lines["arguments.teacher_cache"].verdict.startswith("may differ")
    assert lines["the teacher's training"].verdict == "may differ: start"
    for other in (theirs | {"top_k": 16}, theirs | {"cache": cache | {"dtype": "float32"}}, ONLINE):
        with pytest.raises(AccountError, match="objective: (top_k|dtype|online): "):
            total(pruned, distilled(EQUAL_TOTAL, other))


def test_equal_flops_counts_the_teachers() -> None:
    """Of the parent 100 steps of 10, of the pruned arm 50 of 11 tenths, as many as 140.9 steps of scratch."""
    scratch = account("random", 0, 141 * 16, pretrained_checkpoint=None, finetune=False, shape_from="p")
    lines = {line.field: line for line in flops(distilled(PRUNED), distilled(scratch))}
    assert lines["total FLOPs"].scratch == "155,100,000"
    assert lines["total FLOPs"].pruned == "155,000,000 = 100,000,000 parent + 55,000,000 retraining + 0 pruning"
    with pytest.raises(AccountError, match="total FLOPs"):  # 150 steps, which are enough without the teacher
        flops(distilled(PRUNED), distilled(EQUAL_TOTAL))


def twins(run: dict, plain: dict, *, own_steps: bool = False) -> list[pair.Line]:
    return match.equal_but_for_teacher(runs(run, plain), own_steps=own_steps)


def test_what_a_teacher_gives_is_the_difference_of_runs_that_differ_in_nothing_else() -> None:
    lines = {line.field: line for line in twins(distilled(PRUNED), PRUNED)}
    assert lines["arguments.distill_alpha"].verdict == "may differ: the teacher"
    assert lines["weights at the start"].pruned == "w"
    twins(distilled(EQUAL_TRAINING), EQUAL_TRAINING)
    for run, plain, field in (
        (distilled(PRUNED), distilled(PRUNED), "objective"),
        (PRUNED, PRUNED, "objective"),
        (distilled(tampered(PRUNED, "arguments.lr", 2e-3)), PRUNED, "arguments.lr"),
        (distilled(PRUNED | {"seed": 2}), PRUNED, "seed"),
        (distilled(PRUNED | {"masks": "m"}), PRUNED, "masks"),
        (distilled(PRUNED | {"initial": {"fingerprint": "v"}}), PRUNED, "weights at the start"),
        (distilled(EQUAL_TOTAL), EQUAL_TRAINING, "range"),
    ):
        with pytest.raises(AccountError, match=field):
            twins(run, plain)
    twins(distilled(EQUAL_TOTAL), EQUAL_TRAINING, own_steps=True)


def test_what_masks_were_learned_on_is_training_too() -> None:
    """Equal training: as many tokens more for scratch, from the same first sample on."""
    learned = lineage.trained(account("continued", 2400, 2560), run="masks", end="m")
    stage = PRUNING | {"tokens": learned["tokens"], "learned": learned}

    def compared(end: int, first: int = 1600) -> list[match.Line]:
        scratch = account("random", first, end, pretrained_checkpoint=None, finetune=False, shape_from="p")
        made = runs(PRUNED, scratch)
        return match.equal_training(replace(made, pruned=PRUNED | {"lineage": [*made.parent, stage]}))

    lines = {line.field: line for line in compared(2560)}
    assert lines["tokens"].pruned == "30,720 = 25,600 retraining + 5,120 learning masks"
    assert lines["range against masks's"].pruned == "1600:2400"
    for end, first, field in ((2400, 1600, "tokens"), (2576, 1600, "tokens"), (2544, 1584, "first sample")):
        with pytest.raises(AccountError, match=field):
            compared(end, first)


def test_retraining_on_what_masks_were_learned_on_is_refused() -> None:
    learned = lineage.trained(account("continued", 2384, 2544), run="masks", end="m")
    made = runs(PRUNED, account("random", 1600, 2560, pretrained_checkpoint=None, finetune=False, shape_from="p"))
    pruned = PRUNED | {"lineage": [*made.parent, PRUNING | {"tokens": learned["tokens"], "learned": learned}]}
    with pytest.raises(AccountError, match="of which masks saw 2384:2400"):
        match.equal_training(replace(made, pruned=pruned))


def tampered(account: dict, path: str, value: Any) -> dict:
    changed = copy.deepcopy(account)
    *inside, last = path.split(".")
    here = changed
    for part in inside:
        here = here[part]
    here[last] = value
    return changed


TAMPERINGS = [
    ("stream.id", "other", "stream.id"),
    ("stream.seed", 2, "stream.seed"),
    ("permutation_seed", 2, "permutation_seed"),  # another order
    ("global_batch_size", 8, "range"),  # another batch, which contradicts the range
    ("seed", 2, "seed"),
    ("parameters", 999, "parameters"),
    ("complete", False, "complete"),
    ("arguments.weight_decay", 0.2, "arguments.weight_decay"),
    ("arguments.lr", 2e-3, "arguments.lr"),
    ("arguments.adam_beta1", 0.8, "arguments.adam_beta1"),  # there is none in the other
    ("start", "continued", "start"),
]


@pytest.mark.parametrize(("path", "value", "field"), TAMPERINGS)
@pytest.mark.parametrize("setting", ["equal-training", "equal-total"])
def test_a_changed_scratch_account_is_refused(setting: str, path: str, value: Any, field: str) -> None:
    compare, scratch = {"equal-training": (training, EQUAL_TRAINING), "equal-total": (total, EQUAL_TOTAL)}[setting]
    with pytest.raises(AccountError, match=f"^{setting}: run-p and run-s may not be compared: {field}: "):
        compare(scratch=tampered(scratch, path, value))


@pytest.mark.parametrize(
    ("scratch", "field"),
    [
        (account("random", 1616, 2416), "range"),  # shifted
        (account("random", 1600, 2384), "range"),  # shorter
        (tampered(EQUAL_TRAINING, "steps", 49), "range"),  # fewer steps than its range
        (tampered(EQUAL_TRAINING, "tokens", 25_568), "tokens"),
        (tampered(EQUAL_TRAINING, "arguments.lr_decay_iters", 60), "arguments.lr_decay_iters"),
    ],
)
def test_equal_training_is_the_same_samples(scratch: dict, field: str) -> None:
    with pytest.raises(AccountError, match=f"run-p and run-s may not be compared: {field}: "):
        training(scratch=scratch)


def test_a_horizon_that_is_not_the_runs_own_steps_is_refused() -> None:
    with pytest.raises(AccountError, match="arguments.lr_decay_iters: run-s has 500, its own steps are 150"):
        total(scratch=tampered(EQUAL_TOTAL, "arguments.lr_decay_iters", 500))


@pytest.mark.parametrize("compare", [training, total])
def test_a_launch_that_continued_with_other_arguments_is_seen(compare):
    """Also where both accounts hold the same arguments, those of the launches that began. A path may change."""

    def continued(*changed: dict) -> dict:
        attempts = [{"from_step": 1}, *({"from_step": step + 2, "changed": one} for step, one in enumerate(changed))]
        return PRUNED | {"attempts": attempts}

    compare(continued({"train_data_path": ["moved"], "micro_batch_size": 1}))
    with pytest.raises(AccountError, match="run-p and run-s.*arguments.attention_backend.*fused from step 3 on"):
        compare(continued({"save": "moved"}, {"attention_backend": "fused"}))
    again = continued({"attention_backend": "fused"})
    again["attempts"].append({"from_step": 1})  # nothing had been saved: all steps were repeated
    compare(again)


@pytest.mark.parametrize("end", [2400 + 16, 2400 - 16])
def test_equal_total_allows_one_step(end: int) -> None:
    lines = {line.field: line for line in total(scratch=account("random", 0, end))}
    assert lines["total tokens"].verdict == "within one step"


@pytest.mark.parametrize("end", [2400 + 32, 2400 - 32, 1600])
def test_equal_total_refuses_more_than_that(end: int) -> None:
    with pytest.raises(AccountError, match="total tokens: 76,800 = 51,200 parent"):
        total(scratch=account("random", 0, end))


def test_equal_total_adds_what_pruning_consumed_unless_negligible() -> None:
    with pytest.raises(AccountError, match="2,048 pruning"):
        total(consumed=2048)
    total(consumed=2048, scratch=account("random", 0, 2464))
    total(consumed=70)


def test_changed_tokens_of_the_parent_are_refused() -> None:
    with pytest.raises(AccountError, match="tokens of the parent: 51200 here, 51712 in the accounts"):
        total(parent=account("random", 0, 1616))


@pytest.mark.parametrize("compare", [training, total])
def test_retraining_on_the_parents_samples_is_refused(compare: Any) -> None:
    parent = account("random", 0, 1616)
    arguments = {"parent": parent} | ({"parent_tokens": parent["tokens"]} if compare is total else {})
    with pytest.raises(AccountError, match="the parent saw 1600:1616"):
        compare(**arguments)
    with pytest.raises(AccountError, match="stream.id of the parent"):
        compare(parent=tampered(PARENT, "stream.id", "other"))


def test_equal_flops_counts_what_was_executed_and_what_pruning_spent() -> None:
    dear = tampered(PARENT, "flops_executed", 200 * 10**6)
    with pytest.raises(AccountError, match="total FLOPs: 250,000,000 = 200,000,000 parent"):
        flops(parent=dear, parent_flops=200 * 10**6)
    flops(parent=dear, parent_flops=200 * 10**6, scratch=account("random", 0, 4000))
    with pytest.raises(AccountError, match="FLOPs of the parent: 100000000 here, 200000000 in the accounts"):
        flops(parent=dear)
    with pytest.raises(AccountError, match="5,000,000 pruning"):
        flops(spent=5 * 10**6)
    flops(spent=5 * 10**6, scratch=account("random", 0, 155 * 16))
    flops(spent=10**5)  # below 0.1%


@pytest.mark.parametrize("initial", [None, {"fingerprint": "those of an earlier pruning"}])
@pytest.mark.parametrize("compare", [training, total, flops])
def test_retraining_from_other_weights_is_refused(compare: Any, initial: Any) -> None:
    with pytest.raises(AccountError, match="weights at the start: run-p began with .* its pruning left w"):
        compare(pruned=tampered(PRUNED, "initial", initial))


@pytest.mark.parametrize("run", ["run-p", "run-s", "parent"])
@pytest.mark.parametrize(("key", "value"), [("fingerprint", "other"), ("windows", 8), ("seq_length", 16)])
def test_losses_on_other_text_are_refused(run: str, key: str, value: Any) -> None:
    texts = {**TEXTS, run: TEXT | {"validation": TEXT["validation"] | {key: value}}}
    with pytest.raises(AccountError, match="may not be compared: evaluation text: validation: .* for run-p"):
        match.equal_training(runs(PRUNED, EQUAL_TRAINING, texts))


def test_warm_up_is_the_recipes() -> None:
    def rule(steps: int) -> int:
        return min(steps // 10, 10)

    pruned, scratch = (tampered(one, "arguments.lr_warmup_iters", n) for one, n in ((PRUNED, 5), (EQUAL_TOTAL, 10)))
    lines = match.equal_total(runs(pruned, scratch, warmup=rule), 51_200, 0)
    (line,) = (line for line in lines if line.field == "arguments.lr_warmup_iters")
    assert line.verdict == "may differ: own steps, by the recipe"
    for wrong in (15, 5):
        scratch = tampered(EQUAL_TOTAL, "arguments.lr_warmup_iters", wrong)
        with pytest.raises(AccountError, match=f"lr_warmup_iters: run-s has {wrong}, by the recipe it is 10"):
            match.equal_total(runs(pruned, scratch, warmup=rule), 51_200, 0)


@pytest.mark.parametrize(("path", "value", "field"), TAMPERINGS)
def test_a_changed_account_at_equal_flops_is_refused(path: str, value: Any, field: str) -> None:
    with pytest.raises(AccountError, match=f"^equal-flops: run-p and run-s may not be compared: {field}: "):
        flops(scratch=tampered(EQUAL_TOTAL, path, value))
