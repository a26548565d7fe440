"""The verbs of the command line as functions; ``effdl.optimize`` and its kin are these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from effdl.data.feeds import Feeds
from effdl.data.npz import load_npz
from effdl.data.random import random_feeds
from effdl.errors import UsageError
from effdl.graph import io
from effdl.graph.dims import check_dims
from effdl.graph.scratch import scratch
from effdl.measure import bench as _bench
from effdl.measure import fidelity
from effdl.measure.stats import model_stats, node_stats
from effdl.opportunities import opportunities
from effdl.pipeline import Progress, RunOptions
from effdl.pipeline import optimize as run
from effdl.recipe import Recipe, apply_overrides
from effdl.recipe import load as load_recipe
from effdl.report import BenchReport, CompareReport, InspectReport, RunReport
from effdl.runtime.target import Target, check_available, parse_target

ModelLike = str | Path | ir.Model
"""A model file, or a model in memory."""

load = io.load
save = io.save


def optimize(
    model: ModelLike,
    recipe: str | Path | Recipe = "lossless",
    output: str | Path | None = None,
    *,
    data: str | Path | None = None,
    target: str | None = None,
    overrides: Sequence[str] = (),
    options: RunOptions | None = None,
    progress: Progress | None = None,
) -> RunReport:
    """Run a recipe over a model and write the result.

    Args:
        model: the model.
        recipe: the name of a shipped preset, a YAML file, or a Recipe.
        output: the file to write; may be left out only in a dry run.
        data: calibration samples, an ``.npz`` with one array per graph input, first axis the samples;
            goes before the recipe's ``data.calibration``.
        target: ``cpu``, ``cuda`` or ``arm``; goes before the recipe's.
        overrides: changes to the recipe such as ``passes.quantize_static.per_channel=false``.
        options: see ``effdl.pipeline.RunOptions``.
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
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if changes:
        chosen = apply_overrides(chosen, changes)
    with as_file(model) as source:
        goal = None if output is None else Path(output)
        return run(
            source,
            chosen,
            goal,
            data=None if data is None else Path(data),
            options=options,
            progress=progress,
        )


def bench(
    *models: ModelLike,
    data: str | Path | None = None,
    target: str = "cpu",
    threads: int = 1,
    dims: Mapping[str, int] | None = None,
    seconds: float = 5.0,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> BenchReport:
    """Measure models side by side on ONNX Runtime, the first being the base.

    Args:
        models: one or more models with the same inputs.
        data: real inputs, as in ``optimize``; random ones otherwise.
        target: ``cpu`` or ``cuda``.
        threads: intra-op threads, 0 for ONNX Runtime's own choice.
        dims: values of dynamic dimensions, ``{"batch": 8}``.
        seconds: time budget per model.
        seed: of random inputs and of the statistics.
        progress: called with a text and the share that is done.

    Raises:
        TargetError: the provider is not there, or fell back to the CPU.
        ModelError, DataError: a model or its data cannot be used.
    """
    place = parse_target(target, threads)
    check_available(place)
    with as_files(models) as files:
        feeds = _feeds(files[0], data, dims, seed, place, count=2)
        return _bench.bench(
            files, feeds, place, threads=threads, seconds=seconds, seed=seed, progress=progress
        )


def compare(
    reference: ModelLike,
    candidate: ModelLike,
    *,
    data: str | Path | None = None,
    target: str = "cpu",
    rtol: float | Mapping[str, float] | None = None,
    dims: Mapping[str, int] | None = None,
    seed: int = 0,
    samples: int = 8,
) -> CompareReport:
    """Run two models on the same inputs and tell how far their outputs are apart.

    Args:
        reference: the model that is right.
        candidate: the model to judge.
        data: real inputs, as in ``optimize``; random ones otherwise, which are weak evidence.
        target: where both run.
        rtol: relative tolerance, for all outputs or by name; by dtype when None.
        dims: values of dynamic dimensions for random inputs.
        seed: of random inputs.
        samples: how many inputs.
    """
    place = parse_target(target)
    with as_files([reference, candidate]) as (first, second):
        feeds = _feeds(first, data, dims, seed, place, count=samples).first(samples)
        return fidelity.compare(first, second, feeds, target=place, rtol=rtol)


def inspect(
    model: ModelLike,
    *,
    dims: Mapping[str, int] | None = None,
    could: bool = True,
    nodes: bool = False,
) -> InspectReport:
    """Tell what is in a model, and what the passes would find in it.

    Args:
        model: the model.
        dims: values of dynamic dimensions for the MACs.
        could: also try every pass on a copy (needs no data, runs nothing).
        nodes: also list every node with its cost.
    """
    with as_file(model) as path:
        loaded = io.load(path)
        check_dims(loaded, dims)
        found = opportunities(loaded) if could else ()
        listed = node_stats(loaded, dims) if nodes else ()
        return InspectReport(model_stats(loaded, path, dims), found, listed)


def _feeds(
    model: Path,
    data: str | Path | None,
    dims: Mapping[str, int] | None,
    seed: int,
    target: Target,
    count: int,
) -> Feeds:
    loaded = io.load(model)
    if data is not None:
        return load_npz(Path(data), loaded)
    return random_feeds(loaded, dims=dims, seed=seed, count=count, target=target)


@contextmanager
def as_file(model: ModelLike) -> Iterator[Path]:
    """Give a model as a file; one in memory is written to a temporary folder meanwhile."""
    if not isinstance(model, ir.Model):
        yield Path(model)
        return
    with scratch() as folder:
        path = folder / "model.onnx"
        io.save(model, path)
        yield path


@contextmanager
def as_files(models: Sequence[ModelLike]) -> Iterator[list[Path]]:
    """Give several models as files, see ``as_file``."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield [stack.enter_context(as_file(m)) for m in models]
