"""The job's program as Vertex AI runs it: its workers as processes here, its bucket an emulator's."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from learner import folder, save_transformer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bundle import manifest
from bundle.remote import reason
from local.processes import free_ports
from training import job, progress
from training.export import ONNX
from training.job import Cluster, JobError, Trial
from training.progress import Progress
from training.sources import open_address

ROOT = Path(__file__).parents[2]
NAMES = ("blue", "red", "yellow")
BASE = "gs://pets/runs/one"
SMALL = ["--quiet", "--threads", "1", "--workers", "0", "--device", "cpu", "--name", "colours"]
LONG = ["--epochs", "10", "--batch", "3", "--checkpoint-every", "0"]  # 60 steps of two workers


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("data") / "pictures", NAMES)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_transformer(path, "resnet")
    return path


class Job:
    """One job's containers, each a process as its image starts it."""

    def __init__(self, data, model, base, scratch, workers=1, **environment):
        self.command = [sys.executable, "-m", "training.job", str(data), "--model", str(model)]
        self.command += [*SMALL, *LONG]
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
        for key, part in (("MODEL_DIR", "model"), ("CHECKPOINT_DIR", "checkpoints"), ("TENSORBOARD_LOG_DIR", "logs")):
            self.environment[f"AIP_{key}"] = f"{base}/{part}/"
        self.environment |= environment
        self.scratch, self.workers = scratch, workers
        for worker in range(workers):
            self.log(worker).touch()
        if workers > 1:
            self.port = free_ports(1)[0]

    def start(self, worker, *options):
        """One worker; what it prints goes to its file."""
        environment = dict(self.environment)
        if self.workers > 1:
            pools = {"workerpool0": ["127.0.0.1:2222"], "workerpool1": ["127.0.0.1:2222"] * (self.workers - 1)}
            task = {"type": f"workerpool{min(worker, 1)}", "index": max(0, worker - 1)}
            spec = {"cluster": pools, "environment": "cloud", "task": task, "job": "{}", "open_ports": [self.port]}
            environment["CLUSTER_SPEC"] = json.dumps(spec)
        with self.log(worker).open("ab") as log:
            return subprocess.Popen(
                [*self.command, *options], cwd=self.scratch, env=environment, stdout=log, stderr=log
            )

    def log(self, worker):
        return self.scratch / f"worker-{worker}.log"

    def said(self):
        return "\n".join(self.log(worker).read_text() for worker in range(self.workers))


def kill(process):
    """As a container is killed: with all that it started."""
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


@pytest.fixture(scope="module")
def job_of(data, model, tmp_path_factory):
    """Makes jobs; no process of theirs stays."""
    processes = []

    def make(base, workers):
        made = Job(data, model, base, tmp_path_factory.mktemp("job"), workers)
        start = made.start

        def started(*arguments):
            processes.append(start(*arguments))
            return processes[-1]

        made.start = started
        return made

    yield make
    for process in processes:
        if process.poll() is None:
            kill(process)


