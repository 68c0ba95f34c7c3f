"""The studies of examples/llama3.1_8b are planned at their real size, and every command of theirs passes preflight.

Corpora are sparse files of the full length that contain almost nothing.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.cli.study_commands import study_main
from megatron_prune.data.indexed import write_index
from megatron_prune.errors import DataError
from megatron_prune.study import schema
from tests.llama31.example import EXAMPLE, TABLE, launch
from tests.preflight import commands

STUDIES = ("token_scaling", "ratios", "ratios_three_seeds", "sparse", "imported")
SHARD = 38 * 10**9  # tokens of a corpus
STEP = 512 * 8192


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Path:
    """A directory to start from, with the corpora that study.yaml names."""
    root = tmp_path_factory.mktemp("cluster")
    study = schema.load(EXAMPLE / "token_scaling.yaml")
    for number, (_, prefix) in enumerate(study.data.train):
        sparse_corpus(root / prefix, SHARD, number)
    held_out = [study.data.calibration, study.data.validation, study.data.test, *study.evaluation.corpora.values()]
    for number, prefix in enumerate(held_out):
        sparse_corpus(root / prefix, 5_000_000, 100 + number)
    return root


def sparse_corpus(prefix: Path, tokens: int, first: int) -> None:
    """``tokens`` zeros, except for the start of each document, so that no two corpora share a document."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    longest = 2**28 if tokens > 10**9 else 1_000_003
    lengths = [longest] * (tokens // longest) + [tokens % longest]
    with open(f"{prefix}.bin", "wb") as handle:
        for document in range(len(lengths)):
            handle.seek(4 * document * longest)
            handle.write(np.array([first + 1], np.int32).tobytes())
        handle.truncate(4 * tokens)
    write_index(f"{prefix}.idx", [np.array(lengths)], [np.ones(len(lengths), np.int64)], "int32")


SPEED = ["--throughput", "40%", "--gpus", "1024"]


def plan(name: str, folder: Path, *words: str) -> str:
    """The output of `study plan --commands` for a study, in a folder to start from."""
    output = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(output):
        assert study_main(["plan", str(EXAMPLE / f"{name}.yaml"), "--commands", *SPEED, *words]) == 0
    return output.getvalue()


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> dict[str, str]:
    """For each study, without corpora, parent or weights."""
    nothing = tmp_path_factory.mktemp("nothing")
    return {name: plan(name, nothing, "--corpus-tokens", "760B") for name in STUDIES}


def test_a_study_is_planned_before_anything_is_there_as_it_is_afterwards(planned, cluster) -> None:
    ahead, there = (text.splitlines() for text in (planned["token_scaling"], plan("token_scaling", cluster)))
    note = "27 corpora are not there: 760,000,000,000 tokens are taken to be in data.train"
    assert [line for line in ahead if line not in there] == [note] and not [line for line in there if line not in ahead]
    assert len(there) > 100


def test_what_is_taken_for_granted_is_said(planned) -> None:
    for name in STUDIES:
        printed = planned[name]
        assert ("the parent is not there yet: its shape is what parent.shape says" in printed) == (
            name != "token_scaling"
        )
        assert "memory is not known" not in printed and "not run" not in printed


def test_a_corpus_that_is_too_short_is_refused_before_it_is_there(tmp_path) -> None:
    for enough in ("735B", "733B"):  # P200 and R500
        words = ["plan", str(EXAMPLE / "token_scaling.yaml"), "--corpus-tokens", enough]
        with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()):
            if enough == "735B":
                assert study_main(words) == 0
                continue
            with pytest.raises(DataError, match="data.train is not enough for pruned-.*expected an end of at most"):
                study_main(words)
            with pytest.raises(DataError, match="common.yaml, line 14: .*--corpus-tokens|--corpus-tokens"):
                study_main(words[:2])


