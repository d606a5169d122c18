"""Settings and specifications: what is refused before anything is sent, and what the stand-in refuses."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import IMAGE, SETTINGS
from google.cloud.aiplatform_v1 import types
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st
from standin import Refusal, StandIn, check_custom_job, check_deployed, check_model, check_tuning_job, parsed

from vertex import spec
from vertex.settings import FLEX_START_GPUS, STRATEGIES, Settings, SettingsError, problems, read, table

GOOD = {
    "project": "zoo-42",
    "region": "europe-west4",
    "bucket": "zoo-42-kennel",
    "repository": "images",
    "service_account": "trainer@zoo-42.iam.gserviceaccount.com",
    "machine": "g2-standard-8",
    "gpu": "NVIDIA_L4",
    "gpus": 1,
    "workers": 2,
    "strategy": "flex-start",
    "labels": "app=kennel,team=pets",
}
DATA, BASE = "gs://zoo-42-kennel/data/pets", "gs://zoo-42-kennel/vertex/pets-1/"
RANGES = ["lr=1e-4:2e-3:log", "epochs=2:9", "augment=light,strong"]


def settings(**changes: Any) -> Settings:
    return Settings(**{**GOOD, **changes})


def custom_job() -> dict[str, Any]:
    return spec.custom_job(settings(), "pets", IMAGE, DATA, ["--quick"], BASE)


def tuning_job() -> dict[str, Any]:
    return spec.tuning_job(settings(), "pets", IMAGE, DATA, [], BASE, RANGES)


def accepted(job: dict[str, Any], region: str = "europe-west4") -> None:
    """By the SDK's protos and the stand-in's rules. Raises Refusal."""
    if "jobSpec" in job:
        check_custom_job(parsed(types.CustomJob, job), region)
    else:
        check_tuning_job(parsed(types.HyperparameterTuningJob, job), region)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"gpu": "NVIDIA_TESLA_T4", "strategy": "spot"},
            r"g2-standard-8 has no NVIDIA_TESLA_T4: it carries NVIDIA_L4; .* n1-standard-4",
        ),
        ({"gpu": "NVIDIA_TESLA_K80", "strategy": "spot"}, "no machine in the table has NVIDIA_TESLA_K80"),
        ({"gpus": 2}, "g2-standard-8 takes 1 of NVIDIA_L4, not 2"),
        ({"machine": "n1-standard-8", "gpu": "NVIDIA_TESLA_T4", "gpus": 3, "strategy": "spot"}, "takes 1 or 2 or 4"),
        ({"gpu": "", "gpus": 0, "strategy": "spot"}, "comes with its GPUs: set NVIDIA_L4"),
        ({"gpu": "", "gpus": 1, "strategy": "spot"}, "1 GPUs of what type"),
        ({"machine": "g2-standard-9"}, "g2-standard-9' is not in vertex/machines.toml"),
        ({"region": "europe-north1"}, "region europe-north1 has no NVIDIA_L4: there is .*europe-west4"),
        ({"region": "europe-west99"}, "region europe-west99 has no NVIDIA_L4"),
        ({"machine": "n1-standard-8", "gpu": "NVIDIA_TESLA_T4"}, "flex-start is for L4.* not NVIDIA_TESLA_T4"),
        ({"machine": "n1-standard-8", "gpu": "", "gpus": 0}, "flex-start is for L4.* not none"),
        ({"timeout": 8 * 86400}, "flex-start runs for at most 7 days"),
        ({"timeout": 0}, "from a minute to 30 days"),
        ({"timeout": 31 * 86400, "strategy": "spot"}, "from a minute to 30 days"),
        ({"wait": 31 * 86400}, "at most 30 days"),
        ({"strategy": "cheap"}, "'cheap' is none of standard, spot, flex-start"),
        ({"strategy": "spot", "restart": False}, "spot without RESTART=yes"),
        (
            {"machine": "a3-highgpu-1g", "gpu": "NVIDIA_H100_80GB", "strategy": "standard"},
            "with standard take a3-highgpu-8g",
        ),
        ({"project": "Zoo 42"}, "'Zoo 42' is no project id"),
        ({"bucket": "gs://zoo"}, "'gs://zoo' is no bucket's name"),
        ({"repository": "Images"}, "repository 'Images'"),
        ({"service_account": "trainer"}, "NAME@PROJECT.iam.gserviceaccount.com"),
        ({"labels": "App=kennel"}, "label 'App=kennel' must be key=value"),
        ({"labels": "app"}, "label 'app' must be key=value"),
        ({"workers": 0}, "workers: 0 is not 1 to 64"),
        ({"trials": 2, "parallel": 3}, "trials 2 and parallel 3"),
        ({"endpoint_machine": "g2-standard-4"}, "the endpoint's image runs on CPUs"),
        ({"endpoint_max_replicas": 0}, "endpoint replicas: 1 to 0"),
    ],
)
def test_what_cannot_work_is_refused_with_what_would(changes: dict[str, Any], sentence: str) -> None:
    assert problems(settings()) == []
    [wrong] = problems(settings(**changes))
    assert re.search(sentence, wrong), wrong


def test_all_that_is_wrong_is_said_at_once() -> None:
    assert len(problems(settings(project="X", workers=0, timeout=0, gpus=7))) == 4


@pytest.mark.parametrize(
    ("lines", "flags", "sentence"),
    [
        ({"BUCKET": ""}, {}, "BUCKET is not set in"),
        ({"PROJECT": "your-project"}, {}, "PROJECT=your-project in .* is the example: write yours"),
        ({"TIMEOUT": "24"}, {}, "TIMEOUT in .*: '24' is no duration: write it as 90m, 12h or 2d"),
        ({"RESTART": "true"}, {}, "RESTART in .*: 'true' is neither yes nor no"),
        ({"GPUS": "one"}, {}, "GPUS in .*: 'one' is not a number"),
        ({"GPU_COUNT": "1"}, {}, "line 5: 'GPU_COUNT=1' is no setting: there are PROJECT"),
        ({}, {"workers": "many"}, "--workers: 'many' is not a number"),
    ],
)
def test_a_wrong_line_or_flag_is_named(
    tmp_path: Path, lines: dict[str, str], flags: dict[str, str], sentence: str
) -> None:
    path = tmp_path / "vertex.env"
    path.write_text("".join(f"{key}={value}\n" for key, value in {**SETTINGS, **lines}.items()))
    with pytest.raises(SettingsError, match=sentence):
        read(path, flags)


def test_a_flag_wins_over_its_line_and_the_file_may_have_comments(tmp_path: Path) -> None:
    path = tmp_path / "vertex.env"
    path.write_text("# ours\n" + "".join(f"{key}={value}  # so\n" for key, value in SETTINGS.items()) + "TIMEOUT=2d\n")
    assert read(path, {}).timeout == 2 * 86400
    assert read(path, {"timeout": "90m", "labels": None}).timeout == 5400
    with pytest.raises(SettingsError, match=r"none\.env cannot be read .*: copy vertex/vertex\.env"):
        read(tmp_path / "none.env", {})


def test_the_example_has_every_setting_and_works_once_filled_in() -> None:
    path = Path(spec.__file__).parent / "vertex.env"
    keys = re.findall(r"^([A-Z_]+)=", path.read_text(), re.MULTILINE)
    assert {key.lower() for key in keys} == set(Settings.__dataclass_fields__)
    read(path, {"project": "zoo-42", "bucket": "zoo-42-kennel"})


# Each is one of the ways in which a specification can be wrong: where, what, and the stand-in's answer.
POOL = ("jobSpec", "workerPoolSpecs", 0)
MACHINE, CONTAINER, TIMING = (*POOL, "machineSpec"), (*POOL, "containerSpec"), ("jobSpec", "scheduling")
MUTATIONS: list[tuple[tuple[Any, ...], Any, str]] = [
    (("displayName",), None, "display_name"),
    (("displayName",), "x" * 129, "display_name"),
    (("labels", "Team"), "pets", "key 'Team' is invalid"),
    (("labels", "team"), "Pets", "value 'Pets' is invalid"),
    (("jobSpec", "workerPools"), [], "no field named"),
    (("jobSpec", "workerPoolSpecs"), [], "worker_pool_specs: required"),
    ((*POOL, "replicaCount"), 2, "the primary replica is one"),
    ((*POOL, "replicaCount"), "one", "replicaCount"),
    (("jobSpec", "workerPoolSpecs", 1, "replicaCount"), 0, "at least 1"),
    (CONTAINER, None, "one of container_spec"),
    ((*CONTAINER, "imageUri"), None, "image_uri: required"),
    ((*CONTAINER, "imageUri"), "Images/Training", "is no image"),
    ((*CONTAINER, "args"), "--quick", "args"),
    ((*MACHINE, "machineType"), None, "machine_type: required"),
    ((*MACHINE, "machineType"), "g2-standard-5", "is not supported"),
    ((*MACHINE, "machineType"), "a2-highgpu-1g", "is not supported for machine type"),
    ((*MACHINE, "acceleratorType"), "NVIDIA_L5", "acceleratorType"),
    ((*MACHINE, "acceleratorType"), None, "needs accelerator_type"),
    ((*MACHINE, "acceleratorCount"), 2, "accelerator_count 2"),
    ((*MACHINE, "acceleratorCount"), None, "accelerator_count 0"),
    ((*TIMING, "timeout"), 86400, "timeout"),
    ((*TIMING, "timeout"), "-1s", "must be positive"),
    ((*TIMING, "timeout"), "604801s", "at most 7 days"),
    ((*TIMING, "strategy"), "CHEAP", "strategy"),
    ((*TIMING, "strategy"), "STANDARD", "only with FLEX_START"),
    (("jobSpec", "serviceAccount"), "trainer", "must be an email address"),
    (("jobSpec", "baseOutputDirectory", "outputUriPrefix"), "/tmp/out", "is no gs:// URI"),
]
STUDY = ("studySpec", "parameters", 0)
TUNING_MUTATIONS: list[tuple[tuple[Any, ...], Any, str]] = [
    (("studySpec", "metrics"), [], "metrics: required"),
    (("studySpec", "metrics", 0, "goal"), None, "metric_id and goal"),
    (("studySpec", "parameters"), [], "parameters: required"),
    ((*STUDY, "parameterId"), "epochs", "must be unique"),
    ((*STUDY, "doubleValueSpec", "minValue"), 1, "must be below"),
    ((*STUDY, "doubleValueSpec", "minValue"), 0, "positive values"),
    ((*STUDY, "doubleValueSpec"), None, "one of the value specs"),
    (("studySpec", "parameters", 2, "categoricalValueSpec", "values"), [], "values are required"),
    (("maxTrialCount",), 0, "max_trial_count"),
    (("parallelTrialCount",), 13, "more than max_trial_count"),
    (("trialJobSpec", "workerPoolSpecs", 0, "replicaCount"), 3, "the primary replica is one"),
]


def mutated(job: dict[str, Any], where: tuple[Any, ...], value: Any) -> dict[str, Any]:
    job = copy.deepcopy(job)
    inner: Any = job
    for key in where[:-1]:
        inner = inner[key]
    if value is None:
        del inner[where[-1]]
    else:
        inner[where[-1]] = value
    return job


@pytest.mark.parametrize(("where", "value", "answer"), MUTATIONS, ids=lambda one: str(one)[:40])
def test_a_mutated_job_is_refused(where: tuple[Any, ...], value: Any, answer: str) -> None:
    accepted(custom_job())
    with pytest.raises(Refusal, match=re.escape(answer)):
        accepted(mutated(custom_job(), where, value))


@pytest.mark.parametrize(("where", "value", "answer"), TUNING_MUTATIONS, ids=lambda one: str(one)[:40])
def test_a_mutated_tuning_job_is_refused(where: tuple[Any, ...], value: Any, answer: str) -> None:
    accepted(tuning_job())
    with pytest.raises(Refusal, match=re.escape(answer)):
        accepted(mutated(tuning_job(), where, value))


def test_a_job_in_a_region_without_its_gpu_is_refused() -> None:
    with pytest.raises(Refusal, match="NVIDIA_L4 is not available in europe-north1"):
        accepted(custom_job(), "europe-north1")


def machines() -> st.SearchStrategy[dict[str, Any]]:
    """Every machine with every GPU count that it takes, in every region that has it."""
    known, found = table(), []
    for name, machine in known["machines"].items():
        series = name.split("-")[0]
        choices = [(gpu, count) for gpu, counts in machine.get("gpus", {}).items() for count in counts]
        choices += [("", 0)] if series in ("n1", "e2") else []
        found += [
            {"machine": name, "gpu": gpu, "gpus": count, "region": region}
            for gpu, count in choices
            for region in known["regions"][gpu or series]
        ]
    return st.sampled_from(found)


names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
words = st.lists(st.text(min_size=1, max_size=30).filter(lambda text: not text.startswith("--")), max_size=4)
ranges = st.one_of(
    st.tuples(st.floats(1e-6, 1), st.floats(1.5, 1e3)).map(lambda b: f"lr={b[0]!r}:{b[1]!r}:log"),
    st.tuples(st.integers(-9, 4), st.integers(5, 99)).map(lambda b: f"epochs={b[0]}:{b[1]}"),
    st.lists(st.from_regex(r"[a-z]{1,8}", fullmatch=True), min_size=2, max_size=5, unique=True).map(
        lambda values: f"augment={','.join(values)}"
    ),
)


@given(
    machines(),
    st.sampled_from(list(STRATEGIES)),
    st.integers(1, 64),
    st.booleans(),
    st.integers(60, 30 * 86400),
    st.integers(0, 30 * 86400),
    st.lists(st.from_regex(r"[a-z][a-z0-9_-]{0,30}=[a-z0-9_-]{0,30}", fullmatch=True), max_size=4),
    st.sampled_from(["", GOOD["service_account"]]),
    names,
    words,
    st.tuples(st.integers(1, 100), st.integers(1, 100)),
    st.lists(ranges, min_size=1, max_size=3, unique_by=lambda text: text.split("=")[0]),
)
def test_whatever_the_checks_let_through_parses_and_is_accepted(
    machine: dict[str, Any],
    strategy: str,
    workers: int,
    restart: bool,
    timeout: int,
    wait: int,
    labels: list[str],
    account: str,
    name: str,
    arguments: list[str],
    trials: tuple[int, int],
    over: list[str],
) -> None:
    s = settings(
        **machine,
        strategy=strategy,
        workers=workers,
        restart=restart,
        timeout=timeout,
        wait=wait,
        labels=",".join(labels),
        service_account=account,
        trials=trials[0],
        parallel=trials[1],
    )
    jobs = (
        lambda: spec.custom_job(s, name, IMAGE, DATA, arguments, BASE),
        lambda: spec.tuning_job(s, name, IMAGE, DATA, arguments, BASE, over),
    )
    if wrong := problems(s):
        expected = (
            (strategy == "flex-start" and (timeout > 7 * 86400 or not FLEX_START_GPUS.fullmatch(s.gpu)))
            or (strategy == "spot" and not restart)
            or (strategy == "standard" and s.machine in ("a3-highgpu-1g", "a3-highgpu-2g", "a3-highgpu-4g"))
            or trials[0] < trials[1]
        )
        assert expected, wrong
        return
    for make in jobs:
        job = make()
        assert json.loads(json.dumps(job)) == job
        accepted(job, s.region)
    longest = spec.estimate(s).longest
    assert longest is None or longest > 0
    check_model(parsed(types.Model, spec.model(s, name, IMAGE, DATA, "1")))
    if s.region in table()["regions"]["n1"]:
        check_deployed(parsed(types.DeployedModel, spec.deployed_model(s, name, "m")), {"0": 100}, s.region)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("lr", "write option=lowest:highest"),
        ("lr=1", "at least two different values"),
        ("augment=light,light", "at least two different values"),
        ("lr=a:b", "with numbers"),
        ("lr=1:2:lin", "with numbers"),
        ("lr=2:1", "the first number must be below the second"),
        ("lr=nan:1", "the first number must be below the second"),
        ("lr=1:inf", "the first number must be below the second"),
        ("lr=0:1:log", "a log scale needs a lowest value above 0"),
    ],
)
def test_a_wrong_range_is_told(text: str, sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        spec.parameter(text)


@pytest.mark.parametrize(
    ("name", "data", "arguments", "sentence"),
    [
        ("Pets!", DATA, [], "the bundle's name 'Pets!'"),
        ("pets", "gs:/x", [], "is no gs:// address"),
        ("pets", DATA, ["--out=x"], "--out: where a job's results go"),
        ("pets", DATA, ["--checkpoints", "x"], "--checkpoints: where"),
        ("pets", DATA, ["--no-worse-than", "x"], "--no-worse-than: a bundle here is not there"),
    ],
)
def test_a_run_that_would_fail_once_it_is_paid_for(name: str, data: str, arguments: list[str], sentence: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(sentence)):
        spec.custom_job(settings(), name, IMAGE, data, arguments, BASE)


def test_what_is_tuned_is_not_given_as_well() -> None:
    for ranges, arguments in ((["lr=1:2", "lr=2:3"], []), (["lr=1:2"], ["--lr", "1"])):
        with pytest.raises(SettingsError, match="lr is given twice"):
            spec.tuning_job(settings(), "pets", IMAGE, DATA, arguments, BASE, ranges)
    with pytest.raises(SettingsError, match="no ranges to tune over"):
        spec.tuning_job(settings(), "pets", IMAGE, DATA, [], BASE, [])


def test_an_hour_costs_what_the_vendor_says() -> None:
    alone = {"gpu": "", "gpus": 0, "workers": 1, "strategy": "standard", "timeout": 3600, "region": "us-central1"}
    one = spec.estimate(settings(**{**alone, "machine": "n1-standard-4"}))
    assert one.hour == one.longest == pytest.approx(0.21849885)
    h100 = {**alone, "machine": "a3-highgpu-8g", "gpu": "NVIDIA_H100_80GB", "gpus": 8}
    assert spec.estimate(settings(**h100)).hour == pytest.approx(101.00735, abs=1e-3)
    four = spec.estimate(settings(**{**alone, "machine": "n1-standard-4", "workers": 2}), parallel=2, runs=6)
    assert (four.hour, four.longest) == (pytest.approx(4 * 0.21849885), pytest.approx(12 * 0.21849885))
    unknown = spec.estimate(settings(**{**alone, "machine": "a2-highgpu-1g", "gpu": "NVIDIA_TESLA_A100", "gpus": 1}))
    assert unknown.hour is None
    assert "no price for a2-highgpu-1g" in unknown.text


def test_a_dry_run_prints_what_would_be_sent_and_sends_nothing(
    vertex: Callable[..., int], standin: StandIn, pictures: Path, capsys: Any
) -> None:
    assert vertex("train", str(pictures), "--dry-run", "--out", "x/colours", "--", "--epochs", "3") == 0
    printed = json.loads(capsys.readouterr().out)
    accepted(printed)
    arguments = printed["jobSpec"]["workerPoolSpecs"][0]["containerSpec"]["args"]
    assert arguments == ["gs://zoo-42-kennel/data/colours", "--name", "colours", "--epochs", "3"]
    assert vertex("tune", str(pictures), "--dry-run", "--range", *RANGES) == 0
    accepted(json.loads(capsys.readouterr().out))
    assert vertex("deploy", "build/bundles/colours", "--dry-run") == 0
    deployed = json.loads(capsys.readouterr().out)
    json_format.ParseDict(deployed["model"], types.Model.pb(types.Model()))
    assert standin.requests == []


def test_a_refused_run_sends_nothing(
    vertex: Callable[..., int], standin: StandIn, pictures: Path, capsys: Any, emulator: Any
) -> None:
    before = emulator.count
    assert vertex("train", str(pictures), "--gpu", "NVIDIA_L4") == 1
    assert "vertex-train: machine n1-standard-8 has no NVIDIA_L4" in capsys.readouterr().err
    assert vertex("train", str(pictures / "nowhere")) == 1
    assert "nowhere is not there" in capsys.readouterr().err
    assert vertex("train") == 1
    assert "DATA is not set" in capsys.readouterr().err
    assert (standin.requests, emulator.count) == ([], before)
