"""The verbs that judge what models compute: compare, compare_there and evaluate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from effdl.api.inputs import ModelLike, TargetLike, as_files, feeds_of
from effdl.data.dataset import load_dataset
from effdl.data.spec import Preprocess, Source, parse_labelled
from effdl.errors import UsageError
from effdl.graph import io
from effdl.measure import fidelity, remote
from effdl.measure.evaluation import evaluate_models
from effdl.measure.locate import with_location
from effdl.report import CompareReport, EvaluateReport, ThereReport
from effdl.run_options import Progress
from effdl.runtime.host import open_host
from effdl.runtime.target import check_available, check_reachable, parse_target


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
        feeds = feeds_of(first, data, dims, seed, place, count=samples).first(samples)
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
        feeds = feeds_of(files[0], data, dims, seed, place, count=samples).first(samples)
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
