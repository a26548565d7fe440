"""The script that measures how often the bench is wrong."""

import importlib.util
import math
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest

from effdl.data.random import random_feeds
from effdl.graph import io
from tests.support import ROOT, SAMPLES


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "measure_noise", ROOT / "scripts" / "measure_noise.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "measure_noise", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_planted_slow_down_is_as_large_as_it_says(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "SHARE", 2.0)
    seen: list[float] = []
    for seconds in (0.5, 4.0):  # other programs may be too loud for the short one
        found = script.study(
            SAMPLES / "digits_cnn.onnx", 1, seconds, tmp_path / str(seconds),
            lambda s, twin, late: seen.append(late.ratio),
        )  # fmt: skip
        assert found.runs == 1
        if found.planted["slower"]:
            break
    assert found.planted["slower"] == 1
    assert seen[-1] < 0.6  # 1 / 3 on a quiet machine
    assert len(found.row()) == len(script.HEAD)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGSTOP")
@pytest.mark.parametrize("spinning", [False, True])
def test_the_disturbance_check_runs(
    spinning: bool, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SAMPLES / "digits_cnn.onnx"
    feeds = random_feeds(io.load(model), count=1)
    kill, sent = os.kill, {signal.SIGSTOP: [], signal.SIGCONT: []}

    def record(pid: int, number: int) -> None:
        if number in sent:
            sent[signal.Signals(number)].append(pid)
        kill(pid, number)

    monkeypatch.setattr(os, "kill", record)
    found = script.disturbance(model, feeds, 0.2, spinning, generations=1)
    assert 0 < found.ratio.low <= found.ratio.value <= found.ratio.high < math.inf
    # The three beside the model stand still whenever it is alone, and go on afterwards.
    assert len(set(sent[signal.SIGSTOP])) == 3
    assert sent[signal.SIGSTOP] == sent[signal.SIGCONT]


def test_the_page_has_a_place_for_the_table(script: ModuleType) -> None:
    text = script.PAGE.read_text(encoding="utf-8")
    assert text.count(script.BEGIN) == text.count(script.END) == 1
    assert text.index(script.BEGIN) < text.index(script.END)
