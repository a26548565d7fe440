"""The HTML report: well formed, self-contained, readable, and its numbers are the report's."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from effdl.render import svg
from effdl.render.html import run_html
from effdl.render.markup import Markup, tag, text
from effdl.render.numbers import milliseconds, size
from effdl.render.page import DARK, LIGHT
from effdl.render.svg import Dot, Pair, Row
from effdl.report import RunReport
from tests.run_reports import (
    AT_FAULT,
    EVIL,
    EXAMPLES,
    PASSES,
    dry_run,
    evil_run,
    gate,
    lost_run,
    plain_run,
    rich_run,
    step,
    unverified_run,
)
from tests.support import SAMPLES

VOID = {"meta", "br", "hr"}
LOADS = {"src", "href", "srcset", "action", "data", "poster", "formaction", "xlink:href"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Strict(HTMLParser):
    """Fails on a tag that is not closed in order, a repeated id, and anything from outside."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.refers: list[str] = []
        self.words: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(name)
        names = [k for k, _ in attrs]
        assert len(names) == len(set(names)), f"<{name}> has an attribute twice"
        for key, value in attrs:
            assert not key.startswith("on"), f"{key} on <{name}>"
            assert key not in LOADS, f"<{name} {key}={value}> comes from outside"
            if key == "id":
                self.ids.append(value or "")
            if key == "aria-labelledby":
                self.refers += (value or "").split()
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, f"<{name}/> outside of SVG closes nothing"
        self.handle_starttag(name, attrs)
        self.open.pop()

    def handle_endtag(self, name: str) -> None:
        assert self.open, f"</{name}> closes nothing"
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def parsed(document: str) -> Strict:
    parser = Strict()
    parser.feed(document)
    parser.close()
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    assert set(parser.refers) <= set(parser.ids)
    return parser


def words(report: RunReport) -> str:
    return " ".join("".join(parsed(run_html(report)).words).replace("\xa0", " ").split())


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_page_is_well_formed_and_needs_nothing_from_outside(name: str) -> None:
    document = run_html(EXAMPLES[name]())
    parser = parsed(document)
    assert document.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(parser.tags)
    style = re.findall("<style>(.*?)</style>", document, re.DOTALL)
    assert len(style) == 1
    assert "url(" not in style[0]
    assert "@import" not in style[0]
    assert style[0].count("{") == style[0].count("}")
    assert parser.tags.count("h1") == 1
    assert len(document) < 100_000


@pytest.mark.parametrize("name", EXAMPLES)
def test_charts_are_valid_xml_with_title_and_description(name: str) -> None:
    found = re.findall(r"<svg.*?</svg>", run_html(EXAMPLES[name]()), re.DOTALL)
    for chart in found:
        root = ET.fromstring(chart)
        if root.get("role") == "img":
            assert root.findtext("title")
            assert root.findtext("desc")
        for element in root.iter():
            for key in ("x", "x1", "x2", "cx", "width"):
                place = element.get(key, "")
                if place.endswith("%"):
                    assert 0 <= float(place[:-1]) <= 100.0
    assert found or name == "dry"


def test_every_step_is_there_kept_and_dropped_with_its_reason() -> None:
    said = words(rich_run())
    for p in PASSES:
        assert p.name in said
        if p.gate is not None and p.gate.reason:
            assert p.gate.reason in said
    assert "4 kept, 2 dropped, 1 rolled back, 1 with nothing to do, 1 not run" in said


def test_the_numbers_are_those_of_the_report() -> None:
    report = rich_run()
    said = words(report)
    assert report.bench is not None
    for m in report.bench.models:
        assert milliseconds(m.latency.median) in said
        assert milliseconds(m.latency.p99) in said
        assert size(m.peak_bytes) in said
    for stats in (report.before, report.after):
        assert size(stats.file_bytes) in said
        assert size(stats.zstd_bytes) in said
        assert stats.sha256 in said
    for p in report.passes:
        if p.gate is None:
            continue
        assert p.gate.ratio is not None
        assert p.gate.ci is not None
        assert p.gate.latency_ms is not None
        low, high = p.gate.ci
        assert f"{p.gate.ratio:.2f}× [{low:.2f}, {high:.2f}]" in said
        assert milliseconds(p.gate.latency_ms) in said
        assert size(p.gate.file_bytes) in said
        assert f"{p.gate.score:.4f}" in said
        assert f"{p.gate.fidelity:.1e}" in said
        assert p.error is not None
        assert f"{p.error:.1e}" in said
    for c in (*report.changes, *AT_FAULT):
        assert f"{c.before_ms:.3g} → {c.after_ms:.3g} ms" in said
    assert "0.4129" in said
    assert "0.4099" in said
    assert "-0.0030 [-0.0064, +0.0004], no measurable difference on 500 samples" in said
    assert "Conv (now QLinearConv)" in said
    assert "seed" in said
    assert "AMD EPYC 9654" in said
    assert report.warnings[0] in said


def test_bars_are_as_long_as_the_times() -> None:
    report = rich_run()
    charts = re.findall(r"<svg.*?</svg>", run_html(report), re.DOTALL)
    chart = next(ET.fromstring(c) for c in charts if "latency-title" in c)
    bars = [float(r.get("width", "")[:-1]) for r in chart.iter("rect")]
    assert report.bench is not None
    first, last = (m.latency.median for m in report.bench.models)
    steps = [p.gate.latency_ms for p in report.passes if p.gate is not None]
    wanted = [first, *(t for t in steps if t is not None), last]
    assert [b / bars[0] for b in bars] == pytest.approx([t / first for t in wanted], rel=1e-3)


def test_intervals_stand_around_the_end_of_their_bar() -> None:
    rows = [Row("a", amount=10.0, low=9.0, high=12.0, mark=20.0)]
    chart = ET.fromstring(svg.bars("n", "t", "d", rows, str))
    lines = [e for e in chart.iter("line") if e.get("class") == "interval"]
    ends = sorted({float(e.get(k, "")[:-1]) for e in lines for k in ("x1", "x2")})
    bar = float(next(iter(chart.iter("rect"))).get("width", "")[:-1])
    assert [e / bar for e in ends] == pytest.approx([0.9, 1.2], rel=1e-3)
    mark = next(e for e in chart.iter("line") if e.get("class") == "mark")
    assert float(mark.get("x1", "")[:-1]) / bar == pytest.approx(2.0, rel=1e-3)


def test_the_log_axis_keeps_the_order_and_puts_zero_at_the_left() -> None:
    values = [0.0, 1e-9, 3e-7, 2e-3, 0.5, 7.0]
    chart = ET.fromstring(svg.dots("n", "t", "d", [Dot("a", step=v) for v in values]))
    places = [float(c.get("cx", "")[:-1]) for c in chart.iter("circle")]
    assert places == sorted(places)
    assert len(set(places)) == len(values)


@pytest.mark.parametrize("most", [1e-6, 0.03, 1.0, 7.77, 10.0, 999.0, 123456.0])
def test_an_axis_has_a_few_round_ticks_and_holds_everything(most: float) -> None:
    chart = ET.fromstring(
        svg.pairs("n", "t", "d", [Pair("a", "", "", most, most / 2)], "{:g}".format)
    )
    ticks = [float(t.text or "") for t in chart.iter("text") if t.get("class") == "tick"]
    assert 3 <= len(ticks) <= 6
    assert ticks[0] == 0
    assert ticks[-1] <= most * 1.01
    assert float(next(iter(chart.iter("rect"))).get("width", "")[:-1]) > 95


def test_charts_of_nothing_and_of_nothing_finite_can_be_drawn() -> None:
    assert ET.fromstring(svg.bars("n", "t", "d", [], str)) is not None
    assert ET.fromstring(svg.bars("n", "t", "d", [Row("a", amount=0.0)], str)) is not None
    assert ET.fromstring(svg.dots("n", "t", "d", [Dot("a", step=float("inf"))])) is not None


def test_hostile_names_stay_text() -> None:
    document = run_html(evil_run())
    parser = parsed(document)
    assert "script" not in parser.tags
    assert "<script" not in document
    assert "\x00" not in document
    shown = html.escape(EVIL.replace("\x00", "\ufffd"), quote=True)
    assert shown in document


def test_text_is_escaped_once_and_markup_is_left_alone() -> None:
    assert text("<a&\"'>") == "&lt;a&amp;&quot;&#x27;&gt;"
    assert text(text("<")) == "&lt;"
    assert tag("p", "a<b", tag("b", "x"), data_label='q"') == (
        '<p data-label="q&quot;">a&lt;b<b>x</b></p>'
    )
    assert tag("br") == "<br>"
    assert isinstance(tag("p", None), Markup)
    assert text("a\u202eb\x07\ud800") == "a\ufffdb\ufffd\ufffd"


def test_a_run_that_won_nothing_says_so_first_and_calls_no_step_kept() -> None:
    said = words(lost_run())
    assert "Nothing helped: the output is the input, unchanged" in said
    assert "0 of 6 kept" in said
    assert "5 dropped, 1 with nothing to do" in said
    assert "taken back, as the result did not win" in said
    assert "the best that was found is no faster" in said
    assert "0.84×" in said
    assert "not verified" not in said


