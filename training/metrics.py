"""What is measured of a classifier's answers: functions of logits and labels; no pictures, no files.

What cannot be measured is None, never 0: a class without pictures has no recall.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import auc, precision_recall_curve, roc_curve

from training.calibration import (
    Floats,
    Labels,
    MetricError,
    calibration_error,
    check,
    fit_temperature,
    negative_log_likelihood,
    probabilities,
    ratio,
    threshold_for,
)
from training.data import Record

__all__ = ["MetricError", "Predictions", "fit_temperature", "probabilities", "summarise", "threshold_for"]

CONFIDENCE = 0.95  # of every interval
WORST = 48  # mistakes that are listed
FEW = 10  # pictures of a class below which a note says that its figures are rough
GRID = np.linspace(0, 1, 101)  # where curves are given


@dataclass(frozen=True)
class Predictions:
    """What a model made of the pictures `records`: labels int64 [N] and logits float32 [N, C], both by `classes`.

    `labels` index `classes`, the model's own order; Record.label indexes the catalogue's.
    Raises MetricError where there is no picture, or a logit is not a finite number.
    """

    records: tuple[Record, ...]
    labels: Labels
    logits: NDArray[np.float32]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        check(self.logits, self.labels, [record.key for record in self.records])
        if self.logits.shape[1] != len(self.classes) or len(self.records) != len(self.labels):
            raise MetricError(
                f"{len(self.records)} pictures and {len(self.classes)} classes have logits {self.logits.shape}"
            )

    @property
    def right(self) -> NDArray[np.bool_]:
        """bool [N]: the top answer is the label. Of equal logits the first counts, as in serving."""
        right: NDArray[np.bool_] = self.logits.argmax(axis=1) == self.labels
        return right


# Scalars of a summary that lie between 0 and 1, and the others.
SHARES = (
    *("accuracy", "accuracy_low", "accuracy_high", "top5", "top5_low", "top5_high", "macro_recall", "macro_f1"),
    *("roc_auc", "pr_auc", "ece", "ece_before", "threshold", "coverage", "precision_at_threshold"),
)
SCALARS = (*SHARES, "nll", "nll_before", "temperature", "pictures")
PER_CLASS = ("recall", "precision", "f1", "roc_auc", "pr_auc")


def summarise(predictions: Predictions, temperature: float, threshold: float) -> dict[str, Any]:
    """Everything measured, as JSON can hold it: SCALARS (a number or None), lists and tables.

    `temperature` and `threshold` are those that will be served; "before" is without temperature.
    Macro figures are means over the classes for which there is one.
    """
    names, labels, count = predictions.classes, predictions.labels, len(predictions.labels)
    scores = probabilities(predictions.logits, temperature)
    answers, top, right = scores.argmax(axis=1), scores.max(axis=1), predictions.right
    before = probabilities(predictions.logits).max(axis=1)
    ece, reliability = calibration_error(top, right)
    ece_before, reliability_before = calibration_error(before, right)
    # Among five classes or fewer the label is always in the first five: nothing is measured.
    first = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    top5 = _share((first == labels[:, None]).any(axis=1)) if len(names) > 5 else (None, None, None)
    confusion = np.bincount(labels * len(names) + answers, minlength=len(names) ** 2).reshape(len(names), len(names))
    classes, curves = _per_class(names, labels, scores, confusion)
    answered = top >= threshold
    accuracy = _share(right)
    return {
        "split": "+".join(sorted({record.split for record in predictions.records})),
        "pictures": count,
        "accuracy": accuracy[0],
        "accuracy_low": accuracy[1],
        "accuracy_high": accuracy[2],
        "top5": top5[0],
        "top5_low": top5[1],
        "top5_high": top5[2],
        "macro_recall": _mean(row["recall"] for row in classes),
        "macro_f1": _mean(row["f1"] for row in classes if row["pictures"]),
        "roc_auc": _mean(row["roc_auc"] for row in classes),
        "pr_auc": _mean(row["pr_auc"] for row in classes),
        "ece": ece,
        "ece_before": ece_before,
        "nll": negative_log_likelihood(predictions.logits, labels, temperature),
        "nll_before": negative_log_likelihood(predictions.logits, labels, 1.0),
        "temperature": float(temperature),
        "threshold": float(threshold),
        "coverage": float(answered.mean()),
        "precision_at_threshold": float(right[answered].mean()) if answered.any() else None,
        "notes": _notes(classes),
        "classes": list(names),
        "per_class": classes,
        "confusion": confusion.tolist(),  # [label][answer]
        "reliability": {"before": reliability_before, "after": reliability},
        "thresholds": _sweep(top, right),
        "curves": curves,
        "mistakes": [
            {
                "key": predictions.records[i].key,
                "label": names[labels[i]],
                "answer": names[answers[i]],
                "probability": float(top[i]),
            }
            for i in np.argsort(np.where(right, 1.0, -top), kind="stable")[: min(WORST, int((~right).sum()))]
        ],
    }


def _share(hits: NDArray[np.bool_]) -> tuple[float, float, float]:
    """How many of the pictures, with Wilson's interval (E. B. Wilson, JASA 22, 1927)."""
    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(CONFIDENCE, method="wilson")
    return float(hits.mean()), float(interval.low), float(interval.high)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _sweep(top: Floats, right: NDArray[np.bool_]) -> list[dict[str, float | None]]:
    """Precision and coverage at every threshold of GRID."""
    rows = []
    for threshold in GRID:
        answered = top >= threshold
        precision = ratio(right[answered].sum(), answered.sum())
        rows.append({"threshold": float(threshold), "coverage": float(answered.mean()), "precision": precision})
    return rows


