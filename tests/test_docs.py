"""Documentation: every pass, option, preset and command has its text, and generated files are current."""

import importlib.util
import re

import pytest
import typer
import yaml

from effdl import passes, recipe
from effdl.recipe.describe import HEADINGS
from tests.support import ROOT


@pytest.mark.parametrize("name", passes.names())
def test_pass_is_documented(name: str) -> None:
    info = recipe.describe_pass(name)
    assert tuple(info.sections) == HEADINGS
    assert all(info.sections.values())
    assert info.summary.endswith(".")
    assert "\n\n" not in info.summary
    for option in info.options:
        assert len(option.description) > 10, option.name
        assert option.description.endswith("."), option.name
    own = {"targets", "ignore"}
    assert passes.name_of(passes.get(name)) == name
    assert not own & {o.name for o in info.options} or own <= {o.name for o in info.options}


@pytest.mark.parametrize("name", passes.names())
def test_example_is_a_recipe(name: str) -> None:
    example = yaml.safe_load(recipe.describe_pass(name).sections["Example"])
    head = {"name": "example", "description": "from the documentation"}
    used = recipe.load(head | example)
    assert name in [s.name for s in used.passes]


@pytest.mark.parametrize("name", passes.names())
def test_not_after_gives_reasons(name: str) -> None:
    for glob, reason in passes.get(name).not_after.items():
        assert glob
        assert reason
        assert not reason.endswith(".")


def test_generated_files_are_current() -> None:
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    assert spec is not None
    assert spec.loader is not None
    make_docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_docs)
    assert make_docs.main(check=True) == 0, "run python scripts/make_docs.py"


def test_every_preset_is_in_its_readme() -> None:
    text = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    hand_written = text.split("<!--")[0] + text.split("-->")[-1]
    for name in recipe.preset_names():
        assert f"`{name}`" in hand_written, name
    named = set(re.findall(r"`([a-z0-9]+-[a-z0-9-]+|lossless|int8)`", text))
    assert named == set(recipe.preset_names())


def test_every_command_is_in_the_readme() -> None:
    from effdl.cli.app import app

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    root = typer.main.get_command(app)
    for command in root.commands:  # type: ignore[attr-defined]
        assert f"effdl {command}" in text, f"README.md says nothing of effdl {command}"


def test_every_command_and_option_has_a_help_text() -> None:
    from effdl.cli.app import app

    pending = list(typer.main.get_command(app).commands.items())  # type: ignore[attr-defined]
    while pending:
        name, command = pending.pop()
        assert command.help, name
        pending += [(f"{name} {n}", c) for n, c in getattr(command, "commands", {}).items()]
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"
