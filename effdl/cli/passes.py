"""``effdl passes``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from effdl.cli.options import Json


def passes(
    name: Annotated[str | None, typer.Argument(help="Show this pass in full.")] = None,
    json: Json = False,
) -> None:
    """List the passes a recipe can use, or show one: what it does, when it helps, its options."""
    from effdl import recipe
    from effdl.render import passes as render
    from effdl.render.console import print_json
    from effdl.report import SCHEMA, to_json

    if name is not None:
        info = recipe.describe_pass(name)
        if json:
            print_json(to_json(info))
        else:
            render.print_pass(info)
        return
    infos = recipe.describe_passes()
    if json:
        print_json({"schema": SCHEMA, "passes": [asdict(i) for i in infos]})
    else:
        render.print_passes(infos)
