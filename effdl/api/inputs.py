"""What the verbs take: models as files or in memory, and inputs for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import onnx_ir as ir

from effdl.data.dataset import load_dataset
from effdl.data.feeds import Feeds
from effdl.data.random import random_feeds
from effdl.data.spec import Source
from effdl.errors import UsageError
from effdl.graph import io
from effdl.graph.dims import check_dims, input_dims
from effdl.graph.scratch import scratch
from effdl.runtime.target import Target, where_to_check

ModelLike = str | Path | ir.Model
"""A model file, or a model in memory."""
TargetLike = str | Mapping[str, object]
"""``cpu``, ``cuda``, ``ssh:HOST``, ``arm-emulated``, or a mapping as in a recipe, see
``effdl.runtime.target.parse_target``."""


def feeds_of(
    model: Path,
    data: str | Path | Source | None,
    dims: Mapping[str, int] | None,
    seed: int,
    target: Target,
    count: int,
) -> Feeds:
    """Return the user's samples, or random ones in the model's shapes."""
    loaded = io.load(model)
    if data is not None:
        return load_dataset(data, loaded, batch=_batch(loaded, dims)).feeds
    here = where_to_check(target)[0]  # what runs elsewhere is tried on this machine
    return random_feeds(loaded, dims=dims, seed=seed, count=count, target=here)


def _batch(model: ir.Model, dims: Mapping[str, int] | None) -> int:
    """Return the samples per feed that ``dims`` ask for; the other sizes of real inputs are given."""
    chosen = check_dims(model, dims)
    first = {name for name, _, axis in input_dims(model) if axis == 0}
    for name in chosen:
        if name not in first:
            raise UsageError(
                f"dimension '{name}' is as the real inputs have it",
                hint="leave out --data for random inputs of any size",
            )
    sizes = set(chosen.values())
    if len(sizes) > 1:
        raise UsageError("real inputs have one number of samples per run, not several")
    return sizes.pop() if sizes else 1


@contextmanager
def as_file(model: ModelLike) -> Iterator[Path]:
    """Give a model as a file; one in memory is written to a temporary folder meanwhile."""
    if not isinstance(model, ir.Model):
        yield Path(model)
        return
    with scratch() as folder:
        path = folder / "model.onnx"
        io.save(model, path)
        yield path


@contextmanager
def as_files(models: Sequence[ModelLike]) -> Iterator[list[Path]]:
    """Give several models as files, see ``as_file``."""
    with ExitStack() as stack:
        yield [stack.enter_context(as_file(m)) for m in models]
