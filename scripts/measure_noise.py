"""How often `effdl bench` is wrong: a model against itself, and against itself slowed by 5 %.

    python scripts/measure_noise.py [--models A.onnx B.onnx C.onnx] [--repeats 40] [--seconds 2] [--write]

Every repeat is one bench of three: the model, the same file again (A/A), and the same file in a worker
that waits busily after each inference, inside the timed section, for 5 % of the time the inference took
(planted). So the planted model runs the same kernels on the same data, and is slower by a known share.
A verdict of faster or slower on the second is wrong; anything but slower on the third is a miss.

Then, for the slowest of them, whether loaded models disturb each other: its latency at 2 threads beside three
other loaded models, each of which has just run when it is measured, against alone (the others are
stopped, and it ran itself meanwhile); once as effdl runs sessions, once with pools that may spin on.
On a machine with nothing else to do it takes about 15 minutes, on a busy one up to 25.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effdl.data.feeds import Feeds
from effdl.data.random import random_feeds
from effdl.graph import io
from effdl.measure import verdict
from effdl.measure.bench import bench
from effdl.measure.results import file_facts
from effdl.measure.rounds import Plan, take_turns
from effdl.measure.sending import write_feeds
from effdl.runtime.bundle import worker_archive
from effdl.runtime.client import WorkerProcess
from effdl.runtime.host import LocalHost, open_host
from effdl.runtime.machine import this_machine
from effdl.runtime.target import parse_target

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "measurement.md"
BEGIN, END = "<!-- noise: written by scripts/measure_noise.py -->\n", "<!-- noise: end -->"
DEFAULTS = [ROOT / "sample_models" / f"digits_{n}.onnx" for n in ("mlp", "cnn", "transformer")]
PLANTED = "planted"
SHARE = 0.05
TARGET = parse_target("cpu")

_SLOWED = """
import sys, time
sys.path.insert(0, {archive!r})
from effdl.runtime.worker import commands, main

class Slowed(commands.Worker):
    def _bind(self, *arguments):
        answer = super()._bind(*arguments)
        self._runs = [slowed(run) for run in self._runs]
        return answer

def slowed(run, clock=time.perf_counter_ns):
    def call():
        begin = clock()
        run()
        now = clock()
        end = now + int((now - begin) * {share})
        while clock() < end:
            pass
    return call

commands.Worker = Slowed
main.main()
"""

_SPINNING = """
import sys
sys.path.insert(0, {archive!r})
from effdl.runtime.worker import main, session

plain = session.session_options

def spinning(threads):
    options = plain(threads)
    options.add_session_config_entry("session.force_spinning_stop", "0")
    return options

