"""Statistics of earlier runs, kept in the user's cache by the content of the model and the data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from effdl.data.feeds import Feeds
from effdl.graph.digest import digests
from effdl.observe.rows import Rows
from effdl.runtime.cache import ArrayCache

Array = npt.NDArray[np.generic]
_SCHEMA = 1
"""Of what is kept: another number where it is computed otherwise."""
_MEGABYTES = 1024
VARIABLE = "EFFDL_CACHE_MB"
"""Environment variable: how much the user's cache may hold; 0 for nothing."""


class Kept:
    """What was seen of the layers of one model on one set of data, now or earlier.

    The key of a layer is what computes its input, so that a change behind it does no harm.
    """

    def __init__(self, model: ir.Model, feeds: Feeds) -> None:
        self._model = model
        self._feeds = feeds
        self._cache = ArrayCache("moments", allowed()) if allowed() else None

    def get(self, rows: Rows) -> dict[str, Array] | None:
        """Return the arrays that were kept for a layer, None where there are none."""
        return None if self._cache is None else self._cache.get(self._key(rows))

    def put(self, rows: Rows, arrays: Mapping[str, Array]) -> None:
        """Keep arrays for a layer."""
        if self._cache is not None:
            self._cache.put(self._key(rows), arrays)

    def _key(self, rows: Rows) -> str:
        what = (_SCHEMA, ort.__version__, rows.width, rows.groups, rows.window)
        made = self._made.get(rows.value, rows.value.encode())
        return hashlib.sha256(repr(what).encode() + made + self._data).hexdigest()[:32]

    @cached_property
    def _made(self) -> dict[str, bytes]:
        return digests(self._model)

    @cached_property
    def _data(self) -> bytes:
        whole = hashlib.sha256()
        for feed in self._feeds:
            for name, array in sorted(feed.items()):
                whole.update(f"{name} {array.dtype} {array.shape} ".encode())
                whole.update(np.ascontiguousarray(array).tobytes())
        return whole.digest()


def allowed() -> int:
    """Return the bytes that the cache may hold."""
    try:
        return int(float(os.environ.get(VARIABLE, _MEGABYTES)) * (1 << 20))
    except ValueError:
        return 0
