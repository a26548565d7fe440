"""``effdl compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effdl.cli.options import (
    Data,
    Dim,
    Json,
    Preprocess,
    Python,
    Quiet,
    Seed,
    data_source,
    parse_dims,
    parse_rtol,
    target_spec,
)
from effdl.errors import UsageError


def compare(
    reference: Annotated[Path, typer.Argument(help="The model that is right.", metavar="MODEL")],
    candidate: Annotated[
        Path | None,
        typer.Argument(
            help="The model to judge; without it MODEL here is compared with MODEL there."
        ),
    ] = None,
    data: Data = None,
    preprocess: Preprocess = None,
    rtol: Annotated[
        list[str] | None,
        typer.Option(
            "--rtol", metavar="[OUT:]N", help="Relative tolerance, for all outputs or one."
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option("--target", help="cpu, cuda, ssh:HOST[/cuda] or arm-emulated[:a53|n1|v1]."),
    ] = "cpu",
    python: Python = None,
    dim: Dim = None,
    seed: Seed = 0,
    samples: Annotated[
        int | None,
        typer.Option("--samples", min=1, help="How many inputs to run: 8; 2 where emulated."),
    ] = None,
    locate: Annotated[
        bool,
        typer.Option(
            "--locate", help="Also find the first tensor inside that differs, and what hurts most."
        ),
    ] = False,
    top: Annotated[int, typer.Option("--top", min=1, help="How many layers --locate lists.")] = 10,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tell how far the outputs of two models are apart.

    On ssh:HOST both run there. A model alone is compared with itself here: whether that machine
    computes it right; arm-emulated tells that of three Arm cores, without any Arm machine. Exit code
    0 when every output is within tolerance, 1 when one is not.
    """
    from effdl import api
    from effdl.render import compare as render
    from effdl.render.console import print_json
    from effdl.render.progress import live
    from effdl.render.there import print_there
    from effdl.report import CompareReport, ThereReport, to_json

    report: CompareReport | ThereReport
    given = data_source(data, preprocess)
    if locate and (candidate is None or target.startswith("arm-emulated")):
        raise UsageError(
            "--locate compares two models on this machine", hint="name both, without that --target"
        )
    if candidate is None or target.startswith("arm-emulated"):
        with live(quiet or json) as show:
            report = api.compare_there(
                *(m for m in (reference, candidate) if m is not None),
                data=given,
                target=target_spec(target, python),
                rtol=parse_rtol(rtol),
                dims=parse_dims(dim),
                seed=seed,
                samples=samples or (2 if target.startswith("arm-emulated") else 8),
                progress=show,
            )
    else:
        with live(quiet or json) as show:
            report = api.compare(
                reference,
                candidate,
                data=given,
                target=target_spec(target, python),
                rtol=parse_rtol(rtol),
                dims=parse_dims(dim),
                seed=seed,
                samples=samples or 8,
                locate=locate,
                top=top,
                progress=show,
            )
    if json:
        print_json(to_json(report))
    elif isinstance(report, ThereReport):
        if not quiet:
            print_there(report)
    elif not quiet:
        render.print_compare(report)
    if not report.equal:
        raise typer.Exit(1)