session.session_options = spinning
main.main()
"""


class PlantingHost(LocalHost):
    """This machine, with slowed workers for models in a folder of the name ``planted``."""

    def worker(self, where: str) -> WorkerProcess:
        """Start a worker, a slowed one for a planted model."""
        if Path(where).parent.name != PLANTED:
            return super().worker(where)
        code = _SLOWED.format(archive=str(self._archive), share=SHARE)
        return WorkerProcess(where, [sys.executable, "-c", code])


@dataclass
class Study:
    """What came out for one model."""

    name: str
    ms: float = 0.0
    same: Counter[str] = field(default_factory=Counter)
    planted: Counter[str] = field(default_factory=Counter)
    ratios: list[float] = field(default_factory=list)
    floors: list[float] = field(default_factory=list)
    widths: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def runs(self) -> int:
        """Repeats so far."""
        return sum(self.same.values())

    def row(self) -> list[str]:
        """Return the cells of the table."""
        wrong = self.same["faster"] + self.same["slower"]
        off = sorted(abs(r - 1) for r in self.ratios)
        return [
            self.name,
            f"{self.ms:.3g} ms",
            str(self.runs),
            f"{wrong} ({wrong / self.runs:.0%})",
            str(self.same["noisy"]),
            f"{self.planted['slower']} ({self.planted['slower'] / self.runs:.0%})",
            str(self.planted["noisy"]),
            f"{off[len(off) // 2]:.1%} / {off[-1]:.1%}",
            f"±{sum(self.widths) / self.runs:.1%}",
            f"{sum(self.floors) / self.runs:.1%}",
            f"{self.seconds / self.runs:.1f} s",
        ]


HEAD = [
    *("model", "median", "runs", "wrong (A/A)", "noisy (A/A)", "5 % found", "noisy (5 %)"),
    *("A/A off by, median / most", "interval", "noise floor", "time of a run"),
]


def study(model: Path, repeats: int, seconds: float, place: Path, pause: Any) -> Study:
    """Bench a model against itself and its slowed self again and again."""
    found = Study(model.stem)
    folder = place / model.stem / PLANTED
    folder.mkdir(parents=True)
    slowed = folder / model.name
    shutil.copy(model, slowed)
    feeds = random_feeds(io.load(model), count=2)
    facts = file_facts(model)
    with tempfile.TemporaryDirectory() as home:
        host = PlantingHost(TARGET, Path(home))
        for number in range(repeats):
            begin = time.perf_counter()
            report = bench(
                [model, model, slowed],
                feeds,
                TARGET,
                seconds=seconds,
                seed=number,
                known={model: facts, slowed: facts},
                host=host,
            )
            base, twin, late = report.models
            found.same[twin.verdict] += 1
            found.planted[late.verdict] += 1
            found.ratios.append(twin.ratio)
            found.floors.append(twin.noise_floor)
            found.widths.append((twin.ci[1] - twin.ci[0]) / 2)
            found.ms = base.latency.median
            found.seconds += time.perf_counter() - begin
            pause(found, twin, late)
    return found


class _Turn:
    """The model's block after somebody else's blocks.

    Args:
        model: the worker that is timed.
        before: who computes just before it.
        stopped: workers that stand still meanwhile.
    """

    def __init__(
        self,
        model: WorkerProcess,
        before: Sequence[WorkerProcess],
        stopped: Sequence[WorkerProcess],
    ) -> None:
        self._model, self._before, self._stopped = model, before, stopped

    def block(
        self, *, runs: int = 0, min_ms: float = 0.0, start: int = 0, cpu: int | None = None
    ) -> tuple[list[int], int | None]:
        """Let the others compute, then time the model."""
        for worker in self._stopped:
            os.kill(worker.pid, signal.SIGSTOP)
        try:
            for worker in self._before:
                worker.block(min_ms=10.0)
            return self._model.block(runs=runs, min_ms=min_ms, start=start, cpu=cpu)
        finally:
            for worker in self._stopped:
                os.kill(worker.pid, signal.SIGCONT)


def disturbance(
    model: Path, feeds: Feeds, seconds: float, spinning: bool, generations: int = 4
) -> verdict.Comparison:
    """Return the time of a model alone over its time beside three loaded models, at 2 threads."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        host = stack.enter_context(open_host(TARGET))
        files = write_feeds(list(feeds), place, host)
        archive = place / "worker.pyz"
        archive.write_bytes(worker_archive())
        code = _SPINNING.format(archive=str(archive))

        @contextmanager
        def start(generation: int) -> Iterator[list[_Turn]]:
            with ExitStack() as crew:
                workers = [
                    crew.enter_context(
                        WorkerProcess(model.name, [sys.executable, "-c", code])
                        if spinning
                        else host.worker(model.name)
                    )
                    for _ in range(4)
                ]
                for worker in workers:
                    worker.ask(
                        "load",
                        model=host.send(model),
                        providers=list(TARGET.providers),
                        threads=2,
                        feeds=files,
                    )
                one, *others = workers
                yield [_Turn(one, [one] * 3, others), _Turn(one, others, ())]

        timing = take_turns(start, Plan(2 * seconds, generations=generations))
    return verdict.compare(timing.levels[0], timing.levels[1])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    marks = [":---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, marks, *rows)) + "\n"


def sentences(studies: Sequence[Study]) -> str:
    """Return what the table comes to."""
    runs = sum(s.runs for s in studies)
    wrong = sum(s.same["faster"] + s.same["slower"] for s in studies)
    found = sum(s.planted["slower"] for s in studies)
    return (
        f"Of {runs} runs of a model against itself {wrong} ({wrong / runs:.1%}) ended with a wrong "
        f"*faster* or *slower*; a planted slow-down of {SHARE:.0%} was found in {found} of {runs} "
        f"({found / runs:.1%}).\n"
    )


def where() -> str:
    """Return the machine and the versions."""
    import onnxruntime as ort

    machine = this_machine()
    return (
        f"{machine.cpu}, {machine.cores} cores, {platform.system()}, ONNX Runtime {ort.__version__}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", type=Path, default=DEFAULTS)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=2.0, help="the most time per model")
    parser.add_argument("--write", action="store_true", help="write docs/measurement.md")
    options = parser.parse_args()
    began = time.perf_counter()
    total = options.repeats * len(options.models)
    done = 0

    def pause(found: Study, twin: Any, late: Any) -> None:
        nonlocal done
        done += 1
        left = (time.perf_counter() - began) / done * (total - done) / 60
        sys.stderr.write(
            f"{found.name} {found.runs}/{options.repeats}: A/A {twin.verdict} {twin.ratio:.3f} "
            f"(floor {twin.noise_floor:.1%}), planted {late.verdict} {late.ratio:.3f}; "
            f"{left:.0f} min left\n"
        )

    with tempfile.TemporaryDirectory() as place:
        studies = [
            study(m, options.repeats, options.seconds, Path(place), pause) for m in options.models
        ]
    first = options.models[max(range(len(studies)), key=lambda k: studies[k].ms)]
    feeds = random_feeds(io.load(first), count=2)
    beside = []
    for name, spinning in (("as effdl runs them", False), ("pools that may spin on", True)):
        found = disturbance(first, feeds, max(options.seconds, 2.0), spinning)
        r = found.ratio
        beside.append(
            [f"{first.stem}, {name}", f"{1 / r.value:.3f}", f"[{1 / r.high:.3f}, {1 / r.low:.3f}]"]
        )
    text = (
        f"{sentences(studies)}\n{table(HEAD, [s.row() for s in studies])}\n"
        "Time of a model at 2 threads beside three other loaded models, over its time alone:\n\n"
        f"{table(['model', 'ratio', '95 % interval'], beside)}\n"
        f"{where()}; {options.repeats} runs of each model, at most {options.seconds:g} s of measuring "
        f"per model and run; {(time.perf_counter() - began) / 60:.0f} minutes in all.\n"
    )
    sys.stdout.write(text)
    if options.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
