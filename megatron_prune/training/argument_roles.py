"""What a resolved argument means for a comparison of two runs, and for a run that continues: one table.

``ALLOWED`` and ``OWN_STEPS`` may differ between the arms of a comparison, ``LEARNS`` is the recipe. When a run
continues, ``find_recipe_change`` finds what must not differ from its first attempt. Other differences are kept in the
account by ``diff_arguments``, and comparisons treat them like differences between two runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Resolved arguments that may differ between the two arms of any comparison, and why.
ALLOWED: dict[str, str] = {
    "pretrained_checkpoint": "start",
    "shape_from": "start",
    "use_checkpoint_args": "start",
    "finetune": "start",
    # Set by pretrain for FP8 weights that start from a checkpoint (training/pretrain.py).
    "load_main_params_from_ckpt": "start",
    "no_load_optim": "start",
    "stream_ckpt_dequant": "start",
    "load": "output path",
    "save": "output path",
    "tensorboard_dir": "output path",
    "wandb_save_dir": "output path",
    "wandb_exp_name": "output path",
    "save_interval": "how often an output is saved",
    # Set by pretrain if a run continues at another number of ranks (engine/optimizer_layout.py).
    "ddp_bucket_size": "how gradients are packed to be sent",
    **dict.fromkeys(
        ("train_data_path", "data_path", "data_cache_path"), "a path; what it holds is compared with the stream"
    ),
    "valid_data_path": "validation during training changes no weight",
    "start_over": "start",
    "masks": "a path; which masks they are is compared by their hash",
    "teacher": "a path; which weights they are is compared by their fingerprint",
    "teacher_cache": "a path; what it holds is compared with the objective",
    **dict.fromkeys(
        ("dynamic_batch_every", "domain_validation", "reference_losses", "domain_samples", "batch_schedule"),
        "how batches are scheduled, which is compared by what came of it",
    ),
    # Counters that Megatron keeps among its arguments. The range says what was consumed.
    "iteration": "progress at the last start",
    "curr_iteration": "progress at the last start",
    "consumed_train_samples": "progress at the last start",
    "consumed_valid_samples": "progress at the last start",
    "skipped_train_samples": "progress at the last start",
    "num_floating_point_operations_so_far": "progress at the last start",
    # How a global batch is computed: only the order of summation changes, so the last digits differ.
    **dict.fromkeys(
        (
            "micro_batch_size",
            "eval_micro_batch_size",
            "world_size",
            "inprocess_active_world_size",
            "data_parallel_size",
            "rank",
            "local_rank",
        ),
        "how a batch is shared out",
    ),
}
# Arguments that follow from the number of steps, in settings in which it differs.
OWN_STEPS: dict[str, str] = {
    "train_iters": "own steps",
    "lr_decay_iters": "own steps",
    "lr_warmup_iters": "own steps, by the recipe",
    "stream_range": "own steps",
    "eval_interval": "own steps",
}
# Arguments that change how weights are learned.
LEARNS = re.compile(
    r"lr|min_lr|decoupled|warmup|weight_decay|start_weight|end_weight|apply_wd|no_weight|clip_grad|optimizer|adam|sgd"
    r"|muon|lion|global_batch|rampup|step_batch|seq_length|bf16|fp16|fp8|fp4|loss_scale|hidden_dropout"
    r"|attention_dropout|init_method|calculate_per_token|reset_|eod_mask|grad_reduce_in|accumulate_allreduce|main_"
    r"|exp_avg|tokenizer_model|use_precision_aware|iterations_to_skip"
)

_NEUTRAL = re.compile(r"tokenizer_model|optimizer_")  # a path; where the optimizer computes
_SCHEDULE = re.compile(r"lr|min_lr|decoupled|warmup|weight_decay|start_weight|end_weight")
_OF_A_START = ("start", "progress at the last start")
_OF_A_LAUNCH = ("rank", "local_rank", "load", "ckpt_step", "no_load_rng")
_ABSENT: tuple[Any, ...] = (None, False, [])


def find_recipe_change(began: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first argument of the recipe in which a launch differs from its run; None if there is none.

    Megatron's ``--override-opt_param-scheduler`` allows another schedule.
    """
    for key in sorted(now, key=_is_derived):
        learns = LEARNS.match(key) and not _NEUTRAL.match(key)
        if not learns or now.get("override_opt_param_scheduler") and is_schedule(key):
            continue
        value = now[key]
        if key == "lr_decay_iters" and value is None:  # Megatron sets it while it begins
            value = now["train_iters"]
        if _differs(began.get(key), value):
            return key
    return None


def _is_derived(name: str) -> bool:
    """True for arguments that Megatron sets by others, which a message would better name."""
    return name.startswith(("start_", "end_", "accumulate_", "main_", "exp_avg"))


def is_schedule(name: str) -> bool:
    """True for an argument that Megatron's scheduler of learning rate and weight decay checks when a run continues."""
    return _SCHEDULE.match(name) is not None


def diff_arguments(began: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a launch that differ from its run's, without those of a start, of a rank or of progress."""
    return {
        key: value
        for key, value in now.items()
        if _differs(began.get(key), value) and ALLOWED.get(key) not in _OF_A_START and key not in _OF_A_LAUNCH
    }


def _differs(one: Any, other: Any) -> bool:
    return bool(one != other) and not (one in _ABSENT and other in _ABSENT)
