"""Models scored side by side: from Python, from the command line, in a recipe; real models at the end."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image

import effdl as effdl_package
from effdl import recipe
from effdl.cli.evaluate import parse_drop
from effdl.data.spec import Preprocess, Source
from effdl.errors import RecipeError, UsageError
from effdl.graph import io
from effdl.report import EvaluateReport, to_json
from tests.support import SAMPLES, SHARED, Effdl, from_text, needs_shared

MLP = SAMPLES / "digits_mlp.onnx"
TEST = SAMPLES / "digits_mlp.test.npz"
CIFAR = "unit,mean=0.4914/0.4822/0.4465,std=0.2470/0.2435/0.2616"


@pytest.fixture(scope="module")
def worse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with noise on its weights."""
    model = io.load(MLP)
    rng = np.random.default_rng(0)
    for value in model.graph.initializers.values():
        if value.const_value is not None and len(value.const_value.shape) == 2:
            array = value.const_value.numpy()
            noise = rng.normal(size=array.shape).astype(array.dtype) * array.std() * 0.8
            value.const_value = ir.tensor(array + noise, name=value.name)
    path = tmp_path_factory.mktemp("worse") / "worse.onnx"
    io.save(model, path)
    return path


def test_two_models_on_the_same_samples(worse: Path) -> None:
    report = effdl_package.evaluate(MLP, MLP, worse, data=TEST, max_drop=0.001)
    assert isinstance(report, EvaluateReport)
    first, same, third = report.models
    assert first.score == pytest.approx(0.9980, abs=1e-4)
    assert (first.verdict, first.difference) == ("reference", None)
    assert (same.verdict, same.difference) == ("same", 0.0)
    assert same.difference_ci is not None
    assert same.difference_ci[0] < 0 < same.difference_ci[1] < 0.01
    assert third.verdict == "worse"
    assert third.difference == pytest.approx(third.score - first.score)
    assert report.verdict[0].startswith("no measurable difference (+0.00 points [-0.76, +0.76]")
    assert report.verdict[1].startswith("worse: lost ")
    assert len(report.failed) == 1
    assert report.failed[0].startswith("worse.onnx: lost")
    assert (report.samples, report.source, report.share) == (504, TEST.name, True)
    json.dumps(to_json(report), allow_nan=False)
    swapped = effdl_package.evaluate(worse, MLP, data=TEST, max_drop=0.0)
    assert swapped.models[1].verdict == "better"
    assert swapped.failed == ()


def test_models_in_memory_and_limits(worse: Path) -> None:
    report = effdl_package.evaluate(effdl_package.load(MLP), data=TEST, limit=50, metric="f1")
    assert report.samples == 50
    with pytest.raises(UsageError, match="no model to evaluate"):
        effdl_package.evaluate(data=TEST)


def test_agreement_with_the_first_model_or_another(worse: Path) -> None:
    report = effdl_package.evaluate(MLP, worse, MLP, data=TEST, metric="agreement", max_drop=0.01)
    assert [m.verdict for m in report.models] == ["reference", "", ""]
    assert report.models[0].score == report.models[2].score == 1.0
    assert report.reference == str(MLP)
    assert report.verdict[0].startswith("agrees with digits_mlp.onnx on ")
    assert report.failed[0].startswith("worse.onnx: disagrees by")
    other = effdl_package.evaluate(worse, MLP, data=TEST, metric="agreement", reference=MLP)
    assert other.models[1].score == 1.0
    assert other.models[1].verdict == "better"
    with pytest.raises(UsageError, match="needs a model to agree with"):
        effdl_package.evaluate(MLP, data=TEST, metric="agreement")


def test_reference_outputs_for_errors(worse: Path) -> None:
    report = effdl_package.evaluate(
        MLP, worse, data=TEST, metric="mse", reference=MLP, max_drop=0.5
    )
    assert report.models[0].score == 0.0
    assert report.models[1].verdict == "worse"
    assert not report.higher_is_better
    assert report.failed
    assert "rose by" in report.verdict[0]
    with pytest.raises(UsageError, match="top1 wants labels, not a reference"):
        effdl_package.evaluate(MLP, data=TEST, reference=MLP)
    with pytest.raises(UsageError, match="either labels or a reference"):
        effdl_package.evaluate(MLP, data=TEST, reference=MLP, labels="label", metric="mse")


