"""``effdl report``, and the files that ``--report`` writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effdl.cli.options import Verbose
from effdl.errors import UsageError

if TYPE_CHECKING:
    from effdl.report import RunReport

SUFFIXES = (".json", ".md", ".html")


def report(
    run: Annotated[
        Path,
        typer.Argument(help="What `effdl optimize --report run.json` wrote.", metavar="run.json"),
    ],
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write it as FILE.html, FILE.md or FILE.json; may be given more than once.",
        ),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Show an earlier run again, or as HTML or Markdown.

    The HTML is one file without script or network, with charts of every step, to be mailed, attached
    or printed. The Markdown fits a comment on a pull request.
    """
    goals = check_suffixes(output or (), "-o")
    found = read_report(run)
    if goals:
        write_reports(goals, found)
        return
    from effdl.render.run import print_run

    print_run(found, verbose=verbose)


def check_suffixes(paths: Sequence[Path], option: str) -> list[Path]:
    """Return the paths when every one has a suffix that says what to write.

    Raises:
        UsageError: another suffix, or none.
    """
    for path in paths:
        if path.suffix.lower() not in SUFFIXES:
            raise UsageError(
                f"{option} {path}: the suffix says what is written",
                hint=f"one of {', '.join(SUFFIXES)}",
            )
    return list(paths)


def read_report(path: Path) -> RunReport:
    """Read a report of a run.

    Raises:
        UsageError: no file, no JSON, another kind of report or another schema.
    """
    import json

    from effdl.report import RunReport, from_json

    try:
        data = json.loads(path.read_bytes())
    except OSError as e:
        raise UsageError(f"cannot be read: {e.strerror or e}", where=str(path)) from e
    except ValueError as e:
        raise UsageError(
            "this is no JSON",
            hint="effdl optimize ... --report run.json writes it",
            where=str(path),
        ) from e
    return from_json(RunReport, data, where=str(path))


def write_reports(paths: Sequence[Path], found: RunReport) -> None:
    """Write a report into every file, in the form that its suffix names.

    Raises:
        OutputError: a place cannot be written.
    """
    from effdl.cli.pipes import write_text
    from effdl.render.html import run_html
    from effdl.render.markdown import run_markdown
    from effdl.report import to_json

    for path in paths:
        match path.suffix.lower():
            case ".html":
                write_text(path, run_html(found))
            case ".md":
                write_text(path, run_markdown(found))
            case _:
                write_text(path, to_json(found))
