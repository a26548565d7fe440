"""The machine that a model is measured on: where its files go and how a worker is started there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from effdl.graph.scratch import scratch
from effdl.runtime.bundle import worker_archive
from effdl.runtime.client import WorkerProcess
from effdl.runtime.target import Target, check_available


class Host(Protocol):
    """A machine with onnxruntime on it.

    Args:
        target: what it is, with the facts (``arch``, ``isa``) that it told itself.
        emulated: its times mean nothing.
    """

    target: Target
    emulated: bool

    def worker(self, where: str) -> WorkerProcess:
        """Start a fresh worker process; ``where`` is the model's name, for messages."""

    def send(self, path: Path) -> str:
        """Make a file (a model with the files of its weights) readable there; returns its path there.

        A file that was sent before is not sent again.
        """

    def output(self, name: str) -> str:
        """Return a path there that a worker may write to."""

    def fetch(self, path: str) -> Path:
        """Bring a file back; returns its path here, which lives as long as the host is open."""


class LocalHost:
    """This machine.

    Args:
        target: ``cpu`` or ``cuda``.
        folder: a temporary folder.
        command: how to start Python; this one by default.
    """

    emulated = False

    def __init__(self, target: Target, folder: Path, command: tuple[str, ...] = ()) -> None:
        self.target = target
        self._folder = folder
        self._archive = folder / "worker.pyz"
        self._archive.write_bytes(worker_archive())
        self._command = command or (sys.executable,)

    def worker(self, where: str) -> WorkerProcess:
        """Start a fresh worker process."""
        return WorkerProcess(where, [*self._command, str(self._archive)])

    def send(self, path: Path) -> str:
        """Return the absolute path: the file is here already."""
        return str(path.absolute())

    def output(self, name: str) -> str:
        """Return a path in the temporary folder."""
        return str(self._folder / name)

    def fetch(self, path: str) -> Path:
        """Return the path: the file is here already."""
        return Path(path)


@contextmanager
def open_host(target: Target) -> Iterator[Host]:
    """Reach the target's machine; everything that was put there is removed at the end.

    Raises:
        TargetError: it cannot be reached, or nothing can run there.
    """
    check_available(target)
    with scratch() as folder:
        yield LocalHost(target, folder)
