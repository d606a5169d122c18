"""bench.report: every requirement judged by hand-made records, and the page that shows them."""

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bench import cases, report
from bench.report import Bound
from bench.results import Book

OURS, FLASK, MOSEC = "ours", "Flask, ONNX Runtime", "Mosec, ONNX Runtime"
EAGER, FULL = "KServe, PyTorch", "Flask, ONNX Runtime, full decode"
NAMES = ["limit", OURS, FLASK, MOSEC, EAGER, FULL, "limit, int8", "ours, int8", "BentoML, ONNX Runtime"]


def book(path: Path) -> Book:
    machine = {"cpu": "AMD <EPYC>", "cpus": 2, "flags": "avx2", "memory_gb": 25, "system": "Linux", "python": "3.11"}
    identity = {
        "commit": "abc",
        "machine": machine,
        "contenders": [{"name": name} for name in NAMES],
        "versions": {"flask": "flask==3.1.3"},
        "bundles": {"dog-breeds": "b7729dab5e29"},
        "photos": {"small": ["533x400, 30 kB"]},
    }
    return Book(path / "results.jsonl", identity)


def figures(speed: float, cpu: dict[str, float], p50: float = 20.0, **more: Any) -> dict[str, Any]:
    plain = {"n": 100, "refused": 0, "failed": {}, "refused_p99_ms": None, "generator_ms": 0.1, "elsewhere": 0.07}
    return {"images_per_s": speed, "cpu_ms": cpu, "p50_ms": p50, "p99_ms": 3 * p50, **plain, **more}


@pytest.fixture
def measured(tmp_path: Path) -> Book:
    made = book(tmp_path)
    for number, factor in ((1, 1.0), (2, 0.9), (3, 1.1)):
        for name, speed, cpu in (
            ("limit", 101, {"model": 14.0, "decode, resize": 5.0}),
            (OURS, 80, {"worker": 14.0, "gateway": 7.0, "JVM": 3.0}),
            (FLASK, 100, {"worker": 20.0}),
            (MOSEC, 70, {"worker": 20.0, "HTTP": 2.0}),
            (EAGER, 48, {"worker": 38.0}),
            ("ours, int8", 130, {"worker": 8.0, "gateway": 5.0, "JVM": 2.0}),
            ("limit, int8", 150, {"model": 8.0}),
        ):
            made.add(name, number, cases.MANY.name, figures(speed * factor, cpu))
            made.add(name, number, cases.ONE.name, figures(30, cpu, p50=25.0 if name == OURS else 17.0))
        parts = {"model server": 5.0 + factor, "gateway": 1.5}
        made.add(OURS, number, "start", {"start_s": 7.0, "parts_s": parts, "pss_mb": {"worker": 700.0}})
    made.add(OURS, 1, cases.BIG.name, figures(30, {"worker": 30.0}))
    made.add(FULL, 1, cases.BIG.name, figures(10, {"worker": 200.0}))
    made.add(OURS, 1, cases.WHOLE.name, figures(80, {"worker": 14.0}, p50=100.0))
    overload: dict[str, Any] = {
        "refused": 5000,
        "refused_p99_ms": 12.0,
        "recovery_s": 3.0,
        "failed": {"connection lost": 7},
        "pss_before_mb": {"worker": 700.0, "JVM": 300.0},
        "pss_after_mb": {"worker": 707.0, "JVM": 330.0},
    }
    made.add(OURS, 1, cases.TOO_MUCH.name, figures(64, {"worker": 14.0}, p50=250.0, **overload))
    made.add(
        FLASK, 1, cases.TOO_MUCH.name, figures(60, {"worker": 14.0}, p50=3000.0, **overload | {"recovery_s": None})
    )
    series = [{"worker": mb} for mb in (600.0, 690.0, 700.0, 701.0, 702.0, 703.0)]
    made.add(OURS, 1, cases.SOAK.name, figures(64, {"worker": 14.0}, pss_series_mb=series))
    made.add("BentoML, ONNX Runtime", 0, "start", {"error": "pip could not install <it>"})
    return made


def test_every_requirement_is_judged(measured: Book) -> None:
    found = [(bound.found, bound.met) for bound in report.bounds(measured)]
    assert found == [
        ("0.80 (80.0 against 100.0)", False),
        ("1.20 (24.0 against 20.0)", False),
        ("1.14 (80.0 against 70.0)", True),
        ("1.67 (80.0 against 48.0)", False),
        ("1.30 (130.0 against 100.0)", True),
        ("0.75 (15.0 against 20.0)", True),
        ("0.87 (130.0 against 150.0)", True),
        ("8.0", False),
        ("3.00 (30.0 against 10.0)", True),
        ("0.80 (64.0 against 80.0)", True),
        ("2.50 (750.0 against 300.0)", False),
        ("12.0", True),
        ("10.0", False),  # the JVM
        ("3.0", True),
        ("0.0", True),
        ("0.4", True),  # 700 to 703 MB
        ("6.0", True),
        ("1.5", True),
    ]
    assert report.headline(report.bounds(measured)) == "12 of 18 requirements met"


