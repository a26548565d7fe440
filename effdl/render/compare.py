"""The result of ``effdl compare``."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from effdl.render.console import out
from effdl.render.numbers import error
from effdl.report import CompareReport, LocateReport, TensorError


def print_compare(report: CompareReport) -> None:
    """Print a row per output and the verdict; then, if that was asked for, where the models part."""
    console = out()
    has_top1 = any(o.top1 is not None for o in report.outputs)
    has_kl = any(o.kl is not None for o in report.outputs)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("output", overflow="fold")
    columns = ["max abs", "rel L2", "cosine", "SQNR"]
    columns += ["top-1"] * has_top1 + ["KL"] * has_kl
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for o in report.outputs:
        table.add_row(
            o.name,
            error(o.max_abs),
            error(o.rel_l2),
            f"{o.cosine:.6f}",
            f"{o.sqnr_db:.1f} dB",
            *(["" if o.top1 is None else f"{o.top1:.1%}"] * has_top1),
            *(["" if o.kl is None else error(o.kl)] * has_kl),
            Text("equal" if o.equal else "differs", style="green" if o.equal else "red"),
        )
    console.print(table)
    for o in report.outputs:
        if not o.equal and not o.reason:
            console.print(f"{o.name}: beyond the tolerance of {o.tolerance:g}", overflow="fold")
        if o.reason:
            console.print(f"{o.name}: {o.reason}", overflow="fold")
    for note in report.notes:
        console.print(note, overflow="fold")
    kind = (
        f"from {report.source}"
        if report.real
        else "random: weak evidence, --data FILE.npz is better"
    )
    verdict = "equal within tolerance" if report.equal else "NOT equal"
    style = "bold green" if report.equal else "bold red"
    console.print(Text(f"{verdict} on {report.feeds} feeds ({kind})", style=style))
    if report.located is not None:
        _print_located(report.located)


def _print_located(found: LocateReport) -> None:
    console = out()
    runs = "as ONNX Runtime optimizes them" if found.optimized else "as they are written"
    lost = f", {found.unmatched} have no counterpart" if found.unmatched else ""
    console.print()
    console.print(f"{found.compared} tensors inside compared, both graphs {runs}{lost}")
    for note in found.notes:
        console.print(note, overflow="fold")
    if found.first is None:
        console.print("no tensor inside differs beyond tolerance")
    else:
        _print_first(found.first)
    if not found.jumps:
        return
    console.print()
    console.print("What hurts the outputs, each step by itself, worst first:")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("node", overflow="fold")
    table.add_column("op", overflow="fold")
    for name in ("error", "alone", "unrounded", "output"):
        table.add_column(name, justify="right", no_wrap=True)
    for jump in found.jumps:
        table.add_row(
            jump.node or jump.tensor,
            jump.op_type or "input",
            error(jump.error),
            error(jump.alone),
            "" if jump.unrounded is None else error(jump.unrounded),
            error(jump.effect),
        )
    console.print(table)
    console.print(
        "Relative errors. error: of its result in the whole candidate; alone: given the reference's "
        "tensors; unrounded: that before the result is quantized; output: of the worst output, if "
        "nothing but this step were the candidate's",
        style="dim",
    )


def _print_first(first: TensorError) -> None:
    console = out()
    console.print(f"first to differ: '{first.tensor}'", style="bold", overflow="fold")
    made = f"{first.op_type} '{first.node}'" if first.op_type else "a graph input, rounded"
    there = f"{first.other_op} '{first.other_node}'" if first.other_op else ""
    console.print(f"  made by {made}", overflow="fold")
    if there and there != made:
        console.print(f"  in the candidate by {there}, as '{first.other}'", overflow="fold")
    if first.reason:
        console.print(f"  {first.reason}", overflow="fold")
        return
    rounded = "" if first.unrounded is None else f", {error(first.unrounded)} before it is rounded"
    console.print(
        f"  relative error {error(first.error)}{rounded}, largest difference "
        f"{error(first.max_abs)}, tolerance {first.tolerance:g}"
    )
    if first.inputs:
        read = ", ".join(f"'{n}' {error(e)}" for n, e in first.inputs[:4])
        console.print(f"  it reads {read}", overflow="fold")
