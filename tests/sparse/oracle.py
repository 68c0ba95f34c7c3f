"""Block-sequential pruning of a Hugging Face model in float64, written from the papers without any of our code."""

from __future__ import annotations

from pathlib import Path

import torch

from tests import reference

# Our names of the matrices by those in transformers; matrices in one line read the same input.
INPUTS = (
    {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"},
    {"o": "self_attn.o_proj"},
    {"gate": "mlp.gate_proj", "up": "mlp.up_proj"},
    {"down": "mlp.down_proj"},
)
BLOCK = 128


def sparsify(
    of: Path | torch.nn.Module,
    windows: torch.Tensor,
    method: str,
    ratio: float = 0.5,
    pattern: tuple[int, int] | None = None,
) -> tuple[torch.nn.Module, dict[tuple[int, str], torch.Tensor]]:
    """The pruned model and its masks (True: kept) by layer and matrix. ``windows`` is [n, S + 1]."""
    model, masks = reference.float64(of), {}
    for layer, block in enumerate(model.model.layers):
        for matrices, h in zip(INPUTS, hessians(model, block, windows), strict=True):
            for name, path in matrices.items():
                linear = block.get_submodule(path)
                weight, kept = prune(method, linear.weight.detach(), h, ratio, pattern)
                linear.weight.data.copy_(weight)
                masks[layer, name] = kept
    return model, masks


def hessians(model: torch.nn.Module, block: torch.nn.Module, windows: torch.Tensor) -> list[torch.Tensor]:
    """2/n Σ X·Xᵀ of the four inputs of a block, by running the whole model with its pruned blocks."""
    sums = [torch.zeros(()) for _ in INPUTS]

    def listen(number: int) -> object:
        def hook(_: object, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0][0]  # [S, in]
            sums[number] = sums[number] + 2 / len(windows) * x.T @ x

        return hook

    handles = [
        block.get_submodule(next(iter(matrices.values()))).register_forward_pre_hook(listen(number))
        for number, matrices in enumerate(INPUTS)
    ]
    with torch.no_grad():
        for window in windows:
            model(window[None, :-1])
    for handle in handles:
        handle.remove()
    return sums


def prune(
    method: str, weight: torch.Tensor, h: torch.Tensor, ratio: float, pattern: tuple[int, int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if method == "sparsegpt":
        return sparsegpt(weight.clone(), h.clone(), ratio, pattern)
    if method == "wanda":
        scores = weight.abs() * (h.diagonal() / 2).sqrt()  # h is twice the mean
    else:
        scores = weight.abs()
    if pattern is not None:
        kept = lowest_stay_out(scores.reshape(-1, pattern[1]), pattern[1] - pattern[0]).view(weight.shape)
    elif method == "wanda":
        kept = lowest_stay_out(scores, int(weight.shape[1] * ratio))
    else:
        kept = lowest_stay_out(scores.reshape(1, -1), int(weight.numel() * ratio)).view(weight.shape)
    return weight * kept, kept


def lowest_stay_out(scores: torch.Tensor, count: int) -> torch.Tensor:
    """False for the ``count`` lowest of each row; of equal ones the later go first."""
    order = scores.flip(1).argsort(dim=1, stable=True)[:, :count]
    return torch.ones_like(scores, dtype=torch.bool).scatter(1, scores.shape[1] - 1 - order, False)


def sparsegpt(
    w: torch.Tensor, h: torch.Tensor, ratio: float, pattern: tuple[int, int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The algorithm as published, one weight column at a time, in float64."""
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    kept = torch.ones_like(w, dtype=torch.bool)
    gone = 0
    for start in range(0, w.shape[1], BLOCK):
        stop = min(start + BLOCK, w.shape[1])
        if pattern is None:
            costs = (w[:, start:stop] / u.diagonal()[start:stop]) ** 2
            count = int(len(w) * stop * ratio) - gone
            gone += count
            kept[:, start:stop] = lowest_stay_out(costs.reshape(1, -1), count).view(costs.shape)
        for i in range(start, stop):
            if pattern is not None and i % pattern[1] == 0:
                group = slice(i, i + pattern[1])
                costs = (w[:, group] / u.diagonal()[group]) ** 2
                kept[:, group] = lowest_stay_out(costs, pattern[1] - pattern[0])
            error = torch.where(kept[:, i], 0.0, w[:, i]) / u[i, i]
            w[:, i:] -= error[:, None] * u[i, i:]
            w[:, i] *= kept[:, i]
    return w, kept
