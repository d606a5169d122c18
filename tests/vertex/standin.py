"""Vertex AI on this machine, as far as its clients can tell: its REST API, and jobs that really run.

Every request is parsed with the SDK's own protos, strictly; what they cannot know and Vertex AI refuses is in
RULES' functions, each with its page. A job's containers are processes here: the same command, arguments and
environment, with python3.11 meaning `python`, /app meaning this repository, and an emulator as the bucket.
"""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
import tomllib
import urllib.parse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
from google.cloud.aiplatform_v1 import types
from google.protobuf import json_format

ROOT = Path(__file__).parent.parent.parent
MACHINES = tomllib.loads((ROOT / "vertex" / "machines.toml").read_text())
PYTHON = str(ROOT / ".venv" / "bin" / "python")
NUMBER = "123456789012"  # Vertex AI names projects by their number
STRATEGIES = types.Scheduling.Strategy
RESTARTS = 5  # https://docs.cloud.google.com/vertex-ai/docs/training/understanding-training-service
GRACE_S = 10
STATUS = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
}
KINDS = {
    "customJobs": types.CustomJob,
    "hyperparameterTuningJobs": types.HyperparameterTuningJob,
    "models": types.Model,
    "endpoints": types.Endpoint,
}
Json = dict[str, Any]


class Refusal(Exception):
    """As google.rpc.Status: https://cloud.google.com/apis/design/errors."""

    def __init__(self, message: str, status: str = "INVALID_ARGUMENT") -> None:
        super().__init__(message)
        self.status = status


def refuse(wrong: Any, message: str) -> None:
    if wrong:
        raise Refusal(message)


def parsed(kind: Any, body: Json) -> Any:
    """Unknown fields, unknown enums, numbers for durations and text for numbers are refused, as its front end does."""
    try:
        return json_format.ParseDict(body, kind.pb(kind()))
    except json_format.ParseError as exc:
        raise Refusal(f"Invalid JSON payload received. {exc}") from exc


def check_named(one: Any) -> None:
    # https://docs.cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.customJobs
    refuse(not 1 <= len(one.display_name) <= 128, "display_name: required, up to 128 characters")
    # https://docs.cloud.google.com/resource-manager/docs/labels-overview#requirements
    refuse(len(one.labels) > 64, "labels: at most 64")
    for key, value in one.labels.items():
        refuse(not re.fullmatch(r"[a-z][a-z0-9_-]{0,62}", key), f"labels: the key {key!r} is invalid")
        refuse(not re.fullmatch(r"[a-z0-9_-]{0,63}", value), f"labels: the value {value!r} is invalid")


def check_machine(machine: Any, region: str, training: bool = True) -> None:
    # https://docs.cloud.google.com/vertex-ai/docs/training/configure-compute
    known = MACHINES["machines"].get(machine.machine_type)
    refuse(not machine.machine_type, "machine_spec.machine_type: required")
    refuse(not known, f'Machine type "{machine.machine_type}" is not supported.')
    gpu, count = types.AcceleratorType(machine.accelerator_type).name, machine.accelerator_count
    carries, series = known.get("gpus", {}), machine.machine_type.split("-")[0]
    if gpu == "ACCELERATOR_TYPE_UNSPECIFIED":
        refuse(count, "machine_spec.accelerator_count: needs accelerator_type")
        refuse(training and carries and series != "n1", f"{machine.machine_type} requires an accelerator_type")
        gpu = series
    else:
        refuse(gpu not in carries, f'Accelerator "{gpu}" is not supported for machine type "{machine.machine_type}".')
        refuse(count not in carries[gpu], f"accelerator_count {count} is not supported for {machine.machine_type}")
    # https://docs.cloud.google.com/vertex-ai/docs/general/locations#accelerators
    refuse(region not in MACHINES["regions"][gpu], f"{gpu} is not available in {region}")


