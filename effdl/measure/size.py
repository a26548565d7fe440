"""Bytes of a model after general compression: what it costs to ship."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from effdl.graph.io import data_files

LEVEL = 3
"""The level of zstd that package stores and download servers use by default."""
_CHUNK = 1 << 20


def zstd_size(path: Path) -> int:
    """Return the bytes of a model after zstd at level 3, its external weight files included.

    Every file is compressed by itself, in constant memory.

    Args:
        path: the ``.onnx`` file.
    """
    return sum(_file_size(f) for f in (path, *data_files(path)))


def zstd_bytes(array: npt.NDArray[np.generic]) -> int:
    """Return the bytes of a constant after zstd at level 3."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return _compressed(flat[i : i + _CHUNK].tobytes() for i in range(0, flat.size, _CHUNK))


def _file_size(path: Path) -> int:
    with path.open("rb") as f:
        return _compressed(iter(lambda: f.read(_CHUNK), b""))


def _compressed(parts: Iterable[bytes]) -> int:
    compressor = _zstd().ZstdCompressor(level=LEVEL)
    return sum(len(compressor.compress(p)) for p in parts) + len(compressor.flush())


def _zstd() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd
