"""What was measured, as JSON for programs and as one page for people: no other host, no script needed.

Class names and file names come from the data: the template escapes everything.
"""

import base64
import dataclasses
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from bundle import picture
from bundle.manifest import Manifest
from training.data import SPLITS, Catalogue
from training.metrics import Predictions

TEMPLATE = "report.html.j2"
THUMBNAIL = 168  # pixels of the longer side; on a dense screen the wall shows them at about that
WALL = 24  # pictures on the wall: 6 kB each
PAIRS = 12  # most confused pairs that are listed
MAP = 120  # classes of which the confusion map is still readable; of more, those with most mistakes
UNKNOWN = "\N{EN DASH}"  # where there is no figure
LISTED = 60  # unreadable pictures and copies that are listed; the rest is counted


def write(
    prefix: Path, summary: dict[str, Any], predictions: Predictions, catalogue: Catalogue, manifest: Manifest
) -> tuple[Path, Path]:
    """Write <prefix>.report.json and <prefix>.report.html; returns their paths.

    `summary` is that of `metrics.summarise`, which may also hold "gate" and "folds", as
    `evaluate.judge` puts them there. The page holds thumbnails of the user's pictures.
    """
    told = {
        "bundle": {"name": manifest.name, "version": manifest.version, "digest": manifest.digest},
        "data": {"address": catalogue.address, "digest": catalogue.digest},
        **summary,
    }
    # One key a line: a matrix is no longer than its numbers.
    lines = (f"{json.dumps(key)}: {json.dumps(v, ensure_ascii=False, allow_nan=False)}" for key, v in told.items())
    html = page(summary, predictions, catalogue, manifest)
    paths = Path(f"{prefix}.report.json"), Path(f"{prefix}.report.html")
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for path, text in zip(paths, ("{\n" + ",\n".join(lines) + "\n}\n", html), strict=True):
        # A file name need not be UTF-8; Python holds such bytes as lone surrogates.
        path.write_bytes(text.encode(errors="backslashreplace"))
    return paths


def headline(summary: Mapping[str, Any]) -> str:
    """One sentence that is true: exact for up to 100 pictures, else "About 91 of 100 pictures are named right"."""
    share, pictures = summary["accuracy"], summary["pictures"]
    if share == 1:
        return f"All {pictures} pictures are named right" if pictures > 1 else "The one picture is named right"
    if pictures <= 100:
        return f"{round(share * pictures)} of {pictures} pictures are named right"
    of = next((of for of in (100, 1000) if 0 < round(share * of) < of), 0)
    return f"{f'About {round(share * of)} of {of}' if of else f'{share:.4%} of the'} pictures are named right"


def page(summary: dict[str, Any], predictions: Predictions, catalogue: Catalogue, manifest: Manifest) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "number": _number, "line": _line, "csp_hash": _csp_hash}
    return environment.get_template(TEMPLATE).render(
        s=summary,
        gate=summary.get("gate"),
        folds=summary.get("folds"),
        manifest=manifest,
        catalogue=catalogue,
        headline=headline(summary),
        same_data=catalogue.digest in _flat(manifest.provenance).values(),
        commonest=max(row["pictures"] for row in summary["per_class"]) / summary["pictures"],
        wrong=summary["pictures"] - sum(row[i] for i, row in enumerate(summary["confusion"])),
        bins={when: _bins(rows) for when, rows in summary["reliability"].items()},
        rows=_rows(summary),
        map=_map(summary["confusion"], summary["classes"]),
        pairs=_pairs(summary["confusion"], summary["classes"])[:PAIRS],
        wall=list(_wall(summary, predictions, catalogue, manifest)),
        splits=SPLITS,
        counts={split: Counter(record.label for record in catalogue.of(split)) for split in SPLITS},
        excluded=[(record.key, record.excluded) for record in catalogue.records if record.excluded],
        listed=LISTED,
        provenance=_flat(manifest.provenance),
    )


def _bins(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"start": i / len(rows), "width": 1 / len(rows)} for i, row in enumerate(rows)]


