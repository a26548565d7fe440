"""Start-up: the help text must not wait for libraries that only the work needs."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "numpy",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "optuna",
    "pydantic",
    "sympy",
    "torch",
    "yaml",
}
WRAPPER = """
import json, sys
from effdl.cli.app import app
try:
    app(sys.argv[1:], standalone_mode=False)
finally:
    sys.stderr.write("MODULES " + json.dumps(sorted({m.split(".")[0] for m in sys.modules})))
"""


def loaded(*arguments: str) -> set[str]:
    """Top-level modules that are loaded once the command has run."""
    done = subprocess.run(
        [sys.executable, "-c", WRAPPER, *arguments], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stderr.rpartition("MODULES ")[2]))


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_loads_nothing_heavy(option: str) -> None:
    assert not loaded(option) & HEAVY


@pytest.mark.parametrize("verb", ["optimize", "bench", "compare", "inspect", "passes", "recipe"])
def test_help_of_a_command_loads_no_model_library(verb: str) -> None:
    """Typer itself takes pydantic to read the types of a command's parameters."""
    assert not loaded(verb, "--help") & (HEAVY - {"pydantic"})


def test_listing_presets_loads_no_model_library() -> None:
    assert not loaded("recipe", "list") & (HEAVY - {"pydantic", "yaml"})


def test_import_effdl_loads_nothing_heavy() -> None:
    code = "import effdl, json, sys; print(json.dumps([m.split('.')[0] for m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(json.loads(done.stdout)) & (HEAVY | {"typer", "rich"})


def test_help_takes_little_processor_time() -> None:
    """The best of seven, in processor time, with room for slow machines: about 0.1 s is usual."""
    times = []
    for _ in range(7):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-c", "from effdl.cli.app import main; main()", "--help"]
        subprocess.run(command, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(times) <= 0.5


def test_onnxruntime_is_told_not_to_send_usage_data(tmp_path: Path) -> None:
    code = "import effdl, os, onnxruntime; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "1"
    assert os.listdir(tmp_path) == []
