"""Checks a recipe without running it, alone or against a model."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from effdl.errors import RecipeError
from effdl.graph.walk import opset
from effdl.recipe.model import Recipe
from effdl.recipe.patterns import pattern_errors
from effdl.recipe.reader import Spec, locate, read


@dataclass(frozen=True)
class CheckReport:
    """What is wrong with a recipe.

    Args:
        recipe: None when it has faults of its own.
        errors: its faults, in the order of the file.
        notes: what is no fault but good to know.
    """

    recipe: Recipe | None
    errors: tuple[RecipeError, ...]
    notes: tuple[str, ...]


def check(spec: Spec, model: ir.Model | None = None) -> CheckReport:
    """Find all faults of a recipe.

    Args:
        spec: as for ``load``.
        model: if given, also its opset and the names of its nodes are looked at.

    Raises:
        RecipeError: there is no such recipe, or it is no YAML.
    """
    recipe, errors = read(locate(spec))
    if recipe is None:
        return CheckReport(None, tuple(errors), ())
    notes = []
    if any(s.pass_.needs_data for s in recipe.passes) and recipe.data.calibration is None:
        names = ", ".join(dict.fromkeys(s.name for s in recipe.passes if s.pass_.needs_data))
        notes.append(f"{names} needs calibration data: --data FILE.npz, or data.calibration")
    budget = recipe.budget
    if (
        budget is not None
        and budget.accuracy_drop is not None
        and budget.fidelity is None
        and not recipe.data.evaluation
    ):
        notes.append("budget.accuracy_drop needs data.evaluation: there is nothing to score on")
    if model is not None:
        _check_opset(recipe, model, notes)
        _check_patterns(recipe, model, errors, notes)
    return CheckReport(recipe, tuple(errors), tuple(notes))


def _check_opset(recipe: Recipe, model: ir.Model, notes: list[str]) -> None:
    have = opset(model)
    for step in recipe.passes:
        if step.name == "convert_opset":
            return  # what comes after it sees another opset
        if have < step.pass_.min_opset:
            notes.append(
                f"{step.where}: {step.name} needs opset {step.pass_.min_opset} and the model has "
                f"{have}: it will do nothing; convert_opset before it raises the opset"
            )


def _check_patterns(
    recipe: Recipe, model: ir.Model, errors: list[RecipeError], notes: list[str]
) -> None:
    """Look for the nodes that patterns name: an earlier pass may still make one."""
    for i, step in enumerate(recipe.passes):
        for error in pattern_errors(step, model):
            if i == 0:
                errors.append(error)
            else:
                notes.append(f"{error}, unless an earlier pass makes one")