def test_shapes_recipe_and_data_are_those_of_the_launch_lines() -> None:
    for name in STUDIES:
        study = schema.load(EXAMPLE / f"{name}.yaml")
        for method in study.methods:
            if method.target:
                width, ratio = method.label.startswith(("width", "sheared")), method.label.partition("-")[2]
                of_table = TABLE["targets"][f"{'width' if width else 'depth'}-{ratio}"]
                if "shapes" in method.target:
                    chosen = f"{of_table['hidden-size']}/32/{of_table['ffn-hidden-size']}"
                    assert chosen in method.target["shapes"]  # what the layouts are for
                else:
                    assert method.target == of_table | ({"num-attention-heads": 32} if width else {})
        ours = launch.TABLE["recipe"] | {"seq-length": study.data.seq_length}
        assert float(ours["lr"]) in study.recipe.rates and study.recipe.global_batch_size == ours["global-batch-size"]
        assert study.recipe.rates == ([1e-5, 3e-5, 1e-4, 3e-4, 1e-3] if name == "ratios" else [3e-4])
        assert float(ours["lr"]) * study.recipe.min_lr_fraction == pytest.approx(float(ours["min-lr"]))
        assert (study.recipe.warmup_fraction, study.recipe.warmup_at_most) == (0.05, None)
        for flag, value in study.recipe.arguments.items():
            if flag in ours:
                assert value == ours[flag], flag
        assert study.parent.flags == TABLE["model"]


def test_budgets_are_the_authors_steps(planned) -> None:
    scaling, ratios = planned["token_scaling"], planned["ratios"]
    for steps in (2500, 7500, 12500, 62500, 125000):
        assert re.search(rf"pruned-depth-50-\S*t{steps * STEP} ", scaling), steps
    assert "0:25600000" in scaling  # P200: 50,000 steps
    assert "25600000:32000000" in ratios and "0:32000000" in ratios  # R50 and S50; S250
    for target in ("L16h4096", "L32h1536"):
        assert f"scratch-{target}" in ratios and re.search(rf"scratch-{target}\S*-equal-total-", ratios), target
    assert "equal-training" in planned["imported"] and "equal-total" not in planned["imported"]


def test_six_methods_at_four_ratios() -> None:
    study = schema.load(EXAMPLE / "ratios.yaml")
    found = {(m.name, (m.label or "").partition("-")[2]) for m in study.methods if m.target}
    names = ("shortgpt", "minitron-depth", "minitron-width", "sheared-llama")
    assert found == {(name, ratio) for name in names for ratio in ("50", "62.5", "75", "81.25")}
    assert {m.pattern for m in study.methods if m.name == "sparsegpt"} == {"unstructured", "2:4", "4:8"}
    assert study.ratios == [0.5, 0.625, 0.75, 0.8125]
    assert {m.tokens for m in study.methods if m.name == "sheared-llama"} == {100 * STEP}  # 0.42B, as published
    three = schema.load(EXAMPLE / "ratios_three_seeds.yaml")
    assert (study.seeds, three.seeds) == ([1], [1, 2, 3]) and three.methods == study.methods


def test_targets_remove_what_they_are_called() -> None:
    parent = ModelShape.from_args(arguments({}))
    for name, changes in TABLE["targets"].items():
        if not changes:
            continue
        shape = ModelShape.from_args(arguments(changes))
        called = float(name.split("-")[1]) / 100
        removed = 1 - shape.linear_parameters() / parent.linear_parameters()
        assert removed == pytest.approx(called, abs=0.06), name


def arguments(changes: dict) -> dict:
    named = {flag.replace("-", "_"): value for flag, value in (TABLE["model"] | changes).items()}
    return named | {"add_bias_linear": False}


def test_commands_pass_preflight(planned, distributed, tmp_path) -> None:
    """One of each kind: a verb, a target, a start."""
    flags = {target: tmp_path / f"{target}.flags" for target in TABLE["targets"]}
    for target, file in flags.items():
        file.write_text(shlex.join(launch.model(target)))
    lines = {}
    for line in "".join(planned.values()).splitlines():
        words = shlex.split(line) if line.startswith("torchrun") else []
        verb = words[words.index("megatron_prune") + 1] if words else ""
        if verb not in ("pretrain", "calibrate", "sparsify") or "--score" in words:
            continue
        starts = {
            flag: words[words.index(flag) + 1] for flag in ("--pretrained-checkpoint", "--shape-from") if flag in words
        }
        source = next(iter(starts.values()), "")
        target = next((target for target in flags if f"pruning-{target}-" in source), "parent")
        kind = (verb, target, *starts, "--masks" in words)
        lines[kind] = ["--gpus", "64", "--model", str(flags[target]), "--corpus-tokens", "760B", *words]
    assert {kind[1] for kind in lines} == set(flags) - {"sparse"} and ("sparsify", "parent", False) in lines
    assert {kind[-1] for kind in lines} == {True, False}
    [answers] = distributed(commands.answers, 1, list(lines.values()))
    for kind, answer in zip(lines, answers, strict=True):
        assert answer["verdict"] == "yes", f"{kind}: {commands.reasons(answer, 'no')}"
