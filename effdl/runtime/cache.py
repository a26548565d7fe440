"""Small facts that are kept from one command to the next, in the user's cache folder.

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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
        if path is None:
            return
        text = json.dumps(
            {"schema": self._schema, "key": dict(key), "time": time.time(), "facts": dict(facts)}
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{self._name}-")
        except OSError:  # a read-only home: the facts are measured again next time
            return
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as f:
                f.write(text)
            os.replace(name, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(name)

    def _path(self, key: Key) -> Path | None:
        if self._folder is None:
            return None
        digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
        return self._folder / f"{self._name}-{digest[:16]}.json"
