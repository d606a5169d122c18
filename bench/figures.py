"""From the log of a load to figures, and from several rounds to a median and a spread."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.load import BAD, GOOD, HANG_UP, LOST, TIMED_OUT, WRONG, Row

NAMES = {LOST: "connection lost", TIMED_OUT: "no answer in time", WRONG: "wrong answer"}


def read(path: Path) -> list[Row]:
    """The rows of a log of bench.load."""
    rows = []
    for line in path.read_text().splitlines():
        due, seconds, status, kind = line.split("\t")
        rows.append(Row(float(due), float(seconds), int(status), int(kind)))
    return rows


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of them do not exceed (nearest rank); None of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def summary(rows: Sequence[Row], seconds: float) -> dict[str, Any]:
    """What came of a load of that many seconds. Latencies in milliseconds, of calls made in time.

    images_per_s counts right answers that came within the seconds; refused are 429 and 503; a failed call is
    anything else that is not 200, of good pictures whose sender waited.
    """
    asked = [row for row in rows if row.kind == GOOD]
    right = [row for row in asked if row.status == 200]
    refused = [row for row in asked if row.status in (429, 503)]
    failed = Counter(NAMES.get(row.status, str(row.status)) for row in asked if row.status not in (200, 429, 503))
    return {
        "seconds": seconds,
        "n": len(asked),
        "images_per_s": sum(row.due + row.seconds <= seconds for row in right) / seconds,
        **latencies(right),
        "refused": len(refused),
        "refused_p99_ms": _ms(percentile([row.seconds for row in refused], 0.99)),
        "failed": dict(sorted(failed.items())),
        "bad": dict(Counter(str(row.status) for row in rows if row.kind == BAD)),
        "hung_up": sum(row.kind == HANG_UP for row in rows),
    }


def latencies(rows: Sequence[Row]) -> dict[str, float | None]:
    took = [row.seconds for row in rows]
    points = {f"p{100 * share:g}_ms": _ms(percentile(took, share)) for share in (0.5, 0.9, 0.99)}
    return points | {"max_ms": _ms(max(took, default=None))}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def per_image(cpu: Mapping[str, float], images: int) -> dict[str, float] | None:
    """CPU seconds by process -> milliseconds an image, the dearest first; None where nothing was answered."""
    if not images:
        return None
    return {name: 1e3 * seconds / images for name, seconds in sorted(cpu.items(), key=lambda item: -item[1])}


def recovered(rows: Sequence[Row], capacity: float, share: float = 0.9) -> float | None:
    """Seconds until right answers come at that share of `capacity` (images/s) again, counted in whole seconds of
    a closed load that began when the overload ended; None where they never do."""
    done = Counter(int(row.due + row.seconds) for row in rows if row.status == 200)
    last = max(done, default=0)  # cut off
    return next((float(second) for second in range(last) if done[second] >= share * capacity), None)


@dataclass(frozen=True)
class Spread:
    """Median and range over n rounds."""

    median: float
    low: float
    high: float
    n: int


def spread(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return Spread(statistics.median(known), min(known), max(known), len(known)) if known else None