def _per_class(
    names: Sequence[str], labels: Labels, scores: Floats, confusion: NDArray[np.int64]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row a class, and the curves over GRID: their mean and those of the three classes with the least area.

    ROC and precision-recall are one class against the rest: they need pictures of both.
    Of the PR curve the step is kept: a line between its points would promise too much
    (Davis & Goadrich, ICML 2006).
    """
    rows: list[dict[str, Any]] = []
    roc, pr = {}, {}
    for i, name in enumerate(names):
        hits, support, said = int(confusion[i, i]), int(confusion[i].sum()), int(confusion[:, i].sum())
        row = {
            "name": name,
            "pictures": support,
            "answers": said,
            "recall": ratio(hits, support),
            "precision": ratio(hits, said),
            "f1": ratio(2 * hits, support + said),
            "roc_auc": None,
            "pr_auc": None,
        }
        if 0 < support < len(labels):
            mine, score = labels == i, scores[:, i]
            wrong, found, _ = roc_curve(mine, score)
            precision, recall, _ = precision_recall_curve(mine, score)  # recall falls to 0
            row["roc_auc"] = float(auc(wrong, found))
            row["pr_auc"] = float(-(np.diff(recall) * precision[:-1]).sum())  # as sklearn's average_precision_score
            roc[name] = np.interp(GRID, wrong, found)
            pr[name] = precision[len(recall) - 1 - np.searchsorted(recall[::-1], GRID)]
        rows.append(row)

    def curves(of: dict[str, Floats], area: str) -> dict[str, Any]:
        weak = sorted((row for row in rows if row["name"] in of and row[area] < 1), key=lambda row: row[area])
        return {
            "mean": np.mean(list(of.values()), axis=0).tolist() if of else None,
            "weakest": {row["name"]: of[row["name"]].tolist() for row in weak[:3]},
        }

    return rows, {"grid": GRID.tolist(), "roc": curves(roc, "roc_auc"), "pr": curves(pr, "pr_auc")}


def _notes(classes: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader must know of the data to read the figures."""
    empty = [row["name"] for row in classes if not row["pictures"]]
    few = [row["name"] for row in classes if 0 < row["pictures"] < FEW]
    notes = []
    if empty:
        notes.append(
            f"{len(empty)} of {len(classes)} classes have no picture here, nothing is known of them: {some(empty)}."
        )
    if len(empty) == len(classes) - 1:
        notes.append("All pictures are of one class: ROC and PR AUC, one class against the rest, cannot be measured.")
    if few:
        notes.append(f"Figures are rough for {len(few)} classes with fewer than {FEW} pictures: {some(few)}.")
    return notes


def some(names: Sequence[str], most: int = 10) -> str:
    """The names in a sentence, not more than `most` of them."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
