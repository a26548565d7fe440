"""What a written model says about its making, in its metadata properties."""

from __future__ import annotations

import json

import onnx_ir as ir

from effdl.graph import io
from effdl.recipe import Recipe, to_dict
from effdl.runtime.versions import versions


def stamp(model: ir.Model, recipe: Recipe, input_sha256: str) -> None:
    """Write recipe, versions and hashes into ``model``; nothing that changes from run to run.

    ``effdl.content_sha256`` is ``graph.io.content_digest`` of the model: it can be checked on the
    file, which a hash of the file itself could not.
    """
    props = model.metadata_props
    props["effdl.recipe"] = json.dumps(to_dict(recipe), sort_keys=True)
    props["effdl.versions"] = json.dumps(versions(), sort_keys=True)
    props["effdl.input_sha256"] = input_sha256
    props["effdl.content_sha256"] = io.content_digest(model)
