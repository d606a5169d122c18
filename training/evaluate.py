"""A bundle on labelled pictures, exactly as it will be served: figures, a report page, a gate.

    python -m training.evaluate BUNDLE DATA --split validation --require 'accuracy>=0.9' --no-worse-than OTHER

Writes OUT.report.json and OUT.report.html. Exit codes: 0 good; 1 bad input; 3 the gate failed.
"""

import argparse
import dataclasses
import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from bundle import golden, picture
from bundle.cpus import whole_cpus
from bundle.manifest import Decision, Manifest, read
from training import calibration, data, gate, metrics, report
from training.calibration import Labels, MetricError
from training.data import SPLITS, Catalogue, Record, Split, shown
from training.export import ONNX, onnx_runner
from training.metrics import Predictions, some

__all__ = ["Predictions", "answers", "calibrate", "folds", "judge", "main", "predict"]

BATCH = 8  # pictures a call; ONNX Runtime gives the same bits for any number
GATE_FAILED = 3


def predict(
    bundle: Path,
    catalogue: Catalogue,
    split: Split | Literal["all"],
    *,
    workers: int | None = None,
    progress: bool = True,
) -> Predictions:
    """The bundle's logits for the split's pictures, without those kept out of evaluation, and their labels.

    Raises what `answers` does, and MetricError where the split has no pictures or a class that the bundle
    does not know.
    """
    manifest = read(bundle)
    records = _records(catalogue, split)
    labels = known_labels(manifest, catalogue, records)
    logits = answers(bundle, catalogue, records, workers=workers, progress=progress)
    return Predictions(records, labels, logits, manifest.classes)


def answers(
    bundle: Path,
    catalogue: Catalogue,
    records: Sequence[Record],
    *,
    workers: int | None = None,
    progress: bool = True,
) -> NDArray[np.float32]:
    """The bundle's logits for these pictures, float32 [N, C].

    Through `bundle.picture.load` and ONNX Runtime, as the gateway and the model server do it,
    in `workers` threads (both release the interpreter); memory holds a few batches. Raises
    BundleError where the bundle would not be served, MetricError where a picture cannot be read.
    """
    manifest = read(bundle)
    manifest.input.check_pixels()
    run = onnx_runner(bundle / ONNX)
    golden.check(bundle, run, len(manifest.classes), manifest.tolerance)

    def answer(batch: list[tuple[Record, bytes]]) -> NDArray[np.float32]:
        pixels = []
        for record, content in batch:
            try:
                pixels.append(picture.load(content, manifest.input.resize))
            except picture.PictureError as exc:
                raise MetricError(f"{record.key}: {exc}") from exc
        return run(np.stack(pixels))

    logits = np.full((len(records), len(manifest.classes)), np.nan, np.float32)
    place = {record.key: i for i, record in enumerate(records)}
    pictures = shown(catalogue.pictures(records), len(records), "pictures evaluated", progress)
    for batch, found in _in_threads(answer, pictures, workers or whole_cpus()):
        logits[[place[record.key] for record, _ in batch]] = found
    return logits


def calibrate(predictions: Predictions, precision: float | None = None, top_k: int = 5) -> Decision:
    """The decision fitted on these pictures (validation): temperature, and the threshold for `precision` if wanted."""
    temperature = metrics.fit_temperature(predictions.logits, predictions.labels)
    if precision is None:
        return Decision(temperature, top_k=top_k)
    scores = metrics.probabilities(predictions.logits, temperature)
    return Decision(temperature, metrics.threshold_for(scores, predictions.labels, precision), top_k)


