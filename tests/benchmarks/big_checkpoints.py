"""Checkpoints that are larger than the memory allowed: a synthetic Llama-3.1-8B, and one of 70B's width.

Every stage is a separate process, as a user runs it. Its seconds and its peak of anonymous and shared memory (over
all its processes, sampled every 100 ms) are printed. The limit is 3 GB for each. Comparisons are bit by bit.

* 8B (16 GB, bf16): written; planned and applied at four ratios in depth and in width; sparsified by magnitude at the
  same ratios and 2:4, this one cut in depth with its masks; exported and imported again, dense and with masks; every
  kept layer of a depth cut against the parent's.
* ``cp -r`` and a sync against ``rewrite`` (which copies every weight into a new checkpoint) on the same 8B, in turns:
  at least 0.4 of the speed.
* 70B's width (hidden 8192, FFN 28672, vocabulary 128256), two layers, with records as large as whole matrices (up to
  2.1 GB), as Megatron writes them at TP=1: applied, sparsified, exported, imported, rewritten.

    python tests/benchmarks/big_checkpoints.py [--folder DIR] [--only 8b rewrite 70b] [--json FILE]

Needs 45 GB on the disk of ``--folder``. What it wrote is removed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_prune.artifacts import write_json
from megatron_prune.checkpoint import writer as checkpoint_writer
from megatron_prune.checkpoint.layout import ModelShape, WeightLayout, weights
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.writer import CheckpointWriter
from megatron_prune.convert.config import args_from_config
from megatron_prune.masks import find_masks, open_masks
from tests.benchmarks import ratio
from tests.benchmarks.resident import timed

ROOT = Path(__file__).resolve().parents[2]
RATIOS = (0.5, 0.625, 0.75, 0.8125)
MEMORY_LIMIT = 3e9
SPEED_LIMIT = 1 / 0.4  # of cp's time
BLOCK = 8 << 20
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "vocab_size": 128256,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "initializer_range": 0.02,
    "tie_word_embeddings": False, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
WIDE = LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 2}


def main() -> int:
    parser = ratio.arguments(__doc__)
    parser.set_defaults(pairs=6)
    parser.add_argument("--folder", help="where to work")
    parser.add_argument("--only", nargs="+", choices=("8b", "rewrite", "70b"), default=("8b", "rewrite", "70b"))
    parser.add_argument("--layers", type=int, default=32, help="of the 8B (fewer try the script out)")
    options = parser.parse_args()
    measured: list[ratio.Ratio] = []
    stages = Stages()
    for part in options.only:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            if part == "8b":
                eight(Path(name), stages, options.layers)
            elif part == "70b":
                wide(Path(name), stages)
            else:
                measured.append(rewriting(Path(name), options.pairs, options.layers))
    print(f"load {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores")
    code = ratio.finish(measured, options, stages=stages.rows, memory_limit=MEMORY_LIMIT)
    highest = max((row["memory"] for row in stages.rows), default=0.0)
    print(f"highest peak: {highest / 1e9:.2f} GB; limit {MEMORY_LIMIT / 1e9}: {highest <= MEMORY_LIMIT and 'holds'}")
    return code or int(highest > MEMORY_LIMIT)


class Stages:
    """Commands with their seconds and memory."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def run(self, name: str, *words: object) -> None:
        """Run ``python …``."""
        seconds, peak = timed([sys.executable, *map(str, words)])
        self.rows.append({"stage": name, "seconds": seconds, "memory": peak})
        print(f"| {name} | {seconds:.1f} | {peak / 1e9:.2f} |", flush=True)


CONVERT = ROOT / "tools" / "convert_checkpoint.py"
VERB = ("-m", "megatron_prune")


