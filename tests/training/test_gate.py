"""What the gate lets through, what it stops and what it does not understand."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from training.data import Record
from training.gate import GateError, check, compare, no_worse, parse
from training.metrics import SCALARS, MetricError, Predictions, summarise

CLASSES = ("shoes", "hat", 'a>=b "<c>[d]', "boots")


@pytest.fixture(scope="module")
def summary():
    """9 of 10 right: the hat's one picture is named shoes; boots has no picture."""
    return summarise(answers([0] * 4 + [1] + [2] * 5, [0] * 5 + [2] * 5), 1, 0)


def answers(labels, said, classes=CLASSES, keys=None):
    keys = keys or range(len(labels))
    records = tuple(Record(f"{key}.jpg", int(label), "test", "0" * 64) for key, label in zip(keys, labels, strict=True))
    return Predictions(records, np.array(labels), np.eye(len(classes), dtype="f4")[said], classes)


@pytest.mark.parametrize(
    "requirement",
    [
        "accuracy>=0.9",  # exactly
        " accuracy >= .9 ",
        "accuracy<=0.9",
        "recall[shoes]>=1",
        "precision[shoes]<=0.8",
        'recall[a>=b "<c>[d]]>=1',
        "recall[hat]<=0",
        "pictures>=10",
        "nll<=5",
    ],
)
def test_met(summary, requirement):
    assert check(summary, [requirement]) == []


@pytest.mark.parametrize(
    ("requirement", "sentence"),
    [
        ("accuracy>=0.9000001", "accuracy >= 0.9000001 is required, but it is 0.9"),
        ("accuracy>=0.95", "accuracy >= 0.95 is required, but it is 0.9"),
        ("recall[hat]>=0.5", "recall[hat] >= 0.5 is required, but it is 0"),
        ("recall[boots]>=0", "recall[boots] >= 0 is required, but these pictures cannot tell"),
        ("top5>=0", "top5 >= 0 is required, but these pictures cannot tell"),
        ("ece<=0.1", "ece <= 0.1 is required, but it is 0.4"),
    ],
)
def test_not_met(summary, requirement, sentence):
    (found,) = check(summary, ["pictures>=1", requirement])
    assert found.startswith(sentence)


@pytest.mark.parametrize(
    "requirement", ["accuracy", "accuracy>0.9", "accuracy=0.9", "", "x>=0.9", "hat>=0.9", "recall>=0.9"]
)
def test_unknown_metrics_are_refused_with_those_there_are(requirement):
    with pytest.raises(GateError) as refused:
        parse(requirement, CLASSES)
    assert all(name in str(refused.value) for name in (*SCALARS, "recall[class]", "f1[class]"))
    assert repr(requirement) in str(refused.value)


@pytest.mark.parametrize(
    ("requirement", "message"),
    [
        ("accuracy>=90", "lies between 0 and 1: write 0.9 for 90%"),
        ("accuracy>=90%", "'90%' is not a number: write 0.9 for 90%"),
        ("accuracy>=nan", "not a number"),
        ("accuracy>=inf", "not a number"),
        ("recall[hats]>=0.9", "there is no class hats, there are shoes, hat,"),
        ("accuracy[hat]>=0.9", "there is no metric accuracy[hat], there are accuracy,"),
    ],
)
def test_senseless_requirements_are_refused(summary, requirement, message):
    with pytest.raises(GateError) as refused:
        check(summary, [requirement])
    assert message in str(refused.value)


def test_every_scalar_can_be_required(summary):
    for name in SCALARS:
        assert name in summary
        assert str(parse(f"{name}>=0.5", CLASSES)) == f"{name} >= 0.5"
    # and nothing else of a summary is a number
    assert {key for key, value in summary.items() if value is None or isinstance(value, (int, float))} == set(SCALARS)


def two(won, lost, both=20):
    """`mine` alone right on `won` pictures, `other` alone on `lost`, both on `both`."""
    labels = [0] * (won + lost + both)
    mine = answers(labels, [0] * won + [1] * lost + [0] * both)
    return mine, answers(labels, [1] * won + [0] * lost + [0] * both)


@pytest.mark.parametrize(
    ("won", "lost", "stopped"),
    [(0, 0, False), (0, 4, False), (0, 5, True), (2, 9, True), (3, 9, False), (10, 2, False), (100, 100, False)],
)
def test_mcnemar(won, lost, stopped):
    mine, other = two(won, lost)
    found = compare(mine, other)
    assert (found.pictures, found.won, found.lost) == (20 + won + lost, won, lost)
    assert found.p == pytest.approx(binom.sf(lost - 1, won + lost, 0.5))  # P(as many lost or more)
    sentence = no_worse(mine, other)
    assert bool(sentence) == stopped
    if stopped:
        assert f"it loses {lost} and wins {won}" in sentence


def test_the_level_can_be_set():
    mine, other = two(0, 5)  # p = 1/32
    assert no_worse(mine, other, alpha=0.05)
    assert not no_worse(mine, other, alpha=0.03)


def test_pictures_are_paired_by_key_and_classes_by_name():
    mine = answers([0, 1, 2], [0, 1, 1], ("a", "b", "c"), keys="xyz")
    #  the same pictures in another order, by a model with its classes in another order: z wrong, y right, x wrong
    other = answers([0, 1, 2], [1, 1, 1], ("c", "b", "a"), keys="zyx")
    found = compare(mine, other)
    assert (found.won, found.lost) == (1, 0)


def test_other_pictures_or_labels_cannot_be_compared():
    mine = answers([0, 1], [0, 1])
    with pytest.raises(MetricError, match="not measured on the same pictures"):
        compare(mine, answers([0, 1], [0, 1], keys="xy"))
    with pytest.raises(MetricError, match="not measured against the same labels"):
        compare(mine, replace(mine, labels=np.array([1, 0])))
