"""Continuations of texts, decoded greedily or by sampling, with a cache of keys and values.

Without a GPU, the prompts of a batch are read at once, packed, if the model's layers can (``engine/decoding.py``).
Otherwise, with Megatron's own static cache, a batch reads the shortest of its prompts at once, then one token per step;
where a longer prompt has a next token, that is read instead of the model's choice. Every stage of a pipeline keeps the
cache of its own layers, and a pipeline of P stages decodes P batches at a time:

    every stage: next tokens ─ run_cached ─▶ last stage: logits ─ choose ─▶ tokens ─ broadcast in the pipeline ─▶ again

All ranks of a replica then have the same tokens, and stop by the same rule, which is that of lm-eval's ``HFLM``.
A sampled token is the quantile of the request's own random number: it depends neither on the layout nor on the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core import parallel_state as mpu
from megatron.core.inference.contexts import StaticInferenceContext

from megatron_prune import screen
from megatron_prune.data.tokenizers import Tokenizer
from megatron_prune.engine import decoding, forward
from megatron_prune.errors import UsageError

# Of lm-eval's ``generation_kwargs``, besides the fields of ``Sampling``; the last three are other names of the second.
_LIMITS = ("until", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn, by transformers' names and in its order; greedy if not ``do_sample``."""

    do_sample: bool = False
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 50  # transformers' default
    top_p: float = 1.0
    min_p: float = 0.0

    def processors(self) -> list[Any]:
        """transformers' processors of logits, called with the ids so far [B, S] and the logits [B, V]."""
        from transformers.generation import logits_process as of

        found: list[Any] = []
        if self.repetition_penalty != 1.0:
            found.append(of.RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.do_sample:
            found += [of.TemperatureLogitsWarper(self.temperature)] if self.temperature != 1.0 else []
            found += [of.TopKLogitsWarper(self.top_k)] if self.top_k else []
            found += [of.TopPLogitsWarper(self.top_p)] if self.top_p < 1.0 else []
            found += [of.MinPLogitsWarper(self.min_p)] if self.min_p else []
        return found


_SAMPLING = tuple(one.name for one in fields(Sampling))


@dataclass(frozen=True)
class GenerationRequest:
    """Continue ``inputs`` by at most ``most`` tokens, until one of ``until`` appears in the text or an ``ends`` token.

    ``draw``: the seed of its random numbers.
    """

    inputs: tuple[int, ...]
    most: int
    until: tuple[str, ...]
    ends: frozenset[int]
    sampling: Sampling = Sampling()
    draw: tuple[int, ...] = ()


def generate(
    model: list[torch.nn.Module], requests: Sequence[GenerationRequest], batch: int, tokenizer: Tokenizer
) -> dict[int, list[int]]:
    """New tokens of the requests that this data-parallel replica ran, by number. Collective.

    ``batch`` sequences run together, those of one sampling.
    """
    # The longest first, so that out-of-memory errors come early; similar lengths share a batch.
    order = sorted(range(len(requests)), key=lambda n: (repr(requests[n].sampling), -len(requests[n].inputs)))
    batches = [
        numbers
        for _, same in itertools.groupby(order, key=lambda n: requests[n].sampling)
        for numbers in itertools.batched(same, batch)
    ]
    own = batches[mpu.get_data_parallel_rank() :: mpu.get_data_parallel_world_size()]
    agreed = torch.tensor(int(decoding.is_attached(model)), device=torch.cuda.current_device())
    torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MIN)  # stages may have other kinds of layers
    packs = bool(agreed)
    together = mpu.get_pipeline_model_parallel_world_size()
    found: dict[int, list[int]] = {}
    flights = list(itertools.batched(own, together))
    for flight in screen.progress(flights, len(flights), "generating", "batch"):
        running = [_Batch([requests[n] for n in numbers], tokenizer, packs=packs) for numbers in flight]
        while active := [one for one in running if not one.done]:
            _step(model, active)
        for numbers, one in zip(flight, running, strict=True):
            found |= dict(zip(numbers, one.made, strict=True))
    return found


