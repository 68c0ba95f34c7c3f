"""What a run learns from: the text alone (``lm``), or also a teacher's probabilities (``distill``).

The account of a run says so under ``objective``, as JSON:
    name         lm | distill
    alpha        the teacher's weight in the loss: a number, or [first step, last step]
    temperature  likewise
    kl           forward | reverse
    teacher      fingerprint of the teacher's weights
    online       true: the teacher ran in the same job; false: its probabilities came from ``cache``
    top_k        probabilities per token in the cache; null: the whole vocabulary
    cache        of a cache: its hash, range of samples, dtype, bytes, and the FLOPs of writing it
An objective may have further settings; two runs are compared only if all but ``cache`` are equal.

The teacher's forward pass costs the same per sample in either form. ``flops_teacher`` of an account is that of the
samples that the run trained on. Online, the run has executed them itself; those of a cache were executed once, for all
runs that read it (``paid``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_prune.errors import AccountError

Objective = Mapping[str, Any]

LM: dict[str, Any] = {"name": "lm"}
DISTILL = ("alpha", "temperature", "kl", "teacher", "online", "top_k")
CACHE = ("hash", "range", "bytes", "flops")


def distill(
    *,
    alpha: float | list[float],
    temperature: float | list[float],
    kl: str,
    teacher: str,
    top_k: int | None = None,
    cache: Mapping[str, Any] | None = None,
    **further: Any,
) -> dict[str, Any]:
    """The objective of a distilled run as its account states it.

    ``cache``: at least ``CACHE`` of the cache that it reads; None: online. ``further``: settings of other terms of the
    loss.
    """  # fmt: skip
    if cache is not None and (missing := [name for name in CACHE if name not in cache]):
        raise KeyError(*missing)
    stated: dict[str, Any] = {"name": "distill", "alpha": alpha, "temperature": temperature, "kl": kl}
    stated |= {"teacher": teacher, "online": cache is None, "top_k": top_k, **further}
    return stated if cache is None else {**stated, "cache": dict(cache)}


def of(account: Mapping[str, Any]) -> dict[str, Any]:
    """The objective in an account; AccountError for one that does not say how a run was distilled."""
    found = dict(account.get("objective") or LM)
    needed = () if found.get("name") == "lm" else DISTILL
    if missing := [name for name in ("name", *needed) if name not in found]:
        raise AccountError(f"objective: expected {', '.join(missing)} in the account of a run, got {sorted(found)}")
    if missing := [name for name in CACHE if name not in (found.get("cache") or dict.fromkeys(CACHE))]:
        raise AccountError(f"objective.cache: expected {', '.join(missing)}, got {sorted(found['cache'])}")
    return found


def settings(objective: Objective) -> dict[str, Any]:
    """What must be equal in two runs that are compared: everything except which cache was read, but not its type."""
    held = {name: value for name, value in objective.items() if name != "cache"}
    return held | ({"dtype": cache.get("dtype")} if (cache := objective.get("cache")) else {})


def flops_in_cache(cache: Mapping[str, Any], samples: int) -> int:
    """The share of ``samples`` in the FLOPs of writing a cache."""
    first, end = cache["range"]
    return int(cache["flops"] * samples // (end - first))


def paid(accounts: Iterable[Mapping[str, Any]]) -> int:
    """FLOPs that the teachers of all these runs executed: online per run, and every cache once."""
    caches: dict[str, int] = {}
    online = 0
    for account in accounts:
        cache = of(account).get("cache")
        if cache is None:
            online += int(account.get("flops_teacher", 0))
        else:
            caches[cache["hash"]] = int(cache["flops"])
    return online + sum(caches.values())


def words(objective: Objective) -> str:
    """``lm``; ``distill: alpha 0.5, temperature 2, forward KL, online``"""
    if objective["name"] == "lm":
        return "lm"
    alpha, temperature = (_ends(objective[name]) for name in ("alpha", "temperature"))
    form = "online" if objective["online"] else f"cache of the top {objective['top_k'] or 'all'}"
    return f"{objective['name']}: alpha {alpha}, temperature {temperature}, {objective['kl']} KL, {form}"


def _ends(value: float | list[float]) -> str:
    return f"{value:g}" if isinstance(value, int | float) else " to ".join(f"{one:g}" for one in value)
