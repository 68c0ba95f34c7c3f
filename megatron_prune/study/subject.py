"""What a comparison is about, the same for all its seeds and budgets; and how it is called."""

from __future__ import annotations

from dataclasses import dataclass

# By these, comparisons are one. A budget's verdict has its tokens beside them.
SUBJECT = ("method", "pattern", "ratio", "setting", "against", "sparse")
GROUP = (*SUBJECT, "tokens")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One method at one ratio in one setting against one kind of scratch.

    ``pattern`` is that of the method, or of a chain's last link; ``sparse``: what is trained on has masks, which a
    chain's may have of an earlier link.
    """

    method: str
    pattern: str | None
    ratio: float | None
    setting: str
    against: str  # masked or dense
    sparse: bool

    @property
    def label(self) -> str:
        return label(self.method, self.pattern, self.ratio)

    @property
    def dense(self) -> bool:
        """True where a sparse model stands against one that has all its weights."""
        return self.sparse and self.against == "dense"

    @property
    def subject(self) -> str:
        """``shortgpt, 50% removed, equal training tokens``"""
        return f"{self.label}, {setting_words(self.setting)}{', against dense scratch' * self.dense}"


def setting_words(setting: str) -> str:
    """``equal training tokens``"""
    return "equal FLOPs" if setting == "equal-flops" else f"{setting.replace('-', ' ')} tokens"


def label(method: str, pattern: str | None, ratio: float | None) -> str:
    """``shortgpt, 50% removed``; ``wanda 2:4, 50% removed``"""
    name = method if pattern is None else f"{method} {pattern}"
    return name if ratio is None else f"{name}, {100 * ratio:g}% removed"
