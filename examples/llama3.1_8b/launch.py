"""Command lines of the paper's runs: which target, from which start, on how many GPUs.

    python examples/llama3.1_8b/launch.py parent P200 --gpus 64            # the parent, 200B tokens
    python examples/llama3.1_8b/launch.py width-50 R50 --gpus 64           # pruned, trained on 50B more
    python examples/llama3.1_8b/launch.py width-50 S50 --gpus 64           # its shape from scratch, same samples
    python examples/llama3.1_8b/launch.py width-50 S200+50 --gpus 64       # from scratch, on all that both saw
    python examples/llama3.1_8b/launch.py --preflight                      # every layout, checked without a cluster

Prints a line for `sbatch`, with `--plain` only the arguments of the verb. Tables: layouts.yaml. Checkpoints are in
runs/llama3.1-8b, tokens where dclm.sh writes them.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_prune.errors import MegatronPruneError, UsageError
from megatron_prune.study.sample_ranges import Batch

HERE = Path(__file__).resolve().parent
RUNS = "runs/llama3.1-8b"
BLEND = f"{RUNS}/dclm/blend.txt"
TABLE = yaml.safe_load((HERE / "layouts.yaml").read_text())
BATCH = Batch(TABLE["recipe"]["global-batch-size"], TABLE["recipe"]["seq-length"])
PARENT_TOKENS = 200
STEPS_A_BILLION = 250
CORPUS_TOKENS = "750B"  # from dclm.sh; P200 and R500 need 734B


def flags(mapping: Mapping[str, Any]) -> list[str]:
    """``{"bf16": True, "lr": 3e-4}`` → ``--bf16 --lr 0.0003``"""
    return [
        word
        for name, value in mapping.items()
        for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]


def model(target: str) -> list[str]:
    """The target's shape as Megatron's flags."""
    return flags(TABLE["model"] | TABLE["targets"][target])


def layout(target: str, gpus: str) -> list[str]:
    """The layout on ``gpus`` GPUs (``64 pp``: the pipeline alternative)."""
    return flags(TABLE["layouts"][TABLE["chosen"][target][int(gpus) if gpus.isdecimal() else gpus]])


def steps(billions: int) -> int:
    """The authors' steps for what they call so many billions: 12,500 of 4,194,304 tokens for 50."""
    return billions * STEPS_A_BILLION


def run(target: str, name: str) -> list[str]:
    """Where a run starts and what it reads: ``P200``, ``R50``, ``S50``, ``S200+50``."""
    found = re.fullmatch(r"([PRS])(\d+)(?:\+(\d+))?", name)
    if found is None or (found[1] != "S" and found[3]) or (found[1] == "P") != (target == "parent"):
        raise UsageError(
            "RUN", got=f"{target} {name}", expected="parent P200, or another target with R50, S50 or S200+50"
        )
    kind, billions, more = found[1], int(found[2]), int(found[3] or 0)
    first = 0 if kind == "P" or more else steps(PARENT_TOKENS) * BATCH.samples
    length = steps(billions) + (steps(more) if more else 0)
    save = f"{RUNS}/parent" if kind == "P" else f"{RUNS}/{target}-{name}"
    pruned = f"{RUNS}/pruned/{target}"
    words = [] if kind == "P" else ["--pretrained-checkpoint", pruned]
    if kind == "S":
        words = ["--shape-from", pruned]
    if target == "sparse":
        words += ["--masks", f"{pruned}/masks"]
    words += flags(
        {
            "stream-range": f"{first}:{first + length * BATCH.samples}",
            "train-iters": length,
            "lr-warmup-iters": length // 20,
            "save": save,
            "load": save,
        }
    )
    return words


def command(target: str, name: str, gpus: str) -> list[str]:
    """The verb and its flags."""
    words = ["pretrain", *(model(target) if name.startswith("P") else []), *flags(TABLE["recipe"])]
    words += [*layout(target, gpus), *run(target, name)]
    words += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", f"{RUNS}/hf"]
    return [*words, "--data-cache-path", f"{RUNS}/cache", "--data-path", f"$(cat {BLEND})"]


def everything() -> Iterator[tuple[str, str, str]]:
    """Target, run and GPUs of every layout that was chosen."""
    for target, layouts in TABLE["chosen"].items():
        for gpus in layouts:
            yield target, "P200" if target == "parent" else "R50", str(gpus)


