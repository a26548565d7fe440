"""Kill `effdl optimize` at random moments and check that the output is never half a file.

    python scripts/check_kill.py [--external] [--save-only] [--runs 50]

An old model lies at the output path. Each run is ended with SIGKILL: a third of them anywhere in
the run, a third while the result is staged, a third when it appears at its path. After each, the
path must hold the complete old model or the complete new one (SHA-256 of the file and of the weight
files that it names), and no child process may outlive the kill. At the end one undisturbed run must
leave the new model and nothing else in the folder. What the killed runs left in the system's folder
for temporary files (a private one here) is counted. The exit status is 1 after a violation.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.message import DecodeError

from effdl.errors import EffdlError
from effdl.graph import io

ROOT = Path(__file__).parent.parent
POLL_SECONDS = 0.002
ORPHAN_SECONDS = 20.0
"""How long processes that a killed run started may take to notice."""
SAVE = """
import sys
from effdl.graph import io
io.save(io.load(sys.argv[1]), sys.argv[2], external=sys.argv[3] == "external" or None)
"""


@dataclass
class Trial:
    """One output path and the command that writes it.

    Args:
        folder: of the output; nothing else is in it.
        goal: the output.
        command: writes it; ``environment`` is the one it runs in.
        old: where the old model is kept.
    """

    folder: Path
    goal: Path
    command: list[str]
    environment: dict[str, str]
    old: Path
    states: dict[str, str] = field(default_factory=dict)

    def restore(self) -> None:
        """Put the old model back, beside whatever killed runs left."""
        for file in self.old.iterdir():
            shutil.copy2(file, self.folder / file.name)

    def state(self) -> str:
        """Return ``old``, ``new``, or what is wrong."""
        digest = fingerprint(self.goal)
        return self.states.get(
            digest, digest if digest.startswith("broken") else "complete, but neither"
        )

    def writing(self) -> bool:
        """Whether a stage of the output is there."""
        return any(self.folder.glob(f".{self.goal.name}.*"))

    def start(self) -> subprocess.Popen[bytes]:
        """Start the command in a process group of its own."""
        return subprocess.Popen(
            self.command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )


def fingerprint(goal: Path) -> str:
    """Return the SHA-256 of a model file and its weight files, or ``broken: why``."""
    try:
        parts = [io.file_digest(goal), *(io.file_digest(f) for f in io.data_files(goal))]
        io.load(goal)
    except (OSError, DecodeError, EffdlError) as e:
        return f"broken: {e}"
    return " ".join(parts)


def finish(child: subprocess.Popen[bytes]) -> None:
    """Wait for a run that must succeed."""
    _, errors = child.communicate()
    if child.returncode:
        raise SystemExit(f"the undisturbed run failed:\n{errors.decode(errors='replace')}")


def watch(trial: Trial) -> tuple[float, float, float]:
    """Run to the end; return when the stage appeared, when it went, and when the run ended."""
    start, first, last = time.perf_counter(), 0.0, 0.0
    child = trial.start()
    while child.poll() is None:
        if trial.writing():
            last = time.perf_counter() - start
            first = first or last
        time.sleep(POLL_SECONDS)
    finish(child)
    return first, last, time.perf_counter() - start


def kill(trial: Trial, wait: float, moment: str) -> bool:
    """Start a run, kill it ``wait`` seconds after a moment; return whether processes outlived it.

    Args:
        trial: what to run.
        wait: seconds to let it run after the moment.
        moment: ``start``; ``stage``: this run's stage appears; ``commit``: a file of the result does.
    """
    before = files(trial)
    prefix = f".{trial.goal.name}."
    child = trial.start()
    while moment != "start" and child.poll() is None:
        fresh = {name for name, _ in files(trial) - before}
        if any(n.startswith(prefix) == (moment == "stage") for n in fresh):
            break
        time.sleep(POLL_SECONDS if moment == "stage" else 0)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(wait)
    child.send_signal(signal.SIGKILL)
    child.wait()
    if child.stderr is not None:
        child.stderr.close()
    return outlived(child.pid)


def files(trial: Trial) -> set[tuple[str, int]]:
    """Return names and inodes of what is in the output's folder."""
    with os.scandir(trial.folder) as entries:
        return {(e.name, e.inode()) for e in entries}