def eight(folder: Path, stages: Stages, layers: int) -> None:
    parent = folder / "parent"
    size = write(parent, LLAMA | {"num_hidden_layers": layers})
    print(f"8B: {size / 1e9:.2f} GB")
    for axis in ("depth", "width"):
        for removed in RATIOS:
            plan, pruned = folder / "plan.json", folder / "pruned"
            target = ("--method", "random", "--axis", axis, "--ratio", removed)
            stages.run(f"plan, {axis} {removed}", *VERB, "plan", "--load", parent, *target, "--output", plan)
            apply = (*VERB, "apply", "--load", parent, "--plan", plan, "--save", pruned)
            stages.run(f"apply, {axis} {removed}", *apply)
            if axis == "depth" and removed == RATIOS[0]:
                compare_layers(parent, pruned)
                rmtree(pruned)
                stages.run("the same, 2 workers", *apply, "--workers", 2)
                compare_layers(parent, pruned)
            rmtree(pruned)
    stages.run("inspect --verify-integrity", ROOT / "tools" / "inspect_checkpoint.py", parent, "--verify-integrity")

    for amount in (("--pattern", "2:4"), *(("--ratio", removed) for removed in reversed(RATIOS[1:]))):
        sparsify(stages, parent, folder / "sparse", *amount)
        if "2:4" in amount:
            plan, target = folder / "plan.json", ("--method", "random", "--axis", "depth", "--ratio", 0.5)
            stages.run("plan, 2:4 masks", *VERB, "plan", "--load", folder / "sparse", *target, "--output", plan)
            apply = (*VERB, "apply", "--load", folder / "sparse", "--plan", plan, "--save", folder / "pruned")
            stages.run("apply, depth 0.5, 2:4 masks", *apply)
            rmtree(folder / "pruned")
        rmtree(folder / "sparse")

    there_and_back(stages, parent, folder / "again")
    sparsify(stages, folder / "again", folder / "sparse", "--ratio", RATIOS[0])
    rmtree(folder / "again")
    there_and_back(stages, folder / "sparse", folder / "again", ", with masks")


def sparsify(stages: Stages, parent: Path, save: Path, *amount: object, what: str = "") -> None:
    words = ("--load", parent, "--save", save, "--method", "magnitude", *amount)
    stages.run(f"{what}sparsify, magnitude {amount[-1]}", *VERB, "sparsify", *words)


def there_and_back(stages: Stages, made: Path, again: Path, what: str = "") -> None:
    """Export a checkpoint, remove it (three of 16 GB would fill the disk), import it: every bit is there again."""
    hf, expected = made.with_name("hf"), identity(made)
    stages.run(f"export{what}", CONVERT, "export", "--load", made, "--hf", hf)
    rmtree(made)
    stages.run(f"import{what}", CONVERT, "import", "--hf", hf, "--save", again)
    rmtree(hf)
    if identity(again) != expected:
        raise SystemExit(f"{again} is not what was exported")
    print("  every bit is the same", flush=True)


def wide(folder: Path, stages: Stages) -> None:
    parent, plan = folder / "parent", folder / "plan.json"
    size = write(parent, WIDE, whole_records=True)
    checkpoint = open_checkpoint(parent)
    largest = max(box.piece.length for name in checkpoint.names for box in checkpoint.boxes(name))
    print(f"70B's width: {size / 1e9:.2f} GB, the largest record {largest / 1e9:.2f} GB")
    for removed in (0.5, 0.8125):
        target = ("--method", "random", "--axis", "width", "--ratio", removed)
        stages.run(f"70B's width: plan {removed}", *VERB, "plan", "--load", parent, *target, "--output", plan)
        apply = (*VERB, "apply", "--load", parent, "--plan", plan, "--save", folder / "pruned")
        stages.run(f"70B's width: apply {removed}", *apply)
        rmtree(folder / "pruned")
    sparsify(stages, parent, folder / "sparse", "--ratio", 0.5, what="70B's width: ")
    rmtree(folder / "sparse")
    stages.run("70B's width: export", CONVERT, "export", "--load", parent, "--hf", folder / "hf")
    stages.run("70B's width: import", CONVERT, "import", "--hf", folder / "hf", "--save", folder / "again")
    same(checkpoint, open_checkpoint(folder / "again"))
    rmtree(folder / "again")
    rewrite = (CONVERT, "rewrite", "--load", parent, "--save", folder / "again")
    stages.run("70B's width: rewrite, 2 workers", *rewrite, "--workers", 2)
    same(checkpoint, open_checkpoint(folder / "again"))


