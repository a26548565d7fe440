"""``effdl bench --profile`` and ``--placement``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effdl.errors import UsageError

TOP = 10


def bench_profile(
    models: Sequence[Path],
    *,
    times: bool,
    placement: bool,
    top: int,
    export_json: Path | None,
    json: bool,
    quiet: bool,
    **measured: Any,
) -> None:
    """Measure where the time of one model or two goes, and print it.

    Args:
        models: files.
        times: print times by operator and node; ``placement`` the execution providers.
        top: how many nodes to list.
        export_json: a file for the whole report.
        json: print the report as JSON; ``quiet`` print nothing.
        measured: what ``api.profile`` takes besides.
    """
    from effdl import api
    from effdl.cli.pipes import write_text
    from effdl.render.console import print_json
    from effdl.render.profile import print_profile
    from effdl.render.progress import live
    from effdl.report import to_json

    with live(quiet or json) as show:
        report = api.profile(
            *models,
            **measured,
            progress=lambda text, share: show("profile", f"{text} {share:.0%}"),
        )
    if export_json is not None:
        write_text(export_json, to_json(report))
    if json:
        print_json(to_json(report))
    elif not quiet:
        print_profile(report, times=times, places=placement, top=top)


def refuse_with_profile(counts: Sequence[int], **options: object) -> None:
    """Raise UsageError when an option was given that means nothing in a profile."""
    if len(counts) > 1:
        raise UsageError("--profile and --placement take one number of --threads")
    for name, value in options.items():
        if value:
            option = "--" + name.replace("_", "-")
            raise UsageError(
                f"{option} does not go with --profile or --placement",
                hint=f"leave {option} away, or measure without them",
            )
