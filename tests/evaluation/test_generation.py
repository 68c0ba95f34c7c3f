"""Drawing tokens and ending texts, without a model."""

from __future__ import annotations

import json
from collections import Counter

import numpy
import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'megatron_prune[eval]'")


class Letters:
    """A tokenizer whose tokens are characters, and 0 the end of a document."""

    eod = 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: list[int], *, special: bool = False) -> str:
        return "".join(chr(i) for i in ids if i or special)


def request(**changes):
    from megatron_prune.evaluation.generation import GenerationRequest

    return GenerationRequest(**{"inputs": (3, 1), "most": 5, "until": (), "ends": frozenset([0]), **changes})


@pytest.mark.parametrize("top_p", [0.7, 1.0])
@pytest.mark.parametrize("top_k", [0, 4])
def test_tokens_are_drawn_from_the_nucleus(top_k: int, top_p: float) -> None:
    """Against the definitions of top-k (Fan et al., 2018) and top-p (Holtzman et al., 2020), written out."""
    from scipy.stats import chisquare

    from megatron_prune.evaluation.generation import Sampling, _Batch

    logits = numpy.array([0.3, 2.0, -1.0, 1.5, 1.4, -0.2, 0.9])
    shares = numpy.exp(logits / 0.8) / numpy.exp(logits / 0.8).sum()
    order = numpy.argsort(-shares)
    kept = order[: top_k or None]
    shares_kept = shares[kept] / shares[kept].sum()
    kept = kept[: numpy.searchsorted(shares_kept.cumsum(), top_p) + 1]  # the fewest that reach top_p
    wanted = shares[kept] / shares[kept].sum()
    sampling, draws = Sampling(do_sample=True, temperature=0.8, top_k=top_k, top_p=top_p), 4000
    batch = _Batch([request(sampling=sampling, draw=(5, n)) for n in range(draws)], Letters())
    counts = Counter(batch.choose(torch.tensor(logits).expand(draws, -1)).tolist())
    assert set(counts) <= set(kept.tolist())
    assert chisquare([counts[token] for token in kept], wanted * draws).pvalue > 1e-3


def test_a_draw_is_the_requests_own() -> None:
    from megatron_prune.evaluation.generation import Sampling, _Batch

    sampling, flat = Sampling(do_sample=True, top_k=0), torch.zeros(3, 1000)
    one, two, three = (request(sampling=sampling, draw=(5, n)) for n in range(3))
    together = _Batch([one, two, three], Letters()).choose(flat)
    apart = [_Batch([some], Letters()).choose(flat[:1])[0] for some in (one, two, three)]
    assert together.tolist() == [int(token) for token in apart] and len(set(together.tolist())) == 3


def test_repetition_is_penalized_in_what_was_read_only() -> None:
    """CTRL (Keskar et al., 2019): a positive logit is divided, a negative one multiplied."""
    from megatron_prune.evaluation.generation import Sampling, _Batch

    batch = _Batch([request(sampling=Sampling(repetition_penalty=2.0))], Letters())
    assert batch.choose(torch.tensor([[0.0, 3.0, 2.0, -1.0]])).tolist() == [2], "3 becomes 1.5"
    assert batch.choose(torch.tensor([[-1.5, 3.0, -2.1, -1.0]])).tolist() == [1]
    assert batch.choose(torch.tensor([[1.6, 3.0, -2.1, -1.0]])).tolist() == [0]


def test_a_batch_reads_longer_prompts_as_given() -> None:
    from megatron_prune.evaluation.generation import _Batch

    batch = _Batch([request(inputs=(7, 8, 9, 10), most=1), request(inputs=(3, 1), most=3)], Letters())
    seen = []
    while not batch.done:
        seen.append(batch.unread.tolist())
        batch.add(torch.tensor([40 + len(seen), 50 + len(seen)]))
    assert seen == [[[7, 8], [3, 1]], [[9], [51]], [[10], [52]]]
    assert batch.made == [[43], [51, 52, 53]]


