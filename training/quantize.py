"""A bundle -> the same in int8, which a CPU runs in about half the time, kept only where it answers as before.

    python -m training.quantize BUNDLE DATA --out BUNDLE-int8

Ranges come from pictures of the split train; judged is on those of validation and test. Writes the bundle OUT,
and OUT.quantize.json whether it is kept or not. Exit codes: 0 kept; 1 bad input; 3 not within the bounds: there
is no bundle, the fp32 one stays.

The int8 bundle is for CPUs and has no model.pt2: on a GPU the same digest would stand for other answers.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from scipy.stats import binomtest, norm

from bundle import golden, manifest, picture
from bundle.golden import GOLDEN, Run
from bundle.manifest import Manifest
from bundle.picture import Pixels
from training import data, evaluate, metrics
from training.calibration import Labels, MetricError, probabilities
from training.data import Catalogue, Record
from training.export import ONNX, here, onnx_runner
from training.int8 import METHOD, batches, in_float, is_int8, to_int8, weighted
from training.metrics import CONFIDENCE, Predictions

LOST = 0.005  # share of the pictures by which int8 may name fewer right, or one picture where that is more
AGREE = 0.97  # share of the pictures that must get the same top answer
FEWEST_JUDGED = 34  # of fewer, a single one would be more than 3%
FEWEST, MOST = 16, 128  # pictures that ranges are taken from; 400 gave no better ones than 128
NOT_KEPT = 3
# Layers from the first that stay fp32: tried in this order until one is within the bounds. Each is another chance
# to be so by luck, so they are few, and the report has all.
FIRST = (3, 6, 12)
TIMED = 20  # calls, of which the median is told

Logits = NDArray[np.float32]


class QuantizeError(ValueError):
    """What cannot be quantized; the message says why and what would be right."""


@dataclass(frozen=True)
class Judged:
    """int8 against fp32 on the same pictures; what needs labels is None where there are none."""

    pictures: int
    agree: float  # share with the same top answer, and its 95% interval by Wilson
    agree_low: float
    agree_high: float
    fp32: float | None = None  # accuracy of each
    int8: float | None = None
    lost: int | None = None  # pictures that only fp32 names right
    won: int | None = None  # pictures that only int8 names right
    difference: float | None = None  # int8 - fp32, and the 95% interval of a paired difference
    difference_low: float | None = None
    difference_high: float | None = None

    @classmethod
    def of(cls, fp32: Logits, int8: Logits, labels: Labels | None) -> "Judged":
        """Logits [N, C] of the same pictures and labels [N] among the same classes.

        The paired interval is Bonett and Price's (British Journal of Mathematical and Statistical Psychology 65,
        2012, pages 433 to 449): Wald's, with one picture more on either side.
        """
        before, after = fp32.argmax(axis=1), int8.argmax(axis=1)
        n, same = len(before), int((before == after).sum())
        interval = binomtest(same, n).proportion_ci(CONFIDENCE, method="wilson")
        agreement = (n, same / n, float(interval.low), float(interval.high))
        if labels is None:
            return cls(*agreement)
        right, still = before == labels, after == labels
        lost, won = int((right & ~still).sum()), int((still & ~right).sum())
        up, down = (won + 1) / (n + 2), (lost + 1) / (n + 2)
        half = float(norm.ppf((1 + CONFIDENCE) / 2) * np.sqrt((up + down - (up - down) ** 2) / (n + 2)))
        accuracies = (float(right.mean()), float(still.mean()))
        return cls(*agreement, *accuracies, lost, won, (won - lost) / n, up - down - half, up - down + half)

    def unmet(self) -> list[str]:
        """The sentences of which bounds are broken; empty: none is."""
        found = []
        if self.agree < AGREE:
            found.append(f"the same top answer is wanted for {AGREE:.0%} of the pictures, it is {self.agree:.1%}")
        if self.lost is not None and self.won is not None and self.lost - self.won > max(1.0, LOST * self.pictures):
            found.append(
                f"it names {self.lost - self.won} of {self.pictures} pictures fewer right, more than one picture "
                f"and more than {100 * LOST:g} points"
            )
        return found

    def __str__(self) -> str:
        text = (
            f"of {self.pictures} pictures {self.agree:.1%} get the same top answer "
            f"(95% interval {self.agree_low:.1%} to {self.agree_high:.1%})"
        )
        if self.difference is None or self.difference_low is None or self.difference_high is None:
            return text
        return (
            f"{text}, {self.int8:.1%} are named right, by fp32 {self.fp32:.1%}: {100 * self.difference:+.2f} points "
            f"(95% interval {100 * self.difference_low:+.2f} to {100 * self.difference_high:+.2f})"
        )


def quantize(
    bundle: Path, out: Path, catalogue: Catalogue, *, unlabelled: bool = False, progress: bool = True
) -> tuple[Manifest | None, list[str]]:
    """Write the int8 bundle at `out` -> its manifest, or None where it is not within the bounds, and what to say.

    unlabelled: the catalogue's classes are not the bundle's, and only the agreement with fp32 is judged. Writes
    OUT.quantize.json. Raises QuantizeError, BundleError and MetricError for what cannot be quantized or judged.
    """
    base = check(bundle, out)
    measuring, judging = parts(catalogue)
    labels = None if unlabelled else _labels(base, catalogue, judging)
    pixels = np.stack([picture.load(content, base.input.resize) for _, content in catalogue.pictures(measuring)])
    before = evaluate.answers(bundle, catalogue, judging, progress=progress)
    sources = sorted(record.sha256 for record in measuring)
    calibration = {
        "address": catalogue.address,
        "pictures": len(measuring),
        "digest": manifest.sha256("\n".join(sources).encode()),
    }
    report: dict[str, Any] = {
        "from": {"name": base.name, "version": base.version, "digest": base.digest},
        "bounds": {"lost": LOST, "agree": AGREE},
        "calibration": calibration,
        "attempts": [],
    }
    made, unmet, said = None, ["nothing was tried"], []
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        most = (len(weighted(onnx.load(bundle / ONNX).graph)) - 1) // 2  # of a small network half
        for kept in dict.fromkeys(min(first, most) for first in FIRST):
            candidate = Path(scratch) / f"{kept}"
            provenance = {"from": base.digest, "calibration": calibration, "fp32_layers": kept}
            undecided = manifest.write(candidate, _Maker(bundle, base, pixels, kept, provenance))
            after = evaluate.answers(candidate, catalogue, judging, progress=progress)
            judged = Judged.of(before, after, labels)
            unmet = judged.unmet()
            milliseconds = _milliseconds({"fp32": bundle / ONNX, "int8": candidate / ONNX}, pixels[:1])
            attempt = {"fp32_layers": kept, **dataclasses.asdict(judged)}
            report["attempts"].append(attempt | {"milliseconds": milliseconds, "unmet": unmet})
            said.append(f"the first {kept} layers in fp32: {judged}; {_speed(milliseconds)}")
            if not unmet:
                final = dataclasses.replace(
                    undecided,
                    metrics={"int8": attempt} | _metrics(undecided, judging, labels, after),
                )
                made = manifest.write(out, partial(_fill, candidate, final))
                break
    report["kept"] = made.digest if made else None
    Path(f"{out}.quantize.json").write_text(json.dumps(report, indent=1) + "\n")
    if made:
        return made, [*said, f"int8 is kept: {made.name} {made.version}, {out}"]
    earlier = f"; what is at {out} was made earlier" if out.exists() else ""
    return None, [*said, f"int8 is not kept, fp32 stays: {'; '.join(unmet)}{earlier}"]


def check(bundle: Path, out: Path) -> Manifest:
    """The bundle's manifest. Raises BundleError or QuantizeError where it cannot be quantized, or not to `out`."""
    base = manifest.read(bundle)
    if bundle.resolve() == out.resolve():
        raise QuantizeError(f"{out}: is the fp32 bundle itself, which stays: name another folder")
    manifest.check_target(out)
    try:
        dataclasses.replace(base, version=f"{base.version}-int8")
    except ValueError as exc:
        raise QuantizeError(f"{bundle}: the int8 bundle's {exc}: give the fp32 bundle a shorter one") from exc
    graph = onnx.load(bundle / ONNX).graph
    if is_int8(graph):
        raise QuantizeError(f"{bundle}: {base.name} {base.version} is int8 already: name the fp32 bundle")
    if len(weighted(graph)) < 2:
        raise QuantizeError(f"{bundle}: its model has nothing to quantize but a classifier")
    return base


