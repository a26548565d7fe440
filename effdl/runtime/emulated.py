"""A Python for 64-bit Arm, run by an emulator on this machine: it tells right from wrong, never time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from effdl.errors import TargetError
from effdl.runtime.bundle import worker_archive
from effdl.runtime.client import WorkerProcess
from effdl.runtime.ssh import greet, machine_of, need_provider, parts_of, with_facts
from effdl.runtime.target import ARM_PYTHON, CORES, Target, check_reachable

_DEFAULT_CORE = "n1"


class EmulatedHost:
    """One emulated Arm core; see ``runtime.host.Host``.

    The command that starts its Python is told the core by the variables ``QEMU_CPU`` (which qemu-user
    reads) and ``EFFDL_QEMU_CPU``, and must see the system's temporary folder: a container needs both
    passed in.

    Args:
        target: an arm-emulated target; without a core it is n1.
        here: a temporary folder.

    Raises:
        TargetError: its Python does not work, is none for Arm, or runs as another core.
    """

    emulated = True

    def __init__(self, target: Target, here: Path) -> None:
        self._here = here
        self._python = target.python or (ARM_PYTHON,)
        self._core = CORES[target.core or _DEFAULT_CORE][0]
        self._archive = here / "worker.pyz"
        self._archive.write_bytes(worker_archive())
        self._sent: dict[tuple[str, int, int], str] = {}
        self._names = 0
        self.target = target
        self._first: WorkerProcess | None = None
        first = self.worker(target.name)
        try:
            self.facts = greet(first)
            self.machine = machine_of(self.facts)
            self.onnxruntime = str(self.facts["onnxruntime"])
            self._check()
            need_provider(target, self.facts)
        except BaseException:
            first.close()
            raise
        self._first = first  # it starts slowly, and has done nothing yet
        self.target = with_facts(target, self.machine)

    def worker(self, where: str) -> WorkerProcess:
        """Start a fresh worker process under the emulator."""
        if self._first is not None:
            first, self._first = self._first, None
            first.where = where
            return first
        core = self._core.lower()
        return WorkerProcess(
            where,
            [*self._python, str(self._archive)],
            environment={"QEMU_CPU": core, "EFFDL_QEMU_CPU": core},
            place=self.target.name,
        )

    def send(self, path: Path) -> str:
        """Put a model with the files of its weights into the folder that the emulated Python sees."""
        facts = path.stat()
        key = (str(path.absolute()), facts.st_mtime_ns, facts.st_size)
        if key not in self._sent:
            folder = Path(self.output("m"))
            for file, name in parts_of(path):
                goal = folder / name
                goal.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(file, goal)
                except OSError:  # another disk
                    shutil.copyfile(file, goal)
            self._sent[key] = str(folder / path.name)
        return self._sent[key]

    def discard(self, path: Path) -> None:
        """Forget a file that will not be needed again; it goes with the host."""

    def output(self, name: str) -> str:
        """Return a path in the temporary folder, another one each time."""
        self._names += 1
        return str(self._here / f"{self._names}-{name}")

    def fetch(self, path: str) -> Path:
        """Return the path: the file is here already."""
        return Path(path)

    def load_average(self) -> float | None:
        """Return None: nothing is timed here."""
        return None

    def close(self) -> None:
        """End what still runs."""
        if self._first is not None:
            self._first.close()

    def _check(self) -> None:
        program = self._python[0]
        if self.machine.arch != "arm64":
            raise TargetError(
                f"{program} is a Python for {self.machine.arch}, not for 64-bit Arm",
                hint="--python CMD names one for aarch64",
                where=self.target.name,
            )
        if not self.machine.emulator:
            raise TargetError(
                f"{program} runs on a real Arm processor", hint="--target cpu measures on it"
            )
        if self.machine.cpu.split(" (")[0] != self._core:
            raise TargetError(
                f"{program} runs as {self.machine.cpu}, not as {self._core}",
                hint="the command must pass the variable QEMU_CPU on: docker run -e QEMU_CPU ...",
                where=self.target.name,
            )


@contextmanager
def open_emulated(target: Target, here: Path) -> Iterator[EmulatedHost]:
    """Start the emulated Python once and see that it is what it should be.

    Raises:
        TargetError: there is none, or it does not work.
    """
    check_reachable(target)
    host = EmulatedHost(target, here)
    try:
        yield host
    finally:
        host.close()