def judge(
    prefix: Path,
    predictions: Predictions,
    catalogue: Catalogue,
    manifest: Manifest,
    *,
    requirements: Sequence[str] = (),
    other: Predictions | None = None,
    cross_validation: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Measure, pass through the gate, write the report -> the summary and the sentences of what is not met.

    `other`: what the bundle that must not be better made of the same pictures; `cross_validation`:
    what `folds` gave. Raises GateError for a requirement that is none.
    """
    summary = metrics.summarise(predictions, manifest.decision.temperature, manifest.decision.threshold)
    unmet = gate.check(summary, requirements)
    found = {text: gate.parse(text, predictions.classes).found(summary) for text in requirements}
    summary["gate"] = {"requirements": found, "comparison": None, "unmet": unmet}
    if other is not None:
        summary["gate"]["comparison"] = dataclasses.asdict(gate.compare(predictions, other))
        unmet += filter(None, [gate.no_worse(predictions, other)])
    summary["folds"] = cross_validation
    report.write(prefix, summary, predictions, catalogue, manifest)
    return summary, unmet


def folds(
    labels: Labels,
    fit: Callable[[NDArray[np.intp], NDArray[np.intp]], NDArray[np.floating]],
    count: int = 5,
    *,
    seed: int = 0,
    groups: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Stratified cross-validation of what `fit` trains: accuracy of each fold, their mean and deviation.

    `fit(train, held)` gets indices into `labels` and returns the logits [len(held), C] of a model that
    saw `train` alone. Pictures of one group (copies of one another) stay in one fold. An exported
    bundle has one training behind it and cannot be cross-validated: only its training can.
    Raises MetricError where a class has fewer pictures than there are folds.
    """
    check_folds(labels, count)
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    accuracies = []
    for train, held in kind(count, shuffle=True, random_state=seed).split(labels, labels, groups):
        logits = fit(train, held)
        calibration.check(logits, labels[held])
        accuracies.append(float((logits.argmax(axis=1) == labels[held]).mean()))
    return {
        "count": count,
        "accuracy": accuracies,
        "mean": float(np.mean(accuracies)),
        "deviation": float(np.std(accuracies, ddof=1)),
    }


def check_folds(labels: Labels, count: int) -> None:
    """Raises MetricError where a class has fewer pictures than there are folds."""
    fewest = int(np.unique(labels, return_counts=True)[1].min()) if len(labels) else 0
    if not 2 <= count <= fewest:
        raise MetricError(f"folds must be 2 to {fewest}, the pictures of the smallest class, not {count}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="the bundle's folder")
    parser.add_argument("data", help="folder by class, folder of files with --csv, or tar shards; here or gs://")
    parser.add_argument("--csv", help="file and label of every picture")
    parser.add_argument("--split", default="validation", choices=[*SPLITS, "all"])
    parser.add_argument("--out", type=Path, help="start of the report's file names; the bundle's folder if left out")
    parser.add_argument("--require", nargs="+", action="extend", default=[], metavar="METRIC>=VALUE")
    parser.add_argument("--no-worse-than", type=Path, metavar="BUNDLE", help="tested on the same pictures")
    args = parser.parse_args(arguments)
    try:
        manifest = read(args.bundle)
        for text in args.require:
            gate.parse(text, manifest.classes)
        catalogue = data.catalogue(args.data, args.csv, training=False)
        predictions = predict(args.bundle, catalogue, args.split)
        other = predict(args.no_worse_than, catalogue, args.split) if args.no_worse_than else None
        prefix = args.out or args.bundle
        summary, unmet = judge(prefix, predictions, catalogue, manifest, requirements=args.require, other=other)
    except (ValueError, OSError) as exc:  # every refusal of ours is a ValueError
        print(f"evaluate: {exc}", file=sys.stderr)
        return 1
    print(f"{report.headline(summary)}; the report: {prefix}.report.html")
    for sentence in unmet:
        print(f"evaluate: the gate failed: {sentence}", file=sys.stderr)
    return GATE_FAILED if unmet else 0


def _records(catalogue: Catalogue, split: Split | Literal["all"]) -> tuple[Record, ...]:
    wanted = SPLITS if split == "all" else (split,)
    if records := tuple(record for each in wanted for record in catalogue.of(each, evaluation=True)):
        return records
    have = ", ".join(f"{each} {len(catalogue.of(each, evaluation=True))}" for each in SPLITS)
    raise MetricError(f"{catalogue.address}: the split {split} has no pictures to evaluate on; there are: {have}")


def known_labels(manifest: Manifest, catalogue: Catalogue, records: Sequence[Record]) -> Labels:
    """int64 [N] by the bundle's classes, matched by name. Raises MetricError for a class that it does not know."""
    used = [catalogue.classes[label] for label in sorted({record.label for record in records})]
    if unknown := [name for name in used if name not in manifest.classes]:
        unused = [name for name in manifest.classes if name not in catalogue.classes]
        raise MetricError(
            f"{manifest.name} does not know {len(unknown)} of the {len(used)} classes of {catalogue.address}: "
            + some(unknown)
            + (f"; the data has none of these, which it knows: {some(unused)}" if unused else "")
        )
    place = {name: i for i, name in enumerate(manifest.classes)}
    return np.array([place[catalogue.classes[record.label]] for record in records], np.int64)


def _in_threads(
    work: Callable[[list[tuple[Record, bytes]]], NDArray[np.float32]],
    items: Iterator[tuple[Record, bytes]],
    workers: int,
) -> Iterator[tuple[list[tuple[Record, bytes]], NDArray[np.float32]]]:
    """(batch, work(batch)) in order; no more batches are read than keep the threads busy."""
    waiting: deque[tuple[list[tuple[Record, bytes]], Future[NDArray[np.float32]]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        while batch := list(itertools.islice(items, BATCH)):
            waiting.append((batch, pool.submit(work, batch)))
            if len(waiting) > workers:
                oldest, answers = waiting.popleft()
                yield oldest, answers.result()
        for oldest, answers in waiting:
            yield oldest, answers.result()


if __name__ == "__main__":
    sys.exit(main())
