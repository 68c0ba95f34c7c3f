"""The time of lm-eval's requests: ours, by Megatron's model, over lm-eval's own ``hf`` model on the export.

One process, the same requests and batch: choices scored by likelihood, and texts continued greedily from prompts of
uneven length. The model is a random Llama, large enough that its matrix products are most of the time. Seconds are of
the processor, so that what else the machine does matters little. Limit of the upper end of each ratio: 1.

    python tests/benchmarks/task_throughput.py [--pairs 10] [--batch 8] [--vocabulary 8192] [--layers 4]
        [--only continuations] [--json figures.json]
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from megatron_prune.engine import cpu  # noqa: E402

SIZES = {
    "hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "max_position_embeddings": 512,
}  # fmt: skip
LAYERS = 4
LIMIT = 1.0


def requests(texts: list[str], questions: int, prompts: int, new: int) -> tuple[list[Any], list[Any]]:
    """Four choices per question, and prompts to continue, as lm-eval asks them."""
    from lm_eval.api.instance import Instance

    draw = random.Random(1)
    scored, continued = [], []
    for number in range(questions):
        context = texts[number % len(texts)][: draw.randint(100, 400)]
        for choice in range(4):
            answer = " " + draw.choice(texts)[: draw.randint(5, 60)].strip()
            scored.append(Instance("loglikelihood", {}, (context, answer), choice, metadata=("choices", number, 1)))
    for number in range(prompts):
        settings = {"until": ["\n\n\n"], "max_gen_toks": new, "do_sample": False}
        context = texts[-1 - number % len(texts)][: draw.randint(100, 400)]
        continued.append(Instance("generate_until", {}, (context, settings), 0, metadata=("story", number, 1)))
    return scored, continued


def megatron_model(checkpoint: Path, batch: int) -> Any:
    """``MegatronLM`` on one rank."""
    from megatron_prune import verbs
    from megatron_prune.engine import runtime
    from megatron_prune.evaluation import evaluate
    from megatron_prune.evaluation.generation import GenerationDefaults
    from megatron_prune.evaluation.language_model import MegatronLM, RanksModel

    own = verbs.EvaluateSettings(output="none")
    words = ["--load", str(checkpoint), "--seq-length", "512", "--micro-batch-size", str(batch)]
    args = runtime.start("evaluate", words, own, complete=evaluate._complete)
    runtime.initialize(args)
    model = runtime.load_model(args)
    cpu.fuse(model)
    tokenizer = runtime.tokenizer(args)
    everywhere = RanksModel(model, batch=batch, tokenizer=lambda: tokenizer)
    defaults = GenerationDefaults.read(checkpoint / "huggingface", tokenizer)
    return MegatronLM(tokenizer, 512, everywhere, defaults)


def timed(run: Callable[[], Any]) -> Callable[[], float]:
    def measure() -> float:
        begun = time.process_time()
        run()
        return time.process_time() - begun

    return measure


def main() -> int:
    from tests import tiny
    from tests.benchmarks import ratio

    parser = ratio.arguments(__doc__)
    parser.add_argument("--batch", type=int, default=8, help="sequences per batch (default: 8)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="words of the model (default: 8192)")
    parser.add_argument("--questions", type=int, default=4, help="questions of four choices (default: 4)")
    parser.add_argument("--prompts", type=int, default=8, help="prompts to continue (default: 8)")
    parser.add_argument("--new", type=int, default=16, help="tokens of each continuation (default: 16)")
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"layers of the model (default: {LAYERS})")
    parser.add_argument("--only", choices=["choices", "continuations"], help="measure only these (default: both)")
    args = parser.parse_args()
    cpu.prepare()
    import torch
    from lm_eval.models.huggingface import HFLM

    from megatron_prune.convert.huggingface import export_hf, import_hf

    with tempfile.TemporaryDirectory() as name:
        home, texts = Path(name), tiny.documents(100)
        sizes = {**SIZES, "vocab_size": args.vocabulary}
        tiny.write_hf_model(home / "hf", "llama-gqa", layers=args.layers, eos_token_id=0, **sizes)
        tiny.write_tokenizer(home / "hf", texts)
        import_hf(home / "hf", home / "checkpoint")
        export_hf(home / "checkpoint", home / "exported")
        scored, continued = requests(texts, args.questions, args.prompts, args.new)
        ours = megatron_model(home / "checkpoint", args.batch)
        theirs = HFLM(pretrained=str(home / "exported"), device="cpu", dtype="float32", batch_size=args.batch)
        values = [[found[0] for found in model.loglikelihood(scored, disable_tqdm=True)] for model in (ours, theirs)]
        worst = max(abs(one - other) for one, other in zip(*values, strict=True))
        same = [model.generate_until(continued, disable_tqdm=True) for model in (ours, theirs)]
        equal = sum(one == other for one, other in zip(*same, strict=True))
        print(f"largest difference of a log-likelihood {worst:.2g}; {equal} of {len(continued)} texts are equal")
        found = [
            ratio.interleaved(
                f"{what}, ours / hf (s)", timed(lambda run=run: run(ours)), timed(lambda run=run: run(theirs)),
                pairs=args.pairs, limit=LIMIT,
            )
            for what, run in (
                ("choices", lambda model: model.loglikelihood(scored, disable_tqdm=True)),
                ("continuations", lambda model: model.generate_until(continued, disable_tqdm=True)),
            )
            if args.only in (None, what)
        ]  # fmt: skip
    facts = {
        "batch": args.batch,
        "vocabulary": args.vocabulary,
        "layers": args.layers,
        "threads": torch.get_num_threads(),
    }
    return ratio.finish(found, args, **facts, equal_texts=equal)


if __name__ == "__main__":
    sys.exit(main())
