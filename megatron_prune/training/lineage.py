"""The history of a checkpoint's weights: every training and every pruning, oldest first, back to random weights.

``account.json`` of a training and each entry of ``pruning.json`` hold the ``lineage`` of the weights that they started
from, a list of stages, so that one file is enough when the earlier checkpoints are gone. A stage is JSON:
    kind         trained | pruned
    run          where it was written
    start, end   fingerprints of the weights before and after it; no start: random weights
    tokens       trained on, or read for pruning;   flops: executed, those of a teacher included
    trained:     stream, range, steps, global_batch_size, seq_length, seed, and its recipe (``recipe_of``); over a blend
                 the range of every corpus (``domains``), and how batches were scheduled (``batching``); if it was
                 distilled, its ``objective``
    pruned:      method, source (the shape before it), masks; learned: the training that learned what to cut, whose
                 tokens and flops are the stage's

``of`` checks that every stage began with the weights that the stage before it produced.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_prune.artifacts import read_json
from megatron_prune.checkpoint.reader import PRUNING_FILE, Checkpoint
from megatron_prune.errors import AccountError
from megatron_prune.training import objective
from megatron_prune.training.account import ACCOUNT, read_account, total_flops

Stage = dict[str, Any]
# A flag that only our `pretrain` has: a checkpoint whose stored arguments include it was trained here, or made from
# one that was.
MARK = "stream_range"
BOTH = {"kind", "run", "start", "end", "tokens", "flops"}
PRUNED = BOTH | {"method", "source"}
TRAINED = BOTH | {
    "complete", "stream", "range", "steps", "global_batch_size", "seq_length", "seed", "masks", "recipe",
}  # fmt: skip

# Arguments that do not affect how weights are learned: paths, logs, the format of outputs, flags of programs other than
# pretraining. Sizes of the model and the machine are recorded elsewhere; range and stream are in the stage itself.
_NOT_OF_THE_RECIPE = re.compile(
    r"load|save|pretrained|tensor_model_par|pipeline_model_par|virtual_pipe|context_par|ckpt|checkpoint|dist_ckpt"
    r"|log_|logging|tensorboard|wandb|one_logger|timing|profile|record_|memory_|nvtx|use_pytorch_profiler"
    r"|pytorch_profiler|barrier_with|async_|no_save|replication|titles_data|evidence_data|block_data|exit_|adlr"
    r"|inference|mamba_|rl_|grpo_|langrl|refit|inprocess|flight_recorder|distributed_|straggler|nccl|moe_|expert_"
    r"|logits_|eval_|valid|test_|full_validation|multiple_validation|dataloader_|num_workers|num_dataset|data_path"
    r"|train_data_path|data_cache|per_|split$|stream_|masks$|random_masks|shape_from|rank$|local_rank|world_size"
    r"|iteration$|curr_iteration|consumed_|skipped_|num_floating|seed$|app_tag|bert_|ict_|img_|vision|swin|dino"
    r"|biencoder|retriever|indexer|dsa_|mask_|short_seq|patch_dim|num_classes|num_channels|ft_|calc_ft|fault_"
    r"|error_injection|rerun|msc|enable_msc|fim_|sft|let_zeros|use_checkpoint_args|fp32$|finetune|no_load"
    r"|verify_integrity|num_layers|hidden_size|num_attention_heads|num_query_groups|ffn_hidden_size|kv_channels"
    r"|encoder_|decoder_|start_eval|start_over|phase_transition|run_workload|data_parallel_size|max_tokens_to_oom|output_bert"
    r"|use_legacy|enable_ft|heterogeneous_|domain_|batch_schedule|distill_|teacher|objective$"
)


def of(checkpoint: Checkpoint) -> list[Stage]:
    """Every stage behind the weights of ``checkpoint``; empty for one that was made elsewhere.

    Raises AccountError if the checkpoint was trained here and no account is next to it, or if stages do not fit
    together.
    """
    path = checkpoint.root / ACCOUNT
    if path.exists() or checkpoint.pruning:
        path = path if path.exists() else checkpoint.directory / PRUNING_FILE
        try:
            is_account = path.name == ACCOUNT
            stages = _read(checkpoint, read_account(path) if is_account else read_json(path), is_account)
        except (KeyError, TypeError, AttributeError) as error:  # the file can hold anything
            raise AccountError(
                f"{path} does not say what was done to these weights before: {error!r}; restore the file, or use "
                "another checkpoint"
            ) from error
    elif _trained_here(checkpoint):
        raise AccountError(
            f"{checkpoint.root}: its stored arguments say that it was trained here ({_words(checkpoint)}), and {path} "
            "is missing, so its training data is unknown. Put the account of that run back next to the checkpoint"
        )
    else:
        return []
    check(stages, checkpoint.fingerprint(), str(checkpoint.root))
    return stages


def _trained_here(checkpoint: Checkpoint) -> bool:
    """True if our ``pretrain`` wrote it after a step; Megatron's format converter writes after no steps."""
    args = checkpoint.args
    return MARK in args and bool(args[MARK] or checkpoint.iteration or args.get("consumed_train_samples"))


