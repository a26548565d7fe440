"""Where things are printed: data on stdout, talk on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console

_QUIET = Console(quiet=True)


def out() -> Console:
    """Return the console on stdout: tables and data. Piped, it is 100 columns wide without colour."""
    return _console(sys.stdout)


def err(quiet: bool = False) -> Console:
    """Return the console on stderr: progress, warnings, errors; silent when ``quiet``."""
    return _QUIET if quiet else _console(sys.stderr)


def _console(stream: Any) -> Console:
    width = None if stream.isatty() else 100
    return Console(
        file=stream, width=width, highlight=False, soft_wrap=False, emoji=False, markup=False
    )


def print_json(data: Mapping[str, Any]) -> None:
    """Write ``data`` to stdout as indented JSON; ``"schema"`` is in it already."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def print_error(message: str, hint: str = "") -> None:
    """Write ``effdl: error: ...`` and, if there is one, the hint, to stderr."""
    sys.stderr.write(f"effdl: error: {message}\n")
    if hint:
        sys.stderr.write(f"  hint: {hint}\n")


def print_warning(message: str) -> None:
    """Write ``effdl: warning: ...`` to stderr."""
    sys.stderr.write(f"effdl: warning: {message}\n")
