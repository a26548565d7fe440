"""Options that mean the same thing in every command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effdl.errors import UsageError

if TYPE_CHECKING:
    from effdl.data.spec import Source

Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="PATH",
        help="Real inputs: an .npz with one array per graph input, first axis the samples; or a folder.",
    ),
]
Preprocess = Annotated[
    str | None,
    typer.Option(
        "--preprocess",
        metavar="SPEC",
        help="With --data of pictures: imagenet, unit, signed or raw, then options: unit,size=224",
    ),
]
Python = Annotated[
    str | None,
    typer.Option(
        "--python",
        metavar="CMD",
        help="For ssh:HOST and arm-emulated: starts a Python there that has onnxruntime.",
    ),
]
Dim = Annotated[
    list[str] | None,
    typer.Option("--dim", metavar="NAME=N", help="Value of a dynamic dimension, such as batch=8."),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of random inputs.")]
Threads = Annotated[
    int, typer.Option("--threads", min=0, help="Intra-op threads; 0: ONNX Runtime's own choice.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no tables; errors only.")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Every node touched or left alone; tracebacks.")
]


def target_spec(target: str, python: str | None) -> str | dict[str, object]:
    """Join ``--target`` and ``--python``."""
    return target if python is None else {"device": target, "python": python}


def data_source(data: Path | None, preprocess: str | None) -> Path | Source | None:
    """Return what ``--data`` and ``--preprocess`` name together.

    Raises:
        UsageError: a preprocessing of nothing, or one that cannot be read.
    """
    if preprocess is None:
        return data
    if data is None:
        raise UsageError("--preprocess says how pictures become numbers", hint="--data FOLDER")
    from effdl.data.spec import Source, parse_preprocess

    return Source(path=data, preprocess=parse_preprocess(preprocess))


def parse_dims(pairs: list[str] | None) -> dict[str, int]:
    """Read ``["batch=8"]`` as ``{"batch": 8}``.

    Raises:
        UsageError: not NAME=N with N at least 1.
    """
    dims = {}
    for pair in pairs or []:
        name, sign, number = pair.rpartition("=")
        if not sign or not name or not number.isdigit() or int(number) < 1:
            raise UsageError(
                f"--dim {pair}: expected NAME=N with N at least 1", hint="--dim batch=8"
            )
        dims[name] = int(number)
    return dims


def parse_rtol(values: list[str] | None) -> float | dict[str, float] | None:
    """Read ``["1e-3"]`` as 0.001 and ``["out0:1e-3"]`` as ``{"out0": 0.001}``."""
    if not values:
        return None
    named = {}
    for value in values:
        name, sign, number = value.rpartition(":")
        try:
            tolerance = float(number)
        except ValueError:
            raise UsageError(
                f"--rtol {value}: expected a number or OUTPUT:NUMBER", hint="--rtol logits:1e-3"
            ) from None
        if not sign:
            if len(values) > 1:
                raise UsageError("--rtol: give one number, or OUTPUT:NUMBER for each output")
            return tolerance
        named[name] = tolerance
    return named


def parse_size(text: str) -> int:
    """Return bytes from ``64MB``, ``1.5GB``, ``1000``; decimal units.

    Raises:
        UsageError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMG]?)B?\s*", text, re.IGNORECASE)
    size = 0
    if found is not None:
        size = round(float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[found[2].lower()])
    if size < 1:
        raise UsageError(f"'{text}' is no size", hint="write 64MB or 1.5GB")
    return size
