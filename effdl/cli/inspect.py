"""``effdl inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effdl.cli.options import Dim, Json, parse_dims


def inspect(
    models: Annotated[list[Path], typer.Argument(help="One model, or several side by side.")],
    dim: Dim = None,
    nodes: Annotated[bool, typer.Option("--nodes", help="List every node with its cost.")] = False,
    channels: Annotated[
        bool,
        typer.Option(
            "--channels",
            help="List the groups of channels that can be removed, and what stops others.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Show what is in a model, and what effdl could do.

    Ops, parameters, MACs, bytes by dtype, opset and dynamic dimensions. Runs nothing: works on
    models with operators that this ONNX Runtime does not have.
    """
    from effdl import api
    from effdl.render import inspect as render
    from effdl.render.console import print_json
    from effdl.report import SCHEMA, to_json

    dims = parse_dims(dim)
    reports = [api.inspect(m, dims=dims, nodes=nodes, channels=channels) for m in models]
    if json:
        print_json({"schema": SCHEMA, "models": [to_json(r) for r in reports]})
        return
    render.print_inspect(reports)
