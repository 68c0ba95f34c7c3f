"""A published model through import, evaluation and export: its perplexity beside transformers', and whether bits stay.

    python tests/benchmarks/real_model.py --gguf FILE --work DIR      # dequantised to float32 first
    python tests/benchmarks/real_model.py --hf MODEL --work DIR

The text is Python's own language reference. A model of 0.5 billion parameters takes 6 GB of memory in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megatron_prune.convert.huggingface import export_hf, import_hf  # noqa: E402
from megatron_prune.data.preprocess import preprocess  # noqa: E402
from megatron_prune.data.tokenizers import load_tokenizer  # noqa: E402
from megatron_prune.engine.launch import launch  # noqa: E402
from tests import reference, tiny  # noqa: E402

S = 256


def dequantised(gguf: Path, folder: Path) -> Path:
    """The model of a GGUF file in float32, in which quantised weights are exact, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not folder.exists():
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = loaded.config
        del config.quantization_config
        model = type(loaded)(config).float()
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


def corpus(hf: Path, folder: Path) -> Path:
    text = tiny.write_jsonl(folder / "text.jsonl", tiny.documents(40))
    preprocess([text], folder / "text", load_tokenizer("HuggingFaceTokenizer", hf), append_eod=True, workers=1)
    return folder / "text"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--gguf", type=Path, metavar="FILE")
    source.add_argument("--hf", type=Path, metavar="DIR")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--windows", type=int, default=3)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    hf = options.hf or dequantised(options.gguf, options.work / "hf")
    from transformers import AutoModelForCausalLM

    prefix = corpus(hf, options.work)
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    width = np.uint16 if model.config.vocab_size <= 1 << 16 else np.int32  # as Megatron chooses it
    expected = float(np.exp(np.mean(reference.window_losses(model, prefix, S, options.windows, width))))
    print(f"{model.config.model_type}, {model.num_parameters():,} parameters; transformers: {expected:.6f}", flush=True)
    del model
    import_hf(hf, options.work / "checkpoint")
    words = ["evaluate", "--load", options.work / "checkpoint", "--data-path", prefix, "--labels", "text"]
    words += ["--seq-length", S, "--windows", options.windows, "--output", options.work / "scores.json"]
    if code := launch([str(word) for word in words], nproc=1, log=options.work / "log.txt"):
        raise SystemExit(code)
    found = json.loads((options.work / "scores.json").read_text())["corpora"]["text"]["perplexity"]
    export_hf(options.work / "checkpoint", options.work / "back")
    before, after = tensors(hf), tensors(options.work / "back")
    same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    print(
        f"Megatron: {found:.6f}, differs by {abs(found / expected - 1):.1e}; bits after import and export stay: {same}"
    )


if __name__ == "__main__":
    main()