def rewriting(folder: Path, pairs: int, layers: int) -> ratio.Ratio:
    write(folder / "parent", LLAMA | {"num_hidden_layers": layers})

    def rewrite() -> float:
        seconds, _ = timed([sys.executable, str(CONVERT), "rewrite", "--load", str(folder / "parent"),
                            "--save", str(folder / "again")])  # fmt: skip
        rmtree(folder / "again")
        return seconds

    def copy() -> float:
        words = ["sh", "-c", 'cp -r "$1" "$2" && find "$2" -type f -exec sync {} +', "sh"]
        seconds, _ = timed([*words, str(folder / "parent"), str(folder / "copy")])
        rmtree(folder / "copy")
        return seconds

    return ratio.interleaved("rewrite / cp", rewrite, copy, pairs=pairs, limit=SPEED_LIMIT)


# -- writing and comparing -------------------------------------------------------------


def write(root: Path, config: dict, *, whole_records: bool = False) -> int:
    """A checkpoint of this config with random bits; its size in bytes. Numbers come from one random block, read at
    another offset each time: drawing 8 billion of them would take longer than the benchmark itself."""
    side = root.with_name(f"{root.name}-config")
    side.mkdir()
    write_json(side / "config.json", config)
    args = args_from_config(config)
    shape = ModelShape.from_args(args)
    generator = torch.Generator().manual_seed(0)
    pool = (torch.randn(3 << 20, generator=generator) * 0.02).to(torch.bfloat16)
    checkpoint_writer.RECORD_BYTES = (4 << 30) if whole_records else (256 << 20)

    def numbers(layout: WeightLayout, rows: int) -> torch.Tensor:
        count = rows * (layout.numel // layout.shape[0])
        start = int(torch.randint(1 << 20, (1,), generator=generator)) // 4 * 4
        times = -(-(start + count) // len(pool))
        return pool.repeat(times)[start : start + count].view(rows, *layout.shape[1:])

    def blocks(layout: WeightLayout) -> Iterator[torch.Tensor]:
        row = layout.numel // layout.shape[0] * 2
        step = layout.shape[0] if whole_records else max(1, BLOCK // row)
        for first in range(0, layout.shape[0], step):
            yield numbers(layout, min(step, layout.shape[0] - first))

    with CheckpointWriter(root, args=args, dtype=torch.bfloat16, huggingface=side) as made:
        for layout in weights(shape):
            made.add(layout.name, layout.shape, blocks(layout))
    rmtree(side)
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def identity(root: Path) -> tuple[str, str | None]:
    """All bits of a checkpoint, and of its masks if it has any."""
    masks = find_masks(root)
    return open_checkpoint(root).full_hash(), None if masks is None else open_masks(masks).hash


def same(one, other) -> None:
    if one.full_hash() != other.full_hash():
        raise SystemExit(f"{one.root} and {other.root} differ")
    print("  every bit is the same", flush=True)


def compare_layers(parent: Path, pruned: Path) -> None:
    """Every weight that a depth cut keeps is the parent's, bit by bit."""
    before, after = open_checkpoint(parent), open_checkpoint(pruned)
    kept = read_kept(pruned)
    for layout in weights(after.shape):
        source = layout.name if layout.layer is None else f"decoder.layers.{kept[layout.layer]}.{layout.suffix}"
        for a, b in zip(before.row_blocks(source), after.row_blocks(layout.name), strict=True):
            if not torch.equal(a.view(torch.int16), b.view(torch.int16)):
                raise SystemExit(f"{layout.name} is not the parent's {source}")
    print(f"  layers {kept} are the parent's, bit by bit", flush=True)


def read_kept(pruned: Path) -> tuple[int, ...]:
    from megatron_prune.structured import plan

    return plan.read(pruned.parent / "plan.json").kept_layers


if __name__ == "__main__":
    sys.exit(main())