def check_job_spec(spec: Any, region: str) -> None:
    pools = spec.worker_pool_specs
    # https://docs.cloud.google.com/vertex-ai/docs/reference/rest/v1/CustomJobSpec
    refuse(not pools, "job_spec.worker_pool_specs: required")
    # https://docs.cloud.google.com/vertex-ai/docs/training/distributed-training
    refuse(pools[0].replica_count != 1, "worker_pool_specs[0].replica_count: the primary replica is one")
    for pool in pools:
        refuse(pool.replica_count < 1, "worker_pool_specs.replica_count: at least 1")
        refuse(pool.WhichOneof("task") is None, "worker_pool_specs: one of container_spec and python_package_spec")
        refuse(not pool.container_spec.image_uri, "container_spec.image_uri: required")
        image = r"[a-z0-9-]+(\.[a-z0-9-]+)*(:\d+)?(/[a-z0-9._-]+)+(:[\w.-]+)?(@sha256:[0-9a-f]{64})?"
        refuse(not re.fullmatch(image, pool.container_spec.image_uri), "container_spec.image_uri: is no image")
        check_machine(pool.machine_spec, region)
    check_scheduling(spec)
    # https://docs.cloud.google.com/vertex-ai/docs/training/configure-service-account
    refuse(spec.service_account and "@" not in spec.service_account, "service_account: must be an email address")
    # https://docs.cloud.google.com/vertex-ai/docs/reference/rest/v1/GcsDestination
    base = spec.base_output_directory.output_uri_prefix
    refuse(
        base and not re.fullmatch(r"gs://[a-z0-9][a-z0-9_.-]+(/.*)?", base), "base_output_directory: is no gs:// URI"
    )


def check_scheduling(spec: Any) -> None:
    # https://docs.cloud.google.com/vertex-ai/docs/reference/rest/v1/CustomJobSpec#Scheduling
    timing = spec.scheduling
    if timing.HasField("timeout"):
        refuse(timing.timeout.ToSeconds() <= 0, "scheduling.timeout: must be positive")
    refuse(timing.max_wait_duration.ToSeconds() < 0, "scheduling.max_wait_duration: must not be negative")
    if timing.strategy != STRATEGIES.FLEX_START:
        refuse(timing.HasField("max_wait_duration"), "scheduling.max_wait_duration: only with FLEX_START")
        small = any(re.fullmatch(r"a3-highgpu-[124]g", p.machine_spec.machine_type) for p in spec.worker_pool_specs)
        # https://docs.cloud.google.com/compute/docs/accelerator-optimized-machines#a3-high-vms
        refuse(small and timing.strategy != STRATEGIES.SPOT, "this machine type needs SPOT or FLEX_START")
        return
    # https://docs.cloud.google.com/vertex-ai/docs/training/schedule-jobs-dws#requirements
    machines = [pool.machine_spec for pool in spec.worker_pool_specs]
    for machine in machines:
        gpu = types.AcceleratorType(machine.accelerator_type).name
        refuse(not re.search("_(L4|A100|H100|H200|B200)", gpu), f"FLEX_START does not support {gpu}")
        refuse(machine != machines[0], "FLEX_START needs the same machine configuration for all worker pools")
    refuse(timing.timeout.ToSeconds() > 7 * 86400, "FLEX_START: the timeout is at most 7 days")


def check_custom_job(job: Any, region: str) -> None:
    check_named(job)
    check_job_spec(job.job_spec, region)


def check_tuning_job(job: Any, region: str) -> None:
    check_named(job)
    check_job_spec(job.trial_job_spec, region)
    # https://docs.cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.hyperparameterTuningJobs
    refuse(job.max_trial_count < 1, "max_trial_count: required")
    refuse(job.parallel_trial_count < 1, "parallel_trial_count: required")
    refuse(job.parallel_trial_count > job.max_trial_count, "parallel_trial_count: more than max_trial_count")
    # https://docs.cloud.google.com/vertex-ai/docs/reference/rest/v1/StudySpec
    study = job.study_spec
    refuse(not study.metrics, "study_spec.metrics: required")
    for metric in study.metrics:
        refuse(not metric.metric_id or not metric.goal, "study_spec.metrics: metric_id and goal are required")
    refuse(not study.parameters, "study_spec.parameters: required")
    names = [one.parameter_id for one in study.parameters]
    refuse(not all(names) or len(set(names)) < len(names), "study_spec.parameters: parameter_id must be unique")
    for one in study.parameters:
        kind = one.WhichOneof("parameter_value_spec")
        refuse(not kind, f"parameter {one.parameter_id}: one of the value specs is required")
        spec = getattr(one, kind)
        if kind in ("double_value_spec", "integer_value_spec"):
            refuse(
                not spec.min_value < spec.max_value, f"parameter {one.parameter_id}: min_value must be below max_value"
            )
            log = one.scale_type == types.StudySpec.ParameterSpec.ScaleType.UNIT_LOG_SCALE
            refuse(log and spec.min_value <= 0, f"parameter {one.parameter_id}: a log scale needs positive values")
        else:
            refuse(not spec.values, f"parameter {one.parameter_id}: values are required")


