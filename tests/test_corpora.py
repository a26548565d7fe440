"""Lossless is lossless: onnx's own cases, a peer's corpus, real models, each in a child process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from effdl.data.random import random_feeds
from effdl.errors import EffdlError
from effdl.graph import io
from effdl.passes.base import Pass
from tests.corpus_lab import (
    FAILED,
    NO_LIMIT,
    PASSED,
    REFUSED,
    SKIPPED,
    Outcome,
    Refusal,
    check_model,
    close,
    count,
    failures,
    preset,
    run_all,
    run_on,
    session,
)
from tests.node_cases import as_expected, cases, constant_inputs, in_one_worker, usable
from tests.support import SHARED, needs_shared

USABLE = 1398
"""Node cases that ONNX Runtime 1.23 and later run untouched, with the outputs onnx expects."""
NUMBERS_CHANGE = ("Bernoulli", "Dropout", "RandomNormal", "RandomUniform", "Multinomial")
DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"


def untouched(case: Any) -> tuple[onnx.ModelProto, dict[str, Any], list[Any]]:
    found = usable(case)
    if found is None:
        raise Refusal(SKIPPED, "ONNX Runtime cannot run it, or not as onnx expects")
    return found


def load(proto: onnx.ModelProto) -> Any:
    try:
        return io.from_proto(proto, "case", None)
    except EffdlError as e:
        raise Refusal(REFUSED, e.message) from None


def node_case(case: Any) -> int:
    proto, feed, _ = untouched(case)
    model = load(proto)
    changes = check_model(model, [feed])
    twin = constant_inputs(proto, feed)
    varies = any(n.op_type in NUMBERS_CHANGE for n in proto.graph.node)
    if twin is not None and not varies and runs(twin):
        changes += check_model(load(twin), [{}], steps=preset(NO_LIMIT), alone=False)
    return changes


def runs(proto: onnx.ModelProto) -> bool:
    """False where ONNX Runtime's shape inference finds, with constants, what it refuses."""
    try:
        session(proto.SerializeToString()).run(None, {})
    except Exception:
        return False
    return True


def report(title: str, outcomes: list[Outcome]) -> dict[str, int]:
    """Print the counts, and hold the corpus to no failure."""
    found = count(outcomes)
    slow = sorted(outcomes, key=lambda o: -o.seconds)[:3]
    print(title, found, [f"{o.name} {o.seconds:.1f} s" for o in slow])
    assert not found[FAILED], failures(outcomes)
    assert all(o.detail for o in outcomes if o.status in (REFUSED, SKIPPED))
    return found


@in_one_worker
def test_node_cases() -> None:
    """Every operator, its inputs fed and its inputs constant."""
    outcomes = run_all({c.name: c for c in cases()}, node_case)
    found = report("node cases", outcomes)
    assert found[PASSED] + found[REFUSED] >= USABLE
    assert sum(o.changes > 0 for o in outcomes) > USABLE / 2


@in_one_worker
def test_node_cases_from_file_to_file(tmp_path: Path) -> None:
    """A part of them by the command line."""
    chosen = {c.name: c for c in cases()[::16]}

    def work(case: Any) -> int:
        proto, feed, _ = untouched(case)
        source, goal = tmp_path / f"{case.name}.onnx", tmp_path / f"{case.name}.out.onnx"
        onnx.save(proto, source)
        code, said = optimize(source, goal)
        if code == 2:
            raise Refusal(REFUSED, said)
        assert code == 0, f"exit code {code}: {said}"
        got = session(goal.read_bytes()).run(None, feed)
        assert as_expected(case, got)
        return 1

    found = report("node cases, from file to file", run_all(chosen, work))
    assert found[PASSED] >= USABLE / 16 * 0.95


def optimize(source: Path, goal: Path) -> tuple[int, str]:
    """``effdl optimize`` in this process; returns its exit code and what it said."""
    from contextlib import redirect_stderr, redirect_stdout
    from io import StringIO

    from effdl.cli.app import main

    sys.argv = ["effdl", "optimize", str(source), "-c", "lossless", "-o", str(goal)]
    sys.argv += ["--gate", "off", "--bench-seconds", "0", "--quiet"]
    said = StringIO()
    code: object = 0
    with redirect_stdout(said), redirect_stderr(said):
        try:
            main()
        except SystemExit as e:
            code = e.code
    return int(str(code or 0)), said.getvalue().strip()


