"""The command line as it is typed: results, exit codes, and one clear line for each bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from effdl.graph import io
from effdl.runtime.machine import this_machine
from tests.support import SAMPLES, SHARED, Effdl, Result, needs_shared

CNN = SAMPLES / "digits_cnn.onnx"
CALIB = SAMPLES / "digits_cnn.calib.npz"


def quick(*more: object) -> list[object]:
    return ["--bench-seconds", "0", *more]


def test_optimize_writes_a_verified_model_with_its_provenance(effdl: Effdl, tmp_path: Path) -> None:
    goal = tmp_path / "o.onnx"
    report = tmp_path / "run.json"
    result = effdl(
        "optimize", CNN, "-c", "cnn-int8", "--data", CALIB, "-o", goal, "--report", report, *quick()
    )
    assert result.code == 0, result.err
    assert "verified" in result.out
    assert sorted(os.listdir(tmp_path)) == ["o.onnx", "run.json"]
    model = io.load(goal)
    assert model.metadata_props["effdl.input_sha256"] == io.file_digest(CNN)
    assert model.metadata_props["effdl.content_sha256"] == io.content_digest(model)
    assert json.loads(model.metadata_props["effdl.recipe"])["name"] == "cnn-int8"
    data = json.loads(report.read_text())
    assert data["schema"] == 2
    assert data["after"]["sha256"] == io.file_digest(goal)
    assert data["before"]["sha256"] == io.file_digest(CNN)
    assert data["after"]["file_bytes"] < data["before"]["file_bytes"] / 2


def test_optimize_is_deterministic(effdl: Effdl, tmp_path: Path) -> None:
    for name in "ab":
        code = effdl(
            "optimize", CNN, "-c", "cnn-int8", "--data", CALIB, "-o", tmp_path / name, *quick()
        ).code
        assert code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_optimize_measures_and_tells(effdl: Effdl, tmp_path: Path) -> None:
    result = effdl(
        "optimize",
        CNN,
        "-o",
        tmp_path / "o.onnx",
        "--bench-seconds",
        "0.3",
        "--json",
        "--threads",
        1,
        "--gate",
        "off",  # what a busy machine measures must not decide
    )
    assert result.code == 0, result.err
    data = result.json()
    assert data["schema"] == 2
    assert data["verified"]["equal"] is True
    assert data["bench"]["models"][1]["latency"]["median"] > 0
    assert {p["status"] for p in data["passes"]} <= {"changed", "unchanged"}


def test_dry_run_writes_nothing_and_names_nodes(effdl: Effdl, tmp_path: Path) -> None:
    result = effdl("optimize", CNN, "-c", "cnn-int8", "-o", tmp_path / "o.onnx", "--dry-run")
    assert result.code == 0, result.err
    assert not os.listdir(tmp_path)
    assert "fold_batchnorm: changed 9" in result.out
    assert "quantize_static" in result.out
    assert "calibration data" in result.out


def test_set_changes_the_recipe(effdl: Effdl, tmp_path: Path) -> None:
    args = ["optimize", CNN, "-c", "cnn-int8", "--data", CALIB, "-o", tmp_path / "o.onnx", "--json"]
    result = effdl(*args, "--set", "passes.quantize_static.per_channel=false", *quick())
    assert result.code == 0, result.err
    step = next(p for p in result.json()["passes"] if p["name"] == "quantize_static")
    assert step["options"]["per_channel"] is False


def test_stop_after_and_save_after_each(effdl: Effdl, tmp_path: Path) -> None:
    folder = tmp_path / "steps"
    result = effdl(
        "optimize",
        CNN,
        "-o",
        tmp_path / "o.onnx",
        "--stop-after",
        2,
        "--save-after-each",
        folder,
        *quick(),
    )
    assert result.code == 0, result.err
    assert [p.name[:3] for p in sorted(folder.iterdir())] == ["01_", "02_"]


def test_strict_refuses_a_pass_with_nothing_to_do(effdl: Effdl, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: r\ndescription: d\npasses: [fuse_gelu]\n")
    result = effdl("optimize", CNN, "-c", recipe, "-o", tmp_path / "o.onnx", "--strict", *quick())
    assert result.code == 1
    assert "nothing to do" in result.err
    assert not (tmp_path / "o.onnx").exists()


def test_missed_budget_writes_nothing_and_exits_1(effdl: Effdl, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: r\ndescription: d\nbudget: {size: 0.1}\npasses: [simplify]\n")
    goal = tmp_path / "o.onnx"
    result = effdl("optimize", CNN, "-c", recipe, "-o", goal, *quick())
    assert result.code == 1
    assert "budget missed" in result.err
    assert not goal.exists()
    assert effdl("optimize", CNN, "-c", recipe, "-o", goal, "--keep-going", *quick()).code == 0
    assert goal.exists()


def test_recipe_data_is_used_and_scored(effdl: Effdl, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    test = SAMPLES / "digits_cnn.test.npz"
    recipe.write_text(
        f"name: r\ndescription: d\ndata:\n  calibration: {CALIB}\n"
        f"  evaluation: {{path: {test}, labels: label, metric: top1}}\n"
        "budget: {accuracy_drop: 0.02}\npasses: [simplify, fold_batchnorm, quantize_static]\n"
    )
    result = effdl("optimize", CNN, "-c", recipe, "-o", tmp_path / "o.onnx", "--json", *quick())
    assert result.code == 0, result.err
    accuracy = result.json()["accuracy"]
    assert accuracy["metric"] == "top1"
    assert accuracy["before"] > 0.98
    assert accuracy["after"] > 0.97


def test_compare_exit_codes_and_tolerance(effdl: Effdl, tmp_path: Path) -> None:
    assert effdl("compare", CNN, CNN).code == 0
    goal = tmp_path / "o.onnx"
    assert effdl("optimize", CNN, "-c", "cnn-int8", "--data", CALIB, "-o", goal, *quick()).code == 0
    result = effdl("compare", CNN, goal, "--json")
    assert result.code == 1
    assert result.json()["schema"] == 2
    assert effdl("compare", CNN, goal, "--rtol", "logits:10").code == 0
    assert effdl("compare", CNN, goal, "--rtol", "nonsense:10").code == 2


def test_bench_table_and_json(effdl: Effdl) -> None:
    result = effdl("bench", CNN, CNN, "--seconds", "0.3")
    assert result.code == 0, result.err
    assert "ORT_ENABLE_ALL" in result.out
    data = effdl("bench", CNN, "--seconds", "0.3", "--dim", "batch=2", "--json").json()
    assert data["schema"] == 2
    assert "[2,1,8,8]" in str(data["feeds"]).replace(" ", "")


def test_inspect_one_and_two(effdl: Effdl) -> None:
    result = effdl("inspect", CNN)
    assert result.code == 0, result.err
    for word in ("params", "MACs", "BatchNormalization 9", "fold_batchnorm", "batch"):
        assert word in result.out
    both = effdl("inspect", CNN, SAMPLES / "digits_mlp.onnx", "--json").json()
    assert both["schema"] == 2
    assert len(both["models"]) == 2
    assert "Gemm" in effdl("inspect", CNN, "--nodes").out


def test_doctor_passes_and_recipes(effdl: Effdl) -> None:
    assert effdl("doctor").code == 0
    assert effdl("doctor", "--json").json()["schema"] == 2
    assert "quantize_static" in effdl("passes").out
    assert "per_channel" in effdl("passes", "quantize_static").out
    assert effdl("passes", "--json").json()["schema"] == 2
    assert "cnn-int8" in effdl("recipe", "list").out
    assert effdl("passes", "nonsense").code == 2


def run_effdl(*args: object, **kwargs: object) -> subprocess.CompletedProcess[bytes]:
    code = "from effdl.cli.app import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, check=False, **kwargs
    )  # type: ignore[call-overload,no-any-return]


def test_a_model_through_pipes() -> None:
    done = run_effdl("optimize", "-", "-o", "-", *quick(), input=CNN.read_bytes())
    assert done.returncode == 0, done.stderr
    model = io.load_bytes(done.stdout)
    assert "effdl.recipe" in model.metadata_props
    assert b"verified" in done.stderr


BAD_MODELS: dict[str, Callable[[Path], object]] = {
    "missing": lambda p: None,
    "folder": lambda p: p.mkdir(),
    "empty": lambda p: p.write_bytes(b""),
    "random": lambda p: p.write_bytes(np.random.default_rng(1).bytes(5000)),
    "truncated": lambda p: p.write_bytes(CNN.read_bytes()[:-5000]),
    "text": lambda p: p.write_text("not a model\n"),
}


@pytest.mark.parametrize("verb", ["optimize", "bench", "compare", "inspect"])
@pytest.mark.parametrize("kind", list(BAD_MODELS))
def test_a_bad_model_is_one_line_and_nothing_is_written(
    effdl: Effdl, tmp_path: Path, verb: str, kind: str
) -> None:
    bad = tmp_path / "bad.onnx"
    BAD_MODELS[kind](bad)
    goal = tmp_path / "out" / "o.onnx"
    goal.parent.mkdir()
    goal.write_bytes(b"old")
    more = {"optimize": ["-o", goal], "compare": [CNN]}.get(verb, [])
    result = effdl(verb, bad, *more)
    assert_refused(result, 2)
    assert "bad.onnx" in result.err
    assert goal.read_bytes() == b"old"
    assert os.listdir(goal.parent) == ["o.onnx"]


def assert_refused(result: Result, code: int) -> None:
    assert result.code == code, result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    lines = [line for line in result.err.splitlines() if line.strip()]
    assert lines, "nothing was said"
    assert lines[0].startswith("effdl: error: "), lines
    assert len(lines) <= 2
    if len(lines) == 2:
        assert lines[1].strip().startswith("hint:")


def write_recipe(tmp_path: Path, passes: str, extra: str = "") -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(f"name: r\ndescription: d\n{extra}passes:\n{passes}\n")
    return path


@pytest.mark.parametrize(
    ("passes", "extra", "says"),
    [
        ("  - simplifi", "", "did you mean 'simplify'"),
        ("  - quantize_static: {per_chanel: true}", "", "did you mean 'per_channel'"),
        ("  - quantize_static: {per_channel: maybe}", "", "per_channel"),
        ("  - prune_weights: {sparsity: 1.5}", "", "sparsity"),
        ("  - quantize_static\n  - fold_batchnorm", "", "batch norm"),
        ("  - simplify", "traget: cpu\n", "did you mean 'target'"),
        ("  - quantize_dynamic: {ignore: [nothing_like_it]}", "", "matches no node"),
        ("  - [", "", "r.yaml:"),
        ("  - set_shapes: {dims: {bach: 1}}", "", "batch"),
    ],
)
def test_a_bad_recipe_names_the_place_and_the_nearest_name(
    effdl: Effdl, tmp_path: Path, passes: str, extra: str, says: str
) -> None:
    recipe = write_recipe(tmp_path, passes, extra)
    goal = tmp_path / "o.onnx"
    result = effdl("optimize", CNN, "-c", recipe, "-o", goal, "--data", CALIB, *quick())
    assert_refused(result, 2)
    assert says in result.err
    assert "r.yaml:" in result.err
    assert not goal.exists()


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"image": np.zeros((10, 1, 9, 9), np.float32)}, "image"),
        ({"imag": np.zeros((10, 1, 8, 8), np.float32)}, "image"),
        ({"image": np.zeros((0, 1, 8, 8), np.float32)}, "image"),
        ({"image": np.zeros((10, 1, 8, 8), np.uint8)}, "image"),
    ],
)
def test_calibration_data_that_does_not_fit(
    effdl: Effdl, tmp_path: Path, arrays: dict[str, np.ndarray], says: str
) -> None:
    data = tmp_path / "d.npz"
    np.savez(data, **arrays)
    for verb in (["optimize", CNN, "-c", "cnn-int8", "-o", tmp_path / "o.onnx"], ["bench", CNN]):
        result = effdl(*verb, "--data", data)
        assert_refused(result, 2)
        assert says in result.err
    assert not (tmp_path / "o.onnx").exists()


def test_other_bad_input(effdl: Effdl, tmp_path: Path) -> None:
    goal = tmp_path / "o.onnx"
    cases: list[tuple[list[object], int, str]] = [
        (["optimize", CNN, "-c", "cnn-int8", "-o", goal], 2, "calibration data"),
        (["optimize", CNN, "-c", "cnn-int9", "-o", goal], 2, "cnn-int8"),
        (["optimize", CNN, "-o", tmp_path / "no" / "o.onnx"], 2, "folder"),
        (["optimize", CNN, "-o", tmp_path], 2, "folder"),
        (["optimize", CNN], 2, "output"),
        (["optimize", CNN, "-o", goal, "--dim", "batch"], 2, "--dim"),
        (["optimize", CNN, "-o", goal, "--dim", "bach=2"], 2, "batch"),
        (["optimize", CNN, "-o", goal, "--set", "passes.simplfy.x=1"], 2, "simplify"),
        (["optimize", CNN, "-o", goal, "--target", "tpu"], 2, "tpu"),
        (["optimize", CNN, "-o", goal, "--data", tmp_path / "no.npz"], 2, "no.npz"),
        (["optimize", CNN, "-o", goal, "--report", tmp_path / "no" / "r.json"], 2, "r.json"),
        (["bench", CNN, "--target", "tpu"], 2, "tpu"),
        (["bench", CNN, SAMPLES / "digits_transformer.onnx"], 2, "input"),
        (["compare", CNN, CNN, "--rtol", "x:y"], 2, "--rtol"),
        (["recipe", "show", "cnn-int9"], 2, "cnn-int8"),
        (["recipe", "check", tmp_path / "no.yaml"], 2, "no.yaml"),
    ]
    for args, code, says in cases:
        result = effdl(*args)
        assert_refused(result, code)
        assert says in result.err, (args, result.err)
    assert not goal.exists()


def test_a_provider_that_is_not_there_is_exit_code_3(effdl: Effdl) -> None:
    import onnxruntime as ort

    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this machine has the provider")
    for verb in (["bench", CNN], ["compare", CNN, CNN]):
        result = effdl(*verb, "--target", "cuda")
        assert_refused(result, 3)
        assert "CUDAExecutionProvider" in result.err


def test_an_arm_model_is_made_here_and_not_measured_here(effdl: Effdl, tmp_path: Path) -> None:
    goal = tmp_path / "o.onnx"
    result = effdl("optimize", CNN, "-c", "arm-int8", "--data", CALIB, "-o", goal, "--json")
    assert result.code == 0, result.err
    data = result.json()
    assert data["target"] == "arm"
    on_arm = this_machine().arch == "arm64"
    assert (data["bench"] is not None) is on_arm
    assert bool(data["unmeasured"]) is not on_arm
    assert effdl("bench", CNN, "--target", "arm", "--seconds", 0.2).code == (0 if on_arm else 3)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(effdl: Effdl, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert_refused(effdl("optimize", CNN, "-o", tmp_path / "o.onnx"), 2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device here")
def test_a_full_disk_leaves_the_old_file(effdl: Effdl, tmp_path: Path, monkeypatch) -> None:
    goal = tmp_path / "o.onnx"
    goal.write_bytes(b"old")

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    result = effdl("optimize", CNN, "-o", goal, *quick())
    monkeypatch.undo()
    assert_refused(result, 2)
    assert "No space left" in result.err
    assert goal.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["o.onnx"]


def test_weights_file_missing_or_outside(effdl: Effdl, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    path = folder / "m.onnx"
    io.save(io.load(CNN), path, external=True)
    data = io.data_files(path)[0]
    shutil.move(data, tmp_path / "w")
    assert_refused(effdl("optimize", path, "-o", tmp_path / "o.onnx"), 2)
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../w"
    onnx.save(proto, path)
    result = effdl("bench", path)
    assert_refused(result, 2)
    assert "outside" in result.err


@needs_shared
def test_an_unknown_operator_is_named_where_the_model_must_run(
    effdl: Effdl, tmp_path: Path
) -> None:
    assert SHARED is not None
    model = SHARED / "models" / "superres_prepost_op18.onnx"
    result = effdl("bench", model)
    assert_refused(result, 2)
    assert "com.microsoft.extensions" in result.err
    assert effdl("inspect", model).code == 0
    result = effdl("optimize", model, "-o", tmp_path / "o.onnx")
    assert result.code == 0, result.err
    assert "NOT VERIFIED" in result.out
    recipe = write_recipe(tmp_path, "  - quantize_static")
    data = tmp_path / "d.npz"
    np.savez(data, image=np.zeros((4, 10), np.uint8))
    result = effdl("optimize", model, "-c", recipe, "--data", data, "-o", tmp_path / "p.onnx")
    assert result.code == 2
    assert "com.microsoft.extensions" in result.err


def test_max_memory(effdl: Effdl, tmp_path: Path) -> None:
    """Less memory takes more runs over the data, and gives the same model up to rounding.

    Which tensors are fetched together decides what ONNX Runtime fuses, and so the last bit of their values.
    """
    files = []
    for size in ("1kB", "1GB"):
        files.append(tmp_path / f"{size}.onnx")
        more = ("--max-memory", size, "--gate", "off", "--bench-seconds", "0")
        result = effdl(
            "optimize", CNN, "-c", "cnn-int8", "--data", CALIB, "-o", files[-1], "-q", *more
        )
        assert result.code == 0, result.err
    one, two = (io.load(f).graph.initializers for f in files)
    assert one.keys() == two.keys()
    for name in one:
        a, b = (m[name].const_value.numpy() for m in (one, two))
        whole = a.dtype.kind in "iu"
        np.testing.assert_allclose(
            a.astype(np.float64), b.astype(np.float64), rtol=1e-3, atol=1 if whole else 0
        )
    result = effdl("optimize", CNN, "-c", "int8", "-o", files[0], "--max-memory", "much")
    assert result.code == 2
    assert "'much' is no size" in result.err
