#!/usr/bin/env python3
"""Checkpoints in another form; the work is in megatron_prune/convert and megatron_prune/structured.

    convert_checkpoint.py import  --hf HF_DIR --save CKPT      Llama family, Hugging Face → Megatron
    convert_checkpoint.py export  --load CKPT --hf HF_DIR      and back
    convert_checkpoint.py rewrite --load CKPT --save CKPT      any Megatron checkpoint, legacy per-rank files
                                                               too → torch_dist, its weights alone

Masks go along: CKPT/masks is HF_DIR/masks.safetensors (megatron_prune/convert/masks.py). Legacy per-rank files are
written by Megatron itself: pretrain … --ckpt-convert-format torch --ckpt-convert-save DIR, at the layout they are for.
"""

from __future__ import annotations

import argparse
import sys

from megatron_prune.errors import EXIT_REFUSED, MegatronPruneError

DTYPES = ("float32", "bfloat16", "float16")


def parse(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    directions = parser.add_subparsers(dest="direction", required=True)
    add = directions.add_parser("import", help="Hugging Face → Megatron").add_argument
    add("--hf", required=True, metavar="DIR", help="model directory with safetensors, or a name on the Hub")
    add("--save", required=True, metavar="CKPT", help="checkpoint to write; must not exist")
    add("--dtype", choices=DTYPES, help="cast every weight; by default each keeps its type")
    add("--make-vocab-size-divisible-by", type=int, default=128, metavar="N",
        help="pad the vocabulary to a multiple of N × TP (default 128)")  # fmt: skip
    add("--tensor-model-parallel-size", type=int, default=1, metavar="TP",
        help="tensor parallelism that the padded vocabulary must divide by")  # fmt: skip
    add("--max-position-embeddings", type=int, metavar="N",
        help="import for sequences up to N only (where a sliding window is shorter)")  # fmt: skip
    add = directions.add_parser("export", help="Megatron → Hugging Face").add_argument
    add("--load", required=True, metavar="CKPT", help="checkpoint, or one of its iter_… or release folders")
    add("--hf", required=True, metavar="DIR", help="directory to write; must not exist")
    add = directions.add_parser("rewrite", help="Megatron → Megatron, torch_dist").add_argument
    add("--load", required=True, metavar="CKPT", help="checkpoint, or one of its iter_… or release folders")
    add("--save", required=True, metavar="CKPT", help="checkpoint to write; must not exist")
    for name, direction in directions.choices.items():
        direction.add_argument("--workers", type=int, default=1, metavar="N", help="processes that share the work")
        if name != "import":
            direction.add_argument("--verify-integrity", action="store_true",
                help="check the files of --load against integrity.json first")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        import torch

        from megatron_prune.checkpoint.parallel import keep_freed_memory
        from megatron_prune.checkpoint.reader import open_checkpoint
        from megatron_prune.checkpoint.tracker import refuse_remote
        from megatron_prune.convert.huggingface import export_hf, import_hf
        from megatron_prune.structured.apply import rewrite

        keep_freed_memory()
        refuse_remote("--hf", getattr(args, "hf", ""))
        if getattr(args, "verify_integrity", False):
            open_checkpoint(args.load).verify(hashes=True)
        if args.direction == "export":
            print(f"wrote {export_hf(args.load, args.hf, workers=args.workers)}")
        elif args.direction == "rewrite":
            made = rewrite(args.load, args.save, workers=args.workers)
            print(f"wrote {made.root}: {made.shape.parameters():,} parameters")
        else:
            made = import_hf(
                args.hf,
                args.save,
                dtype=getattr(torch, args.dtype) if args.dtype else None,
                make_vocab_size_divisible_by=args.make_vocab_size_divisible_by,
                tensor_model_parallel_size=args.tensor_model_parallel_size,
                max_position_embeddings=args.max_position_embeddings,
                workers=args.workers,
            )
            print(f"wrote {made.root}: {made.shape.parameters():,} parameters")
    except MegatronPruneError as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return EXIT_REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