def _rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The classes, the least found first, those without pictures last; with what each is mostly taken for."""
    rows = []
    for i, row in enumerate(summary["per_class"]):
        wrong = [0 if j == i else n for j, n in enumerate(summary["confusion"][i])]
        most = max(wrong)
        rows.append(row | {"taken_for": summary["classes"][wrong.index(most)] if most else "", "times": most})
    return sorted(rows, key=lambda row: (row["recall"] is None, row["recall"], row["name"]))


def _pairs(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> list[dict[str, Any]]:
    """What is named as what instead, the most frequent first."""
    pairs = [
        {"label": names[i], "answer": names[j], "times": n, "of": sum(row)}
        for i, row in enumerate(confusion)
        for j, n in enumerate(row)
        if n and i != j
    ]
    return sorted(pairs, key=lambda pair: -pair["times"])


def _map(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> dict[str, Any]:
    """The cells that are not empty, their size in pixels, and room for the names; classes never seen are left out."""
    shown = [i for i, row in enumerate(confusion) if any(row) or any(other[i] for other in confusion)]
    seen = len(shown)
    if seen > MAP:
        mistakes = {i: sum(row) + sum(other[i] for other in confusion) - 2 * row[i] for i, row in enumerate(confusion)}
        shown = sorted(sorted(shown, key=lambda i: -mistakes[i])[: MAP // 2])
    cells = [
        {"x": x, "y": y, "n": confusion[i][j], "share": confusion[i][j] / sum(confusion[i]), "right": i == j}
        for y, i in enumerate(shown)
        for x, j in enumerate(shown)
        if confusion[i][j]
    ]
    named = [names[i] for i in shown]
    size = max(8, min(30, 840 // len(shown)))  # 840 px: the page's width without the names
    room = 14 + round(0.56 * min(11, size) * min(22, max(map(len, named))))  # 0.56: a letter's width to its height
    return {"cells": cells, "names": named, "size": size, "room": room, "seen": seen}


def _wall(
    summary: Mapping[str, Any], predictions: Predictions, catalogue: Catalogue, manifest: Manifest
) -> Iterator[dict[str, Any]]:
    """The mistakes it was surest of, each picture cut as the model sees it, as a data URI or "" where unreadable."""
    resize = manifest.input.resize
    scale = THUMBNAIL / max(resize.height, resize.width)
    height, width = max(1, round(resize.height * scale)), max(1, round(resize.width * scale))
    side = max(height, width, round(resize.shorter_side * scale)) if resize.rule == "crop" else 0
    small = dataclasses.replace(resize, height=height, width=width, shorter_side=side)
    records = {record.key: record for record in predictions.records}
    for mistake in summary["mistakes"][:WALL]:
        try:
            jpeg = io.BytesIO()
            pixels = picture.load(catalogue.read(records[mistake["key"]]), small)
            Image.fromarray(pixels).save(jpeg, "JPEG", quality=75, optimize=True)
            source = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
        except (OSError, ValueError):  # removed since: the report is the last step of hours and must not fail
            source = ""
        yield mistake | {"source": source}


def _flat(value: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """{"data": {"digest": "..."}} -> {"data digest": "..."}"""
    flat: dict[str, str] = {}
    for key, v in value.items():
        if isinstance(v, Mapping):
            flat |= _flat(v, f"{before}{key} ")
        else:
            flat[before + key] = v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)
    return flat


def _percent(value: float | None, digits: int = 0) -> str:
    """Never 100% where something is missing, nor 0% where something is there."""
    if value is None:
        return UNKNOWN
    text = f"{value:.{digits}%}"
    least = 10.0 ** -(digits + 2)
    if value < 1 and text == f"{1:.{digits}%}":
        return f"{1 - least:.{digits}%}"
    return f"under {least:.{digits}%}" if value > 0 and text == f"{0:.{digits}%}" else text


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return UNKNOWN
    return f"{min(value, 1 - 10.0**-digits) if value < 1 else value:.{digits}f}"  # nor is what is below 1 shown as 1


def _line(values: Sequence[float | None], grid: Sequence[float]) -> str:
    """An SVG path in the unit square, y upwards; with gaps where a value is None."""
    path, before = [], None
    for x, y in zip(grid, values, strict=True):
        if y is not None:
            path.append(f"{'M' if before is None else 'L'}{x:.3g} {1 - y:.4g}")
        before = y
    return "".join(path)


def _csp_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()
