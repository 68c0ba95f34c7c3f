"""FP8 with a scale for each 128 x 128, against E4M3's own numbers: whole, and from shards that cut through blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.training.small_masked import run_function

LARGEST = 448.0


def quantized(folder: str, height: int, width: int) -> None:
    """A matrix in blocks: as TE holds it, and as two ranks would assemble it from their shards."""
    import torch
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.constants import DType
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(height, width, generator=generator) * torch.logspace(-3, 3, width)
    matrix[:128, :128] = 0
    quantizer = Float8BlockQuantizer(DType.kFloat8E4M3, rowwise=True, columnwise=True)
    made = quantizer.quantize(matrix)
    plain = made.dequantize()
    turned = (made._columnwise_data.clone(), made._columnwise_scale_inv.clone())
    made.update_usage(rowwise_usage=True, columnwise_usage=False)
    made.update_usage(rowwise_usage=True, columnwise_usage=True)  # by TE, of the rows' half
    same = torch.equal(turned[0], made._columnwise_data)
    rows, columns = -(-height // 128), -(-width // 128)
    same &= torch.equal(turned[1][:columns, :rows], made._columnwise_scale_inv[:columns, :rows])

    flat, cut = matrix.view(-1), height * width // 3 + 5
    shards = [(flat[:cut], 0), (flat[cut:], cut)]
    amaxes = [torch.zeros_like(made._rowwise_scale_inv) for _ in shards]
    for (shard, start), amax in zip(shards, amaxes, strict=True):
        tex.fp8_block_scaling_compute_partial_amax(shard, amax, height, width, start, 128)
    amax, scale, inverse = torch.stack(amaxes).amax(0), torch.zeros_like(amaxes[0]), torch.zeros_like(amaxes[0])
    tex.multi_tensor_compute_scale_and_scale_inv(4096, None, [[amax], [scale], [inverse]], LARGEST, True, 0.0)
    together = torch.zeros_like(made._rowwise_data)
    for shard, start in shards:
        out = together.view(-1)[start : start + shard.numel()]
        tex.fp8_block_scaling_partial_cast(shard, out, scale, height, width, start, 128, DType.kFloat8E4M3)
    same &= torch.equal(together, made._rowwise_data) and torch.equal(inverse, made._rowwise_scale_inv)
    arrays = {"matrix": matrix, "bytes": made._rowwise_data, "inverse": made._rowwise_scale_inv, "plain": plain}
    np.savez(Path(folder, "made.npz"), same=same, **{name: tensor.numpy() for name, tensor in arrays.items()})


def e4m3() -> np.ndarray:
    """The value of each of E4M3's bytes below the sign bit, in rising order: 4 bits of exponent, 3 of mantissa."""
    codes = np.arange(127)  # the 128th is NaN
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(exponent > 0, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0), mantissa / 8 * 2.0**-6)


@pytest.mark.parametrize("height, width", [(256, 384), (200, 300), (48, 16)])
def test_blocks_are_those_of_the_format(height, width, tmp_path: Path) -> None:
    code, output = run_function(quantized, tmp_path, 1, str(tmp_path), height, width)
    assert code == 0, output[-4000:]
    made = np.load(tmp_path / "made.npz")
    assert made["same"]
    values = e4m3()
    for row in range(0, height, 128):
        for column in range(0, width, 128):
            part = np.s_[row : row + 128, column : column + 128]
            block = made["matrix"][part].astype(np.float64)
            largest = np.abs(block).max()
            scale = 2.0 ** np.floor(np.log2(LARGEST / largest)) if largest else 1.0
            assert made["inverse"][row // 128, column // 128] == 1 / scale
            scaled = np.abs(block) * scale
            assert scaled.max() <= LARGEST
            gaps = np.abs(values[:, None] - scaled.reshape(-1))  # [127, values]
            nearest, found = gaps.min(0), (made["bytes"][part] & 127).reshape(-1)
            np.testing.assert_array_equal(gaps[found, np.arange(scaled.size)], nearest)
            tied = (gaps == nearest).sum(0) > 1
            assert not (found[tied] & 1).any()  # to the even one
            np.testing.assert_array_equal((made["bytes"][part] >> 7 == 1)[block != 0], (block < 0)[block != 0])
            np.testing.assert_array_equal(
                made["plain"][part], np.sign(block) * values[found].reshape(block.shape) / scale
            )
