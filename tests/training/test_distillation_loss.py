"""The objective of distillation and its gradients, against float64 in plain torch (``distillation_oracle.py``)."""

import itertools

import pytest
import torch

from megatron_prune.training import distillation_loss
from megatron_prune.training.distillation_loss import FullTargets, Mixture, Shard, TopKTargets, losses
from tests.training import distillation_oracle as oracle

B, S, K = 3, 5, 6
VOCABULARIES = [(37, 40), (33, 48), (48, 48)]  # words, with padding; of (33, 48) a rank of four has no word
MIXTURES = [
    Mixture(alpha, temperature, reverse)
    for alpha, temperature, reverse in itertools.product((0.0, 0.3, 1.0), (1.0, 2.5, 0.6), (False, True))
]

AT_ONE = [mixture for mixture in MIXTURES if mixture.temperature == 1]  # all that the top k allow


def mixtures(kind, of=MIXTURES):
    return [mixture for mixture in of if kind == "full" or mixture in AT_ONE]


def logits(words, padded, seed, scale=2.0):
    """[b, s, padded] in float32; padding holds what would dominate a sum that counted it."""
    found = torch.randn(B, S, padded, generator=torch.Generator().manual_seed(seed)) * scale
    found[..., words:] = 50.0
    return found


def problem(words, padded, seed):
    """Student, teacher, labels, weights of tokens, and the ids of the teacher's largest."""
    generator = torch.Generator().manual_seed(100 + seed)
    student, teacher = logits(words, padded, seed), logits(words, padded, seed + 50)
    labels = torch.randint(words, (B, S), generator=generator)
    weights = torch.rand(B, S, generator=generator) * (torch.rand(B, S, generator=generator) > 0.2)
    return student, teacher, labels, weights, teacher[..., :words].topk(K).indices


def targets_of(kind, teacher, ids, words, here):
    """``here``: this rank's columns. The top k are stored in float32, as a cache would."""
    if kind == "full":
        return FullTargets(teacher[..., here])
    found = oracle.lumped(teacher[..., :words].double().log_softmax(-1), ids).to(teacher.dtype)
    return TopKTargets(ids, found[..., :-1], found[..., -1])


def ours(kind, words, padded, mixture, seed, rank=0, ranks=1, group=None, dtype=torch.float32):
    """(mixed, CE, T² · KL) by token, and the gradient [b, s, padded / ranks] of the weighted sum."""
    student, teacher, labels, weights, ids = problem(words, padded, seed)
    student, teacher = student.to(dtype), teacher.to(dtype)
    width = padded // ranks
    here = slice(rank * width, (rank + 1) * width)
    own = student[..., here].transpose(0, 1).contiguous().requires_grad_()
    found = losses(own, labels, targets_of(kind, teacher, ids, words, here), mixture, Shard(words, rank, group))
    (found.mixed * weights).sum().backward()
    return [each.detach() for each in found], own.grad.transpose(0, 1)


def expected(kind, words, padded, mixture, seed):
    student, teacher, labels, weights, ids = problem(words, padded, seed)
    student = student.double().requires_grad_()
    settings = (labels, mixture.alpha, mixture.temperature, mixture.reverse)
    if kind == "full":
        found = oracle.full(student[..., :words], teacher[..., :words], *settings)
    else:
        found = oracle.top_k(student[..., :words], teacher[..., :words], ids, *settings)
    (found[0] * weights).sum().backward()
    return [each.detach() for each in found], student.grad


def check(found, wanted, bound=1e-6):
    """Sums, which are what is trained on, and gradients by their norm; where those cancel, relative to 1."""
    for one, other in zip(found[0], wanted[0], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=bound, atol=bound)
        assert float(one.sum()) == pytest.approx(float(other.sum()), rel=bound, abs=1e-12)
    assert float((found[1].double() - wanted[1]).norm()) <= bound * max(1.0, float(wanted[1].norm()))


@pytest.mark.parametrize("kind", ["full", "top-k"])
@pytest.mark.parametrize(("words", "padded"), VOCABULARIES)
def test_losses_and_gradients_are_the_oracles(kind, words, padded):
    for seed, mixture in enumerate(mixtures(kind)):
        wanted = expected(kind, words, padded, mixture, seed)
        check(ours(kind, words, padded, mixture, seed), wanted)
        check(ours(kind, words, padded, mixture, seed, dtype=torch.float64), wanted, bound=1e-11)


@pytest.mark.parametrize("kind", ["full", "top-k"])
def test_logits_are_read_in_parts(kind, monkeypatch):
    """A part is a token of all sequences, or all tokens: the same bits."""
    found = []
    for elements in (1 << 22, 2 * B * 40):
        monkeypatch.setitem(distillation_loss._PART, "cpu", elements)
        values, gradient = ours(kind, 37, 40, Mixture(0.3, 2.5 if kind == "full" else 1.0, True), 1)
        found.append([*values, gradient])
    assert all(map(torch.equal, *found))