def _step(model: list[torch.nn.Module], batches: Sequence[_Batch]) -> None:
    """Read the next tokens of all batches, and add one token to each sequence."""
    reading = iter(batches)
    chosen = forward.run_cached(
        model,
        ((batch.unread, batch.cache) for batch in batches),
        lambda logits: next(reading).choose(logits[:, -1]),
    )
    device, sizes = torch.cuda.current_device(), [len(batch.requests) for batch in batches]
    if chosen is None:
        tokens = torch.empty(sum(sizes), dtype=torch.int64, device=device)
    else:
        tokens = torch.cat(chosen).to(device)
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        last = mpu.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(tokens, last, group=mpu.get_pipeline_model_parallel_group())
    for batch, added in zip(batches, torch.split(tokens, sizes), strict=True):
        batch.add(added.cpu())


class _Batch:
    """Sequences that are decoded together. ``unread``, int64 [B, n], is what the model reads next.

    ``packs``: it reads the prompts at once, one after the other, [1, N].
    """

    def __init__(self, requests: Sequence[GenerationRequest], tokenizer: Tokenizer, *, packs: bool = False):
        self.requests = requests
        self._processors = requests[0].sampling.processors()
        lengths = [len(request.inputs) for request in requests]
        self._ends = [max(lengths)] * len(lengths) if packs else lengths  # of the prompts in `ids`
        longest = max(end + request.most for end, request in zip(self._ends, requests, strict=True))
        self.ids = torch.zeros(len(requests), longest, dtype=torch.int64)  # prompts, then also what was made
        for row, end, request in zip(self.ids, self._ends, requests, strict=True):
            row[:end] = request.inputs[0]  # before a shorter prompt, where it counts as repeated no more than it is
            row[end - len(request.inputs) : end] = torch.tensor(request.inputs)
        self.cache: StaticInferenceContext
        if packs:
            self.cache = decoding.Cache(lengths, longest)
            self.unread = torch.cat([torch.tensor(request.inputs) for request in requests])[None]
        else:
            self.cache = StaticInferenceContext(len(requests), longest)
            self.unread = self.ids[:, : min(lengths)]
        self.made: list[list[int]] = [[] for _ in requests]
        self._read = min(self._ends)  # columns of `ids`, after the next pass
        self._ended = [request.most < 1 for request in requests]
        self._stops = [TextEnd(request, tokenizer) for request in requests]
        self._draws = [numpy.random.default_rng(request.draw) for request in requests]

    @property
    def done(self) -> bool:
        return all(self._ended)

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token of each row, [B], from its logits [B, V]."""
        scores, read = logits.float(), self._read
        for processor in self._processors:
            scores = processor(self.ids[:, :read].to(scores.device), scores)
        if not self.requests[0].sampling.do_sample:
            return scores.argmax(-1)
        shares = scores.double().softmax(-1).cumsum(-1)  # [B, V], of float64 so that all layouts draw the same
        quantiles = [draw.random() if read >= end else 0.0 for draw, end in zip(self._draws, self._ends, strict=True)]
        wanted = torch.tensor(quantiles, dtype=torch.float64, device=shares.device)[:, None] * shares[:, -1:]
        return torch.searchsorted(shares, wanted, right=True)[:, 0].clamp(max=shares.shape[1] - 1)

    def add(self, chosen: torch.Tensor) -> None:
        """Add ``chosen`` [B] where the prompt has no next token, and note which rows have ended."""
        for row, (end, token) in enumerate(zip(self._ends, chosen.tolist(), strict=True)):
            if self._read >= end and not self._ended[row]:
                self.ids[row, self._read] = token
                self.made[row].append(token)
                self._ended[row] = self._stops[row].reached(self.made[row])
        self.unread = self.ids[:, self._read : self._read + 1]
        self._read += 1


class TextEnd:
    """When a text ends, as in ``HFLM``: each string of ``until`` is looked for in the text of the last tokens, as many
    as it is encoded in and two more."""

    def __init__(self, request: GenerationRequest, tokenizer: Tokenizer):
        self._request, self._text = request, tokenizer
        self._strings: dict[int, list[str]] = {}
        for string in request.until:
            self._strings.setdefault(len(tokenizer.encode(string)) + 2, []).append(string)

    def reached(self, made: Sequence[int]) -> bool:
        """Whether a text ends after the tokens ``made``."""
        if len(made) >= self._request.most or made[-1] in self._request.ends:
            return True
        for length, strings in self._strings.items():
            text = self._text.decode(made[-length:], special=True)
            if any(string in text for string in strings):
                return True
        return False


@dataclass(frozen=True)
class GenerationDefaults:
    """What a model says about generating: the tokens that end a text, its settings of sampling, and ``end``, the name
    of the tokenizer's own end, which lm-eval looks for in texts."""

    ends: frozenset[int]
    sampling: dict[str, Any]
    end: str | None

    @classmethod
    def read(cls, folder: Path | None, tokenizer: Tokenizer) -> GenerationDefaults:
        """From a Hugging Face ``folder``'s ``generation_config.json``, or else ``config.json``, as in transformers."""
        from transformers import AutoConfig, GenerationConfig

        own = [] if tokenizer.eod is None else [tokenizer.eod]
        end = tokenizer.decode(own, special=True) if own else None
        if folder is None or not (folder / "config.json").is_file():
            return cls(frozenset(own), {}, end)
        if (folder / "generation_config.json").is_file():
            found = GenerationConfig.from_pretrained(folder, local_files_only=True)
        else:
            found = GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder, local_files_only=True))
        ends = found.eos_token_id or []
        values = {name: getattr(found, name, None) for name in _SAMPLING if name != "do_sample"}  # lm-eval says which
        return cls(
            frozenset([*own, *(ends if isinstance(ends, list) else [ends])]),
            {name: value for name, value in values.items() if value is not None},
            end,
        )


