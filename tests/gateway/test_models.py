"""Which manifest names which answer, while servers change behind the gateway."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from fake_torchserve import FakeTorchServe
from tiny import picture

from bundle import wire
from gateway import errors
from gateway.client import Client, Split
from gateway.models import Model


def gateway_model(torchserve):
    return Model("tiny", Client(torchserve.target, 8), ThreadPoolExecutor(2), 10_000_000)


def ask(model, colour):
    def answer(manifest, logits):
        return manifest.version, manifest.classes[logits.argmax()]

    return model.predict(picture(colour), time.monotonic() + 5, lambda *_: None, answer)


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
    frame = wire.pack(wire.Answer("ok", tiny["1"].manifest.digest, np.zeros((1, 2), np.float32)))
    monkeypatch.setattr(tiny["1"], "answer", lambda requests: [frame])
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
        model.predict(b"no picture", time.monotonic() + 5, lambda *_: None, lambda *found: found)
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


def at_once(torchserve, model, colours):
    """What each of several callers gets while the model server is busy with a first one."""
    torchserve.hold.clear()
    model._join.limit = 1.0
    torchserve.calls.clear()
    with ThreadPoolExecutor(len(colours) + 1) as callers:
        first = callers.submit(ask, model, "red")
        deadline = time.monotonic() + 5
        while not torchserve.calls and time.monotonic() < deadline:
            time.sleep(0.01)
        rest = [callers.submit(ask, model, colour) for colour in colours]
        while len(model._join._waiting) < len(colours) and time.monotonic() < deadline:
            time.sleep(0.01)
        torchserve.hold.set()
        return [first.result(), *(future.result() for future in rest)]


COLOURS = ["green", "blue", "red", "blue", "green"]


def test_callers_share_a_call_and_each_gets_its_own_answer(torchserve, tiny):
    torchserve.models["tiny"] = tiny["1"]
    model = gateway_model(torchserve)
    ask(model, "red")
    assert at_once(torchserve, model, COLOURS) == [("1", colour) for colour in ["red", *COLOURS]]
    assert [call.get("count") for call in torchserve.calls] == [None, b"5"]


def test_where_one_of_them_fails_the_others_do_not(torchserve, tiny, monkeypatch):
    torchserve.models["tiny"] = tiny["1"]
    model = gateway_model(torchserve)
    ask(model, "red")
    run = tiny["1"].run

    def choke(pixels):
        if (pixels.mean(axis=(1, 2))[:, 2] > 200).any():
            raise RuntimeError("no blue")
        return run(pixels)

    monkeypatch.setattr(tiny["1"], "run", choke)
    with pytest.raises(errors.BadAnswer, match="no blue"):
        at_once(torchserve, model, COLOURS)
    assert at_once(torchserve, model, ["green", "red"]) == [("1", "red"), ("1", "green"), ("1", "red")]


def test_another_version_that_takes_a_shared_call_answers_each(torchserve, tiny):
    model = gateway_model(torchserve)
    for version in "21":
        torchserve.models["tiny"] = tiny[version]
        ask(model, "red")
    torchserve.models["tiny"] = tiny["2"]
    names = {"red": "rouge", "green": "vert", "blue": "bleu"}
    assert at_once(torchserve, model, COLOURS) == [("2", names[colour]) for colour in ["red", *COLOURS]]


def test_a_server_that_knows_one_picture_a_call_is_asked_for_each(torchserve, tiny, monkeypatch):
    """The one before calls were shared, which a rollout has beside gateways that share them."""
    torchserve.models["tiny"] = tiny["1"]
    model = gateway_model(torchserve)
    ask(model, "red")
    answer = tiny["1"].answer

    def one_each(requests):
        frames = answer([{key: value for key, value in request.items() if key != "count"} for request in requests])
        return [wire.pack(replace(wire.unpack(frame), workers=0)) for frame in frames]

    monkeypatch.setattr(tiny["1"], "answer", one_each)
    assert at_once(torchserve, model, COLOURS) == [("1", colour) for colour in ["red", *COLOURS]]


def test_a_canary_that_hangs_leaves_the_main_server_its_time(torchserve, tiny):
    canary, failures = FakeTorchServe(), []
    torchserve.models["tiny"] = canary.models["tiny"] = tiny["1"]
    canary.hold.clear()
    split = Split(Client(torchserve.target, 8), Client(canary.target, 8), 1.0, lambda: failures.append(1))
    model = Model("tiny", split, ThreadPoolExecutor(2), 10_000_000, 0.4)
    try:
        assert [ask(model, colour) for colour in ("red", "green")] == [("1", "red"), ("1", "green")]
    finally:
        canary.end()
    assert len(failures) == 3  # for the manifest, too
