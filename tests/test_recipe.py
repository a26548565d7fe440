"""Recipes: reading, faults with their place, overrides, writing, schema, starter."""

import json
import os
import re
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from typer.testing import CliRunner

from effdl import passes, recipe
from effdl.cli.recipe import recipe_app
from effdl.data.metrics import METRICS
from effdl.errors import EffdlError, OutputError, RecipeError, UsageError
from effdl.passes.base import Pass
from effdl.recipe import explain, located, reader
from effdl.recipe.model import Device, Evaluation, Extension
from effdl.recipe.starter import starter_text
from effdl.runtime import machine, target
from tests.support import from_text

HEAD = "name: n\ndescription: d\n"
GOOD = HEAD + "passes: [strip_metadata]\n"


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def fault(folder: Path, text: str) -> RecipeError:
    """Load a recipe that is wrong; the place is given without the folder."""
    path = write(folder, text)
    with pytest.raises(RecipeError) as caught:
        recipe.load(path)
    caught.value.where = caught.value.where.removeprefix(f"{folder}/")
    return caught.value


def test_reads_all_parts(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        HEAD
        + """\
target: {device: arm, isa: [neon, dotprod], threads: 2}
data: {calibration: calib.npz, evaluation: {path: /abs/test.npz, labels: y}}
budget: {accuracy_drop: 5e-3, speedup: 2}
objective: latency
passes:
  - strip_metadata
  - strip_metadata:
  - strip_metadata: {model_properties: true}
""",
    )
    got = recipe.load(path)
    assert got.target == {"device": "arm", "isa": ["neon", "dotprod"], "threads": 2}
    assert target.parse_target(got.target).device == "arm"
    assert got.data.calibration == tmp_path / "calib.npz"
    assert got.data.evaluation is not None
    assert got.data.evaluation.path == Path("/abs/test.npz")
    assert (got.data.evaluation.labels, got.data.evaluation.metric) == ("y", "top1")
    assert got.budget is not None
    assert (got.budget.accuracy_drop, got.budget.speedup, got.budget.size) == (0.005, 2.0, None)
    assert [s.name for s in got.passes] == ["strip_metadata"] * 3
    assert [s.options for s in got.passes] == [{}, {}, {"model_properties": True}]
    assert got.passes[2].pass_ == passes.get("strip_metadata")(model_properties=True)  # type: ignore[call-arg]
    assert got.passes[2].where == f"{path}:10:5"
    assert recipe.load(got) is got


def test_defaults(tmp_path: Path) -> None:
    got = recipe.load(str(write(tmp_path, GOOD)))
    assert (got.target, got.data.calibration, got.budget, got.objective) == (
        "cpu",
        None,
        None,
        None,
    )
    with pytest.raises(ValidationError):
        got.name = "x"


