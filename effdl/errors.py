"""The user's faults, one tree; every class carries the exit code the command ends with.

EffdlError (2)
├── UsageError   (2)  a command-line value that does not fit
├── RecipeError  (2)  an unknown key, pass, option or pattern; ``where`` is file:line:column
├── ModelError   (2)  not an ONNX model, an invalid graph, weights missing, an operator that cannot run
├── DataError    (2)  calibration or evaluation data that does not fit the model
├── OutputError  (2)  the result cannot be written
├── TargetError  (3)  the provider or device is not available
└── CheckFailed  (1)  a check or a budget was missed

A bug of ours is never an EffdlError: it stays the plain exception it is.
"""

from __future__ import annotations


class EffdlError(Exception):
    """A fault of the input, told in one line.

    Args:
        message: what is wrong, one sentence without a final stop.
        hint: what to do next, if something can be done.
        where: the place, such as ``recipe.yaml:3:5`` or a file name.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str = "", where: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.where = where

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class UsageError(EffdlError):
    """A command-line value that does not fit."""


class RecipeError(EffdlError):
    """A recipe that cannot be used; ``where`` is file:line:column."""


class ModelError(EffdlError):
    """A file that is no usable ONNX model."""


class DataError(EffdlError):
    """Data that does not fit the model's inputs."""


class OutputError(EffdlError):
    """A result that cannot be written."""


class TargetError(EffdlError):
    """A provider or device that is not there."""

    exit_code = 3


class CheckFailed(EffdlError):
    """A check or a budget that was missed.

    Args:
        report: of the run, for who wants to show it; None when there is none.
    """

    exit_code = 1

    def __init__(
        self, message: str, *, hint: str = "", where: str = "", report: object = None
    ) -> None:
        super().__init__(message, hint=hint, where=where)
        self.report = report


def nearest(word: str, choices: object) -> str:
    """Return ``did you mean 'x'?`` for the closest of ``choices``, or the list when none is close.

    Args:
        word: what was written.
        choices: an iterable of the valid names.
    """
    import difflib

    names = sorted(str(c) for c in choices)  # type: ignore[attr-defined]
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(names)}" if names else ""
