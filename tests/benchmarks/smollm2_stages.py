"""Time and peak memory of every stage on SmolLM2-135M, each in its own process, as a table.

    python tests/benchmarks/smollm2_stages.py [--data runs/smollm2-data] [--only 'import|search'] [--json FILE]

``--data`` is the folder that examples/smollm2_135m/run.sh prepares: the model as a Hugging Face directory
and the tokenized corpora. Memory is the largest resident set of any process of a stage, including mapped
file pages. Start-up (imports, loading) is part of every time.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_prune import artifacts
from tests.benchmarks.ratio import machine

ROOT = Path(__file__).resolve().parents[2]
SEQUENCES, LENGTH = 8, 512


def stages(data: Path, work: Path) -> list[tuple[str, list[str]]]:
    """Names, and words after ``python``; a stage reads what those before it wrote."""
    verb, load = ["-m", "megatron_prune"], ["--load", str(work / "parent")]
    text = ["--calibration-data-path", str(data / "calibration"), "--calibration-sequences", str(SEQUENCES),
            "--calibration-seq-length", str(LENGTH)]  # fmt: skip
    statistics = ["--statistics", str(work / "statistics.safetensors")]
    train = ["pretrain", "--train-data-path", str(data / "train"), "--seq-length", str(LENGTH), "--bf16"]
    train += ["--global-batch-size", "8", "--micro-batch-size", "1", "--lr", "3e-4", "--stream-range", "0:32"]
    read = ["--data-path", str(data / "test"), "--seq-length", str(LENGTH), "--windows", str(SEQUENCES)]
    sparse = ["--load", str(work / "parent"), *text, "--ratio", "0.5"]
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(data / "hf"), "--append-eod"]
    return [
        ("prepare (dequantise)", ["examples/smollm2_135m/prepare.py", "--output", str(work / "dequantised")]),
        ("tokenize the training text, 2 workers",
         ["tools/preprocess_data.py", "--input", str(data / "text" / "train.jsonl"), "--output-prefix",
          str(work / "train"), *tokenizer, "--workers", "2"]),
        ("import", ["tools/convert_checkpoint.py", "import", "--hf", str(data / "hf"), "--save", str(work / "parent")]),
        ("evaluate", [*verb, "evaluate", *load, *read, "--output", str(work / "scores.json")]),
        ("calibrate", [*verb, "calibrate", *load, *text, "--output", str(work / "statistics.safetensors")]),
        ("plan, minitron-width", [*verb, "plan", "--load", str(work / "parent"), *statistics, "--method",
                                  "minitron-width", "--ratio", "0.5", "--output", str(work / "width.json")]),
        ("apply, minitron-width", [*verb, "apply", "--load", str(work / "parent"), "--plan", str(work / "width.json"),
                                   "--save", str(work / "width")]),
        ("prune, shortgpt", [*verb, "prune", *load, *text, "--method", "shortgpt", "--target-num-layers", "27",
                             "--save", str(work / "shortgpt")]),
        ("prune, minitron-depth", [*verb, "prune", *load, *text, "--method", "minitron-depth",
                                   "--target-num-layers", "27", "--save", str(work / "minitron-depth")]),
        ("prune, minitron-width, search of 8", [
            *verb, "prune", *load, *text, "--method", "minitron-width", "--ratio", "0.25", "--search", "hidden", "ffn",
            "heads", "--divisible-by", "32", "--max-candidates", "8", "--save", str(work / "searched")]),
        *((f"sparsify, {method} {pattern}",
           [*verb, "sparsify", *(sparse if method != "magnitude" else [*load, "--ratio", "0.5"]), "--method", method,
            "--pattern", pattern, "--save", str(work / f"{method}-{pattern.replace(':', '-')}")])
          for method in ("magnitude", "wanda", "sparsegpt") for pattern in ("unstructured", "2:4")),
        ("retrain depth (27 of 30 layers), 4 steps of 4,096 tokens", [
            *verb, *train, "--pretrained-checkpoint", str(work / "shortgpt"), 
            "--save", str(work / "retrained-depth")]),
        ("retrain width (half), 4 steps", [*verb, *train, "--pretrained-checkpoint", str(work / "width"),
                                              "--save", str(work / "retrained")]),
        ("train the parent's shape, 4 steps", [*verb, *train, "--shape-from", str(work / "parent"),
                                               "--save", str(work / "scratch")]),
        ("retrain masked 2:4, 4 steps", [*verb, *train, "--pretrained-checkpoint", str(work / "wanda-2-4"),
                                         "--masks", str(work / "wanda-2-4" / "masks"),
                                         "--save", str(work / "masked")]),
        ("export", ["tools/convert_checkpoint.py", "export", "--load", str(work / "width"), "--hf", str(work / "hf")]),
    ]  # fmt: skip


def measure(words: list[str]) -> dict[str, Any]:
    """Run ``python words``; seconds and the largest resident set [bytes] of it and its children."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"python {' '.join(words)} failed:\n{output.decode()[-3000:]}")
    return {"seconds": round(time.perf_counter() - began, 1), "peak_bytes": usage.ru_maxrss * 1024, "words": words}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "runs" / "smollm2-data")
    parser.add_argument("--only", default="", metavar="REGEX", help="stages; one reads what those before it wrote")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory(dir=options.data) as folder:
        print("| stage | seconds | peak memory, GB |\n| --- | ---: | ---: |")
        chosen = (s for s in stages(options.data.resolve(), Path(folder)) if re.search(options.only, s[0]))
        for name, words in chosen:
            found[name] = measure(words)
            print(f"| {name} | {found[name]['seconds']:.1f} | {found[name]['peak_bytes'] / 1e9:.2f} |", flush=True)
    if options.json:
        artifacts.write_json(options.json, {"machine": machine(), "stages": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
