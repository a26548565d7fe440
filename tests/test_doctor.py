from __future__ import annotations

import json

import numpy as np
import onnxruntime as ort
import pytest
from packaging.requirements import Requirement

from effdl.errors import TargetError
from effdl.report import to_json
from effdl.runtime import doctor as module
from effdl.runtime import session
from effdl.runtime.doctor import doctor, int8_format, try_cuda, version_problems
from effdl.runtime.machine import this_machine
from effdl.runtime.target import Target
from tests.support import ROOT

GOOD = {
    "onnx": "1.23.2",
    "onnxruntime": "1.32.0",
    "onnxruntime-gpu": "",
    "onnxscript": "0.7.2",
    "onnx-ir": "1.1.0",
    "numpy": "2.4.6",
}


def test_report_of_this_machine() -> None:
    report = doctor()
    machine = this_machine()
    assert report.versions["onnxruntime"] or report.versions["onnxruntime-gpu"]
    assert report.versions["numpy"] == np.__version__
    assert (report.cpu, report.cores, report.isa) == (machine.cpu, machine.cores, machine.isa)
    assert report.providers == tuple(ort.get_available_providers())
    assert set(report.extras) == {"tune", "train", "gpu", "data"}
    if "CUDAExecutionProvider" not in report.providers:
        assert report.cuda == "not installed"
    assert json.loads(json.dumps(to_json(report)))["arch"] == machine.arch


@pytest.mark.parametrize(
    ("arch", "isa", "activation", "reduce"),
    [
        ("x86_64", {"avx2", "avx512_vnni"}, "uint8", False),
        ("x86_64", {"avx2", "amx_int8"}, "uint8", False),
        ("x86_64", {"avx2", "avx512f"}, "uint8", True),
        ("arm64", {"neon", "dotprod"}, "int8", False),
        ("arm64", {"neon"}, "int8", False),
    ],
)
def test_int8_format(arch: str, isa: set[str], activation: str, reduce: bool) -> None:
    found = int8_format(Target("cpu", arch, frozenset(isa)))
    assert found["activation_type"] == activation
    assert found["weight_type"] == "int8"
    assert found["reduce_range"] is reduce
    assert found["reason"]


def test_good_versions_are_no_problem() -> None:
    assert version_problems(GOOD) == []
    assert version_problems(GOOD | {"onnxruntime": "", "onnxruntime-gpu": "1.31.0+cu13"}) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"onnxruntime-gpu": "1.32.0"}, "pip uninstall both"),
        ({"onnxscript": "0.7.1"}, "pip install 'onnxscript>=0.7.2,<0.8'"),
        ({"onnx-ir": "1.2.0rc1"}, "pip install 'onnx-ir>=1.1.0,<1.2'"),
        ({"onnx": "1.9.0"}, "onnx 1.9.0 was not tested"),
        ({"onnx": ""}, "onnx is missing"),
    ],
)
def test_problems_say_what_to_do(change: dict[str, str], says: str) -> None:
    problems = version_problems(GOOD | change)
    assert len(problems) == 1
    assert says in problems[0]


def test_tested_ranges_are_those_the_package_requires() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = project["dependencies"] + project["optional-dependencies"]["gpu"]
    required = {r.name: r.specifier for r in map(Requirement, texts)}
    for name, (low, high) in module.TESTED.items():
        ours = {f">={module._dotted(low)}", f"<{module._dotted(high)}"}
        assert {str(s) for s in required[name]} == ours, name


def test_cuda_that_is_listed_but_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise TargetError("asked for CUDAExecutionProvider, but the session runs on the CPU")

    monkeypatch.setattr(session, "open_session", refuse)
    providers = ("CUDAExecutionProvider", "CPUExecutionProvider")
    said = try_cuda(providers)
    assert said.startswith("asked for CUDAExecutionProvider")
    monkeypatch.setattr(module, "_driver", lambda: False)
    assert "there is no NVIDIA driver" in module._runtime_problems(providers, said)[0]
    monkeypatch.setattr(module, "_driver", lambda: True)
    assert "effdl[gpu]" in module._runtime_problems(providers, said)[0]
    assert module._runtime_problems(providers, "works") == []


def test_cuda_check_runs_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubling:
        def run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"y": feed["x"] * 2}

    monkeypatch.setattr(session, "open_session", lambda *_: Doubling())
    assert try_cuda(("CUDAExecutionProvider",)) == "works"


def test_onnxruntime_that_cannot_be_imported_is_a_problem() -> None:
    assert "cannot be imported" in module._runtime_problems((), "not installed")[0]
