"""bench.figures: from calls to figures, by hand and against numpy."""

import numpy as np
import pytest

from bench import figures
from bench.figures import Spread, per_image, percentile, recovered, spread, summary
from bench.load import BAD, GOOD, HANG_UP, HUNG_UP, LOST, TIMED_OUT, WRONG, Row


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("count", [1, 2, 99, 100, 101])
def test_percentile_is_a_value_that_was_measured(share: float, count: int) -> None:
    values = np.random.default_rng(count).exponential(size=count).tolist()
    assert percentile(values, share) == np.percentile(values, 100 * share, method="inverted_cdf")


def test_percentile_of_nothing() -> None:
    assert percentile([], 0.5) is None


def test_summary_counts_what_was_right_in_time_and_names_the_rest() -> None:
    rows = [
        Row(0.0, 0.1, 200, GOOD),
        Row(1.0, 0.3, 200, GOOD),
        Row(1.9, 0.2, 200, GOOD),  # right, but after the two seconds
        Row(0.5, 0.004, 503, GOOD),
        Row(0.5, 0.006, 429, GOOD),
        Row(0.5, 0.1, 500, GOOD),
        Row(0.5, 10.0, TIMED_OUT, GOOD),
        Row(0.5, 0.0, LOST, GOOD),
        Row(0.5, 0.1, WRONG, GOOD),
        Row(0.6, 0.1, 400, BAD),
        Row(0.6, 0.02, HUNG_UP, HANG_UP),
    ]
    found = summary(rows, 2.0)
    assert found["images_per_s"] == 1.0
    assert found["n"] == 9
    assert (found["p50_ms"], found["p99_ms"], found["max_ms"]) == (200.0, 300.0, 300.0)
    assert (found["refused"], found["refused_p99_ms"]) == (2, 6.0)
    assert found["failed"] == {"500": 1, "connection lost": 1, "no answer in time": 1, "wrong answer": 1}
    assert (found["bad"], found["hung_up"]) == ({"400": 1}, 1)


def test_summary_of_a_server_that_answers_nothing() -> None:
    found = summary([Row(0.0, 10.0, TIMED_OUT, GOOD)], 5.0)
    assert (found["images_per_s"], found["p50_ms"], found["failed"]) == (0.0, None, {"no answer in time": 1})


def test_cpu_an_image_by_process() -> None:
    assert per_image({"gateway": 0.5, "worker": 1.5}, 100) == {"worker": 15.0, "gateway": 5.0}
    assert list(per_image({"gateway": 0.5, "worker": 1.5}, 100) or {}) == ["worker", "gateway"]
    assert per_image({"worker": 1.0}, 0) is None


def test_recovered_is_the_first_second_at_full_speed() -> None:
    slow = [Row(second + i / 100, 0.001, 200, GOOD) for second in (0, 1) for i in range(30)]
    fast = [Row(second + i / 100, 0.001, 200, GOOD) for second in (2, 3) for i in range(95)]
    assert recovered(slow + fast, 100) == 2.0
    assert recovered(slow + fast, 200) is None
    assert recovered([], 100) is None
    refused = [Row(i / 100, 0.001, 503, GOOD) for i in range(400)]
    assert recovered(refused, 100) is None


def test_spread_over_rounds() -> None:
    assert spread([80.0, None, 100.0, 90.0]) == Spread(90.0, 80.0, 100.0, 3)
    assert spread([None]) is None


def test_names_cover_every_outcome_that_is_no_status() -> None:
    assert set(figures.NAMES) == {LOST, TIMED_OUT, WRONG}
