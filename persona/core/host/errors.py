"""Every error persona raises on purpose. Each says what, why, and in `hint` the line to type; commands print both and
exit with `exit_code`, never with a traceback (`--debug` shows it)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PersonaError(Exception):
    """Root of all errors a user can meet. `hint` is the line to type next; `exit_code` is 1 (it failed)."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class UsageError(PersonaError):
    """The command or the call was put together wrongly: unknown name, option out of range."""

    exit_code = 2


class UnreadableFile(PersonaError):
    """A file is not what it should be: truncated, hostile, of an unknown kind."""


class DataError(PersonaError):
    """The user's pictures or captions cannot be trained on as they are."""


class BaseModelError(PersonaError):
    """The base model cannot be found, or has missing or unknown weights."""


class ConversionError(PersonaError):
    """The target cannot hold what the source means, or the meaning is not decided."""


class NoPlace(ConversionError):
    """The target has no name or no place for one module, which can therefore be left out; `module` is its name,
    `reason` what stands in the way."""

    def __init__(self, module: str, reason: str) -> None:
        super().__init__(f"{module}: {reason}.", hint="--drop leaves such modules out and lists them.")
        self.module, self.reason = module, reason


class OutputExists(PersonaError):
    """Something is already where the result should go; persona overwrites nothing unasked."""


class UnwritableOutput(PersonaError):
    """The place where the result should go cannot be written: no such folder, no permission, disk full."""


class TrainingError(PersonaError):
    """A run cannot start or go on: not finite, out of memory, disk full."""


class NotFinite(TrainingError):
    """A loss, gradient or weight is infinite or not a number: the run has come apart."""


class ResumeError(PersonaError):
    """A checkpoint does not belong to this run as it is asked for now."""


class BackendMissing(PersonaError):
    """The framework that was asked for is not installed, or not usable."""


class PluginError(PersonaError):
    """A plugin is broken; the message names its package and the reason."""


def closest(word: str, known: Iterable[str], *, count: int = 3) -> list[str]:
    """The `count` names in `known` nearest to `word`, best first (for "did you mean …?")."""
    return difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`Did you mean a, b?`, or the known names when nothing is near, or nothing when none are known."""
    names = list(known)
    near = closest(word, names)
    if near:
        return f"Did you mean {', '.join(near)}?"
    return f"Known: {', '.join(sorted(names)[:20])}." if names else ""


def one_of(word: str, known: Iterable[str]) -> str:
    """All the known names, with the nearest in front: for a few that are worth listing whole."""
    names = list(known)
    near = closest(word, names)
    meant = f"Did you mean {', '.join(near)}? " if near else ""
    return f"{meant}There are: {', '.join(names)}."


class Interrupted(PersonaError):
    """The user stopped a run; what was done is saved."""

    exit_code = 130