def test_prompts_are_packed_where_layers_can_read_them_so() -> None:
    from megatron_prune.evaluation.generation import Sampling, _Batch

    asked = [request(inputs=(7, 8, 9, 10), most=1), request(inputs=(3, 1), most=3)]
    batch = _Batch(asked, Letters(), packs=True)
    seen, positions = [], []
    while not batch.done:
        seen.append(batch.unread.tolist())
        positions.append(batch.cache.positions().tolist())
        batch.cache.advance()
        batch.add(torch.tensor([40 + len(seen), 50 + len(seen)]))
    assert seen == [[[7, 8, 9, 10, 3, 1]], [[41], [51]], [[0], [52]]]
    assert positions == [[[0, 1, 2, 3, 0, 1]], [[4], [2]], [[5], [3]]]
    assert batch.made == [[41], [51, 52, 53]]
    penalized = [request(inputs=one.inputs, sampling=Sampling(repetition_penalty=2.0)) for one in asked]
    logits = torch.zeros(2, 12)
    logits[0, [7, 1]], logits[1, [0, 5]] = torch.tensor([4.0, 3.0]), torch.tensor([4.0, 3.0])
    chosen = [_Batch(penalized, Letters(), packs=packs).choose(logits).tolist() for packs in (True, False)]
    assert chosen == [[1, 0], [1, 0]], "7 was said in the first, 0 in neither"


def test_what_is_before_a_prompt_is_not_seen() -> None:
    from megatron_prune.engine.decoding import Cache

    cache = Cache([4, 2], 5)
    hidden = cache.unseen(torch.float32)
    assert hidden.shape == (2, 1, 1, 5) and cache.starts == [0, 2] and cache.last.tolist() == [3, 5]
    assert torch.equal(hidden[:, 0, 0] == -torch.inf, torch.tensor([[0, 0, 0, 0, 0], [1, 1, 0, 0, 0]]).bool())
    assert Cache([3, 3], 5).unseen(torch.float32) is None, "one length"


@pytest.mark.parametrize(
    ("until", "ends", "made", "ended"),
    [
        (("ab",), {0}, "xab", True),
        (("ab",), {0}, "abxx", True),  # two tokens more than the string has
        (("ab",), {0}, "abxxx", False),
        (("q", "ab"), {0}, "xa", False),
        ((), {0, 120}, "ax", True),
        ((), {0}, "abcdefg", True),  # as many as asked for
    ],
)
def test_a_text_ends_where_lm_eval_ends_it(until, ends, made, ended) -> None:
    from lm_eval.models.utils_hf import MultiTokenEOSCriteria

    from megatron_prune.evaluation.generation import TextEnd

    class Theirs(Letters):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return super().encode(text)

        def batch_decode(self, rows: torch.Tensor) -> list[str]:
            return [self.decode(row.tolist()) for row in rows]

    ids = Letters().encode(made)
    stop = TextEnd(request(most=7, until=until, ends=frozenset(ends)), Letters())
    assert stop.reached(ids) == ended
    theirs = [MultiTokenEOSCriteria(string, Theirs(), 0, 1)(torch.tensor([ids]), None) for string in until]
    assert (any(theirs) or ids[-1] in ends or len(ids) == 7) == ended


def test_a_models_own_settings_complete_the_tasks(tmp_path) -> None:
    from megatron_prune.evaluation.generation import GenerationDefaults, GenerationSettings

    assert GenerationDefaults.read(tmp_path, Letters()) == GenerationDefaults(frozenset([0]), {}, "\0")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 9}))
    assert GenerationDefaults.read(tmp_path, Letters()).ends == {0, 9}
    own = {"eos_token_id": [7, 8], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    defaults = GenerationDefaults.read(tmp_path, Letters())
    assert defaults.ends == {0, 7, 8}
    drawn = GenerationSettings.of("t", {"do_sample": True, "temperature": 0.3, "max_new_tokens": 4}, defaults, 9)
    assert (drawn.most, drawn.until) == (4, ("\0",))
    assert (drawn.sampling.temperature, drawn.sampling.top_p, drawn.sampling.top_k) == (0.3, 0.9, 50)
    greedy = GenerationSettings.of("t", {"until": "x", "max_gen_toks": 4}, defaults, 9)
    assert not greedy.sampling.do_sample and greedy.until == ("x", "\0")
