"""Bytes of a model after general compression: what it costs to ship."""

from __future__ import annotations

import sys
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


def zstd_bytes(data: npt.NDArray[np.generic] | bytes) -> int:
    """Return the bytes of a constant after zstd at level 3."""
    array = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    compressor = _zstd().ZstdCompressor(level=LEVEL)
    parts = (flat[i : i + _CHUNK] for i in range(0, flat.size, _CHUNK))
    return sum(len(compressor.compress(p.tobytes())) for p in parts) + len(compressor.flush())


def _file_size(path: Path) -> int:
    compressor = _zstd().ZstdCompressor(level=LEVEL)
    total = 0
    with path.open("rb") as f:
        while chunk := f.read(_CHUNK):
            total += len(compressor.compress(chunk))
    return total + len(compressor.flush())


def _zstd() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd
