"""The script that measures how often the bench is wrong."""

import importlib.util
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
    found = script.study(
        SAMPLES / "digits_cnn.onnx", 1, 0.5, tmp_path, lambda s, twin, late: seen.append(late.ratio)
    )
    assert found.runs == 1
    assert found.planted["slower"] == 1
    assert 0.02 < seen[0] < 0.45  # 1 / 3 on a quiet machine; what computes longer is preempted more
    assert len(found.row()) == len(script.HEAD)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGSTOP")
def test_the_disturbance_check_runs(script: ModuleType) -> None:
    model = SAMPLES / "digits_cnn.onnx"
    feeds = random_feeds(io.load(model), count=1)
    for spinning in (False, True):
        found = script.disturbance(model, feeds, 0.2, spinning, generations=1)
        assert 0.05 < found.ratio.value < 20


def test_the_page_has_a_place_for_the_table(script: ModuleType) -> None:
    text = script.PAGE.read_text(encoding="utf-8")
    assert text.count(script.BEGIN) == text.count(script.END) == 1
    assert text.index(script.BEGIN) < text.index(script.END)
