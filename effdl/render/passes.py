"""Prints the passes."""

from __future__ import annotations

from collections.abc import Sequence

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from effdl.recipe import OptionInfo, PassInfo
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
    console = out()
    console.print(Text(info.name, style="bold"))
    console.print(info.summary)
    for heading, body in info.sections.items():
        console.print()
        console.print(Text(heading, style="bold"))
        console.print(Padding(Text(body), (0, 0, 0, 2)))
    console.print()
    console.print(Text("Facts", style="bold"))
    for line in _facts(info):
        console.print(Padding(Text(line), (0, 0, 0, 2)))
    console.print()
    console.print(Text("Options" if info.options else "No options", style="bold"))
    for option in info.options:
        _print_option(option)


def _print_option(option: OptionInfo) -> None:
    console = out()
    default = "required" if option.default is None else f"default {option.default}"
    head = Text.assemble((option.name, "bold"), f": {option.type}; {default}")
    console.print(Padding(head, (0, 0, 0, 2)))
    console.print(Padding(Text(option.description), (0, 0, 0, 6)))


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
