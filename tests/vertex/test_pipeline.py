"""The pipeline: compiled, each of its steps, run whole in the images that Vertex AI would run, and handed over."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import BUCKET, Emulator
from containers import DOCKER, docker, engine, make, version
from google.cloud.aiplatform_v1 import types
from google.protobuf import json_format
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec
from standin import NUMBER, PYTHON, ROOT, Fault, Json, Refusal, StandIn, parsed, refuse

from bundle import golden, manifest
from bundle.manifest import Input, Manifest
from bundle.picture import Resize
from vertex import graph, pipeline, spec, steps
from vertex.graph import Images
from vertex.pipeline import Service
from vertex.push import check_options
from vertex.settings import Settings, SettingsError

INPUT = Input.drawn(Resize(32, 32, "crop", 32), golden.draw(1, 60, 80)[0])
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


# The registry, by the step itself in training's environment.


def bundle(folder: Path, version: str) -> Manifest:
    """One that can be kept and registered, and never asked."""

    def make(new: Path) -> Manifest:
        (new / "model.onnx").write_bytes(version.encode())
        return Manifest("pets", version, ("cat", "dog"), INPUT, "CC0-1.0")

    return manifest.write(folder, make)


@pytest.fixture
def register(standin: Pipelines, emulator: Emulator, login: Path) -> Callable[..., tuple[int, str]]:
    """-> the step's exit code, and what it complained of."""

    def run(folder: Path) -> tuple[int, str]:
        model = spec.model(Settings(), "pets", IMAGES.training, "", "")
        given = {"bundle": folder, "models": f"gs://{BUCKET}/bundles", "endpoint": standin.url}
        given |= {"registry": "projects/zoo-42/locations/europe-west4", "model": json.dumps(model)}
        # As Vertex AI names the files of a step's outputs; here is no mount, and none is needed.
        given |= {key: f"/gcs/{BUCKET}/steps/{key}" for key in ("released", "registered")}
        words = [f"{key}={value}" for key, value in given.items()]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_GCE_CHECK": "true"}
        command = [PYTHON, "-m", "vertex.steps", "register", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stderr

    return run


def test_each_bundle_is_one_version_of_its_model(
    register: Callable[..., tuple[int, str]], standin: Pipelines, bucket: Any, tmp_path: Path
) -> None:
    one, two = bundle(tmp_path / "one", "1"), bundle(tmp_path / "two", "2")
    for folder, made, number in (("one", one, "1"), ("two", two, "2"), ("one", one, "1")):
        assert register(tmp_path / folder) == (0, "")
        place = f"gs://{BUCKET}/bundles/pets-{made.digest[:12]}"
        released, registered = (bucket.blob(f"steps/{key}").download_as_text() for key in ("released", "registered"))
        assert released == f"{place}#sha256={made.digest}"
        assert registered.endswith(f"@{number}")
    [versions] = standin.versions.values()
    assert [one.display_name for one in versions] == ["pets", "pets"]
    assert [set(one.version_aliases) for one in versions] == [
        {f"sha256-{one.digest[:12]}"},
        {f"sha256-{two.digest[:12]}", "default"},
    ]
    assert versions[1].artifact_uri == f"gs://{BUCKET}/bundles/pets-{two.digest[:12]}"
    assert {blob.name for blob in bucket.list_blobs(prefix="bundles/")} == {
        f"bundles/pets-{made.digest[:12]}/{file}" for made in (one, two) for file in ("manifest.json", "model.onnx")
    }


@pytest.mark.parametrize(
    ("pattern", "status", "why"),
    [
        (
            "POST .*models:upload",
            "PERMISSION_DENIED",
            "refused with 403 (no): the pipeline's service account needs roles/",
        ),
        ("GET .*/models$", "UNAVAILABLE", "refused with 503 (no)"),
    ],
)
def test_a_registry_that_refuses_is_said_and_nothing_is_handed_over(
    register: Callable[..., tuple[int, str]],
    standin: Pipelines,
    bucket: Any,
    tmp_path: Path,
    pattern: str,
    status: str,
    why: str,
) -> None:
    standin.faults.append(Fault(pattern, status, "no"))
    bundle(tmp_path / "one", "1")
    code, said = register(tmp_path / "one")
    assert code == 1
    assert why in said
    assert not bucket.blob("steps/registered").exists()


# In containers, by kfp.local.


@pytest.fixture(scope="session")
def images() -> None:
    """The images under the names that Vertex AI would have them by."""
    if reason := engine():
        pytest.skip(reason)
    subprocess.run([ROOT / "tests/images/base.sh"], check=True)
    make("images")
    for part, name in (("training", IMAGES.training), ("model-server", IMAGES.model_server)):
        docker("tag", f"kennel/{part}:{version()}", name)


@pytest.mark.slow
@pytest.mark.usefixtures("images")
def test_the_image_that_trains_says_which_options_it_would_refuse() -> None:
    image = f"kennel/training:{version()}"
    ranges = [spec.example(text) for text in ("lr=1e-4:1e-2:log", "epochs=4:12", "augment=light,strong")]
    check_options(DOCKER, image, ["--quick", "--require", "accuracy>=0.9", *ranges])
    for options, sentence in (
        (["--learning-rate", "1"], "unrecognized arguments: --learning-rate 1"),
        (["--epochs", "0"], "training refuses --epochs 0: epochs, batch and accumulate must be at least 1"),
    ):
        with pytest.raises(SettingsError, match=re.escape(sentence)):
            check_options(DOCKER, image, options)


@pytest.fixture
def here(standin: Pipelines, emulator: Emulator, login: Path, tmp_path: Path) -> dict[str, str]:
    """Vertex AI's pipelines run in Docker; what was done before comes from the cache. The containers' environment."""
    environment = {
        "STORAGE_EMULATOR_HOST": emulator.url,
        "GOOGLE_APPLICATION_CREDENTIALS": str(login),
        "NO_GCE_CHECK": "true",
    }

    def run(spec: Json, parameters: dict[str, str]) -> list[str]:
        path, root = tmp_path / "received.yaml", tmp_path / "steps"
        path.write_text(yaml.safe_dump(spec))
        graph.in_docker(root, [tmp_path], environment, cached=True)
        graph.run_here(path, parameters)
        latest = max((one for one in root.iterdir() if not one.name.startswith(".")), key=lambda one: one.name)
        return [step.name for step in latest.iterdir()]

    standin.run = run
    return environment


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn pictures of three colours, drawn by training's own environment."""
    folder = tmp_path_factory.mktemp("drawn") / "colours"
    code = f"from pathlib import Path; from learner import folder; folder(Path({str(folder)!r}), validation=16)"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    subprocess.run([PYTHON, "-c", code], check=True, env=environment, timeout=120)
    for i, path in enumerate(sorted(folder.glob("validation/*/*"))):
        if i % 2:
            target = folder / "test" / path.relative_to(folder / "validation")
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    return folder


@pytest.fixture(scope="session")
def clothes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some photographs of three kinds of clothes."""
    if not CLOTHING.is_dir():
        pytest.skip("the photographs of clothes are not here")
    folder = tmp_path_factory.mktemp("photographs") / "clothes"
    for kind in ("hat", "pants", "shoes"):
        pictures = sorted((CLOTHING / "train" / kind).iterdir())[:30]
        for split, some in (("train", pictures[:14]), ("validation", pictures[14:22]), ("test", pictures[22:])):
            (folder / split / kind).mkdir(parents=True)
            for path in some:
                shutil.copy(path, folder / split / kind)
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*'cpu_limit', 'memory_limit'. have no effect in the current local runner")
@pytest.mark.parametrize(
    ("kind", "families"), [("colours", ["--family=lite0", "--family=lite1"]), ("clothes", ["--family=lite0"])]
)
def test_from_pictures_to_a_release_and_no_further_where_the_gate_does_not_pass(
    kind: str,
    families: list[str],
    request: pytest.FixtureRequest,
    images: None,
    here: dict[str, str],
    door: Callable[..., int],
    standin: Pipelines,
    bucket: Any,
    gke_env: Path,
    tmp_path: Path,
    capfd: Any,
) -> None:
    pictures = request.getfixturevalue(kind)
    said = [str(pictures), "--name", kind, *families]
    assert door(*said, "--require", "accuracy>=0.5", "--", *QUICK) == 0, "".join(capfd.readouterr())

    service = Service.read(gke_env)
    [uri] = service.uris
    assert service.names == (kind,)
    address, _, digest = uri.partition("#sha256=")
    folder = address.removeprefix(f"gs://{BUCKET}/")
    for blob in bucket.list_blobs(prefix=f"{folder}/"):
        (tmp_path / "fetched").mkdir(exist_ok=True)
        blob.download_to_filename(tmp_path / "fetched" / blob.name.rpartition("/")[2])
    made = manifest.read(tmp_path / "fetched")
    assert made.digest == digest
    assert made.classes == tuple(sorted(path.name for path in (pictures / "train").iterdir()))
    with zipfile.ZipFile(BytesIO(bucket.blob(f"{folder}.mar").download_as_bytes())) as mar:
        assert {"manifest.json", "model.onnx", "handler.py"} <= set(mar.namelist())
        assert manifest.parse(mar.read("manifest.json")).digest == digest
    [[model]] = standin.versions.values()
    assert model.artifact_uri == address
    assert model.display_name == kind

    # The same, from the cache, and asked for what no model reaches; the first is in service now.
    before, objects = gke_env.read_bytes(), {one.name for one in bucket.list_blobs(prefix="bundles/")}
    capfd.readouterr()
    assert door(*said, "--require", "pictures>=1000", "--", *QUICK) == 3
    printed = capfd.readouterr()
    assert "the gate did not pass: pictures >= 1000 is required, but it is 24" in printed.err
    assert gke_env.read_bytes() == before
    assert {one.name for one in bucket.list_blobs(prefix="bundles/")} == objects
    assert len(standin.versions[model.name]) == 1
    reports = [json.loads(one.download_as_bytes()) for one in bucket.list_blobs() if one.name.endswith("/report.json")]
    [comparison] = [found for one in reports if (found := one["gate"]["comparison"])]
    assert (comparison["won"], comparison["lost"]) == (0, 0)  # it is the one in service
    assert "gate: SUCCEEDED" in printed.err
    assert not re.search("train-lite0|archive|register", printed.err)
    assert len([one for one in bucket.list_blobs() if one.name.endswith("/release.env")]) == 1


@pytest.fixture(scope="session")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bundles: `right` knows the colours, `swapped` calls each by another's name."""
    folder = tmp_path_factory.mktemp("bundles")
    code = "from pathlib import Path; from drawn import bundle_of; from bundle.manifest import Decision; "
    code += f"bundle_of(Path({str(folder / 'right')!r}), ['blue', 'red', 'yellow'], Decision())"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    subprocess.run([PYTHON, "-c", code], check=True, env=environment, timeout=120)

    def swapped(new: Path) -> Manifest:
        made = manifest.read(folder / "right")
        for file in made.files:
            shutil.copy(folder / "right" / file, new)
        return dataclasses.replace(made, classes=("red", "yellow", "blue"))

    manifest.write(folder / "swapped", swapped)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"), [("right", "swapped", "passed"), ("swapped", "right", "failed")]
)
def test_the_gates_component_says_which_of_two_models_is_worse(
    images: None, colours: Path, judges: Path, tmp_path: Path, ours: str, theirs: str, verdict: str
) -> None:
    graph.in_docker(tmp_path, [colours, judges])
    asked = {"data": str(colours), "split": "test", "require": "", "in_service": str(judges / theirs)}
    task = graph.component(steps.gate, IMAGES.training)(bundle=str(judges / ours), out=str(tmp_path / "out"), **asked)
    assert task.outputs["verdict"] == verdict
    found = json.loads((tmp_path / "out/report.json").read_text())["gate"]
    assert found["comparison"]["won" if verdict == "passed" else "lost"] == found["comparison"]["pictures"]
    assert [text[:54] for text in found["unmet"]] == (
        [] if verdict == "passed" else ["it is worse than the model it must not be worse than: "]
    )
    assert (tmp_path / "out/report.html").exists()


