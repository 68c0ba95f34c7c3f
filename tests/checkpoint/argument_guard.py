"""The guard of model arguments: each is set to another value, the model is trained two steps, and then evaluated with
its checkpoint alone. The loss must be that of the trained model as it was in memory, or the checkpoint be refused.

    python -m tests.checkpoint.argument_guard docs/model-arguments.json

writes a line for every argument of Megatron's model and transformer configuration (the page ``model-arguments`` shows
them). One process imports Megatron; every training and every evaluation is a fork of it, or two if it splits
the model.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import pickle
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_prune.engine import network

S, WINDOWS = 16, 3
# Megatron's defaults but for the sizes. Weights are large enough that another function has another loss.
MODEL: dict[str, str] = {
    "--num-layers": "2", "--hidden-size": "32", "--num-attention-heads": "4", "--ffn-hidden-size": "48",
    "--max-position-embeddings": "32", "--vocab-size": "379", "--init-method-std": "0.3",
}  # fmt: skip
RECIPE = (
    f"--seq-length {S} --micro-batch-size 1 --global-batch-size 2 --train-iters 2 --lr 1e-2 --stream-range 0:4 "
    "--num-workers 0"
).split()
ROPE = ["--position-embedding-type", "rope"]
YARN = [
    *("--position-embedding-type", "yarn", "--rotary-scaling-factor", "2", "--yarn-beta-fast", "32"),
    *("--yarn-beta-slow", "1", "--yarn-original-max-position-embeddings", "8", "--mscale", "1.0"),
    *("--mscale-all-dim", "0.0", "--yarn-correction-range-round-to-int"),
]
NORM_1P = ["--apply-layernorm-1p"]
GLU = ["--swiglu"]
EXPERTS = ["--num-experts", "2", "--moe-router-topk", "1"]
# What an argument acts on: flags that are given with it, because it does nothing without them.
NEEDS = {
    "rotary_base": ROPE, "rotary_percent": ROPE, "rotary_interleaved": ROPE, "no_rope_freq": ROPE,
    "rotary_seq_len_interpolation_factor": ROPE, "use_rope_scaling": ROPE, "apply_rope_fusion": ROPE,
    "rope_scaling_factor": [*ROPE, "--use-rope-scaling"],
    "rotary_scaling_factor": YARN, "mscale": YARN, "mscale_all_dim": YARN, "yarn_beta_fast": YARN,
    "yarn_beta_slow": YARN, "yarn_original_max_position_embeddings": YARN, "yarn_correction_range_round_to_int": YARN,
    "mrope_section": ["--position-embedding-type", "mrope"],
    "window_attn_skip_freq": ["--window-size", "2,0"],
    "group_query_attention": ["--num-query-groups", "2"], "num_query_groups": ["--group-query-attention"],
    "glu_linear_offset": GLU, "activation_func_clamp_value": GLU, "quick_geglu": [],
    "recompute_method": ["--recompute-granularity", "full", "--recompute-num-layers", "1"],
    "recompute_num_layers": ["--recompute-granularity", "full", "--recompute-method", "uniform"],
    "recompute_modules": ["--recompute-granularity", "selective"],
    "mup_base_hidden_size": ["--use-mup"], "mup_base_head_dim": ["--use-mup"], "mup_output_mult": ["--use-mup"],
    "mup_embedding_mult": ["--use-mup"], "mup_attn_scale_power": ["--use-mup"], "mup_width_mult": ["--use-mup"],
}  # fmt: skip
# The flag that switches off what NEEDS switches on.
OFF = {"yarn_correction_range_round_to_int": "--no-yarn-correction-range-round-to-int"}
# Arguments that split a model or its work: trained on two ranks, evaluated on one.
ON_TWO_RANKS = {
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size",
    "expert_tensor_parallel_size", "sequence_parallel", "pipeline_model_parallel_layout", "use_ring_exchange_p2p",
    "hierarchical_context_parallel_sizes", "account_for_embedding_in_pipeline_split", "overlap_p2p_comm",
    "account_for_loss_in_pipeline_split", "overlap_p2p_comm_warmup_flush", "pipeline_model_parallel_comm_backend",
    "clone_scatter_output_in_embedding", "distribute_saved_activations",
}  # fmt: skip
TP, PP = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
NEEDS |= {
    "sequence_parallel": TP, "clone_scatter_output_in_embedding": TP, "use_ring_exchange_p2p": PP,
    "pipeline_model_parallel_layout": PP, "overlap_p2p_comm": PP, "pipeline_model_parallel_comm_backend": PP,
    "account_for_embedding_in_pipeline_split": [*PP, "--num-layers", "3"],
    "account_for_loss_in_pipeline_split": [*PP, "--num-layers", "3"], "overlap_p2p_comm_warmup_flush": PP,
    "hierarchical_context_parallel_sizes": ["--context-parallel-size", "2"],
    "distribute_saved_activations": [*TP, "--recompute-granularity", "full", "--recompute-method", "uniform",
                                     "--recompute-num-layers", "1"],
}  # fmt: skip
TWO_LAYERS = Path(__file__).with_name("two_layers.json")
# Other values than those that ``flags`` makes.
VALUES: dict[str, list[str]] = {
    "hidden_size": ["48"], "num_attention_heads": ["8"], "num_query_groups": ["2"], "kv_channels": ["6"],
    "num_layers": ["3"], "ffn_hidden_size": ["40"], "max_position_embeddings": ["24"], "encoder_num_layers": ["2"],
    "decoder_num_layers": ["2"], "make_vocab_size_divisible_by": ["8"], "window_size": ["2,0"],
    "window_attn_skip_freq": ["([1,0])"], "no_rope_freq": ["([0,1])"], "rotary_base": ["77"],
    "rotary_percent": ["0.5"], "rotary_seq_len_interpolation_factor": ["2"], "mscale": ["0.7"],
    "yarn_beta_fast": ["16"], "yarn_beta_slow": ["2"], "yarn_original_max_position_embeddings": ["4"],
    "mrope_section": ["1", "1", "2"], "moe_layer_freq": ["([0,1])"], "linear_attention_freq": ["2"],
    "hybrid_layer_pattern": ["M*-"], "hybrid_override_pattern": ["M*-"], "mtp_num_layers": ["1"],
    "num_experts": ["2"], "attention_dropout": ["0.3"], "hidden_dropout": ["0.3"], "init_method_std": ["0.2"],
    "recompute_modules": ["mlp"], "spec": ["local"], "cp_comm_type": ["a2a"], "config_logger_dir": ["{folder}"],
    "yaml_cfg": ["none.yaml"], "te_precision_config_file": ["none.yaml"], "mup_base_hidden_size": ["16"],
    "heterogeneous_layers_config_path": ["tests/checkpoint/two_layers.json"],
    "heterogeneous_layers_config_encoded_json": [TWO_LAYERS.read_text().strip().replace("{", "{{").replace("}", "}}")],
    "hierarchical_context_parallel_sizes": ["1", "2"], "pipeline_model_parallel_layout": ["Et|tL"],
    "offload_modules": ["core_attn"], "cuda_graph_modules": ["attn"], "position_embedding_type": ["none"],
    "layernorm_epsilon": ["0.3"], "embedding_init_method_std": ["0.5"], "cpu_offloading_num_layers": ["1"],
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What became of an argument. ``loss`` is the trained model's mean loss, ``alone`` that of its checkpoint alone."""

    argument: str
    flags: str
    outcome: str  # one of OUTCOMES
    why: str = ""
    loss: float | None = None
    alone: float | None = None


