"""A commented recipe to start from."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from effdl.errors import OutputError, UsageError
from effdl.recipe.shipped import preset_text

STARTER = """\
# yaml-language-server: $schema=recipe.schema.json
# The line above lets an editor complete and check this file, after
#   effdl recipe schema > recipe.schema.json
#
# Check it:  effdl recipe check {file}
# Try it:    effdl optimize model.onnx -c {file} --dry-run
# Run it:    effdl optimize model.onnx -c {file} -o smaller.onnx

name: {name}
description: clean the graph up, then int8 weights

# Where the model will run: cpu, cuda, arm, or in detail {{device: arm, isa: [neon, dotprod]}}
target: cpu

# Real inputs, one array per graph input, first axis the samples. Paths start at this file.
# data:
#   calibration: calib.npz
#   evaluation: {{path: test.npz, labels: label, metric: top1}}

# What the result must hold; one that does not is not written.
# budget:
#   accuracy_drop: 0.005   # of the metric above
#   speedup: 1.2           # against the original model
#   size: 0.5              # share of the original's file

# In this order. `effdl passes` lists all, `effdl passes NAME` shows the options of one.
passes:
  - simplify
  - quantize_dynamic
  # - quantize_dynamic: {{ignore: ["*head*"]}}   # leave nodes alone: name globs, op types, re:REGEX
  - strip_metadata
"""


def starter_text(file: str) -> str:
    """Return the starter recipe for a file called ``file``."""
    stem = "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(file).stem)
    return STARTER.format(file=file, name=stem.strip("-") or "recipe")


def write_starter(path: Path, *, preset: str | None = None, force: bool = False) -> Path:
    """Write a starter recipe, or a copy of a preset, to ``path``.

    Args:
        path: the new file.
        preset: name of the preset to copy.
        force: replace a file that is there.

    Raises:
        RecipeError: no such preset.
        UsageError: the file exists and ``force`` is not set.
        OutputError: the place cannot be written.
    """
    text = preset_text(preset) if preset else starter_text(str(path))
    if path.is_dir():
        raise OutputError("this is a folder; name a file", where=str(path))
    if path.exists() and not force:
        raise UsageError("the file exists", hint="--force replaces it", where=str(path))
    part = None
    try:
        handle, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as f:
            f.write(text)
        os.chmod(part, 0o666 & ~_umask())
        os.replace(part, path)
    except OSError as e:
        if part is not None:
            Path(part).unlink(missing_ok=True)
        raise OutputError(f"cannot be written: {e.strerror or e}", where=str(path)) from None
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