def wait_for(what, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def ended(pair, *processes):
    codes = [process.wait(180) for process in processes]
    print(pair.said())
    return codes


@pytest.fixture(scope="module")
def whole(job_of, tmp_path_factory):
    """The base of a job of two workers that nothing disturbed, a plain folder; the first worker came late."""
    base = tmp_path_factory.mktemp("whole")
    pair = job_of(base, 2)
    second = pair.start(1)
    wait_for(lambda: "worker 1 of 2" in pair.said())
    time.sleep(2)  # it finds nobody at the meeting place
    first = pair.start(0)
    assert ended(pair, first, second) == [0, 0]
    return base


def state(bucket):
    """The step of the last checkpoint; 0 where there is none."""
    try:
        return json.loads(bucket.cat_file("pets/runs/one/checkpoints/latest.json"))["step"]
    except FileNotFoundError:
        return 0


def result(bucket, tmp_path, part="model"):
    """The bundle in the bucket, its sizes and digests checked, and the curve."""
    bucket.invalidate_cache()
    folder = tmp_path / part
    bucket.get(f"pets/runs/one/{part}", str(folder), recursive=True)
    return manifest.read(folder), json.loads(bucket.cat_file("pets/runs/one/curve.json"))


@pytest.mark.slow
def test_two_workers_leave_bundle_report_and_scalars(whole):
    assert manifest.read(whole / "model").provenance["hardware"]["processes"] == 2
    assert sorted(path.name for path in whole.iterdir()) == [
        "curve.json",
        "logs",
        "model",
        "report.html",
        "report.json",
    ]
    assert list((whole / "logs").glob("events.*"))


@pytest.mark.slow
def test_a_worker_is_killed_and_the_job_goes_on_from_the_bucket(whole, job_of, bucket, tmp_path):
    pair = job_of(BASE, 2)
    first, second = pair.start(0), pair.start(1)
    wait_for(lambda: state(bucket) > 0)
    kill(second)
    assert ended(pair, first)[0] not in (0, 3, 75)
    assert 0 < state(bucket) < 60
    assert not bucket.exists("pets/runs/one/model/manifest.json")
    assert ended(pair, pair.start(0), pair.start(1)) == [0, 0]
    made, curve = result(bucket, tmp_path)
    undisturbed = manifest.read(whole / "model")
    assert curve == json.loads((whole / "curve.json").read_text())
    assert len(curve["loss"]) == 60
    assert made.files[ONNX] == undisturbed.files[ONNX]
    assert made.files["golden.npz"] == undisturbed.files["golden.npz"]
    assert made.metrics == undisturbed.metrics
    assert not bucket.find("pets/runs/one/checkpoints")
    assert len(bucket.ls("pets/runs/one/logs")) == 2  # one file a start


@pytest.mark.slow
def test_sigterm_to_one_worker_stops_all_with_a_checkpoint(job_of, bucket):
    pair = job_of(BASE, 2)
    first, second = pair.start(0), pair.start(1)
    wait_for(lambda: state(bucket) > 0)
    second.send_signal(signal.SIGTERM)
    assert ended(pair, first, second) == [75, 75]
    assert 0 < (step := state(bucket)) < 60
    assert f"stopped by SIGTERM, checkpoint of step {step} in {BASE}/checkpoints" in pair.said()
    assert not bucket.exists("pets/runs/one/model")


@pytest.fixture
def here(monkeypatch, bucket, data, model, tmp_path):
    """The program in this process: one worker, no GPU -> its exit code."""
    for key, part in (("MODEL_DIR", "model"), ("CHECKPOINT_DIR", "checkpoints"), ("TENSORBOARD_LOG_DIR", "logs")):
        monkeypatch.setenv(f"AIP_{key}", f"{BASE}/{part}/")
    monkeypatch.setenv("RANK", "3")  # another launcher's
    monkeypatch.setenv("WORLD_SIZE", "4")
    torchruns = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)  # where it leaves handlers of its own
    handlers = {number: signal.getsignal(number) for number in torchruns}
    yield lambda *options, of=data: job.main([str(of), "--model", str(model), *SMALL, *options])
    for number, handler in handlers.items():
        signal.signal(number, handler)


