"""The verbs of the command line as functions; ``effdl.optimize`` and its kin are these."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from effdl.api.comparing import compare, compare_there, evaluate
from effdl.api.inputs import ModelLike, TargetLike, as_file, feeds_of
from effdl.api.measuring import bench, bench_scan, profile
from effdl.data.spec import Source
from effdl.errors import UsageError
from effdl.graph import io
from effdl.graph.dims import check_dims
from effdl.layerwise import layers
from effdl.measure.stats import model_stats, node_stats
from effdl.opportunities import channel_groups, opportunities
from effdl.opportunities import explain as explain_pass
from effdl.pipeline import optimize as run
from effdl.recipe import Recipe, apply_overrides
from effdl.recipe import load as load_recipe
from effdl.report import ExplainReport, InspectReport, LayersReport, RunReport
from effdl.run_options import Progress, RunOptions
from effdl.runtime.target import parse_target

__all__ = [
    "ModelLike",
    "TargetLike",
    "bench",
    "bench_scan",
    "compare",
    "compare_there",
    "evaluate",
    "explain",
    "explain_quantize",
    "inspect",
    "load",
    "optimize",
    "profile",
    "save",
]

load = io.load
save = io.save


def optimize(
    model: ModelLike,
    recipe: str | Path | Recipe = "lossless",
    output: str | Path | None = None,
    *,
    data: str | Path | Source | None = None,
    target: str | None = None,
    python: str | None = None,
    overrides: Sequence[str] = (),
    options: RunOptions | None = None,
    progress: Progress | None = None,
) -> RunReport:
    """Run a recipe over a model and write the result.

    Args:
        model: the model.
        recipe: the name of a shipped preset, a YAML file, or a Recipe.
        output: the file to write; may be left out only in a dry run.
        data: calibration samples, an ``.npz`` with one array per graph input, first axis the samples,
            or another source of ``effdl.data.dataset``; goes before the recipe's ``data.calibration``.
        target: ``cpu``, ``cuda``, ``arm``, ``ssh:HOST`` or ``arm-emulated``; goes before the recipe's.
        python: starts a Python with onnxruntime there, for the last two.
        overrides: changes to the recipe such as ``passes.quantize_static.per_channel=false``.
        options: see ``effdl.run_options.RunOptions``.
        progress: called with a stage and what is being done.

    Returns:
        What every pass did, and the model before and after.

    Raises:
        EffdlError: see ``effdl.errors``; nothing was written.
    """
    options = options or RunOptions()
    if output is None and not options.dry_run:
        raise UsageError("no output: say where the result goes", hint="-o OUT.onnx, or --dry-run")
    changes = [*overrides, *([f"target={target}"] if target else [])]
    if python is not None:
        changes.append(f"target.python={json.dumps(python)}")
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if changes:
        chosen = apply_overrides(chosen, changes)
    with as_file(model) as source:
        goal = None if output is None else Path(output)
        return run(
            source,
            chosen,
            goal,
            data=Path(data) if isinstance(data, str) else data,
            options=options,
            progress=progress,
        )


def inspect(
    model: ModelLike,
    *,
    dims: Mapping[str, int] | None = None,
    could: bool = True,
    nodes: bool = False,
    channels: bool = False,
) -> InspectReport:
    """Tell what is in a model, and what the passes would find in it.

    Args:
        model: the model.
        dims: values of dynamic dimensions for the MACs.
        could: also try every pass on a copy (needs no data, runs nothing).
        nodes: also list every node with its cost.
        channels: also list the groups of channels that prune_channels works on.
    """
    with as_file(model) as path:
        loaded = io.load(path)
        check_dims(loaded, dims)
        found = opportunities(loaded) if could else ()
        listed = node_stats(loaded, dims) if nodes else ()
        groups = channel_groups(loaded) if channels else ()
        return InspectReport(model_stats(loaded, path, dims), found, listed, groups)


def explain(
    model: ModelLike,
    name: str,
    *,
    overrides: Sequence[str] = (),
    target: TargetLike = "cpu",
    simplify: bool = True,
) -> ExplainReport:
    """Tell what one pass would do to a model: what it found, and for the rest the reason.

    Args:
        model: the model; stays as it is.
        name: of the pass.
        overrides: OPTION=VALUE for the options of the pass.
        target: where the result is to run.
        simplify: clean a copy of the model up first, as recipes do.

    Raises:
        EffdlError: no such pass or option, or a model that cannot be read.
    """
    recipe = load_recipe({"name": "explain", "description": "one pass", "passes": [name]})
    recipe = apply_overrides(recipe, [f"passes.{name}.{o}" for o in overrides])
    first = simplify and name != "simplify"
    with as_file(model) as path:
        label = "" if isinstance(model, ir.Model) else str(path)
        return explain_pass(
            recipe.passes[0], io.load(path), label, parse_target(target), simplify=first
        )


def explain_quantize(
    model: ModelLike,
    *,
    data: str | Path | Source | None = None,
    dims: Mapping[str, int] | None = None,
    threads: int = 1,
    seconds: float = 3.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> LayersReport:
    """Tell layer by layer what 8-bit integers would do on this machine's CPU, measured.

    Args:
        model: the model; stays as it is.
        data: calibration data (an .npz, a folder): ranges come from them; without, they are found at
            every run, or for convolutions taken from random inputs.
        dims: values of dynamic dimensions.
        threads: intra-op threads.
        seconds: measuring time for each of the two forms.
        seed: of random inputs, where there are no data.
        progress: told what is being done.

    Raises:
        EffdlError: a model or data that cannot be read, or nothing that can be 8-bit.
    """
    target = parse_target("cpu", threads)
    with as_file(model) as path:
        feeds = feeds_of(path, data, dims, seed, target, 4)
        found = layers(
            path,
            Path(data) if isinstance(data, str) else data,
            target,
            feeds=feeds,
            dims=dims or {},
            threads=threads,
            seconds=seconds,
            seed=seed,
            tell=progress or (lambda name, what: None),
        )
        return replace(found, path="") if isinstance(model, ir.Model) else found