FAULTS = [
    ("", "r.yaml", "the recipe is empty"),
    ("# only a comment\n", "r.yaml", "the recipe is empty"),
    ("- simplify\n", "r.yaml:1:1", "a recipe is a mapping"),
    ("just text\n", "r.yaml:1:1", "not 'just text'"),
    ("name: [a\n", "r.yaml:2:1", "not valid YAML"),
    ("name: a\n\tb: c\n", "r.yaml:2:1", "not valid YAML"),
    ("a: b: c\n", "r.yaml:1:5", "mapping values are not allowed"),
    ("name: a\n---\nname: b\n", "r.yaml:2:1", "not valid YAML"),
    ("name: \x07\n", "r.yaml:1:7", "a character that YAML does not allow: U+0007"),
    ("name: a\nname: b\n", "r.yaml:2:1", "the key 'name' is given twice, first in line 1"),
    ("? [a, b]\n: c\n", "r.yaml:1:3", "a key must be a plain word"),
    ("name: !!python/object:os.system x\n", "r.yaml:1:7", "tag"),
    ("name: !!int abc\n", "r.yaml:1:7", "'abc' is no int"),
    ("a: &x [*x]\n", "r.yaml:1:4", "an alias that contains itself"),
    ("a: *x\n", "r.yaml:1:4", "not valid YAML"),
    ("description: d\npasses: [strip_metadata]\n", "r.yaml:1:1", "the recipe has no 'name'"),
    ("name: n\npasses: [strip_metadata]\n", "r.yaml:1:1", "the recipe has no 'description'"),
    ("name: n\ndescription: ' '\npasses: [strip_metadata]\n", "r.yaml:2:14", "not empty"),
    (
        "name: 3\ndescription: d\npasses: [strip_metadata]\n",
        "r.yaml:1:7",
        "'name' must be text, not 3",
    ),
    (HEAD, "r.yaml:1:1", "the recipe has no passes"),
    (HEAD + "passes:\n", "r.yaml:3:1", "the recipe has no passes"),
    (HEAD + "passes: []\n", "r.yaml:3:1", "the recipe has no passes"),
    (
        HEAD + "passes: {strip_metadata: {}}\n",
        "r.yaml:3:9",
        "'passes' must be a list, not a mapping",
    ),
    (HEAD + "passes: strip_metadata\n", "r.yaml:3:9", "must be a list, not 'strip_metadata'"),
    (HEAD + "passes: [3]\n", "r.yaml:3:10", "a step is the name of a pass"),
    (HEAD + "passes: [{}]\n", "r.yaml:3:10", "a step is the name of a pass"),
    (HEAD + "passes: [[strip_metadata]]\n", "r.yaml:3:10", "not a list"),
    (HEAD + "passes:\n  - strip_metadata:\n    x: 1\n", "r.yaml:4:5", "stand side by side"),
    (HEAD + "passes: [{strip_metadata: 3}]\n", "r.yaml:3:27", "must be a mapping, not 3"),
    (
        HEAD + "passes: [{strip_metadata: {model_properties: 'yes'}}]\n",
        "r.yaml:3:46",
        "option 'model_properties' of strip_metadata must be true or false, not 'yes'",
    ),
    (
        HEAD + "passes: [{strip_metadata: {model_properties: 1}}]\n",
        "r.yaml:3:46",
        "must be true or false, not 1",
    ),
    (
        GOOD + "target: gpu\n",
        "r.yaml:4:9",
        "'target' must be 'cpu', 'cuda', 'tensorrt', 'arm' or 'arm-emulated' or ssh:HOST or a mapping",
    ),
    (GOOD + "target: 'ssh:'\n", "r.yaml:4:9", "'target': target ssh needs a host"),
    (GOOD + "target: 'ssh:-o'\n", "r.yaml:4:9", "'target': '-o' is no host name"),
    (GOOD + "target: arm-emulated:m4\n", "r.yaml:4:9", "'target': unknown core 'm4'"),
    (GOOD + "target: {device: ssh}\n", "r.yaml:4:9", "'target': target ssh needs a host"),
    (
        GOOD + "target: {device: cpu, core: n1}\n",
        "r.yaml:4:9",
        "'target': target cpu has no 'core'",
    ),
    (
        GOOD + "target: {device: arn}\n",
        "r.yaml:4:18",
        "'target.device' must be 'cpu', 'cuda', 'tensorrt', 'arm', 'ssh' or 'arm-emulated'",
    ),
    (GOOD + "target: {devise: arm}\n", "r.yaml:4:10", "unknown key 'devise' in target"),
    (GOOD + "target: {isa: [dotprd]}\n", "r.yaml:4:16", "'target.isa[1]' must be 'avx2'"),
    (
        GOOD + "target: {threads: -1}\n",
        "r.yaml:4:19",
        "'target.threads' must be at least 0, not -1",
    ),
    (GOOD + "target: {threads: true}\n", "r.yaml:4:19", "must be a whole number, not true"),
    (GOOD + "data: x.npz\n", "r.yaml:4:7", "'data' must be a mapping, not 'x.npz'"),
    (GOOD + "data: {evaluation: {}}\n", "r.yaml:4:20", "'data.evaluation' needs 'path'"),
    (
        GOOD + "budget: {speedup: fast}\n",
        "r.yaml:4:19",
        "'budget.speedup' must be a number, not 'fast'",
    ),
    (GOOD + "budget: {speedup: '2'}\n", "r.yaml:4:19", "must be a number, not '2'"),
    (GOOD + "budget: {speedup: .inf}\n", "r.yaml:4:19", "must be a finite number"),
    (
        GOOD + "objective: speed\n",
        "r.yaml:4:12",
        "'objective' must be 'latency' or 'size', not 'speed'",
    ),
]


