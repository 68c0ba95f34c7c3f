"""`study plan` before anything is there: corpora as a number of tokens, and a parent by its description.

Memory is that of ``preflight`` for the same command lines.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_prune.cli.study_commands import study_main
from megatron_prune.cli.training_commands import learn_masks_main, pretrain_main
from megatron_prune.errors import DataError, UsageError
from megatron_prune.study import commands, estimate, jobs, rank_memory, validate
from megatron_prune.study.prunings import Places
from tests.convert import family_models
from tests.preflight import commands as preflight
from tests.study import made_up

NOWHERE = {name: f"/not/here/{name}" for name in ("train", "calibration", "validation", "test")}
METHODS = [{"name": "shortgpt"}, {"name": "wanda", "pattern": "2:4", "compare": ["equal-training"]}]
LOAD = {"load": "/not/here/checkpoint"}
SHAPE = made_up.SHAPE_FLAGS


pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


def ahead(corpus_tokens: int | None = 12_000, **changes: Any) -> validate.Outlook:
    """What is known of a study without corpora."""
    study = made_up.study(NOWHERE, methods=changes.pop("methods", METHODS), **changes)
    return validate.check(study, Places(Path("runs/x")), planned=True, corpus_tokens=corpus_tokens)


def estimates(outlook: validate.Outlook, **changes: Any) -> list[estimate.Estimate]:
    return list(estimate.of_study(made_up.study(NOWHERE, methods=METHODS, **changes), outlook))


def test_a_plan_without_corpora_is_the_plan_with_them(prefixes) -> None:
    study = made_up.study(prefixes, methods=METHODS)
    there = validate.check(study, Places(Path("runs/x")), planned=True)
    assert list(estimate.of_study(study, there)) == estimates(ahead()) and not there.assumed
    assert ahead().assumed == ["4 corpora are not there: 12,000 tokens are taken to be in data.train"]


def test_tokens_that_are_there_are_not_taken_from_the_flag(prefixes) -> None:
    study = made_up.study(prefixes, methods=METHODS)
    assert validate.check(study, Places(Path("runs/x")), planned=True, corpus_tokens=10).assumed == []


def test_the_last_sample_decides_and_not_one_token_less() -> None:
    last = max(one for made in estimates(ahead()) for one in [int((made.samples or "0:0").split(":")[1])])
    assert last == 248  # the scratch run of equal total
    ahead(248 * 16 + 1)  # as in a corpus, the last token is only predicted
    with pytest.raises(DataError, match=r"scratch-\S*-equal-total.*an end of at most 247"):
        ahead(248 * 16)
    ahead(124 * 16 + 1, data={**NOWHERE, "seq_length": 16, "epochs": 2}, settings=["equal-training"], budgets=[640],
          parent={"pretrain": {"tokens": 1280, "arguments": SHAPE}})  # fmt: skip


def test_without_the_flag_the_error_says_that_there_is_one() -> None:
    with pytest.raises(DataError, match="train.bin does not exist, nor do 3 more .*--corpus-tokens N"):
        ahead(None)
    study = made_up.study(NOWHERE, methods=METHODS)
    with pytest.raises(DataError, match="train.bin does not exist"):  # nothing is run without its text
        validate.check(study, Places(Path("runs/x")))


@pytest.mark.parametrize("given", ["many", "0", "-5"])
def test_what_is_no_number_of_tokens_is_refused(given: str) -> None:
    Path("study.yaml").write_text(yaml.safe_dump(made_up.mapping(NOWHERE)))
    with pytest.raises(UsageError, match="--corpus-tokens"):
        study_main(["plan", "study.yaml", f"--corpus-tokens={given}"])


def test_a_parent_that_another_study_is_to_train_is_as_if_trained_here() -> None:
    """Its own cell apart: 2,560 tokens are 160 samples, after which retraining begins."""
    trained = ahead()
    parent = {**LOAD, "shape": SHAPE, "planned_tokens": 2560, "equal_total": "run"}
    loaded = ahead(parent=parent)
    assert loaded.source == trained.source and loaded.targets == trained.targets and loaded.lay == trained.lay
    # A study that trains its parent says the shape of dense scratch in flags: such a run waits for nothing.
    assert [replace(one, after=()) for one in estimates(loaded, parent=parent)] == [
        replace(one, after=()) for one in estimates(trained) if one.cell != "parent"
    ]
    assert "the parent is not there yet: its shape is what parent.shape says" in loaded.assumed


def test_a_parent_from_elsewhere_has_no_place_on_the_stream() -> None:
    declared = ahead(parent={**LOAD, "shape": SHAPE, "declared_tokens": "2T"})
    assert declared.lay.parent_end == 0 and declared.lay.parent_tokens == declared.lay.declared == 2 * 10**12


@pytest.mark.parametrize("how", ["directory", "file", "import", "cache"])
def test_the_shape_is_that_of_a_hugging_face_config(how: str, tiny_hf, tmp_path: Path, monkeypatch) -> None:
    """Of LlamaConfig as transformers wrote it, and of its name in a cache, without a network."""
    folder = tiny_hf("llama-gqa", layers=4)
    config = json.loads((folder / "config.json").read_text())
    parent: dict[str, Any] = {**LOAD, "shape": str(folder)}
    if how == "file":
        parent["shape"] = str(folder / "config.json")
    if how == "import":
        parent = {"import_hf": str(folder)}
    if how == "cache":
        from huggingface_hub import constants

        snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / "0123"
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps(config))
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("0123")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        parent["shape"] = "some/model"
    found = ahead(parent=parent, methods=METHODS[:1]).source
    assert found is not None and found.num_layers == 4
    assert (found.hidden_size, found.ffn_hidden_size) == (config["hidden_size"], config["intermediate_size"])
    heads = config["num_attention_heads"], config["num_key_value_heads"]
    assert (found.num_attention_heads, found.num_query_groups) == heads
    assert found.tied == config["tie_word_embeddings"]


@pytest.mark.parametrize("name", family_models.PUBLISHED)
def test_a_study_is_planned_for_a_published_model(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """From its config.json alone, in place of the parent of study.yaml."""
    folder = family_models.write_published(Path(name), name)
    Path("study.yaml").write_text(yaml.safe_dump(made_up.mapping(NOWHERE, methods=METHODS)))
    words = ["plan", "study.yaml", "--corpus-tokens", "10M", "--hf", str(folder), "--gpus", "64"]
    assert study_main([*words, "--throughput", "40%"]) == 0
    shown = capsys.readouterr().out
    assert f"{family_models.PUBLISHED[name][1]:,}" in shown and "together on 64 GPUs" in shown
    assert f".{name}: " in shown and f"its shape is what the config of {folder} says" in shown


def test_masks_of_a_model_with_layer_norm_are_planned_without_its_hidden_size() -> None:
    family_models.write_published(Path("gpt2"), "gpt2")
    learned = {"name": "sheared-llama", "tokens": 1280, "target": {"ffn-hidden-size": 1024}}
    assert ahead(parent={"import_hf": "gpt2"}, methods=[learned]).source is not None
    learned["target"] = {"hidden-size": 512}
    with pytest.raises(UsageError, match="target-hidden-size: expected 768, for a parent with LayerNorm"):
        ahead(parent={"import_hf": "gpt2"}, methods=[learned])


@pytest.mark.parametrize(
    ("parent", "key"),
    [
        (LOAD, "parent.shape"),
        ({**LOAD, "shape": "/not/here/config.json"}, "parent.shape"),
        ({**LOAD, "shape": "some/model"}, "parent.shape"),
        ({"pretrain": {"tokens": 2560}, "shape": "x"}, "parent.shape"),
        ({"import_hf": "x", "planned_tokens": 5}, "parent.planned_tokens"),
        ({"pretrain": {"tokens": 2560}, "shape": {**SHAPE, "seed": 5}}, "parent.shape.seed"),
    ],
)  # fmt: skip
def test_what_does_not_say_a_shape_is_refused(parent: dict[str, Any], key: str) -> None:
    with pytest.raises(UsageError, match=rf"^(study: )?{key}: "):
        ahead(parent=parent)


def test_a_parent_that_is_not_as_large_as_said_is_refused(prefixes) -> None:
    made_up.run(made_up.study(prefixes, methods=METHODS[:1]), Path("runs"), made_up.FakeLauncher())
    there = {"load": "runs/made-up/cells/parent/checkpoint"}
    for number, refused in ((4, False), (5, True)):
        study = made_up.study(prefixes, name="b", parent={**there, "shape": {**SHAPE, "num-layers": number}})
        if not refused:
            assert validate.check(study, Places(Path("runs/b"))).source.num_layers == 4
            continue
        with pytest.raises(UsageError, match=r"parent\.shape: .*expected num_layers 4.*got num_layers 5"):
            validate.check(study, Places(Path("runs/b")))
    planned = made_up.study(prefixes, name="b", parent={**there, "planned_tokens": 9_999})  # the account knows better
    assert validate.check(planned, Places(Path("runs/b")), planned=True).lay.parent_tokens == 2560


def test_a_parents_shape_and_its_other_flags_may_be_apart() -> None:
    shape, others = dict(list(SHAPE.items())[:6]), dict(list(SHAPE.items())[6:])
    study = made_up.study(NOWHERE, parent={"shape": shape, "pretrain": {"tokens": 2560, "arguments": others}})
    samples = ahead().lay.batch.range(0, 20)
    apart = commands.parent_training(study, Places(Path("x")), samples)
    assert apart == commands.parent_training(made_up.study(NOWHERE), Places(Path("x")), samples)


LLAMA = shlex.split(preflight.LLAMA)


@pytest.mark.parametrize(
    ("launch", "arguments", "more"),
    [
        ({"nproc": 8, "tensor_parallel": 2}, {"bf16": True}, {}),
        ({"nproc": 8, "pipeline_parallel": 2}, {"bf16": True, "use-distributed-optimizer": True},
         {"untie-embeddings-and-output-weights": False}),
        ({"nproc": 4}, {"recompute-granularity": "selective", "recompute-modules": ["mlp"]}, {"hidden-dropout": 0.1}),
    ],
)  # fmt: skip
def test_memory_is_what_preflight_says_of_the_same_command(launch, arguments, more, distributed, tmp_path) -> None:
    """Every training of the study through ``preflight``, with the printed command, as a user would."""
    shape = {
        **SHAPE,
        "max-position-embeddings": 64,
        "hidden-size": 96,
        "num-attention-heads": 6,
        "kv-channels": 20,
        **more,
    }
    recipe = {"lr": 1e-3, "global_batch_size": 16, "micro_batch_size": 1, "arguments": arguments}
    changes: dict[str, Any] = {"launch": launch, "recipe": recipe, "parent": {"pretrain": {"tokens": 5120},
                                                                              "shape": shape}}  # fmt: skip
    study, places = made_up.study(NOWHERE, methods=METHODS, **changes), Places(tmp_path / "x")
    outlook = ahead(20_000, **changes)
    found, why = rank_memory.memory(study, places, outlook, {"pretrain": pretrain_main})
    assert not why and len(found) == len([one for one in estimates(outlook, **changes) if one.steps])
    lines = {}
    made = {cell.id: cell for cell in jobs.all_cells(study, places, outlook)}
    for cell in found:
        words = list(made[cell].stages[0].command.argv)
        model = tmp_path / f"{cell}.flags"
        layers = 2 if "shortgpt" in cell or cell.startswith("scratch-L2") else 4
        model.write_text(shlex.join(commands.flags({**shape, "num-layers": layers})))
        lines[cell] = ["--gpus", str(launch["nproc"]), "--model", str(model), "--corpus-tokens", "1M",
                       "--reserve-gb", "0", *words]  # fmt: skip
    [answers] = distributed(preflight.answers, 1, list(lines.values()))
    for cell, answer in zip(lines, answers, strict=True):
        stages = preflight.finding(answer, "memory")["facts"]["stages"]
        assert found[cell] == max(stage["total"] for stage in stages), cell
    assert found["pruned-wanda-2-4-r50-s1-t1280"] > found["parent"] > found["pruned-shortgpt-r50-s1-t1280"]


def test_memory_of_learning_masks_is_what_preflight_says(distributed, tmp_path) -> None:
    """With the masks that it has on a rank: their number at TP 2 is known from the shape."""
    settings = {"divisible-by": 8, "tolerance": 0.2, "global-batch-size": 4}
    shape = {**SHAPE, "max-position-embeddings": 64}
    changes: dict[str, Any] = {
        "parent": {"pretrain": {"tokens": 5120}, "shape": shape},
        "methods": [{"name": "sheared-llama", "tokens": 640, "settings": settings}],
        "launch": {"nproc": 2, "tensor_parallel": 2},
    }
    study, places = made_up.study(NOWHERE, **changes), Places(tmp_path / "x")
    outlook, cell = ahead(20_000, **changes), "pruning-sheared-llama-r50-s1"
    found, _ = rank_memory.memory(study, places, outlook, {"pretrain": pretrain_main, "learn-masks": learn_masks_main})
    made = {cell.id: cell for cell in jobs.all_cells(study, places, outlook)}
    model = tmp_path / "model.flags"
    model.write_text(shlex.join(commands.flags(shape)))
    line = ["--gpus", "2", "--model", str(model), "--corpus-tokens", "1M", "--reserve-gb", "0",
            *made[cell].stages[0].command.argv]  # fmt: skip
    [[answer]] = distributed(preflight.answers, 1, [line])
    [stage] = preflight.finding(answer, "memory")["facts"]["stages"]
    assert found[cell] == stage["total"]
    source, target = outlook.source, outlook.targets["sheared-llama-r50-s1"]
    channels = source.hidden_size if target.hidden_size < source.hidden_size else 0
    per_layer = source.ffn_hidden_size // 2 if target.ffn_hidden_size < source.ffn_hidden_size else 0
    if target.num_query_groups < source.num_query_groups:
        per_layer += source.num_query_groups // 2
    if target.heads_per_group < source.heads_per_group:
        per_layer += source.num_attention_heads // 2
    assert stage["masks"] == 8 * 4 * (channels + source.num_layers * per_layer) > 0


def test_why_memory_is_not_known_is_said(capsys) -> None:
    """Megatron validates before anything runs: here heads that the ranks cannot share."""
    content = made_up.mapping(NOWHERE, methods=METHODS[:1], launch={"nproc": 3, "tensor_parallel": 3})
    content["recipe"] |= {"global_batch_size": 8, "micro_batch_size": 8}
    content["parent"]["pretrain"]["arguments"] = {**SHAPE, "padded-vocab-size": 384, "max-position-embeddings": 64}
    Path("study.yaml").write_text(yaml.safe_dump(content))
    assert study_main(["plan", "study.yaml", "--corpus-tokens", "12k"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "memory is not known, since preflight refuses: " in printed and printed.count("preflight refuses") == 1


def test_estimates_know_their_memory_from_the_dry_run_alone() -> None:
    assert all(one.memory is None for one in estimates(ahead()))
    assert replace(estimates(ahead())[0], memory=5).memory == 5
