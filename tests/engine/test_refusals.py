"""Flags without effect, or that start a run which cannot resume, are refused by name."""

from __future__ import annotations

import argparse

import pytest

from megatron_prune.engine import refusals
from megatron_prune.errors import UsageError
from tests.engine import unreached as source


@pytest.fixture(scope="module")
def parser():
    return source.parser()


def refusal(parser, argv):
    with pytest.raises(UsageError) as refused:
        refusals.refuse_without_effect(parser, parser.parse_args(argv), argv)
    return str(refused.value)


def test_the_list_is_what_megatrons_source_says():
    """If Megatron changed: python -m tests.engine.unreached > megatron_prune/engine/unreached.json"""
    assert sorted(refusals.unreached()) == source.unreached()


def test_the_search_finds_what_is_known():
    """Flags whose readers were looked up by hand."""
    unread = refusals.unreached()
    assert {"logits_load_kd_loss_alpha", "fim_rate", "ict_load", "img_h", "grpo_kl_beta", "openai_gelu"} <= unread
    read = "lr seed window_size adam_beta1 overlap_grad_reduce fp8 muon_momentum tokenizer_model save eod_mask_loss"
    assert not set(read.split()) & unread


def words(action: argparse.Action) -> list[str] | None:
    """The action's flag with a value other than its default; None if the parser allows no other."""
    if action.nargs == 0:
        turned = [option for option in action.option_strings if option.startswith("--")]
        return [turned[-1] if action.default is True and len(turned) > 1 else turned[0]]
    if action.choices:
        other = [choice for choice in action.choices if choice != action.default]
        return [action.option_strings[0], str(other[0])] if other else None
    for value in ("7", "0.7", "other", "7,7"):
        try:
            found = action.type(value) if callable(action.type) else value
        except (ValueError, TypeError, AssertionError, argparse.ArgumentTypeError):
            continue
        if found != action.default:
            return [action.option_strings[0], value]
    return None


def test_each_of_them_is_refused_when_given(parser):
    refused = {action.dest: action for action, _ in refusals._refused(parser) if action.option_strings}
    assert set(refusals.unreached()) - set(refusals._ASK_FOR_THE_DEFAULT) <= set(refused)
    tried = 0
    for action in refused.values():
        argv = words(action)
        if argv is None or parser.parse_args(argv) == parser.parse_args([]):
            continue
        assert refusal(parser, argv).startswith(f"{argv[0]}: expected "), argv
        tried += 1
    assert tried > 0.9 * len(refused), (tried, len(refused))


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--logits-load-dir", "/nonexistent"], "the run would train without"),
        (["--logits-load-dir=/nonexistent"], "the run would train without"),
        (["--perform-rl-step"], "other programs"),
        (["--use-megatron-fsdp"], "could not resume"),
        (["--ckpt-format", "torch_dcp"], "could not resume"),
        (["--ckpt-format", "fsdp_dtensor"], "could not resume"),
        (["--non-persistent-ckpt-type", "local"], "pickles"),
        (["--inprocess-restart"], "launcher"),
        (["--hybrid-context-parallel"], "forward step"),
    ],
)
def test_switches_whose_other_half_is_elsewhere_are_refused(parser, argv, why):
    said = refusal(parser, argv)
    assert said.startswith(f"{argv[0].split('=')[0]}: expected ") and why in said


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--logits-load-prefetch-factor", "DEFAULT"],
        ["--use-mcore-models"],
        ["--cuda-graph-impl", "local"],
        ["--ckpt-format", "torch"],
        ["--non-persistent-ckpt-type", "global"],
        ["--use-torch-fsdp2"],
    ],
)
def test_what_has_its_effect_or_is_the_default_passes(parser, argv):
    default = {option: action.default for action in parser._actions for option in action.option_strings}
    argv = [str(default[argv[0]]) if word == "DEFAULT" else word for word in argv]
    refusals.refuse_without_effect(parser, parser.parse_args(argv), argv)


# Of Megatron's own distillation: its library writes the caches, and only pretrain_gpt.py's loss reads them.
WRITTEN = {"logits_save_dir", "logits_save_top_k", "logits_save_top_p", "logits_save_top_p_min_k", "logits_save_dtype"}
READ_BY_PRETRAIN_GPT = {
    "logits_load_dir", "logits_load_kd_loss_alpha", "logits_load_decode_threads", "logits_load_prefetch_factor",
    "logits_load_msc_prefetch_depth", "logits_load_ignore_errors",
}  # fmt: skip


def test_every_flag_of_megatrons_distillation_is_honoured_or_refused(parser):
    """If this fails, Megatron has a new one: find what reads it."""
    (group,) = [group for group in parser._action_groups if group.title == "Logits Distillation"]
    assert {action.dest for action in group._group_actions} == WRITTEN | READ_BY_PRETRAIN_GPT
    refused = {action.dest for action, _ in refusals._refused(parser)}
    assert refused >= READ_BY_PRETRAIN_GPT and not refused & WRITTEN
    argv = ["--logits-save-dir", "logits", "--logits-save-top-k", "4", "--logits-save-dtype", "fp32"]
    refusals.refuse_without_effect(parser, parser.parse_args(argv), argv)


def test_a_run_that_would_not_distill_ends_before_it_starts(job, tmp_path):
    from tests.training.small import MODEL

    recipe = "--mock-data --seq-length 32 --micro-batch-size 1 --train-iters 1 --lr 1".split()
    done = job(["pretrain", *MODEL, *recipe, "--logits-load-dir", "/nonexistent"])
    assert done.returncode == 2 and "Traceback" not in done.output
    (line,) = [line for line in done.output.splitlines() if "logits" in line]
    assert line.startswith("megatron-prune pretrain: --logits-load-dir: expected no such flag here, got /nonexistent")


def test_a_yaml_file_in_place_of_flags_is_refused(job):
    done = job(["pretrain", "--yaml-cfg", "/nonexistent"])
    assert done.returncode == 2 and "Traceback" not in done.output and "got /nonexistent" in done.output