@pytest.mark.parametrize(("text", "where", "message"), FAULTS)
def test_faults_have_place_and_reason(tmp_path: Path, text: str, where: str, message: str) -> None:
    e = fault(tmp_path, text)
    assert message in e.message
    assert e.where == where
    assert not e.message.endswith(".")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (GOOD + "targt: cpu\n", "unknown key 'targt'", "did you mean 'target'?"),
        (HEAD + "pases: [x]\n", "unknown key 'pases'", "did you mean 'passes'?"),
        (GOOD + "budget: {speed: 2}\n", "unknown key 'speed' in budget", "did you mean 'speedup'?"),
        (GOOD + "target: cud\n", "'target' must be", "did you mean 'cuda'?"),
        (HEAD + "passes: [strip_metdata]\n", "unknown pass 'strip_metdata'", "'strip_metadata'?"),
        (
            HEAD + "passes: [{strip_metadata: {model_property: true}}]\n",
            "unknown option 'model_property' of strip_metadata",
            "did you mean 'model_properties'?",
        ),
        (HEAD + "passes: [{low_rank: {ignore: [*head]}}]\n", "not valid YAML", "needs quotes"),
    ],
)
def test_hints_name_the_nearest(tmp_path: Path, text: str, message: str, hint: str) -> None:
    e = fault(tmp_path, text)
    assert message in e.message
    assert hint in e.hint


def test_check_lists_every_fault_in_order(tmp_path: Path) -> None:
    path = write(
        tmp_path, HEAD + "budgt: {}\npasses:\n  - strip_metdata\n  - strip_metadata: {a: 1, b: 2}\n"
    )
    report = recipe.check(path)
    assert report.recipe is None
    assert [e.where.removeprefix(f"{path}:") for e in report.errors] == [
        "3:1",
        "5:5",
        "6:22",
        "6:28",
    ]


def test_deep_nesting_and_many_aliases_are_refused(tmp_path: Path) -> None:
    assert "nested too deeply" in fault(tmp_path, "[" * 20_000).message
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 12)]
    assert "more than" in fault(tmp_path, "\n".join(lines)).message


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    text = HEAD + (
        "passes:\n  - strip_metadata: &o {model_properties: true}\n"
        "  - strip_metadata: *o\n  - strip_metadata: {<<: *o, model_properties: false}\n"
    )
    got = recipe.load(write(tmp_path, text))
    assert [s.options["model_properties"] for s in got.passes] == [True, True, False]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for spec, message, hint in [
        (tmp_path / "lossless.yaml", "no such recipe file", "did you mean 'lossless'?"),
        ("lossles", "there is no preset or file 'lossles'", "did you mean 'lossless'?"),
        (tmp_path, "this is a folder", ""),
    ]:
        with pytest.raises(RecipeError, match=message) as caught:
            recipe.load(spec)
        assert hint in caught.value.hint
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not a text file"):
        recipe.load(tmp_path / "b.yaml")


def test_plain_data() -> None:
    data = {
        "name": "n",
        "description": "d",
        "passes": ["strip_metadata"],
        "data": {"calibration": Path("c.npz")},
    }
    got = recipe.load(data)
    assert got.data.calibration == Path("c.npz")
    with pytest.raises(RecipeError, match="unknown key 'x'") as caught:
        recipe.load(data | {"x": 1})
    assert caught.value.where == "recipe"
    with pytest.raises(RecipeError, match="cannot hold a set"):
        recipe.load(data | {"passes": {"a"}})


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    depth: int = 1


class Sample(Pass):
    """A pass with one option of every kind."""

    count: int = Field(default=1, ge=0, lt=10)
    share: float = 0.5
    mode: Literal["all", "none"] | int = "all"
    names: tuple[str, ...] = ()
    dims: dict[str, int] = Field(default={})
    inner: Inner = Inner()
    n_m: str = "2:4"

    @field_validator("n_m")
    @classmethod
    def _n_m(cls, value: str) -> str:
        if ":" not in value:
            raise ValueError("must be N:M.")
        return value


