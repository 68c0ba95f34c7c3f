"""Our ``sparsify`` against the published code of Wanda and SparseGPT: same model, tokens, type and threads.

    git clone https://github.com/locuslab/wanda          # both outside this repository
    git clone https://github.com/IST-DASLab/sparsegpt
    python tests/benchmarks/sparse_references.py --wanda DIR --sparsegpt DIR [--data runs/smollm2-data] [--json FILE]

For every method and pattern at 50%: wall time of pruning, perplexity on held-out text, and in how many places of the
first block the masks differ. Ours is the whole verb in a new process (imports, loading, pruning, writing); theirs is
the pruning alone, in a process that has loaded the model. Their code runs unchanged, except for arguments that current
transformers needs when a block is called, and for calls of CUDA. Perplexity is transformers' for both, ours after
export. ``--data`` is the folder that examples/smollm2_135m/run.sh prepares.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_prune import artifacts
from megatron_prune.convert.masks import export_masks
from megatron_prune.masks import open_masks
from tests import reference
from tests.benchmarks.ratio import machine

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("magnitude", "wanda", "sparsegpt")
PATTERNS = ("unstructured", "4:8", "2:4")
FIRST_BLOCK = "model.layers.0."


class Block(torch.nn.Module):
    """A decoder layer as the published loops call it: they know no rotary embeddings and take the first of a tuple."""

    def __init__(self, layer: torch.nn.Module, rotary: torch.nn.Module):
        super().__init__()
        self.layer = layer
        self.rotary = [rotary]  # not a submodule of every block

    def forward(self, hidden: torch.Tensor, attention_mask: Any = None, **_: Any) -> tuple[torch.Tensor]:
        positions = torch.arange(hidden.shape[1])[None]
        embeddings = self.rotary[0](hidden, positions)
        return (self.layer(hidden, attention_mask=attention_mask, position_embeddings=embeddings),)


@contextlib.contextmanager
def as_published_loops_expect(model: Any, sequences: int, length: int) -> Iterator[None]:
    """The model with blocks that the loops can call, and CUDA calls that do nothing."""
    layers = list(model.model.layers)
    model.seqlen, model.hf_device_map = length, {}
    saved = {name: getattr(torch.cuda, name) for name in ("synchronize", "empty_cache")}
    own_cuda = torch.Tensor.cuda
    model.model.layers = torch.nn.ModuleList(Block(layer, model.model.rotary_emb) for layer in layers)
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_: None  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.cuda = own_cuda  # type: ignore[method-assign]
        for name, function in saved.items():
            setattr(torch.cuda, name, function)
        model.model.layers = torch.nn.ModuleList(layers)


def published(options: argparse.Namespace, method: str, pattern: str, result: Path) -> None:
    """Run the published code in this process; writes seconds, window losses and the first block's zeros."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.data / "hf", dtype=torch.float32, attn_implementation="eager")
    model.eval()
    loader = [(window[None],) for window in windows(options.data / "calibration", options)]
    n, m = (0, 0) if pattern == "unstructured" else map(int, pattern.split(":"))
    args = argparse.Namespace(nsamples=options.sequences, seed=0, sparsity_ratio=0.5, use_variant=False)
    device = torch.device("cpu")
    with as_published_loops_expect(model, options.sequences, options.length), torch.no_grad():
        began = time.perf_counter()
        if method == "sparsegpt":
            llama = _module(options.sparsegpt, "llama", wandb=types.ModuleType("wandb"))
            llama.args = argparse.Namespace(
                nsamples=options.sequences, sparsity=0.5, prunen=m - n, prunem=m, percdamp=0.01, blocksize=128,
                minlayer=-1, maxlayer=1000, prune_only="", invert=False, wbits=16, true_sequential=False,
            )  # fmt: skip
            llama.llama_sequential(model, loader, device)
        else:
            lib = _module(options.wanda, "lib.prune", datasets=types.SimpleNamespace(load_dataset=None))
            lib.get_loaders = lambda *_, **__: (loader, None)
            prune = lib.prune_wanda if method == "wanda" else lib.prune_magnitude
            prune(args, model, None, device, prune_n=m - n, prune_m=m)
        seconds = time.perf_counter() - began
    model.config._attn_implementation = "sdpa"
    losses = reference.window_losses(model, options.data / "test", options.length, options.windows)
    zeros = {name: (w == 0).numpy() for name, w in model.state_dict().items() if _in_first_block(name)}
    np.savez(result, losses=losses, seconds=seconds, **zeros)


def _module(checkout: Path, name: str, **missing: Any) -> Any:
    """A module of a checkout; ``missing`` replaces modules that it imports and does not use here."""
    sys.path.insert(0, str(checkout))
    for module, stand_in in missing.items():
        sys.modules.setdefault(module, stand_in)
    return importlib.import_module(name)


def _in_first_block(name: str) -> bool:
    return name.startswith(FIRST_BLOCK) and name.endswith("proj.weight")


def ours(options: argparse.Namespace, method: str, pattern: str, work: Path, result: Path) -> None:
    """The whole verb, then export and transformers' losses of it."""
    save = work / f"{method}-{pattern.replace(':', '-')}"
    argv = ["-m", "megatron_prune", "sparsify", "--load", work / "parent", "--method", method]
    argv += ["--ratio", "0.5", "--pattern", pattern, "--save", save]
    if method != "magnitude":
        argv += ["--calibration-data-path", options.data / "calibration", "--calibration-sequences", options.sequences]
        argv += ["--calibration-seq-length", options.length]
    began = time.perf_counter()
    _run(argv, options)
    seconds = time.perf_counter() - began
    hf = work / "hf"
    _run(["tools/convert_checkpoint.py", "export", "--load", save, "--hf", hf], options)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    losses = reference.window_losses(model, options.data / "test", options.length, options.windows)
    removed = {}
    masks = open_masks(save / "masks")
    export_masks(masks, work / "masks.safetensors")
    import safetensors.numpy

    for name, packed in safetensors.numpy.load_file(work / "masks.safetensors").items():
        if _in_first_block(name):
            columns = model.state_dict()[name].shape[1]
            removed[name] = np.unpackbits(packed, axis=1, bitorder="little")[:, :columns] == 0
    np.savez(result, losses=losses, seconds=seconds, **removed)
    for folder in (save, hf):
        shutil.rmtree(folder)


