"""The verbs of the command line as functions; ``effdl.optimize`` and its kin are these."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from effdl.data.dataset import load_dataset
from effdl.data.feeds import Feeds
from effdl.data.random import random_feeds
from effdl.data.spec import Preprocess, Source, parse_labelled
from effdl.errors import UsageError
from effdl.graph import io
from effdl.graph.dims import check_dims, input_dims
from effdl.graph.scratch import scratch
from effdl.measure import bench as _bench
from effdl.measure import fidelity, remote
from effdl.measure.baseline import read_baseline, with_baseline
from effdl.measure.evaluation import evaluate_models
from effdl.measure.locate import with_location
from effdl.measure.profile import profile as run_profile
from effdl.measure.results import file_facts
from effdl.measure.scan import scan as run_scan
from effdl.measure.stats import model_stats, node_stats
from effdl.measure.verdict import MIN_EFFECT
from effdl.opportunities import explain as explain_pass
from effdl.opportunities import opportunities
from effdl.pipeline import optimize as run
from effdl.recipe import Recipe, apply_overrides
from effdl.recipe import load as load_recipe
from effdl.report import (
    BenchReport,
    BenchScan,
    CompareReport,
    EvaluateReport,
    ExplainReport,
    InspectReport,
    ProfileReport,
    RunReport,
    ThereReport,
)
from effdl.run_options import Progress, RunOptions
from effdl.runtime.host import Host, no_latency, open_host
from effdl.runtime.target import (
    Target,
    check_available,
    check_reachable,
    parse_target,
    where_to_check,
)

ModelLike = str | Path | ir.Model
"""A model file, or a model in memory."""
TargetLike = str | Mapping[str, object]
"""``cpu``, ``cuda``, ``ssh:HOST``, ``arm-emulated``, or a mapping as in a recipe, see
``effdl.runtime.target.parse_target``."""

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


def bench(
    *models: ModelLike,
    data: str | Path | Source | None = None,
    target: TargetLike = "cpu",
    threads: int = 1,
    dims: Mapping[str, int] | None = None,
    seconds: float = 5.0,
    seed: int = 0,
    min_effect: float = MIN_EFFECT,
    control: bool = True,
    yardstick: bool = False,
    baseline: str | Path | None = None,
    peaks: bool = False,
    cuda_graph: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> BenchReport:
    """Measure models side by side on ONNX Runtime, the first being the base.

    Args:
        models: one or more models with the same inputs.
        data: real inputs, as in ``optimize``; random ones otherwise.
        target: where; ``arm-emulated`` is refused, its times mean nothing.
        threads: intra-op threads, 0 for ONNX Runtime's own choice.
        dims: values of dynamic dimensions, ``{"batch": 8}``.
        seconds: the most measuring time per model; it ends earlier when it is exact enough.
        seed: of random inputs and of the statistics.
        min_effect: the smallest difference to be told, as a fraction.
        control: also run the base in a second process, which shows what is noise.
        yardstick: also time a fixed small model; a report with it can be a ``baseline``.
        baseline: an earlier report as a JSON file, to compare with.
        peaks: also tell how near to the machine's measured peaks each model runs; measuring them takes
            about three seconds once, then they are kept in the user's cache folder.
        cuda_graph: record a GPU's work once and replay it; for one feed of fixed shapes.
        progress: called with a text and the share that is done.

    Raises:
        TargetError: the provider is not there, or fell back to the CPU.
        ModelError, DataError: a model or its data cannot be used, or the baseline measured something else.
    """
    report = bench_scan(
        *models,
        data=data,
        target=target,
        threads=[threads],
        dims=dims,
        seconds=seconds,
        seed=seed,
        min_effect=min_effect,
        control=control,
        yardstick=yardstick,
        baseline=baseline,
        peaks=peaks,
        cuda_graph=cuda_graph,
        progress=progress,
    )
    return report.cells[0]


def bench_scan(
    *models: ModelLike,
    threads: Sequence[int] = (1,),
    scan: Mapping[str, Sequence[int]] | None = None,
    data: str | Path | Source | None = None,
    target: TargetLike = "cpu",
    dims: Mapping[str, int] | None = None,
    seconds: float = 5.0,
    seed: int = 0,
    min_effect: float = MIN_EFFECT,
    control: bool = True,
    yardstick: bool = False,
    baseline: str | Path | None = None,
    peaks: bool = False,
    cuda_graph: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> BenchScan:
    """Bench the models at every combination of threads and values of dynamic dimensions.

    Args:
        models: as in ``bench``.
        threads: numbers of intra-op threads.
        scan: values by dimension, ``{"batch": [1, 8, 32]}``.
        data, target, dims, seconds, seed, min_effect, control, yardstick, baseline, peaks, cuda_graph,
            progress: as in ``bench``, for every combination.
    """
    if not models:
        raise UsageError("no model to measure")
    earlier = None if baseline is None else read_baseline(Path(baseline))
    count = len(threads) * math.prod(len(v) for v in (scan or {}).values())
    done = 0
    with as_files(models) as files, ExitStack() as stack:
        known = {path: file_facts(path) for path in dict.fromkeys(files)}
        host: Host | None = None

        def measure(number: int, values: dict[str, int]) -> BenchReport:
            nonlocal done, host
            place = parse_target(target, number)
            if place.device == "arm-emulated":
                raise no_latency(place.name)
            host = host or stack.enter_context(open_host(place))
            sizes = {**(dims or {}), **values}
            report = _bench.bench(
                files,
                _feeds(files[0], data, sizes, seed, place, count=2),
                place,
                threads=number,
                seconds=seconds,
                seed=seed,
                known=known,
                host=host,
                min_effect=min_effect,
                control=control,
                yardstick=yardstick or earlier is not None,
                dims=sizes,
                peaks=peaks,
                cuda_graph=cuda_graph,
                progress=progress and (lambda text, share: progress(text, (done + share) / count)),
            )
            done += 1
            if earlier is None:
                return report
            return with_baseline(report, earlier, Path(str(baseline)))

        return run_scan(measure, threads, scan or {})


def profile(
    *models: ModelLike,
    data: str | Path | Source | None = None,
    target: TargetLike = "cpu",
    threads: int = 1,
    dims: Mapping[str, int] | None = None,
    seconds: float = 5.0,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> ProfileReport:
    """Tell where the time of one model goes, or of two and where the difference comes from.

    Args:
        models: one or two models with the same inputs.
        data, target, threads, dims, seconds, seed, progress: as in ``bench``.

    Raises:
        TargetError: the provider is not there, or its times mean nothing.
        ModelError, DataError: a model or its data cannot be used.
        UsageError: more than two models.
    """
    place = parse_target(target, threads)
    if place.device == "arm-emulated":
        raise no_latency(place.name)
    if not models:
        raise UsageError("no model to measure")
    with as_files(models) as files:
        feeds = _feeds(files[0], data, dims, seed, place, count=2)
        return run_profile(
            files, feeds, place, threads=threads, seconds=seconds, seed=seed, progress=progress
        )


def compare(
    reference: ModelLike,
    candidate: ModelLike,
    *,
    data: str | Path | Source | None = None,
    target: TargetLike = "cpu",
    rtol: float | Mapping[str, float] | None = None,
    dims: Mapping[str, int] | None = None,
    seed: int = 0,
    samples: int = 8,
    locate: bool = False,
    top: int = 10,
    progress: Progress | None = None,
) -> CompareReport:
    """Run two models on the same inputs and tell how far their outputs are apart.

    Args:
        reference: the model that is right.
        candidate: the model to judge.
        data: real inputs, as in ``optimize``; random ones otherwise, which are weak evidence.
        target: where both run; see ``compare_there`` for whether that place computes right.
        rtol: relative tolerance, for all outputs or by name; by dtype when None.
        dims: values of dynamic dimensions for random inputs.
        seed: of random inputs.
        samples: how many inputs.
        locate: also find where inside the graphs they part; both run on this machine then.
        top: how many of the steps that hurt the outputs most ``locate`` lists.
        progress: called with a stage and what is being done.
    """
    place = parse_target(target)
    if locate and place.remote:
        raise UsageError(
            f"--locate runs both models on this machine, not on '{place.name}'",
            hint="leave --target away, or --locate",
        )
    with as_files([reference, candidate]) as (first, second):
        feeds = _feeds(first, data, dims, seed, place, count=samples).first(samples)
        if place.remote:
            with open_host(place) as host:
                return remote.compare_on(host, first, second, feeds, rtol=rtol)
        report = fidelity.compare(first, second, feeds, target=place, rtol=rtol)
        if not locate:
            return report
        one = None if isinstance(rtol, Mapping) else rtol
        return with_location(report, first, second, feeds, place, one, top, progress)


def compare_there(
    *models: ModelLike,
    target: TargetLike = "arm-emulated",
    data: str | Path | Source | None = None,
    rtol: float | Mapping[str, float] | None = None,
    dims: Mapping[str, int] | None = None,
    seed: int = 0,
    samples: int = 2,
    progress: Progress | None = None,
) -> ThereReport:
    """Tell whether a target computes what this machine's CPU computes.

    Args:
        models: one model, or two of which the second is also compared with the first there.
        target: ``ssh:HOST``, or ``arm-emulated`` for every emulated Arm core.
        data, dims, seed, samples: as in ``compare``.
        rtol: relative tolerance; by number formats when None: 5 % of an output's size for quantized
            models, whose sums two processors may round to neighbouring quanta.
        progress: called with the place and what is done there.

    Raises:
        TargetError: the target cannot be reached, or it is this machine.
        ModelError, DataError: a model or its data cannot be used here or there.
    """
    place = parse_target(target)
    if not place.remote:
        raise UsageError(
            f"target '{place.name}' is this machine: there is nothing to compare it with",
            hint="name a second model, or --target ssh:HOST or arm-emulated",
        )
    if not 1 <= len(models) <= 2:
        raise UsageError("compare_there takes one model or two")
    check_reachable(place)
    with as_files(models) as files:
        feeds = _feeds(files[0], data, dims, seed, place, count=samples).first(samples)
        return remote.compare_there(place, files, feeds, rtol=rtol, progress=progress)


def evaluate(
    *models: ModelLike,
    data: str | Path,
    labels: str | None = None,
    metric: str = "top1",
    reference: ModelLike | None = None,
    output: str | None = None,
    preprocess: str | Preprocess | None = None,
    tokenizer: str | Path | None = None,
    text: str | Sequence[str] | None = None,
    length: int | None = None,
    pairs: str | None = None,
    limit: int | None = None,
    max_drop: float | None = None,
    target: str = "cpu",
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> EvaluateReport:
    """Score models on the same labelled samples, the first being the base of the differences.

    Args:
        models: one or more models with the same inputs.
        data: an ``.npz``, a folder of ``.npy`` or of pictures, or a ``.csv`` with texts; see
            docs/data.md.
        labels: the array, column or file that holds the labels.
        metric: a name of ``effdl.data.metrics.METRICS``, or ``module:function``.
        reference: a model whose outputs stand in for labels; for ``agreement`` the first one if
            neither this nor ``labels`` is given.
        output: which graph output; the first when None.
        preprocess: for pictures, such as ``imagenet,size=224``.
        tokenizer, text, length, pairs: for texts, see ``effdl.data.spec.Source``.
        limit: at most this many samples, spread evenly over all.
        max_drop: the largest loss against the first model, in the metric's units (0.005 is half a
            point of accuracy); the report's ``failed`` names who lost more.
        target: ``cpu`` or ``cuda``.
        seed: of the resampling.
        progress: called with a model's name and the share that is done.

    Raises:
        DataError: the data does not fit the model, has no labels, or labels of another number or kind.
        UsageError: an unknown metric or output, or options that do not belong to the data.
    """
    if not models:
        raise UsageError("no model to evaluate")
    if labels is not None and reference is not None:
        raise UsageError("either labels or a reference model", hint="leave --labels out")
    spec = parse_labelled(
        path=data,
        metric=metric,
        labels=labels,
        preprocess=preprocess,
        tokenizer=tokenizer,
        text=text,
        length=length,
        pairs=pairs,
        limit=limit,
    )
    place = parse_target(target)
    check_available(place)
    with as_files([*models, *([] if reference is None else [reference])]) as files:
        dataset = load_dataset(spec, io.load(files[0]))
        if reference is not None or (metric == "agreement" and labels is None):
            dataset = replace(dataset, labels=None)  # a model gives them
        return evaluate_models(
            files[: len(models)],
            dataset,
            metric,
            place,
            reference=None if reference is None else files[-1],
            output=output,
            max_drop=max_drop,
            seed=seed,
            progress=progress,
        )


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


def _feeds(
    model: Path,
    data: str | Path | Source | None,
    dims: Mapping[str, int] | None,
    seed: int,
    target: Target,
    count: int,
) -> Feeds:
    loaded = io.load(model)
    if data is not None:
        return load_dataset(data, loaded, batch=_batch(loaded, dims)).feeds
    here = where_to_check(target)[0]  # what runs elsewhere is tried on this machine
    return random_feeds(loaded, dims=dims, seed=seed, count=count, target=here)


def _batch(model: ir.Model, dims: Mapping[str, int] | None) -> int:
    """Return the samples per feed that ``dims`` ask for; the other sizes of real inputs are given."""
    chosen = check_dims(model, dims)
    first = {name for name, _, axis in input_dims(model) if axis == 0}
    for name in chosen:
        if name not in first:
            raise UsageError(
                f"dimension '{name}' is as the real inputs have it",
                hint="leave out --data for random inputs of any size",
            )
    sizes = set(chosen.values())
    if len(sizes) > 1:
        raise UsageError("real inputs have one number of samples per run, not several")
    return sizes.pop() if sizes else 1


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
    with ExitStack() as stack:
        yield [stack.enter_context(as_file(m)) for m in models]
