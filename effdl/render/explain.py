"""The result of ``effdl explain``."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from effdl.render.console import out
from effdl.render.words import plural
from effdl.report import ExplainReport

_MOST = 40
"""Rows of one kind that a terminal is given; --json has all."""


def print_explain(report: ExplainReport, *, whole: bool = False) -> None:
    """Print what the pass would do and, for what it would not, the first condition that failed.

    Args:
        report: what was found.
        whole: every node, however many.
    """
    console = out()
    after = ", after simplify" if report.simplified else ""
    console.print(Text(f"{report.name} on {report.path or 'the model'}{after}", style="bold"))
    if report.changes:
        console.print(Text(f"{plural(report.changes, 'place')} found", style="green"))
    else:
        console.print(Text(f"nothing to do: {report.reason}", style="yellow"))
    _print(console, "would change", report.touched, whole)
    _print(console, "left alone", report.skipped, whole)


def _print(console: Console, heading: str, rows: Sequence[tuple[str, str]], whole: bool) -> None:
    """Print nodes under the text that goes for them; nodes with the same one stand together."""
    if not rows:
        return
    groups: dict[str, list[str]] = {}
    for name, text in rows:
        groups.setdefault(text, []).append(name)
    console.print()
    console.print(Text(f"{heading} ({len(rows)})", style="bold"))
    shown = list(groups.items()) if whole else list(groups.items())[:_MOST]
    for text, names in shown:
        listed = names if whole else names[:4]
        more = f", and {len(names) - len(listed)} more" if len(names) > len(listed) else ""
        _wrapped(console, text, 2, "")
        _wrapped(console, ", ".join(listed) + more, 4, "dim")
    if len(groups) > len(shown):
        console.print(Text(f"  and {len(groups) - len(shown)} other reasons (--all)", style="dim"))


def _wrapped(console: Console, text: str, indent: int, style: str) -> None:
    """Print a text with a margin; rich would fill indented lines up with blanks."""
    margin = " " * indent
    for line in textwrap.wrap(text, console.width, initial_indent=margin, subsequent_indent=margin):
        console.print(Text(line, style=style), soft_wrap=True)
