"""One family of exceptions: what was found, what was expected, and what to change.

The command line prints the message alone (no traceback) and exits with ``EXIT_REFUSED``;
everything that is not in this family is a bug and keeps its traceback.
"""

from __future__ import annotations

EXIT_REFUSED = 2
EXIT_NEEDS_SCORES = 3  # `plan` has written its candidates; `calibrate --score` must run before it can choose


class MegatronPruneError(Exception):
    """Something that the user can fix; its text says how."""


class UsageError(MegatronPruneError):
    """A flag or a combination of flags that cannot work.

    ``UsageError("--ratio", expected="a number between 0 and 1", got=1.5)`` reads
    "--ratio: expected a number between 0 and 1, got 1.5"; ``why`` is added in brackets, ``do`` says what helps.
    """

    def __init__(self, flag: str, *, expected: str, got: object, why: str = "", do: str = ""):
        self.flag, self.expected, self.got = flag, expected, got
        reason = f" ({why})" if why else ""
        remedy = f"; {do}" if do else ""
        super().__init__(f"{flag}: expected {expected}, got {got}{reason}{remedy}")


class CommandLineError(MegatronPruneError):
    """A word of a command line that no parser knows, or a flag that is missing or lacks its value."""


class CheckpointError(MegatronPruneError):
    """A checkpoint that is missing, truncated, hostile, or not of the expected kind."""


class MasksError(CheckpointError):
    """Masks that are missing, damaged, of another model, or contradicted by the weights."""


class StorageError(MegatronPruneError):
    """An object store that did not answer as it should; nothing is known of what it holds."""


class PlanError(MegatronPruneError):
    """A pruning plan that contradicts itself or belongs to another parent."""


class DataError(MegatronPruneError):
    """A corpus, tokenizer or sample range that does not fit what is asked of it."""


class AccountError(MegatronPruneError):
    """Two runs that may not be compared, or files of one that contradict each other; names them and the field."""


class RunError(MegatronPruneError):
    """A launched job that ended without an account of its success."""