class Late(Pass):
    """A pass that must not come after another."""

    not_after: ClassVar[dict[str, str]] = {"strip_*": "there is nothing left"}


@pytest.fixture
def sample_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"sample": Sample, "late": Late}
    real = passes.get
    monkeypatch.setattr(passes, "get", lambda name: known.get(name) or real(name))


@pytest.mark.parametrize(
    ("options", "column", "message"),
    [
        ("count: 10", 8, "option 'count' of sample must be less than 10, not 10"),
        ("count: -1", 8, "option 'count' of sample must be at least 0, not -1"),
        ("count: 1.5", 8, "option 'count' of sample must be a whole number, not 1.5"),
        ("count: true", 8, "option 'count' of sample must be a whole number, not true"),
        ("count: '3'", 8, "option 'count' of sample must be a whole number, not '3'"),
        ("count: null", 8, "option 'count' of sample must be a whole number, not nothing"),
        ("share: false", 8, "option 'share' of sample must be a number, not false"),
        ("share: [1]", 8, "option 'share' of sample must be a number, not a list"),
        (
            "mode: some",
            7,
            "option 'mode' of sample must be 'all' or 'none' or a whole number, not 'some'",
        ),
        ("names: abc", 8, "option 'names' of sample must be a list, not 'abc'"),
        ("names: [a, 3]", 12, "option 'names[2]' of sample must be text, not 3"),
        ("dims: {n: x}", 11, "option 'dims.n' of sample must be a whole number, not 'x'"),
        ("dims: {n: true}", 11, "option 'dims.n' of sample must be a whole number, not true"),
        ("inner: {dept: 1}", 9, "unknown key 'dept' in sample.inner"),
        ("inner: 1", 8, "option 'inner' of sample must be a mapping, not 1"),
        ("n_m: abc", 6, "option 'n_m' of sample: must be N:M"),
    ],
)
@pytest.mark.usefixtures("sample_pass")
def test_option_faults(tmp_path: Path, options: str, column: int, message: str) -> None:
    e = fault(tmp_path, HEAD + f"passes:\n- sample: {{{options}}}\n")
    assert e.message == message
    assert e.where == f"r.yaml:4:{column + 11}"


@pytest.mark.usefixtures("sample_pass")
def test_wrong_order(tmp_path: Path) -> None:
    e = fault(tmp_path, HEAD + "passes:\n  - strip_metadata\n  - late\n")
    assert str(e) == "r.yaml:5:5: late cannot come after strip_metadata: there is nothing left"
    assert e.hint == "put it before strip_metadata"
    recipe.load(write(tmp_path, HEAD + "passes: [late, strip_metadata]\n"))


@pytest.mark.usefixtures("sample_pass")
def test_overrides(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        HEAD
        + "data: {calibration: c.npz}\npasses: [strip_metadata, sample, {sample: {count: 2}}, sample: ]\n",
    )
    base = recipe.load(path)

    def changed(*assignments: str) -> Any:
        return recipe.apply_overrides(base, assignments)

    assert changed("passes.sample.count=5").passes[1].options == {"count": 5}
    assert changed("passes.sample.2.share=1e-3").passes[2].options == {"count": 2, "share": 0.001}
    assert changed("passes.4.names=[a, 'b*']").passes[3].options == {"names": ["a", "b*"]}
    assert changed("passes.sample.dims.in.0=8").passes[1].options == {"dims": {"in.0": 8}}
    assert changed("target=arm").target == "arm"
    assert changed("target.threads=2").target == {"threads": 2}
    assert changed("target=arm", "target.threads=2").target == {"device": "arm", "threads": 2}
    assert changed("budget.size=0.5", "budget.speedup=2").budget.size == 0.5
    assert changed("data.calibration=x.npz").data.calibration == Path("x.npz")
    assert changed("data.calibration=").data.calibration is None
    assert changed("name=other").data.calibration == tmp_path / "c.npz"
    assert base.target == "cpu"
    assert [s.options for s in base.passes] == [{}, {}, {"count": 2}, {}]
    assert changed("target=arm").passes[1].where == f"{path}:4:26"
    copy = base.model_copy(update={"passes": base.passes[2:3]})
    again = recipe.apply_overrides(copy, ["passes.sample.share=0.1"])
    assert [s.options for s in again.passes] == [{"count": 2, "share": 0.1}]
    assert again.data.calibration == tmp_path / "c.npz"
    twice = recipe.apply_overrides(changed("passes.sample.count=5"), ["passes.sample.share=0.1"])
    assert twice.passes[1].options == {"count": 5, "share": 0.1}


