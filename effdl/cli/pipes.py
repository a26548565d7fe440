"""Models on stdin and stdout, and reports into files."""

from __future__ import annotations

import json as jsonlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from effdl.errors import ModelError, OutputError, UsageError
from effdl.graph.io import data_files
from effdl.graph.scratch import scratch


@contextmanager
def model_in(name: str) -> Iterator[Path]:
    """Give the model file ``name``; ``-`` is read from stdin into a temporary file."""
    if name != "-":
        yield Path(name)
        return
    if sys.stdin.isatty():
        raise UsageError("- reads the model from stdin, and stdin is a terminal")
    with scratch() as folder:
        path = folder / "stdin.onnx"
        with path.open("wb") as f:
            shutil.copyfileobj(sys.stdin.buffer, f)
        if not path.stat().st_size:
            raise ModelError("no bytes: expected an ONNX model", where="stdin")
        yield path


@contextmanager
def model_out(name: str | None, *, json: bool) -> Iterator[Path | None]:
    """Give the file to write; ``-`` is a temporary file that is copied to stdout at the end."""
    if name != "-":
        yield None if name is None else Path(name)
        return
    if json:
        raise UsageError("-o - and --json both write to stdout", hint="--report FILE.json")
    if sys.stdout.isatty():
        raise UsageError(
            "-o - writes the model to stdout, and stdout is a terminal", hint="| cat > out.onnx"
        )
    with scratch() as folder:
        path = folder / "stdout.onnx"
        yield path
        if not path.exists():  # a dry run
            return
        if data_files(path):
            raise OutputError(
                "the model has weights beside it, which a pipe cannot carry",
                hint="-o FILE.onnx",
                where="-",
            )
        with path.open("rb") as f:
            shutil.copyfileobj(f, sys.stdout.buffer)
        sys.stdout.buffer.flush()


def write_text(path: Path, data: Mapping[str, Any] | str) -> None:
    """Write a text, or plain data as JSON, in one rename.

    Raises:
        OutputError: the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.effdl-tmp")
    text = (
        data if isinstance(data, str) else jsonlib.dumps(data, indent=2, ensure_ascii=False) + "\n"
    )
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"the report cannot be written: {e.strerror or e}", where=str(path)
        ) from e
