"""SmolLM2-135M pruned by half at several layouts in fp32: mask bits that agree with one process's, and perplexity.

    python tests/benchmarks/sparse_layouts.py [--data runs/smollm2-data] [--sequences 8] [--length 512] [--json FILE]

Agreement is over all masks of the model, over those of the first block, and of the worst matrix. Perplexity comes from
``evaluate`` in one process. ``--data`` is the folder that examples/smollm2_135m/run.sh prepares.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_prune import artifacts
from megatron_prune.engine.launch import launch
from megatron_prune.masks import open_masks
from tests.benchmarks.ratio import machine

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = {"TP1": (1, 1, 1), "TP3": (3, 1, 1), "PP2": (1, 2, 1), "DP2": (1, 1, 2)}
CASES = (("magnitude", "unstructured"), ("wanda", "unstructured"), ("wanda", "2:4"),
         ("sparsegpt", "unstructured"), ("sparsegpt", "2:4"))  # fmt: skip


def verb(words: list[Any], nproc: int, log: Path) -> None:
    if launch([str(word) for word in words], nproc=nproc, log=log):
        raise SystemExit(f"{words[0]} failed:\n{log.read_text()[-3000:]}")


def prune(options: argparse.Namespace, method: str, pattern: str, layout: tuple[int, int, int], save: Path) -> float:
    """Prune at a layout; the perplexity of the result."""
    tp, pp, dp = layout
    load = ["--load", options.data / "checkpoint"]
    words = ["sparsify", *load, "--method", method, "--ratio", 0.5, "--pattern", pattern, "--save", save]
    words += ["--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp]
    if method != "magnitude":
        words += ["--calibration-data-path", options.data / "calibration", "--calibration-sequences", options.sequences]
        words += ["--calibration-seq-length", options.length]
    log = save.with_suffix(".log")
    verb(words, tp * pp * dp, log)
    scores = save.with_suffix(".json")
    verb(["evaluate", "--load", save, "--data-path", options.data / "test", "--seq-length",
          options.length, "--windows", options.windows, "--output", scores], 1, log)  # fmt: skip
    (corpus,) = artifacts.read_json(scores)["corpora"].values()
    return float(corpus["perplexity"])


def agreement(one: Path, other: Path) -> dict[str, float]:
    """Fractions of mask bits that are equal."""
    a, b = open_masks(one / "masks"), open_masks(other / "masks")
    equal = {name: (int((a.read(name) == b.read(name)).sum()), a.read(name).numel()) for name in a.entries}
    first = [counts for name, counts in equal.items() if ".0." in name or "layers.0" in name]
    return {
        "all": sum(n for n, _ in equal.values()) / sum(n for _, n in equal.values()),
        "first_block": sum(n for n, _ in first) / sum(n for _, n in first),
        "worst_matrix": min(n / of for n, of in equal.values()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "runs" / "smollm2-data")
    parser.add_argument("--methods", nargs="+", default=list(dict(CASES)), choices=list(dict(CASES)))
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS), help="besides TP1")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| method | layout | equal bits | first block | worst matrix | perplexity |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory(dir=options.data) as folder:
        for method, pattern in (case for case in CASES if case[0] in options.methods):
            base = Path(folder, f"{method}-{pattern.replace(':', '-')}-TP1")
            for name in dict.fromkeys(["TP1", *options.layouts]):
                save = base.with_name(base.name.removesuffix("TP1") + name)
                perplexity = prune(options, method, pattern, LAYOUTS[name], save)
                row = {"method": method, "pattern": pattern, "layout": name, "perplexity": perplexity}
                rows.append(row | agreement(base, save))
                bits = "{all:.4%} | {first_block:.4%} | {worst_matrix:.4%}".format(**rows[-1])
                print(f"| {method} {pattern} | {name} | {bits} | {perplexity:.3f} |", flush=True)
                if save != base:
                    shutil.rmtree(save)
            shutil.rmtree(base)
    if options.json:
        artifacts.write_json(
            options.json, {"machine": machine(), "settings": vars(options) | {"data": None}, "rows": rows}
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