def test_what_was_not_measured_is_said_and_not_drawn() -> None:
    said = words(plain_run())
    assert "Speed not measured, 34% smaller, equal outputs" in said
    assert "not measured: switched off" in said
    assert "latency-title" not in run_html(plain_run())
    assert "not verified: no kernel for MyOp" in words(unverified_run())


def test_without_a_gate_only_input_and_output_are_drawn() -> None:
    report = rich_run(passes=PASSES[:3], gate="off")
    assert "the steps were not measured one by one" in words(report)
    chart = next(
        c for c in re.findall(r"<svg.*?</svg>", run_html(report), re.DOTALL) if "latency" in c
    )
    assert len(list(ET.fromstring(chart).iter("rect"))) == 2


def test_a_dry_run_promises_no_figures() -> None:
    said = words(dry_run())
    assert "Dry run: 1 of 3 passes would change the model" in said
    assert "would make 12 changes" in said
    assert "Identity_0" in said
    assert "Latency" not in said
    assert "kept" not in said.replace("kept or dropped", "")


def test_long_options_are_cut_off() -> None:
    said = words(rich_run())
    assert "macs: 0.7, ignore: ['/head/conv0'" in said
    assert "/head/conv29" in said  # in the recipe
    assert said.count("/head/conv29") == 1


def test_nodes_at_fault_are_named() -> None:
    blamed = gate(
        0.9, 0.88, 0.92, 5.0, kept=False, reason="slower", changes=AT_FAULT, culprits=("/a", "/b")
    )
    said = words(rich_run(passes=(step("quantize_static", "dropped", gate=blamed),)))
    assert "Nodes at fault: /a, /b." in said
    once = replace(blamed, reason="slower; most arises at Conv /a")
    said = words(rich_run(passes=(step("quantize_static", "dropped", gate=once),)))
    assert "at fault" not in said


@pytest.mark.parametrize(
    ("verdict", "says"),
    [
        ("same", "Same speed"),
        ("noisy", "Speed too noisy to say"),
        ("slower", "Slower (1.43× the speed)"),
    ],
)
def test_the_headline_follows_the_verdict(verdict: str, says: str) -> None:
    report = rich_run()
    assert report.bench is not None
    models = (report.bench.models[0], replace(report.bench.models[1], verdict=verdict))
    assert says in words(replace(report, bench=replace(report.bench, models=models)))


def luminance(colour: str) -> float:
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize(("name", "least"), [("ink", 12), ("muted", 4.5), ("accent", 4.5)])
def test_text_has_contrast(colours: dict[str, str], name: str, least: float) -> None:
    """WCAG 2.2, 1.4.3: 4.5 to 1 for text."""
    one, other = sorted((luminance(colours[name]), luminance(colours["bg"])))
    assert (other + 0.05) / (one + 0.05) >= least


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("name", ["rich", "evil", "dry"])
def test_nothing_is_wider_than_a_phone(name: str, tmp_path: Path) -> None:
    inner = html.escape(run_html(EXAMPLES[name]()), quote=True)
    script = (
        "onload=()=>{const d=document.querySelector('iframe').contentDocument.documentElement;"
        "document.title='WIDTH '+d.scrollWidth+' HEIGHT '+d.scrollHeight}"
    )
    page = tmp_path / "frame.html"
    page.write_text(
        f'<iframe srcdoc="{inner}" style="width:390px;height:800px;border:0"></iframe>'
        f"<script>{script}</script>",
        encoding="utf-8",
    )
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [*command, profile, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = re.search(r"WIDTH (\d+) HEIGHT (\d+)", done.stdout)
    assert found is not None
    assert int(found[1]) <= 390
    assert int(found[2]) > 1000


def test_report_files_by_their_suffix(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from effdl.cli.app import app

    names = ["r.json", "r.md", "r.html"]
    goals = [part for n in names for part in ("--report", str(tmp_path / n))]
    model = str(SAMPLES / "digits_mlp.onnx")
    arguments = ["optimize", model, "-o", str(tmp_path / "o.onnx"), "--bench-seconds", "0", *goals]
    assert CliRunner().invoke(app, [*arguments, "-q"], catch_exceptions=False).exit_code == 0
    parsed((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert (tmp_path / "r.md").read_text(encoding="utf-8").startswith("### ")
    made = [str(tmp_path / f"again.{s}") for s in ("html", "md", "json")]
    again = ["report", str(tmp_path / "r.json"), *(p for m in made for p in ("-o", m))]
    assert CliRunner().invoke(app, again, catch_exceptions=False).exit_code == 0
    for suffix in ("html", "md", "json"):
        assert (tmp_path / f"again.{suffix}").read_bytes() == (
            tmp_path / f"r.{suffix}"
        ).read_bytes()
    assert json.loads((tmp_path / "r.json").read_text())["schema"] == 2
