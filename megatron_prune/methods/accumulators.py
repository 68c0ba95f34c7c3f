"""Running sums over activations, in float64, cheap enough to compute during a forward pass.

Plain tensor code, independent of Megatron, hooks and process groups. Activations are Megatron's
``[s, b, n]`` (tokens, sequences, channels). Tokens are read in slices that fit a cache. Each slice is
widened to float64 once, and channels are summed by a matrix-vector product, which is several times
faster than reducing the whole widened tensor.

Three sums per channel serve every forward-only method at every ratio:

* ``sum_abs_mean_sq``  Σ over sequences of (mean over tokens of |x|)²    minitron-width
* ``sum_sq``           Σ over tokens of x²                               wanda-sp
* ``sum``              Σ over tokens of x                                with sum_sq: mean, variance (flap)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_prune.errors import CheckpointError

# The three sums of a channel, in the order of ``ChannelSums.sums``.
QUANTITIES = ("sum_abs_mean_sq", "sum_sq", "sum")
# Of the weights that read a channel, a column of linear_proj or linear_fc2: Σ w² and Σ |w|, no sums over text.
COLUMN_SUMS = ("weight_sum_sq", "weight_sum_abs")
# The saliencies of a channel from gradients (``calibration/gradients.py``).
SALIENCIES = ("vector", "first", "second", "mixed")

_CPU_SLICE_BYTES = 1 << 19  # two float64 slices of this size stay in a core's cache
_GPU_SLICE_BYTES = 1 << 26  # a GPU is faster with few launches


class Workspace:
    """Two reusable float64 buffers (allocating them each time would cost more than the sums)."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def slices(
        self, tokens: int, channels: int, device: torch.device
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield (token slice, first buffer, second buffer, ones): [t, channels] twice and [t]."""
        key = (device, channels)
        if key not in self._buffers:
            budget = _CPU_SLICE_BYTES if device.type == "cpu" else _GPU_SLICE_BYTES
            rows = max(1, budget // (8 * channels))
            self._buffers[key] = (
                torch.empty(rows, channels, dtype=torch.float64, device=device),
                torch.empty(rows, channels, dtype=torch.float64, device=device),
                torch.ones(max(rows, channels), dtype=torch.float64, device=device),
            )
        first, second, ones = self._buffers[key]
        rows = first.shape[0]
        for start in range(0, tokens, rows):
            taken = min(rows, tokens - start)
            yield slice(start, start + taken), first[:taken], second[:taken], ones


class ChannelSums:
    """Per-channel sums at one site of the model: ``sums`` is float64 [3, channels]."""

    def __init__(self, channels: int, device: torch.device | str = "cpu", workspace: Workspace | None = None):
        self.sums = torch.zeros(len(QUANTITIES), channels, dtype=torch.float64, device=device)
        self._workspace = workspace or Workspace()

    def add(self, activations: torch.Tensor) -> None:
        """Add a micro-batch [s, b, channels]: ``b`` whole sequences of ``s`` tokens."""
        tokens, sequences, channels = activations.shape
        if channels != self.sums.shape[1]:
            raise ValueError(f"expected {self.sums.shape[1]} channels, found {channels}")
        for sequence in range(sequences):
            x = activations[:, sequence]  # [s, channels]
            absolute = torch.zeros_like(self.sums[0])
            for part, wide, squares, ones in self._workspace.slices(tokens, channels, x.device):
                ones = ones[: len(wide)]
                wide.copy_(x[part])
                torch.mul(wide, wide, out=squares)
                self.sums[1].addmv_(squares.t(), ones)
                self.sums[2].addmv_(wide.t(), ones)
                absolute.addmv_(wide.abs_().t(), ones)
            self.sums[0] += (absolute / tokens).square_()


def variance(total: torch.Tensor, squares: torch.Tensor, tokens: int) -> torch.Tensor:
    """Sample variance of ``tokens`` values from their sum and the sum of their squares, in float64.

    Subtracting loses digits where the mean is far from zero: at 10,000 standard deviations, seven of them are left.
    Below 0, which rounding can give, it is 0. One token has no variance: 0.
    """
    return ((squares - total.square() / tokens) / max(1, tokens - 1)).clamp_(min=0)


def column_sums(weight: torch.Tensor) -> torch.Tensor:
    """``COLUMN_SUMS`` of every column of a matrix [out, in]: float64 [2, in]."""
    found = torch.zeros(len(COLUMN_SUMS), weight.shape[1], dtype=torch.float64, device=weight.device)
    rows = max(1, _GPU_SLICE_BYTES // (8 * weight.shape[1]))
    for start in range(0, len(weight), rows):
        wide = weight[start : start + rows].double()
        found[1] += wide.abs().sum(0)
        found[0] += wide.square_().sum(0)
    return found


class CosineDistance:
    """Σ over tokens of 1 − cos(block input, block output): ``total`` is a float64 scalar tensor.

    ShortGPT (2403.03853) calls its mean over tokens the Block Influence. A zero vector has no
    direction: its cosine counts as 0.
    """

    def __init__(self, device: torch.device | str = "cpu", workspace: Workspace | None = None):
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self._workspace = workspace or Workspace()

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add a micro-batch: the residual stream [s, b, h] before and after the block."""
        tokens, sequences, channels = before.shape
        for sequence in range(sequences):
            x, y = before[:, sequence], after[:, sequence]  # [s, h] each
            for part, wide_x, wide_y, ones in self._workspace.slices(tokens, channels, x.device):
                ones = ones[:channels]
                wide_x.copy_(x[part])
                wide_y.copy_(y[part])
                inner = (wide_x * wide_y) @ ones  # [t]
                # Tiny vectors must not underflow, so the square roots come before the product.
                lengths = (wide_x.square_() @ ones).sqrt_() * (wide_y.square_() @ ones).sqrt_()
                cosine = torch.where(lengths > 0, inner / lengths, 0.0)
                self.total += (1.0 - cosine).sum()


# Σ‖X_j‖² of a linear's inputs, the weighting in Wanda's scores.


class SquareSums:
    """‖X_j‖² in ``total`` (float64 [in]); all-reduce it with ``count`` over data-parallel ranks."""

    def __init__(self, inputs: int, device: torch.device | str = "cpu"):
        self.total = torch.zeros(inputs, dtype=torch.float64, device=device)
        self.count = 0  # sequences
        self._workspace = Workspace()

    def add(self, x: torch.Tensor) -> None:
        """Add one sequence of inputs, [tokens, in]."""
        for part, wide, squares, ones in self._workspace.slices(x.shape[0], x.shape[1], x.device):
            wide.copy_(x[part])
            torch.mul(wide, wide, out=squares)
            self.total.addmv_(squares.t(), ones[: len(wide)])
        self.count += 1

    def mean(self) -> torch.Tensor:
        """Mean over sequences of ‖X_j‖², float64 [in]; CheckpointError if inputs were not finite."""
        if not bool(self.total.isfinite().all()):
            raise CheckpointError(
                "a linear's inputs are not finite, expected finite ones: use another calibration text, or bf16 or fp32"
            )
        return self.total / self.count
