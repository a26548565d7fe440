"""``effdl bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effdl.cli.options import Data, Dim, Json, Quiet, Seed, Threads, parse_dims


def bench(
    models: Annotated[list[Path], typer.Argument(help="The base, then the models to judge by it.")],
    data: Data = None,
    target: Annotated[str, typer.Option("--target", help="cpu or cuda.")] = "cpu",
    threads: Threads = 1,
    dim: Dim = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="Time per model.")] = 5.0,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure models side by side, with a verdict.

    Latency with its spread, load time, peak memory and file size on ONNX Runtime. Runs are
    interleaved in alternating order in processes of their own, at ORT_ENABLE_ALL, so that noise hits
    all models alike. The verdict compares each model with the first.
    """
    from effdl import api
    from effdl.render import bench as render
    from effdl.render.console import print_json
    from effdl.render.progress import live
    from effdl.report import to_json

    with live(quiet or json) as show:
        report = api.bench(
            *models,
            data=data,
            target=target,
            threads=threads,
            dims=parse_dims(dim),
            seconds=seconds,
            seed=seed,
            progress=lambda text, share: show("bench", f"{text} {share:.0%}"),
        )
    if json:
        print_json(to_json(report))
    elif not quiet:
        render.print_bench(report)
