"""The exceptions that this package raises for problems that the user can fix.

The command line prints only the message, without a traceback, and exits with ``EXIT_REFUSED``.
Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator

EXIT_REFUSED = 2
EXIT_NEEDS_SCORES = 3  # `plan` has written its candidates; `calibrate --score` must run before it can choose
EXIT_NOT_FINITE = 4  # a loss, a gradient or a weight of a training run is NaN or infinite
EXIT_UNAVAILABLE = 5  # a store did not answer: the same command may succeed later


class MegatronPruneError(Exception):
    """A problem that the user can fix; the message says how, on one line unless ``lines`` is set."""

    exit_code = EXIT_REFUSED
    lines = False  # the message may have several lines; otherwise a line break in it is part of a name


class UsageError(MegatronPruneError):
    """A flag or a combination of flags that cannot work.

    ``UsageError("--ratio", expected="a number between 0 and 1", got=1.5)`` reads
    "--ratio: expected a number between 0 and 1, got 1.5". ``why`` is added in parentheses; ``do`` is the remedy.
    """

    def __init__(self, flag: str, *, expected: str, got: object, why: str = "", do: str = ""):
        self.flag, self.expected, self.got = flag, expected, got
        reason = f" ({why})" if why else ""
        remedy = f"; {do}" if do else ""
        super().__init__(f"{flag}: expected {expected}, got {got}{reason}{remedy}")


class CommandLineError(MegatronPruneError):
    """An unknown argument on the command line, a missing flag, or a flag without its value."""


class CheckpointError(MegatronPruneError):
    """A checkpoint that is missing, truncated, malicious, or not of the expected kind."""


class MasksError(CheckpointError):
    """Masks that are missing, damaged, made for another model, or inconsistent with the weights."""


class StorageError(MegatronPruneError):
    """An object store that failed to answer, so that its content is unknown."""

    exit_code = EXIT_UNAVAILABLE


class PlanError(MegatronPruneError):
    """A pruning plan that is inconsistent or belongs to another parent."""


class DataError(MegatronPruneError):
    """A corpus, tokenizer or sample range that does not fit the request."""


class AccountError(MegatronPruneError):
    """Runs that must not be compared, or inconsistent files of one run; the message names them and the field."""


class RunError(MegatronPruneError):
    """A launched job that ended without a record of its success."""

    lines = True


class NotFiniteError(RunError):
    """A training run whose loss, gradients or weights are NaN or infinite."""

    exit_code = EXIT_NOT_FINITE


def error_chain(error: BaseException | None) -> Iterator[BaseException]:
    """``error``, then what caused it, and so on, each once: chains can be cyclic."""
    passed: set[int] = set()
    while error is not None and id(error) not in passed:
        passed.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
