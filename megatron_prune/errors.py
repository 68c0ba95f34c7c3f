"""One family of exceptions: what was found, what was expected, and what to change.

The command line prints the message alone (no traceback) and exits with ``EXIT_REFUSED``;
everything that is not in this family is a bug and keeps its traceback.
"""

from __future__ import annotations

EXIT_REFUSED = 2
EXIT_NEEDS_SCORES = 3  # `plan` has written its candidates; `calibrate --score` must run before it can choose


class MegatronPruneError(Exception):
    """Something that the user can mend; its text says how."""


class UsageError(MegatronPruneError):
    """A flag or a combination of flags that cannot work.

    ``UsageError("--ratio", given=1.5, allowed="a number between 0 and 1")``
    """

    def __init__(self, flag: str, *, given: object, allowed: str, why: str = ""):
        self.flag, self.given, self.allowed = flag, given, allowed
        reason = f" ({why})" if why else ""
        super().__init__(f"{flag}: given {given}, allowed is {allowed}{reason}")


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
