"""What PRECISION=bf16 runs on a CPU: OpenVINO where the CPU has AMX and the answers are close, else ONNX Runtime."""

import bf16
import handler
import numpy as np
import pytest
from convolutional import SHAPE, made
from tiny import other_weights, tiny_bundle

from bundle import golden, wire
from bundle.cpus import features

needs_amx = pytest.mark.skipif("amx_bf16" not in features(), reason="this CPU has no AMX")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def model(folder, monkeypatch):
    def load():
        monkeypatch.setenv("PRECISION", "bf16")
        return handler.Model(folder)

    return load


def exact(folder, pictures):
    return handler.onnx_runner(folder)(pictures)


@needs_amx
def test_every_number_of_pictures_gets_its_own_answers(folder, model, capfd):
    loaded, pictures = model(), golden.draw(5, *SHAPE[:2], seed=9)
    right = exact(folder, pictures)
    for shares in ([1], [2], [5], [1, 3, 1]):
        parts = np.split(pictures[: sum(shares)], np.cumsum(shares)[:-1])
        entries = [wire.request({loaded.manifest.input.contract: part.tobytes()}, [], len(part)) for part in parts]
        logits = np.concatenate([wire.unpack(frame).logits for frame in loaded.answer(entries)])
        away = np.abs(logits - right[: sum(shares)]).max()
        assert 0 < away <= golden.ROUNDINGS * bf16.EPSILON * np.ptp(right, axis=1).max()
    assert "not served" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda patch: patch.setattr(bf16, "features", set), "this CPU has no AMX"),
        pytest.param(
            lambda patch: patch.setattr(bf16, "EPSILON", 1e-9), "the model does not give the answers", marks=needs_amx
        ),
        pytest.param(lambda patch: patch.setenv("THREADS", "-2"), "Exception from", marks=needs_amx),
    ],
)
def test_where_it_cannot_be_served_float32_is_and_the_log_says_why(folder, model, monkeypatch, capfd, spoil, why):
    spoil(monkeypatch)
    pictures = golden.draw(3, *SHAPE[:2], seed=9)
    np.testing.assert_array_equal(model().run(pictures), exact(folder, pictures))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"not served in bfloat16: {why}")


def test_a_bundle_that_is_altered_is_refused_as_ever(tmp_path, monkeypatch):
    tiny_bundle(tmp_path / "tiny")
    expected = other_weights(tmp_path / "tiny")
    monkeypatch.setenv("PRECISION", "bf16")
    with pytest.raises(handler.manifest.BundleError, match=expected):
        handler.Model(tmp_path / "tiny")
