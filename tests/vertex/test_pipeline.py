"""The pipeline: compiled, each of its steps, run whole in the images that Vertex AI would run, and handed over."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import BUCKET, Emulator
from google.cloud.aiplatform_v1 import types
from google.protobuf import json_format
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec
from standin import NUMBER, ROOT, Json, Refusal, StandIn, parsed, refuse

from vertex import pipeline
from vertex.graph import Images
from vertex.pipeline import Service
from vertex.settings import SettingsError

IMAGES = Images(*(f"europe-west4-docker.pkg.dev/zoo-42/images/{part}:1" for part in ("training", "model-server")))
FAMILIES = {"lite0": ["--quick"], "lite1": ["--model", "lite1", "--quick"]}
CLOTHING = ROOT.parent / "shared" / "data" / "clothing"
QUICK = ["--quick", "--size", "64", "--quiet", "--threads", "2"]


class Pipelines(StandIn):
    """Also Vertex AI's pipelines, and a registry that keeps a model's versions; `run` does what a pipeline does."""

    def __init__(self, bucket: str) -> None:
        super().__init__(bucket)
        self.run: Callable[[Json, dict[str, str]], list[str]] = lambda spec, parameters: []
        self.versions: dict[str, list[Any]] = {}

    def answer(self, method: str, path: str, query: dict[str, str], body: Json) -> Json:
        rest = re.sub(r"^/(v1|ui)/projects/[^/]+/locations/europe-west4/", "", path)
        parent = f"projects/{NUMBER}/locations/europe-west4"
        numbers = query.get("$alt", "").endswith("enum-encoding=int")
        if method == "POST" and rest == "pipelineJobs":
            self._meet_fault(method, path)
            return self._shown(self._start(f"{parent}/pipelineJobs/{query['pipelineJobId']}", body), numbers)
        if method == "GET" and rest.startswith("pipelineJobs/"):
            self._meet_fault(method, path)
            return self._shown(self._get(f"{parent}/{rest}"), numbers)
        if method == "GET" and (match := re.fullmatch(r"(models/\d+)@([a-zA-Z0-9-]+)", rest)):
            kept = self.versions.get(f"{parent}/{match[1]}", [])
            found = [one for one in kept if match[2] in (*one.version_aliases, one.version_id)]
            if not found:
                raise Refusal(f"The Model {rest} is not found.", "NOT_FOUND")
            return self._shown(found[-1], numbers)
        answer = super().answer(method, path, query, body)
        if method == "POST" and rest == "models:upload":
            return self._version(parsed(types.UploadModelRequest, body), answer)
        return answer

    def _meet_fault(self, method: str, path: str) -> None:
        for fault in self.faults:
            if fault.times and re.search(fault.pattern, f"{method} {path}"):
                fault.times -= 1
                raise Refusal(fault.message, fault.status)

    def _version(self, request: Any, operation: Json) -> Json:
        """https://docs.cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.models/upload"""
        ended = self.operations[operation["name"]]["ended"]
        made = self.things[ended["response"]["model"]]
        for alias in request.model.version_aliases:
            refuse(not re.fullmatch(r"[a-z][a-zA-Z0-9-]{0,126}[a-z0-9]", alias), f"version_aliases: {alias!r} is none")
        if request.parent_model:
            refuse(request.parent_model not in self.versions, f"{request.parent_model} is not found")
            del self.things[made.name]
            made.name = request.parent_model
        kept = self.versions.setdefault(made.name, [])
        for one in kept:  # an alias is one version's
            for alias in set(one.version_aliases) & set(made.version_aliases):
                one.version_aliases.remove(alias)
        kept.append(made)
        made.version_id = str(len(kept))
        ended["response"] |= {"model": made.name, "modelVersionId": made.version_id}
        return operation

    def _start(self, name: str, body: Json) -> Any:
        """https://docs.cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.pipelineJobs"""
        job = parsed(types.PipelineJob, body)
        refuse(not re.fullmatch(r"[a-z][-a-z0-9]{0,127}", name.rpartition("/")[2]), "pipeline_job_id: is invalid")
        refuse(name in self.things, "the pipeline job exists already")
        config = job.runtime_config
        refuse(not re.fullmatch(r"gs://[\w.-]+(/.*)?", config.gcs_output_directory), "gcs_output_directory: no gs://")
        spec = json_format.MessageToDict(job.pipeline_spec)
        try:
            known = json_format.ParseDict(spec, PipelineSpec()).root.input_definitions.parameters
        except json_format.ParseError as exc:
            raise Refusal(f"pipeline_spec: {exc}") from exc
        parameters = {key: str(value.string_value) for key, value in config.parameter_values.items()}
        refuse(set(parameters) - set(known), "runtime_config.parameter_values: has what the pipeline does not")
        missing = [key for key, one in known.items() if key not in parameters and not one.HasField("default_value")]
        refuse(missing, f"runtime_config.parameter_values: {missing} are missing")
        with self.lock:
            job.name, job.state = name, types.PipelineState.PIPELINE_STATE_PENDING
            job.create_time.GetCurrentTime()
            self.things[name] = job
        threading.Thread(target=self._work, args=[job, spec, parameters], daemon=True).start()
        return job

    def _work(self, job: Any, spec: Json, parameters: dict[str, str]) -> None:
        states, how = types.PipelineTaskDetail.State, types.PipelineState.PIPELINE_STATE_SUCCEEDED
        job.state = types.PipelineState.PIPELINE_STATE_RUNNING
        try:
            done = [(name, states.SUCCEEDED, "") for name in self.run(spec, parameters)]
        except Exception as exc:
            done, how = [("train-lite0", states.FAILED, str(exc))], types.PipelineState.PIPELINE_STATE_FAILED
        with self.lock:
            for i, (name, state, message) in enumerate(done):
                job.job_detail.task_details.add(task_id=i, task_name=name, state=state).error.message = message
            job.state = how


