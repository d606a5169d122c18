"""The handler without TorchServe: what it answers, and what it refuses to load."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import handler
import numpy as np
import pytest
from tiny import DAMAGES, tiny_bundle

from bundle import golden, manifest, wire
from bundle.manifest import BundleError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    tiny_bundle(folder)
    return handler.Model(folder)


def pixels(loaded, seed=0):
    return golden.draw(1, *loaded.shape[:2], seed=seed)[0].tobytes()


def request(loaded, data, known=(), count=1):
    entries = wire.request({loaded.manifest.input.contract: data}, known, count)
    return {key: bytearray(value) for key, value in entries.items()}


def test_a_batch_is_answered_in_order_with_the_logits_of_each_picture(loaded):
    pictures = golden.draw(5, *loaded.shape[:2])
    answers = [wire.unpack(frame) for frame in loaded.answer([request(loaded, p.tobytes()) for p in pictures])]
    assert [answer.status for answer in answers] == ["ok"] * 5
    np.testing.assert_array_equal(np.concatenate([answer.logits for answer in answers]), loaded.run(pictures))


@pytest.mark.parametrize("shares", [(5,), (1, 3, 1), (2, 3), (1, 1, 1, 1, 1)])
def test_pictures_that_share_a_request_are_answered_in_order(loaded, shares):
    pictures, start, requests = golden.draw(5, *loaded.shape[:2]), 0, []
    for share in shares:
        requests.append(request(loaded, pictures[start : start + share].tobytes(), count=share))
        start += share
    answers = [wire.unpack(frame) for frame in loaded.answer(requests)]
    assert [len(answer.logits) for answer in answers] == list(shares)
    np.testing.assert_array_equal(np.concatenate([answer.logits for answer in answers]), loaded.run(pictures))


def test_an_answer_tells_how_long_it_took_and_how_many_workers_there_are(loaded, monkeypatch):
    def slow(batch):
        time.sleep(0.05)
        return run(batch)

    run = loaded.run
    monkeypatch.setattr(loaded, "run", slow)
    monkeypatch.setattr(loaded, "workers", 3)
    answers = [wire.unpack(frame) for frame in loaded.answer([request(loaded, pixels(loaded))] * 4)]  # two by two
    assert {answer.workers for answer in answers} == {3}
    assert 0.1 <= min(answer.seconds for answer in answers) == max(answer.seconds for answer in answers) < 1


def test_the_model_never_gets_more_pictures_than_its_caches_hold(loaded, monkeypatch):
    run, sizes = loaded.run, []
    monkeypatch.setattr(loaded, "run", lambda batch: sizes.append(len(batch)) or run(batch))
    loaded.answer([request(loaded, golden.draw(5, *loaded.shape[:2]).tobytes(), count=5)])
    assert sizes == [2, 2, 1]


def test_a_picture_that_fails_is_named_and_those_that_share_its_request_are_answered(loaded, monkeypatch):
    run, pictures = loaded.run, golden.draw(3, *loaded.shape[:2])

    def choke(batch):
        if (batch == pictures[1]).all(axis=(1, 2, 3)).any():
            raise RuntimeError("boom")
        return run(batch)

    monkeypatch.setattr(loaded, "run", choke)
    (frame,) = loaded.answer([request(loaded, pictures.tobytes(), count=3)])
    answer = wire.unpack(frame)
    assert (answer.status, answer.failed) == ("ok", {1: "RuntimeError: boom"})
    np.testing.assert_array_equal(answer.logits[[0, 2]], run(pictures[[0, 2]]))


@pytest.mark.parametrize("count", [0, 1, 3, 65])
def test_a_count_that_does_not_fit_its_pixels_is_refused(loaded, count):
    entries = request(loaded, pixels(loaded) * 2) | {"count": str(count).encode()}
    (frame,) = loaded.answer([entries])
    assert (wire.unpack(frame).status, "6144 bytes" in wire.unpack(frame).error) == ("error", True)


def test_the_manifest_comes_only_where_it_is_not_known(loaded):
    digest = loaded.manifest.digest
    unknown, known, other = loaded.answer(
        [
            request(loaded, pixels(loaded)),
            request(loaded, pixels(loaded), [digest]),
            request(loaded, pixels(loaded), ["x"]),
        ]
    )
    assert manifest.parse(wire.unpack(unknown).manifest) == loaded.manifest
    assert wire.unpack(known).manifest == b""
    assert wire.unpack(other).manifest != b""


def test_without_pixels_the_manifest_alone_is_answered(loaded):
    (frame,) = loaded.answer([wire.request({}, [])])
    answer = wire.unpack(frame)
    assert (answer.status, answer.digest, answer.logits) == ("manifest", loaded.manifest.digest, None)
    assert manifest.parse(answer.manifest) == loaded.manifest


def test_pixels_of_another_contract_are_never_guessed_at(loaded):
    (frame,) = loaded.answer([wire.request({"another": pixels(loaded)}, [])])
    assert wire.unpack(frame).status == "mismatch"


def test_of_several_entries_it_takes_its_own(loaded):
    entries = wire.request({"another": b"xyz", loaded.manifest.input.contract: pixels(loaded)}, [])
    (frame,) = loaded.answer([entries])
    assert wire.unpack(frame).status == "ok"


def test_a_poisoned_item_fails_alone(loaded):
    """Wrong length, and pixels that the runtime chokes on: the neighbours get their own answers."""
    good = request(loaded, pixels(loaded))
    frames = loaded.answer([good, request(loaded, b"short"), {}, good])
    assert [wire.unpack(frame).status for frame in frames] == ["ok", "error", "manifest", "ok"]
    assert "5 bytes of pixels for 1, not 3072" in wire.unpack(frames[1]).error


def test_where_the_batch_fails_its_items_run_one_by_one(loaded, monkeypatch):
    run, poison = loaded.run, np.frombuffer(pixels(loaded, seed=5), np.uint8).reshape(1, *loaded.shape)

    def choke(batch):
        if (batch == poison).all(axis=(1, 2, 3)).any():
            raise RuntimeError("boom")
        return run(batch)

    monkeypatch.setattr(loaded, "run", choke)
    frames = loaded.answer([request(loaded, pixels(loaded, seed)) for seed in (1, 5, 2)])
    assert [wire.unpack(frame).status for frame in frames] == ["ok", "error", "ok"]
    assert "boom" in wire.unpack(frames[1]).error


def test_logits_that_are_not_finite_are_an_error_of_their_item(loaded, monkeypatch):
    monkeypatch.setattr(loaded, "run", lambda batch: np.array([[1, 2, 3], [np.nan, 0, 0]], np.float32))
    frames = loaded.answer([request(loaded, pixels(loaded))] * 2)
    assert [wire.unpack(frame).status for frame in frames] == ["ok", "error"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_bundle_is_refused_with_the_file_and_the_reason(damage, tmp_path, capfd, monkeypatch):
    tiny_bundle(tmp_path / "tiny")
    expected = damage(tmp_path / "tiny")
    with pytest.raises(BundleError, match=expected):
        handler.Model(tmp_path / "tiny")
    context = SimpleNamespace(
        system_properties={"model_dir": str(tmp_path / "tiny"), "gpu_id": None},
        manifest={"model": {"modelName": "tiny"}},
    )
    monkeypatch.setattr(handler, "_model", None)
    with pytest.raises(RuntimeError):
        handler.handle(None, context)
    assert f"tiny: refused: {expected}" in capfd.readouterr().err


@pytest.mark.parametrize(
    "code",
    [
        "from handler import onnx_runner; onnx_runner(tiny)",
        "from training.export import onnx_runner; onnx_runner(tiny / 'model.onnx')",
        "from bf16 import compiled; compiled(tiny)",
    ],
)
def test_nothing_is_reported_to_the_makers_of_the_runtimes(tmp_path, code):
    tiny_bundle(tmp_path / "tiny")
    code = f"from pathlib import Path; tiny = Path({str(tmp_path / 'tiny')!r}); {code}"
    # Where they do, they keep a device id, and what they will send, under HOME.
    home = tmp_path / "home"
    home.mkdir()
    path = os.pathsep.join([str(ROOT), str(ROOT / "model-server"), str(ROOT / "model-server" / "worker")])
    environ = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], env=environ, check=True)
    assert not list(home.rglob("*"))
