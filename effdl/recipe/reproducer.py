"""A folder that shows a failing pass: the model before it, a one-pass recipe, the error."""

from __future__ import annotations

import shutil
import traceback
from pathlib import Path

import onnx_ir as ir

from effdl.graph import io
from effdl.recipe import Recipe, Step, to_dict


def write_reproducer(
    place: Path, model: ir.Model, step: Step, recipe: Recipe, error: BaseException
) -> Path:
    """Write ``effdl-reproducer-PASS`` into ``place`` and return it.

    ``effdl optimize model.onnx -c recipe.yaml -o out.onnx`` in that folder shows the failure again.
    """
    import yaml

    folder = place / f"effdl-reproducer-{step.name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    io.save(model, folder / "model.onnx")
    one_pass = {
        "name": f"reproduce-{step.name}",
        "description": f"shows: {error}"[:200],
        "target": to_dict(recipe)["target"],
        "passes": [{step.name: dict(step.options)} if step.options else step.name],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(one_pass, sort_keys=False), encoding="utf-8")
    text = "".join(traceback.format_exception(error)).replace(str(Path.home()), "~")
    (folder / "error.txt").write_text(text, encoding="utf-8")
    return folder