def feeds_of(path: Path, model: Any) -> list[dict[str, Any]]:
    """Stored inputs of a model of onnx's data, random ones for others; none where it cannot run."""
    stored = sorted(path.parent.glob("test_data_set_*"))
    try:
        ports = session(path.read_bytes()).get_inputs()
        if stored:
            feed = {}
            for k, port in enumerate(ports):
                tensor = onnx.load_tensor(str(stored[0] / f"input_{k}.pb"))
                feed[port.name] = onnx.numpy_helper.to_array(tensor)
            return [feed]
        feeds = list(random_feeds(model, count=2))
        run_on(feeds)(path.read_bytes(), True)
        return feeds
    except Exception:  # it has inputs that cannot be made up, or was never meant to run
        return []


def large_file(path: Path) -> int:
    """The preset only: these are classifiers of up to 140 million weights."""
    return model_file(path, alone=False)


def model_file(path: Path, alone: bool = True) -> int:
    try:
        model = io.load(path)
    except EffdlError as e:
        raise Refusal(REFUSED, e.message) from None
    feeds = feeds_of(path, model)
    changes = check_model(model, feeds, alone=alone)
    if not feeds:
        raise Refusal(SKIPPED, "passes ran, but ONNX Runtime cannot run it untouched")
    return changes


def files(folder: Path) -> dict[str, Path]:
    return {str(f.relative_to(folder)): f for f in sorted(folder.rglob("*.onnx"))}


@pytest.mark.parametrize(
    ("folder", "least"),
    [("light", 9), ("pytorch-converted", 59), ("pytorch-operator", 24), ("simple", 17)],
)
def test_models_of_the_onnx_wheel(folder: str, least: int) -> None:
    work = large_file if folder == "light" else model_file
    found = report(folder, run_all(files(DATA / folder), work))
    assert found[PASSED] >= least


@needs_shared
@pytest.mark.shared
def test_peer_corpus() -> None:
    assert SHARED is not None
    found = report("peer corpus", run_all(files(SHARED / "corpus" / "onnxoptimizer"), model_file))
    assert sum(found.values()) == 171
    assert found[PASSED] > 100


@needs_shared
@pytest.mark.shared
def test_real_models_pass_by_pass() -> None:
    """The preset from file to file is in test_shared_models.py."""
    assert SHARED is not None
    found = report("shared models", run_all(files(SHARED / "models"), model_file))
    assert found[PASSED] >= 16


def crash(_: object) -> int:
    import ctypes

    ctypes.string_at(0)
    return 0


def hang(_: object) -> int:
    import time

    time.sleep(30)
    return 0


@pytest.mark.parametrize(("work", "said"), [(crash, "crashed"), (hang, "not done after 0 s")])
def test_a_crash_or_hang_is_a_failure_of_its_model_only(work: Any, said: str) -> None:
    def job(name: str) -> int:
        return work(name) if name == "bad" else 1

    outcomes = run_all({n: n for n in ("a", "bad", "b", "c")}, job, limit=0.3)
    assert [o.status for o in outcomes] == [PASSED, FAILED, PASSED, PASSED]
    assert said in outcomes[1].detail


def test_a_wrong_output_is_seen() -> None:
    want = [np.array([1.0, 1000.0], np.float32)]
    assert close([np.array([1.001, 1000.0], np.float32)], want)  # rounding of a sum of thousands
    assert not close([np.array([1.0, 1001.0], np.float32)], want)
    assert not close([np.array([1.0, np.nan], np.float32)], want)
    assert not close([want[0].astype(np.float64)], want)
    assert not close([want[0][None]], want)


@pytest.fixture(autouse=True)
def _a_pass_is_a_pass() -> None:
    assert all(isinstance(step, Pass) for _, step in preset())
