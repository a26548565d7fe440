"""Temporary folders that are locked while their owner lives, so that leftovers can be told."""

from __future__ import annotations

import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "effdl-tmp-"
_HELD = ".held"


@contextmanager
def scratch() -> Iterator[Path]:
    """Give an empty folder in the system's temporary folder; it is gone at the end.

    Folders that killed processes left there are removed on the way.
    """
    place = Path(tempfile.gettempdir())
    remove_abandoned(place, _PREFIX)
    with locked_folder(place, _PREFIX) as folder:
        yield folder


@contextmanager
def locked_folder(place: Path, prefix: str) -> Iterator[Path]:
    """Make a folder ``PREFIX...`` in ``place`` and hold it; it is gone at the end.

    Raises:
        OSError: ``place`` cannot be written.
    """
    with exclusive(place):  # nobody takes the folder for abandoned before it is held
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        lock = _hold(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_abandoned(place: Path, prefix: str) -> None:
    """Remove the folders ``PREFIX...`` in ``place`` that no living process holds."""
    if sys.platform == "win32":  # no lock tells who lives
        return
    with exclusive(place):
        for folder in place.glob(f"{glob.escape(prefix)}*"):
            lock = _hold(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Let one process at a time rename files in ``folder``."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    fd = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: one run at a time is the user's part
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _hold(folder: Path) -> int | None:
    """Lock a file in ``folder`` until the descriptor is closed; None when another process has it.

    Not the folder itself: ``exclusive`` locks those.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    with suppress(OSError):
        fd = os.open(folder / _HELD, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            return None
        return fd
    return None
