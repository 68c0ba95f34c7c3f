"""Numbers of the methods' published code, which ran outside of this repository, unchanged, on the inputs made here.

* ModelOpt: github.com/NVIDIA/TensorRT-Model-Optimizer, tag 0.35.0, ``modelopt/torch/nas/plugins/megatron.py``: the forward hooks and
  ``_estimate_…`` functions of ``_DynamicMLP``, ``_DynamicSelfAttention`` and ``_DynamicMCoreLanguageModel``
* Wanda: github.com/locuslab/wanda, 8e8fc87: ``WrappedGPT`` of ``lib/layerwrapper.py`` and ``W_metric`` of ``lib/prune.py``
* SparseGPT: github.com/IST-DASLab/sparsegpt, 147d215: ``SparseGPT`` of ``sparsegpt.py``; without its ``cuda.synchronize``
* FLAP: github.com/CASIA-LMC-Lab/FLAP, 3bb57db: ``BiasGPT`` of ``lib/layerwrapper.py`` and ``metrics`` of ``lib/prune.py``

Sequences were given one at a time (to ModelOpt's heads and hidden channels: in one batch), fp32, on a CPU.
"""  # noqa: E501

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_prune import methods
from megatron_prune.methods.accumulators import ChannelSums, SquareSums, column_sums, variance
from megatron_prune.methods.base import Sparsity
from megatron_prune.methods.selection import Rows
from megatron_prune.methods.sparsegpt import Hessian

FFN = [0.8509964, 1.3196397, 1.422155, 1.3645129, 1.455297, 1.1483481]
HEADS = [2.6047862, 2.710264, 2.0652308, 2.5345838]
HIDDEN = [2.7372875, 2.9314291, 2.723454, 2.9218016, 2.5893884]
WANDA = [
    [5.3872156, 5.6606746, 1.1866649, 1.2353003, 8.0313015, 0.0074641779, 7.6894808, 0.097176582],
    [2.2843201, 3.0474424, 0.61989862, 3.4595613, 11.619607, 0.006216486, 2.5162005, 1.0798897],
    [3.8995643, 4.7246356, 0.98177105, 1.5832349, 3.1191154, 1.5844548, 5.8899879, 1.4091949],
]
# ``fasterprune(sparsity=0.5)``, which removes 13 of 24: what is not above the 13th lowest.
SPARSEGPT_HALF = [[-1.1381776, 0.7712194, 0, 0, 1.4058595, 0, -1.5122677, 0],
                  [0, 0.4734429, 0, -1.6536188, 2.2827845, 0, 0, 0],
                  [-0.8238759, 0.6436919, 0, 0, -0.5652176, 0, -1.1171302, 0]]  # fmt: skip
SPARSEGPT_2_4 = [[-1.1381776, 0.7712194, 0, 0, 1.4058595, 0, -1.5122677, 0],
                 [0, 0.4734429, 0, -1.6536188, 2.2827845, 0, 0.4532216, 0],
                 [-0.8238759, 0.6436919, 0, 0, -0.5652176, 0, -1.1171302, 0]]  # fmt: skip
FLAP_WIFV = [20.8033676, 25.448494, 1.5708998, 9.0042267, 106.4369278, 1.6516933, 70.1370316, 2.1598492]
FLAP_WIFN = [3.4336758, 4.4781094, 2.047086, 2.462934, 8.2461081, 0.6862865, 5.8765702, 0.9718943]


def matrix_and_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight [3, 8], inputs [4 sequences, 6 tokens, 8], and the same away from zero."""
    random = np.random.default_rng(35)
    weight = random.standard_normal((3, 8)).astype(np.float32)
    x = random.standard_normal((4, 6, 8)).astype(np.float32) * random.uniform(0.2, 3, 8).astype(np.float32)
    shifted = x + random.uniform(-1, 1, 8).astype(np.float32)
    return torch.from_numpy(weight), torch.from_numpy(x), torch.from_numpy(shifted)


def importance(x: torch.Tensor) -> torch.Tensor:
    sums = ChannelSums(x.shape[2])
    sums.add(x)
    return sums.sums[0].sqrt()


def test_modelopts_importance_of_channels_and_heads() -> None:
    random = np.random.default_rng(34)  # Megatron's [tokens, sequences, channels]
    mlp, context, one, two = (torch.from_numpy(random.standard_normal((5, 3, n))).float() for n in (6, 12, 5, 5))
    assert importance(mlp).numpy() == pytest.approx(FFN, rel=3e-7)
    heads = torch.linalg.vector_norm(importance(context).view(4, 3), dim=1)
    assert heads.numpy() == pytest.approx(HEADS, rel=3e-7)
    assert (importance(one) + importance(two)).numpy() == pytest.approx(HIDDEN, rel=3e-7)


def test_wandas_scores_choose_the_same_weights() -> None:
    weight, x, _ = matrix_and_inputs()
    sums = SquareSums(8)
    for sequence in x:
        sums.add(sequence)
    assert (weight.abs() * sums.mean().sqrt()).numpy() == pytest.approx(np.array(WANDA), rel=1e-6)
    _, kept = methods.get_sparse("wanda").prune(
        weight.clone(), sums.mean(), Sparsity.parse(0.5, "unstructured"), Rows.all(3)
    )
    assert torch.equal(kept, torch.tensor(WANDA).argsort(1).argsort(1) >= 4)


@pytest.mark.parametrize(("ratio", "pattern", "published"),
                         [(13.2 / 24, "unstructured", SPARSEGPT_HALF), (None, "2:4", SPARSEGPT_2_4)])  # fmt: skip
def test_sparsegpts_weights(ratio: float | None, pattern: str, published: list[list[float]]) -> None:
    weight, x, _ = matrix_and_inputs()
    hessian = Hessian(8, 24)
    for sequence in x:
        hessian.add(sequence)
    sparsity = Sparsity.parse(ratio, pattern)
    found, kept = methods.get_sparse("sparsegpt").prune(weight, hessian.factor(), sparsity, Rows.all(3))
    assert torch.equal(kept, torch.tensor(published) != 0)
    assert found.numpy() == pytest.approx(np.array(published), rel=3e-5)


def test_flaps_scores_but_for_its_running_weights() -> None:
    weight, _, x = matrix_and_inputs()
    means = torch.stack([x[: n + 1].double().mean((0, 1)) for n in range(4)])
    away = [(x[n] - means[n]).square().sum(0) * n / (n + 1) for n in range(1, 4)]
    squares, absolute = column_sums(weight)
    # What docs/pages/methods/flap.md says.
    assert (sum(away) / 3 * squares).numpy() == pytest.approx(FLAP_WIFV, rel=1e-5)
    ours = variance(x.double().sum((0, 1)), x.double().square().sum((0, 1)), 24) * squares
    assert ours.argsort()[-5:].tolist() == np.argsort(FLAP_WIFV)[-5:].tolist()
    norms = x.double().square().sum((0, 1)).sqrt() * absolute
    assert (norms / torch.tensor(FLAP_WIFN)).numpy() == pytest.approx(float(norms[0]) / FLAP_WIFN[0], rel=1e-6)
