"""The command line: ``effdl VERB``. Parses, calls, renders, and turns errors into exit codes."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from effdl import __version__
from effdl.cli.bench import bench
from effdl.cli.compare import compare
from effdl.cli.doctor import doctor
from effdl.cli.evaluate import evaluate
from effdl.cli.explain import explain
from effdl.cli.inspect import inspect
from effdl.cli.optimize import optimize
from effdl.cli.passes import passes
from effdl.cli.recipe import recipe_app
from effdl.cli.report import report
from effdl.errors import EffdlError
from effdl.runtime.collector import collect_rarely

app = typer.Typer(
    name="effdl",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 ok, 1 a check or budget failed, 2 wrong usage, recipe or model, "
    "3 target not available.",
)
app.command()(optimize)
app.command()(bench)
app.command()(compare)
app.command()(evaluate)
app.command()(inspect)
app.command()(explain)
app.command()(passes)
app.add_typer(recipe_app, name="recipe")
app.command()(report)
app.command()(doctor)

_INTERRUPTED = 130


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"effdl {__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make an ONNX model smaller and faster, prove that it still computes the right thing."""


def main() -> None:
    """Run the command line and exit with its code."""
    collect_rarely()
    for name in ("onnx_ir", "onnxscript"):  # their warnings are not addressed to our user
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app()
    except EffdlError as e:
        _fail(str(e), e.hint, e.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except SystemExit as e:
        if e.code == _INTERRUPTED:  # Typer makes this of Ctrl-C, without a word
            _fail("interrupted; nothing was written", "", _INTERRUPTED)
        raise
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written", "", _INTERRUPTED)
    except MemoryError:
        _fail("out of memory", "a smaller --dim, fewer calibration samples", 1)
    except Exception as e:
        if "--verbose" in sys.argv or "-v" in sys.argv:
            raise
        place = getattr(e, "reproducer", None)
        hint = (
            f"a bug of effdl; {place} shows it"
            if place
            else "a bug of effdl; --verbose shows where"
        )
        _fail(f"{type(e).__name__}: {e}" if place is None else str(e), hint, 1)


def _fail(message: str, hint: str, code: int) -> None:
    from effdl.render.console import print_error

    print_error(message, hint)
    sys.exit(code)