def outlived(group: int) -> bool:
    """Whether processes of the group are still there after a while; they are ended then."""
    end = time.perf_counter() + ORPHAN_SECONDS
    while time.perf_counter() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    return True


def set_up(work: Path, args: argparse.Namespace) -> Trial:
    """Write the old model and build the command."""
    folder, old, temporary = work / "out", work / "old", work / "tmp"
    for place in (folder, old, temporary):
        place.mkdir()
    goal = folder / "model.onnx"
    command: list[str]
    if args.save_only:
        beside = "external" if args.external else "inline"
        command = [sys.executable, "-c", SAVE, str(args.model), str(goal), beside]
    else:
        command = [args.effdl, "optimize", str(args.model), "-c", args.recipe, "-o", str(goal)]
        command += ["--quiet", "--bench-seconds", str(args.bench_seconds)]
        command += ["--external-data"] if args.external else []
    model = io.load(args.model)
    model.producer_name = "the old model"
    io.save(model, old / goal.name, external=args.external or None)
    environment = {**os.environ, "TMPDIR": str(temporary)}
    return Trial(folder, goal, command, environment, old)


def learn(trial: Trial) -> tuple[float, float, float]:
    """Find out what the old and the new model look like, and when the new one is written."""
    trial.restore()
    trial.states[fingerprint(trial.goal)] = "old"
    times = watch(trial)
    new = fingerprint(trial.goal)
    trial.restore()
    watch(trial)
    if fingerprint(trial.goal) != new:
        raise SystemExit("two undisturbed runs give different files")
    if new in trial.states or new.startswith("broken"):
        raise SystemExit(f"the new model cannot be told from the old one, or is broken: {new}")
    trial.states[new] = "new"
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    default = ROOT / "sample_models" / "digits_cnn.onnx"
    parser.add_argument("--model", type=Path, default=default, help="the input model")
    parser.add_argument("--recipe", default="lossless", help="of each run (default: lossless)")
    parser.add_argument("--runs", type=int, default=50, help="how many to kill (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--external", action="store_true", help="weights in files beside the model")
    parser.add_argument("--save-only", action="store_true", help="load and save, no optimization")
    parser.add_argument("--effdl", default="effdl", help="the command (default: effdl)")
    parser.add_argument("--bench-seconds", type=float, default=0.2, help="of each run")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="check_kill.") as work:
        trial = set_up(Path(work), args)
        first, last, total = learn(trial)
        print(f"undisturbed: {total:.2f} s, the result is written from {first:.2f} to {last:.2f} s")
        seen: Counter[str] = Counter()
        leftovers = orphans = 0
        for run in range(args.runs):
            trial.restore()
            moment = ("start", "stage", "commit")[run % 3]
            longest = {"start": total, "stage": (last - first) * 1.2 + 0.05, "commit": 0.005}
            orphans += kill(trial, chance.uniform(0, longest[moment]), moment)
            seen[trial.state()] += 1
            leftovers += len(list(trial.folder.iterdir())) > len(list(trial.old.iterdir()))
        trial.restore()
        finish(trial.start())
        expected = {trial.goal, *io.data_files(trial.goal)}
        rest = sorted(p.name for p in set(trial.folder.iterdir()) - expected)
        final = trial.state()
        temporary = len(list((Path(work) / "tmp").iterdir()))
    wrong = {k: n for k, n in seen.items() if k not in ("old", "new")}
    bad = bool(wrong or rest or orphans or final != "new")
    print(
        f"{args.runs} kills: {seen['old']} old, {seen['new']} new, {sum(wrong.values())} broken; "
        f"{leftovers} left something beside the output, {orphans} left processes; after an "
        f"undisturbed run: {final}, {len(rest)} leftovers; {temporary} folders in the temporary one"
    )
    for what in (*wrong, *rest):
        print(f"  {what}")
    print("VIOLATION" if bad else "ok")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
