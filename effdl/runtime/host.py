"""The machine that a model is measured on: where its files go and how a worker is started there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from effdl.errors import TargetError
from effdl.graph.scratch import scratch
from effdl.runtime.bundle import worker_archive
from effdl.runtime.client import WorkerProcess
from effdl.runtime.emulated import open_emulated
from effdl.runtime.machine import Machine, this_machine
from effdl.runtime.ssh import open_ssh
from effdl.runtime.target import Target, check_available
from effdl.runtime.versions import installed


class Host(Protocol):
    """A machine with onnxruntime on it.

    Args:
        target: what it is, with the facts (``arch``, ``isa``) that it told itself.
        machine: its processor and memory.
        emulated: its times mean nothing.
        onnxruntime: the version there.
    """

    target: Target
    machine: Machine
    emulated: bool
    onnxruntime: str

    def worker(self, where: str) -> WorkerProcess:
        """Start a fresh worker process; ``where`` is the model's name, for messages."""

    def send(self, path: Path) -> str:
        """Make a file (a model with the files of its weights) readable there; returns its path there.

        A file that was sent before is not sent again.
        """

    def discard(self, path: Path) -> None:
        """Give back the room that a file took there; it may be sent again later."""

    def output(self, name: str) -> str:
        """Return a path there that a worker may write to."""

    def fetch(self, path: str) -> Path:
        """Bring a file back; returns its path here, which lives as long as the host is open."""

    def load_average(self) -> float | None:
        """Return how many programs there wanted to run in the last minute, None when not told."""


class LocalHost:
    """This machine.

    Args:
        target: ``cpu`` or ``cuda``.
        folder: a temporary folder.
        command: how to start Python; this one by default.
    """

    def __init__(self, target: Target, folder: Path, command: tuple[str, ...] = ()) -> None:
        self.target = target
        self.machine = this_machine()
        self.emulated = bool(self.machine.emulator)
        self.onnxruntime = installed("onnxruntime") or installed("onnxruntime-gpu")
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

    def discard(self, path: Path) -> None:
        """Do nothing: the file is the caller's."""

    def output(self, name: str) -> str:
        """Return a path in the temporary folder."""
        return str(self._folder / name)

    def fetch(self, path: str) -> Path:
        """Return the path: the file is here already."""
        return Path(path)

    def load_average(self) -> float | None:
        """Return the system's own figure, None where it has none."""
        return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


@contextmanager
def open_host(target: Target) -> Iterator[Host]:
    """Reach the target's machine; everything that was put there is removed at the end.

    The ``target`` of the host has the facts of its machine, which an ssh target has not before.

    Raises:
        TargetError: it cannot be reached, or nothing can run there.
    """
    with scratch() as folder:
        if target.device == "ssh":
            with open_ssh(target, folder) as far:
                yield far
        elif target.device == "arm-emulated":
            with open_emulated(target, folder) as emulated:
                yield emulated
        else:
            check_available(target)
            yield LocalHost(target, folder)


def need_clock(host: Host) -> None:
    """Raise TargetError when times of the host mean nothing."""
    if host.emulated:
        raise no_latency(host.target.name, host.machine.emulator)


def no_latency(name: str, emulator: str = "") -> TargetError:
    """Return the refusal to measure latency on an emulated machine."""
    by = f" by {emulator}" if emulator else ""
    return TargetError(
        f"latency is not measured on {name}: its processor is emulated{by}, its times mean nothing",
        hint=f"effdl compare MODEL --target {name} says whether its results are right there",
    )
