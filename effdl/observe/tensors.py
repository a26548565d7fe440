"""Runs a model over calibration data and hands out what its tensors hold, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.data.feeds import Feeds, nbytes
from effdl.measure.taps import chunks, sizes, tapped
from effdl.observe import MAX_BYTES
from effdl.runtime.target import parse_target

Array = npt.NDArray[np.generic]


def tensors(
    model: ir.Model,
    names: Sequence[str],
    feeds: Feeds,
    *,
    threads: int = 0,
    max_bytes: int = MAX_BYTES,
) -> Iterator[tuple[str, Array]]:
    """Yield each tensor of ``names`` for each feed.

    The activations of one feed are in memory at a time, and of them at most ``max_bytes`` (but at
    least one tensor): where they are more, the model runs over the data several times.

    Args:
        model: is not changed.
        names: values of its main graph: graph inputs or outputs of nodes.
        feeds: calibration samples.
        threads: intra-op threads, 0 for ONNX Runtime's choice.
        max_bytes: see above.

    Raises:
        ModelError: ONNX Runtime cannot load or run the model.
    """
    inputs = {v.name for v in model.graph.inputs}
    computed = [n for n in names if n not in inputs]
    for name in (n for n in names if n in inputs):
        for feed in feeds:
            yield name, feed[name]
    if not computed:
        return
    place = parse_target("cpu", threads)
    size = sizes(model, computed, max(feeds, key=nbytes), place)
    for chunk in chunks(computed, size, max_bytes):
        session = tapped(model, chunk, place, optimize=True)
        for feed in feeds:
            found = session.run(feed)
            for name in chunk:
                yield name, found.pop(name)
        del session
