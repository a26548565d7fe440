"""One tool of ``compare_simplifiers.py``: reads jobs from stdin, works off each in a process of its own.

The tool is imported once; every job runs in a fresh fork, so that no job sees another's caches, memory
or crash. Time is from file to file, without imports. One line of JSON goes out per job.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import resource
import select
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Work = Callable[[Job], Job]
LATENCY_SECONDS = 0.4
"""For timing each of the models that are run side by side."""


def tool(name: str) -> tuple[Work, str]:
    """Import a tool; returns what does a job, and its version.

    Raises:
        ImportError: it is not installed.
    """
    makers = {
        "effdl": _effdl,
        "effdl-verified": _effdl_verified,
        "onnxslim": _onnxslim,
        "onnxsim": _onnxsim,
        "onnxscript": _onnxscript,
        "judge": _judge,
    }
    package = "effdl" if name in ("effdl-verified", "judge") else name
    return makers[name](), importlib.metadata.version(package)


def _effdl() -> Work:
    import effdl  # noqa: F401  (before onnxruntime: switches its telemetry off)

    # isort: split
    import onnxruntime  # noqa: F401

    from effdl.graph import io
    from effdl.graph.clean import clean
    from effdl.graph.scratch import scratch
    from effdl.graph.walk import opset
    from effdl.passes.base import Context
    from effdl.recipe import load
    from effdl.runtime.collector import collect_rarely
    from effdl.runtime.target import parse_target

    collect_rarely()  # as the command line does
    recipe = load("lossless")
    target = parse_target("cpu")

    def run(job: Job) -> Job:
        """The passes of the preset and nothing else, as the peers do it."""
        with scratch() as folder:
            model = io.load(job["model"])
            for step in recipe.passes:
                if opset(model) >= step.pass_.min_opset and step.pass_.run(
                    model, Context(target, workdir=folder)
                ):
                    clean(model)
            io.save(model, Path(job["out"]))
        return {}

    return run


def _effdl_verified() -> Work:
    from effdl import pipeline
    from effdl.errors import EffdlError
    from effdl.recipe import load
    from effdl.run_options import RunOptions
    from effdl.runtime.collector import collect_rarely

    # isort: split
    import onnxruntime  # noqa: F401

    collect_rarely()
    recipe = load("lossless")
    options = RunOptions(gate="off", bench_seconds=0)

    def run(job: Job) -> Job:
        try:
            report = pipeline.optimize(
                Path(job["model"]), recipe, Path(job["out"]), options=options
            )
        except EffdlError as e:
            return {"refused": e.message}
        passes = {p.name: round(p.seconds, 4) for p in report.passes}
        checks = sum(p.check_seconds for p in report.passes)
        return {"passes": passes, "checks": round(checks, 4)}

    return run


def _onnxslim() -> Work:
    import onnxslim

    def run(job: Job) -> Job:
        onnxslim.slim(job["model"], job["out"])
        return {}

    return run


def _onnxsim() -> Work:
    import onnxsim

    def run(job: Job) -> Job:
        onnxsim.simplify(job["model"], output_path=job["out"])
        return {}

    return run


def _onnxscript() -> Work:
    import onnx_ir as ir
    import onnxscript.optimizer

    def run(job: Job) -> Job:
        model = ir.load(job["model"])
        model = onnxscript.optimizer.optimize(model)
        ir.save(model, job["out"])
        return {}

    return run


def _judge() -> Work:
    import effdl  # noqa: F401  (before onnxruntime: switches its telemetry off)

    # isort: split
    import onnxruntime  # noqa: F401

    from effdl.errors import EffdlError
    from effdl.graph import io
    from effdl.measure.fidelity import compare_outputs, same
    from effdl.measure.verify import run_all, verification_feeds
    from effdl.runtime.target import parse_target

    def run(job: Job) -> Job:
        target = parse_target("cpu")
        original = Path(job["model"])
        try:
            model = io.load(original)
            feeds = verification_feeds(model, None, dims={}, seed=7, target=target)
            want = run_all(original, feeds, target)
        except EffdlError as e:
            return {"unchecked": e.message}
        verdicts: dict[str, str] = {}
        for name, path in job["results"].items():
            try:
                got = run_all(Path(path), feeds, target)
                errors = compare_outputs(want, got)
                right = all(e.equal for e in errors)
                if not right and not any(e.reason for e in errors):
                    right = same(original, Path(path), feeds, target=target)[0]
                worst = max(errors, key=lambda e: (not e.equal, e.rel_l2), default=None)
            except EffdlError as e:
                verdicts[name] = f"does not run: {e.message}"
                continue
            if not right and worst is not None:
                said = worst.reason or f"relative error {worst.rel_l2:.2g}"
                verdicts[name] = f"'{worst.name}': {said}"
            else:
                verdicts[name] = ""
        answer: Job = {"verdicts": verdicts, "feeds": len(feeds)}
        if job.get("latency"):
            good = {n: p for n, p in job["results"].items() if not verdicts[n]}
            answer["latency"] = _latency({"original": str(original), **good}, feeds.batches[0])
        return answer

    return run


def _latency(models: dict[str, str], feed: Any) -> dict[str, float]:
    """Medians over that of the original, interleaved, one thread, ORT_ENABLE_ALL."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    sessions = {n: ort.InferenceSession(p, options) for n, p in models.items()}
    times: dict[str, list[float]] = {n: [] for n in models}
    for session in sessions.values():
        session.run(None, feed)
    end = time.perf_counter() + LATENCY_SECONDS * len(models)
    while time.perf_counter() < end or len(times["original"]) < 5:
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(None, feed)
            times[name].append(time.perf_counter() - started)
    base = statistics.median(times["original"])
    return {n: statistics.median(t) / base for n, t in times.items() if n != "original"}


