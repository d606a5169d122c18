"""bundle.wire: what is packed comes out again, and nothing else is taken for it."""

import json
import random
import struct
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from bundle.wire import Answer, FrameError, count, has_pixels, known, pack, request, unpack

LOGITS = np.array([1.5, -2.25, 0, 3e38], np.float32)
MANIFEST = '{"name": "rüdiger"}'.encode()  # 20 bytes: as many as five logits
FRAME = pack(Answer("ok", "d1", LOGITS, MANIFEST))


@pytest.mark.parametrize(
    "answer",
    [
        Answer("ok", "d1", LOGITS),
        Answer("ok", "d1", LOGITS, MANIFEST),
        Answer(
            "ok", "d1", np.stack([LOGITS, -LOGITS, LOGITS]), MANIFEST, failed={1: "zu groß"}, seconds=0.25, workers=2
        ),
        Answer("manifest", "d1", manifest=MANIFEST),
        Answer("mismatch", "d1", manifest=MANIFEST),
        Answer("mismatch", "d1"),
        Answer("error", "d1", error="3 bytes of pixels, not 150,528: größer"),
    ],
)
def test_an_answer_comes_out_as_it_went_in(answer: Answer) -> None:
    found = unpack(pack(answer))
    for name in ("status", "digest", "manifest", "error", "failed", "seconds", "workers"):
        assert getattr(found, name) == getattr(answer, name)
    if answer.logits is None:
        assert found.logits is None
    else:
        assert found.logits is not None
        assert (str(found.logits.dtype), found.logits.tolist()) == ("float32", np.atleast_2d(answer.logits).tolist())


def test_logits_of_any_layout_travel_as_float32() -> None:
    strided = np.arange(8, dtype=np.float64)[::2]
    found = unpack(pack(Answer("ok", "d1", strided))).logits  # type: ignore[arg-type]
    assert found is not None
    assert found.tolist() == [[0, 2, 4, 6]]


def test_a_frame_cut_anywhere_is_refused() -> None:
    for length in range(len(FRAME)):
        with pytest.raises(FrameError, match=f"answer of {length} bytes is not a frame"):
            unpack(FRAME[:length])


@pytest.mark.parametrize(
    "change",
    [
        {"status": "fine"},
        {"status": ["ok"]},
        {"digest": 7},
        {"error": 7},
        {"logits": -4, "manifest": len(MANIFEST) + 20},
        {"logits": 15, "manifest": len(MANIFEST) + 1},
        {"status": "error", "logits": 20 + len(MANIFEST), "manifest": -4},
        {"logits": -(10**30)},
        {"logits": 20},
        {"logits": 16.0},
        {"logits": "16"},
        {"logits": 10**400},
        {"manifest": -1},
        {"count": 3},
        {"count": 10**12, "failed": {"1": "why"}},  # without taking memory for so many
        {"count": 0},
        {"count": "1"},
        {"failed": {"1": "why"}},
        {"failed": {"-1": "why"}},
        {"failed": {"x": "why"}},
        {"failed": [0]},
        {"workers": "1"},
        {"workers": -1},
        {"seconds": "1"},
        {"seconds": -1},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
        {"manifest": 0},
        {"manifest": None},
        {"status": None, "digest": None},
    ],
    ids=str,
)
def test_a_header_that_does_not_fit_is_refused(change: dict[str, Any]) -> None:
    (size,) = struct.unpack_from("<I", FRAME)
    head = json.dumps({**json.loads(FRAME[4 : 4 + size]), **change}).encode()
    with pytest.raises(FrameError):
        unpack(struct.pack("<I", len(head)) + head + FRAME[4 + size :])


@pytest.mark.parametrize("head", [b"", b"[]", b"7", b'"status"', b"null", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_a_header_that_is_no_object_is_refused(head: bytes) -> None:
    with pytest.raises(FrameError):
        unpack(struct.pack("<I", len(head)) + head)


def test_no_damage_gives_anything_but_an_answer_or_a_frame_error() -> None:
    dice = random.Random(0)
    for _ in range(1000):
        frame = bytearray(FRAME)
        for _ in range(dice.choice((1, 2, 8))):
            at = dice.randrange(len(frame))
            frame[at : at + dice.randrange(2)] = dice.randbytes(dice.randrange(3))
        with suppress(FrameError):
            unpack(bytes(frame))


def test_a_request_holds_an_entry_for_every_contract_and_what_is_known() -> None:
    sent = request({"c1": b"abc", "c2": b"d"}, {"d2", "d1"})
    assert sent == {"pixels:c1": b"abc", "pixels:c2": b"d", "known": b"d1,d2"}
    assert known(sent) == {"d1", "d2"}
    assert has_pixels(sent)


@pytest.mark.parametrize(
    ("text", "expected"), [(b"3", 3), (b"64", 64), (b"65", 0), (b"0", 0), (b"-1", 0), (b"x", 0), (b"", 0)]
)
def test_how_many_pictures_a_request_has_is_said(text: bytes, expected: int) -> None:
    assert count({"count": bytearray(text)}) == expected


def test_several_pictures_share_a_request() -> None:
    assert (count(request({"c1": b"abc"}, ())), count(request({"c1": b"abcabc"}, (), 2))) == (1, 2)


def test_a_request_may_be_without_pixels_and_know_nothing() -> None:
    assert known(request({}, ())) == frozenset()
    assert known({}) == frozenset()
    assert not has_pixels(request({}, ["d1"]))


def test_known_takes_what_torchserve_hands_over() -> None:
    assert known({"known": bytearray(b"d1,d2")}) == {"d1", "d2"}
    assert known({"known": b"d1,\xff"}) >= {"d1"}
