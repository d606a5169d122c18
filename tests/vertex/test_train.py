"""The doors, from pictures here to a bundle here, through the stand-in; and everything that can go wrong between."""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import BUCKET, IMAGE, SETTINGS, Emulator
from google.cloud import storage
from google.cloud.aiplatform_v1 import JobState
from standin import PYTHON, ROOT, Fault, StandIn

from bundle import manifest
from local import processes
from vertex import bucket as buckets
from vertex.bucket import bring_back, upload, upload_bundle
from vertex.cloud import Cloud, CloudError
from vertex.push import PARSE
from vertex.settings import read

CLOTHES = ROOT.parent / "shared" / "data" / "clothing"
SMALL = ["--quiet", "--threads", "1", "--workers", "0", "--device", "cpu"]


@pytest.fixture
def cloud(standin: StandIn, login: Path, settings_file: Path) -> Cloud:
    return Cloud(read(settings_file, {}), standin.url)


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def posted(standin: StandIn, kind: str = "customJobs") -> list[Any]:
    return [body for method, path, body in standin.requests if method == "POST" and path.endswith(kind)]


def posted_number(standin: StandIn) -> str:
    """Of the job that was made last."""
    return [name for name in standin.things if "Jobs/" in name][-1].rpartition("/")[2]


def answer_of(address: str, folder: Path) -> str:
    """What `make run MODEL=address` serves answers for a picture of `folder`: the bundle's digest."""
    port, grpc_port = processes.free_ports(2)
    command = [PYTHON, "-u", "-m", "local.run", "--models", address, "--port", port, "--grpc-port", grpc_port]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_GCE_CHECK": "true"}
    environment |= {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    with subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout
            printed = ""
            while "Ready" not in printed:
                line = process.stdout.readline()
                assert line, printed
                printed += line
            picture = min(folder.iterdir()).read_bytes()
            answer = requests.post(f"http://127.0.0.1:{port}/predict", data=picture, timeout=20).json()
            assert answer["label"] in ("dress", "pants", "shoes", "unknown")
            return str(answer["digest"])
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
            shutil.rmtree(ROOT / "build" / "fetched" / address.rpartition("=")[2], ignore_errors=True)


@pytest.mark.slow
@pytest.mark.skipif(not CLOTHES.exists(), reason="the clothes are not beside the repository")
def test_clothes_here_become_a_bundle_here(
    vertex: Callable[..., int], standin: StandIn, bucket: Any, tmp_path: Path, capsys: Any
) -> None:
    for split, count in (("train", 12), ("validation", 6)):
        for kind in ("dress", "pants", "shoes"):
            (folder := tmp_path / "clothes" / split / kind).mkdir(parents=True)
            for picture in sorted((CLOTHES / split / kind).iterdir())[:count]:
                shutil.copy(picture, folder)
    out = tmp_path / "bundles" / "clothes"
    words = ["train", str(tmp_path / "clothes"), "--out", str(out), "--workers", "2", "--", "--quick", "--size", "96"]
    assert vertex(*words) == 0
    made = manifest.read(out)
    assert made.classes == ("dress", "pants", "shoes")
    assert made.provenance["data"]["address"] == f"gs://{BUCKET}/data/clothes"
    assert "<html" in Path(f"{out}.report.html").read_text()
    assert json.loads(Path(f"{out}.report.json").read_text())["pictures"] == 18
    said = capsys.readouterr()
    assert "RUNNING: all workers run" in said.err
    assert "workerpool1-0  job: with --quick the first worker does it all" in said.err
    [address] = re.findall(rf"(gs://{BUCKET}/\S+)#sha256={made.digest}", said.out)
    there = {one.name.rpartition("/")[2] for one in bucket.list_blobs(prefix=address.split("/", 3)[3] + "/")}
    assert there == {*made.files, "manifest.json"}
    assert answer_of(f"{address}#sha256={made.digest}", tmp_path / "clothes/validation/shoes") == made.digest
    [job] = posted(standin)
    assert [pool["replicaCount"] for pool in job["jobSpec"]["workerPoolSpecs"]] == ["1", "1"]


@pytest.mark.slow
def test_a_worker_that_is_killed_goes_on_from_the_buckets_checkpoint(
    vertex: Callable[..., int],
    standin: StandIn,
    emulator: Emulator,
    bucket: Any,
    pictures: Path,
    network: str,
    tmp_path: Path,
) -> None:
    states: list[str] = []  # checkpoints that were read
    emulator.fault = lambda _, path, __: states.append(path) if "state-" in path and "alt=media" in path else None
    long = ["--model", network, "--epochs", "4", "--batch", "3", "--checkpoint-every", "0", *SMALL]
    results = []
    for name in ("undisturbed", "killed"):
        out = tmp_path / name
        codes: list[int] = []
        words = ["train", str(pictures), "--out", str(out), "--workers", "2", "--", *long, "--version", "1"]
        thread = threading.Thread(target=lambda words=words, codes=codes: codes.append(vertex(*words)))
        thread.start()
        if name == "killed":
            wait_for(lambda: [b for b in bucket.list_blobs(prefix="vertex/killed") if b.name.endswith("latest.json")])
            standin.preempt("workerpool1-0")
        thread.join(180)
        assert codes == [0]
        results.append(manifest.read(out))
    assert states
    assert all("killed" in path for path in states)
    runs = list(standin.runs.values())
    assert [run.restarts for run in runs] == [0, 1]
    assert results[0].files["model.onnx"] == results[1].files["model.onnx"]
    assert results[0].metrics == results[1].metrics
    assert results[1].provenance["hardware"]["processes"] == 2
    curves = [json.loads((tmp_path / f"{name}.curve.json").read_text()) for name in ("undisturbed", "killed")]
    assert curves[0] == curves[1]


@pytest.mark.slow
def test_the_best_trials_bundle_comes_back(
    vertex: Callable[..., int], standin: StandIn, pictures: Path, network: str, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "tuned"
    words = ["--trials", "2", "--parallel", "2", "--range", "lr=1e-4:1e-2:log", "augment=light,strong"]
    assert (
        vertex("tune", str(pictures), "--out", str(out), *words, "--", "--model", network, "--epochs", "1", *SMALL) == 0
    )
    made = manifest.read(out)
    said = capsys.readouterr()
    trials = re.findall(r"trial (\d) SUCCEEDED: lr=(\S+) augment=(light|strong): accuracy ([0-9.]+)", said.err)
    best = max(trials[:2], key=lambda trial: (float(trial[3]), -int(trial[0])))
    assert {trial[0] for trial in trials} == {"1", "2"}
    assert f"the best: trial {best[0]} " in said.err
    assert made.provenance["recipe"]["lr"] == pytest.approx(float(best[1]), rel=1e-3)
    assert f"/{best[0]}/model#sha256={made.digest}" in said.out


@pytest.mark.slow
def test_a_bundle_that_fails_the_gate_is_set_aside(
    vertex: Callable[..., int], pictures: Path, network: str, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "poor"
    gate = ["--quick", "--model", network, *SMALL, "--require", "nll<=0.00001"]
    assert vertex("train", str(pictures), "--out", str(out), "--", *gate) == 3
    assert manifest.read(tmp_path / "poor.rejected").name == "poor"
    assert not out.exists()
    assert Path(f"{out}.report.html").exists()
    assert "vertex-train: the gate failed; see " in capsys.readouterr().err


def test_a_job_that_fails_says_why_and_where_its_logs_are(
    vertex: Callable[..., int], bucket: Any, tmp_path: Path, capsys: Any
) -> None:
    bucket.blob("data/nothing/x.txt").upload_from_string("no picture")
    assert vertex("train", f"gs://{BUCKET}/data/nothing", "--out", str(tmp_path / "mine"), "--", "--quick") == 1
    said = capsys.readouterr().err
    assert re.search(r"^  (train|job): .*nothing", said, re.MULTILINE), said
    assert "vertex-train: the job ended as JOB_STATE_FAILED: The replica workerpool0-0 exited with a non-zero" in said
    assert "Its logs: https://console.cloud.google.com/logs/query;query=resource.labels.job_id" in said
    assert re.search(r"or: gcloud ai custom-jobs stream-logs \d+ --region=europe-west4 --project=zoo-42", said)
    assert list(tmp_path.glob("mine*")) == []


@pytest.mark.parametrize(("timeout", "by_hand"), [("1h", True), ("60s", False)])
def test_a_job_that_is_ended_says_so(
    vertex: Callable[..., int],
    standin: StandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    timeout: str,
    by_hand: bool,
    capsys: Any,
) -> None:
    program = tmp_path / "sleep"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    standin.python = str(program)
    if not by_hand:  # a minute is the shortest
        monkeypatch.setattr(StandIn, "second", 0.01)
    codes: list[int] = []
    words = ["train", f"gs://{BUCKET}/data/x", "--timeout", timeout]
    thread = threading.Thread(target=lambda: codes.append(vertex(*words)))
    thread.start()
    if by_hand:
        wait_for(lambda: any(run.processes for run in standin.runs.values()))
        path = f"/v1/projects/zoo-42/locations/europe-west4/customJobs/{posted_number(standin)}:cancel"
        standin.answer("POST", path, {}, {})
    thread.join(60)
    assert codes == [1]
    assert "vertex-train: the job ended as JOB_STATE_CANCELLED" in capsys.readouterr().err


def test_ctrl_c_leaves_the_job_and_says_so(
    vertex: Callable[..., int], standin: StandIn, publishing: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vertex.follow.Reader.read", interrupted)
    assert vertex("train", f"gs://{BUCKET}/data/x") == 130
    said = capsys.readouterr().err
    assert "vertex-train: stopped here; what was submitted goes on: make vertex-status" in said
    number = posted_number(standin)
    assert f"to stop it: gcloud ai custom-jobs cancel {number} --region=europe-west4 --project=zoo-42" in said
    wait_for(lambda: [job.state for job in standin.things.values()] == [JobState.JOB_STATE_SUCCEEDED])


def test_only_what_changed_is_sent(cloud: Cloud, bucket: Any, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for name in ("a/1.jpg", "a/2.jpg", "b/3.jpg", ".git/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    assert upload(cloud, folder, "data/photos").sent == 3
    assert upload(cloud, folder, "data/photos").sent == 0
    (folder / "a/1.jpg").write_bytes(b"A/1.jpg")  # as long as before
    again = upload(cloud, folder, "data/photos")
    assert (again.files, again.sent) == (3, 1)
    assert bucket.blob("data/photos/a/1.jpg").download_as_bytes() == b"A/1.jpg"
    (folder / "b/3.jpg").unlink()
    with pytest.raises(CloudError, match=r"holds 1 files that .* does not, data/photos/b/3.jpg first: .* PRUNE=1"):
        upload(cloud, folder, "data/photos")
    upload(cloud, folder, "data/photos", prune=True)
    assert {one.name for one in bucket.list_blobs()} == {"data/photos/a/1.jpg", "data/photos/a/2.jpg"}
    with pytest.raises(CloudError, match="holds no files"):
        upload(cloud, tmp_path / "empty", "data/empty")


def test_an_interrupted_upload_goes_on_and_submits_nothing_until_then(
    vertex: Callable[..., int],
    emulator: Emulator,
    standin: StandIn,
    publishing: Path,
    pictures: Path,
    bucket: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.setattr(buckets, "RETRY_S", 0.5)
    begin, sent = emulator.count, []

    def fault(method: str, path: str, count: int) -> int | None:
        if method == "POST" and "/upload/" in path:
            sent.append(count)
            return 0 if len(sent) > 10 else None
        return None

    emulator.fault = fault
    assert vertex("train", str(pictures), "--out", str(tmp_path / "mine")) == 1
    said = capsys.readouterr().err
    assert re.search(r"sending \S+\.jpg to gs://\S+: Google did not answer .*: the same command tries again", said), (
        said
    )
    assert emulator.count > begin
    assert posted(standin) == []
    there = len(list(bucket.list_blobs(prefix="data/colours/")))
    assert 0 < there < 36
    emulator.fault = lambda *_: None
    assert vertex("train", str(pictures), "--out", str(tmp_path / "mine")) == 0
    assert f"36 files, {36 - there} to send" in capsys.readouterr().err
    assert len(posted(standin)) == 1


def test_a_bucket_that_refuses_and_one_that_is_not_there(
    vertex: Callable[..., int], emulator: Emulator, standin: StandIn, pictures: Path, capsys: Any
) -> None:
    emulator.fault = lambda method, path, _: 403 if method == "POST" and "/upload/" in path else None
    assert vertex("train", str(pictures)) == 1
    said = capsys.readouterr().err
    assert re.search(r"sending \S+ to gs://\S+: not allowed \(.*\): whoever owns zoo-42", said), said
    assert "--role=roles/storage.objectAdmin" in said
    assert vertex("train", str(pictures), "--bucket", "zoo-43-kennel") == 1
    said = capsys.readouterr().err
    assert "looking for the bucket zoo-43-kennel: not there" in said
    assert "gcloud storage buckets create gs://zoo-43-kennel --location=europe-west4 --project=zoo-42" in said
    assert posted(standin) == []


def test_an_expired_login(
    vertex: Callable[..., int], standin: StandIn, pictures: Path, publishing: Path, tmp_path: Path, capsys: Any
) -> None:
    standin.login_expired = True
    assert vertex("train", str(pictures)) == 1
    said = capsys.readouterr().err
    assert "you are not logged in, or no longer" in said
    assert "Token has been expired or revoked" in said
    assert "gcloud auth application-default login" in said
    standin.login_expired = False

    # It expires while the job is followed: the job goes on, and is taken up again by its number.
    standin.faults.append(Fault("GET .*customJobs/", "UNAUTHENTICATED", "Token expired."))
    assert vertex("train", str(pictures), "--out", str(tmp_path / "colours")) == 1
    said = capsys.readouterr().err
    assert "your login is not valid any more (Token expired.): gcloud auth application-default login" in said
    [number] = re.findall(r"The job goes on: make vertex-train JOB=(\d+)", said)
    standin.faults.clear()
    assert vertex("train", "--out", str(tmp_path / "colours"), "--job", number) == 0
    assert manifest.read(tmp_path / "colours").name == "colours"
    assert len(posted(standin)) == 1


def test_no_login_at_all(
    vertex: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "nowhere.json"))
    assert vertex("status") == 1
    assert "logging in: you are not logged in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "sentences"),
    [
        (
            Fault("POST", "PERMISSION_DENIED", "Permission 'aiplatform.customJobs.create' denied"),
            ["submitting mine: not allowed", "--role=roles/aiplatform.user"],
        ),
        (
            Fault(
                "POST", "PERMISSION_DENIED", "Vertex AI API has not been used in project 42 before or it is disabled"
            ),
            ["gcloud services enable aiplatform.googleapis.com --project=zoo-42"],
        ),
        (Fault("POST", "INVALID_ARGUMENT", "No."), ["submitting mine: refused (No.)"]),
        (Fault("POST", "UNAVAILABLE", "Later."), ["Google did not answer (Later.): the same command tries again"]),
        (None, ["over the project's quota", "custom_model_training_nvidia_l4_gpus", "iam-admin/quotas?project=zoo-42"]),
    ],
)
def test_a_refusal_says_what_to_do(
    vertex: Callable[..., int], standin: StandIn, fault: Fault | None, sentences: list[str], capsys: Any
) -> None:
    if fault:
        standin.faults.append(fault)
    else:
        standin.quota["NVIDIA_L4"] = 1
    gpu = ["--machine", "g2-standard-4", "--gpu", "NVIDIA_L4", "--gpus", "1", "--workers", "2"]
    assert vertex("train", f"gs://{BUCKET}/data/x", *gpu) == 1
    said = capsys.readouterr().err
    for sentence in sentences:
        assert sentence in said, said
    assert standin.runs == {}


def test_passing_failures_are_waited_out(
    vertex: Callable[..., int], standin: StandIn, publishing: Path, tmp_path: Path, capsys: Any
) -> None:
    standin.faults += [
        Fault("GET .*customJobs/", "UNAVAILABLE", "Later.", times=3),
        Fault("entries:list", "INTERNAL", "Oh.", times=2),
    ]
    assert vertex("train", f"gs://{BUCKET}/data/x", "--out", str(tmp_path / "colours")) == 0
    said = capsys.readouterr().err
    assert said.count("; trying again") == 5
    assert said.count("  publishing\n") == 1
    assert manifest.read(tmp_path / "colours").name == "colours"


def test_nothing_half_written_is_taken_for_a_bundle(
    cloud: Cloud, emulator: Emulator, bucket: Any, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = f"gs://{BUCKET}/vertex/job/", tmp_path / "colours"
    for name in ("model.onnx", "golden.npz"):  # manifest.json comes last
        bucket.blob(f"vertex/job/model/{name}").upload_from_filename(str(colours / name))
    assert bring_back(cloud, base, out, "model", out) is None
    bucket.blob("vertex/job/model/manifest.json").upload_from_filename(str(colours / "manifest.json"))
    made = bring_back(cloud, base, out, "model", out)
    assert made == manifest.read(out)
    for spoil in (
        lambda: bucket.blob("vertex/job/model/model.onnx").upload_from_string("half of it"),
        lambda: bucket.blob("vertex/job/model/model.onnx").delete(),
    ):
        spoil()
        with pytest.raises(CloudError, match=r"gs://\S+/vertex/job/model is not taken for a bundle: model.onnx: "):
            bring_back(cloud, base, tmp_path / "other", "model", out)
        with pytest.raises(CloudError):
            bring_back(cloud, base, out, "model", out)
    bucket.blob("vertex/job/model/model.onnx").upload_from_filename(str(colours / "model.onnx"))
    monkeypatch.setattr(buckets, "RETRY_S", 0.5)
    emulator.fault = lambda method, path, _: 0 if "model.onnx" in path and "alt=media" in path else None
    with pytest.raises(CloudError, match=r"fetching gs://\S+/vertex/job/model: Google did not answer"):
        bring_back(cloud, base, out, "model", out)
    assert manifest.read(out) == made  # what was here stays
    assert {path.name for path in tmp_path.iterdir()} <= {"colours", "login.json", "vertex.env"}


def test_a_bundle_goes_up_once_and_its_manifest_last(cloud: Cloud, emulator: Emulator, colours: Path) -> None:
    sent: list[str] = []

    def fault(method: str, path: str, _: int) -> None:
        sent.extend([path] if method == "POST" else [])

    emulator.fault = fault
    address, made = upload_bundle(cloud, colours)
    assert address == f"gs://{BUCKET}/bundles/colours-{made.digest[:12]}"
    assert len(sent) == len(made.files) + 1
    last = max(storage.Client(project="x").list_blobs(BUCKET), key=lambda one: one.time_created)
    assert last.name.endswith("/manifest.json")
    assert upload_bundle(cloud, colours) == (address, made)
    assert len(sent) == len(made.files) + 1
    with pytest.raises(CloudError, match="is no bundle"):
        upload_bundle(cloud, colours.parent)


def test_a_bundle_is_deployed_and_the_next_takes_its_place(
    vertex: Callable[..., int], standin: StandIn, colours: Path, capsys: Any
) -> None:
    image = IMAGE.replace("training", "endpoint")
    for _ in range(2):
        assert vertex("deploy", str(colours), "--endpoint-max-replicas", "3", image=image) == 0
    said = capsys.readouterr().out
    assert re.search(rf"{standin.url}/v1/projects/\d+/locations/europe-west4/endpoints/\d+:predict", said)
    models = [one for name, one in standin.things.items() if "/models/" in name]
    [endpoint] = [one for name, one in standin.things.items() if "/endpoints/" in name]
    assert [deployed.model for deployed in endpoint.deployed_models] == [models[1].name]
    assert dict(endpoint.traffic_split) == {endpoint.deployed_models[0].id: 100}
    before = [deployed.id for deployed in endpoint.deployed_models]
    standin.broken_container = "Model server exited unexpectedly."
    assert vertex("deploy", str(colours), image=image) == 1
    error = capsys.readouterr().err
    assert "deploying colours: failed (9 Model server exited" in error or "Model server exited unexpectedly." in error
    assert (
        "the container's logs: https://console.cloud.google.com/logs/query;query=resource.labels.endpoint_id" in error
    )
    assert [deployed.id for deployed in endpoint.deployed_models] == before
    container = models[0].container_spec
    assert (container.predict_route, container.health_route) == ("/v1/models/default:predict", "/readyz")
    assert models[0].artifact_uri.startswith(f"gs://{BUCKET}/bundles/colours-")


def test_status_shows_jobs_and_endpoints_and_ones_log(
    vertex: Callable[..., int], standin: StandIn, publishing: Path, colours: Path, tmp_path: Path, capsys: Any
) -> None:
    assert vertex("status") == 0
    assert "no jobs and no endpoints in zoo-42, europe-west4" in capsys.readouterr().out
    assert vertex("train", f"gs://{BUCKET}/data/x", "--out", str(tmp_path / "colours")) == 0
    assert vertex("deploy", str(colours), image=IMAGE.replace("training", "endpoint")) == 0
    capsys.readouterr()
    assert vertex("status") == 0
    endpoint, job = capsys.readouterr().out.splitlines()
    assert re.search(r"endpoint +\d+  colours +colours \(\d+\)$", endpoint)
    assert re.search(rf"customJob +\d+  colours +SUCCEEDED +gs://{BUCKET}/vertex/colours-\S+/  TensorBoard: gs://", job)
    number = re.findall(r"customJob +(\d+)", job)[0]
    assert vertex("status", "--job", number) == 0
    said = capsys.readouterr()
    assert "  publishing\n" in said.err
    assert f"gcloud ai custom-jobs stream-logs {number}" in said.out
    over = ["--trials", "1", "--parallel", "1", "--range", "lr=1:2"]
    assert vertex("tune", f"gs://{BUCKET}/data/x", *over) == 1  # a program that reports nothing
    said = capsys.readouterr().err
    assert "vertex-tune: no trial ended well: The trial reported no metric." in said
    assert vertex("status", "--job", posted_number(standin)) == 0
    assert "trial 1 INFEASIBLE: lr=" in capsys.readouterr().out
    assert vertex("status", "--job", "42") == 1
    assert "not there" in capsys.readouterr().err


def test_an_image_is_pushed_under_a_tag_by_its_content(
    vertex: Callable[..., int], standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """docker and gcloud take notes only: neither a registry nor an account is here."""
    notes, tools = tmp_path / "notes", tmp_path / "bin"
    tools.mkdir()
    answer = 'echo "$ANSWER"; [ "$1 $FAIL" != "push 1" ] || { echo "denied: no" >&2; exit 1; }'
    for tool in ("docker", "gcloud"):
        (tools / tool).write_text(f'#!/bin/sh\necho "{tool} $*" >>{notes}\n{answer}\n')
        (tools / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("ANSWER", "sha256:c0ffeec0ffeec0ffee amd64")
    here, there = "kennel/training:0.1.0", f"europe-west4-docker.pkg.dev/zoo-42/{SETTINGS['REPOSITORY']}/training"
    words = ["train", f"gs://{BUCKET}/data/x", "--out", str(tmp_path / "x")]
    gpu = ["--machine", "g2-standard-4", "--gpu", "NVIDIA_L4", "--gpus", "1"]
    monkeypatch.setenv("FAIL", "1")
    assert vertex(*words, *gpu, image=here) == 1
    said = capsys.readouterr().err
    assert (
        "denied: no: log in (gcloud auth login), or make the repository: gcloud artifacts repositories create" in said
    )
    assert notes.read_text().splitlines()[1:] == [
        f"docker run --rm --network=none --entrypoint=python3.11 {here}-cuda -c {PARSE}",
        f"docker image inspect --format {{{{.Id}}}} {{{{.Architecture}}}} {here}-cuda",
        "gcloud auth configure-docker europe-west4-docker.pkg.dev --quiet",
        f"docker tag {here}-cuda {there}:0.1.0-cuda-c0ffeec0ffee",
        f"docker push --quiet {there}:0.1.0-cuda-c0ffeec0ffee",
    ]
    refusing = '[ "$1" != run ] || { echo "train: error: unrecognized arguments: --x" >&2; exit 2; }'
    (tools / "docker").write_text(f'#!/bin/sh\necho "$ANSWER"\n{refusing}\n')
    assert vertex(*words, "--", "--x", image=here) == 1
    said = capsys.readouterr().err
    assert "vertex-train: training refuses --x: unrecognized arguments: --x (make train ARGS=--help)\n" in said
    monkeypatch.setenv("ANSWER", "sha256:c0ffeec0ffeec0ffee arm64")
    assert vertex(*words, image=here) == 1
    assert "is for arm64, Vertex AI is amd64" in capsys.readouterr().err
    (tools / "docker").write_text("#!/bin/sh\necho no such image >&2; exit 1\n")
    assert vertex(*words, *gpu, image=here) == 1
    assert "no such image: not here: make images TORCH=cuda" in capsys.readouterr().err
    assert vertex("deploy", f"gs://{BUCKET}/bundles/x", image="kennel/endpoint:0.1.0") == 1
    assert "no such image: not here: make endpoint-image\n" in capsys.readouterr().err
    (tools / "docker").unlink()
    monkeypatch.setenv("PATH", str(tools))
    assert vertex(*words, image=here) == 1
    assert "needs docker: https://" in capsys.readouterr().err
    assert posted(standin) == []


def test_make_passes_everything_on(settings_file: Path) -> None:
    command = ["make", "--no-print-directory", "vertex-tune", f"VERTEX_ENV={settings_file}", "DRY=1", f"IMAGE={IMAGE}"]
    command += ["DATA=gs://zoo-42-kennel/data/pets", "OUT=build/bundles/pets", "QUICK=1", "REQUIRE=accuracy>=0.8"]
    command += ["RANGES=lr=1e-4:1e-2:log augment=light,strong", "FLAGS=--trials 4 --strategy spot", "ARGS=--epochs 3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)
    assert job["displayName"] == "pets"
    assert (job["maxTrialCount"], job["trialJobSpec"]["scheduling"]["strategy"]) == (4, "SPOT")
    [pool] = job["trialJobSpec"]["workerPoolSpecs"]
    arguments = ["gs://zoo-42-kennel/data/pets", "--name", "pets", "--quick", "--require", "accuracy>=0.8"]
    assert pool["containerSpec"]["args"] == [*arguments, "--epochs", "3"]
    assert len(job["studySpec"]["parameters"]) == 2