def main() -> None:
    """Import the tool named on the command line, tell how long that took, then do the jobs."""
    started = time.perf_counter()
    # What tools print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        work, version = tool(sys.argv[1])
    except ImportError as e:
        print(json.dumps({"absent": str(e)}), file=answers)
        return
    seconds = time.perf_counter() - started
    print(json.dumps({"version": version, "import": seconds}), file=answers)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(in_fork(work, job, job["limit"])), file=answers)


def in_fork(work: Work, job: Job, limit: float) -> Job:
    """Run ``work`` in a forked process; returns its answer with ``seconds`` and ``peak`` bytes.

    Instead of an answer there is ``failed``: what it raised, the signal, or that it took too long.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _child(work, job, writer)
    os.close(writer)
    told = _listen(reader, limit)
    os.close(reader)
    if told is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return {"failed": f"not done after {limit:g} s", "seconds": limit}
    _, status = os.waitpid(pid, 0)
    if not told:
        code = os.waitstatus_to_exitcode(status)
        return {"failed": f"signal {-code}" if code < 0 else f"exit code {code}", "seconds": 0.0}
    answer: Job = json.loads(told)
    return answer


def _listen(reader: int, limit: float) -> bytes | None:
    """Read to the end of the pipe; None when that takes too long."""
    end = time.monotonic() + limit
    told = b""
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            return None
        part = os.read(reader, 1 << 16)
        if not part:
            return told
        told += part


def _child(work: Work, job: Job, writer: int) -> None:
    os.setpgid(0, 0)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            answer = work(job)
        except BaseException as e:  # tools raise anything, also Rust's panics
            answer = {"failed": f"{type(e).__name__}: {e}"[:300]}
        answer["seconds"] = time.perf_counter() - started
        os.chdir("/")
    answer["peak"] = _peak()
    with os.fdopen(writer, "w") as pipe:
        json.dump(answer, pipe)
    os._exit(0)


def _peak() -> int:
    """Bytes of memory that this process or a child of it held at most."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    own = next(
        int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return max(own, children) * 1024


if __name__ == "__main__":
    main()