def told(file):
    """(step, accuracy) of every line of a trial's metrics."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {line["trial"] for line in lines} == {"7"}
    return [(int(line["global_step"]), float(line["accuracy"])) for line in lines]


@pytest.mark.slow
def test_a_trial_tells_every_epoch_and_what_the_bundle_has(here, bucket, tmp_path, monkeypatch):
    file = tmp_path / "hypertune/output.metrics"  # its folder is not there
    monkeypatch.setenv("CLOUD_ML_HP_METRIC_FILE", str(file))
    monkeypatch.setenv("CLOUD_ML_TRIAL_ID", "7")
    assert here("--epochs", "2", "--batch", "12") == 0
    made, curve = result(bucket, tmp_path)
    assert told(file) == [*enumerate(curve["validation_accuracy"], 1), (3, made.metrics["validation"]["accuracy"])]
    assert made.name == "colours"
    (tmp_path / "logs").mkdir()
    for path in bucket.find("pets/runs/one/logs"):
        bucket.get_file(path, str(tmp_path / "logs" / path.rsplit("/", 1)[1]))
    scalars = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [one.value for one in scalars.Scalars("validation/accuracy")] == pytest.approx(curve["validation_accuracy"])
    assert [one.step for one in scalars.Scalars("train/loss")] == [*range(6)]


def test_scalars_that_a_bucket_refuses_end_no_run(bucket, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY_S", 0)
    with Progress("train", 2, scalars="gs://nobody/logs", quiet=True) as shown:
        shown.scalar("loss", 1.0, 0)
        shown.scalar("loss", 0.5, 1)
    said = capsys.readouterr().err
    assert "train: gs://nobody/logs: the scalars: does not exist: check the path, or the bucket's name" in said


def test_the_metric_is_written_as_cloudml_hypertune_writes_it(tmp_path, monkeypatch):
    file = tmp_path / "hypertune/output.metrics"
    trial = Trial.from_environment({"CLOUD_ML_HP_METRIC_FILE": str(file), "CLOUD_ML_TRIAL_ID": "7"})
    monkeypatch.setattr(job.time, "time", lambda: 1.5)
    trial.report(1 / 4, 2)
    trial.report(1, 3)
    # Recorded from version 0.1.0.dev6.
    assert file.read_text() == (
        '{"accuracy": "0.25", "checkpoint_path": "", "global_step": "2", "timestamp": 1.5, "trial": "7"}\n'
        '{"accuracy": "1.0", "checkpoint_path": "", "global_step": "3", "timestamp": 1.5, "trial": "7"}\n'
    )
    assert Trial.from_environment({}) is None


@pytest.mark.slow
def test_the_gpus_of_one_machine_are_as_many_processes_and_a_failed_gate_is_told(here, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "_processes", lambda device: 2)
    assert here("--epochs", "1", "--batch", "6", "--require", "nll<=0.00001") == 3
    made, curve = result(bucket, tmp_path, "rejected")
    assert made.provenance["hardware"]["processes"] == 2
    assert len(curve["loss"]) == 3
    assert not bucket.exists("pets/runs/one/model")
    assert json.loads(bucket.cat_file("pets/runs/one/report.json"))["gate"]["unmet"]


@pytest.mark.slow
def test_quick_mode_is_the_first_workers_work(here, bucket, tmp_path, monkeypatch, capsys):
    spec = {"cluster": {"workerpool0": ["a:2222"], "workerpool1": ["b:2222"]}, "open_ports": [3333]}
    monkeypatch.setenv("CLUSTER_SPEC", json.dumps(spec | {"task": {"type": "workerpool1", "index": 0}}))
    assert here("--quick") == 0
    assert "this one has nothing to do" in capsys.readouterr().err
    assert not bucket.find("pets")

    monkeypatch.setenv("CLUSTER_SPEC", json.dumps(spec | {"task": {"type": "workerpool0", "index": 0}}))
    monkeypatch.setenv("CLOUD_ML_HP_METRIC_FILE", str(tmp_path / "metrics"))
    monkeypatch.setenv("CLOUD_ML_TRIAL_ID", "7")
    assert here("--quick") == 0
    bucket.get("pets/runs/one/model", str(tmp_path / "model"), recursive=True)
    made = manifest.read(tmp_path / "model")
    assert told(tmp_path / "metrics") == [(1, made.metrics["validation"]["accuracy"])]
    assert bucket.exists("pets/runs/one/report.html")
    assert not bucket.exists("pets/runs/one/curve.json")


@pytest.mark.slow
def test_the_int8_bundle_goes_beside_the_other(here, bucket, tmp_path):
    save_transformer(tmp_path / "convnext", "convnext")
    pictures = folder(tmp_path / "pictures", NAMES, train=10, validation=12)
    options = ["--quick", "--int8", "--model", str(tmp_path / "convnext"), "--size", "64"]
    assert here(*options, of=pictures) == 0
    bucket.get("pets/runs/one/model-int8", str(tmp_path / "model-int8"), recursive=True)
    made = manifest.read(tmp_path / "model-int8")
    assert json.loads(bucket.cat("pets/runs/one/quantize.json"))["kept"] == made.digest
    assert made.provenance["int8"]["from"] == manifest.parse(bucket.cat("pets/runs/one/model/manifest.json")).digest


@pytest.mark.slow
def test_a_bucket_that_fails_at_the_end_costs_no_training(here, bucket, tmp_path, monkeypatch, capsys):
    """What was trained is in the checkpoint until the bundle is in its place."""
    long = ["--epochs", "2", "--batch", "12", "--checkpoint-every", "1000"]

    def breaks(path, *_):
        raise OSError(f"Forbidden: {path}\nno storage.objects.create access")

    with monkeypatch.context() as patch:
        patch.setattr(open_address(BASE)[0], "cp_file", breaks)
        assert here(*long) == 1
    said = capsys.readouterr().err
    assert f"train: {BASE}/model: no right to write there (Forbidden: " in said
    assert "gcloud auth application-default login" in said
    assert "roles/storage.objectUser" in said
    assert not bucket.exists("pets/runs/one/model/manifest.json")
    assert state(bucket) == 6
    monkeypatch.setattr("training.loop.update", None)  # no step is made again
    assert here(*long) == 0
    made, curve = result(bucket, tmp_path)
    assert len(curve["loss"]) == 6
    assert made.classes == NAMES
    assert not bucket.find("pets/runs/one/checkpoints")


def test_what_the_environment_lacks_is_said(here, monkeypatch, capsys):
    assert here("--out", "elsewhere") == 1
    assert "job: --out: a job's results go where the AIP_ variables say" in capsys.readouterr().err
    monkeypatch.setenv("CLUSTER_SPEC", '{"cluster": {}}')
    assert here() == 1
    assert "job: CLUSTER_SPEC='{\"cluster\": {}}' is not as Vertex AI writes it (KeyError" in capsys.readouterr().err
    monkeypatch.delenv("AIP_MODEL_DIR")
    assert here() == 1
    assert "job: AIP_MODEL_DIR not set: Vertex AI sets them for a job with a base output" in capsys.readouterr().err


@pytest.mark.parametrize("pool", ["workerpool0", "workerpool1"])
def test_workers_that_do_not_meet_say_so(here, monkeypatch, capsys, pool):
    port = free_ports(1)[0]
    spec = {"cluster": {f"workerpool{i}": ["127.0.0.1:2222"] for i in range(2)}, "open_ports": [port]}
    monkeypatch.setenv("CLUSTER_SPEC", json.dumps(spec | {"task": {"type": pool, "index": 0}}))
    monkeypatch.setattr(job, "WAIT_S", 1)
    assert here() == 1
    assert f"job: the 2 workers did not meet at 127.0.0.1:{port} within 1 s" in capsys.readouterr().err


def test_a_bucket_that_does_not_exist_is_found_before_the_work(here, monkeypatch, capsys):
    monkeypatch.setenv("AIP_CHECKPOINT_DIR", "gs://nobody/checkpoints")
    monkeypatch.setattr("training.loop.update", None)
    assert here("--epochs", "1") == 1
    said = capsys.readouterr().err
    assert "gs://nobody/checkpoints: the checkpoint of step 0 was not written: does not exist: check the path" in said


def test_a_login_that_expired_is_said_as_such():
    from gcsfs.retry import HttpError

    said = reason(HttpError({"code": 401, "message": "Invalid Credentials"}))  # gcsfs, where it cannot be renewed
    assert "run `gcloud auth application-default login`" in said


SPEC = {
    "cluster": {"workerpool0": ["zero:2222"], "workerpool1": ["one:2222", "two:2222"], "workerpool2": ["three:2222"]},
    "environment": "cloud",
    "job": "{}",
}


@pytest.mark.parametrize(
    ("task", "ports", "expected"),
    [
        (("workerpool0", 0), [3333], Cluster(0, 4, "zero", 3333)),
        (("workerpool1", 1), [3333, 4444], Cluster(2, 4, "zero", 3333)),
        (("workerpool2", "0"), None, Cluster(3, 4, "zero", 2222)),
    ],
)
def test_the_cluster_is_read_as_vertex_ai_writes_it(task, ports, expected):
    spec = SPEC | {"task": {"type": task[0], "index": task[1]}} | ({"open_ports": ports} if ports else {})
    assert Cluster.from_environment({"CLUSTER_SPEC": json.dumps(spec)}) == expected


def test_without_a_cluster_there_is_one_worker():
    assert Cluster.from_environment({}) == Cluster(0, 1)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"cluster": {"workerpool0": []}, "task": {"type": "workerpool0", "index": 0}}',
     json.dumps(SPEC | {"task": {"type": "workerpool1", "index": 2}})],
)  # fmt: skip
def test_a_cluster_that_is_none_is_refused(text):
    with pytest.raises(JobError, match=r"CLUSTER_SPEC=.* is not as Vertex AI writes it"):
        Cluster.from_environment({"CLUSTER_SPEC": text})
