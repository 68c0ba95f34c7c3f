"""How many tokens each run of study.yaml may train on in a given time on this machine.

Times a few steps of SmolLM2's shape from random weights with the study's own recipe, counts the
study's runs by their parameters, and writes the study with that budget.

    python examples/smollm2_135m/budget.py --minutes 120 --checkpoint CKPT --output runs/smollm2-data/study.yaml
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
from pathlib import Path

import yaml

from megatron_prune.artifacts import write_bytes
from megatron_prune.engine.launch import launch
from megatron_prune.errors import RunError
from megatron_prune.study import config, prunings

STUDY = Path(__file__).with_name("study.yaml")
STEPS, WARM_UP = 5, 2
OVERHEAD = 0.3  # of the time: evaluation, start-up, saving, calibration


def seconds_per_step(study: dict, checkpoint: str) -> float:
    """Median time of a step of the whole model, from Megatron's log."""
    recipe, length, batch = study["recipe"], study["data"]["seq_length"], study["recipe"]["global_batch_size"]
    argv = ["pretrain", "--shape-from", checkpoint, "--seq-length", str(length), "--global-batch-size", str(batch)]
    argv += ["--micro-batch-size", str(recipe["micro_batch_size"]), "--lr", str(recipe["lr"]), "--log-interval", "1"]
    argv += ["--train-data-path", *study["data"]["train"], "--stream-range", f"0:{STEPS * batch}"]
    argv += ["--bf16"] if recipe["arguments"].get("bf16") else []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        if launch(argv, log=log):
            raise RunError(f"the timed run failed:\n{log.read_text()[-3000:]}")
        times = re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", log.read_text())
    return statistics.median(float(time) for time in times[WARM_UP:]) / 1000


def whole_models(study: config.Study) -> float:
    """The study's training runs, in runs of the whole model; methods of one shape may share more than is counted."""
    sizes: dict[tuple[str, str], float] = {}
    for pruning in prunings.prunings(study):
        sparse = pruning.method.pattern is not None
        size = 1.0 if sparse or pruning.ratio is None else 1 - pruning.ratio  # zeros take as long
        sizes["pruned", pruning.name] = size
        for _, against in study.compared(pruning.method):
            sizes[against, "any" if sparse and against == "dense" else pruning.name] = size
    return sum(sizes.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--checkpoint", required=True, metavar="CKPT", help="SmolLM2, imported")
    parser.add_argument("--output", type=Path, required=True, metavar="STUDY.yaml")
    options = parser.parse_args()
    study = yaml.safe_load(STUDY.read_text())
    step = seconds_per_step(study, options.checkpoint)
    steps = max(4, int(60 * options.minutes * (1 - OVERHEAD) / (whole_models(config.load(STUDY)) * step)))
    tokens = steps * study["recipe"]["global_batch_size"] * study["data"]["seq_length"]
    study["budgets"] = [tokens]
    write_bytes(options.output, yaml.safe_dump(study, sort_keys=False).encode())
    print(f"{step:.2f} s a step of the whole model: {steps} steps, {tokens:,} tokens a run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