@dataclass(frozen=True)
class GenerationSettings:
    """How a task generates: lm-eval's ``generation_kwargs``, completed by the model's defaults."""

    most: int
    until: tuple[str, ...]
    sampling: Sampling

    @classmethod
    def of(
        cls, task: str | None, given: Mapping[str, Any], defaults: GenerationDefaults, longest: int
    ) -> GenerationSettings:
        """UsageError for an unknown setting, or if no room is left for the text in ``longest`` tokens."""
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        task = task or "a task"
        if unknown := sorted(set(given) - set(_SAMPLING) - set(_LIMITS)):
            raise UsageError(
                "--tasks", got=f"{task} with {', '.join(unknown)}",
                expected=f"generation_kwargs among {', '.join([*_LIMITS[:2], *_SAMPLING])}",
                do="export the checkpoint, and run the task with lm-eval",
            )  # fmt: skip
        asked: dict[str, Any] = dict(normalize_gen_kwargs(dict(given)))
        until, most = handle_stop_sequences(asked.pop("until"), eos=defaults.end), asked.pop("max_gen_toks")
        asked = {name: value for name, value in asked.items() if name in _SAMPLING and value is not None}
        if not asked["do_sample"]:
            asked.pop("temperature", None)
        elif not asked.get("temperature", 0.0) > 0:
            raise UsageError("--tasks", got=f"{task}, sampled without one", expected="a positive temperature")
        if most >= longest:
            raise UsageError(
                "--tasks", got=f"{task}, which generates up to {most}", expected=f"fewer than {longest} new tokens",
                why="a text and its continuation are at most as long as the model reads", do="increase --seq-length",
            )  # fmt: skip
        return cls(most, tuple(until), Sampling(**{**defaults.sampling, **asked}))
