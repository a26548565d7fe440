"""``effdl optimize``."""

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
    Verbose,
    data_source,
    parse_dims,
    parse_size,
)


def optimize(
    model: Annotated[str, typer.Argument(help="The model file; - reads it from stdin.")],
    recipe: Annotated[
        str, typer.Option("--recipe", "-c", help="A preset (`effdl recipe list`) or a YAML file.")
    ] = "lossless",
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Where the result goes; - writes to stdout."),
    ] = None,
    data: Data = None,
    preprocess: Preprocess = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            help="cpu, cuda, arm, ssh:HOST[/cuda] or arm-emulated; the recipe's when not given.",
        ),
    ] = None,
    python: Python = None,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change the recipe: passes.quantize_static.per_channel=false",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what each pass would touch; write nothing.")
    ] = False,
    report: Annotated[
        list[Path] | None,
        typer.Option(
            "--report",
            metavar="FILE",
            help="Write the report: FILE.html, FILE.md or FILE.json; may be given more than once.",
        ),
    ] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Drop a pass that fails its check and go on.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="A pass with nothing to do is an error.")
    ] = False,
    stop_after: Annotated[
        int | None,
        typer.Option("--stop-after", min=1, metavar="N", help="Run only the first N passes."),
    ] = None,
    save_after_each: Annotated[
        Path | None,
        typer.Option("--save-after-each", metavar="DIR", help="Keep the model of every pass."),
    ] = None,
    external_data: Annotated[
        bool | None,
        typer.Option("--external-data/--inline", help="Weights beside the model, or inside it."),
    ] = None,
    gate: Annotated[
        str,
        typer.Option(
            "--gate",
            metavar="each|final|off",
            help="Keep what helps: judge each pass, only the result, or nothing.",
        ),
    ] = "each",
    gate_seconds: Annotated[
        float,
        typer.Option("--gate-seconds", min=0.1, help="Time to measure each model of a pass."),
    ] = 1.0,
    bench_seconds: Annotated[
        float, typer.Option("--bench-seconds", min=0, help="Time to measure each model; 0: do not.")
    ] = 3.0,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", min=0, help="Intra-op threads; 1, or those of the recipe's target."
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            "--max-memory", metavar="SIZE", help="What calibration may hold at a time: 64MB, 1GB."
        ),
    ] = None,
    dim: Dim = None,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run a recipe over a model; verify, measure, save.

    Every pass is checked against the model before it, the written file is read back and compared
    with the original, and both are measured side by side. A pass that claims speed is measured too,
    and taken back where it does not help; where nothing helps, the output is the input and the exit
    code 1. The output appears only when it is complete and verified; an older file stays until then.
    """
    from effdl import api
    from effdl.cli.pipes import model_in, model_out
    from effdl.cli.report import check_suffixes, write_reports
    from effdl.errors import CheckFailed
    from effdl.graph.io import check_goal
    from effdl.render import run as render
    from effdl.render.console import print_json
    from effdl.render.progress import live
    from effdl.report import RunReport, to_json
    from effdl.run_options import RunOptions

    reports = check_suffixes(report or (), "--report")
    for path in reports:
        check_goal(path)  # before the work, not after
    options = RunOptions(
        dry_run=dry_run,
        keep_going=keep_going,
        strict=strict,
        stop_after=stop_after,
        save_after_each=save_after_each,
        gate=gate,
        gate_seconds=gate_seconds,
        bench_seconds=bench_seconds,
        threads=threads,
        dims=parse_dims(dim),
        seed=seed,
        **({} if max_memory is None else {"max_memory": parse_size(max_memory)}),
        external=external_data,
    )

    def tell(result: RunReport) -> None:
        write_reports(reports, result)
        if json:
            print_json(to_json(result))
        elif not quiet:
            render.print_run(result, verbose=verbose, to_stderr=output == "-")

    with model_in(model) as source, model_out(output, json=json) as goal:
        try:
            with live(quiet) as show:
                result = api.optimize(
                    source,
                    recipe,
                    goal,
                    data=data_source(data, preprocess),
                    target=target,
                    python=python,
                    overrides=change or (),
                    options=options,
                    progress=show,
                )
        except CheckFailed as e:
            if isinstance(e.report, RunReport):
                tell(e.report)  # what was tried, before the line that says what is missing
            raise
        tell(result)
    if not result.won:
        raise typer.Exit(1)
