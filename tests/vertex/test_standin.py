"""The vendor's own clients, unpatched, against the stand-in: the SDK and gcloud submit, follow and finish."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import BUCKET, IMAGE
from google.api_core import exceptions
from google.cloud import aiplatform
from google.cloud.aiplatform import hyperparameter_tuning as hpt
from google.cloud.aiplatform import jobs
from google.oauth2.credentials import Credentials
from standin import ROOT, Fault, StandIn

BASE = f"gs://{BUCKET}/vertex/x/"
SAY = "import os; print('hello from', os.environ['AIP_MODEL_DIR'])"
# As a program reports with cloudml-hypertune.
REPORT = """
import json, os, pathlib, sys
file = pathlib.Path(os.environ["CLOUD_ML_HP_METRIC_FILE"])
file.parent.mkdir(parents=True)
given = dict(word[2:].split("=") for word in sys.argv[1:])
file.write_text(json.dumps({"accuracy": str(1 - float(given["lr"])), "global_step": "3"}))
"""


def pools(script: str, workers: int = 1, **machine: Any) -> list[dict[str, Any]]:
    container = {"image_uri": IMAGE, "command": ["python3.11", "-c", script], "args": []}
    spec = {"machine_type": "n1-standard-4", **machine}
    counts = [1, workers - 1] if workers > 1 else [1]
    return [{"machine_spec": spec, "replica_count": n, "container_spec": container} for n in counts]


@pytest.fixture
def sdk(standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(jobs, "_JOB_WAIT_TIME", 0.1)  # how often it asks
    aiplatform.init(
        project="zoo-42",
        location="europe-west4",
        staging_bucket=f"gs://{BUCKET}",
        credentials=Credentials(token="ya29.test"),  # type: ignore[no-untyped-call]
        api_endpoint=standin.url,
        api_transport="rest",
    )
    yield
    aiplatform.init(api_transport="grpc")


def messages(standin: StandIn) -> list[str]:
    return [one["jsonPayload"]["message"] for one in standin.entries]


def test_the_sdk_runs_a_job(sdk: None, standin: StandIn) -> None:
    job = aiplatform.CustomJob("greet", pools(SAY), base_output_dir=BASE.rstrip("/"), labels={"app": "kennel"})
    job.run(timeout=600, restart_job_on_worker_restart=True)
    assert job.state.name == "JOB_STATE_SUCCEEDED"
    assert messages(standin) == [f"hello from {BASE}model/"]


def test_the_sdk_is_told_why_a_job_failed(sdk: None) -> None:
    job = aiplatform.CustomJob("fail", pools("raise SystemExit(3)"), base_output_dir=BASE)
    with pytest.raises(RuntimeError, match=r"replica workerpool0-0 exited with a non-zero status of 3.*logs/viewer"):
        job.run()


def test_the_sdk_tunes(sdk: None) -> None:
    job = aiplatform.HyperparameterTuningJob(
        "tune",
        aiplatform.CustomJob("trial", pools(REPORT), base_output_dir=BASE),
        metric_spec={"accuracy": "maximize"},
        parameter_spec={
            "lr": hpt.DoubleParameterSpec(1e-4, 1e-2, "log"),
            "epochs": hpt.IntegerParameterSpec(1, 4, "linear"),
            "augment": hpt.CategoricalParameterSpec(["light", "strong"]),
        },
        max_trial_count=4,
        parallel_trial_count=2,
    )
    job.run()
    assert [trial.state.name for trial in job.trials] == ["SUCCEEDED"] * 4
    for trial in job.trials:
        given = {one.parameter_id: one.value for one in trial.parameters}
        assert trial.final_measurement.metrics[0].value == pytest.approx(1 - given["lr"])


def test_the_sdk_uploads_and_deploys(sdk: None, standin: StandIn) -> None:
    model = aiplatform.Model.upload(
        display_name="colours",
        artifact_uri=f"{BASE}model",
        serving_container_image_uri=IMAGE,
        serving_container_predict_route="/v1/models/default:predict",
        serving_container_health_route="/readyz",
        serving_container_ports=[8080],
    )
    endpoint = model.deploy(machine_type="n1-standard-4", min_replica_count=1, max_replica_count=2)
    [deployed] = endpoint.list_models()
    assert deployed.model == model.resource_name
    assert endpoint.traffic_split == {deployed.id: 100}


def test_the_sdk_is_refused(sdk: None, standin: StandIn) -> None:
    wrong = pools(SAY, accelerator_type="NVIDIA_L4", accelerator_count=1)
    with pytest.raises(exceptions.BadRequest, match="NVIDIA_L4"):
        aiplatform.CustomJob("x", wrong, base_output_dir=BASE).run()
    standin.quota["NVIDIA_TESLA_T4"] = 1
    many = pools(SAY, accelerator_type="NVIDIA_TESLA_T4", accelerator_count=2)
    with pytest.raises(exceptions.TooManyRequests, match="custom_model_training_nvidia_tesla_t4_gpus"):
        aiplatform.CustomJob("x", many, base_output_dir=BASE).run()
    standin.faults.append(Fault("GET .*customJobs/", "PERMISSION_DENIED", "no"))
    with pytest.raises(exceptions.Forbidden):
        aiplatform.CustomJob.get("8000000001")


def test_two_workers_meet_and_one_that_is_taken_away_is_started_again(
    standin: StandIn, sdk: None, tmp_path: Path
) -> None:
    script = """
