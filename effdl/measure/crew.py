"""The processes of a bench: one per model, started afresh for every generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from effdl.errors import ModelError
from effdl.measure.results import Told
from effdl.runtime.client import WorkerProcess
from effdl.runtime.host import Host

_SPARE = 256 << 20
_MARGIN = 1.5


@dataclass
class Member:
    """A model that every generation has a process of.

    Args:
        where: its name, for messages.
        model: its file on the host; ``feeds`` its inputs there.
        told: what its workers said.
    """

    where: str
    model: str
    feeds: list[dict[str, Any]]
    told: Told = field(default_factory=Told)


@dataclass
class Crew:
    """Starts the workers of a generation and keeps what they say.

    Args:
        host: where.
        options: of every ``load`` besides model and feeds.
        models: the models.
        control: a second process of the first model, which is left out where memory is short.
        extra: other models that run beside them.
        say: told how far loading is.
        hello: what the first worker said of itself.
        notes: what was left out.
    """

    host: Host
    options: dict[str, Any]
    models: list[Member]
    control: Member | None = None
    extra: list[Member] = field(default_factory=list)
    say: Callable[[str, float], None] = lambda stage, fraction: None
    hello: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def members(self) -> list[Member]:
        """All of them in the order of the workers: models, control, extra."""
        return [*self.models, *([self.control] if self.control else []), *self.extra]

    @contextmanager
    def start(self, generation: int) -> Iterator[Sequence[WorkerProcess]]:
        """Give fresh workers with their models loaded; asks them for figures at the end."""
        with ExitStack() as stack:
            members = self.members
            workers = [stack.enter_context(self.host.worker(m.where)) for m in members]
            # All are up before the first load is timed.
            hellos = [worker.ask("hello") for worker in workers]
            self.hello = self.hello or hellos[0]
            crew = list(zip(members, workers, strict=True))
            for k, (member, worker) in enumerate(crew):
                self.say("load", k / len(crew))
                if member is self.control and generation == 0:
                    self._try_control(member, worker, workers[0])
                else:
                    self._load(member, worker)
            crew = [(m, w) for m, w in crew if m in self.members]
            yield [worker for _, worker in crew]
            for member, worker in crew:
                member.told.stats.append(worker.ask("stats"))

    def _load(self, member: Member, worker: WorkerProcess) -> None:
        answer = worker.ask("load", model=member.model, feeds=member.feeds, **self.options)
        member.told.loads.append(answer)

    def _try_control(self, member: Member, worker: WorkerProcess, first: WorkerProcess) -> None:
        """Load the first model a second time, unless memory is too short for it."""
        loaded = self.models[0].told.loads[0]
        need = int(_MARGIN * (loaded["peak_bytes"] - loaded["baseline_bytes"])) + _SPARE
        free = int(first.ask("room", path=self.models[0].model)["memory"])
        why = f"{free >> 20} MB of memory are free, it wants {need >> 20}"
        if not free or free >= need:
            try:
                self._load(member, worker)
                return
            except ModelError as e:  # it loaded once, so memory is short, here or on a device
                why = e.message
        worker.close()
        self.control = None
        self.notes.append(
            f"no control was run (a second process of the first model): {why}; "
            "the noise floor comes from the models' own rounds"
        )
