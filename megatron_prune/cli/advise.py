"""``megatron-prune advise``: prune or train from scratch, according to a ledger of measured comparisons."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megatron_prune import verbs
from megatron_prune.cli.parser import Parser
from megatron_prune.errors import UsageError

if TYPE_CHECKING:
    from megatron_prune.study.advise.answer import Advice
    from megatron_prune.study.advise.ledgers import Measurements
    from megatron_prune.study.advise.lifetime import Served
    from megatron_prune.study.advise.question import AdvisedTarget
    from megatron_prune.study.analysis.inference import Difference


def parser() -> Parser:
    return Parser(
        "advise",
        "Says whether to prune or to train from scratch for a budget of tokens, as far as a ledger of measured "
        'comparisons can say. "Don\'t know" is an answer, with what would settle it.',
        verbs.AdviseSettings,
        example="megatron-prune advise --ratio 0.5 --tokens 400k",
    )


def main(argv: list[str]) -> int:
    """Print the advice; ``--json`` writes it too. "Don't know" is an answer, not an error."""
    options = verbs.AdviseSettings.of(parser().read(argv)[0])
    from megatron_prune import artifacts
    from megatron_prune.study.advise import answer, ledgers, lifetime, question

    if options.ledger is None and not ledgers.SHIPPED.is_file():
        raise UsageError("--ledger", got="nothing", expected="a study's folder with a report, or its results.json")
    ledger = ledgers.read(options.ledger or ledgers.SHIPPED)
    asked = question.from_settings(options, ledger.parent_params)
    advice = answer.advise(ledger, asked)
    served = lifetime.compare(ledger, asked) if asked.served is not None else None
    if options.json:
        found = to_json(ledger, asked, advice)
        if served is not None:
            found["served"] = {"advised": asdict(served[0]), "rivals": [_rival(served[0], one) for one in served[1]]}
        artifacts.write_json(options.json, found)
    print("\n".join(words(ledger, asked, advice)))
    if served is not None:
        print("\n".join(lifetime.words(*served, served=asked.served or 0.0)))
    elif asked.served is not None:
        print("served tokens: the ledger does not reach this target, so nothing is compared")
    return 0


def _rival(best: Served, rival: Served) -> dict[str, Any]:
    from megatron_prune.study.advise.lifetime import break_even

    return {**asdict(rival), "break_even": break_even(best, rival)}


def to_json(ledger: Measurements, asked: AdvisedTarget, advice: Advice) -> dict[str, Any]:
    """The advice with its question and its source."""
    return {
        "version": 1,
        "target": asked.to_json(),
        "ledger": {
            "study": ledger.study,
            "parent_params": ledger.parent_params,
            "parent_tokens": ledger.parent_tokens,
        },
        **asdict(advice),
        "words": words(ledger, asked, advice),
    }


def words(ledger: Measurements, asked: AdvisedTarget, advice: Advice) -> list[str]:
    """Text lines: the answer, then the evidence, then the measurements that would settle open questions."""
    from megatron_prune.study.grid import setting_words

    lines = [_headline(advice)]
    lines += [f"  because {reason}" for reason in advice.reasons]
    if advice.gap is not None:
        lines.append(f"  {_numbers(advice)}")
    if advice.confidence is not None and advice.gap is not None:
        lines.append(f"  confidence {_percent(advice.confidence)} ({_how(advice, advice.gap)})")
    lines += [f"  {even.rstrip('.')}" for even in advice.break_evens]
    lines += [f"  note: {caveat}" for caveat in advice.caveats]
    lines += [f"  would settle it: {measurement}" for measurement in advice.settle]
    lines.append(f"  from study {ledger.study}, {setting_words(asked.setting)}")
    return lines


def _headline(advice: Advice) -> str:
    from megatron_prune.study.advise.answer import UNKNOWN

    if advice.answer == UNKNOWN:
        lean = f" (the means lean to: {advice.lean})" if advice.lean else ""
        return f"Don't know{lean}."
    good = f"; as good within the seeds: {', '.join(advice.as_good)}" * bool(advice.as_good)
    if advice.answer == "prune":
        return f"Prune: {advice.method}{good}."
    return f"Train from scratch: shape {advice.scratch_shape}{good}."


def _numbers(advice: Advice) -> str:
    assert advice.gap is not None
    text = (
        f"test loss: {advice.method} {advice.pruned_loss:.3f}, best scratch ({advice.scratch_shape}) "
        f"{advice.scratch_loss:.3f}; scratch minus pruned {advice.gap.mean:+.3f} nats"
    )
    if advice.gap.low is None or advice.gap.high is None:
        return text
    return f"{text}, 95% interval {advice.gap.low:+.3f} to {advice.gap.high:+.3f}"


def _how(advice: Advice, gap: Difference) -> str:
    """The corrections in the confidence and the interval."""
    from megatron_prune.study.advise.best import LOOKS

    picked = f", for picking the best of {advice.picked_from} arms" * ((advice.picked_from or 1) > 1)
    return (
        f"paired over {gap.seeds} seeds, {gap.freedom:.3g} degrees of freedom; corrected for asking again with more "
        f"seeds, look {advice.look} of {len(LOOKS)}{picked}"
    )


def _percent(confidence: float) -> str:
    return "above 99.9%" if confidence > 0.999 else f"{100 * confidence:.1f}%"
