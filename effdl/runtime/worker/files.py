"""What whoever sends files to this machine wants to know of it: room, and whether a file came whole."""

from __future__ import annotations

import hashlib
import os
import shutil

from effdl.runtime.worker.refusal import Refusal

_PIECE = 1 << 20


def room(path: str) -> dict[str, int]:
    """Return the free bytes of the disk that ``path`` is on, and of memory (0 where not told)."""
    try:
        disk = shutil.disk_usage(path).free
    except OSError as e:
        raise Refusal("file", f"{path}: {e.strerror or e}") from e
    return {"disk": disk, "memory": free_memory()}


def free_memory() -> int:
    """Return the bytes of memory that programs may still take, 0 where the system does not tell."""
    try:
        with open("/proc/meminfo") as f:
            for line in f:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # no /proc: macOS
    return 0


def digest(path: str) -> dict[str, str]:
    """Return the SHA-256 of a file in hex."""
    found = hashlib.sha256()
    try:
        with open(path, "rb") as f:
            for piece in iter(lambda: f.read(_PIECE), b""):
                found.update(piece)
    except OSError as e:
        raise Refusal("file", f"{path}: {e.strerror or e}") from e
    return {"sha256": found.hexdigest()}


def place(source: str, goal: str) -> dict[str, str]:
    """Give a file a second name, in a folder that is made; a copy where the disk has no hard links."""
    try:
        os.makedirs(os.path.dirname(goal), exist_ok=True)
        try:
            os.link(source, goal)
        except OSError:
            shutil.copyfile(source, goal)
    except OSError as e:
        raise Refusal("file", f"{goal}: {e.strerror or e}") from e
    return {"path": goal}


def remove(path: str) -> dict[str, str]:
    """Remove a file, or a folder with all that is in it, if it is there."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        os.unlink(path)
    return {"path": path}
