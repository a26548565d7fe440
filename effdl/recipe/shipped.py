"""The presets that come with effdl: YAML files in the folder ``configs``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from effdl.errors import RecipeError, nearest
from effdl.recipe.located import parse, plain


@dataclass(frozen=True)
class PresetInfo:
    """A shipped recipe in short.

    Args:
        name: what ``-c`` takes.
        description: one line.
        target: the device it is for.
        passes: names of its steps, in order.
    """

    name: str
    description: str
    target: str
    passes: tuple[str, ...]


def preset_names() -> list[str]:
    """Names of the shipped presets, sorted."""
    return sorted(f.stem for f in _folder().glob("*.yaml"))


def preset_text(name: str) -> str:
    """Return the YAML file of a preset, comments included.

    Raises:
        RecipeError: no such preset.
    """
    if name not in preset_names():
        raise RecipeError(f"no preset is called '{name}'", hint=nearest(name, preset_names()))
    return (_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def presets() -> list[PresetInfo]:
    """Return all presets in short, without importing a pass."""
    return [_summary(name) for name in preset_names()]


def _summary(name: str) -> PresetInfo:
    data = plain(parse(preset_text(name), f"{name}.yaml"))
    target = data.get("target", "cpu")
    return PresetInfo(
        name,
        data["description"],
        target if isinstance(target, str) else target.get("device", "cpu"),
        tuple(p if isinstance(p, str) else next(iter(p)) for p in data["passes"]),
    )


def _folder() -> Path:
    package = Path(__file__).parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"