OUTCOMES = {
    "equal": "the checkpoint alone has the trained model's loss",
    "refused": "the checkpoint is refused, by the argument's name",
    "not trained": "it is not trained: this package or Megatron refuses, or Megatron fails",
    "needs a GPU": "it is not trained on this machine: the argument needs a GPU, or a library that needs one",
    "no flag": "no flag of a training run sets it",
    "DIFFERENT": "the checkpoint alone has another loss: a bug",
    "FAILED": "it ended in a way that names nothing: a bug",
}
_GPU = re.compile(
    r"GPU|CUDA|cuda|Transformer Engine|TransformerEngine|transformer_engine|Apex|apex|triton|Triton|kitchen|mamba|"
    r"flash|TE |\bte_|\bfla |NVSHMEM|nvls|cudnn|causal_conv1d"
)


def actions() -> dict[str, argparse.Action]:
    """Megatron's flag for every argument of the table."""
    from tests.engine.unreached import parser

    found: dict[str, argparse.Action] = {}
    for action in parser()._actions:
        found.setdefault(action.dest, action)
    return found


def flags(name: str, default: Any, action: argparse.Action, folder: str = "") -> list[str]:
    """The words of a command line that set the argument to another value."""
    option = OFF.get(name, action.option_strings[0])
    if action.nargs == 0:
        return [option]
    if name in VALUES:
        return [option, *(word.format(folder=folder) for word in VALUES[name])]
    if action.choices:
        plain = [getattr(choice, "name", str(choice)) for choice in action.choices]
        return [option, next(choice for choice in plain if not str(default).endswith(choice))]
    if action.type is int:
        return [option, str((default or 0) + 1)]
    if action.type is float:
        return [option, str((default or 0.0) + 0.5)]
    return [option, "other"]


