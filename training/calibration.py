"""How sure an answer is: softmax, the temperature and the threshold fitted on validation, the calibration error."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

BINS = 15  # of the calibration error, as Guo et al. 2017 (arXiv:1706.04599), section 5
# Where the optimum lies beyond these, the logits say nothing, or nothing but the right answer.
TEMPERATURES = (0.05, 20.0)

Labels = NDArray[np.int64]
Floats = NDArray[np.float64]


class MetricError(ValueError):
    """These answers cannot be measured; the message says why."""


def probabilities(logits: NDArray[np.floating], temperature: float = 1.0) -> Floats:
    """softmax(logits / temperature), float64 [N, C], step by step as the gateway computes it."""
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def fit_temperature(logits: NDArray[np.floating], labels: Labels) -> float:
    """The temperature of the least negative log-likelihood (Guo et al. 2017, section 4.2).

    logits [N, C], labels [N]. Where every answer is right, any lower temperature is likelier
    still and the data cannot tell: 1.0. Raises MetricError for no pictures and non-finite logits.
    """
    check(logits, labels)
    if (logits.argmax(axis=1) == labels).all():
        return 1.0
    low, high = np.log(TEMPERATURES)
    best = minimize_scalar(
        lambda log: negative_log_likelihood(logits, labels, np.exp(log)),
        bounds=(low, high),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(best.x))


def threshold_for(scores: Floats, labels: Labels, precision: float) -> float:
    """The smallest threshold at which the answers that reach it are right at least as often as `precision`.

    scores: probabilities [N, C]. Where no threshold does, the one with the best precision; the
    summary tells what it comes to. Lies midway to the next lower probability, so that the last
    digits of another processor change no answer.
    """
    check(scores, labels)
    if not 0 < precision <= 1:
        raise MetricError(f"a precision is above 0 and at most 1, not {precision:g}")
    top, right = scores.max(axis=1), scores.argmax(axis=1) == labels
    steps, first = np.unique(-top, return_inverse=True)  # from the highest down
    answered = np.bincount(first).cumsum()
    reached = np.bincount(first, weights=right).cumsum() / answered
    met = np.flatnonzero(reached >= precision)
    chosen = int(met[-1]) if len(met) else int(len(steps) - 1 - reached[::-1].argmax())
    if chosen == len(steps) - 1:
        return 0.0
    above, below = -float(steps[chosen]), -float(steps[chosen + 1])
    middle = (above + below) / 2
    return middle if middle > below else above


def calibration_error(top: Floats, right: NDArray[np.bool_]) -> tuple[float, list[dict[str, Any]]]:
    """Expected calibration error (Guo et al., equation 3) over bins (i/BINS, (i+1)/BINS], and the bins."""
    bins = np.clip(np.ceil(top * BINS).astype(int) - 1, 0, BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    sure = np.bincount(bins, weights=top, minlength=BINS)
    hits = np.bincount(bins, weights=right, minlength=BINS)
    rows = [
        {"pictures": int(n), "confidence": ratio(c, n), "accuracy": ratio(h, n)}
        for n, c, h in zip(counts, sure, hits, strict=True)
    ]
    return float(np.abs(hits - sure).sum() / len(top)), rows


def negative_log_likelihood(logits: NDArray[np.floating], labels: Labels, temperature: float) -> float:
    """Mean negative log-likelihood in nats."""
    return float(-log_softmax(logits.astype(np.float64) / temperature, axis=1)[np.arange(len(labels)), labels].mean())


def ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def check(logits: NDArray[np.floating], labels: Labels, keys: Sequence[str] = ()) -> None:
    """Raises MetricError unless logits [N, C] are finite, labels [N] below C, and N above 0."""
    if logits.ndim != 2 or logits.shape[0] != len(labels):
        raise MetricError(f"{len(labels)} labels have logits {logits.shape}, not [{len(labels)}, classes]")
    if not len(labels):
        raise MetricError("there is no picture to measure")
    if not ((labels >= 0) & (labels < logits.shape[1])).all():
        raise MetricError(f"labels are {labels.min()} to {labels.max()} among {logits.shape[1]} classes")
    if len(bad := np.flatnonzero(~np.isfinite(logits).all(axis=1))):
        first = keys[bad[0]] if len(keys) else f"number {bad[0]}"
        raise MetricError(
            f"the model gives logits that are not finite numbers for {len(bad)} of {len(labels)} pictures, "
            f"the first is {first}: its training has diverged or its export is broken"
        )
