"""How many tokens each run of study.yaml may train on in a given time on this machine.

Times a few steps of SmolLM2's shape from random weights with the study's own recipe, counts the runs of
the methods that were asked for by their parameters, and writes the study of these with that budget.

    python examples/smollm2_135m/budget.py --minutes 120 --checkpoint CKPT --output runs/smollm2-data/structured.yaml
"""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
import sys
import tempfile
from pathlib import Path

import yaml

from megatron_prune import methods
from megatron_prune.artifacts import write_bytes
from megatron_prune.engine.launch import start
from megatron_prune.errors import RunError
from megatron_prune.study import config, prunings

STUDY = Path(__file__).with_name("study.yaml")
STEPS, WARM_UP = 5, 2
OVERHEAD = 0.3  # of the time: evaluation, start-up, saving, calibration


def seconds_per_step(study: dict, checkpoint: str) -> float:
    """Time that a step of the whole model takes when as many run side by side as the study's cells do, over their
    number: the median from Megatron's log."""
    recipe, length, beside = study["recipe"], study["data"]["seq_length"], study["launch"]["parallel_cells"]
    batch, rate = recipe["global_batch_size"], recipe["lr"][0]
    argv = ["pretrain", "--shape-from", checkpoint, "--seq-length", str(length), "--global-batch-size", str(batch)]
    argv += ["--micro-batch-size", str(recipe["micro_batch_size"]), "--lr", str(rate), "--log-interval", "1"]
    argv += ["--train-data-path", *study["data"]["train"], "--stream-range", f"0:{STEPS * batch}"]
    argv += ["--bf16"] if recipe["arguments"].get("bf16") else []
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as jobs:
        logs = [Path(folder) / f"{run}.txt" for run in range(beside)]
        running = [jobs.enter_context(start(argv, log=log)) for log in logs]
        for job, log in zip(running, logs, strict=True):
            if job.wait():
                raise RunError(f"the timed run failed:\n{log.read_text()[-3000:]}")
            found = re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", log.read_text())
            times += [float(time) / 1000 for time in found[WARM_UP:]]
    return statistics.median(times) / beside


def only(study: dict, kind: str) -> dict:
    """The study with the methods of one kind alone, under a name of its own."""
    chosen = [method for method in study["methods"] if ("pattern" in method) == (kind == "sparse")]
    return study | {"name": f"{study['name']}-{kind}", "methods": chosen}


def whole_models(study: config.Study) -> float:
    """The study's training runs, in runs of the whole model."""
    sizes: dict[tuple[object, ...], float] = {}
    for pruning in prunings.prunings(study):
        method = pruning.method
        size = 1.0 if pruning.sparse or pruning.ratio is None else 1 - pruning.ratio  # zeros take as long
        sizes["pruned", pruning.name] = size
        for _, against in study.compared(method):
            if pruning.sparse:
                sizes[against, None if against == "dense" else pruning.name] = size
            else:  # methods that cut the same sizes by the same ratio end in one shape, which is trained once
                sizes[against, methods.get(method.name).free_dimensions(method.settings), pruning.ratio] = size
    return sum(sizes.values()) * len(study.recipe.rates)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--methods", choices=("structured", "sparse"), default="structured")
    parser.add_argument("--checkpoint", required=True, metavar="CKPT", help="SmolLM2, imported")
    parser.add_argument("--output", type=Path, required=True, metavar="STUDY.yaml")
    options = parser.parse_args()
    study = only(yaml.safe_load(STUDY.read_text()), options.methods)
    step = seconds_per_step(study, options.checkpoint)
    runs = whole_models(config.from_mapping(study, where=str(STUDY)))
    steps = max(4, int(60 * options.minutes * (1 - OVERHEAD) / (runs * step)))
    tokens = steps * study["recipe"]["global_batch_size"] * study["data"]["seq_length"]
    write_bytes(options.output, yaml.safe_dump(study | {"budgets": [tokens]}, sort_keys=False).encode())
    print(f"{step:.2f} s a step of the whole model: {steps} steps, {tokens:,} tokens a run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