def command(name: str, words: list[str]) -> list[str]:
    """The model's flags: the base, what the argument needs, and the argument."""
    needed = list(NEEDS.get(name, []))
    model = {key: value for key, value in MODEL.items() if key not in (*words, *needed)}
    if words and words[0] in needed:  # given by the argument itself
        at = needed.index(words[0])
        del needed[at : at + (1 if at + 1 == len(needed) or needed[at + 1].startswith("--") else 2)]
    return [*(word for pair in model.items() for word in pair), *needed, *words]


def examine(names: list[str] | None, folder: str) -> list[Found]:
    """In a rank: every argument of the table, or the named ones."""
    from megatron_prune.checkpoint.model_arguments import known

    defaults, by_name, found = known(), actions(), []
    corpus = write_corpus(Path(folder, "corpus"))
    for name in names or list(defaults):
        with tempfile.TemporaryDirectory(dir=folder) as own:
            found.append(_examine(name, defaults[name], by_name.get(name), corpus, own))
        print(found[-1], file=sys.__stderr__, flush=True)
    return found


def _examine(name: str, default: Any, action: argparse.Action | None, corpus: str, folder: str) -> Found:
    if action is None:
        return Found(name, "", "no flag")
    words = flags(name, default, action, folder)
    shown = " ".join([*NEEDS.get(name, []), *words]).replace(folder, "DIR")
    save, scores = f"{folder}/run", f"{folder}/scores.json"
    training = ["pretrain", *command(name, words), *RECIPE, "--data-path", corpus, "--save", save]
    ranks = 2 if name in ON_TWO_RANKS else 1
    ended, said, losses = in_forks(lambda: _train(training, corpus), ranks)
    if ended != 0:
        why = _plain(said, folder)
        return Found(name, shown, _kind(why) if ended == 2 else "FAILED", why)
    ended, said, _ = in_forks(lambda: _run(_evaluation(save, corpus, scores)))
    loss = sum(losses) / len(losses)
    if ended != 0:
        named = ended == 2 and any(name.replace("_", mark) in said for mark in "_-")
        return Found(name, shown, "refused" if named else "FAILED", _plain(said, folder), loss)
    alone = json.loads(Path(scores).read_text())["corpora"]["text"]["window_losses"]
    close = 2e-3 if name in ("bf16", "fp16") else 2e-5 if ranks > 1 else 2e-6  # evaluation fuses attention
    same = all(math.isclose(a, b, rel_tol=close) for a, b in zip(losses, alone, strict=True))
    return Found(name, shown, "equal" if same else "DIFFERENT", "", loss, sum(alone) / len(alone))


def _kind(why: str) -> str:
    """Whether a refusal to train is about this machine; names of flags do not count."""
    return "needs a GPU" if _GPU.search(re.sub(r"--[a-z0-9-]+", "", why)) else "not trained"


def _evaluation(save: str, corpus: str, scores: str) -> list[str]:
    words = ["evaluate", "--load", save, "--data-path", corpus, "--labels", "text", "--output", scores]
    return [*words, "--seq-length", str(S), "--windows", str(WINDOWS)]


