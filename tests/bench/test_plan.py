"""bench's plan: who is measured how often, and in which order."""

from collections import Counter
from pathlib import Path

import pytest

from bench import __main__ as bench
from bench import cases, contenders
from bench.results import Book
from bench.visit import Visit

ALL = list(contenders.ALL)


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(tmp_path / "results.jsonl", {"contenders": []})


def visits(book: Book, quick: bool = False, rounds: int | None = None) -> list[Visit]:
    """The whole plan, each first round answered with a speed by the contender's place in the list."""
    made = []
    for visit in bench.plan(ALL, quick, rounds, False, book):
        made.append(visit)
        speed = float(ALL.index(visit.contender)) + 1
        book.add(visit.contender.name, visit.round, cases.MANY.name, {"images_per_s": speed})
    return made


def test_everything_once_and_five_rounds_for_ours_and_the_three_fastest(book: Book) -> None:
    made = visits(book)
    rounds = Counter(visit.contender.name for visit in made if visit.cases != (cases.SOAK,))
    assert {name for name, count in rounds.items() if count == 5} == {
        *("ours", "ours, int8", "ours, bf16", "limit", "limit, int8", "limit, int8, Pillow", "limit, bf16"),
        *("Mosec, PyTorch", "KServe, PyTorch", "Ray Serve, PyTorch"),  # the last in the list, without the one that
        # is the fastest of them but decodes as nobody would
    }
    assert set(rounds.values()) == {1, 5}
    assert all(visit.cases == (cases.EVERY if visit.contender.server else cases.REPEATED) for visit in made[: len(ALL)])
    assert [(visit.contender.name, visit.cases) for visit in made[-1:]] == [("ours", (cases.SOAK,))]


def test_rounds_interleave_in_an_order_of_their_own(book: Book) -> None:
    made = visits(book, rounds=3)
    orders = [[v.contender.name for v in made if v.round == number] for number in (1, 2, 3)]
    assert [v.round for v in made] == sorted(v.round for v in made)
    assert all(sorted(order) == sorted(c.name for c in ALL) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert [v.contender.name for v in visits(book, rounds=3)] == [v.contender.name for v in made]


def test_a_run_that_is_continued_has_the_same_plan(book: Book) -> None:
    first = [(v.round, v.contender.name) for v in visits(book)]
    later = [(v.round, v.contender.name) for v in bench.plan(ALL, False, None, False, book)]
    assert later == first


def test_quick_leaves_a_minute_of_five_for_starts() -> None:
    loads = sum(case.seconds for case in cases.QUICK)
    servers = len(bench.IN_QUICK) - 1
    assert 3 * (servers * (bench.QUICK_WARM_UP + loads) + loads) <= 240
    assert [case.name for case in cases.QUICK] == [case.name for case in cases.REPEATED]
