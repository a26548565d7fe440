"""Energy counters: RAPL of the processor package (Linux), NVML of an NVIDIA GPU.

Both count everything that the chip does, idle power and other programs included.

Source: Linux kernel, Documentation/power/powercap/powercap.rst; NVML API reference.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from effdl.runtime.worker.nvml import Nvml

POWERCAP = "/sys/class/powercap"


class Unreadable(Exception):
    """Why there is no counter."""


class Rapl:
    """The package counters below ``root``; Intel's and AMD's processors share the interface.

    Args:
        root: the powercap folder.

    Raises:
        Unreadable: there is none, or only root may read it.
    """

    source = "RAPL, whole processor package"

    def __init__(self, root: str = POWERCAP) -> None:
        self._domains: list[tuple[Path, int]] = []
        for folder in sorted(Path(root).glob("intel-rapl:*")):
            try:  # intel-rapl:0 is a package, intel-rapl:0:1 a part of it, psys the whole board
                if folder.name.count(":") == 1 and _text(folder / "name").startswith("package"):
                    span = int(_text(folder / "max_energy_range_uj"))
                    self._domains.append((folder / "energy_uj", span))
            except (OSError, ValueError):
                continue  # a domain that does not tell its range cannot be summed up
        if not self._domains:
            raise Unreadable("this machine has no RAPL counter")
        try:
            self.read()
        except PermissionError as e:
            raise Unreadable(f"{e.filename} can be read by root only") from e
        except (OSError, ValueError) as e:
            raise Unreadable(f"the RAPL counter cannot be read: {e}") from e

    def read(self) -> list[int]:
        """Return each package's counter in microjoule."""
        return [int(_text(path)) for path, _ in self._domains]

    def between(self, before: list[int], after: list[int]) -> int:
        """Return microjoule between two readings; a counter starts again at 0 above its range."""
        total = 0
        for b, a, (_, span) in zip(before, after, self._domains):  # noqa: B905 (py3.8)
            total += a - b if a >= b else a - b + span
        return total


class Board:
    """The energy counter of a GPU.

    Args:
        nvml: the GPU.

    Raises:
        Unreadable: the GPU has none.
    """

    source = "NVML, whole GPU"

    def __init__(self, nvml: Nvml | None) -> None:
        if nvml is None:
            raise Unreadable("NVIDIA's management library (libnvidia-ml) cannot be used here")
        if nvml.energy_uj() is None:
            raise Unreadable("this GPU has no energy counter")
        self._nvml = nvml

    def read(self) -> list[int]:
        """Return the counter in microjoule."""
        return [self._nvml.energy_uj() or 0]

    def between(self, before: list[int], after: list[int]) -> int:
        """Return microjoule between two readings."""
        return max(0, after[0] - before[0])


class Meter:
    """Sums up the energy of timed runs.

    Args:
        counter: what is read before and after; None for nothing.
        note: the source of the numbers, or why there are none.
    """

    def __init__(self, counter: Any, note: str) -> None:
        self._counter = counter
        self.note = note
        self._before: list[int] | None = None
        self._total = self._runs = 0

    def begin(self) -> None:
        """Read the counter right before a timed loop."""
        self._before = self._read()

    def end(self, runs: int) -> None:
        """Read it right after the loop, which was ``runs`` inferences."""
        after = self._read()
        if self._before is not None and after is not None:
            self._total += self._counter.between(self._before, after)
            self._runs += runs
        self._before = None

    @property
    def millijoule(self) -> float | None:
        """Energy of one inference in millijoule, None when nothing was counted."""
        return self._total / 1000 / self._runs if self._runs and self._total else None

    def _read(self) -> list[int] | None:
        if self._counter is None:
            return None
        try:
            values: list[int] = self._counter.read()
        except (OSError, ValueError) as e:  # the permission was taken away meanwhile
            self._counter, self.note = None, f"the counter cannot be read any more: {e}"
            return None
        return values


def open_meter(gpu: bool, nvml: Nvml | None = None, root: str = POWERCAP) -> Meter:
    """Return the meter of the chip that computes.

    Args:
        gpu: whether that is an NVIDIA GPU.
        nvml: the GPU.
        root: the powercap folder.
    """
    try:
        if gpu:
            counter: Any = Board(nvml)
        elif sys.platform.startswith("linux"):
            counter = Rapl(root)
        else:
            raise Unreadable(f"no energy counter is read on {sys.platform}")
    except Unreadable as e:
        return Meter(None, str(e))
    return Meter(counter, counter.source)


def _text(path: Path) -> str:
    return path.read_text(encoding="ascii").strip()
