"""What ``effdl bench`` is given: lists of numbers, and shares."""

from __future__ import annotations

import math
from pathlib import Path

from effdl.errors import OutputError, UsageError

_MIN_EFFECT = 0.02  # as measure.verdict has it, which would load numpy


def parse_counts(option: str, text: str, least: int = 1) -> list[int]:
    """Read ``1,2,4``.

    Args:
        option: its name, for messages.
        text: what was written.
        least: the smallest number that makes sense.

    Raises:
        UsageError: not whole numbers of at least ``least``, or one twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise UsageError(
            f"{option} {text}: expected whole numbers of at least {least}, separated by commas",
            hint=f"{option.split(maxsplit=1)[0]} {'batch=' if 'scan' in option else ''}1,2,4",
        )
    numbers = [int(part) for part in parts]
    if len(set(numbers)) < len(numbers):
        raise UsageError(f"{option} {text}: a number is there twice")
    return numbers


def parse_scan(values: list[str] | None) -> dict[str, list[int]]:
    """Read ``["batch=1,8,32"]`` as ``{"batch": [1, 8, 32]}``.

    Raises:
        UsageError: not NAME=N,N,..., or a name twice.
    """
    scan: dict[str, list[int]] = {}
    for value in values or []:
        name, sign, numbers = value.rpartition("=")
        if not sign or not name:
            raise UsageError(
                f"--scan {value}: expected NAME=N,N,... with the name of a dynamic dimension",
                hint="--scan batch=1,8,32",
            )
        if name in scan:
            raise UsageError(f"--scan {name}: this dimension is there twice")
        scan[name] = parse_counts(f"--scan {name}", numbers)
    return scan


def parse_share(option: str, text: str) -> float:
    """Read ``5%`` or ``0.05`` as 0.05.

    Args:
        option: its name, for messages.
        text: what was written.

    Raises:
        UsageError: no number, or not between 0 and 100 %, both excluded.
    """
    number, percent, rest = text.strip().partition("%")
    try:
        value = float(number) if not rest.strip() else math.nan
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise UsageError(
            f"{option} {text}: expected a share such as 5% or 0.05", hint=f"{option} 5%"
        )
    share = value / 100 if percent else value
    if not 0 < share < 1:
        hint = f"{option} {text}%" if not percent and 1 <= value < 100 else f"{option} 5%"
        raise UsageError(f"{option} {text}: a share lies between 0 and 100 %", hint=hint)
    return share


def parse_limits(fail_if_slower: str | None, min_effect: str | None) -> tuple[float | None, float]:
    """Read ``--fail-if-slower`` and ``--min-effect``; the second follows the first when left out.

    Returns:
        The slow-down that is allowed, None when any is, and the smallest difference to tell.

    Raises:
        UsageError: a slow-down is to fail that is too small to be told.
    """
    limit = None if fail_if_slower is None else parse_share("--fail-if-slower", fail_if_slower)
    if min_effect is None:
        return limit, _MIN_EFFECT if limit is None else min(_MIN_EFFECT, limit)
    effect = parse_share("--min-effect", min_effect)
    if limit is not None and limit < effect:
        raise UsageError(
            f"--fail-if-slower {fail_if_slower} is below --min-effect {min_effect}: "
            "such a slow-down would never be told",
            hint=f"--min-effect {fail_if_slower}",
        )
    return limit, effect


def check_folder(path: Path | None) -> None:
    """Refuse a file that could not be written, before minutes are spent on what goes into it.

    Raises:
        OutputError: its folder is not there, or it is a folder itself.
    """
    if path is None:
        return
    if path.is_dir():
        raise OutputError("this is a folder, not a file", where=str(path))
    if not path.absolute().parent.is_dir():
        raise OutputError("its folder does not exist", where=str(path))
