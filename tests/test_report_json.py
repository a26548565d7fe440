"""Run reports to JSON and back."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

import effdl
from effdl.errors import UsageError
from effdl.render.html import run_html
from effdl.render.markdown import run_markdown
from effdl.render.run import print_run
from effdl.report import SCHEMA, BenchReport, RunReport, from_json, to_json
from effdl.run_options import RunOptions
from tests.run_reports import EXAMPLES, bench, output_error, plain_run, rich_run, verified
from tests.support import SAMPLES


def through_text(report: object) -> object:
    return json.loads(json.dumps(to_json(report), allow_nan=False))


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_report_comes_back_as_it_was(name: str) -> None:
    report = EXAMPLES[name]()
    assert from_json(RunReport, through_text(report)) == report


def test_a_real_report_comes_back(tmp_path: Path) -> None:
    report = effdl.optimize(
        SAMPLES / "digits_mlp.onnx",
        "lossless",
        tmp_path / "o.onnx",
        options=RunOptions(bench_seconds=0.1),
    )
    data = through_text(report)
    assert through_text(from_json(RunReport, data)) == data


def test_other_kinds_of_reports_come_back() -> None:
    assert from_json(BenchReport, through_text(bench())) == bench()


def test_infinite_figures_come_back_as_infinite() -> None:
    worst = replace(output_error(), rel_l2=math.inf, sqnr_db=math.inf, top1=None)
    report = rich_run(verified=verified(worst))
    back = from_json(RunReport, through_text(report))
    assert back == report
    assert back.verified is not None
    assert back.verified.outputs[0].top1 is None


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
def test_a_figure_that_is_no_number_comes_back_as_it_was(value: float) -> None:
    worst = replace(output_error(), sqnr_db=value)
    report = replace(plain_run(), verified=verified(worst), bench=bench(), seconds=value)
    report = replace(report, passes=(replace(report.passes[0], error=value),))
    back = from_json(RunReport, through_text(report))
    assert back.verified is not None
    figures = (back.verified.outputs[0].sqnr_db, back.passes[0].error, back.seconds)
    assert all(isinstance(f, float) for f in figures)
    assert [repr(f) for f in figures] == [repr(value)] * 3


def test_a_broken_output_does_not_read_as_a_perfect_one() -> None:
    worst = replace(output_error(), rel_l2=math.inf, sqnr_db=-math.inf)
    data = through_text(rich_run(verified=verified(worst)))
    assert isinstance(data, dict)
    assert data["verified"]["outputs"][0]["sqnr_db"] == "-inf"
    assert data["verified"]["outputs"][0]["rel_l2"] is None
    text = run_html(from_json(RunReport, data))
    assert "-inf dB" in text


def test_numbers_that_are_none_in_free_data_are_null() -> None:
    scores = {"metric": "psnr", "before": math.nan, "after": 1.0, "ci": [-math.inf, math.inf]}
    data = through_text(rich_run(accuracy=scores))
    assert isinstance(data, dict)
    assert data["accuracy"] == {"metric": "psnr", "before": None, "after": 1.0, "ci": [None, None]}


@pytest.mark.parametrize(
    ("scores", "shown", "hidden"),
    [
        ({"before": 0.5, "after": math.nan}, "0.5000", "nan"),
        ({"before": math.nan, "after": math.nan}, "psnr", "nan"),
        ({"before": 0.5, "after": 0.25, "ci": (-math.inf, math.inf)}, "-0.2500", "None"),
    ],
)
def test_a_score_that_is_no_number_is_shown(
    scores: dict[str, object], shown: str, hidden: str, capsys: pytest.CaptureFixture[str]
) -> None:
    live = rich_run(accuracy={"metric": "psnr", "samples": 3, **scores})
    for report in (live, from_json(RunReport, through_text(live))):
        print_run(report)
        for text in (run_html(report), run_markdown(report), capsys.readouterr().out):
            assert shown in text
            assert not re.search(rf"\b{hidden}\b", text.split("psnr", 1)[1][:120])


def test_fields_of_later_versions_get_their_defaults_and_unknown_ones_are_left_out() -> None:
    data = to_json(plain_run())
    for late in ("gate", "won", "changes", "seed"):
        del data[late]
    data["invented"] = {"a": 1}
    back = from_json(RunReport, data)
    assert (back.gate, back.won, back.changes, back.seed) == ("off", True, (), None)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": SCHEMA - 1}, f"schema {SCHEMA - 1}, this effdl reads schema {SCHEMA}"),
        ({"schema": "x"}, "schema x"),
        ({"recipe": []}, "recipe should be an object, not []"),
        ({"seconds": "long"}, "seconds should be a number, not 'long'"),
        ({"seconds": True}, "seconds should be a number, not True"),
        ({"passes": {}}, "passes should be a list"),
        ({"passes": [{"name": "simplify"}]}, "passes[0].options is missing"),
        ({"target": None}, "target should be a text, not null"),
        ({"dry_run": 1}, "dry_run should be true or false, not 1"),
        ({"seed": 1.5}, "seed should be a whole number, not 1.5"),
    ],
)
def test_what_is_no_such_report_is_said_in_one_line(change: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError) as e:
        from_json(RunReport, to_json(rich_run()) | change, where="run.json")
    assert says in e.value.message
    assert str(e.value).startswith("run.json: ")
    assert e.value.hint
    assert "\n" not in str(e.value)


def test_an_interval_of_three_numbers_is_refused() -> None:
    data = to_json(rich_run())
    data["bench"]["models"][0]["ci"] = [1.0, 1.0, 1.0]
    with pytest.raises(UsageError, match=r"bench\.models\[0\]\.ci should be a list of 2"):
        from_json(RunReport, data)


@pytest.mark.parametrize("data", [[], {}, "text", None, 3])
def test_no_report_at_all(data: object) -> None:
    with pytest.raises(UsageError, match="no report of effdl"):
        from_json(RunReport, data)