def test_what_was_not_measured_is_neither_met_nor_missed(tmp_path: Path) -> None:
    empty = book(tmp_path)
    assert {bound.met for bound in report.bounds(empty)} == {None}
    assert report.headline(report.bounds(empty)) == "Nothing is measured yet"
    assert "Nothing is measured yet" in report.page(empty)
    assert report.headline([Bound("a", "", True), Bound("b", "", False), Bound("c", "", None)]) == (
        "1 of 2 requirements met; 1 not measured"
    )


def test_weak_points_come_before_strong_ones(measured: Book) -> None:
    compared = report.comparisons(measured)
    worst, best = compared[0], compared[-1]
    assert (worst["measure"].figure, worst["name"]) == ("p50_ms", FLASK)
    assert worst["times"] == pytest.approx(17 / 25)
    assert (best["measure"].case, best["name"]) == (cases.TOO_MUCH, FLASK)
    speed = {row["name"]: row for row in compared if row["measure"] is report.MEASURES[0]}
    assert speed[FLASK]["times"] == pytest.approx(0.8)
    assert speed[FLASK]["apart"]  # 72 to 88, 90 to 110
    assert not speed[MOSEC]["apart"]  # 63 to 77


class Text(HTMLParser):
    """The text of each section by its id, and every address."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self.addresses: list[str] = []
        self.charts: list[str] = []
        self._at = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "section":
            self._at = values.get("id") or ""
        if tag == "svg" and values.get("aria-label"):
            self.charts.append(values["aria-label"] or "")
        self.addresses += [values[key] or "" for key in ("src", "href") if key in values]

    def handle_data(self, data: str) -> None:
        self.sections[self._at] = self.sections.get(self._at, "") + " " + " ".join(data.split())


def test_the_page_shows_what_was_recorded(measured: Book) -> None:
    html = report.page(measured)
    page = Text(html)
    assert list(page.sections)[1:4] == ["required", "behind", "ahead"]
    assert page.sections["required"].count("not met") == 6
    assert page.sections["required"].index("not met") < page.sections["required"].index(" met ")
    assert FLASK in page.sections["behind"]
    assert EAGER in page.sections["ahead"]
    assert "connection lost: 7" in page.sections["overload"]
    assert "not in 30 s" in page.sections["overload"]
    assert "pip could not install <it>" in page.sections["missing"]
    assert "AMD <EPYC>" in html.replace("&lt;", "<").replace("&gt;", ">")
    assert "<EPYC>" not in html
    assert page.addresses == ["data:,"]  # no other host
    assert "CPU an image, all processes, 32 clients" in page.charts
    assert re.search(r"80\.0 \(72\.0 to 88\.0, n 3\)", html)
    assert "worker: 14.0 ms" in html


def test_the_picture_for_a_readme_has_the_first_figures_within_its_frame(measured: Book) -> None:
    svg = ET.fromstring(report.picture(measured))
    shown = ["".join(text.itertext()) for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in shown if text in {m.title for m in report.MEASURES}] == [
        "Images a second, 32 clients",
        "CPU an image, all processes, 32 clients",
    ]
    assert shown.count(OURS) == shown.count(FLASK) == 2
    assert "80.0 (72.0 to 88.0, n 3)" in shown
    assert {"worker", "gateway", "JVM"} <= set(shown)
    assert any("AMD <EPYC>" in text for text in shown)
    width, height = map(float, svg.attrib["viewBox"].split()[2:])
    for rect in svg.iter("{http://www.w3.org/2000/svg}rect"):
        assert 0 <= float(rect.attrib["x"]) < float(rect.attrib["x"]) + float(rect.attrib["width"]) <= width
        assert float(rect.attrib["y"]) < height


def test_the_table_for_the_terminal(measured: Book) -> None:
    text = report.text(measured)
    assert "AMD <EPYC>, 2 CPUs" in text
    assert "others used up to 7% of the machine meanwhile" in text
    [ours] = [line for line in text.splitlines() if line.startswith("ours  ")]
    assert "80.0 (72.0 to 88.0, n 3)" in ours
    assert "worker 14.0, gateway 7.0, JVM 3.0" in ours
    assert "BentoML, ONNX Runtime              not measured: pip could not install <it>" in text
    assert text.count("NOT MET") == 6


def test_all_files_are_written(measured: Book, tmp_path: Path) -> None:
    report.write(measured, tmp_path)
    assert (tmp_path / "report.html").read_text() == report.page(measured)
    assert (tmp_path / "speed.svg").read_text() == report.picture(measured)
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["contenders"][OURS]["Images a second, 32 clients"] == {"median": 80, "low": 72.0, "high": 88.0, "n": 3}
    assert len(told["records"]) == len(measured.records)
