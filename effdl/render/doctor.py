"""The result of ``effdl doctor``."""

from __future__ import annotations

import dataclasses

from rich.text import Text

from effdl.render.console import out
from effdl.report import DoctorReport


def print_doctor(report: DoctorReport) -> None:
    """Print every fact on a line, then what is wrong."""
    console = out()
    for field in dataclasses.fields(report):
        if field.name == "problems":
            continue
        value = getattr(report, field.name)
        if isinstance(value, dict):
            text = ", ".join(f"{k} {v if v != '' else 'not installed'}" for k, v in value.items())
        elif isinstance(value, list | tuple):
            text = ", ".join(str(v) for v in value) or "none"
        else:
            text = str(value)
        console.print(f"{field.name.replace('_', ' '):<14} {text}", overflow="fold")
    for problem in report.problems:
        console.print(Text(f"problem: {problem}", style="yellow"), overflow="fold")
    if not report.problems:
        console.print(Text("no problems found", style="green"))
