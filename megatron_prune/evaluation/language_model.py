"""A Megatron checkpoint as an lm-eval language model: text in, log-likelihoods or continuations out.

``MegatronLM`` tokenizes text exactly as lm-eval's own ``HFLM`` would for the exported model. It uses the tokenizer's
BOS if the tokenizer adds one, puts BOS (or else the end-of-document token) before a text without context, and cuts the
start of a text that is too long.

``RanksModel`` runs the model. Rank 0 runs lm-eval; the other ranks wait in ``follow`` and make the same forward passes:

    rank 0:  score(requests) ─ broadcast ─▶ every rank: its replica's batches ─ reduce ─▶ the answers
    others:  follow() …                                                   until rank 0 calls finish()

Requests for log-likelihoods with the same input are run once: the choices A, B, C, D of a question differ only in their
last token. The output layer is run only where a target is.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from megatron_prune import screen
from megatron_prune.data.tokenizers import Tokenizer
from megatron_prune.engine import forward, network
from megatron_prune.errors import DataError, UsageError
from megatron_prune.evaluation import generation
from megatron_prune.evaluation.generation import GenerationRequest


@dataclass(frozen=True)
class LikelihoodRequest:
    """The model reads ``inputs``; the predictions after its last tokens are compared with ``targets``."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


def score(model: list[torch.nn.Module], requests: Sequence[LikelihoodRequest], batch: int) -> list[tuple[float, bool]]:
    """Log-likelihood of each request's targets, and whether each target was the likeliest token. Collective."""
    asking: dict[tuple[int, ...], list[int]] = {}  # each input, run once: the requests that use it
    for number, request in enumerate(requests):
        asking.setdefault(request.inputs, []).append(number)
    # The longest first, so that out-of-memory errors come early; similar lengths share a batch.
    batches = list(itertools.batched(sorted(asking, key=len, reverse=True), batch))
    own = batches[mpu.get_data_parallel_rank() :: mpu.get_data_parallel_world_size()]
    reading = iter(own)

    def padded() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for some in screen.progress(own, len(own), "tasks", "batch"):
            rows = [torch.tensor(row, dtype=torch.int64) for row in some]
            tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # on the right, which no result reads
            places = [
                torch.arange(len(inputs) - len(requests[number].targets), len(inputs)) + row * tokens.shape[1]
                for row, inputs in enumerate(some)
                for number in asking[inputs]
            ]
            yield tokens, torch.cat(places)

    def read(logits: torch.Tensor) -> list[tuple[int, float, bool]]:
        """Number, log-likelihood and greediness of a batch's requests, from logits [n, V / TP] at their targets."""
        numbers = [number for inputs in next(reading) for number in asking[inputs]]
        lengths = [len(requests[number].targets) for number in numbers]
        targets = torch.tensor([t for n in numbers for t in requests[n].targets], device=logits.device)
        losses, greedy = _compare(logits, targets)
        sums = [-part.sum().item() for part in torch.split(losses.double(), lengths)]
        return list(zip(numbers, sums, [bool(part.all()) for part in torch.split(greedy, lengths)], strict=True))

    found = forward.run_logits_at(model, padded(), read)
    gathered = torch.zeros(len(requests), 2, dtype=torch.float64, device=torch.cuda.current_device())
    if found is not None and mpu.get_tensor_model_parallel_rank() == 0:
        for number, likelihood, greedy in itertools.chain.from_iterable(found):
            gathered[number, 0], gathered[number, 1] = likelihood, greedy
    torch.distributed.all_reduce(gathered)
    return [(likelihood, bool(greedy)) for likelihood, greedy in gathered.tolist()]


def _compare(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [n] of ``targets`` [n], and whether each is the likeliest token, from this rank's logits [n, V / TP].

    Overwrites ``logits``.
    """
    group = mpu.get_tensor_model_parallel_group()
    first = mpu.get_tensor_model_parallel_rank() * logits.shape[1]
    logits = logits.float()
    own, place = logits.max(-1)
    highest = own.clone()
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group=group)
    # Among equal ones the lowest id, as with an unsplit vocabulary.
    likeliest = torch.where(own == highest, place + first, torch.iinfo(torch.int64).max)
    torch.distributed.all_reduce(likeliest, torch.distributed.ReduceOp.MIN, group=group)
    losses = vocab_parallel_cross_entropy(logits[:, None], targets[:, None])[:, 0]  # [n, 1, V / TP] and [n, 1]
    return losses, likeliest == targets


PATIENCE = timedelta(days=7)  # how long ranks wait while lm-eval reads data or bootstraps


class RanksModel:
    """The model of ``runtime.load_model`` on all ranks. Its constructor and methods are collective.

    ``tokenizer`` loads the tokenizer, which every rank needs once text is generated.
    """

    def __init__(self, model: list[torch.nn.Module], *, batch: int, tokenizer: Callable[[], Tokenizer]):
        self.model, self.batch = model, batch
        self._tokenizer = functools.cache(tokenizer)
        # NCCL would time out while rank 0 is busy; the messages need no GPU.
        self._group: Any = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        network.refuse_strangers()

    def score(self, requests: Sequence[LikelihoodRequest]) -> list[tuple[float, bool]]:
        """On rank 0: log-likelihood of each request's targets, and whether each target was the likeliest token."""
        return score(self.model, self._broadcast(list(requests)) or [], self.batch)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[int]]:
        """On rank 0: the new tokens of each request."""
        return self._generate(self._broadcast(list(requests)) or []) if requests else []

    def follow(self) -> None:
        """On the other ranks: take part in everything until ``finish``."""
        while (requests := self._broadcast(None)) is not None:
            if requests and isinstance(requests[0], GenerationRequest):
                self._generate(requests)
            else:
                score(self.model, requests, self.batch)

    def finish(self) -> None:
        """On rank 0: release the other ranks from ``follow``."""
        self._broadcast(None)

    def _generate(self, requests: list[GenerationRequest]) -> list[list[int]]:
        own = generation.generate(self.model, requests, self.batch, self._tokenizer())
        speaks = mpu.get_tensor_model_parallel_rank() == mpu.get_pipeline_model_parallel_rank() == 0
        found: list[Any] | None = [None] * torch.distributed.get_world_size() if self._is_first() else None
        torch.distributed.gather_object(own if speaks else {}, found, group=self._group)
        made = {number: tokens for one in found or [] for number, tokens in one.items()}
        return [made[number] for number in range(len(requests))] if found else []

    @staticmethod
    def _is_first() -> bool:
        return torch.distributed.get_rank() == 0

    def _broadcast(self, requests: list[Any] | None) -> list[Any] | None:
        box = [requests]
        torch.distributed.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