def parts(catalogue: Catalogue) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """The pictures that ranges are taken from, and those that are judged. Raises QuantizeError for too few."""
    train = catalogue.of("train")
    judging = catalogue.of("validation", evaluation=True) + catalogue.of("test", evaluation=True)
    if len(train) < FEWEST or len(judging) < FEWEST_JUDGED:
        raise QuantizeError(
            f"{catalogue.address}: has {len(train)} pictures in train to take ranges from and {len(judging)} in "
            f"validation and test to judge on: int8 needs {FEWEST} and {FEWEST_JUDGED}: add pictures, or, where the "
            "data has no splits of its own, set the share --held-out"
        )
    return tuple(sorted(train, key=lambda record: record.sha256)[:MOST]), judging


def pictures(address: str, csv: str | None, held_out: float, progress: bool = True) -> Catalogue:
    """The catalogue with this share in validation and test, halved as training's are: so they are the same pictures
    where test alone is given, too. Raises DataError."""
    half = held_out / 2
    return data.catalogue(address, csv, validation=half, test=half, training=False, progress=progress)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="quantize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="the fp32 bundle's folder")
    parser.add_argument("data", help="folder by class, folder of files with --csv, or tar shards; here or gs://")
    parser.add_argument("--out", type=Path, help="where the int8 bundle goes; BUNDLE-int8 if left out")
    parser.add_argument("--csv", help="file and label of every picture")
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.2,
        help="share to judge on, where no split is given; 0.2 holds what training's own shares held out",
    )
    parser.add_argument("--unlabelled", action="store_true", help="the folders are no classes: judge agreement alone")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    args = parser.parse_args(arguments)
    out: Path = args.out or Path(f"{args.bundle}-int8")
    try:
        check(args.bundle, out)
        catalogue = pictures(args.data, args.csv, args.held_out, not args.quiet)
        made, said = quantize(args.bundle, out, catalogue, unlabelled=args.unlabelled, progress=not args.quiet)
    except (ValueError, OSError) as exc:  # every refusal of ours is a ValueError
        print(f"quantize: {exc}", file=sys.stderr)
        return 1
    for sentence in said:
        print(f"quantize: {sentence}")
    return 0 if made else NOT_KEPT


