"""The report page in a real browser, opened from disk."""

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drawn import CLASSES, catalogue, manifest, predictions
from playwright.sync_api import expect, sync_playwright

from training.data import Record
from training.evaluate import calibrate, judge
from training.metrics import Predictions, summarise
from training.report import _percent, headline, write

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "Grüße & Küsse",
    "{{ 7 * 7 }}",
    "a very long name of a class that goes on and on without any end",
    "靴",
    "' onmouseover='alert(3)",
    "</style>\u202e",
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report on 320 drawn pictures, a few of them with a wrong label."""
    prefix = tmp_path_factory.mktemp("report") / "colours"
    drawn = catalogue(40, 4, mislabelled=1)
    drawn = replace(
        drawn,
        unreadable=(("red/broken.jpg", "the JPEG picture is cut off or damaged: send the whole file"),),
        copies=(("blue/001.jpg", "blue/041.jpg", "near copy"),),
        records=(*drawn.records, Record("teal/900.jpg", 5, "validation", "0" * 64, "copy of teal/041.jpg in train")),
    )
    found = predictions(drawn)
    cross_validation = {"count": 3, "accuracy": [0.9, 0.88, 0.92], "mean": 0.9, "deviation": 0.02}
    made = manifest(calibrate(found, 0.97))
    judge(prefix, found, drawn, made, requirements=["accuracy>=0.85"], cross_validation=cross_validation)
    return Path(f"{prefix}.report.html")


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("neither chromium nor google-chrome is installed")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    expect.set_options(timeout=3_000)
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=path, args=arguments) as browser:
        yield browser


@pytest.fixture
def opened(browser):
    """Opens a file as a page. Fails the test on console errors (CSP's too), dialogues and any other request."""
    faults, contexts = [], []

    def open(file, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("dialog", lambda dialog: (faults.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda r: faults.append(r.url) if r.url != file.as_uri() and r.url[:5] != "data:" else None)
        page.goto(file.as_uri())
        return page

    yield open
    for context in contexts:
        context.close()
    assert not faults


def test_a_reader_sees_what_matters(opened, report, tmp_path):
    page = opened(report, viewport={"width": 1000, "height": 1250})
    told = json.loads(report.with_suffix(".json").read_text())
    share = round(100 * told["accuracy"])
    expect(page.get_by_role("heading", level=1)).to_have_text(f"About {share} of 100 pictures are named right")
    expect(page.get_by_text("The gate is passed.")).to_be_visible()
    figures = page.get_by_role("list", name="Key figures").get_by_role("listitem")
    expect(figures).to_have_count(6)
    expect(figures.first).to_contain_text(f"{told['accuracy']:.1%}")
    page.screenshot(path=os.environ.get("SCREENSHOT_REPORT") or tmp_path / "report.png")

    wall = page.get_by_role("figure")
    expect(wall).to_have_count(24)
    assert page.evaluate("[...document.images].every((image) => image.naturalWidth === 168)")
    first = told["mistakes"][0]
    expect(wall.first).to_contain_text(first["answer"])
    expect(wall.first).to_contain_text(f"is {first['label']}")
    expect(wall.first).to_contain_text(first["key"])

    for name in ("Confusion matrix", "ROC curves", "Precision against recall", "Precision and coverage against"):
        expect(page.get_by_role("img", name=name)).to_be_visible()
    expect(page.get_by_role("img", name="How often it is right")).to_have_count(2)
    numbers = [int(text) for text in page.locator(".map text.n").all_text_contents()]
    assert numbers == [n for row in told["confusion"] for n in row if n]
    expect(page.get_by_text("1 could not be read")).to_be_visible()
    page.get_by_text("1 could not be read").click()
    expect(page.get_by_text("red/broken.jpg")).to_be_visible()
    expect(page.get_by_text("1 are kept out of evaluation")).to_be_visible()
    expect(page.get_by_text("sha256 " + "d" * 64)).to_be_visible()
    expect(page.get_by_role("term").filter(has_text="data digest")).to_be_visible()
    expect(page.get_by_text("of the data it was trained with")).to_be_visible()


def test_it_needs_no_script(opened, report):
    page = opened(report, java_script_enabled=False)
    expect(page.get_by_role("figure")).to_have_count(24)
    expect(page.locator("#classes tbody tr")).to_have_count(8)
    assert page.locator("#classes tbody tr td:first-child").first.text_content() == worst_class(report)


def worst_class(report):
    rows = json.loads(report.with_suffix(".json").read_text())["per_class"]
    return min(rows, key=lambda row: (row["recall"], row["name"]))["name"]


def test_the_table_can_be_sorted(opened, report):
    page = opened(report)
    names = page.locator("#classes tbody tr td:first-child")
    heads = page.locator("#classes").get_by_role("columnheader")
    heads.filter(has_text="Class").click()
    assert names.all_text_contents() == list(CLASSES)
    found = heads.filter(has_text="Found")
    found.press("Enter")
    assert names.first.text_content() == worst_class(report)
    found.press("Enter")
    assert names.last.text_content() == worst_class(report)


@pytest.mark.parametrize("width", [390, 320])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_cut_off(opened, report, width, scheme):
    page = opened(report, viewport={"width": width, "height": 844}, is_mobile=True, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".map").evaluate("({ parentNode: box }) => box.scrollWidth <= box.clientWidth")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(245, 241, 234)", "dark": "rgb(23, 20, 18)"}[scheme]


def test_names_show_as_themselves(opened, tmp_path):
    drawn = catalogue(4, 0, mislabelled=8)
    keys = {record.key: f"{HOSTILE[record.label]}/{record.key[-7:]}\udcff" for record in drawn.records}
    drawn = replace(
        drawn,
        address="gs://b/<i>",
        classes=HOSTILE,
        records=tuple(replace(record, key=keys[record.key]) for record in drawn.records),
        content={keys[key]: content for key, content in drawn.content.items()},
        unreadable=(("<b>x</b>.jpg", "</script><script>alert(4)</script>"),),
    )
    found = replace(predictions(catalogue(4, 0, mislabelled=8)), records=drawn.records, classes=HOSTILE)
    judge(tmp_path / "x", found, drawn, manifest(calibrate(found), HOSTILE), requirements=[f"recall[{HOSTILE[0]}]>=1"])
    page = opened(tmp_path / "x.report.html", viewport={"width": 390, "height": 844}, is_mobile=True)
    shown = page.locator("#classes tbody tr td:first-child").all_text_contents()
    assert sorted(shown) == sorted(HOSTILE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("document.scripts.length") == 1
    expect(page.get_by_text(f"Required: recall[{HOSTILE[0]}]>=1 (it is ")).to_be_visible()
    assert json.loads((tmp_path / "x.report.json").read_text())["classes"] == list(HOSTILE)


@pytest.mark.parametrize("classes", [2, 30, 130])
def test_few_and_many_classes(opened, tmp_path, classes):
    random = np.random.default_rng(0)
    labels = np.arange(2 * classes) % classes
    logits = random.normal(0, 1, (len(labels), classes)).astype("f4")
    logits[np.arange(len(labels)), labels] += 3
    names = tuple(f"breed number {i}" for i in range(classes))
    drawn = catalogue(1, 0)
    records = tuple(Record(f"{i}.jpg", int(label), "test", "0" * 64) for i, label in enumerate(labels))
    drawn = replace(
        drawn, classes=names, records=records, content={r.key: drawn.content["red/000.jpg"] for r in records}
    )
    found = Predictions(records, labels, logits, names)
    judge(tmp_path / "x", found, drawn, manifest(calibrate(found), names))
    page = opened(tmp_path / "x.report.html", viewport={"width": 390, "height": 844}, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    expect(page.locator("#classes tbody tr")).to_have_count(classes)
    expect(page.get_by_text("Of 130 classes, the 60 with most mistakes")).to_have_count(int(classes == 130))
    cells = Counter(page.locator(".map rect").evaluate_all("(all) => all.map((rect) => rect.getAttribute('class'))"))
    assert cells["hit"] <= (60 if classes == 130 else classes)
    assert Path(tmp_path / "x.report.html").stat().st_size < 1_000_000


def test_pictures_removed_since_do_not_lose_the_report(opened, tmp_path):
    drawn = catalogue(8, 0, mislabelled=8)
    found = predictions(drawn)

    class Gone(type(drawn)):
        def read(self, record):
            raise FileNotFoundError(record.key)

    write(tmp_path / "x", summarise(found, 1, 0), found, Gone(**vars(drawn)), manifest(calibrate(found)))
    page = opened(tmp_path / "x.report.html")
    expect(page.get_by_text("can no longer be read").first).to_be_visible()
    expect(page.get_by_role("figure").get_by_role("img")).to_have_count(0)


def test_a_split_of_one_class_and_no_mistake(opened, tmp_path):
    drawn = catalogue(3, 0)
    red = replace(drawn, records=tuple(record for record in drawn.records if record.key.startswith("red")))
    found = predictions(red)
    assert found.right.all()
    write(tmp_path / "x", summarise(found, 1, 0.5), found, red, manifest(calibrate(found)))
    page = opened(tmp_path / "x.report.html")
    expect(page.get_by_role("heading", level=1)).to_have_text("All 3 pictures are named right")
    expect(page.get_by_text("7 of 8 classes have no picture here")).to_be_visible()
    expect(page.get_by_text("No picture is named wrong.")).to_be_visible()
    expect(page.get_by_role("img", name="ROC curves")).to_have_count(0)


@pytest.mark.parametrize(
    ("right", "of", "sentence"),
    [
        (91, 100, "91 of 100 pictures are named right"),
        (0, 7, "0 of 7 pictures are named right"),
        (7, 7, "All 7 pictures are named right"),
        (311, 341, "About 91 of 100 pictures are named right"),
        (9_990, 10_000, "About 999 of 1000 pictures are named right"),
        (99_999, 100_000, "99.9990% of the pictures are named right"),
        (2, 1_000, "About 2 of 1000 pictures are named right"),
    ],
)
def test_headline(right, of, sentence):
    assert headline({"accuracy": right / of, "pictures": of}) == sentence


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.9996, 1, "99.9%"),
        (1.0, 1, "100.0%"),
        (0.996, 0, "99%"),
        (0, 0, "0%"),
        (0.001, 0, "under 1%"),
        (0.5, 0, "50%"),
    ],
)
def test_percentages_do_not_round_to_all_or_nothing(value, digits, text):
    assert _percent(value, digits) == text