def preflight_line(target: str, name: str, gpus: str, model_file: Path) -> list[str]:
    """The line for ``python -m megatron_prune preflight``, on a machine without corpora and checkpoints."""
    model_file.write_text(shlex.join(model(target)))
    words = [word if not word.startswith("$(") else "dclm" for word in command(target, name, gpus)]
    saving = shlex.split((HERE.parents[1] / "launch" / "checkpointing.flags").read_text(), comments=True)
    asked = ["--gpus", gpus.split()[0], "--model", str(model_file), "--corpus-tokens", CORPUS_TOKENS]
    return [*asked, *words, *saving]


def row(target: str, gpus: str, answer: Mapping[str, Any]) -> str:
    """A line of LAYOUTS.md."""
    found = {finding["check"]: finding for finding in answer["findings"]}
    sizes, spent = found["layout"]["facts"], found["time"]["facts"]
    split = found.get("stages", {}).get("facts", {}).get("layers", "")
    memory = max(stage["total"] for stage in found["memory"]["facts"]["stages"]) / 1e9
    gemms = " ".join(f"{k}x{n}" for _, k, n in found["dimensions"]["facts"]["gemms"].values())
    looks = "; ".join(f["check"] for f in answer["findings"] if f["verdict"] == "look")
    cells = [
        target, f"{answer['parameters'] / 1e9:.2f}", gpus,
        f"{sizes['tensor']} x {sizes['pipeline']} x {sizes['data']}", str(split), sizes["microbatches"],
        f"{memory:.0f}", gemms, f"{spent['step_seconds']:.2f}", answer["verdict"] + (f" ({looks})" if looks else ""),
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def table(answers: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> str:
    """LAYOUTS.md."""
    head = ["target", "B parameters", "GPUs", "TP x PP x DP", "layers a stage", "micro-batches", "GB of 85.5",
            "GEMMs on a rank: qkv proj fc1 fc2", "s a step at MFU 0.4", "will it run"]  # fmt: skip
    lines = [
        "# Layouts on H100s",
        "",
        "`python examples/llama3.1_8b/launch.py --preflight` wrote this: each line of layouts.yaml, checked without a",
        "cluster. Memory is an estimate of the fullest rank, 6 GB of it in reserve; times follow from a stated MFU and",
        "were measured nowhere. Micro-batches are of one sample, in bf16, and no activations are recomputed.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
        *(row(target, gpus, answer) for (target, _, gpus), answer in answers.items()),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", choices=TABLE["targets"])
    parser.add_argument("run", nargs="?", metavar="RUN")
    parser.add_argument("--gpus", default="64", help="one of the target's in layouts.yaml (default: %(default)s)")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--preflight", action="store_true", help="check every layout, and write LAYOUTS.md")
    options = parser.parse_args(argv)
    if options.preflight:
        return _preflight()
    if options.target is None or options.run is None:
        parser.error("TARGET and RUN are missing")
    if options.gpus not in map(str, TABLE["chosen"][options.target]):
        raise UsageError(
            "--gpus", got=options.gpus, expected="one of " + ", ".join(map(str, TABLE["chosen"][options.target]))
        )
    # The blend is for the shell to read.
    words = " ".join(
        w if w.startswith("$(") else shlex.quote(w) for w in command(options.target, options.run, options.gpus)
    )
    if not options.plain:
        nodes = max(1, int(options.gpus.split()[0]) // 8)
        words = f"sbatch --nodes {nodes} --job-name {options.target}-{options.run} launch/slurm.sbatch {words} "
        words += "$(grep -v '^#' launch/checkpointing.flags)"
    print(words)
    return 0


def _preflight() -> int:
    """Check every layout in this process, so that Megatron is imported once."""
    from megatron_prune import artifacts
    from megatron_prune.cli.cluster_commands import preflight_main
    from megatron_prune.engine import cpu

    cpu.prepare()
    answers = {}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "answer.json"
        for which in everything():
            preflight_main(["--output", str(output), *preflight_line(*which, Path(folder) / "model.flags")])
            answers[which] = artifacts.read_json(output)
    (HERE / "LAYOUTS.md").write_text(table(answers))
    return 0 if all(answer["verdict"] == "yes" for answer in answers.values()) else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except MegatronPruneError as error:
        sys.exit(f"launch.py: {error}")
