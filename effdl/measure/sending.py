"""Feeds as files that a worker reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effdl.data.feeds import Feed
from effdl.runtime.host import Host


def write_feeds(feeds: Sequence[Feed], folder: Path, host: Host) -> list[dict[str, Any]]:
    """Write feeds, send them to the host and return a worker's ``feeds`` option."""
    files = []
    for k, feed in enumerate(feeds):
        path = folder / f"feed{k}.npz"
        # Numbered, since a graph input may have a name that is no keyword or file name.
        np.savez(path, *[_unpickled(a) for a in feed.values()])
        files.append({"path": host.send(path), "names": list(feed)})
    return files


def _unpickled(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array.astype(np.str_) if array.dtype == object else array


def describe(feed: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, str]:
    """Return ``name: dtype[shape]`` of each array."""
    return {
        n: f"{'string' if a.dtype.kind in 'OU' else a.dtype.name}[{','.join(map(str, a.shape))}]"
        for n, a in feed.items()
    }
