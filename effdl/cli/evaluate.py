"""``effdl evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effdl.cli.options import Json, Quiet, Seed
from effdl.errors import UsageError


def evaluate(
    models: Annotated[list[Path], typer.Argument(help="The base, then the models to judge by it.")],
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            metavar="PATH",
            help="Samples: an .npz, a folder of .npy or of pictures, or a .csv with texts.",
        ),
    ],
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            metavar="KEY",
            help="Array, column or file of the labels; 'label', or the sub-folders of pictures.",
        ),
    ] = None,
    metric: Annotated[
        str,
        typer.Option(
            "--metric",
            "-m",
            help="top1, top5, f1, mse, psnr, spearman, agreement, or your own module:function.",
        ),
    ] = "top1",
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            metavar="MODEL",
            help="A model whose outputs stand in for labels (agreement, mse, psnr, spearman).",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", metavar="NAME", help="The graph output to score; the first."),
    ] = None,
    preprocess: Annotated[
        str | None,
        typer.Option(
            "--preprocess",
            metavar="SPEC",
            help="Pictures: imagenet, unit, signed or raw, then options: imagenet,size=224",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="FILE", help="Texts: a tokenizer.json.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option("--text", metavar="COLUMNS", help="Texts: the column, or two of a pair: a,b"),
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", min=1, help="Texts: cut after this many tokens.")
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(
            "--pairs",
            metavar="joined|cosine",
            help="Two texts in one input, or the cosine of their embeddings (spearman).",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, metavar="N", help="At most N samples, spread over all."),
    ] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(
            "--max-drop",
            metavar="N",
            help="Exit code 1 when a model loses more than this: 0.5% (points), or 0.005.",
        ),
    ] = None,
    target: Annotated[str, typer.Option("--target", help="cpu or cuda.")] = "cpu",
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score models on labelled data: same samples, paired differences.

    Tells a loss from chance: the difference to the first model comes with its 95 % confidence
    interval over the samples. Data sources and preprocessing: docs/data.md.
    """
    from effdl import api
    from effdl.render import evaluate as render
    from effdl.render.console import print_json
    from effdl.render.progress import live
    from effdl.report import to_json

    allowed = None if max_drop is None else parse_drop(max_drop, metric)
    with live(quiet or json) as show:
        report = api.evaluate(
            *models,
            data=data,
            labels=labels,
            metric=metric,
            reference=reference,
            output=output,
            preprocess=preprocess,
            tokenizer=tokenizer,
            text=text,
            length=length,
            pairs=pairs,
            limit=limit,
            max_drop=allowed,
            target=target,
            seed=seed,
            progress=lambda name, share: show(name, f"{share:.0%}"),
        )
    if json:
        print_json(to_json(report))
    elif not quiet:
        render.print_evaluate(report)
    if report.failed:
        raise typer.Exit(1)


def parse_drop(text: str, metric: str) -> float:
    """Read ``0.5%`` as 0.005, and ``0.005`` as it is.

    Raises:
        UsageError: no number of at least 0, or percent of a metric that is no share.
    """
    number = text.strip().removesuffix("%")
    percent = number != text.strip()
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError(f"--max-drop {text}: expected a number or percent", hint="--max-drop 0.5%")
    if percent and metric in ("mse", "psnr"):
        raise UsageError(
            f"--max-drop {text}: {metric} is no share", hint=f"a number in units of {metric}"
        )
    return value / 100 if percent else value
