"""Prints recipes: the presets, one of them, what is wrong with one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from effdl.render.console import err, out
from effdl.report import SCHEMA

if TYPE_CHECKING:  # listing presets loads no pass and no graph library
    from effdl.recipe import CheckReport, PresetInfo


def print_presets(presets: Sequence[PresetInfo]) -> None:
    """Print one row per preset."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("preset", no_wrap=True)
    table.add_column("target", no_wrap=True)
    table.add_column("what it does", overflow="fold")
    for preset in presets:
        table.add_row(preset.name, preset.target, preset.description)
    console = out()
    console.print(table)
    console.print()
    console.print(
        "effdl recipe show NAME prints one; effdl optimize MODEL -c NAME runs it.", style="dim"
    )


def print_yaml(text: str) -> None:
    """Write a YAML file to stdout as it is."""
    out().file.write(text)


def print_check(name: str, report: CheckReport) -> None:
    """Print every fault of a recipe, or that it has none; notes go to stderr."""
    console = out()
    for error in report.errors:
        console.print(Text(str(error)), soft_wrap=True)
        if error.hint:
            console.print(Text(f"  hint: {error.hint}", style="dim"), soft_wrap=True)
    for note in report.notes:
        err().print(Text(f"note: {note}"), soft_wrap=True)
    if report.recipe is not None and not report.errors:
        steps = ", ".join(s.name for s in report.recipe.passes)
        console.print(Text(f"{name}: ok ({steps})"), soft_wrap=True)


def check_json(name: str, report: CheckReport) -> dict[str, Any]:
    """Return what a check found as plain data."""
    from effdl.recipe import to_dict

    return {
        "schema": SCHEMA,
        "file": name,
        "ok": not report.errors,
        "errors": [{"where": e.where, "message": e.message, "hint": e.hint} for e in report.errors],
        "notes": list(report.notes),
        "recipe": to_dict(report.recipe) if report.recipe is not None else None,
    }


def print_written(file: Path) -> None:
    """Say which file was written and what to do with it."""
    out().print(Text(str(file)), soft_wrap=True)
    err().print(Text(f"edit it, then: effdl recipe check {file}"), soft_wrap=True)