def check_model(model: Any) -> None:
    check_named(model)
    # https://docs.cloud.google.com/vertex-ai/docs/reference/rest/v1/ModelContainerSpec
    container = model.container_spec
    refuse(not container.image_uri, "container_spec.image_uri: required")
    # https://docs.cloud.google.com/vertex-ai/docs/predictions/use-custom-container#requirements
    hosts = r"([a-z0-9-]+-docker\.pkg\.dev|([a-z]+\.)?gcr\.io)/.+"
    refuse(not re.fullmatch(hosts, container.image_uri), "image_uri: must be in Artifact Registry")
    for route in (container.predict_route, container.health_route):
        refuse(not re.fullmatch(r"/[\w/:.-]*", route), "container_spec: predict_route and health_route begin with /")
    for port in container.ports:
        refuse(not 1 <= port.container_port <= 65535, "container_spec.ports: 1 to 65535")
    refuse(model.artifact_uri and not model.artifact_uri.startswith("gs://"), "artifact_uri: is no gs:// URI")


def check_deployed(deployed: Any, traffic: dict[str, int], region: str) -> None:
    # https://docs.cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.endpoints/deployModel
    resources = deployed.dedicated_resources
    refuse(deployed.WhichOneof("prediction_resources") is None, "deployed_model: resources are required")
    refuse(resources.min_replica_count < 1, "min_replica_count: at least 1")
    refuse(0 < resources.max_replica_count < resources.min_replica_count, "max_replica_count: below min_replica_count")
    check_machine(resources.machine_spec, region, training=False)
    refuse(traffic and sum(traffic.values()) != 100, "traffic_split: must add up to 100")


@dataclass
class Fault:
    """Answers requests whose "METHOD path" it finds with a status, `times` times."""

    pattern: str
    status: str
    message: str
    times: int = 1_000_000


@dataclass
class Run:
    """One custom job's processes: of a job, or of a trial."""

    spec: Any
    job: str
    base: str
    environment: dict[str, str]
    arguments: list[str] = field(default_factory=list)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    preempted: set[str] = field(default_factory=set)
    restarts: int = 0
    cancelled: bool = False