def _run(argv: list[Any], options: argparse.Namespace) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, argv))} failed:\n{(done.stdout + done.stderr)[-4000:]}")


def windows(prefix: Path, options: argparse.Namespace) -> list[torch.Tensor]:
    """The first sequences of a corpus, read without our reader: int64 [S] each."""
    tokens = np.fromfile(f"{prefix}.bin", dtype=np.uint16).astype(np.int64)
    length = options.length
    return [torch.from_numpy(tokens[k * length : (k + 1) * length]) for k in range(options.sequences)]


def beyond_ties(dense: np.ndarray, ours: np.ndarray, theirs: np.ndarray, pattern: str) -> int:
    """Differences of magnitude's masks beyond ties: both sides must remove equal |w|.

    N:M: in every group. Unstructured, the published code removes all that equal the last to go; ours the exact count.
    """
    size = np.abs(dense)
    if pattern == "unstructured":
        last = size[ours].max()
        return int(((ours != theirs) & (size != last) & (size != 0)).sum())
    m = int(pattern.split(":")[1])
    removed = [np.sort(np.where(side, size, 0).reshape(-1, m), axis=1) for side in (ours, theirs)]
    return int((removed[0] != removed[1]).any(axis=1).sum())


def compare(a: Any, b: Any, dense: dict[str, np.ndarray], method: str, pattern: str) -> dict[str, Any]:
    """``a`` is ours, ``b`` theirs; a weight that was zero before does not count."""
    names = [name for name in a.files if _in_first_block(name)]
    different = {name: int(((a[name] != b[name]) & (dense[name] != 0)).sum()) for name in names}
    ties = method == "magnitude"  # the others' scores tie where inputs do, which they do not
    return {
        "ours": {"seconds": float(a["seconds"]), "perplexity": math.exp(a["losses"].mean())},
        "published": {"seconds": float(b["seconds"]), "perplexity": math.exp(b["losses"].mean())},
        "first_block_different": different,
        "first_block_beyond_ties": sum(beyond_ties(dense[n], a[n], b[n], pattern) for n in names) if ties else None,
        "first_block_weights": int(sum(a[name].size for name in names)),
        "first_block_removed": {
            "ours": int(sum(a[name].sum() for name in names)),
            "published": int(sum(b[name].sum() for name in names)),
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wanda", type=Path, required=True)
    parser.add_argument("--sparsegpt", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=ROOT / "runs" / "smollm2-data")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--sequences", type=int, default=16, help="of calibration (default: 16)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence (default: 512)")
    parser.add_argument("--windows", type=int, default=16, help="of held-out text (default: 16)")
    parser.add_argument("--pairs", type=int, default=1, help="how often both are timed, in turns (default: 1)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.data = options.data.resolve()
    spawn = multiprocessing.get_context("spawn")
    rows = []
    with tempfile.TemporaryDirectory(dir=options.data) as folder:
        work = Path(folder)
        _run(["tools/convert_checkpoint.py", "import", "--hf", options.data / "hf", "--save", work / "parent"], options)
        import safetensors.numpy

        dense = safetensors.numpy.load_file(options.data / "hf" / "model.safetensors")
        for method in options.methods:
            for pattern in options.patterns:
                found = []
                for _ in range(options.pairs):
                    for side, arguments in (("published", ()), ("ours", (work,))):
                        target = published if side == "published" else ours
                        process = spawn.Process(
                            target=target, args=(options, method, pattern, *arguments, work / f"{side}.npz")
                        )
                        process.start()
                        process.join()
                        if process.exitcode:
                            raise SystemExit(f"{side} {method} {pattern} failed")
                    sides = [np.load(work / f"{side}.npz") for side in ("ours", "published")]
                    found.append(compare(*sides, dense, method, pattern))
                ratios = [one["ours"]["seconds"] / one["published"]["seconds"] for one in found]
                row = {"method": method, "pattern": pattern, "ratio": statistics.median(ratios), "ratios": ratios}
                rows.append(row | found[-1])
                print(
                    f"{method} {pattern}: perplexity ours {found[-1]['ours']['perplexity']:.3f}, published "
                    f"{found[-1]['published']['perplexity']:.3f}; seconds {found[-1]['ours']['seconds']:.1f} / "
                    f"{found[-1]['published']['seconds']:.1f} = {row['ratio']:.2f}; first block differs in "
                    f"{sum(found[-1]['first_block_different'].values())} of {found[-1]['first_block_weights']:,}: "
                    f"{json.dumps({k.split('.')[-2]: v for k, v in found[-1]['first_block_different'].items() if v})}"
                    + (f", {found[-1]['first_block_beyond_ties']} groups beyond ties" if method == "magnitude" else ""),
                    flush=True,
                )
    if options.json:
        facts = {"sequences": options.sequences, "length": options.length, "windows": options.windows}
        artifacts.write_json(
            options.json,
            {"rows": rows, **facts, "threads": options.threads, "machine": machine(), "versions": artifacts.versions()},
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