MINE = """
import numpy as np

def hits(outputs, labels):
    return (outputs.argmax(1) == labels).astype(float)

def accuracy(outputs, labels):
    return hits(outputs, labels).mean()

def errors(outputs, labels):
    return 1 - accuracy(outputs, labels)
errors.lower_is_better = True

def spread(outputs, labels):
    assert labels is None
    return outputs.std()

def broken(outputs, labels):
    raise KeyError("nothing")

def wrong(outputs, labels):
    return np.zeros((2, 3))
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    name = f"mine_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MINE)
    (tmp_path / f"{name}_syntax.py").write_text("def f(:\n")
    (tmp_path / f"{name}_import.py").write_text("import no_such_library\n")
    return name


def test_a_metric_of_ones_own(mine: str, worse: Path) -> None:
    known = effdl_package.evaluate(MLP, worse, data=TEST)
    for name in ("hits", "accuracy", "errors"):
        report = effdl_package.evaluate(MLP, worse, data=TEST, metric=f"{mine}:{name}")
        want = known.models[1].score
        assert report.models[1].score == pytest.approx(1 - want if name == "errors" else want)
        assert report.models[1].verdict == "worse"
        assert report.higher_is_better == (name != "errors")
    bare = SAMPLES / "digits_mlp.calib.npz"
    assert effdl_package.evaluate(MLP, data=bare, metric=f"{mine}:spread").samples == 200


@pytest.mark.parametrize(
    ("metric", "message", "hint"),
    [
        ("M:nothing", "has no function 'nothing'", "accuracy"),
        ("M:hitz", "has no function 'hitz'", "did you mean 'hits'?"),
        ("no_such_module_x:f", "there is no Python module 'no_such_module_x'", "current folder"),
        ("M_syntax:f", "cannot be imported: SyntaxError", ""),
        ("M_import:f", "cannot be imported: No module named 'no_such_library'", ""),
        ("M:broken", "failed: KeyError: 'nothing'", "outputs [504, 10] and labels [504]"),
        ("M:wrong", "returned an array [2, 3]", "each of the 504 samples"),
        ("M:", "is no module:function", "mymetrics.py"),
        (":f", "is no module:function", "mymetrics.py"),
        ("os.path:sep", "has no function 'sep'", ""),
    ],
)
def test_faults_of_a_metric_of_ones_own(mine: str, metric: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as e:
        effdl_package.evaluate(MLP, data=TEST, metric=metric.replace("M", mine))
    assert message in e.value.message
    assert hint in e.value.hint


def test_command(effdl: Effdl, worse: Path) -> None:
    one = effdl("evaluate", MLP, "--data", TEST, "--labels", "label", "--metric", "top1")
    assert one.code == 0, one.err
    assert "99.80 %" in one.out
    assert "504 samples from digits_mlp.test.npz" in one.out
    two = effdl("evaluate", MLP, worse, "--data", TEST, "--max-drop", "0.5%")
    assert two.code == 1
    assert "worse: lost" in two.out
    assert "points" in two.out
    assert two.err.startswith("effdl: warning: worse.onnx: lost")
    assert "at most 0.50 points allowed" in two.err
    json_ = effdl("evaluate", MLP, worse, "--data", TEST, "--json", "--max-drop", "90%")
    assert json_.code == 0
    data = json.loads(json_.out)
    assert data["models"][1]["verdict"] == "worse"
    assert data["max_drop"] == 0.9
    quiet = effdl("evaluate", MLP, worse, "--data", TEST, "--quiet", "--max-drop", "0")
    assert (quiet.code, quiet.out) == (1, "")


def test_command_agreement_and_mse(effdl: Effdl, worse: Path) -> None:
    agree = effdl("evaluate", MLP, worse, "--data", TEST, "-m", "agreement", "--limit", 100)
    assert agree.code == 0, agree.err
    assert "the outputs of digits_mlp.onnx stand in for labels" in agree.out
    assert "of 100 samples" in agree.out
    error = effdl("evaluate", MLP, worse, "--data", TEST, "-m", "mse", "--reference", MLP)
    assert "lower is better" in error.out
    assert "difference" in error.out


def test_bad_input_is_one_clear_line(effdl: Effdl, tmp_path: Path) -> None:
    with np.load(TEST) as data:
        images, labels = data["image"], data["label"]
    for name, arrays in {
        "bare": {"image": images},
        "short": {"image": images, "label": labels[:-1]},
        "long": {"image": images, "label": np.append(labels, 0)},
        "floats": {"image": images, "label": labels / 2},
        "many": {"image": images, "label": labels + 1},
        "named": {"image": images, "targets": labels},
        "input": {"images": images, "label": labels},
        "shape": {"image": images[:, :8], "label": labels},
        "none": {"image": images[:0], "label": labels[:0]},
        "matrix": {"image": images, "label": np.zeros((504, 3), np.int64)},
    }.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    (tmp_path / "empty").mkdir()
    (tmp_path / "t.csv").write_text("text,label\nhello,1\n")
    cases = [
        (["bare.npz"], "the data has no labels", "--labels KEY"),
        (["short.npz"], "503 labels for 504 results", "one label per sample"),
        (["long.npz"], "505 labels for 504 results", "one label per sample"),
        (["floats.npz"], "labels must be class numbers, not float64", "mse, psnr and spearman"),
        (["many.npz"], "labels go from 1 to 10, the model has 10 classes", ""),
        (["named.npz"], "the data has no labels", "image, targets"),
        (["named.npz", "--labels", "target"], "no array 'target'", "did you mean 'targets'?"),
        (["input.npz"], "no array for input 'image'", "images, label"),
        (["shape.npz"], "wants [samples, 64], the array is [504, 8]", ""),
        (["none.npz"], "has no samples", ""),
        (["matrix.npz"], "do not belong together", ""),
        (["bare.npz", "--preprocess", "unit"], "preprocess is for a folder of pictures", ""),
        (["nowhere.npz"], "no such file or folder", ""),
        (["empty"], "no pictures in this folder, and no .npy files", ""),
        (["t.csv"], "which column has the text", "text, label"),
        (["t.csv", "--text", "text"], "texts need a tokenizer", "--tokenizer"),
        (["short.npz", "--metric", "top-1"], "unknown metric 'top-1'", "did you mean 'top1'?"),
        (["short.npz", "--output", "logit"], "no output 'logit'", "did you mean 'logits'?"),
        (["short.npz", "--max-drop", "much"], "--max-drop much", "0.5%"),
        (["t.csv", "--pairs", "both"], "pairs cannot be 'both'", ""),
    ]
    for (file, *more), message, hint in cases:
        result = effdl("evaluate", MLP, "--data", tmp_path / file, *more)
        assert result.code == 2, (file, result)
        lines = result.err.splitlines()
        assert message in lines[0], (file, lines)
        assert len(lines) <= 2, lines
        assert hint in result.err, (file, lines)
        assert result.out == ""
    gone = effdl("evaluate", tmp_path / "no.onnx", "--data", TEST)
    assert gone.code == 2
    other = effdl("evaluate", MLP, SAMPLES / "digits_cnn.onnx", "--data", TEST)
    assert other.code == 2
    assert "digits_cnn.onnx" in other.err


def test_a_drop_in_percent_or_not() -> None:
    assert parse_drop("0.5%", "top1") == 0.005
    assert parse_drop("0.02", "mse") == 0.02
    assert parse_drop(" 0 ", "top1") == 0
    for text, metric in (("-1", "top1"), ("nan", "top1"), ("1 %%", "f1"), ("1%", "psnr")):
        with pytest.raises(UsageError, match="--max-drop"):
            parse_drop(text, metric)


def digits_folder(tmp_path: Path) -> Path:
    """The digits as pictures of 8 x 8, 16 grey values each."""
    with np.load(SAMPLES / "digits_cnn.test.npz") as data:
        for k, (image, label) in enumerate(zip(data["image"], data["label"], strict=True)):
            path = tmp_path / "digits" / str(label) / f"{k:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.round(image[0] * 255).astype(np.uint8)).save(path)
    return tmp_path / "digits"


def test_pictures_score_as_the_arrays_do(effdl: Effdl, tmp_path: Path) -> None:
    folder = digits_folder(tmp_path)
    model = SAMPLES / "digits_cnn.onnx"
    result = effdl("evaluate", model, "--data", folder, "--preprocess", "unit", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["models"][0]["score"] == pytest.approx(0.9921, abs=0.003)
    assert json.loads(result.out)["samples"] == 504


def test_pictures_as_inputs_of_the_other_commands(effdl: Effdl, tmp_path: Path) -> None:
    folder = digits_folder(tmp_path)
    model = SAMPLES / "digits_cnn.onnx"
    same = effdl("compare", model, model, "--data", folder, "--preprocess", "unit", "--json")
    assert same.code == 0, same.err
    assert json.loads(same.out)["source"] == "digits"
    plan = effdl(
        "optimize", model, "-c", "cnn-int8", "--dry-run", "--data", folder, "--preprocess", "unit"
    )
    assert plan.code == 0, plan.err
    alone = effdl("compare", model, model, "--preprocess", "unit")
    assert alone.code == 2
    assert "--data FOLDER" in alone.err
    unsaid = effdl("bench", model, "--data", folder)
    assert unsaid.code == 2
    assert "how do the pictures become numbers" in unsaid.err


HEAD = "name: n\ndescription: d\npasses: [strip_metadata]\n"


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "r.yaml"
    file.write_text(HEAD + text)
    return file


def test_a_recipe_names_pictures_and_texts(tmp_path: Path) -> None:
    text = """data:
  calibration: {path: train, preprocess: "imagenet,size=160", limit: 200}
  evaluation:
    path: val
    preprocess: {preset: raw, size: [10, 20], color: BGR}
    labels: truth.csv
    metric: f1
    output: logits
