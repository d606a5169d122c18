"""bench.results: a run that was cut off goes on, another one begins anew."""

from pathlib import Path

import pytest

from bench.figures import Spread
from bench.results import Book

IDENTITY = {"commit": "abc", "contenders": [{"name": "ours"}, {"name": "Mosec"}]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


def test_a_run_goes_on_where_it_was_cut_off(path: Path) -> None:
    first = Book(path, IDENTITY)
    first.add("ours", 1, "32 clients", {"images_per_s": 80.0})
    first.add("ours", 2, "32 clients", {"error": "ended by itself"})
    with path.open("a") as file:
        file.write('{"run": "' + first.run + '", "contender": "ours", "rou')  # the power went
    again = Book(path, IDENTITY)
    assert again.run == first.run
    assert again.continued
    assert again.has("ours", 1, "32 clients")
    assert not again.has("ours", 2, "32 clients")  # what failed is tried again
    assert not again.has("Mosec", 1, "32 clients")
    again.add("ours", 2, "32 clients", {"images_per_s": 100.0})
    third = Book(path, IDENTITY)
    assert third.spread("ours", "32 clients", "images_per_s") == Spread(90.0, 80.0, 100.0, 2)
    assert third.error("ours") == ""


def test_another_commit_or_a_finished_run_is_another_run(path: Path) -> None:
    first = Book(path, IDENTITY)
    first.add("ours", 1, "32 clients", {"images_per_s": 80.0})
    other = Book(path, IDENTITY | {"commit": "def"})
    assert other.run != first.run
    assert not other.has("ours", 1, "32 clients")
    other.add("ours", 1, "32 clients", {"images_per_s": 90.0})
    other.finish()
    assert not Book(path, IDENTITY | {"commit": "def"}).continued
    assert not Book(path, IDENTITY).continued  # another one came in between


def test_figures_by_process_are_added_up_over_the_rounds(path: Path) -> None:
    book = Book(path, IDENTITY)
    book.add("ours", 1, "32 clients", {"cpu_ms": {"worker": 14.0, "gateway": 6.0}})
    book.add("ours", 2, "32 clients", {"cpu_ms": {"worker": 15.0, "gateway": 9.0}})
    book.add("ours", 3, "32 clients", {"cpu_ms": None})
    assert book.total("ours", "32 clients", "cpu_ms") == Spread(22.0, 20.0, 24.0, 2)
    assert book.median_total("Mosec", "32 clients", "cpu_ms") is None


def test_why_a_contender_is_missing(path: Path) -> None:
    book = Book(path, IDENTITY)
    book.add("Mosec", 0, "start", {"error": "pip could not install it"})
    assert book.error("Mosec") == "pip could not install it"
    assert book.error("ours") == ""
