"""The command: from drawn pictures in a folder to a bundle and a verdict."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from drawn import bundle_of
from learner import folder, save_transformer
from tiny import tiny_bundle

from bundle import golden, manifest, picture
from bundle.manifest import Decision
from training import train
from training.export import ONNX, onnx_runner
from training.train import main

ROOT = Path(__file__).parents[2]
NAMES = ("blue", "red", "yellow")
# EfficientNet-Lite0 at 64 pixels: the real thing, fast enough for tests.
SMALL = ["--size", "64", "--quiet", "--workers", "1", "--threads", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("data") / "pictures", NAMES)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny classifier of transformers, whose export takes less time."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_transformer(path, "resnet")
    return path


def start(data, out, *more):
    arguments = [str(data), "--out", str(out), "--cache", str(out.parent / "cache"), *SMALL, *more]
    return main(arguments)


@pytest.mark.slow
def test_quick_mode_makes_a_bundle_that_is_measured_as_served(data, tmp_path, capsys):
    out = tmp_path / "colours"
    assert start(data, out, "--quick", "--folds", "3", "--require", "accuracy>=0.6", "--precision", "0.9") == 0
    assert "named right. Bundle: " in capsys.readouterr().out
    made = manifest.read(out)
    assert made.name == "colours"
    assert made.version.startswith("lite0-quick-")
    assert made.classes == NAMES
    assert made.decision.temperature != 1
    run = onnx_runner(out / ONNX)
    golden.check(out, run, 3, made.tolerance)
    files = sorted((data / "validation").glob("*/*.jpg"))
    pixels = np.stack([picture.load(file.read_bytes(), made.input.resize) for file in files])
    right = np.mean([made.classes[i] == file.parent.name for i, file in zip(run(pixels).argmax(1), files, strict=True)])
    assert made.metrics["validation"]["accuracy"] == right > 0.6
    assert made.metrics["validation"]["pictures"] == 18
    told = made.provenance
    assert told["data"]["train"] == 36
    assert len(told["data"]["digest"]) == len(told["model"]["weights_sha256"]) == 64
    report = json.loads((tmp_path / "colours.report.json").read_text())
    assert report["accuracy"] == right
    assert report["folds"]["count"] == 3
    assert (tmp_path / "colours.report.html").exists()
    assert not (tmp_path / "colours.rejected").exists()


@pytest.mark.slow
def test_a_failed_gate_keeps_bundle_and_report_aside(data, model, tmp_path, capsys):
    out = tmp_path / "colours"
    bundle_of(out, NAMES, Decision())  # an older one, which must stay
    before = manifest.read(out).digest
    assert start(data, out, "--quick", "--model", str(model), "--require", "accuracy>=0", "nll<=0.00001") == 3
    assert "train: the gate failed: " in capsys.readouterr().err
    assert manifest.read(out).digest == before
    assert manifest.read(tmp_path / "colours.rejected").provenance["model"]["name"] == str(model)
    assert json.loads((tmp_path / "colours.report.json").read_text())["gate"]["unmet"]


@pytest.mark.slow
def test_int8_comes_beside_the_bundle_or_is_said_not_to(model, tmp_path, capsys):
    """What is within the bounds is tested in test_quantize; a network as good as untrained may be on either side."""
    out = tmp_path / "colours"
    pictures = folder(tmp_path / "pictures", NAMES, train=10, validation=12)
    assert start(pictures, out, "--quick", "--model", str(model), "--int8") == 0
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "colours-int8.quantize.json").read_text())
    assert report["from"]["digest"] == manifest.read(out).digest
    assert report["attempts"][-1]["pictures"] == 36
    assert report["calibration"]["pictures"] == 30
    assert (f"train: int8 is {'kept' if report['kept'] else 'not kept'}") in said
    assert (tmp_path / "colours-int8").exists() == bool(report["kept"])


@pytest.mark.slow
def test_stopped_by_sigterm_it_goes_on(data, model, tmp_path, capsys):
    """Fine-tuning, ended by SIGTERM in the loop, gives what it gives undisturbed, to the bit."""
    settings = ["--model", str(model), "--epochs", "10", "--batch", "6", "--checkpoint-every", "1000", "--name", "c"]
    folders = ["--cache", str(tmp_path / "cache"), "--scalars", str(tmp_path / "scalars")]

    def command(out):
        return [sys.executable, "-m", "training.train", str(data), "--out", str(out), *SMALL, *settings, *folders]

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command(tmp_path / "whole"), env=environment, check=True, capture_output=True, timeout=120)

    process = subprocess.Popen(command(tmp_path / "stopped"), env=environment, stderr=subprocess.PIPE, text=True)
    pointer = tmp_path / "stopped.checkpoints/latest.json"
    while not pointer.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "train: stopped by SIGTERM, checkpoint of step" in errors
    assert 0 < json.loads(pointer.read_text())["step"] < 60

    assert main([*command(tmp_path / "stopped")[3:], "--lr", "0.5"]) == 1
    assert re.search(r"holds the checkpoint of another run: lr was [\d.e-]+, now it is 0\.5", capsys.readouterr().err)
    subprocess.run(command(tmp_path / "stopped"), env=environment, check=True, capture_output=True, timeout=120)
    curves = [json.loads((tmp_path / f"{name}.curve.json").read_text()) for name in ("whole", "stopped")]
    assert curves[0] == curves[1]
    assert len(curves[0]["loss"]) == 60
    whole, stopped = (manifest.read(tmp_path / name) for name in ("whole", "stopped"))
    assert whole.files["golden.npz"] == stopped.files["golden.npz"]
    assert whole.files[ONNX] == stopped.files[ONNX]
    assert not pointer.parent.exists()  # of a finished run nothing is left to go on from
    assert list((tmp_path / "scalars").iterdir())


def refused(capsys, *arguments):
    assert main([*arguments, "--quiet"]) == 1
    return capsys.readouterr().err


def no_work(*_, **__):
    raise AssertionError("long work began")


@pytest.fixture
def idle(monkeypatch):
    """Whatever takes long fails the test."""
    monkeypatch.setattr(train.quick, "features", no_work)
    monkeypatch.setattr(train, "export", no_work)


def test_bad_settings_are_refused_before_any_work(tmp_path, data, capsys, idle, monkeypatch):
    monkeypatch.setattr(train.data, "catalogue", no_work)
    out = str(tmp_path / "new")
    assert "model 'lite9' is not known: there are lite0" in refused(capsys, str(data), "--out", out, "--model", "lite9")
    assert "epochs, batch and accumulate must be" in refused(capsys, str(data), "--out", out, "--epochs", "0")
    assert "freeze must be 0 to 16" in refused(capsys, str(data), "--out", out, "--freeze", "99")
    assert "name 'Ä' must be" in refused(capsys, str(data), "--out", out, "--name", "Ä")
    assert "--folds needs --quick" in refused(capsys, str(data), "--out", out, "--folds", "3")
    assert "is no bundle" in refused(capsys, str(data), "--out", out, "--no-worse-than", str(tmp_path / "none"))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/thesis.txt").write_text("mine")
    assert "holds something that is not a bundle" in refused(capsys, str(data), "--out", str(tmp_path / "kept"))


def test_bad_data_is_refused_before_any_work(tmp_path, data, capsys, idle):
    out = str(tmp_path / "new")
    assert "does not exist" in refused(capsys, str(tmp_path / "none"), "--out", out)
    shutil.copytree(data / "train/red", tmp_path / "one/red")
    assert "one class only" in refused(capsys, str(tmp_path / "one"), "--out", out)
    assert "no metric beauty" in refused(capsys, str(data), "--out", out, "--require", "beauty>=1")
    assert "folds must be 2 to" in refused(capsys, str(data), "--out", out, "--quick", "--folds", "1000")
    assert "18 in validation and test to judge on" in refused(capsys, str(data), "--out", out, "--int8")
    tiny_bundle(tmp_path / "other", ("cat", "dog", "red"))
    sentence = refused(capsys, str(data), "--out", out, "--no-worse-than", str(tmp_path / "other"))
    assert "does not know" in sentence


def test_no_room_for_checkpoints_is_refused_before_any_work(tmp_path, data, capsys, idle):
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small]).returncode:
        pytest.skip("a small disk is mounted by root only")
    try:
        error = refused(
            capsys, str(data), "--out", str(tmp_path / "new"), "--checkpoints", str(small), "--workers", "1"
        )
    finally:
        subprocess.run(["umount", "-l", small], check=True)
    assert "MB are needed for checkpoints, the old and the new one, and 1 MB are free: make room" in error


def test_every_setting_is_an_option_with_its_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    for kind in (train.Recipe, train.Machine):
        for field in kind.__dataclass_fields__.values():
            assert f"--{field.name.replace('_', '-')}" in text
            assert field.metadata["help"]
    job, recipe, machine = train.parse(["d", "--out", "b/My Name", "--lr", "0.5", "--no-freeze-norm", "--compile"])
    assert (job.name, job.checkpoints, machine.scalars) == ("my-name", "b/My Name.checkpoints", "b/My Name.scalars")
    assert (recipe.lr, recipe.freeze_norm, machine.compile) == (0.5, False, True)
    assert train.parse(["d", "--out", "x"])[1:] == (train.Recipe(), train.Machine(scalars="x.scalars"))