def _words(checkpoint: Checkpoint) -> str:
    trained = checkpoint.args.get(MARK)
    return f"--stream-range {trained}" if trained else f"iteration {checkpoint.iteration}"


def _read(checkpoint: Checkpoint, said: Mapping[str, Any], is_account: bool) -> list[Stage]:
    """The stages in an account or in ``pruning.json``; KeyError or TypeError if the file is incomplete."""
    if is_account:
        stages = [*said["lineage"], _trained(said, checkpoint)]
    else:
        entry = checkpoint.pruning[-1]
        stages = [*entry["lineage"], pruned(entry, run=str(checkpoint.root), end=said["fingerprint"])]
    for stage in stages:
        missing = (TRAINED if stage["kind"] == "trained" else PRUNED) - set(stage)
        if missing:
            raise KeyError(*sorted(missing))
        if not all(isinstance(stage[key], int) for key in ("tokens", "flops")):
            raise TypeError(f"{stage['run']}: tokens {stage['tokens']!r}, flops {stage['flops']!r}")
    return stages


def trained(account: Mapping[str, Any], *, run: str, end: str | None) -> Stage:
    """The stage of a training, from its account; ``end``: fingerprint of the resulting weights."""
    return {
        "kind": "trained",
        "run": run,
        "start": (account["initial"] or {}).get("fingerprint"),
        "end": end,
        "complete": account["complete"],
        **{key: account[key] for key in ("stream", "range", "steps", "global_batch_size", "seq_length", "seed")},
        "tokens": account["tokens"],
        "flops": total_flops(account),
        "masks": account["masks"],
        **{key: account[key] for key in ("domains", "batching") if account.get(key)},
        **({"objective": asked} if (asked := objective.of(account)) != objective.LM else {}),
        "recipe": recipe_of(account["arguments"]),
    }


def _trained(account: Mapping[str, Any], checkpoint: Checkpoint) -> Stage:
    """The same for the iteration of ``checkpoint``: an earlier one counts its own steps. Its range still covers the
    whole run, because samples may be permuted inside it."""
    steps, iteration = account["steps"], checkpoint.iteration
    if checkpoint.release or iteration == steps:
        final = account["final"] or {"fingerprint": checkpoint.fingerprint()}
        return trained(account, run=str(checkpoint.root), end=final["fingerprint"])
    stage = trained(account, run=str(checkpoint.directory), end=checkpoint.fingerprint())
    done = {key: stage[key] * iteration // steps for key in ("tokens", "flops")}
    return stage | done | {"steps": iteration, "complete": True}


def pruned(entry: Mapping[str, Any], *, run: str, end: str | None) -> Stage:
    """The stage of a pruning, from its entry in ``pruning.json``."""
    return {
        "kind": "pruned",
        "run": run,
        "start": entry["parent"]["fingerprint"],
        "end": end,
        "method": entry["method"],
        "source": entry["source"],
        "masks": entry.get("masks"),
        **({"learned": entry["learned"]} if "learned" in entry else {}),
        "tokens": entry["tokens"],
        "flops": entry["flops"],
    }


def check(stages: Sequence[Stage], end: str, what: str) -> None:
    """AccountError unless each stage began with the weights that the previous one left, and the last left ``end``."""
    for earlier, later in itertools.pairwise(stages):
        if later["start"] is None or later["start"] != earlier["end"]:
            raise AccountError(
                f"{what}: its stages do not fit together: {later['run']} began with the weights {later['start']}, "
                f"{earlier['run']} before it left {earlier['end']}"
            )
    if stages and stages[-1]["end"] != end:
        raise AccountError(
            f"{what} holds the weights {end}, and the files next to it say that {stages[-1]['end']} were written: "
            "one of the two belongs to another checkpoint"
        )


def trainings(stages: Iterable[Stage]) -> list[Stage]:
    return [stage for stage in stages if stage["kind"] == "trained"]


def seen(stages: Iterable[Stage]) -> list[Stage]:
    """The trainings, including those that prunings made themselves: what the weights have read of streams."""
    return [each for stage in stages for each in (stage, stage.get("learned")) if each and each["kind"] == "trained"]


def begins_at_random(stages: Sequence[Stage]) -> bool:
    """True if the first stage began with random weights, so that sums over all stages are complete."""
    return bool(stages) and stages[0]["kind"] == "trained" and stages[0]["start"] is None


def first_shape(stages: Iterable[Stage]) -> dict[str, Any] | None:
    """The shape that the weights began with; None if they have it still, as no pruning changed it."""
    return next((stage["source"] for stage in stages if stage["kind"] == "pruned"), None)


def tokens(stages: Iterable[Stage]) -> int:
    """Tokens of all stages."""
    return sum(int(stage["tokens"]) for stage in stages)


def flops(stages: Iterable[Stage]) -> int:
    """FLOPs that all stages executed."""
    return sum(int(stage["flops"]) for stage in stages)


def recipe_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The run's resolved arguments that are set and affect how weights are learned."""
    return {
        key: value
        for key, value in sorted(arguments.items())
        if value is not None and value is not False and value != [] and not _NOT_OF_THE_RECIPE.match(key)
    }
