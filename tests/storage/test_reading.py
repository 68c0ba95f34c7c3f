"""Verbs and tools that read a checkpoint give the same output for a store and a disk."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_prune.__main__ import main as run_verb
from megatron_prune.artifacts import read_json
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.masks import open_masks
from megatron_prune.structured import statistics
from tests.training.small import MODEL

MSC = "--enable-msc"


def tool(verb):
    return lambda words: run_verb([verb, *words])


@pytest.fixture
def there(s3, tiny_parent):
    return s3.put(tiny_parent, "parent")


def test_evaluate(there, tiny_parent, tiny_corpus, tmp_path, job):
    for load, output, more in ((tiny_parent, "here", []), (there, "there", [MSC])):
        job(["evaluate", "--load", load, "--seq-length", 32, "--windows", 4, "--data-path",
             tiny_corpus, "--output", tmp_path / output, *more]).ok()  # fmt: skip
    here, found = read_json(tmp_path / "here"), read_json(tmp_path / "there")
    assert found["corpora"] == here["corpora"]
    assert found["checkpoint"]["fingerprint"] == here["checkpoint"]["fingerprint"]


def test_calibrate(there, tiny_parent, tiny_corpus, tmp_path, job):
    text = ["--calibration-data-path", tiny_corpus, "--calibration-sequences", 2, "--calibration-seq-length", 32]
    for load, output, more in ((tiny_parent, "here", []), (there, "there", [MSC])):
        words = ["--load", load, *text, "--output", tmp_path / f"{output}.safetensors", *more]
        job(["calibrate", *words]).ok()
    here, found = (statistics.read(tmp_path / f"{name}.safetensors") for name in ("here", "there"))
    assert found.parent == here.parent and found.loss_sum == here.loss_sum


def test_sparsify_and_apply_make_here_what_they_read_there(there, tiny_parent, tmp_path, job):
    words = ["--method", "magnitude", "--ratio", 0.5]
    for load, save, more in ((tiny_parent, "here", []), (there, "there", [MSC])):
        job(["sparsify", "--load", load, "--save", tmp_path / save, *words, *more]).ok()
    assert open_masks(tmp_path / "there" / "masks").hash == open_masks(tmp_path / "here" / "masks").hash
    assert open_checkpoint(tmp_path / "there").full_hash() == open_checkpoint(tmp_path / "here").full_hash()

    ffn = ["--method", "random", "--target-ffn-hidden-size", "64"]
    for load, name in ((tiny_parent, "a"), (there, "b")):
        plan = str(tmp_path / f"{name}.json")
        assert run_verb(["plan", "--load", str(load), *ffn, "--output", plan]) == 0
        assert run_verb(["apply", "--load", str(load), "--plan", plan, "--save", str(tmp_path / name)]) == 0
    made = [open_checkpoint(tmp_path / name) for name in ("a", "b")]
    assert made[0].full_hash() == made[1].full_hash()
    names = [sorted(file.name for file in checkpoint.huggingface.iterdir()) for checkpoint in made]
    assert names[0] == names[1] and "tokenizer.json" in names[1]


def test_rewrite_and_export_with_masks(s3, tiny_pruned, tmp_path):
    pruned = tiny_pruned("2:4").path
    there, convert = s3.put(pruned, pruned.name), tool("convert")  # its card has the name
    for load, name in ((str(pruned), "here"), (there, "there")):
        more = ["--load", load, "--workers", "2"]
        assert convert(["rewrite", *more, "--save", str(tmp_path / name), "--verify-integrity"]) == 0
        assert convert(["export", *more, "--hf", str(tmp_path / f"{name}-hf")]) == 0
    made = [open_checkpoint(tmp_path / name) for name in ("here", "there")]
    assert made[0].full_hash() == made[1].full_hash()
    assert open_masks(made[0].root / "masks").hash == open_masks(made[1].root / "masks").hash
    here, found = tmp_path / "here-hf", tmp_path / "there-hf"
    assert {file.name: file.read_bytes() for file in here.iterdir()} == {
        file.name: file.read_bytes() for file in found.iterdir()
    }


def test_inspect(there, tiny_parent, capsys):
    inspect, found = tool("inspect"), []
    for load in (str(tiny_parent), there):
        assert inspect([load, "--json", "--sparsity", "--full-hash", "--verify-integrity"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    for description in found:
        for key in ("root", "directory", "huggingface", "flags"):
            assert description.pop(key)
    assert found[0] == found[1] and found[0]["files"]
    assert torch.equal(open_checkpoint(there).read("decoder.final_layernorm.weight"),
                       open_checkpoint(tiny_parent).read("decoder.final_layernorm.weight"))  # fmt: skip


def test_preflight(there, disk, tiny_corpus, tmp_path, capfd):
    """The start is checked in its store; if the store does not answer, it is not checked."""
    words = ["pretrain", MSC, "--train-data-path", str(tiny_corpus), "--stream-range", "0:64",
             "--seq-length", "32", "--micro-batch-size", "1", "--global-batch-size", "64", "--lr", "1e-3", "--bf16",
             "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]  # fmt: skip
    asked = ["preflight", "--gpus", "8", "--output", str(tmp_path / "answer.json")]

    def reasons(*more: str) -> dict[str, tuple[str, str]]:
        assert run_verb([*asked, *words, *more]) == 0, capfd.readouterr()
        found = read_json(tmp_path / "answer.json")["findings"]
        return {finding["check"]: (finding["verdict"], finding["reason"]) for finding in found}

    found = reasons("--pretrained-checkpoint", there, "--save", disk("run"))
    assert found["start"][0] == "yes" and found["start"][1].startswith(f"--pretrained-checkpoint {there}: all ")
    assert found["storage"][0] == "yes" and "an object store is not asked" in found["storage"][1]
    flags = tmp_path / "model.flags"
    flags.write_text(" ".join(MODEL))
    asked += ["--model", str(flags)]
    silent = reasons("--pretrained-checkpoint", "msc://silent/x", "--save", disk("run"))
    assert silent["start"] == ("not checked", "--pretrained-checkpoint msc://silent/x is not on this machine")
    assert run_verb([*asked, *words, "--save", "msc://silent/run"]) == 5
    assert "msc://silent/run" in capfd.readouterr().err
    words.remove(MSC)
    assert run_verb([*asked, *words, "--save", disk("run")]) == 2
    assert "expected --enable-msc with the address of an object store" in capfd.readouterr().err
