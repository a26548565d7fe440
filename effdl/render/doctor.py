"""The result of ``effdl doctor``."""

from __future__ import annotations

import dataclasses

from rich.text import Text

from effdl.render.console import out
from effdl.render.numbers import size
from effdl.render.roof import peaks_line
from effdl.report import DoctorReport

_BYTES = ("memory", "free_memory", "disk")


def print_doctor(report: DoctorReport) -> None:
    """Print every fact on a line, then what is wrong."""
    console = out()
    for field in dataclasses.fields(report):
        value = getattr(report, field.name)
        if field.name == "peaks" and not value:
            continue
        if field.name == "problems" or (value in ("", {}, 0) and field.name != "cores"):
            continue
        if field.name in _BYTES:
            text = size(value)
        elif field.name == "peaks":
            text = "; ".join(
                f"{p.threads or 'all'} thread{'s' if p.threads != 1 else ''}: {peaks_line(p)}"
                for p in value
            )
        elif field.name == "tools":
            text = ", ".join(f"{k}: {v or 'not found'}" for k, v in value.items())
        elif isinstance(value, dict):
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
