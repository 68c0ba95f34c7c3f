"""Minitron-width (2407.14679, 2408.11796): remove hidden channels, heads and FFN channels by activation.

A channel's importance in a layer is √Σ_b (mean_t |x|)², with tokens t and sequences b:

* hidden channels: at the outputs of both norms of every block, summed over norms; one choice for the
  whole model. Neither reference includes the final norm: ``--include-final-norm`` adds it.
* FFN channels: at linear_fc2's input, per layer.
* heads: at linear_proj's input, L2 over a head's dimensions, per layer, ranked inside each query
  group. Whole groups are removed if the target has fewer. A group's importance is the sum of its heads'; the
  authors' library (NVIDIA ModelOpt, which has the same importance of channels and heads) takes their L2 norm.

The shape that meets ``--ratio`` or ``--target-params`` comes from a rule (structured/target.py) or, with
``--search AXIS …``, from the model: every shape near the target is evaluated, cut as above, and the one with the
lowest loss on the calibration text, without retraining, is chosen. Few windows sort out most shapes
(methods/halving.py). With the axis ``depth`` shapes with fewer layers compete too: for each number of layers, the
run of layers that costs least is found first, at full width, as minitron-depth does. ``--target-shapes`` names the
competing shapes, which are all scored on all windows.

A shape that starts worse may learn faster. With ``--retrain-candidates K --retrain-tokens T`` the K best shapes are
cut and trained on T tokens each (the verb ``retrain-candidates``), and the one with the lowest loss on the same
calibration text afterwards is chosen. The trained models are discarded: the plan cuts the parent, and K·T counts as
tokens that pruning itself trained on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from megatron_prune.errors import UsageError
from megatron_prune.methods.base import WIDTH, NearTie, PruningRequest, RankingMethod, Retraining, Search, Selection
from megatron_prune.methods.options import AXES, MinitronWidthOptions
from megatron_prune.methods.ranking import keep_heads, keep_highest

_GIVEN = ("hidden_size", "num_attention_heads", "ffn_hidden_size")  # the sizes in each value of --target-shapes


class MinitronWidth(RankingMethod[MinitronWidthOptions]):
    dimensions = WIDTH

    def search(self, settings: MinitronWidthOptions) -> Search | None:
        chosen, limit, shapes = settings.search, settings.max_candidates, settings.target_shapes
        if limit is not None and (chosen is None or limit < 1):
            needed = "--search with it" if chosen is None else "an integer of at least 1"
            raise UsageError("--max-candidates", got=limit, expected=needed)
        if shapes is not None:
            if chosen is not None:
                raise UsageError("--search", got="--target-shapes", expected="--ratio or --target-params with it")
            given = _given(shapes)
            return Search(_GIVEN, len(given), _retraining(settings, len(given), "the number of shapes, "), given)
        if chosen is None:
            _retraining(settings, 0)
            return None
        axes = tuple(field for axis, field in AXES.items() if axis in chosen)
        return Search(axes, limit, _retraining(settings, limit))

    def needs(self, settings: MinitronWidthOptions) -> tuple[str, ...]:
        sites = ["input_layernorm", "pre_mlp_layernorm", "attention", "mlp"]
        if settings.include_final_norm:
            sites.append("final_layernorm")
        return tuple(f"{site}.sum_abs_mean_sq" for site in sites)

    def select(self, request: PruningRequest[MinitronWidthOptions]) -> Selection:
        source, target, settings = request.source, request.target, request.settings
        layers = request.layers or tuple(range(source.num_layers))
        importance = {}
        for key in self.needs(settings):
            site, sums = key.split(".")[0], request.statistics[key]
            importance[site] = (sums if sums.dim() == 1 else sums[list(layers)]).sqrt()  # layers that go do not count
        near: list[NearTie] = []

        hidden = None
        if target.hidden_size < source.hidden_size:
            scores = importance["input_layernorm"].sum(0) + importance["pre_mlp_layernorm"].sum(0)  # [h]
            if settings.include_final_norm:
                scores = scores + importance["final_layernorm"]
            hidden, ties = keep_highest(scores, target.hidden_size, "hidden")
            near += ties

        heads = None
        if target.num_attention_heads < source.num_attention_heads:
            context = importance["attention"].view(len(layers), source.num_attention_heads, -1)  # [L, H, d]
            per_head = torch.linalg.vector_norm(context, dim=2)  # [L, H]
            chosen = [keep_heads(scores, source, target, n) for n, scores in zip(layers, per_head, strict=True)]
            heads = tuple(kept for kept, _ in chosen)
            near += [tie for _, ties in chosen for tie in ties]

        ffn = None
        if target.ffn_hidden_size < source.ffn_hidden_size:
            chosen = [
                keep_highest(scores, target.ffn_hidden_size, "ffn", layer=n)
                for n, scores in zip(layers, importance["mlp"], strict=True)
            ]
            ffn = tuple(kept for kept, _ in chosen)
            near += [tie for _, ties in chosen for tie in ties]

        return Selection(layers, hidden, heads, ffn, tuple(near))


def _given(words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Sizes of the shapes in ``--target-shapes``; UsageError if they are malformed or fewer than two."""
    for word in words:
        if not re.fullmatch(r"[1-9][0-9]*(/[1-9][0-9]*){2}", word):
            raise UsageError("--target-shapes", got=word, expected="HIDDEN/HEADS/FFN, such as 2432/32/6144")
        if words.count(word) > 1:
            raise UsageError("--target-shapes", got=f"{word} twice", expected="each shape once")
    if len(words) < 2:
        raise UsageError(
            "--target-shapes", got=words[0], expected="at least two shapes",
            do="for one shape give --target-hidden-size, --target-num-attention-heads and --target-ffn-hidden-size",
        )  # fmt: skip
    return tuple(tuple(map(int, word.split("/"))) for word in words)


def _retraining(
    settings: MinitronWidthOptions, limit: int | None, called: str = "--max-candidates "
) -> Retraining | None:
    """The retraining that ``--retrain-…`` ask for, of up to ``limit`` candidates; UsageError if it is impossible."""
    count, tokens = settings.retrain_candidates, settings.retrain_tokens
    if count is None and tokens is None:
        return None
    if limit == 0:
        flag, given = ("--retrain-candidates", count) if count is not None else ("--retrain-tokens", tokens)
        raise UsageError(flag, got=f"{given} alone", expected="--search or --target-shapes with it")
    if count is None or count < 2 or (limit is not None and count > limit):
        expected = "at least 2" if limit is None else f"a number from 2 to {called}{limit}"
        raise UsageError("--retrain-candidates", got="nothing" if count is None else count, expected=expected)
    if tokens is None or tokens < 1:
        expected = "a positive number of tokens with --retrain-candidates"
        raise UsageError("--retrain-tokens", got="nothing" if tokens is None else tokens, expected=expected)
    return Retraining(count, tokens)


METHOD = MinitronWidth()
