"""Frozen features and the head on them."""

import dataclasses

import learner
import numpy as np
import pytest
import torch
from drawn import catalogue
from sklearn.linear_model import LogisticRegression

from bundle import picture
from training import quick


@pytest.fixture(scope="module")
def drawn():
    return catalogue(0, 3)


@pytest.mark.parametrize("few", [0, 1000])
def test_features_are_those_of_the_pixels_served(drawn, few, monkeypatch):
    monkeypatch.setattr(quick, "FEW", few)  # through ONNX Runtime, or torch
    base = learner.base(8)
    found = quick.features(base, drawn, drawn.records, quiet=True)
    pixels = np.stack([picture.load(drawn.read(record), base.resize) for record in drawn.records])
    with torch.no_grad():
        assert np.allclose(found, base.model.features(torch.from_numpy(pixels)), atol=1e-4)
    assert found.std(0).max() > 0.01


def test_only_new_pictures_are_computed(drawn, tmp_path, monkeypatch):
    base = learner.base(8)
    computed = []
    runner = quick._runner
    monkeypatch.setattr(
        quick, "_runner", lambda *args: lambda pixels: computed.append(len(pixels)) or runner(*args)(pixels)
    )
    first = quick.features(base, drawn, drawn.records[:20], cache=tmp_path, quiet=True)
    assert np.array_equal(quick.features(base, drawn, drawn.records[:20], cache=tmp_path, quiet=True), first)
    assert computed == [20]
    more = quick.features(base, drawn, drawn.records, cache=tmp_path, quiet=True)
    assert computed == [20, 4]
    assert np.array_equal(more[:20], first)

    other = dataclasses.replace(base, digest="1" * 64)
    quick.features(other, drawn, drawn.records[:2], cache=tmp_path, quiet=True)
    smaller = dataclasses.replace(base, resize=dataclasses.replace(base.resize, shorter_side=40))
    quick.features(smaller, drawn, drawn.records[:2], cache=tmp_path, quiet=True)
    assert computed == [20, 4, 2, 2]  # of other weights or other pixels nothing is known
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-50])
    quick.features(base, drawn, drawn.records[:3], cache=tmp_path, quiet=True)
    assert computed == [20, 4, 2, 2, 3]  # nor where the file is damaged


@pytest.fixture(scope="module")
def blobs():
    """Features [300, 12] of four overlapping classes, with means and deviations far from 0 and 1."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 300)
    centres = random.normal(0, 1, (4, 12))
    x = (centres[labels] + random.normal(0, 1.5, (300, 12))) * random.uniform(0.1, 20, 12) + random.uniform(-9, 9, 12)
    return x.astype(np.float32), labels


def test_the_head_is_the_logistic_regression_of_scikit_learn(blobs):
    x, labels = blobs
    head = quick.train_head(x, labels, 4)
    scaled = (x - x.mean(0)) / x.std(0)
    theirs = LogisticRegression(C=1 / (head.strength * len(x)), max_iter=2000, tol=1e-6).fit(scaled, labels)
    probabilities = torch.from_numpy(head.logits(x)).softmax(1).numpy()
    assert np.abs(probabilities - theirs.predict_proba(scaled)).max() < 2e-3


def test_the_strength_is_chosen_where_unseen_pictures_are_likeliest(blobs):
    x, labels = blobs
    head = quick.train_head(x, labels, 4)
    assert 1e-4 < head.strength < 1  # noise wants some, structure not too much
    assert 0.5 < head.accuracy < 0.95
    noise = quick.train_head(np.random.default_rng(1).normal(size=(300, 12)).astype(np.float32), labels, 4)
    assert noise.strength == 1
    assert noise.accuracy < 0.45


def test_the_seed_draws_the_parts_only(blobs):
    x, labels = blobs
    heads = [quick.train_head(x, labels, 4, seed) for seed in (0, 0, 1)]
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert heads[0].accuracy == heads[1].accuracy != heads[2].accuracy


def test_a_class_with_one_picture_is_learnt_too():
    x = np.eye(3, dtype=np.float32)[[0, 0, 0, 1, 1, 1, 2]]
    head = quick.train_head(x, np.array([0, 0, 0, 1, 1, 1, 2]), 3)
    assert head.logits(np.eye(3, dtype=np.float32)).argmax(1).tolist() == [0, 1, 2]
    assert np.isnan(head.accuracy)


def test_it_goes_into_the_model(blobs):
    base = learner.base(3)
    features = np.random.default_rng(0).normal(size=(30, 16)).astype(np.float32)
    head = quick.train_head(features, np.arange(30) % 3, 3)
    head.put_into(base.model)
    with torch.no_grad():
        assert np.allclose(base.model.head(torch.from_numpy(features)), head.logits(features), atol=1e-5)
