"""A machine that the OpenSSH client reaches: models are sent, workers run there, nothing stays."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from effdl.errors import EffdlError, TargetError
from effdl.graph.io import data_files
from effdl.runtime.bundle import worker_archive
from effdl.runtime.client import WorkerProcess
from effdl.runtime.machine import Machine
from effdl.runtime.ssh_link import Link
from effdl.runtime.target import Target, check_reachable

PYTHON = ("python3",)
_PATIENCE = 2.0
_MARGIN = 1 << 20  # outputs, feeds and the file system's own need
_Key = tuple[str, int, int, int]


@dataclass(frozen=True)
class _Sent:
    """What was sent: the place of the model there, and the contents it is made of."""

    path: str
    digests: tuple[str, ...]


class SshHost:
    """A machine at the other end of an open connection; see ``runtime.host.Host``.

    Args:
        target: an ssh target.
        link: the connection.
        here: a temporary folder on this machine.

    Raises:
        TargetError: no Python there, no onnxruntime in it, or not the provider that is wanted.
    """

    def __init__(self, target: Target, link: Link, here: Path) -> None:
        self._link = link
        self._here = here
        self._python = target.python or PYTHON
        self._sent: dict[tuple[_Key, ...], _Sent] = {}
        self._digests: dict[_Key, str] = {}
        self._names = 0
        archive = here / "worker.pyz"
        archive.write_bytes(worker_archive())
        self._archive = f"{link.folder}/worker.pyz"
        link.put(archive, self._archive)
        self._control = self._start(target.name, target.name)
        try:
            self.facts = greet(self._control)
            self.machine = machine_of(self.facts)
            need_provider(target, self.facts)
        except BaseException:
            self._control.close()
            raise
        self.target = with_facts(target, self.machine)
        self.emulated = bool(self.machine.emulator)
        self.onnxruntime = str(self.facts["onnxruntime"])

    def worker(self, where: str) -> WorkerProcess:
        """Start a fresh worker process there."""
        return self._start(where, self.target.name)

    def send(self, path: Path) -> str:
        """Copy a model with the files of its weights, or any other file; checked by SHA-256.

        Raises:
            TargetError: it is too large for the machine's disk or memory, or the connection was lost.
        """
        parts = parts_of(path)
        keys = tuple(_key(file) for file, _ in parts)
        known = self._sent.get(keys)
        if known is not None:
            return known.path
        digests = tuple(self._digest(file, key) for (file, _), key in zip(parts, keys, strict=True))
        there = {d for sent in self._sent.values() for d in sent.digests}
        fresh = {d: file for d, (file, _) in zip(digests, parts, strict=True) if d not in there}
        self._check_room(path, sum(f.stat().st_size for f in fresh.values()), parts)
        for digest, file in fresh.items():
            self._put(file, digest)
        folder = self.output(f"m{len(self._sent)}")
        for digest, (_, name) in zip(digests, parts, strict=True):
            self._control.ask("place", source=self._stored(digest), goal=f"{folder}/{name}")
        sent = _Sent(f"{folder}/{parts[0][1]}", digests)
        self._sent[keys] = sent
        return sent.path

    def discard(self, path: Path) -> None:
        """Remove a file there that will not be needed again."""
        keys = tuple(_key(file) for file, _ in parts_of(path))
        gone = self._sent.pop(keys, None)
        if gone is None:
            return
        kept = {d for sent in self._sent.values() for d in sent.digests}
        self._control.ask("remove", path=gone.path.rpartition("/")[0])
        for digest in set(gone.digests) - kept:
            self._control.ask("remove", path=self._stored(digest))

    def output(self, name: str) -> str:
        """Return a path there that a worker may write to; another one each time."""
        self._names += 1
        return f"{self._link.folder}/{self._names}-{name}"

    def fetch(self, path: str) -> Path:
        """Copy a file from there; checked by SHA-256."""
        self._names += 1
        goal = self._here / f"{self._names}-{path.rpartition('/')[2]}"
        self._link.get(path, goal)
        wanted = self._control.ask("digest", path=path)["sha256"]
        if _sha256(goal) != wanted:
            raise TargetError(
                "a file came back damaged",
                hint="does the login shell there print something of its own?",
                where=self.target.name,
            )
        return goal

    def load_average(self) -> float | None:
        """Return how many programs there wanted to run in the last minute, None when not told."""
        load = self._control.ask("hello")["load"]
        return None if load is None else float(load)

    def room(self) -> dict[str, int]:
        """Return the free bytes there of ``disk`` and ``memory`` (0: not told)."""
        found: dict[str, int] = self._control.ask("room", path=self._link.folder)
        return found

    def close(self) -> None:
        """End what this host runs there; the folder goes with the connection."""
        self._control.close()

    def _start(self, where: str, place: str) -> WorkerProcess:
        pids = shlex.quote(f"{self._link.folder}/pids")
        # The shell waits, so that it can tell a signal from a lost connection; the keeper ends what is
        # still in pids. Without 3<&0 a program in the background would not get stdin.
        script = (
            f"ulimit -c 0; exec 3<&0; {_spelled(self._python)} {shlex.quote(self._archive)} <&3 3<&- & "
            f"p=$!; : >{pids}/$p; exec <&- 3<&-; wait $p; c=$?; rm -f {pids}/$p; exit $c"
        )
        return WorkerProcess(
            where,
            self._link.command(script),
            diagnose=self._link.fault,
            patience=_PATIENCE,
            place=place,
        )

    def _check_room(self, path: Path, wanted: int, parts: list[tuple[Path, str]]) -> None:
        room = self.room()
        if wanted + _MARGIN > room["disk"]:
            raise TargetError(
                f"{path.name} is too large for the device: {_megabytes(wanted)} to send, "
                f"{_megabytes(room['disk'])} of disk free there",
                hint=f"make room in {self._link.folder.rpartition('/')[0]}, or set TMPDIR there",
                where=self.target.name,
            )
        size = sum(file.stat().st_size for file, _ in parts)
        if room["memory"] and size > room["memory"]:
            raise TargetError(
                f"{path.name} is too large for the device: {_megabytes(size)} of model, "
                f"{_megabytes(room['memory'])} of memory free there",
                hint="end other programs there, or make the model smaller first",
                where=self.target.name,
            )

    def _put(self, file: Path, digest: str) -> None:
        self._link.put(file, self._stored(digest))
        if self._control.ask("digest", path=self._stored(digest))["sha256"] != digest:
            raise TargetError(f"{file.name} arrived damaged", where=self.target.name)

    def _stored(self, digest: str) -> str:
        return f"{self._link.folder}/files/{digest}"

    def _digest(self, file: Path, key: _Key) -> str:
        if key not in self._digests:
            self._digests[key] = _sha256(file)
        return self._digests[key]


@contextmanager
def open_ssh(target: Target, here: Path) -> Iterator[SshHost]:
    """Connect, find the Python there and what it can do; at the end nothing is left there.

    Raises:
        TargetError: it cannot be reached, or nothing can run there.
    """
    check_reachable(target)
    link = Link(target.host, target.name, here)
    try:
        host = SshHost(target, link, here)
        try:
            yield host
        finally:
            host.close()
    finally:
        link.close()


def greet(worker: WorkerProcess) -> dict[str, Any]:
    """Return a worker's facts; a Python that does not get as far is the target's fault."""
    try:
        return worker.ask("hello")
    except TargetError:
        raise
    except EffdlError as e:
        raise TargetError(
            f"its Python does not work: {e.message}", hint=e.hint, where=worker.where
        ) from e


def machine_of(facts: dict[str, Any]) -> Machine:
    """Return the machine that a worker's facts describe."""
    told = dict(facts["machine"])
    return Machine(**{**told, "isa": tuple(told["isa"])})