REFUSED = [
    ({"split": "tset"}, "the gate's split 'tset' has no pictures; there are: train 36, validation 24, test 24"),
    ({"require": "accuracy>=0.5\nacuracy>=1"}, "'acuracy>=1': there is no metric acuracy"),
    ({"in_service": "OTHER"}, "does not know 3 of the 3 classes"),
    ({"in_service": "/nowhere"}, "/nowhere: does not exist"),
]


def test_what_will_be_asked_is_asked_of_the_data_first(colours: Path, tmp_path: Path) -> None:
    bundle(tmp_path / "other", "1")
    calls = []
    for given, _ in REFUSED:
        asked = {"data": str(colours), "split": "test", "require": "", "in_service": "", **given}
        words = [f"{key}={value}".replace("OTHER", str(tmp_path / "other")) for key, value in asked.items()]
        calls.append(["validate", *words, f"digest={tmp_path / 'digest'}"])
    # In one process, which imports torch once.
    code = f"from vertex.steps import main\nfor words in {calls!r}: print(main(words))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([PYTHON, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["1"] * len(REFUSED)
    refusals = [line for line in done.stderr.splitlines() if line.startswith("validate: ")]
    assert len(refusals) == len(REFUSED)
    for line, (_, why) in zip(refusals, REFUSED, strict=True):
        assert why in line
    assert not (tmp_path / "digest").exists()
