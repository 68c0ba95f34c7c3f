"""How many tokens each run of study.yaml can train on in a given time on this machine.

Times a few steps of SmolLM2's shape from random weights with the study's own recipe, counts the FLOPs of the chosen
methods (training and everything else), and writes the study with that budget. If the time is short, evaluation,
calibration and the learning of masks use less text.

    python examples/smollm2_135m/budget.py --minutes 120 --checkpoint CKPT --output runs/smollm2-data/structured.yaml
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from pathlib import Path

import yaml

from megatron_prune.artifacts import write_bytes
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.errors import EXIT_REFUSED, MegatronPruneError, UsageError
from megatron_prune.study import needs, prunings, schema
from megatron_prune.study.commands import CORPORA
from megatron_prune.study.throughput import time_steps

STUDY = Path(__file__).with_name("study.yaml")
START = 5.0  # seconds of a run that are neither steps nor evaluation: its start, its save
LEAST = 4  # steps, and sequences that are evaluated and calibrated on


# Every arm twice: on the text alone, and half by what the unpruned model says, which is written once for all of them.
DISTILL = {"objectives": ["lm", "distill"], "distill": {"teacher": "cache", "top_k": 64, "alpha": 0.5}}


def only(study: dict, kind: str, objective: str = "lm") -> dict:
    """The study with the methods of one kind, under another name; with ``distill`` also with that objective."""
    chosen = [method for method in study["methods"] if ("pattern" in method) == (kind == "sparse")]
    name = f"{study['name']}-{kind}"
    more = {"name": f"{name}-distill", **DISTILL} if objective == "distill" else {"name": name}
    return study | {"methods": chosen} | more


@dataclasses.dataclass(frozen=True)
class Work:
    """Models that the study trains, and forward passes over a sequence: in FLOPs, at one sequence each."""

    runs: int
    training: int  # of all runs, forward and backward, and what a teacher says once for all
    learning: int  # of masks, and of as many sequences more for scratch
    evaluation: int
    calibration: int


def work(study: schema.StudyConfig, parent: ModelShape) -> Work:
    """The work of the study with a parent of that shape. Width pruning counts like depth pruning by the same ratio."""
    starts: list[ModelShape] = []
    runs: dict[tuple[object, ...], ModelShape] = {}
    calibrated, learned = parent.forward_flops(study.data.seq_length), 0
    each = len(study.recipe.rates) * len(study.objectives)  # runs of an arm
    for pruning in prunings.prunings(study):
        method, shape = pruning.method, parent
        if not pruning.sparse and pruning.ratio is not None:
            shape = dataclasses.replace(parent, num_layers=round(parent.num_layers * (1 - pruning.ratio)))
        starts.append(shape)
        runs["pruned", pruning.name] = shape
        forward = shape.forward_flops(study.data.seq_length)
        if pruning.sparse and method.name in ("wanda", "sparsegpt"):
            calibrated += forward
        if prunings.reads_gradients(pruning) and pruning.ratio == min(study.ratios):  # once for all ratios
            calibrated += parent.training_flops(study.data.seq_length)
        if method.name == "minitron-depth":
            calibrated += (shape.num_layers + 1) * forward  # a candidate for each layer that the cut may begin at
        learned += parent.training_flops(study.data.seq_length) if method.tokens else 0
        for _, against in study.compared(method):
            if pruning.sparse:
                runs[against, None if against == "dense" else pruning.name] = shape
            else:  # methods that cut the same sizes by the same ratio end in one shape, which is trained once
                choice = needs.structured(study, method, pruning.ratio)
                cut = (*choice.method.free_dimensions(choice.settings), choice.method.adds_biases(choice.settings))
                if method.tokens and (against, cut, pruning.ratio, method.tokens) not in runs:
                    learned += each * shape.training_flops(study.data.seq_length)
                runs[against, cut, pruning.ratio, method.tokens] = shape
    trained = [shape for shape in runs.values() for _ in range(each)]
    teaching = parent.forward_flops(study.data.seq_length) if "distill" in study.objectives else 0
    evaluated = [parent, *starts, *trained]
    return Work(
        len(trained),
        sum(shape.training_flops(study.data.seq_length) for shape in trained) + teaching,
        learned,
        len(CORPORA) * sum(shape.forward_flops(study.evaluation_seq_length) for shape in evaluated),
        calibrated,
    )


def planned(content: dict, minutes: float, step: float, parent: ModelShape) -> tuple[dict, int, float]:
    """The study that takes about ``minutes`` where a step of the whole model takes ``step`` seconds; its steps a run,
    its expected minutes. UsageError where it cannot be as short."""
    study = schema.from_mapping(content, where=str(STUDY))
    made = work(study, parent)
    batch = study.recipe.global_batch_size
    speed = parent.training_flops(study.data.seq_length) * batch / step  # FLOPs a second
    windows, sequences = study.evaluation.windows, study.calibration.sequences
    batches = max((method.tokens or 0 for method in study.methods), default=0) // (batch * study.data.seq_length)

    def once() -> float:
        flops = windows * made.evaluation + sequences * made.calibration + batches * batch * made.learning
        return flops / speed + START * made.runs

    while once() > 60 * minutes / 3 and max(windows, sequences, batches) > LEAST:
        windows, sequences = max(LEAST, windows // 2), max(LEAST, sequences // 2)
        batches = max(LEAST, batches // 2) if batches else 0
    each = made.training * batch / speed
    steps = int((60 * minutes - once()) / each)
    if steps < LEAST:
        least = math.ceil((once() + LEAST * each) / 60)
        raise UsageError("--budget", got=f"{minutes:g} minutes", expected=f"at least {least} on this machine")
    tokens = steps * batch * study.data.seq_length
    changed: dict = {"budgets": [tokens]}
    masks = batches * batch * study.data.seq_length
    changed["methods"] = [m | {"tokens": masks} if "tokens" in m else m for m in content["methods"]]
    changed["evaluation"] = content["evaluation"] | {"windows": windows}
    changed["calibration"] = content["calibration"] | {"sequences": sequences}
    return content | changed, steps, (once() + steps * each) / 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--methods", choices=("structured", "sparse"), default="structured")
    parser.add_argument("--objective", choices=("lm", "distill"), default="lm")
    parser.add_argument("--checkpoint", required=True, metavar="CKPT", help="SmolLM2, imported")
    parser.add_argument("--output", type=Path, required=True, metavar="STUDY.yaml")
    options = parser.parse_args()
    content = only(yaml.safe_load(STUDY.read_text()), options.methods, options.objective)
    try:
        read = schema.from_mapping(content, where=str(STUDY))
        # As many runs side by side as the study has cells, over their number.
        step = time_steps(read, ["--shape-from", options.checkpoint]).step / read.launch.parallel_cells
        study, steps, expected = planned(content, options.minutes, step, open_checkpoint(options.checkpoint).shape)
    except MegatronPruneError as error:
        print(f"budget.py: {error}", file=sys.stderr)
        return EXIT_REFUSED
    write_bytes(options.output, yaml.safe_dump(study, sort_keys=False).encode())
    print(f"{step:.2f} s a step of the whole model: {steps} steps a run, {study['budgets'][0]:,} tokens; "
          f"{study['evaluation']['windows']} windows, about {expected:.0f} minutes")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