"""
    got = recipe.load(written(tmp_path, text))
    assert isinstance(got.data.calibration, Source)
    assert got.data.calibration.path == tmp_path / "train"
    assert got.data.calibration.limit == 200
    spec = got.data.evaluation
    assert spec is not None
    assert (spec.path, spec.labels) == (tmp_path / "val", str(tmp_path / "truth.csv"))
    assert isinstance(spec.preprocess, Preprocess)
    assert (spec.preprocess.size, spec.metric, spec.output) == ([10, 20], "f1", "logits")
    plain = recipe.to_dict(got)["data"]
    assert plain["calibration"]["path"] == "train"
    assert plain["evaluation"]["labels"] == "truth.csv"
    assert plain["evaluation"]["preprocess"] == {"preset": "raw", "size": [10, 20], "color": "BGR"}
    assert recipe.load(recipe.to_dict(got)).passes == got.passes
    again = recipe.apply_overrides(
        got, ["data.calibration.preprocess.size=224", "data.evaluation.preprocess.color=RGB"]
    )
    assert isinstance(again.data.calibration, Source)
    assert again.data.calibration.preprocess == Preprocess(preset="imagenet", size=224)
    short = recipe.load(written(tmp_path, "data: {calibration: c.npz}\n"))
    longer = recipe.apply_overrides(short, ["data.calibration.limit=10"])
    assert isinstance(longer.data.calibration, Source)
    assert longer.data.calibration.path == tmp_path / "c.npz"
    key = recipe.load(written(tmp_path, "data: {evaluation: {path: t.npz, labels: y}}\n"))
    assert key.data.evaluation is not None
    assert key.data.evaluation.labels == "y"


@pytest.mark.parametrize(
    ("text", "at", "message"),
    [
        ("evaluation: {path: a, preprocess: imagnet}", "imagnet", "preset cannot be 'imagnet'"),
        ("evaluation: {path: a, preprocess: {size: x}}", "x}}", "must be a whole number or a list"),
        ("evaluation: {path: a, preprocess: {sise: 3}}", "sise", "unknown key 'sise'"),
        ("evaluation: {path: a, metric: acc}", "acc", "must be 'top1', 'top5', 'f1'"),
        ("evaluation: {path: a, metric: 'my:own'}", "'my", "must be 'top1', 'top5', 'f1'"),
        ("evaluation: {path: a, text: [a, b, c]}", "[", "one column, or the two"),
        ("calibration: {path: a, labels: b}", "labels", "unknown key 'labels'"),
        ("calibration: {pth: a}", "pth", "unknown key 'pth'"),
        ("calibration: 3", "3", "must be a path or a mapping"),
    ],
)
def test_recipe_faults_have_a_place(tmp_path: Path, text: str, at: str, message: str) -> None:
    line = "data: {" + text + "}"
    with pytest.raises(RecipeError) as e:
        recipe.load(written(tmp_path, line + "\n"))
    assert message in e.value.message
    assert e.value.where.endswith(f"r.yaml:4:{line.index(at) + 1}"), e.value.where


def test_a_recipe_is_calibrated_and_scored_on_pictures(tmp_path: Path) -> None:
    folder = digits_folder(tmp_path)
    text = f"""data:
  calibration: {{path: {folder}, preprocess: unit, limit: 40}}
  evaluation: {{path: {folder}, preprocess: unit, limit: 100}}
