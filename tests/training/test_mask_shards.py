"""Shards of learned masks: which units a rank has, their random numbers, and gradients summed over real ranks."""

from __future__ import annotations

import math
import os

import numpy
import pytest
import torch

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.methods import sheared_llama
from megatron_prune.training import mask_gradients, mask_shards
from megatron_prune.training.mask_shards import REPLICATED, MaskShards
from tests.training import sheared

SOURCE = ModelShape(
    num_layers=4, hidden_size=7, num_attention_heads=12, num_query_groups=2, kv_channels=4, ffn_hidden_size=20,
    padded_vocab_size=32, tied=False,
)  # fmt: skip
TARGET = ModelShape(
    num_layers=3, hidden_size=5, num_attention_heads=4, num_query_groups=1, kv_channels=4, ffn_hidden_size=9,
    padded_vocab_size=32, tied=False,
)  # fmt: skip
KINDS = sheared_llama.kinds(SOURCE, TARGET)
STAGES = [[0, 1, 2, 3], [0, 2], [3], [1]]  # of one rank; the second has two virtual stages


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_all_five_kinds_are_sharded_here():
    assert [kind.name for kind in KINDS] == ["layer", "group", "head", "ffn", "hidden"]


@pytest.mark.parametrize("layers", STAGES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_random_numbers_are_those_of_the_unit_at_every_layout(layers, ranks):
    """Of one sequence over all units of the model; four ranks share two groups."""
    whole = MaskShards(KINDS, range(4)).uniform(7, 3, 1)
    for rank in range(ranks):
        shards = MaskShards(KINDS, layers, rank, ranks)
        for kind in KINDS:
            expected = shards.cut(kind, whole[kind.name].view(kind.shape))
            assert torch.equal(shards.uniform(7, 3, 1)[kind.name], expected), kind.name


def test_random_numbers_differ_between_units_steps_micro_batches_and_seeds():
    draws = [MaskShards(KINDS, range(4)).uniform(*place) for place in ((7, 3, 1), (8, 3, 1), (7, 4, 1), (7, 3, 2))]
    flat = torch.cat([u.flatten() for draw in draws for u in draw.values()])
    assert len(flat.unique()) > 0.99 * len(flat) and 0.4 < float(flat.mean()) < 0.6


def test_a_long_row_is_one_sequence_of_philox():
    """The place of a shard's first unit is at no multiple of what a counter makes."""
    key = 0x8B6D1E4C3F0A5972
    sequence = numpy.random.Generator(numpy.random.Philox(key=key)).random(1000, dtype=numpy.float32)
    for start, stop in ((0, 1000), (1, 2), (7, 9), (8, 16), (501, 999)):
        assert (mask_shards._random(key, start, stop) == sequence[start:stop]).all()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_tensor_parallel_shards_are_the_rows_side_by_side(ranks):
    layers = [3, 1]
    for kind in KINDS:
        values = numbers(*kind.shape, seed=1)
        here = [MaskShards(KINDS, layers, rank, ranks) for rank in range(ranks)]
        parts = [shards.cut(kind, values) for shards in here]
        whole = values if kind.name in REPLICATED else values[layers]
        assert torch.equal(here[0].rows(kind, parts), whole)
        if kind.name in ("head", "ffn"):
            heads_or_channels = 12 if kind.name == "head" else 20
            assert {part.shape for part in parts} == {(2, heads_or_channels // ranks)}
        sums = sum(
            shards.row_sums(kind, part)
            for shards, part in zip(here, parts, strict=True)
            if shards.is_split(kind) or shards.rank == 0
        )
        torch.testing.assert_close(sums.flatten(), whole.sum(-1).flatten())


def test_the_penalty_and_its_gradients():
    """Against the sum written with loops; λ₁ and λ₂ get the mean excess and its square."""
    target = ModelShape(**(vars(SOURCE) | {"ffn_hidden_size": 12}))
    (kind,) = sheared_llama.kinds(SOURCE, target)
    start = torch.rand(4, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 9.2 - 4.6
    log_alpha, multipliers = torch.nn.Parameter(start), torch.nn.Parameter(torch.tensor([0.7, -1.3]).double())
    mask_gradients.take(
        MaskShards([kind], range(4)), mask_gradients.Ranks(), {"ffn": log_alpha}, {"ffn": multipliers},
        {"ffn": torch.zeros_like(log_alpha)}, [0.4],
    )  # fmt: skip

    other, ours = start.clone().requires_grad_(), multipliers.detach().clone().requires_grad_()
    total, excesses = torch.zeros((), dtype=torch.float64), []
    for layer in range(4):
        stays = sum(1 - 1 / (1 + torch.exp(other[layer, i] - math.log(0.1 / 1.1) * 2 / 3)) for i in range(20))
        excess = (1 - stays / 20) - 0.4
        excesses.append(float(excess.detach()))
        total = total + (ours[0] * excess + ours[1] * excess * excess) / 4
    total.backward()
    torch.testing.assert_close(log_alpha.grad, other.grad, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(multipliers.grad, ours.grad, rtol=1e-10, atol=1e-14)
    assert float(multipliers.grad[0]) == pytest.approx(sum(excesses) / 4)
    assert float(multipliers.grad[1]) == pytest.approx(sum(e * e for e in excesses) / 4)


# -- gradients over ranks ------------------------------------------------------------------------------------------


def part(kind: sheared_llama.Kind, replica: int, stage: int, tensor: int) -> torch.Tensor:
    """A rank's gradient of the loss for all units of a kind that ranks share."""
    return numbers(*kind.shape, seed=1000 + 100 * replica + 10 * stage + tensor)


def gradients(tensor: int, stages: int) -> dict:
    """On a rank: the gradients that it sets, and where it is."""
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
    from megatron.core import parallel_state as mpu

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    mpu.initialize_model_parallel(tensor, stages)
    ranks, stage = mask_gradients.Ranks.of_megatron(), mpu.get_pipeline_model_parallel_rank()
    count = 4 // stages
    shards = MaskShards(KINDS, range(stage * count, (stage + 1) * count), ranks.tensor, tensor)
    log_alpha, multipliers, of_loss = {}, {}, {}
    for number, kind in enumerate(KINDS):
        log_alpha[kind.name] = torch.nn.Parameter(shards.cut(kind, numbers(*kind.shape, seed=number)).float())
        multipliers[kind.name] = torch.nn.Parameter(numbers(2, seed=50 + number).float())
        shared = kind.name in REPLICATED or not shards.is_split(kind)
        mine = part(kind, ranks.replica, stage if kind.name in REPLICATED else 0, ranks.tensor if shared else 0)
        of_loss[kind.name] = shards.cut(kind, mine).float().clone()
    targets = [0.1 * (1 + number) for number in range(len(KINDS))]
    found = mask_gradients.take(shards, ranks, log_alpha, multipliers, of_loss, targets)
    mpu.destroy_model_parallel()
    return {
        "place": (stage, ranks.tensor, ranks.replica),
        "masks": {name: parameter.grad for name, parameter in log_alpha.items()},
        "multipliers": {name: parameter.grad for name, parameter in multipliers.items()},
        "square": found.square,
        "history": found.history,
    }


def two_layouts() -> list[dict]:
    return [gradients(2, 2), gradients(4, 1)]


def published(tensor: int, stages: int) -> tuple[dict, dict, float, list]:
    """The same for the whole model in float64: the loss's gradients, and the Lagrangian's by autograd."""
    replicas = 8 // tensor // stages
    masks, multipliers, square, history = {}, {}, 0.0, []
    for number, kind in enumerate(KINDS):
        log_alpha = numbers(*kind.shape, seed=number).requires_grad_()
        lambdas = numbers(2, seed=50 + number).requires_grad_()
        target = 0.1 * (1 + number)
        excess = sheared.removed(log_alpha) - target
        (lambdas[0] * excess + lambdas[1] * excess**2).mean().backward()
        copies = range(tensor) if kind.name in REPLICATED or (kind.name == "group" and tensor > 2) else [0]
        places = range(stages) if kind.name in REPLICATED else [0]
        for replica in range(replicas):
            log_alpha.grad += sum(part(kind, replica, p, t) for p in places for t in copies) / replicas
        masks[kind.name], multipliers[kind.name] = log_alpha.grad, lambdas.grad
        square += float(log_alpha.grad.square().sum() + lambdas.grad.square().sum())
        history.append((float(excess.detach().mean()) + target, target, *lambdas.tolist()))
    return masks, multipliers, square, history


def test_gradients_are_the_whole_models_and_copies_have_the_same_bits(distributed):
    """At TP 2 × PP 2 × DP 2, and at TP 4 × DP 2, where two ranks share a query group."""
    found = distributed(two_layouts, 8)
    for layout, (tensor, stages) in enumerate(((2, 2), (4, 1))):
        masks, multipliers, square, history = published(tensor, stages)
        of_place: dict = {}
        for rank in (ranks[layout] for ranks in found):
            stage, at, _replica = rank["place"]
            count = 4 // stages
            shards = MaskShards(KINDS, range(stage * count, (stage + 1) * count), at, tensor)
            for kind in KINDS:
                gradient = rank["masks"][kind.name]
                torch.testing.assert_close(
                    gradient.double(), shards.cut(kind, masks[kind.name]), rtol=1e-5, atol=1e-6, msg=kind.name
                )
                torch.testing.assert_close(rank["multipliers"][kind.name].double(), multipliers[kind.name])
                shared_by = () if kind.name in REPLICATED else (stage, at) if shards.is_split(kind) else (stage,)
                assert torch.equal(gradient, of_place.setdefault((kind.name, *shared_by), gradient)), kind.name
                first = found[0][layout]["multipliers"][kind.name]
                assert torch.equal(rank["multipliers"][kind.name], first)
            assert float(rank["square"]) == pytest.approx(square, rel=1e-5)
            assert rank["square"] == found[0][layout]["square"]
            for row, expected in zip(rank["history"], history, strict=True):
                assert row == pytest.approx(expected, abs=1e-6)
