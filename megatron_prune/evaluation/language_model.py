"""A Megatron checkpoint as lm-eval knows language models: text in, log-likelihoods out.

The tokens are those that lm-eval's own HFLM would hand to the exported model: the tokenizer's BOS where it adds
one, BOS or else the end of a document before a text without context, and too long a text cut at its left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_prune.data.tokenizers import Tokenizer
from megatron_prune.errors import DataError, UsageError
from megatron_prune.evaluation.likelihoods import Request

Score = Callable[[Sequence[Request]], list[tuple[float, bool]]]


class MegatronLM(TemplateLM):  # type: ignore[misc]  # lm_eval is read without its types
    """``score`` runs the model, which reads at most ``longest`` tokens; ``truncated`` counts texts that were cut."""

    def __init__(self, tokenizer: Tokenizer, longest: int, score: Score):
        super().__init__()
        start = tokenizer.eod if tokenizer.bos is None else tokenizer.bos
        if start is None:
            raise DataError(f"{tokenizer.model} has neither BOS nor end of document: nothing can begin a text")
        self._text, self._start, self._longest, self._score = tokenizer, start, longest, score
        self.truncated = 0

    @property
    def eot_token_id(self) -> int:
        return self._start if self._text.eod is None else self._text.eod

    @property
    def prefix_token_id(self) -> int:
        return self._start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; TemplateLM asks for none of the special ones after a prefix that it puts itself."""
        return self._text.encode(string) if add_special_tokens is False else self._text.encode_whole(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self._score([self._request(*request) for request in requests])

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that predict each token once."""
        windows: list[Request] = []
        ends = []
        for (text,) in (request.args for request in requests):
            rolling = get_rolling_token_windows(self.tok_encode(text), self._start, self._longest, context_len=1)
            windows += [self._request((text, ""), *make_disjoint_window(window)) for window in rolling]
            ends.append(len(windows))
        found = [likelihood for likelihood, _ in self._score(windows)]
        return [sum(found[start:end]) for start, end in zip([0, *ends], ends, strict=False)]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise refusal(requests[0].task_name, "generate_until")

    def _request(self, texts: tuple[str, str], context: list[int], continuation: list[int]) -> Request:
        if not continuation:
            raise DataError(f"the continuation {texts[1]!r} has no tokens of its own after {texts[0][-80:]!r}")
        if len(continuation) > self._longest:
            raise DataError(
                f"the continuation {texts[1][:80]!r}… has {len(continuation)} tokens, the model reads "
                f"{self._longest}: give a longer --seq-length"
            )
        whole = [*context, *continuation]
        self.truncated += len(whole) > self._longest + 1
        return Request(tuple(whole[-self._longest - 1 : -1]), tuple(continuation))


def refusal(task: str | None, output_type: str) -> UsageError:
    return UsageError(
        "--tasks", given=task or output_type, allowed="tasks of likelihoods",
        why=f"it is of the kind {output_type}, and nothing is generated here: export the checkpoint for it",
    )  # fmt: skip