@pytest.mark.parametrize(
    ("assignment", "message", "hint"),
    [
        ("target", "expected KEY=VALUE", "target=arm"),
        ("=3", "expected KEY=VALUE", ""),
        ("passes..x=3", "expected KEY=VALUE", ""),
        ("traget=arm", "unknown key 'traget'", "did you mean 'target'?"),
        ("target=gpu", "'target' must be", ""),
        ("target.device.x=1", "'target.device' has no parts", ""),
        ("budget.sped=2", "unknown key 'budget.sped'", "did you mean 'speedup'?"),
        ("passes=[a]", "option by option", ""),
        ("passes.sampel.count=1", "the recipe has no pass 'sampel'", "did you mean 'sample'?"),
        ("passes.sample=3", "which option of sample?", ""),
        ("passes.sample.2.count=3", "sample is in the recipe once", ""),
        ("passes.9.count=3", "the recipe has 2 passes, not 9", ""),
        ("passes.0.count=3", "the recipe has 2 passes, not 0", ""),
        ("passes.sample.cuont=3", "unknown option 'cuont' of sample", "did you mean 'count'?"),
        ("passes.sample.count=many", "must be a whole number, not 'many'", ""),
        ("passes.sample.names=*head", "not valid YAML", "needs quotes"),
        ("passes.sample.names=[a", "not valid YAML", ""),
    ],
)
@pytest.mark.usefixtures("sample_pass")
def test_override_faults(assignment: str, message: str, hint: str) -> None:
    base = recipe.load({"name": "n", "description": "d", "passes": ["strip_metadata", "sample"]})
    with pytest.raises(UsageError) as caught:
        recipe.apply_overrides(base, ["name=x", assignment])
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.where == f"--set {assignment}"


SAMPLE_OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "count": st.integers(0, 9),
        "share": st.floats(allow_nan=False, allow_infinity=False),
        "mode": st.one_of(st.sampled_from(["all", "none"]), st.integers()),
        "names": st.lists(st.text()),
        "dims": st.dictionaries(st.text(), st.integers()),
    },
)


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(SAMPLE_OPTIONS, min_size=1, max_size=3), name=st.text(min_size=1))
def test_dump_is_read_back(steps: list[dict[str, Any]], name: str) -> None:
    if not name.strip():
        name = "1e-3"
    real = passes.get
    data = {"name": name, "description": "on", "passes": [{"sample": s} for s in steps]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "get", lambda n: Sample if n == "sample" else real(n))
        first = recipe.load(data)
        text = recipe.dump(first)
        again, errors = reader.read(located.parse(text, "dump"))
    assert not errors
    assert again is not None
    assert recipe.to_dict(again) == recipe.to_dict(first)
    assert again.passes == first.passes
    assert yaml.safe_load(text)["description"] == "on"


def test_to_dict_keeps_paths_as_written(tmp_path: Path) -> None:
    text = GOOD + "data: {calibration: c.npz, evaluation: {path: sub/t.npz}}\n"
    got = recipe.load(write(tmp_path, text))
    assert recipe.to_dict(got) == {
        "name": "n",
        "description": "d",
        "target": "cpu",
        "data": {"calibration": "c.npz", "evaluation": {"path": "sub/t.npz"}},
        "passes": ["strip_metadata"],
    }
    json.dumps(recipe.to_dict(got))
    assert str(tmp_path) not in recipe.dump(got)


def test_the_words_of_a_recipe_are_those_of_the_code() -> None:
    assert set(get_args(Device)) == set(target.DEVICES)
    assert set(get_args(Evaluation.model_fields["metric"].annotation)) == set(METRICS)
    assert set(get_args(Extension)) == {*machine._X86.values(), *machine._ARM.values()}