class StandIn:
    """Serves on a free port while entered; `bucket` is the emulator's address, as STORAGE_EMULATOR_HOST has it."""

    second = 1.0  # of a job's timeout

    def __init__(self, bucket: str, python: str = PYTHON) -> None:
        self.bucket, self.python = bucket, python
        self.requests: list[tuple[str, str, Json]] = []
        self.faults: list[Fault] = []
        self.quota: dict[str, int] = {}  # GPUs that the project may have, by type
        self.things: dict[str, Any] = {}
        self.operations: dict[str, Json] = {}
        self.entries: list[Json] = []
        self.runs: dict[str, Run] = {}
        self.login_expired = False
        self.broken_container = ""  # what a deployment then fails with
        self.lock = threading.RLock()
        self.threads: list[threading.Thread] = []
        self._count = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "StandIn":
        threading.Thread(target=self._server.serve_forever, args=[0.05], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for run in self.runs.values():
            run.cancelled = True
        for thread in self.threads:
            thread.join(2 * GRACE_S)
        self._server.shutdown()
        self._server.server_close()

    def preempt(self, worker: str = "workerpool0-0") -> None:
        """Take this worker's machine away: SIGKILL to all its processes, as when a spot machine goes."""
        with self.lock:
            [run] = [run for run in self.runs.values() if worker in run.processes]
            run.preempted.add(worker)
            _kill(run.processes[worker])

    def answer(self, method: str, path: str, query: dict[str, str], body: Json) -> Json:
        """One request -> its answer. Raises Refusal."""
        self.requests.append((method, path, body))
        for fault in self.faults:
            if fault.times and re.search(fault.pattern, f"{method} {path}"):
                fault.times -= 1
                raise Refusal(fault.message, fault.status)
        if (method, path) == ("POST", "/v2/entries:list"):
            return self._logs(body)
        # The SDK asks for operations under /ui where it speaks REST.
        if not (match := re.fullmatch(r"/(?:v1|v1beta1|ui)/(projects/[^/]+/locations/([a-z0-9-]+))/(.+)", path)):
            raise Refusal(f"The requested URL {path} was not found on this server.", "NOT_FOUND")
        parent, region, rest = match.groups()
        refuse(region not in MACHINES["regions"]["e2"], f"Location {region} is not supported.")
        parent = f"projects/{NUMBER}/locations/{region}"
        name = f"{parent}/{rest.split('@')[0]}"  # a model's versions are one here
        numbers = query.get("$alt", "").endswith("enum-encoding=int")
        match method, re.sub(r"/\d+(@\w+)?", "/N", rest):
            case "POST", "customJobs":
                return self._shown(self._create_job(parent, region, parsed(types.CustomJob, body)), numbers)
            case "POST", "hyperparameterTuningJobs":
                job = parsed(types.HyperparameterTuningJob, body)
                return self._shown(self._create_tuning(parent, region, job), numbers)
            case "POST", "models:upload":
                request = parsed(types.UploadModelRequest, body)
                check_model(request.model)
                with self.lock:
                    made = self._new(parent, "models", request.model)
                    made.version_id = "1"
                    made.supported_deployment_resources_types.append(
                        types.Model.DeploymentResourcesType.DEDICATED_RESOURCES
                    )
                answer = {"@type": _type("UploadModelResponse"), "model": made.name, "modelVersionId": "1"}
                return self._operation(made.name, "UploadModelOperationMetadata", answer)
            case "POST", "endpoints":
                endpoint = parsed(types.Endpoint, body)
                check_named(endpoint)
                with self.lock:
                    made = self._new(parent, "endpoints", endpoint)
                answer = {"@type": _type("Endpoint"), **self._shown(made, numbers)}
                return self._operation(made.name, "CreateEndpointOperationMetadata", answer)
            case "POST", "endpoints/N:deployModel":
                return self._deploy(name.rpartition(":")[0], region, parsed(types.DeployModelRequest, body))
            case "POST", "endpoints/N:undeployModel":
                request = parsed(types.UndeployModelRequest, body)
                endpoint = self._get(name.rpartition(":")[0])
                with self.lock:
                    left = [one for one in endpoint.deployed_models if one.id != request.deployed_model_id]
                    refuse(len(left) == len(endpoint.deployed_models), "deployed_model_id: is not deployed here")
                    refuse(endpoint.traffic_split[request.deployed_model_id], "the model still gets traffic")
                    del endpoint.deployed_models[:]
                    endpoint.deployed_models.extend(left)
                    del endpoint.traffic_split[request.deployed_model_id]
                answer = {"@type": _type("UndeployModelResponse")}
                return self._operation(endpoint.name, "UndeployModelOperationMetadata", answer)
            case "POST", "customJobs/N:cancel" | "hyperparameterTuningJobs/N:cancel":
                self._cancel(name.rpartition(":")[0])
                return {}
            case "GET", "customJobs" | "hyperparameterTuningJobs" | "models" | "endpoints":
                return {rest: [self._shown(one, numbers) for one in self._listed(name, query.get("filter", ""))]}
            case "GET", found if "operations/" in found:
                return self._progress(name)
            case "GET", found if found.removesuffix("/N") in KINDS:
                return self._shown(self._get(name), numbers)
        raise Refusal(f"{method} {path} is not known here", "NOT_FOUND")

    def _get(self, name: str) -> Any:
        with self.lock:
            if name not in self.things:
                raise Refusal(f"The resource {name} is not found.", "NOT_FOUND")
            return self.things[name]

    def _listed(self, collection: str, wanted: str) -> list[Any]:
        # https://docs.cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.customJobs/list
        names = re.fullmatch(r'(?:display_name="([^"]*)")?', wanted)
        refuse(names is None, f"filter {wanted!r} is not known here")
        with self.lock:
            found = [one for name, one in self.things.items() if name.rpartition("/")[0] == collection]
        return [one for one in reversed(found) if names is None or names[1] in (None, one.display_name)]

    def _shown(self, one: Any, numbers: bool) -> Json:
        with self.lock:
            return json_format.MessageToDict(one, use_integers_for_enums=numbers)

    def _new(self, parent: str, kind: str, one: Any) -> Any:
        self._count += 1
        one.name = f"{parent}/{kind}/{8_000_000_000 + self._count}"
        one.create_time.GetCurrentTime()
        one.update_time.GetCurrentTime()
        self.things[one.name] = one
        return one

    def _operation(self, of: str, metadata: str, response: Json, error: Json | None = None) -> Json:
        """A long-running operation, which is asked for once before it is done."""
        self._count += 1
        name = f"{of}/operations/{self._count}"
        running = {"name": name, "metadata": {"@type": _type(metadata)}}
        ended = {"error": error} if error else {"response": response}
        self.operations[name] = {"asked": 0, "running": running, "ended": {**running, "done": True, **ended}}
        return running

    def _progress(self, name: str) -> Json:
        if name not in self.operations:
            matching = [one for one in self.operations if one.endswith("/operations/" + name.rpartition("/")[2])]
            if not matching:
                raise Refusal(f"Operation {name} not found.", "NOT_FOUND")
            name = matching[0]
        operation = self.operations[name]
        operation["asked"] += 1
        return operation["ended"] if operation["asked"] > 1 else operation["running"]  # type: ignore[no-any-return]

    def _deploy(self, name: str, region: str, request: Any) -> Json:
        endpoint = self._get(name)
        deployed = request.deployed_model
        check_deployed(deployed, dict(request.traffic_split), region)
        model = self._get(re.sub(r"projects/[^/]+", f"projects/{NUMBER}", deployed.model).split("@")[0])
        if self.broken_container:
            error = {"code": 9, "message": self.broken_container}
            return self._operation(name, "DeployModelOperationMetadata", {}, error)
        with self.lock:
            self._count += 1
            deployed.id = str(self._count)
            deployed.model = model.name
            endpoint.deployed_models.append(deployed)
            split = dict(request.traffic_split) or {"0": 100}  # "0" is the one that comes
            endpoint.traffic_split.clear()
            endpoint.traffic_split.update({deployed.id if key == "0" else key: share for key, share in split.items()})
        answer = {"@type": _type("DeployModelResponse"), "deployedModel": self._shown(deployed, False)}
        return self._operation(name, "DeployModelOperationMetadata", answer)

    def _check_quota(self, spec: Any, at_once: int = 1) -> None:
        # https://docs.cloud.google.com/vertex-ai/docs/quotas#serverless-training
        for pool in spec.worker_pool_specs:
            gpu = types.AcceleratorType(pool.machine_spec.accelerator_type).name
            wanted = sum(p.replica_count * p.machine_spec.accelerator_count for p in spec.worker_pool_specs) * at_once
            if wanted > self.quota.get(gpu, wanted):
                metric = f"custom_model_training_{gpu.lower()}_gpus"
                message = f"The following quota metrics exceed quota limits: aiplatform.googleapis.com/{metric}"
                raise Refusal(message, "RESOURCE_EXHAUSTED")

    def _create_job(self, parent: str, region: str, job: Any) -> Any:
        check_custom_job(job, region)
        self._check_quota(job.job_spec)
        with self.lock:
            self._new(parent, "customJobs", job)
            job.state = types.JobState.JOB_STATE_QUEUED
        run = Run(job.job_spec, job.name, job.job_spec.base_output_directory.output_uri_prefix, {})
        self._thread(self._run_job, job, run)
        return job

    def _thread(self, target: Callable[..., None], *arguments: Any) -> None:
        self.threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        self.threads[-1].start()

    def _run_job(self, job: Any, run: Run) -> None:
        self.runs[job.name] = run
        self._state(job, types.JobState.JOB_STATE_PENDING)
        error = self._run(run, lambda: self._state(job, types.JobState.JOB_STATE_RUNNING))
        with self.lock:
            job.end_time.GetCurrentTime()
            if error:
                job.error.code, job.error.message = error
        end = "CANCELLED" if run.cancelled else "FAILED" if error else "SUCCEEDED"
        self._state(job, types.JobState[f"JOB_STATE_{end}"])

    def _state(self, job: Any, state: Any) -> None:
        with self.lock:
            job.state = state
            job.update_time.GetCurrentTime()
            if state == types.JobState.JOB_STATE_RUNNING and not job.HasField("start_time"):
                job.start_time.GetCurrentTime()

    def _create_tuning(self, parent: str, region: str, job: Any) -> Any:
        check_tuning_job(job, region)
        self._check_quota(job.trial_job_spec, job.parallel_trial_count)
        with self.lock:
            self._new(parent, "hyperparameterTuningJobs", job)
            job.state = types.JobState.JOB_STATE_PENDING
        self._thread(self._run_tuning, job)
        return job

    def _run_tuning(self, job: Any) -> None:
        self._state(job, types.JobState.JOB_STATE_RUNNING)
        with ThreadPoolExecutor(job.parallel_trial_count) as pool:
            done = list(pool.map(lambda number: self._run_trial(job, number), range(1, job.max_trial_count + 1)))
        cancelled = any(run.cancelled for name, run in self.runs.items() if name.startswith(job.name))
        with self.lock:
            job.end_time.GetCurrentTime()
            if not any(done):
                job.error.code, job.error.message = 9, "All trials failed."
        end = "CANCELLED" if cancelled else "SUCCEEDED" if any(done) else "FAILED"
        self._state(job, types.JobState[f"JOB_STATE_{end}"])

    def _run_trial(self, job: Any, number: int) -> bool:
        """https://docs.cloud.google.com/vertex-ai/docs/training/code-requirements: a trial's variables and folders."""
        states = types.Trial.State
        if job.state == types.JobState.JOB_STATE_CANCELLING:
            return False
        with self.lock:
            trial = job.trials.add()
            trial.id, trial.name = str(number), f"{job.name}/trials/{number}"
            trial.state = states.ACTIVE
            trial.start_time.GetCurrentTime()
            arguments = []
            for spec in job.study_spec.parameters:
                value = _suggest(spec, number)
                one = trial.parameters.add()
                one.parameter_id = spec.parameter_id
                json_format.ParseDict(value, one.value)
                arguments.append(f"--{spec.parameter_id}={value}")
        base = job.trial_job_spec.base_output_directory.output_uri_prefix.rstrip("/")
        with tempfile.TemporaryDirectory() as folder:
            metrics = Path(folder) / "hypertune" / "output.metrics"
            variables = {"CLOUD_ML_HP_METRIC_FILE": str(metrics), "CLOUD_ML_TRIAL_ID": str(number)}
            run = Run(job.trial_job_spec, job.name, f"{base}/{number}", variables, arguments)
            self.runs[trial.name] = run
            error = self._run(run, lambda: None)
            lines = metrics.read_text().splitlines() if metrics.exists() else []
        with self.lock:
            trial.end_time.GetCurrentTime()
            for metric in job.study_spec.metrics:
                if found := [json.loads(line) for line in lines if metric.metric_id in json.loads(line)]:
                    final = trial.final_measurement
                    final.step_count = int(found[-1]["global_step"])
                    final.metrics.add(metric_id=metric.metric_id, value=float(found[-1][metric.metric_id]))
            good = not error and bool(trial.final_measurement.metrics)
            trial.state = states.SUCCEEDED if good else states.INFEASIBLE
            trial.infeasible_reason = "" if good else error[1] if error else "The trial reported no metric."
        return good

    def _cancel(self, name: str) -> None:
        job = self._get(name)
        self._state(job, types.JobState.JOB_STATE_CANCELLING)
        for key, run in self.runs.items():
            if key.startswith(name):
                run.cancelled = True

    def _run(self, run: Run, running: Callable[[], None]) -> tuple[int, str] | None:
        """All workers until the first ends -> None, or the code and message of the job's error."""
        seconds = run.spec.scheduling.timeout.ToSeconds() or 7 * 86400
        deadline = time.monotonic() + seconds * self.second
        while not run.cancelled:
            with tempfile.TemporaryDirectory(prefix="container-") as folder:
                self._start(run, Path(folder))
                running()
                failed = self._wait(run, deadline)
                codes = {worker: process.poll() for worker, process in run.processes.items()}
                self._end(run)
            if not failed or run.cancelled:
                return None
            code = codes[failed]
            taken = failed in run.preempted or (code is not None and (code < 0 or code > 127))
            if taken and not run.spec.scheduling.disable_retries and run.restarts < RESTARTS:
                run.restarts += 1
                run.preempted.clear()
                continue
            if time.monotonic() > deadline:
                run.cancelled = True
                break
            job, where = run.job.rpartition("/")[2], "https://console.cloud.google.com/logs/viewer"
            return 3, (
                f"The replica {failed} exited with a non-zero status of {code}. To find out more about why your job "
                f"exited please check the logs: {where}?project={NUMBER}&resource=ml_job%2Fjob_id%2F{job}"
            )
        return None

    def _wait(self, run: Run, deadline: float) -> str | None:
        """Until the first worker is done, or one fails: its name, or None where all is well."""
        while True:
            for worker, process in run.processes.items():
                if (code := process.poll()) is not None:
                    if code or worker in run.preempted:
                        return worker
                    if worker == "workerpool0-0":
                        return None
            if run.cancelled or time.monotonic() > deadline:
                return "workerpool0-0"
            time.sleep(0.02)

    def _start(self, run: Run, folder: Path) -> None:
        """Every worker's container: https://docs.cloud.google.com/vertex-ai/docs/training/code-requirements."""
        pools = run.spec.worker_pool_specs
        port = _free_port()
        hosts = {f"workerpool{i}": ["127.0.0.1:2222"] * pool.replica_count for i, pool in enumerate(pools)}
        base = run.base.rstrip("/")
        places = {"MODEL": "model", "CHECKPOINT": "checkpoints", "TENSORBOARD_LOG": "logs"}
        for i, pool in enumerate(pools):
            for index in range(pool.replica_count):
                worker = f"workerpool{i}-{index}"
                cluster = {
                    "cluster": hosts,
                    "environment": "cloud",
                    "task": {"type": f"workerpool{i}", "index": index},
                    "job": json.dumps({"job_id": run.job.rpartition("/")[2]}),
                    "open_ports": [port],
                }
                environment = {
                    "PATH": os.environ["PATH"],
                    "PYTHONPATH": str(ROOT),
                    "HOME": str(folder),
                    "PYTHONUNBUFFERED": "1",
                    "STORAGE_EMULATOR_HOST": self.bucket,
                    "NO_GCE_CHECK": "true",
                    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
                    "OMP_NUM_THREADS": "1",
                    "CLUSTER_SPEC": json.dumps(cluster),
                    "CLOUD_ML_JOB_ID": run.job.rpartition("/")[2],
                    **({f"AIP_{key}_DIR": f"{base}/{place}/" for key, place in places.items()} if base else {}),
                    **{one.name: one.value for one in pool.container_spec.env},
                    **run.environment,
                }
                command = [*pool.container_spec.command, *pool.container_spec.args, *run.arguments]
                if not command or command[0] != "python3.11":
                    raise NotImplementedError(f"here is no image, and {command} is not a command of python3.11")
                (home := folder / worker).mkdir()
                process = subprocess.Popen(
                    [self.python, *command[1:]],
                    cwd=home,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
                run.processes[worker] = process
                for stream, severity in ((process.stdout, "INFO"), (process.stderr, "ERROR")):
                    threading.Thread(target=self._log, args=[run.job, worker, stream, severity], daemon=True).start()

    def _log(self, job: str, worker: str, stream: Any, severity: str) -> None:
        for line in stream:
            with self.lock:
                self.entries.append(
                    {
                        "insertId": f"{len(self.entries):08}",
                        "timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
                        "severity": severity,
                        "logName": f"projects/{NUMBER}/logs/{worker}",
                        "resource": {
                            "type": "ml_job",
                            "labels": {"job_id": job.rpartition("/")[2], "task_name": worker},
                        },
                        "jsonPayload": {"message": line.decode(errors="replace").rstrip("\n"), "levelname": severity},
                    }
                )
        stream.close()

    def _end(self, run: Run) -> None:
        """SIGTERM, and SIGKILL after a while, to all of a run's processes."""
        processes = list(run.processes.values())
        for process in processes:
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            _kill(process)
            process.wait()
        run.processes = {}

    def _logs(self, body: Json) -> Json:
        """https://docs.cloud.google.com/logging/docs/reference/v2/rest/v2/entries/list"""
        known = {"resourceNames", "projectIds", "filter", "orderBy", "pageSize", "pageToken"}
        refuse(set(body) - known, f"Invalid JSON payload received. Unknown name {sorted(set(body) - known)}")
        refuse(not body.get("resourceNames"), "resource_names: required")
        text = body.get("filter", "")
        job = re.search(r'resource\.labels\.job_id="(\d+)"', text)
        refuse(not job or 'resource.type="ml_job"' not in text, f"filter {text!r} is not known here")
        bounds = re.findall(r'timestamp(>=?|<)"([^"]+)"', text)
        after = re.search(r'insertId>"(\d+)"', text)
        with self.lock:
            found = [one for one in self.entries if job and one["resource"]["labels"]["job_id"] == job[1]]
        for sign, bound in bounds:
            moment = datetime.fromisoformat(bound)
            keep = {">=": moment.__le__, ">": moment.__le__ if after else moment.__lt__, "<": moment.__gt__}[sign]
            found = [one for one in found if keep(datetime.fromisoformat(one["timestamp"]))]
        found = [one for one in found if not after or one["insertId"] > after[1]]
        if body.get("orderBy", "timestamp asc") == "timestamp desc":
            found.reverse()
        start, size = int(body.get("pageToken") or 0), int(body.get("pageSize") or 50)
        page = {"entries": found[start : start + size]} if found else {}
        return page | ({"nextPageToken": str(start + size)} if len(found) > start + size else {})


def _suggest(spec: Any, number: int) -> Any:
    """A value by the trial's number, always the same."""
    kind = spec.WhichOneof("parameter_value_spec")
    values, chance = getattr(spec, kind), random.Random(f"{spec.parameter_id}{number}")
    if kind in ("categorical_value_spec", "discrete_value_spec"):
        return values.values[(number - 1) % len(values.values)]
    if kind == "integer_value_spec":
        return chance.randint(values.min_value, values.max_value)
    if spec.scale_type == types.StudySpec.ParameterSpec.ScaleType.UNIT_LOG_SCALE:
        return values.min_value * (values.max_value / values.min_value) ** chance.random()
    return chance.uniform(values.min_value, values.max_value)


def _type(name: str) -> str:
    return f"type.googleapis.com/google.cloud.aiplatform.v1.{name}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """It and all that came of it, whatever their process groups are."""
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(process.pid)
        for one in (*first.children(recursive=True), first):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _handler(standin: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            url = urllib.parse.urlsplit(self.path)
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                if url.path == "/token":
                    self._reply(*self._token())
                    return
                if not (self.headers.get("Authorization") or "").startswith("Bearer "):
                    raise Refusal("Request is missing required authentication credential.", "UNAUTHENTICATED")
                if standin.login_expired:
                    raise Refusal("Request had invalid authentication credentials.", "UNAUTHENTICATED")
                query = dict(urllib.parse.parse_qsl(url.query))
                body = json.loads(raw) if raw else {}
                self._reply(200, standin.answer(self.command, urllib.parse.unquote(url.path), query, body))
            except Refusal as exc:
                code = STATUS[exc.status]
                self._reply(code, {"error": {"code": code, "message": str(exc), "status": exc.status}})

        do_GET = do_POST = do_DELETE = do_PATCH = _serve

        def _token(self) -> tuple[int, Json]:
            if standin.login_expired:  # https://developers.google.com/identity/protocols/oauth2#expiration
                return 400, {"error": "invalid_grant", "error_description": "Token has been expired or revoked."}
            return 200, {"access_token": "ya29.stand-in", "expires_in": 3600, "token_type": "Bearer"}

        def _reply(self, code: int, body: Json) -> None:
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json; charset=UTF-8")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
