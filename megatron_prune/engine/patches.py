"""Fixes for Megatron 0.19.2: its data helpers, norms with gains around zero, recomputed MLPs with biases, and resuming
its distributed optimizer.

1. Megatron's wheel ships its data helpers compiled, without the Makefile that it calls to compile them.
2. In fp32 the master weights are views of the parameters. Megatron copies loaded values into them while autograd is
   recording, which is an error with any optimizer.
3. Without Transformer Engine and Apex, torch's AdamW runs. torch keeps a step count per parameter, Megatron one per
   parameter group, and its conversion fails in three ways: loading reads a new AdamW's step before it exists (an
   assertion); the steps are stored as if they were sharded like moments, and are read back wrong or not at all; and
   afterwards all parameters share one step tensor, which torch then increments once per parameter instead of once per
   step.
4. ``WrappedTorchNorm``, which Megatron uses without Transformer Engine and Apex, refuses norms whose gains are stored
   around zero (``--apply-layernorm-1p``).
5. A recomputed MLP (``--recompute-modules mlp``) returns the bias of its second linear for a later addition. Autograd
   takes it for a result of the recomputation, so that the parameter is no leaf any more, and the backward pass
   recomputes for ever, in C++, where no signal is heard.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def apply() -> None:
    """Apply all fixes, after ``megatron.training`` is imported. A second call does nothing."""
    keep_prebuilt_helpers()
    _install_centered_norms()
    _keep_parameters_leaves()
    _fix_distributed_optimizer()


def keep_prebuilt_helpers() -> None:
    from megatron.core.datasets import utils

    prebuilt = importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
    if prebuilt and not (Path(utils.__file__).parent / "Makefile").exists():
        utils.compile_helpers = lambda: None


def _fix_distributed_optimizer() -> None:
    from megatron.core.optimizer import distrib_optimizer

    cls = distrib_optimizer.DistributedOptimizer
    if getattr(cls, "_fixed", False):
        return
    cls._fixed = True
    cls._set_main_param_and_optimizer_states = torch.no_grad()(cls._set_main_param_and_optimizer_states)
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    state_dict, load_state_dict = cls.state_dict, cls.load_state_dict
    get_states, set_states = cls._get_main_param_and_optimizer_states, cls._set_main_param_and_optimizer_states

    @functools.wraps(state_dict)
    def with_state(self: Any) -> Any:
        if not self.optimizer.state:
            _allocate(self.optimizer)
        return state_dict(self)

    @functools.wraps(load_state_dict)
    def with_own_steps(self: Any, loaded: Any) -> None:
        load_state_dict(self, loaded)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    @functools.wraps(get_states)
    def get_without_step(self: Any, model_param: torch.Tensor) -> dict[str, Any]:
        return {key: value for key, value in get_states(self, model_param).items() if key != "step"}

    @functools.wraps(set_states)
    def set_without_step(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        set_states(self, model_param, {**tensors, "step": None})

    cls.state_dict, cls.load_state_dict = with_state, with_own_steps
    cls._get_main_param_and_optimizer_states = get_without_step
    cls._set_main_param_and_optimizer_states = set_without_step


def _allocate(optimizer: torch.optim.Optimizer) -> None:
    """Create AdamW's state before its first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


class CenteredLayerNorm(torch.nn.LayerNorm):
    """LayerNorm that multiplies by 1 + weight. Its weight starts at zero."""

    zero_centered_gamma = True

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(input, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class CenteredRMSNorm(torch.nn.RMSNorm):
    """RMSNorm that multiplies by 1 + weight. Its weight starts at zero."""

    zero_centered_gamma = True

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, self.normalized_shape, self.weight + 1, self.eps)


def _install_centered_norms() -> None:
    """Let Megatron's ``WrappedTorchNorm`` make norms whose gains are stored around zero. A second call does nothing."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    plain = WrappedTorchNorm.__new__
    if getattr(plain, "centered", False):
        return

    def make(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **others: Any) -> torch.nn.Module:
        if not config.layernorm_zero_centered_gamma:
            made: torch.nn.Module = plain(cls, config, hidden_size, eps, **others)
            return made
        kind = CenteredRMSNorm if config.normalization == "RMSNorm" else CenteredLayerNorm
        return kind(hidden_size, eps=eps)

    make.centered = True  # type: ignore[attr-defined]
    WrappedTorchNorm.__new__ = make


def _keep_parameters_leaves() -> None:
    """Return views of parameters from what is recomputed, not the parameters. A second call does nothing."""
    from megatron.core import tensor_parallel

    checkpoint = tensor_parallel.checkpoint
    if getattr(checkpoint, "of_views", False):
        return

    def views(made: Any) -> Any:
        if isinstance(made, tuple):
            return tuple(map(views, made))
        return made.view_as(made) if isinstance(made, torch.nn.Parameter) else made

    @functools.wraps(checkpoint)
    def checkpoint_of_views(function: Callable[..., Any], distribute: bool, *inputs: Any) -> Any:
        return checkpoint(lambda *given: views(function(*given)), distribute, *inputs)

    checkpoint_of_views.of_views = True  # type: ignore[attr-defined]
    tensor_parallel.checkpoint = checkpoint_of_views
