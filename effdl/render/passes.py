"""Prints the passes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from effdl.recipe import PassInfo
from effdl.render.console import out


def print_passes(infos: Sequence[PassInfo]) -> None:
    """Print one line per pass."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("pass", no_wrap=True)
    table.add_column("outputs", no_wrap=True)
    table.add_column("needs", no_wrap=True)
    table.add_column("what it does", overflow="fold")
    for info in infos:
        table.add_row(info.name, _outputs(info), _needs(info), info.summary.rstrip("."))
    console = out()
    console.print(table)
    console.print()
    console.print("effdl passes NAME shows one in full.", style="dim")


def print_pass(info: PassInfo) -> None:
    """Print everything about one pass."""
    out().print(Text(info.name, style="bold"))
    _print(info.summary)
    for heading, body in info.sections.items():
        _heading(heading)
        for line in body.splitlines():
            _print(line, 2)
    _heading("Facts")
    for line in _facts(info):
        _print(line, 2)
    _heading("Options" if info.options else "No options")
    for option in info.options:
        default = "required" if option.default is None else f"default {option.default}"
        _print(f"{option.name}: {option.type}; {default}", 2)
        _print(option.description, 6)


def _heading(text: str) -> None:
    out().print()
    out().print(Text(text, style="bold"))


def _print(text: str, indent: int = 0) -> None:
    """Print wrapped text; rich would fill indented lines up with blanks."""
    width = min(out().width, 100)
    margin = " " * indent
    for line in textwrap.wrap(text, width, initial_indent=margin, subsequent_indent=margin):
        out().print(Text(line), soft_wrap=True)


def _facts(info: PassInfo) -> list[str]:
    lines = [
        "lossy: outputs may change" if info.lossy else "lossless: equal outputs, up to rounding",
        "needs calibration data" if info.needs_data else "needs no data",
    ]
    if info.min_opset:
        lines.append(f"does nothing below opset {info.min_opset}")
    lines += [f"not after {glob}: {reason}" for glob, reason in info.not_after.items()]
    return lines


def _outputs(info: PassInfo) -> str:
    return "lossy" if info.lossy else "equal"


def _needs(info: PassInfo) -> str:
    needs = ["data"] if info.needs_data else []
    if info.min_opset:
        needs.append(f"opset {info.min_opset}")
    return ", ".join(needs)