@pytest.fixture
def standin(emulator: Emulator) -> Iterator[Pipelines]:
    with Pipelines(emulator.url) as standin:
        yield standin


@pytest.fixture
def gke_env(tmp_path: Path) -> Path:
    return Path(shutil.copy(ROOT / "k8s/gke.env", tmp_path / "gke.env"))


@pytest.fixture
def door(
    standin: Pipelines, login: Path, settings_file: Path, gke_env: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """`make vertex-pipeline`, against the stand-in."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> int:
        known = ["--env", str(settings_file), "--gke-env", str(gke_env), "--endpoint", standin.url, "--pause", "0.1"]
        known += ["--image", IMAGES.training, "--model-server-image", IMAGES.model_server]
        known += ["--serving-image", IMAGES.training.replace("training", "endpoint")]
        return pipeline.main([*known, *words])

    return run


# Compiled.


def test_compiled_it_is_the_same_every_time_and_valid(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from vertex.graph import *; "
    code += f"compile_to(Path(sys.argv[1]), {FAMILIES!r}, {IMAGES!r}, Machine(8, 32, 'NVIDIA_L4', 1))"
    texts = []
    for seed in ("1", "2"):  # sets and dictionaries of other orders
        path = tmp_path / f"{seed}.yaml"
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", code, path], check=True, env=environment, timeout=120)
        texts.append(path.read_text())
    assert texts[0] == texts[1]
    [first] = yaml.safe_load_all(texts[0])
    spec = json_format.ParseDict(first, PipelineSpec())
    assert set(spec.root.dag.tasks) == {
        *("validate", "train-lite0", "train-lite1", "evaluate-lite0", "evaluate-lite1", "choose", "gate", "deliver")
    }
    cached = {name for name, task in spec.root.dag.tasks.items() if task.caching_options.enable_cache}
    assert cached - {"deliver"} == {"train-lite0", "train-lite1", "evaluate-lite0", "evaluate-lite1"}
    containers = {name: one["container"] for name, one in first["deploymentSpec"]["executors"].items()}
    assert {name for name, one in containers.items() if one["image"] == IMAGES.model_server} == {"exec-archive"}
    assert {tuple(one["command"]) for one in containers.values()} == {("python3.11", "-m", "vertex.steps")}
    resources = {name for name, one in containers.items() if one.get("resources", {}).get("cpuLimit") == 8}
    assert resources == {"exec-train-lite0", "exec-train-lite1"}
    assert not [word for one in containers.values() for word in one["args"] if not word]


@pytest.mark.parametrize(
    ("given", "options", "why"),
    [
        (["Lite0"], [], "'Lite0': wants a name of its own"),
        (["a", "a=--model lite1"], [], "'a=--model lite1': wants a name of its own"),
        (["a"], ["--require", "accuracy>=1"], "--require: that is the pipeline's gate"),
        (["a=--test 0.3"], [], "--test: all steps see the same splits"),
        (["a=--out=x"], [], "--out=x: a step's results go where"),
    ],
)
def test_a_family_that_cannot_be_is_refused(given: list[str], options: list[str], why: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(why)):
        pipeline.families(given, options)


def test_a_family_is_a_model_or_a_name_with_options() -> None:
    assert pipeline.families(["lite1", "big=--model 'a b' --epochs 3"], ["--quick"]) == {
        "lite1": ["--model", "lite1", "--quick"],
        "big": ["--model", "a b", "--epochs", "3", "--quick"],
    }


# What the cluster serves.


def test_the_clusters_file_is_changed_in_two_lines(gke_env: Path) -> None:
    assert Service.read(gke_env) == Service()  # the example
    before = gke_env.read_text().splitlines()
    for name, uri in (("cats", "gs://b/cats#sha256=1"), ("dogs", "gs://b/dogs"), ("cats", "gs://b/new#sha256=2")):
        Service.read(gke_env).with_model(name, uri).write(gke_env)
    assert Service.read(gke_env) == Service(("gs://b/new#sha256=2", "gs://b/dogs"), ("cats", "dogs"))
    assert Service.read(gke_env).of("dogs") == "gs://b/dogs"
    assert Service.read(gke_env).of("birds") == ""
    after = gke_env.read_text().splitlines()
    assert [line for line in after if line not in before] == [
        "MODEL_URI='gs://b/new#sha256=2 gs://b/dogs'",
        "MODELS=cats,dogs",
    ]
    assert len(after) == len(before)
    # As k8s/gke.sh reads it.
    shell = subprocess.run(["bash", "-c", f". {gke_env}; echo $MODEL_URI $MODELS"], capture_output=True, text=True)
    assert shell.stdout == "gs://b/new#sha256=2 gs://b/dogs cats,dogs\n"


def test_a_clusters_file_that_names_too_few_is_refused(gke_env: Path) -> None:
    gke_env.write_text("MODEL_URI='gs://b/a gs://b/b'\nMODELS=a\n")
    with pytest.raises(SettingsError, match="2 bundles and MODELS 1 names"):
        Service.read(gke_env)


# Submitted, followed, handed over: what the pipeline leaves in the bucket is written by the test.

PASSED: Json = {"gate": {"unmet": []}}
FAILED: Json = {"gate": {"unmet": ["accuracy >= 0.9 is required, but it is 0.5"]}}
RUN = ["gs://pets/data", "--name", "pets"]


def leaves(bucket: Any, report: Json, release: str = "") -> Callable[[Json, dict[str, str]], list[str]]:
    def run(_: Json, parameters: dict[str, str]) -> list[str]:
        folder = parameters["out"].removeprefix(f"gs://{BUCKET}/")
        bucket.blob(f"{folder}/report.json").upload_from_string(json.dumps(report))
        if release:
            bucket.blob(f"{folder}/release.env").upload_from_string(release)
        return ["validate", "gate"]

    return run


def test_what_passed_is_handed_over(
    door: Callable[..., int], standin: Pipelines, bucket: Any, gke_env: Path, capsys: Any
) -> None:
    Service(("gs://b/pets", "gs://b/dogs"), ("pets", "dogs")).write(gke_env)
    standin.run = leaves(bucket, PASSED, "MODEL_URI=gs://b/new#sha256=1\nMODELS=pets\n")
    assert door(*RUN, "--require", "accuracy>=0.9", "ece<=0.1", "--", "--quick") == 0
    assert Service.read(gke_env) == Service(("gs://b/new#sha256=1", "gs://b/dogs"), ("pets", "dogs"))
    said = capsys.readouterr()
    assert "gs://b/new#sha256=1 now" in said.out
    assert "gate: SUCCEEDED" in said.err
    [job] = [one for name, one in standin.things.items() if "/pipelineJobs/" in name]
    given = {key: value.string_value for key, value in job.runtime_config.parameter_values.items()}
    assert given["in_service"] == "gs://b/pets"
    assert given["require"] == "accuracy>=0.9\nece<=0.1"
    assert given["registry"] == "projects/zoo-42/locations/europe-west4"
    executors = json_format.MessageToDict(job.pipeline_spec)["deploymentSpec"]["executors"]
    assert executors["exec-train-lite1"]["container"]["args"][-3:] == ["--model", "lite1", "--quick"]
    # And again, by its id: the file names another by now, so it is left alone.
    assert door("--job", job.name.rpartition("/")[2]) == 1
    assert "names another pets than this was compared with" in capsys.readouterr().err


def test_what_did_not_pass_changes_nothing(
    door: Callable[..., int], standin: Pipelines, bucket: Any, gke_env: Path, capsys: Any
) -> None:
    before = gke_env.read_bytes()
    standin.run = leaves(bucket, FAILED, "MODEL_URI=gs://b/new#sha256=1\nMODELS=pets\n")
    assert door(*RUN) == 3
    assert gke_env.read_bytes() == before
    said = capsys.readouterr().err
    assert "the gate did not pass: accuracy >= 0.9 is required, but it is 0.5" in said
    assert "gke.env is as it was" in said


def test_a_pipeline_that_ends_well_without_a_release_is_no_success(
    door: Callable[..., int], standin: Pipelines, bucket: Any, gke_env: Path, capsys: Any
) -> None:
    before = gke_env.read_bytes()
    assert door(*RUN) == 1
    assert "has no report: the gate's step did not end well" in capsys.readouterr().err
    standin.run = leaves(bucket, PASSED)
    time.sleep(1)  # its id has the second
    assert door(*RUN) == 1
    assert "the gate passed, and nothing was released" in capsys.readouterr().err
    assert gke_env.read_bytes() == before


def test_a_step_that_fails_is_named(door: Callable[..., int], standin: Pipelines, capsys: Any) -> None:
    def run(*_: Any) -> list[str]:
        raise RuntimeError("The replica workerpool0-0 exited with a non-zero status of 1.")

    standin.run = run
    assert door(*RUN) == 1
    said = capsys.readouterr().err
    assert "train-lite0 failed" in said
    assert "exited with a non-zero status of 1" in said
    assert "console.cloud.google.com/vertex-ai/locations/europe-west4/pipelines/runs/kennel-pets-" in said


def test_an_expired_login_is_said(door: Callable[..., int], standin: Pipelines, capsys: Any) -> None:
    standin.login_expired = True
    assert door(*RUN) == 1
    assert "gcloud auth application-default login" in capsys.readouterr().err


def test_a_dry_run_sends_nothing(door: Callable[..., int], standin: Pipelines, tmp_path: Path, capsys: Any) -> None:
    assert door(*RUN, "--dry-run") == 0
    assert not standin.requests
    assert json.loads(capsys.readouterr().out)["data"] == "gs://pets/data"
    assert list((tmp_path / "build/pipeline").glob("kennel-pets-*.yaml"))