def with_facts(target: Target, machine: Machine) -> Target:
    """Return the target with what its machine told; extensions that the user named stay."""
    return replace(target, arch=machine.arch, isa=target.isa or frozenset(machine.isa))


def need_provider(target: Target, facts: dict[str, Any]) -> None:
    """Raise TargetError when the onnxruntime there lacks the provider that is wanted."""
    wanted = target.providers[0]
    if wanted not in facts["providers"]:
        package = "onnxruntime-gpu" if target.on_gpu else "onnxruntime"
        raise TargetError(
            f"{wanted} is not in its onnxruntime (it has {', '.join(facts['providers'])})",
            hint=f"install {package} there, or name another Python with --python",
            where=target.name,
        )


def parts_of(path: Path) -> list[tuple[Path, str]]:
    """Return the files of a model with their names relative to it, the model first."""
    parts = [(path, path.name)]
    if path.suffix != ".npz":
        with suppress(DecodeError):  # no model: a file without files of its own
            parts += [(f, f.relative_to(path.parent).as_posix()) for f in data_files(path)]
    return parts


def _key(file: Path) -> _Key:
    facts = file.stat()
    return str(file.absolute()), facts.st_size, facts.st_mtime_ns, facts.st_ino


def _sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _spelled(command: tuple[str, ...]) -> str:
    """Return a command for a shell there, with ``~`` for the home folder there."""
    first = command[0]
    if first.startswith("~/"):
        return " ".join(['"$HOME"/' + shlex.quote(first[2:]), *map(shlex.quote, command[1:])])
    return shlex.join(command)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