"""
    file = tmp_path / "r.yaml"
    file.write_text("name: n\ndescription: d\npasses: [simplify, quantize_static]\n" + text)
    report = effdl_package.optimize(
        SAMPLES / "digits_cnn.onnx",
        file,
        tmp_path / "o.onnx",
        options=effdl_package.RunOptions(bench_seconds=0),
    )
    assert report.accuracy is not None
    assert report.accuracy["samples"] == 100
    assert report.accuracy["after"] > 0.95


def pixels_model() -> ir.Model:
    return from_text(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N,3,H,W] x) => (float[N,3] y) {
            axes = Constant<value_ints = [2, 3]>()
            m = ReduceMean<keepdims = 0, axes = [2, 3]>(x)
            y = Identity(m)
        }"""
    )


def test_thousands_of_pictures_need_little_memory(tmp_path: Path) -> None:
    """Every picture is opened when its turn comes: with all of them decoded it would be 460 MB."""
    import resource

    for k in range(3):
        path = tmp_path / "set" / str(k) / "a.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (1600, 1600), tuple(255 * (c == k) for c in range(3))).save(path)
        for j in range(4):
            (path.parent / f"{j}.png").symlink_to(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = effdl_package.evaluate(
        pixels_model(), data=tmp_path / "set", preprocess="unit,layout=NCHW"
    )
    assert report.models[0].score == 1.0
    assert report.samples == 15
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 420_000


@needs_shared
@pytest.mark.parametrize(("name", "correct"), [("cifar_resnet20", 408), ("cifar_vgg", 419)])
def test_cifar_pictures(name: str, correct: int, tmp_path: Path) -> None:
    assert SHARED is not None
    with zipfile.ZipFile(SHARED / "data" / "cifar10_test_jpg.zip") as z:
        pictures = sorted(n for n in z.namelist() if n.endswith(".jpg"))[::20]
        z.extractall(tmp_path, pictures)
    folder = (tmp_path / pictures[0]).parent.parent
    report = effdl_package.evaluate(
        SHARED / "models" / f"{name}.onnx", data=folder, preprocess=CIFAR
    )
    assert report.samples == 500
    assert report.models[0].ci[0] < 0.845 < report.models[0].ci[1]
    assert report.models[0].score * 500 == pytest.approx(correct, abs=3)


@needs_shared
@pytest.mark.parametrize(
    ("name", "preprocess", "score"),
    [("mnist_winml", "raw", 0.9891), ("mnist_selfattn", "unit", 0.9741)],
)
def test_mnist_pictures(name: str, preprocess: str, score: float, tmp_path: Path) -> None:
    assert SHARED is not None
    folder = SHARED / "data" / "mnist"
    images, labels = (
        np.frombuffer(
            gzip.decompress((folder / f"t10k-{n}-ubyte.gz").read_bytes()), np.uint8, offset=o
        )
        for n, o in (("images-idx3", 16), ("labels-idx1", 8))
    )
    for k, image in enumerate(images.reshape(-1, 28, 28)[:600]):
        path = tmp_path / "set" / str(labels[k]) / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    report = effdl_package.evaluate(
        SHARED / "models" / f"{name}.onnx", data=tmp_path / "set", preprocess=preprocess
    )
    assert report.models[0].ci[0] < score < report.models[0].ci[1]


@needs_shared
def test_int8_against_float_on_cifar(tmp_path: Path) -> None:
    assert SHARED is not None
    path = SHARED / "models" / "cifar_resnet20.onnx"
    mean, std = (
        np.array(v, np.float32) for v in ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
    )
    with np.load(SHARED / "data" / "cifar10_calib_u8.npz") as data:
        images = ((data[data.files[0]][:400].astype(np.float32) / 255 - mean) / std).transpose(
            0, 3, 1, 2
        )
    np.savez(tmp_path / "c.npz", image=np.ascontiguousarray(images[:100]))
    np.savez(tmp_path / "t.npz", image=np.ascontiguousarray(images[100:]))
    goal = tmp_path / "int8.onnx"
    effdl_package.optimize(
        path,
        "cnn-int8",
        goal,
        data=tmp_path / "c.npz",
        options=effdl_package.RunOptions(bench_seconds=0),
    )
    report = effdl_package.evaluate(path, goal, data=tmp_path / "t.npz", metric="agreement")
    assert 0.95 < report.models[1].score <= 1.0
