"""The quickstart: its study is valid, and runs to its report in miniature."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_prune.study import schema
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "examples" / "quickstart" / "study.yaml"
LEARNED = 16 * 64 * 4  # tokens that masks are learned on, in miniature


def test_the_parent_has_at_most_three_million_parameters() -> None:
    from megatron_prune.checkpoint.layout import ModelShape

    study = schema.load(STUDY)
    assert study.parent.pretrain is not None
    flags = {name.replace("-", "_"): value for name, value in study.parent.pretrain.arguments.items()}
    shape = ModelShape.from_args(flags)
    assert 1e6 < shape.parameters() <= 3e6


def test_the_script_uses_the_vocabulary_and_the_paths_of_the_study() -> None:
    script = (STUDY.parent / "run.sh").read_text()
    study = schema.load(STUDY)
    assert study.parent.pretrain is not None and study.data.tokenizer is not None
    assert f"VOCABULARY={study.parent.pretrain.arguments['padded-vocab-size']}" in script
    data = Path(study.data.tokenizer.model).parent
    assert f"DATA={data}" in script
    prefixes = [prefix for _, prefix in study.data.train]
    prefixes += [study.data.calibration, study.data.validation, study.data.test]
    assert [Path(prefix).parent for prefix in prefixes] == [data] * 4
    assert [Path(prefix).name for prefix in prefixes] == ["train", "calibration", "validation", "test"]


def test_the_study_in_bf16_is_the_same_but_for_its_precision() -> None:
    study, half = schema.resolved(schema.load(STUDY)), schema.resolved(schema.load(STUDY.with_name("bf16.yaml")))
    assert "bf16" not in study["recipe"]["arguments"]
    study["recipe"]["arguments"]["bf16"] = True
    assert half == study


@pytest.mark.parametrize(
    ("flags", "word", "study"),
    [
        ("fpu avx512f avx512_bf16 avx512_vnni", "", "bf16.yaml"),
        ("fpu avx512f amx_bf16 amx_tile", "", "bf16.yaml"),
        ("fpu avx2 avx512f", "", "study.yaml"),
        ("fpu avx512_bf16", "fp32", "study.yaml"),
        ("fpu avx2", "bf16", "bf16.yaml"),
    ],
)
def test_the_script_takes_the_precision_that_the_processor_has_units_for(
    tmp_path: Path, flags: str, word: str, study: str
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: {flags}\n")
    script = (STUDY.parent / "run.sh").read_text()
    choice = script[script.index("precision=") : script.index("cd ")].replace(
        "/proc/cpuinfo", str(tmp_path / "cpuinfo")
    )
    shell = ["bash", "-c", f'set -euo pipefail\n{choice}\necho "$STUDY"', "run.sh", word]
    assert subprocess.run(shell, capture_output=True, text=True).stdout.strip() == f"examples/quickstart/{study}"


@pytest.fixture(scope="module")
def corpora(tmp_path_factory, tiny_tokenizer) -> Path:
    """Train, calibration, validation and test corpora of a few paragraphs each."""
    folder = tmp_path_factory.mktemp("quickstart")
    texts = tiny.documents(300)
    splits = {"train": texts[:240], "calibration": texts[240:260], "validation": texts[260:280], "test": texts[280:]}
    running = []
    for split, documents in splits.items():
        jsonl = tiny.write_jsonl(folder / f"{split}.jsonl", documents)
        command = [sys.executable, ROOT / "tools" / "preprocess_data.py", "--input", jsonl]
        command += ["--output-prefix", folder / split, "--tokenizer-type", "HuggingFaceTokenizer"]
        command += ["--tokenizer-model", tiny_tokenizer, "--append-eod"]
        running.append(subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL))
    assert [process.wait() for process in running] == [0] * 4
    return folder


@pytest.mark.timeout(3600)  # it waits for a study of twenty runs, on machines that other work shares
def test_it_runs_in_miniature(tmp_path, corpora, tiny_tokenizer) -> None:
    study = yaml.safe_load(STUDY.read_text())
    study["data"] |= {
        "train": [str(corpora / "train")],
        "calibration": str(corpora / "calibration"),
        "validation": str(corpora / "validation"),
        "test": str(corpora / "test"),
        "seq_length": 64,
        "tokenizer": {"type": "HuggingFaceTokenizer", "model": str(tiny_tokenizer)},
    }
    pretrain = study["parent"]["pretrain"]
    pretrain["tokens"] = 16 * 64 * 24
    pretrain["arguments"] |= {"max-position-embeddings": 64, "padded-vocab-size": tiny.VOCABULARY}
    study |= {"budgets": [16 * 64 * 8], "evaluation": {"windows": 16}, "calibration": {"sequences": 4}}
    study["launch"] = {"threads": 1}
    [learning] = [method for method in study["methods"] if "tokens" in method]
    learning["tokens"] = LEARNED
    small = tmp_path / "study.yaml"
    small.write_text(yaml.safe_dump(study))

    command = [sys.executable, "-m", "megatron_prune", "study", "run", str(small), "--runs-dir", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=os.environ)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]

    report = tmp_path / "quickstart" / "report"
    page = (report / "index.html").read_text()
    assert "<svg" in page and "minitron-width" in page
    rows = json.loads((report / "results.json").read_text())["rows"]
    parent, *others = rows
    assert parent["arm"] == "parent" and all(row["status"] == "finished" for row in rows)
    width = {(row["arm"], row["setting"]): row for row in others if row["method"] == "minitron-width"}
    pruned = width["pruned", "equal-training"]
    scratch = width["scratch", "equal-training"]
    total = width["scratch", "equal-total"]
    assert parent["tokens_train"] == pretrain["tokens"]
    assert pruned["tokens_train"] == scratch["tokens_train"] == study["budgets"][0]
    # The parent's tokens, the retraining's and the calibration's, rounded up to a whole batch.
    assert total["tokens_train"] == pretrain["tokens"] + study["budgets"][0] + 16 * 64
    assert pruned["params"] == scratch["params"] == total["params"] < parent["params"]
    assert pruned["loss_initial"] < scratch["loss_initial"]  # it starts from what the parent has learnt
    learned = {row["arm"]: row for row in others if row["method"] == "sheared-llama"}
    assert learned["pruned"]["params"] == learned["scratch"]["params"] == pruned["params"]  # by the same rule
    assert learned["pruned"]["tokens_train"] == study["budgets"][0]
    assert learned["pruned"]["tokens_pruning"] == LEARNED
    assert learned["scratch"]["tokens_train"] == study["budgets"][0] + LEARNED

    linears = parent["params"] - 2 * 192 * tiny.VOCABULARY - (2 * 4 + 1) * 192  # embedding, output layer and norms
    sparse = [row for row in others if row["pattern"]]
    asked = {(row["method"], row["pattern"], row["setting"], row["against"]) for row in sparse}
    assert asked == {
        ("wanda", "unstructured", "equal-training", "dense"),
        ("wanda", "2:4", "equal-training", "dense"),
        ("sparsegpt", "2:4", "equal-training", "dense"),
        ("sparsegpt", "unstructured", "equal-training", "dense"),
        ("sparsegpt", "unstructured", "equal-training", "masked"),
        ("sparsegpt", "unstructured", "equal-total", "masked"),
    }
    for row in sparse:
        held = row["arm"] == "pruned" or row["against"] == "masked"
        assert row["params"] == parent["params"] and row["removed_linears"] == 0.5
        assert row["params_nonzero"] == pytest.approx(parent["params"] - held * linears / 2, rel=1e-3)
        assert (row["flops_train_theoretical"] < row["flops_train"]) == held
        if row["arm"] == "pruned":
            assert row["tokens_pruning"] == 4 * 64 and row["loss_initial"] < scratch["loss_initial"]
    dense = {row["cell"] for row in sparse if row["arm"] == "scratch" and row["against"] == "dense"}
    assert len(dense) == 1  # one run for all four