class RunsRequests(Protocol):
    """What ``MegatronLM`` needs of a model: ``RanksModel`` has it."""

    def score(self, requests: Sequence[LikelihoodRequest]) -> list[tuple[float, bool]]: ...

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[int]]: ...


class MegatronLM(TemplateLM):  # type: ignore[misc]  # lm_eval is not type-checked
    """``model`` is run on at most ``longest`` tokens; ``truncated`` counts texts that were cut.

    ``defaults`` are the model's own for generating, ``seed`` that of sampling.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        longest: int,
        model: RunsRequests,
        defaults: generation.GenerationDefaults,
        *,
        seed: int = 0,
    ):
        super().__init__()
        start = tokenizer.eod if tokenizer.bos is None else tokenizer.bos
        if start is None:
            raise DataError(
                f"{tokenizer.model} has neither a BOS nor an end-of-document token, and a text without context needs "
                "one: use a tokenizer that has it"
            )
        self._text, self._start, self._longest, self._model = tokenizer, start, longest, model
        self._defaults, self._seed = defaults, seed
        self.truncated = 0

    @property
    def eot_token_id(self) -> int:
        return self._start if self._text.eod is None else self._text.eod

    @property
    def prefix_token_id(self) -> int:
        return self._start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; TemplateLM asks for no special tokens after a prefix that it adds itself."""
        return self._text.encode(string) if add_special_tokens is False else self._text.encode_whole(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self._model.score([self._request(*request) for request in requests])

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that predict each token once."""
        windows: list[LikelihoodRequest] = []
        ends = []
        for (text,) in (request.args for request in requests):
            rolling = get_rolling_token_windows(self.tok_encode(text), self._start, self._longest, context_len=1)
            windows += [self._request((text, ""), *make_disjoint_window(window)) for window in rolling]
            ends.append(len(windows))
        found = [likelihood for likelihood, _ in self._model.score(windows)]
        return [sum(found[start:end]) for start, end in zip([0, *ends], ends, strict=False)]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continuations of texts, without the string that ended them."""
        asked: list[GenerationRequest] = []
        times: Counter[tuple[Any, ...]] = Counter()
        for request in requests:
            context, given = request.args
            settings = generation.GenerationSettings.of(requests[0].task_name, given, self._defaults, self._longest)
            ids = self.tok_encode(context) or [self._start]
            room = self._longest - settings.most
            self.truncated += len(ids) > room
            inputs = tuple(ids[-room:])
            repeats = (request.task_name, *inputs)
            draw = (self._seed, times[repeats], *inputs)  # what else is asked, and in which order, does not matter
            times[repeats] += 1
            asked.append(
                GenerationRequest(inputs, settings.most, settings.until, self._defaults.ends, settings.sampling, draw)
            )
        made = self._model.generate(asked)
        return [
            postprocess_generated_text(self._text.decode(tokens), list(request.until), None)
            for request, tokens in zip(asked, made, strict=True)
        ]

    def _request(self, texts: tuple[str, str], context: list[int], continuation: list[int]) -> LikelihoodRequest:
        if not continuation:
            raise DataError(f"the continuation {texts[1]!r} adds no tokens to {texts[0][-80:]!r}")
        if len(continuation) > self._longest:
            raise DataError(
                f"the continuation {texts[1][:80]!r}… has {len(continuation)} tokens, expected at most "
                f"{self._longest}: increase --seq-length"
            )
        whole = [*context, *continuation]
        self.truncated += len(whole) > self._longest + 1
        return LikelihoodRequest(tuple(whole[-self._longest - 1 : -1]), tuple(continuation))


def refusal(task: str | None, output_type: str) -> UsageError:
    return UsageError(
        "--tasks", got=task or output_type, expected="tasks that are scored by likelihoods, or generate text",
        why=f"it is of the kind {output_type}", do="export the checkpoint, and run the task with lm-eval",
    )  # fmt: skip
