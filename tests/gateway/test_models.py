"""Which manifest names which answer, while servers change behind the gateway."""

import threading
import time
from contextlib import nullcontext

import pytest
from tiny import picture

from gateway import errors
from gateway.client import Client
from gateway.models import Model


def gateway_model(torchserve):
    return Model("tiny", Client(torchserve.target, 8), threading.Semaphore(2), 10_000_000)


def ask(model, colour):
    manifest, logits = model.predict(picture(colour), time.monotonic() + 5, lambda _: nullcontext())
    return manifest.version, manifest.classes[logits.argmax()]


def test_the_manifest_is_sent_once(torchserve, tiny):
    torchserve.models["tiny"] = tiny["1"]
    model = gateway_model(torchserve)
    assert [ask(model, colour) for colour in ("red", "green", "blue")] == [("1", "red"), ("1", "green"), ("1", "blue")]
    digest = tiny["1"].manifest.digest.encode()
    assert [call["known"] for call in torchserve.calls] == [b"", digest, digest, digest]


def test_another_version_with_another_input_and_other_classes_takes_over_between_two_pictures(torchserve, tiny):
    model = gateway_model(torchserve)
    seen = []
    for version in "1221121":
        torchserve.models["tiny"] = tiny[version]
        seen.append(ask(model, "green"))
    assert seen == [(v, {"1": "green", "2": "vert"}[v]) for v in "1221121"]


def test_once_both_are_known_one_call_more_is_enough_whoever_takes_it(torchserve, tiny):
    model = gateway_model(torchserve)
    for version in "12":
        torchserve.models["tiny"] = tiny[version]
        ask(model, "red")
    torchserve.calls.clear()
    torchserve.models["tiny"] = tiny["1"]
    assert ask(model, "blue") == ("1", "blue")
    assert len(torchserve.calls) == 2
    assert {len(v) for k, v in torchserve.calls[1].items() if k.startswith("pixels:")} == {32 * 32 * 3, 48 * 48 * 3}


def test_a_manifest_that_this_decoder_disagrees_with_is_not_used(torchserve, tiny, monkeypatch):
    from bundle import picture as pictures

    torchserve.models["tiny"] = tiny["1"]
    load = pictures.load
    monkeypatch.setattr(pictures, "load", lambda *args: load(*args) ^ 1)
    with pytest.raises(errors.BadAnswer, match=r"input\.check.*Pillow"):
        ask(gateway_model(torchserve), "red")


def test_an_answer_with_another_number_of_logits_than_classes_is_refused(torchserve, tiny, monkeypatch):
    torchserve.models["tiny"] = tiny["1"]
    model = gateway_model(torchserve)
    ask(model, "red")
    run = tiny["1"].run
    monkeypatch.setattr(tiny["1"], "run", lambda pixels: run(pixels)[:, :2])
    with pytest.raises(errors.BadAnswer, match="2 logits came for 3 classes"):
        ask(model, "red")


def test_a_frame_that_is_none_is_a_bad_answer(torchserve, tiny, monkeypatch):
    torchserve.models["tiny"] = tiny["1"]
    monkeypatch.setattr(tiny["1"], "answer", lambda requests: [b"\x00"])
    with pytest.raises(errors.BadAnswer, match="is not a frame"):
        ask(gateway_model(torchserve), "red")


def test_a_bad_picture_makes_no_call(torchserve, tiny):
    torchserve.models["tiny"] = tiny["1"]
    model = gateway_model(torchserve)
    ask(model, "red")
    torchserve.calls.clear()
    with pytest.raises(errors.UnsupportedPicture):
        model.predict(b"no picture", time.monotonic() + 5, lambda _: nullcontext())
    assert not torchserve.calls


def test_manifests_do_not_pile_up(torchserve, tmp_path):
    import handler
    from tiny import tiny_bundle

    model = gateway_model(torchserve)
    for version in range(10):
        tiny_bundle(tmp_path / str(version), version=str(version))
        torchserve.models["tiny"] = handler.Model(tmp_path / str(version))
        assert ask(model, "red") == (str(version), "red")
    assert len(torchserve.calls[-1]["known"].split(b",")) == 8
