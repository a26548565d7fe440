"""Small facts and arrays that are kept from one command to the next, in the user's cache folder.

What is kept there can be lost or broken at any time: it is measured again then.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Key = Mapping[str, object]


def user_cache() -> Path | None:
    """Return the folder of this user's caches, None when there is no home.

    Linux: $XDG_CACHE_HOME or ~/.cache (XDG Base Directory Specification); macOS: ~/Library/Caches;
    Windows: %LOCALAPPDATA%.
    """
    named = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", "")
    if named and os.path.isabs(named):
        return Path(named) / "effdl"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "effdl"
    return home / ".cache" / "effdl"


class Cache:
    """One kind of facts: a small JSON file for each key.

    Args:
        name: of the kind, the first part of every file name.
        schema: number of the form of the facts; those of another form are not read.
        folder: where they lie; the user's own when None.
    """

    def __init__(self, name: str, schema: int, folder: Path | None = None) -> None:
        self._name = name
        self._schema = schema
        self._folder = folder if folder is not None else user_cache()

    def get(self, key: Key, max_age: float) -> dict[str, Any] | None:
        """Return what was put there, None when it is not there, too old, of another form or broken.

        Args:
            key: as in ``put``.
            max_age: in seconds.
        """
        path = self._path(key)
        if path is None:
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            fresh = 0 <= time.time() - found["time"] <= max_age
            known = found["schema"] == self._schema and found["key"] == dict(key)
            facts = found["facts"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return facts if fresh and known and isinstance(facts, dict) else None

    def put(self, key: Key, facts: Mapping[str, Any]) -> None:
        """Keep ``facts``; where the folder cannot be written nothing is kept.

        The file is written beside its place and renamed, so that a reader never sees half of it.
        """
        path = self._path(key)
        text = json.dumps(
            {"schema": self._schema, "key": dict(key), "time": time.time(), "facts": dict(facts)}
        )
        if path is not None:
            _write(path, lambda file: file.write(text.encode()))

    def _path(self, key: Key) -> Path | None:
        if self._folder is None:
            return None
        digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
        return self._folder / f"{self._name}-{digest[:16]}.json"


class ArrayCache:
    """One kind of arrays: a file for each key, and the oldest go where all together are too large.

    Args:
        name: of the kind, the folder in the cache that holds the files.
        max_bytes: of all files together.
        folder: where that folder lies; the user's own when None.
    """

    def __init__(self, name: str, max_bytes: int, folder: Path | None = None) -> None:
        home = folder if folder is not None else user_cache()
        self._folder = home / name if home is not None else None
        self._max_bytes = max_bytes

    def get(self, key: str) -> dict[str, Array] | None:
        """Return what was put there under a key (a digest), None when it is not there or broken."""
        path = self._path(key)
        if path is None:
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                found = dict(file.items())
            os.utime(path)  # used: it is not the oldest any more
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return found

    def put(self, key: str, arrays: Mapping[str, Array]) -> None:
        """Keep arrays; nothing is kept where they are too large, or the folder cannot be written."""
        path = self._path(key)
        if path is None or sum(a.nbytes for a in arrays.values()) > self._max_bytes // 2:
            return
        _write(path, lambda file: np.savez(file, **dict(arrays)))  # type: ignore[arg-type]
        with contextlib.suppress(OSError):
            self._make_room(path.parent)

    def _make_room(self, folder: Path) -> None:
        files = [(f.stat(), f) for f in folder.iterdir()]
        total = sum(s.st_size for s, _ in files)
        for found, file in sorted(files, key=lambda f: f[0].st_mtime):
            if total <= self._max_bytes:
                break
            file.unlink()
            total -= found.st_size

    def _path(self, key: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{key}.npz"


def _write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write a file beside its place and rename it; where that cannot be done there is none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")
    except OSError:  # a read-only home
        return
    try:
        with os.fdopen(handle, "wb") as file:
            fill(file)
        os.replace(name, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.unlink(name)
        if not isinstance(e, OSError):
            raise
