"""``effdl recipe list|show|check|schema|init``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from effdl.cli.options import Json

recipe_app = typer.Typer(
    help="List, show, check and start recipes.", no_args_is_help=True, rich_markup_mode=None
)


@recipe_app.command("list")
def list_presets(json: Json = False) -> None:
    """List the shipped presets."""
    from effdl.recipe import presets
    from effdl.render import recipe as render
    from effdl.render.console import print_json
    from effdl.report import SCHEMA

    found = presets()
    if json:
        print_json({"schema": SCHEMA, "presets": [asdict(p) for p in found]})
    else:
        render.print_presets(found)


@recipe_app.command()
def show(
    name: Annotated[str, typer.Argument(help="A preset.")],
    json: Json = False,
) -> None:
    """Print a preset as YAML, to copy and change: effdl recipe show cnn-int8 > my.yaml"""
    from effdl import recipe
    from effdl.render import recipe as render
    from effdl.render.console import print_json
    from effdl.report import SCHEMA

    text = recipe.preset_text(name)
    if json:
        print_json({"schema": SCHEMA, "recipe": recipe.to_dict(recipe.load(name))})
    else:
        render.print_yaml(text)


@recipe_app.command()
def check(
    recipe: Annotated[str, typer.Argument(help="A YAML file or a preset.")],
    model: Annotated[
        Path | None, typer.Argument(help="Also look whether its patterns fit this model.")
    ] = None,
    json: Json = False,
) -> None:
    """Check a recipe without running it: all faults, each with file:line:column.

    Exit code 0 when it can be run, 2 when it cannot.
    """
    from effdl.recipe import check as check_recipe
    from effdl.render import recipe as render
    from effdl.render.console import print_json

    loaded = None
    if model is not None:
        from effdl.graph.io import load

        loaded = load(model)
    report = check_recipe(recipe, loaded)
    if json:
        print_json(render.check_json(recipe, report))
    else:
        render.print_check(recipe, report)
    if report.errors:
        raise typer.Exit(2)


@recipe_app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors: effdl recipe schema > recipe.schema.json"""
    from effdl import recipe
    from effdl.render.console import print_json

    print_json(recipe.schema())


@recipe_app.command()
def init(
    file: Annotated[Path, typer.Argument(help="The new file.")] = Path("recipe.yaml"),
    preset: Annotated[
        str | None, typer.Option("--from", metavar="PRESET", help="Copy this preset.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    json: Json = False,
) -> None:
    """Write a commented recipe to start from."""
    from effdl.recipe import write_starter
    from effdl.render import recipe as render
    from effdl.render.console import print_json
    from effdl.report import SCHEMA

    written = write_starter(file, preset=preset, force=force)
    if json:
        print_json({"schema": SCHEMA, "file": str(written)})
    else:
        render.print_written(written)