import json, os, sys, time, pathlib
spec = json.loads(os.environ["CLUSTER_SPEC"])
print(spec["task"], sorted(map(len, spec["cluster"].values())), len(spec["open_ports"]), flush=True)
mark = pathlib.Path(os.environ["MARKS"]) / spec["task"]["type"]
if not mark.exists():
    mark.touch()
    time.sleep(600)
"""
    made = pools(script, workers=2)
    for pool in made:
        pool["container_spec"]["env"] = [{"name": "MARKS", "value": f"{tmp_path}"}]
    job = aiplatform.CustomJob("pair", made, base_output_dir=BASE)
    job.submit(restart_job_on_worker_restart=True)
    deadline = time.monotonic() + 30
    while len(standin.entries) < 2 or len(list(tmp_path.iterdir())) < 2:
        assert time.monotonic() < deadline, messages(standin)
        time.sleep(0.05)
    standin.preempt("workerpool1-0")
    while job.state.name not in ("JOB_STATE_SUCCEEDED", "JOB_STATE_FAILED"):
        assert time.monotonic() < deadline, messages(standin)
        time.sleep(0.05)
    assert job.state.name == "JOB_STATE_SUCCEEDED"
    assert sum("[1, 1] 1" in line for line in messages(standin)) >= 3


needs_gcloud = pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not on this machine")


@pytest.fixture
def gcloud(standin: StandIn, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    (tmp_path / "token").write_text("ya29.test")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "CLOUDSDK_CONFIG": str(tmp_path / "gcloud"),
        "CLOUDSDK_AUTH_ACCESS_TOKEN_FILE": str(tmp_path / "token"),
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM": f"{standin.url}/",
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_LOGGING": f"{standin.url}/",
        "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false",
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
    }

    def run(*words: str, error: bool = False) -> subprocess.CompletedProcess[str]:
        command = ["gcloud", "ai", *words, "--region=europe-west4", "--project=zoo-42", "--format=json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert (done.returncode != 0) == error, done.stderr
        return done

    return run


def until(state: Callable[[], str]) -> str:
    deadline = time.monotonic() + 60
    while (now := state()) not in ("JOB_STATE_SUCCEEDED", "JOB_STATE_FAILED"):
        assert time.monotonic() < deadline, now
        time.sleep(0.2)
    return now


def written(path: Path, value: Any) -> str:
    path.write_text(json.dumps(value))
    return str(path)


@needs_gcloud
@pytest.mark.slow
def test_gcloud_submits_follows_and_finishes(
    gcloud: Callable[..., subprocess.CompletedProcess[str]], standin: StandIn, tmp_path: Path
) -> None:
    container = {"imageUri": IMAGE, "command": ["python3.11", "-c", SAY]}
    job = {
        "workerPoolSpecs": [
            {"machineSpec": {"machineType": "n1-standard-4"}, "replicaCount": "1", "containerSpec": container}
        ],
        "baseOutputDirectory": {"outputUriPrefix": BASE},
    }
    config = written(tmp_path / "job.json", job)
    made = json.loads(gcloud("custom-jobs", "create", "--display-name=greet", f"--config={config}").stdout)
    number = made["name"].rpartition("/")[2]
    assert until(lambda: json.loads(gcloud("custom-jobs", "describe", number).stdout)["state"]).endswith("SUCCEEDED")

    wrong = written(tmp_path / "wrong.json", {**job, "workerPools": []})
    refused = gcloud("custom-jobs", "create", "--display-name=x", f"--config={wrong}", error=True)
    assert 'no field named "workerPools"' in refused.stderr

    container["command"] = ["python3.11", "-c", REPORT]
    tuning = {
        "studySpec": {
            "metrics": [{"metricId": "accuracy", "goal": "MAXIMIZE"}],
            "parameters": [{"parameterId": "lr", "doubleValueSpec": {"minValue": 0.1, "maxValue": 0.2}}],
        },
        "trialJobSpec": job,
    }
    config = written(tmp_path / "tuning.json", tuning)
    counts = ("--max-trial-count=2", "--parallel-trial-count=2")
    made = json.loads(gcloud("hp-tuning-jobs", "create", "--display-name=tune", f"--config={config}", *counts).stdout)
    number = made["name"].rpartition("/")[2]
    assert until(lambda: json.loads(gcloud("hp-tuning-jobs", "describe", number).stdout)["state"]).endswith("SUCCEEDED")

    gcloud(
        "models",
        "upload",
        "--display-name=colours",
        f"--container-image-uri={IMAGE}",
        f"--artifact-uri={BASE}model",
        "--container-ports=8080",
        "--container-predict-route=/v1/models/default:predict",
        "--container-health-route=/readyz",
    )
    [model] = json.loads(gcloud("models", "list").stdout)
    endpoint = json.loads(gcloud("endpoints", "create", "--display-name=colours").stdout)["name"].rpartition("/")[2]
    gcloud(
        "endpoints",
        "deploy-model",
        endpoint,
        f"--model={model['name'].rpartition('/')[2]}",
        "--display-name=colours",
        "--machine-type=n1-standard-4",
        "--min-replica-count=1",
        "--traffic-split=0=100",
    )
    [deployed] = json.loads(gcloud("endpoints", "describe", endpoint).stdout)["deployedModels"]
    assert deployed["model"] == model["name"]


def gcloud_lines() -> list[str]:
    """Every gcloud command that vertex/ writes or runs, with something filled in."""
    found = []
    for path in sorted((ROOT / "vertex").iterdir()):
        if path.suffix not in (".py", ".mk", ".sh", ".env", ".toml"):
            continue
        text = re.sub(r'"\s*\n\s*f?"', "", path.read_text())  # a sentence over several lines
        text = re.sub(r'"\n\s+make \+= f"', "", text)
        for line in re.findall(
            r"(?<![\w/.-])gcloud (?:[a-z]|\{kind\})[^\"'\n)]*", re.sub(r"\{([^{}]*)\}", _filled, text)
        ):
            found.append(re.split(r"[:;,] |\. |[)`]", line.strip())[0])
        for words in re.findall(r'\[("gcloud", .*?)\]', re.sub(r"\bregistry\b", '"zoo-42"', text)):
            found.append(" ".join(re.findall(r'"([^"]*)"', words)))
    return found


def _filled(match: re.Match[str]) -> str:
    return {"kind": "custom-jobs", "verb": "cancel"}.get(match[1], "zoo-42")


@needs_gcloud
def test_every_gcloud_line_is_one_that_gcloud_has(tmp_path: Path) -> None:
    commands = list(dict.fromkeys(gcloud_lines()))
    commands += [line.replace("custom-jobs", "hp-tuning-jobs") for line in commands if "custom-jobs cancel" in line]
    commands += [line.replace(" cancel ", " stream-logs ") for line in commands if " cancel " in line]
    assert len(commands) >= 8, commands
    wrong = [f"{command} --no-such-flag=1" for command in commands]
    (tmp_path / "commands.json").write_text(json.dumps([{"command_string": one} for one in (*commands, *wrong)]))
    result = subprocess.run(
        ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={tmp_path / 'commands.json'}"],
        env={**os.environ, "CLOUDSDK_CONFIG": str(tmp_path / "gcloud")},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    verdicts = [one["error_message"] if not one["success"] else "" for one in json.loads(result.stdout)]
    good, bad = verdicts[: len(commands)], verdicts[len(commands) :]
    assert [(command, error) for command, error in zip(commands, good, strict=True) if error] == []
    assert all(bad)
