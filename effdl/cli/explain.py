"""``effdl explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effdl.cli.options import Json, Python, target_spec


def explain(
    name: Annotated[str, typer.Argument(metavar="PASS", help="The pass, see effdl passes.")],
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
    json: Json = False,
) -> None:
    """Show what a pass finds in a model and, where it does not fit, the first condition that failed.

    Works on a copy: nothing is run, measured or written. Exit code 0 whatever it finds.
    """
    from effdl import api
    from effdl.render import explain as render
    from effdl.render.console import print_json
    from effdl.report import to_json

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
