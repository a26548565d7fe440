"""``effdl bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effdl.cli.bench_options import check_folder, parse_counts, parse_limits, parse_scan
from effdl.cli.bench_profile import TOP, bench_profile, refuse_with_profile
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
    target_spec,
)

if TYPE_CHECKING:
    from effdl.report import BenchReport, BenchScan


def bench(
    models: Annotated[list[Path], typer.Argument(help="The base, then the models to judge by it.")],
    data: Data = None,
    preprocess: Preprocess = None,
    target: Annotated[
        str, typer.Option("--target", help="cpu, cuda, tensorrt or ssh:HOST[/cuda].")
    ] = "cpu",
    python: Python = None,
    threads: Annotated[
        str,
        typer.Option(
            "--threads",
            metavar="N,N...",
            help="Intra-op threads, 0 for ONNX Runtime's own choice; several are measured in turn.",
        ),
    ] = "1",
    dim: Dim = None,
    scan: Annotated[
        list[str] | None,
        typer.Option(
            "--scan",
            metavar="NAME=N,N...",
            help="Measure at several sizes of a dynamic dimension, such as batch=1,8,32.",
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.1, help="The most measuring time per model.")
    ] = 5.0,
    min_effect: Annotated[
        str | None,
        typer.Option(
            "--min-effect", metavar="SHARE", help="The smallest difference to tell.  [default: 2%]"
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option("--baseline", metavar="FILE", help="Compare with an earlier --export-json."),
    ] = None,
    fail_if_slower: Annotated[
        str | None,
        typer.Option(
            "--fail-if-slower",
            metavar="SHARE",
            help="Exit code 1 when a model is slower than the base (with --baseline: than then) "
            "by more than this.",
        ),
    ] = None,
    export_json: Annotated[
        Path | None, typer.Option("--export-json", metavar="FILE", help="Write the report as JSON.")
    ] = None,
    export_markdown: Annotated[
        Path | None,
        typer.Option("--export-markdown", metavar="FILE", help="Write the tables as Markdown."),
    ] = None,
    peaks: Annotated[
        bool,
        typer.Option(
            "--peaks/--no-peaks",
            help="Hold the models against this machine's peaks; measured once, in about 3 s.",
        ),
    ] = True,
    cuda_graph: Annotated[
        bool,
        typer.Option("--cuda-graph", help="GPU: record the work once and replay it; fixed shapes."),
    ] = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile", help="Instead: time by operator and node; of two models, the difference."
        ),
    ] = False,
    placement: Annotated[
        bool,
        typer.Option(
            "--placement", help="Instead: which provider runs what, and what was put in for it."
        ),
    ] = False,
    top: Annotated[int, typer.Option("--top", min=1, help="How many nodes a profile lists.")] = TOP,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure models side by side, with a verdict.

    Latency with its spread, load time, peak memory and file size on ONNX Runtime. Models take turns in
    processes of their own, at ORT_ENABLE_ALL, so that noise hits all of them alike; the base runs in
    a second process too, which shows what is noise. Each verdict is against the base.
    """
    from effdl import api
    from effdl.cli.pipes import write_text
    from effdl.render import bench as render
    from effdl.render.console import print_json
    from effdl.render.progress import live
    from effdl.report import to_json

    given = data_source(data, preprocess)
    limit, effect = parse_limits(fail_if_slower, min_effect)
    counts, sizes = parse_counts("--threads", threads, least=0), parse_scan(scan)
    if profile or placement:
        refuse_with_profile(
            counts,
            scan=scan,
            baseline=baseline,
            fail_if_slower=fail_if_slower,
            min_effect=min_effect,
            export_markdown=export_markdown,
            cuda_graph=cuda_graph,
        )
        bench_profile(
            models,
            times=profile,
            placement=placement,
            top=top,
            export_json=export_json,
            json=json,
            quiet=quiet,
            data=given,
            target=target_spec(target, python),
            threads=counts[0],
            dims=parse_dims(dim),
            seconds=seconds,
            seed=seed,
        )
        return
    for path in (export_json, export_markdown):
        check_folder(path)
    with live(quiet or json) as show:
        cells = api.bench_scan(
            *models,
            data=given,
            target=target_spec(target, python),
            threads=counts,
            scan=sizes,
            dims=parse_dims(dim),
            seconds=seconds,
            seed=seed,
            min_effect=effect,
            yardstick=export_json is not None,
            baseline=baseline,
            peaks=peaks,
            cuda_graph=cuda_graph,
            progress=lambda text, share: show("bench", f"{text} {share:.0%}"),
        )
    report = cells if len(counts) > 1 or sizes else cells.cells[0]
    if export_json is not None:
        write_text(export_json, to_json(report))
    if export_markdown is not None:
        from effdl.render.bench_markdown import bench_markdown

        write_text(export_markdown, bench_markdown(report))
    if json:
        print_json(to_json(report))
    elif not quiet:
        render.print_report(report)
    if limit is not None:
        _check(report, limit, quiet)


def _check(report: BenchReport | BenchScan, limit: float, quiet: bool) -> None:
    """Fail when a model is slower than allowed."""
    from effdl.errors import CheckFailed
    from effdl.measure.baseline import too_slow
    from effdl.render.console import print_warning

    failed, doubtful = too_slow(report, limit)
    for what in () if quiet else doubtful:
        print_warning(what)
    if failed:
        raise CheckFailed("; ".join(failed), hint="effdl bench --profile shows where time went")
