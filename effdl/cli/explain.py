"""``effdl explain``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effdl.cli.options import (
    Data,
    Dim,
    Json,
    Preprocess,
    Python,
    Quiet,
    Threads,
    data_source,
    parse_dims,
    target_spec,
)
from effdl.errors import UsageError

if TYPE_CHECKING:
    from effdl.data.spec import Source

_LAYERS = "quantize"
"""Not a pass: the table of layers."""


def explain(
    name: Annotated[
        str,
        typer.Argument(
            metavar="PASS", help="The pass, see effdl passes; or quantize: every layer."
        ),
    ],
    model: Annotated[Path, typer.Argument(help="The model; nothing is written.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="OPTION=VALUE", help="An option of the pass."),
    ] = None,
    target: Annotated[str, typer.Option("--target", help="Where the result is to run.")] = "cpu",
    python: Python = None,
    as_is: Annotated[
        bool, typer.Option("--as-is", help="Do not simplify the model first, as recipes do.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="Every node, however many.")] = False,
    data: Data = None,
    preprocess: Preprocess = None,
    dim: Dim = None,
    threads: Threads = 1,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.1, help="quantize: time to measure each form.")
    ] = 3.0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a pass finds in a model and, where it does not fit, the first condition that failed.

    Works on a copy: nothing is run, measured or written. Exit code 0 whatever it finds.

    effdl explain quantize MODEL measures: for every layer number types, range, error at the outputs,
    time in float and in 8 bits, and whether it had better stay float. With --data ranges come from them.
    """
    from effdl import api
    from effdl.render import explain as render
    from effdl.render.console import print_json
    from effdl.report import to_json

    if name == _LAYERS:
        if target != "cpu" or python or overrides or as_is:
            raise UsageError(
                "explain quantize measures on this machine's CPU, without --target, --python, --set "
                "and --as-is",
                hint="effdl optimize -c int8 --target ... measures elsewhere",
            )
        given = data_source(data, preprocess)
        _explain_layers(model, given, dim, threads, seconds, every, json, quiet)
        return
    if data is not None or dim:
        raise UsageError(
            f"explain {name} takes no --data and no --dim: nothing is run",
            hint="effdl explain quantize MODEL measures",
        )
    report = api.explain(
        model,
        name,
        overrides=overrides or (),
        target=target_spec(target, python),
        simplify=not as_is,
    )
    if json:
        print_json(to_json(report))
        return
    render.print_explain(report, whole=every)


def _explain_layers(
    model: Path,
    data: Path | Source | None,
    dim: list[str] | None,
    threads: int,
    seconds: float,
    every: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Measure and print the table of layers."""
    from effdl import api
    from effdl.render.console import print_json
    from effdl.render.layers import print_layers
    from effdl.render.progress import live
    from effdl.report import to_json

    with live(quiet or json) as show:
        found = api.explain_quantize(
            model,
            data=data,
            dims=parse_dims(dim),
            threads=threads,
            seconds=seconds,
            progress=show,
        )
    if json:
        print_json(to_json(found))
    elif not quiet:
        print_layers(found, whole=every)
