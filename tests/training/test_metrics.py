"""Figures against scikit-learn, by hand, and where they cannot be had."""

import json

import numpy as np
import pytest
from drawn import CLASSES, catalogue, manifest
from sklearn.metrics import average_precision_score, f1_score, log_loss, roc_auc_score, top_k_accuracy_score

from bundle.manifest import Decision
from gateway.schemas import decide
from training.data import Record
from training.metrics import GRID, MetricError, Predictions, fit_temperature, probabilities, summarise, threshold_for


def predictions(labels, logits, classes=None):
    logits = np.asarray(logits, np.float32)
    records = tuple(Record(f"{i}.jpg", int(label), "validation", f"{i:064}") for i, label in enumerate(labels))
    names = classes or tuple(f"c{i}" for i in range(logits.shape[1]))
    return Predictions(records, np.asarray(labels, np.int64), logits, names)


@pytest.fixture(scope="module")
def some():
    """400 answers of a middling model over seven classes."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 7, 400)
    logits = random.normal(0, 2, (400, 7))
    logits[np.arange(400), labels] += 3
    return predictions(labels, logits)


def test_figures_are_those_of_scikit_learn(some):
    summary = summarise(some, 1.7, 0.6)
    scores = probabilities(some.logits, 1.7)
    assert summary["pictures"] == 400
    assert summary["accuracy"] == np.mean(scores.argmax(1) == some.labels)
    assert summary["top5"] == top_k_accuracy_score(some.labels, scores, k=5)
    assert summary["macro_f1"] == pytest.approx(f1_score(some.labels, scores.argmax(1), average="macro"))
    assert summary["roc_auc"] == pytest.approx(roc_auc_score(some.labels, scores, multi_class="ovr"))
    one_hot = np.eye(7)[some.labels]
    assert summary["pr_auc"] == pytest.approx(average_precision_score(one_hot, scores))
    assert summary["nll"] == pytest.approx(log_loss(some.labels, scores))
    top = scores.max(1)
    assert summary["coverage"] == np.mean(top >= 0.6)
    assert summary["precision_at_threshold"] == pytest.approx(np.mean((scores.argmax(1) == some.labels)[top >= 0.6]))
    assert np.array(summary["confusion"]).sum() == 400
    assert np.trace(summary["confusion"]) == round(400 * summary["accuracy"])
    assert summary["notes"] == []
    json.dumps(summary, allow_nan=False)


def test_intervals_are_wilsons():
    # 8 of 10: 0.4902 to 0.9433 (Brown, Cai & DasGupta, Statistical Science 16, 2001, formula 4).
    logits = np.eye(2)[[0] * 8 + [1] * 2]
    summary = summarise(predictions([0] * 10, logits), 1, 0)
    assert summary["accuracy"] == 0.8
    assert (summary["accuracy_low"], summary["accuracy_high"]) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_probabilities_are_the_gateways_to_the_last_bit(some):
    classes = tuple(f"c{i}" for i in range(7))
    served = manifest(Decision(temperature=1.3, threshold=0.5), classes)
    for logits, row in zip(some.logits, probabilities(some.logits, 1.3), strict=True):
        answer = decide(served, logits)
        assert answer.probability == row.max()
        assert answer.top[0].label == classes[row.argmax()]


def test_equal_logits_count_as_they_are_served():
    # Six equal logits: serving lists the first five, so that the label of the last is not among them.
    summary = summarise(predictions([0, 5], np.zeros((2, 6))), 1, 0)
    assert (summary["accuracy"], summary["top5"]) == (0.5, 0.5)


def test_calibration_error_by_hand():
    # Bins of 1/15: 0.9 is in (13/15, 14/15], 0.6 in (8/15, 9/15]; |3/4 - 0.9| * 4/6 + |2/2 - 0.6| * 2/6.
    logit = np.log([9, 9, 9, 9, 1.5, 1.5])
    labels = [0, 0, 0, 1, 0, 0]
    summary = summarise(predictions(labels, np.stack([logit, np.zeros(6)], 1)), 1, 0)
    assert summary["ece"] == pytest.approx(0.15 * 4 / 6 + 0.4 * 2 / 6, abs=1e-6)
    filled = {i: row for i, row in enumerate(summary["reliability"]["after"]) if row["pictures"]}
    assert {i: row["pictures"] for i, row in filled.items()} == {13: 4, 8: 2}
    assert filled[13]["accuracy"] == 0.75
    assert filled[13]["confidence"] == pytest.approx(0.9)


@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_the_temperature_is_found_and_calibrates(true):
    random = np.random.default_rng(1)
    z = random.normal(0, 2, (4000, 5))
    labels = np.array([random.choice(5, p=p) for p in probabilities(z)])
    found = fit_temperature(z * true, labels)
    assert found == pytest.approx(true, rel=0.08)
    summary = summarise(predictions(labels, z * true), found, 0)
    assert summary["ece"] < 0.02
    if true != 1:
        assert summary["ece_before"] > 3 * summary["ece"]
    assert summary["nll"] <= summary["nll_before"]
    assert summary["accuracy"] == np.mean(z.argmax(1) == labels)  # scaling changes no answer


def test_no_mistake_says_nothing_of_the_temperature():
    assert fit_temperature(np.eye(3), np.arange(3)) == 1.0


@pytest.mark.parametrize("precision", [0.5, 0.8, 0.9, 0.97, 1.0])
def test_the_threshold_is_the_smallest_that_meets_the_precision(some, precision):
    scores = probabilities(some.logits)
    top, right = scores.max(1), scores.argmax(1) == some.labels
    threshold = threshold_for(scores, some.labels, precision)
    assert right[top >= threshold].mean() >= precision
    for lower in np.unique(top[top < threshold]):
        assert right[top >= lower].mean() < precision


def test_the_threshold_keeps_its_distance_from_every_answer():
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    assert threshold_for(scores, np.array([0, 0, 1]), 1.0) == pytest.approx(0.75)
    assert threshold_for(scores, np.array([0, 0, 1]), 0.6) == 0
    # No threshold makes these right 8 of 10 times: the best there is, 2 of 3.
    assert threshold_for(np.vstack([scores, [[0.6, 0.4]]]), np.array([1, 0, 0, 1]), 0.8) == pytest.approx(0.65)
    with pytest.raises(MetricError, match="above 0 and at most 1, not 90"):
        threshold_for(scores, np.array([0, 0, 1]), 90)


def test_a_class_without_pictures_has_no_figures():
    #             label 0, 0, 1, 1; answers 0, 2, 1, 1
    summary = summarise(predictions([0, 0, 1, 1], np.eye(4)[[0, 2, 1, 1]]), 1, 0)
    rows = summary["per_class"]
    assert [row["recall"] for row in rows] == [0.5, 1.0, None, None]
    assert [row["precision"] for row in rows] == [1.0, 1.0, 0.0, None]
    assert [row["f1"] for row in rows] == [pytest.approx(2 / 3), 1.0, 0.0, None]
    assert [row["roc_auc"] is None for row in rows] == [False, False, True, True]
    assert summary["macro_recall"] == 0.75  # of the two that there are
    assert summary["macro_f1"] == pytest.approx(5 / 6)
    assert "2 of 4 classes have no picture here, nothing is known of them: c2, c3." in summary["notes"]
    assert summary["top5"] is None  # among four classes it would say nothing


def test_a_split_of_one_class_has_no_curves():
    summary = summarise(predictions([1, 1, 1], np.eye(2)[[1, 1, 0]]), 1, 0)
    assert summary["accuracy"] == pytest.approx(2 / 3)
    assert summary["roc_auc"] is summary["pr_auc"] is summary["curves"]["roc"]["mean"] is None
    assert any("All pictures are of one class" in note for note in summary["notes"])


def test_nothing_answered_has_no_precision():
    summary = summarise(predictions([0, 1], np.zeros((2, 3))), 1, 0.9)
    assert (summary["coverage"], summary["precision_at_threshold"]) == (0.0, None)


def test_mistakes_come_surest_first():
    logits = [[5, 0], [1, 0], [3, 0], [0, 4], [2, 0]]
    summary = summarise(predictions([0, 1, 1, 1, 1], logits), 1, 0)
    assert [m["key"] for m in summary["mistakes"]] == ["2.jpg", "4.jpg", "1.jpg"]
    assert summary["mistakes"][0] == {
        "key": "2.jpg",
        "label": "c1",
        "answer": "c0",
        "probability": pytest.approx(1 / (1 + np.exp(-3))),
    }


def test_curves_by_hand():
    # For c1, by falling score: a hit, a miss, a hit. Precision is 1 up to recall 1/2, then 2/3.
    summary = summarise(predictions([1, 0, 1], [[0, 3], [0, 2], [0, 1]]), 1, 0)
    pr, roc = (np.array(summary["curves"][kind]["weakest"]["c1"]) for kind in ("pr", "roc"))
    assert pr == pytest.approx(np.where(GRID <= 0.5, 1, 2 / 3))
    assert roc[0] == 0.5
    assert roc[-1] == 1
    assert (np.diff(roc) >= 0).all()


@pytest.mark.parametrize(
    ("labels", "logits", "message"),
    [
        ([], np.zeros((0, 2)), "no picture to measure"),
        ([0, 1, 1], [[0, 1], [np.nan, 0], [0, np.inf]], r"for 2 of 3 pictures, the first is 1\.jpg"),
        ([0, 2], np.zeros((2, 2)), "labels are 0 to 2 among 2 classes"),
        ([0], np.zeros((2, 2)), r"1 labels have logits \(2, 2\)"),
        ([0], np.zeros(2), r"1 labels have logits \(2,\)"),
    ],
)
def test_what_cannot_be_measured_is_refused(labels, logits, message):
    with pytest.raises(MetricError, match=message):
        predictions(labels, logits, ("a", "b"))


def test_drawn_pictures_are_named_mostly_right():
    """Of the tests' own model: neither perfect nor useless, or the tests that use it could not fail."""
    from drawn import predictions as drawn

    assert 0.8 < drawn(catalogue(10)).right.mean() < 1
    assert len(CLASSES) == 8
