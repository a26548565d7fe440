"""``effdl compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effdl.cli.options import Data, Dim, Json, Quiet, Seed, parse_dims, parse_rtol


def compare(
    reference: Annotated[Path, typer.Argument(help="The model that is right.", metavar="MODEL")],
    candidate: Annotated[
        Path | None,
        typer.Argument(help="The model to judge; without it MODEL here is compared with MODEL there."),
    ] = None,
    data: Data = None,
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
    samples: Annotated[int, typer.Option("--samples", min=1, help="How many inputs to run.")] = 8,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tell how far the outputs of two models are apart.

    Exit code 0 when every output is within tolerance, 1 when one is not.
    """
    from effdl import api
    from effdl.render import compare as render
    from effdl.render.console import print_json
    from effdl.report import to_json

    report = api.compare(
        reference,
        candidate,
        data=data,
        target=target,
        rtol=parse_rtol(rtol),
        dims=parse_dims(dim),
        seed=seed,
        samples=samples,
    )
    if json:
        print_json(to_json(report))
    elif not quiet:
        render.print_compare(report)
    if not report.equal:
        raise typer.Exit(1)