def _run(argv: list[str]) -> int:
    from megatron_prune.__main__ import main

    return main(argv)


def _train(argv: list[str], corpus: str) -> tuple[int, list[float]]:
    """Exit code of ``pretrain``, and the losses of the model that it trained, as it is in memory at the end."""
    from megatron_prune.data.windows import windows
    from megatron_prune.engine import cpu

    cpu.prepare()
    import megatron.training  # noqa: F401

    from megatron_prune.engine import forward
    from megatron_prune.evaluation.evaluate import score

    losses: list[float] = []
    count = forward.count_nonzero

    def then_score(model: list[Any]) -> Any:
        for chunk in model:
            chunk.eval()
        losses.extend(score(model, windows(corpus, S, WINDOWS)))
        return count(model)

    forward.count_nonzero = then_score
    return _run(argv), losses


def in_forks(work: Callable[[], Any], ranks: int = 1) -> tuple[int, str, list[float]]:
    """(exit code, what it said, losses) of ``work`` in a fork per rank: of the first rank, or of one that failed.

    Megatron's own refusals count as exit code 2.
    """
    meeting = network.anonymous_file()  # a new one: in that of earlier ranks are addresses at which nobody answers
    children = [_fork(work, rank, ranks, meeting) for rank in range(ranks)]
    os.close(meeting)
    ends = [_answer(*child) for child in children]
    return next((end for end in ends if end[0] != 0), ends[0])


def _fork(work: Callable[[], Any], rank: int, ranks: int, meeting: int) -> tuple[int, int]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        network.meet_in(meeting)
        with open(writer, "wb") as pipe:
            pickle.dump(_outcome(work), pipe)
        os._exit(0)
    os.close(writer)
    return child, reader


def _answer(child: int, reader: int) -> tuple[int, str, list[float]]:
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if not answer:
        return 2, f"Megatron: the process is ended by signal {status & 127}", []
    ended: tuple[int, str, list[float]] = pickle.loads(answer)
    return ended


def _outcome(work: Callable[[], Any]) -> tuple[int, str, list[float]]:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            done = work()
    except SystemExit as leaving:
        return 2, said.getvalue()[-2000:] or str(leaving), []
    except (AssertionError, ValueError, NotImplementedError, RuntimeError, ImportError) as error:
        return 2, _sentence(error), []
    except BaseException as error:
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        of_megatron = [file for file in files if "/megatron/" in file or "/megatron_prune/" in file][-1:]
        code = 2 if of_megatron and "/megatron/" in of_megatron[0] else 1
        return code, f"Megatron fails: {type(error).__name__}: {error}", []
    code, losses = done if isinstance(done, tuple) else (done, [])
    return code, said.getvalue()[-2000:], losses


def _sentence(error: BaseException) -> str:
    """Megatron's own reason: the assertion's message, or its source line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"Megatron: {str(error).strip() or frame.line}"


def _plain(said: str, folder: str) -> str:
    """The last line of a message, without folders of this run."""
    lines = [line.strip() for line in said.replace(folder, "DIR").strip().splitlines() if line.strip()]
    kept = [line for line in lines if line.startswith(("megatron-prune", "Megatron"))] or lines[-1:]
    return re.sub(r"^megatron-prune \w+: ", "", kept[-1])[:300] if kept else ""


def write_corpus(prefix: Path) -> str:
    """A small tokenized corpus of the model's vocabulary, with frequent and rare ids."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    ids = np.minimum(np.random.default_rng(0).zipf(1.3, size=2000), int(MODEL["--vocab-size"]) - 1)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in ids.reshape(20, 100):
        builder.add_item(torch.from_numpy(document))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def main() -> None:
    """Write the table to the file that the command line names; further words are the only arguments to look at."""
    from megatron_prune.engine import cpu

    file, *names = sys.argv[1:]
    cpu.prepare()
    with tempfile.TemporaryDirectory() as folder:
        found = examine(names or None, folder)
    rows = [{key: value for key, value in asdict(one).items() if key not in ("loss", "alone")} for one in found]
    Path(file).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