def test_check_against_a_model(tmp_path: Path) -> None:
    model = from_text(
        """<ir_version: 8, opset_import: ["": 9]>
        g (float[2,3] x) => (float[2,3] y) { y = Relu(x) }"""
    )
    path = write(
        tmp_path, HEAD + "passes:\n  - low_rank: {targets: [Rel]}\n  - low_rank: {ignore: [a]}\n"
    )
    report = recipe.check(path, model)
    assert [str(e) for e in report.errors] == [
        f"{path}:4:5: low_rank: the pattern 'Rel' matches no node of the model"
    ]
    assert report.errors[0].hint == "did you mean 'Relu'?"
    assert report.notes == (
        f"{path}:5:5: low_rank: the pattern 'a' matches no node of the model, "
        "unless an earlier pass makes one",
    )


def test_bad_patterns_are_found_without_a_model(tmp_path: Path) -> None:
    e = fault(tmp_path, HEAD + "passes:\n- low_rank: {ignore: ['re:(']}\n")
    assert e.message.startswith("bad regular expression '('")
    assert e.where == "r.yaml:4:23"


def test_starter_is_a_good_recipe(tmp_path: Path) -> None:
    file = recipe.write_starter(tmp_path / "mine.yaml")
    assert recipe.load(file).name == "mine"
    uncommented = starter_text("x.yaml").replace("  # - ", "  - ").replace("# data:", "data:")
    for key in (
        "  calibration",
        "  evaluation",
        "budget",
        "  accuracy_drop",
        "  speedup",
        "  size",
    ):
        uncommented = uncommented.replace(f"# {key}:", f"{key}:")
    got, errors = reader.read(located.parse(uncommented, "starter"))
    assert not errors
    assert got is not None
    assert got.budget is not None
    assert got.data.evaluation is not None


def test_starter_never_overwrites_unasked(tmp_path: Path) -> None:
    path = write(tmp_path, "mine")
    with pytest.raises(UsageError, match="the file exists"):
        recipe.write_starter(path)
    assert path.read_text() == "mine"
    recipe.write_starter(path, preset="lossless", force=True)
    assert path.read_text() == recipe.preset_text("lossless")
    with pytest.raises(RecipeError, match="no preset is called 'x'"):
        recipe.write_starter(tmp_path / "new.yaml", preset="x")
    with pytest.raises(OutputError):
        recipe.write_starter(tmp_path / "no" / "new.yaml")
    with pytest.raises(OutputError, match="folder"):
        recipe.write_starter(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["r.yaml"]


def test_command_line(tmp_path: Path) -> None:
    run = CliRunner().invoke
    shown = run(recipe_app, ["show", "lossless"])
    assert shown.stdout == recipe.preset_text("lossless")
    assert "lossless" in run(recipe_app, ["list"]).stdout
    listed = json.loads(run(recipe_app, ["list", "--json"]).stdout)
    assert listed["schema"] == 2
    assert {p["name"] for p in listed["presets"]} == set(recipe.preset_names())
    good = run(recipe_app, ["check", "lossless", "--json"])
    assert (good.exit_code, json.loads(good.stdout)["ok"]) == (0, True)
    bad = run(recipe_app, ["check", str(write(tmp_path, GOOD + "x: 1\ny: 2\n"))])
    assert bad.exit_code == 2
    assert ":4:1: unknown key 'x'" in bad.stdout
    assert ":5:1: unknown key 'y'" in bad.stdout
    assert json.loads(run(recipe_app, ["schema"]).stdout)["title"] == "effdl recipe"
    made = run(recipe_app, ["init", str(tmp_path / "i.yaml")])
    assert (made.exit_code, made.stdout.strip()) == (0, str(tmp_path / "i.yaml"))
    again = run(recipe_app, ["init", str(tmp_path / "i.yaml")])
    assert isinstance(again.exception, EffdlError)


def check_against(schema: dict[str, Any], value: Any, whole: dict[str, Any]) -> bool:
    """Whether ``value`` fits: the part of JSON Schema that the recipe's schema uses."""
    if "$ref" in schema:
        return check_against(whole["$defs"][schema["$ref"].rsplit("/", 1)[1]], value, whole)
    branches = schema.get("anyOf", schema.get("oneOf"))
    if branches and not any(check_against(b, value, whole) for b in branches):
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "integer": int,
        "number": (int, float),
        "null": type(None),
    }
    if "type" in schema:
        kind = kinds[schema["type"]]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            return False
    if "pattern" in schema and not re.search(schema["pattern"], value):
        return False
    if isinstance(value, dict):
        known = schema.get("properties", {})
        rest = schema.get("additionalProperties", True)
        if set(schema.get("required", [])) - set(value):
            return False
        for key, item in value.items():
            below = known.get(key, rest)
            if below is False or (
                isinstance(below, dict) and not check_against(below, item, whole)
            ):
                return False
        return schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", 999)
    if isinstance(value, list) and "items" in schema:
        return all(check_against(schema["items"], v, whole) for v in value)
    return True


