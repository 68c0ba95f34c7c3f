"""``tools/preprocess_data.py`` against Megatron's script of that name: same text, tokenizer and workers.

Megatron's script is not in its wheel; give its path. Both run as separate processes from start to end,
in interleaved pairs, and must write the same tokens. The goal is a ratio of 0.5.

    python tests/benchmarks/tokenizing.py --megatron-script Megatron-LM/tools/preprocess_data.py \\
        --input text.jsonl --tokenizer-type SentencePieceTokenizer --tokenizer-model t.model [--workers 2]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_prune.artifacts import sha256_file
from tests.benchmarks import ratio

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 0.5


def main() -> int:
    parser = ratio.arguments(__doc__)
    parser.add_argument("--megatron-script", required=True, type=Path, help="Megatron-LM's tools/preprocess_data.py")
    parser.add_argument("--input", required=True, type=Path, help="JSON lines")
    parser.add_argument("--tokenizer-type", required=True)
    parser.add_argument("--tokenizer-model", required=True)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shared = ["--input", options.input, "--tokenizer-type", options.tokenizer_type, "--append-eod"]
        shared += ["--tokenizer-model", options.tokenizer_model, "--workers", options.workers]
        own = [ROOT / "tools" / "preprocess_data.py", *shared, "--output-prefix", f"{folder}/o"]
        theirs = [options.megatron_script, *shared, "--output-prefix", f"{folder}/m"]
        measured = ratio.interleaved(
            f"preprocess_data / Megatron's, {options.tokenizer_type}, {options.workers} workers",
            lambda: timed(own),
            lambda: timed(theirs),
            pairs=options.pairs,
            limit=LIMIT,
        )
        same = sha256_file(f"{folder}/o.bin") == sha256_file(f"{folder}/m_text_document.bin")
    size = options.input.stat().st_size
    print(f"{size / 1e6:.1f} MB of JSON lines; the tokens are {'the same' if same else 'DIFFERENT'}")
    code = ratio.finish([measured], options, bytes=size, same_tokens=same, workers=options.workers)
    return code or int(not same)


def timed(words: list[object]) -> float:
    """Seconds of a Python script from start to end."""
    started = time.perf_counter()
    finished = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{words[0]} left with {finished.returncode}:\n{finished.stderr[-2000:]}")
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