def of_layouts():
    """On a rank of four: every case at TP 2 and at TP 4."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    pairs = [torch.distributed.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    found = {}
    for ranks, group in ((2, pairs[rank // 2]), (4, torch.distributed.group.WORLD)):
        for kind, (words, padded) in itertools.product(("full", "top-k"), VOCABULARIES[:2]):
            for seed, mixture in enumerate(mixtures(kind, MIXTURES[6:15])):
                case = (kind, words, padded, mixture, seed)
                found[ranks, *case] = ours(*case, rank=rank % ranks, ranks=ranks, group=group)
    return found


def test_on_shards_of_the_vocabulary(distributed):
    """TP 2 and 4, with shards that end in padding or have nothing else."""
    results = distributed(of_layouts, 4)
    for case in results[0]:
        ranks = case[0]
        shards = [found[case] for found in results[:ranks]]
        for (values, _), *_ in zip(shards, strict=True):
            for one, other in zip(values, shards[0][0], strict=True):
                assert torch.equal(one, other), case
        check((shards[0][0], torch.cat([gradient for _, gradient in shards], dim=-1)), expected(*case[1:]))


def test_a_small_divergence_keeps_its_digits():
    """A student near its teacher."""
    teacher = logits(37, 37, 5)
    student = teacher + 1e-2 * logits(37, 37, 6)
    labels = torch.zeros(B, S, dtype=torch.long)
    for reverse in (False, True):
        found = losses(student.transpose(0, 1), labels, FullTargets(teacher), Mixture(1.0, 1.0, reverse), Shard(37))
        wanted = oracle.full(student, teacher, labels, 1, 1, reverse)[2]
        assert float(wanted.max()) < 1e-3
        assert float((found.distillation - wanted).abs().max()) < 2e-7
        assert float(found.distillation.sum()) == pytest.approx(float(wanted.sum()), rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(temperature, reverse, dtype):
    """Exactly: Adam would scale up any rounding to steps of the full learning rate."""
    teacher = logits(37, 40, 3).to(dtype)
    student = teacher.transpose(0, 1).clone().requires_grad_()
    labels = torch.zeros(B, S, dtype=torch.long)
    found = losses(student, labels, FullTargets(teacher), Mixture(1.0, temperature, reverse), Shard(37))
    found.mixed.sum().backward()
    assert not found.mixed.any() and not student.grad.any() and found.lm.all()


@pytest.mark.parametrize(("temperature", "reverse"), [(1.0, False), (2.0, True)])
def test_all_words_in_a_cache_give_the_teachers_own_bits(temperature, reverse):
    """Top-k with k = vocabulary, in order of probability, is the full form to the last float."""
    words, padded = 37, 40
    student, teacher, labels, *_ = problem(words, padded, 2)
    found = distillation_loss.log_probabilities(teacher.flatten(0, 1), Shard(words)).view_as(teacher)
    assert (found[..., words:] == -torch.inf).all()
    best = found.topk(words)
    nothing = torch.full((B, S), -torch.inf)
    mixture, gradients, values = Mixture(0.7, temperature, reverse), [], []
    for targets in (FullTargets(teacher), TopKTargets(best.indices.int(), best.values, nothing)):
        own = student.transpose(0, 1).clone().requires_grad_()
        each = losses(own, labels, targets, mixture, Shard(words))
        each.mixed.sum().backward()
        gradients.append(own.grad)
        values.append(each.mixed.detach())
    assert torch.equal(*values) and torch.equal(*gradients)


def test_what_k_words_leave_out_is_the_divergence_within_the_rest():
    """At T = 1 and forward: full - top-k = (the teacher's mass of the rest) × KL within it."""
    student, teacher, labels, _, ids = problem(48, 48, 4)
    mixture, shard = Mixture(1.0), Shard(48)
    own = student.transpose(0, 1)
    whole = losses(own, labels, FullTargets(teacher), mixture, shard).distillation.double()
    part = losses(own, labels, targets_of("top-k", teacher, ids, 48, None), mixture, shard).distillation.double()
    outside = torch.ones(B, S, 48, dtype=torch.bool).scatter(-1, ids, False)
    log_p, log_q = (each.double()[outside].view(B, S, -1).log_softmax(-1) for each in (teacher, student))
    mass = (teacher.double().softmax(-1) * outside).sum(-1)
    torch.testing.assert_close(whole - part, mass * oracle.kl(log_p, log_q, False), rtol=1e-4, atol=1e-5)


def test_the_sum_of_the_rest_is_not_softened():
    """At T = 2, six words of 48: softening their sum gives the rest less than the softened words have."""
    _, teacher, labels, _, ids = problem(48, 48, 4)
    events = oracle.lumped(teacher.double().log_softmax(-1), ids)
    whole = oracle.lumped((teacher.double() / 2).log_softmax(-1), ids)[..., -1].exp()
    assert float(((events / 2).log_softmax(-1)[..., -1].exp() / whole).max()) < 0.75
    targets = TopKTargets(ids, events[..., :-1], events[..., -1])
    with pytest.raises(ValueError, match=r"temperature 2.0: expected 1 with 6 words and the rest"):
        losses(teacher.transpose(0, 1).contiguous(), labels, targets, Mixture(1.0, 2.0), Shard(48))


@pytest.mark.parametrize("reverse", [False, True])
def test_extremes_are_finite(reverse):
    """A teacher and a student that are sure of different words, by more than exp can say."""
    teacher, student = torch.zeros(1, 1, 9), torch.zeros(1, 1, 9)
    teacher[..., 2], student[..., 5] = 300.0, 300.0
    rest = oracle.lumped(teacher.double().log_softmax(-1), torch.tensor([[[2, 3]]])).float()
    for targets in (FullTargets(teacher), TopKTargets(torch.tensor([[[2, 3]]]), rest[..., :-1], rest[..., -1])):
        own = student.clone().requires_grad_()
        found = losses(own, torch.zeros(1, 1, dtype=torch.long), targets, Mixture(0.5, 1.0, reverse), Shard(9))
        found.mixed.sum().backward()
        arguments = (torch.zeros(1, 1, dtype=torch.long), 0.5, 1.0, reverse)
        if isinstance(targets, FullTargets):
            wanted = oracle.full(student, teacher, *arguments)[2]
        else:
            wanted = oracle.top_k(student, teacher, torch.tensor([[[2, 3]]]), *arguments)[2]
        assert float(found.distillation.detach()) == pytest.approx(float(wanted), rel=1e-5)
        assert own.grad.isfinite().all() and own.grad.any()
