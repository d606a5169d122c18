"""The gate: whether a model may be used, by figures that it must reach and by comparison with another."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

from training.metrics import PER_CLASS, SCALARS, SHARES, MetricError, Predictions


class GateError(ValueError):
    """A requirement that can be neither met nor missed; the message says what would be right."""


@dataclass(frozen=True)
class Requirement:
    """`metric` is one of SCALARS or, with a class's name, one of PER_CLASS."""

    metric: str
    of: str | None
    at_least: bool
    value: float

    def __str__(self) -> str:
        name = self.metric if self.of is None else f"{self.metric}[{self.of}]"
        return f"{name} {'>=' if self.at_least else '<='} {self.value:.12g}"

    def found(self, summary: dict[str, Any]) -> float | None:
        row = summary if self.of is None else next(row for row in summary["per_class"] if row["name"] == self.of)
        found: float | None = row[self.metric]
        return found


def parse(text: str, classes: Sequence[str]) -> Requirement:
    """`accuracy>=0.9`, `ece<=0.05`, `recall[shoes]>=0.8`. Raises GateError; needs no figures, so ask it early."""
    # The first part takes all it can: a class's own name may hold ">=".
    if not (match := re.fullmatch(r"\s*(.+?)\s*(>=|<=)\s*([^<>=\[\]]+)", text, re.DOTALL)):
        raise GateError(f"{text!r} is no requirement: write metric>=value or metric<=value, with {_there_are(classes)}")
    name, sign, number = match.groups()
    try:
        value = float(number)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise GateError(f"{text!r}: {number.strip()!r} is not a number: write 0.9 for 90%")
    per_class = re.fullmatch(r"(\w+)\[(.+)\]", name, re.DOTALL)
    metric, of = (per_class[1], per_class[2]) if per_class else (name, None)
    if metric not in (PER_CLASS if per_class else SCALARS):
        raise GateError(f"{text!r}: there is no metric {name}, there are {_there_are(classes)}")
    if of is not None and of not in classes:
        raise GateError(f"{text!r}: there is no class {of}, there are {', '.join(classes)}")
    if metric in (*SHARES, *PER_CLASS) and not 0 <= value <= 1:
        raise GateError(f"{text!r}: {metric} lies between 0 and 1: write 0.9 for 90%")
    return Requirement(metric, of, sign == ">=", value)


def check(summary: dict[str, Any], requirements: Sequence[str]) -> list[str]:
    """The sentences of what is not met; empty: all is. Raises GateError for a requirement that `parse` refuses."""
    unmet = []
    for requirement in [parse(text, summary["classes"]) for text in requirements]:
        found = requirement.found(summary)
        if found is None:
            unmet.append(f"{requirement} is required, but these pictures cannot tell")
        elif not (found >= requirement.value if requirement.at_least else found <= requirement.value):
            unmet.append(f"{requirement} is required, but it is {found:.6g}")
    return unmet


@dataclass(frozen=True)
class Comparison:
    """Two models on the same pictures. p: of as many lost or more, were both equally good."""

    pictures: int
    won: int  # pictures that only ours names right
    lost: int  # pictures that only the other names right
    p: float


def compare(mine: Predictions, other: Predictions) -> Comparison:
    """McNemar's test (Psychometrika 12, 1947), exact and one-sided: is `mine` worse than `other`?

    Pictures are paired by key. Raises MetricError where the two have other pictures or labels.
    """
    theirs = {record.key: i for i, record in enumerate(other.records)}
    if theirs.keys() != {record.key for record in mine.records}:
        raise MetricError("the two models were not measured on the same pictures")
    order = [theirs[record.key] for record in mine.records]
    if [mine.classes[i] for i in mine.labels] != [other.classes[i] for i in other.labels[order]]:
        raise MetricError("the two models were not measured against the same labels")
    ours, others = mine.right, other.right[order]
    won, lost = int((ours & ~others).sum()), int((others & ~ours).sum())
    p = float(binomtest(lost, won + lost, 0.5, alternative="greater").pvalue) if won + lost else 1.0
    return Comparison(len(order), won, lost, p)


def no_worse(mine: Predictions, other: Predictions, alpha: float = 0.05) -> str:
    """The sentence where `mine` is worse than `other`, significantly at `alpha`; else nothing."""
    found = compare(mine, other)
    if found.p >= alpha:
        return ""
    return (
        f"it is worse than the model it must not be worse than: of {found.pictures} pictures it loses {found.lost} "
        f"and wins {found.won} (McNemar's exact test: p = {found.p:.2g}, below {alpha:g})"
    )


def _there_are(classes: Sequence[str]) -> str:
    return f"{', '.join(SCALARS)}, and {', '.join(f'{m}[class]' for m in PER_CLASS)} with a class such as {classes[0]}"