@dataclass(frozen=True)
class _Maker:
    """Fills a folder with the int8 model, its golden answers, and all else as in `base`."""

    bundle: Path
    base: Manifest
    pixels: Pixels  # of calibration, uint8 [N, H, W, 3]
    kept: int
    provenance: Mapping[str, Any]

    def __call__(self, folder: Path) -> Manifest:
        to_int8(self.bundle / ONNX, folder / ONNX, self.pixels, self.kept)
        run = onnx_runner(folder / ONNX)
        with np.load(self.bundle / GOLDEN) as file:
            drawn: Pixels = file["pixels"]
        golden.record(folder, drawn, run)
        some = np.concatenate([drawn, self.pixels[:32]])
        return dataclasses.replace(
            self.base,
            version=f"{self.base.version}-int8",
            files={},
            # What rounding alone can do: the same graph computed in float, each number rounded as it says.
            tolerance=max(self.base.tolerance, float(np.abs(run(some) - in_float(folder / ONNX)(some)).max())),
            decision=dataclasses.replace(
                self.base.decision,
                temperature=_temperature(
                    onnx_runner(self.bundle / ONNX), run, self.pixels, self.base.decision.temperature
                ),
            ),
            provenance={
                **self.base.provenance,
                "int8": {
                    **self.provenance,
                    "method": METHOD,
                    **here(),
                },
            },
        )


def _temperature(fp32: Run, int8: Run, pixels: Pixels, temperature: float) -> float:
    """The temperature at which int8's probabilities are closest to those of fp32, which threshold and people know.

    By cross-entropy on the calibration pictures: needs no labels.
    """
    before, after = (
        np.concatenate([run(batch["pixels"]) for batch in batches(pixels)]).astype(np.float64) for run in (fp32, int8)
    )
    wanted = probabilities(before, temperature)
    best = minimize_scalar(
        lambda log: -(wanted * log_softmax(after / (temperature * np.exp(log)), axis=1)).sum(axis=1).mean(),
        bounds=(-0.5, 0.5),
        method="bounded",
    )
    return float(temperature * np.exp(best.x))


def _milliseconds(models: Mapping[str, Path], pixels: Pixels) -> dict[str, float]:
    """The median time of each for one picture, one thread, in turns."""
    runs = {name: onnx_runner(path) for name, path in models.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(TIMED):
        for name, run in runs.items():
            begun = time.perf_counter()
            run(pixels)
            times[name].append(1000 * (time.perf_counter() - begun))
    return {name: float(np.median(each)) for name, each in times.items()}


def _speed(milliseconds: Mapping[str, float]) -> str:
    return f"{milliseconds['int8']:.1f} ms a picture on one thread here, fp32 {milliseconds['fp32']:.1f} ms"


def _labels(base: Manifest, catalogue: Catalogue, records: Sequence[Record]) -> Labels:
    try:
        return evaluate.known_labels(base, catalogue, records)
    except MetricError as exc:
        raise QuantizeError(f"{exc}: to judge the agreement with fp32 alone, say --unlabelled") from exc


def _metrics(base: Manifest, records: tuple[Record, ...], labels: Labels | None, logits: Logits) -> dict[str, Any]:
    """int8's own figures; those of fp32 are not its own."""
    if labels is None:
        return {}
    predictions = Predictions(records, labels, logits, base.classes)
    summary = metrics.summarise(predictions, base.decision.temperature, base.decision.threshold)
    return {summary["split"]: {key: summary[key] for key in ("pictures", *metrics.SCALARS)}}


def _fill(candidate: Path, final: Manifest, folder: Path) -> Manifest:
    for name in final.files:
        (folder / name).write_bytes((candidate / name).read_bytes())
    return final


if __name__ == "__main__":
    sys.exit(main())