def test_schema_takes_presets_and_refuses_faults() -> None:
    schema = recipe.schema()
    json.dumps(schema)
    assert schema["$schema"].endswith("2020-12/schema")
    for name in recipe.preset_names():
        assert check_against(schema, yaml.safe_load(recipe.preset_text(name)), schema), name
    good = {"name": "n", "description": "d", "passes": ["strip_metadata"]}
    assert check_against(schema, good, schema)
    far = {"device": "ssh", "host": "pi4", "python": "venv/bin/python", "provider": "cuda"}
    for place in ("ssh:me@pi4", "arm-emulated", "arm-emulated:n1", far):
        assert check_against(schema, good | {"target": place}, schema)
        assert recipe.load(good | {"target": place}).target == place
    for bad in (
        good | {"x": 1},
        good | {"target": "gpu"},
        good | {"target": "arm-emulated:m4"},
        good | {"passes": ["nope"]},
        good | {"passes": [{"strip_metadata": {"nope": 1}}]},
        good | {"passes": [{"strip_metadata": {"model_properties": 1}}]},
        good | {"passes": "strip_metadata"},
        {"name": "n", "passes": ["strip_metadata"]},
    ):
        assert not check_against(schema, bad, schema), bad


def test_schema_describes_every_option() -> None:
    schema = recipe.schema()
    for name in passes.names():
        entry = schema["$defs"][name]
        assert entry["additionalProperties"] is False
        assert set(entry.get("properties", {})) == set(passes.get(name).model_fields)
        for option, part in entry.get("properties", {}).items():
            assert part.get("description"), f"{name}.{option}"
    references = json.dumps(schema).split('"$ref": "#/$defs/')[1:]
    assert {r.split('"')[0] for r in references} <= set(schema["$defs"])


def test_show_shortens_long_text() -> None:
    assert explain.show(located.from_plain("x" * 100, "w")) == f"'{'x' * 57}...'"


PLAIN = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["low_rank", "strip_metadata", "arm", "re:(", "path"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["low_rank", "ignore", "energy", "path", "isa"]), inner, max_size=3
        ),
    ),
    max_leaves=6,
)
KEYS = ["name", "description", "target", "data", "budget", "objective", "passes", "other"]


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), PLAIN))
def test_any_data_is_a_recipe_or_a_fault(data: dict[str, Any]) -> None:
    """Nothing but RecipeError, and each fault has its place."""
    text = yaml.safe_dump(data, allow_unicode=True)
    got, errors = reader.read(located.parse(text, "r.yaml"))
    assert (got is None) == bool(errors)
    for error in errors:
        assert error.where.startswith("r.yaml:"), error
        assert error.message
        assert "\n" not in error.message


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab:-[]{}&*!|>%@`'\"#,? \n\t0.~<", max_size=30))
def test_any_text_is_values_or_a_fault(text: str) -> None:
    faults = []
    try:
        located.parse(text, "r.yaml")
    except RecipeError as e:
        faults.append(e)
    assert all(e.where.startswith("r.yaml") and "\n" not in e.message for e in faults)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="passe.tringlow_k=1[]{}: *", max_size=30))
def test_any_assignment_is_applied_or_a_fault(text: str) -> None:
    base = recipe.load({"name": "n", "description": "d", "passes": ["low_rank"]})
    for assignment in (text, f"passes.low_rank.{text}", f"target={text}", f"passes.1.ratio={text}"):
        try:
            where = f"--set {recipe.apply_overrides(base, [assignment]).passes[0].name}"
        except UsageError as e:
            where = e.where
        assert where.startswith("--set ")
