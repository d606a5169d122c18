"""What is sent to Vertex AI, as the JSON that its REST API documents, and what a run of it costs.

https://docs.cloud.google.com/vertex-ai/docs/reference/rest/v1/CustomJobSpec
https://docs.cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.hyperparameterTuningJobs
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bundle.manifest import NAME
from vertex.settings import STRATEGIES, Settings, SettingsError, table

COMMAND = ["python3.11", "-m", "training.job"]
METRIC = "accuracy"  # training.job's, of validation
# training.job gives these itself, from where the job's results go.
GIVEN = ("--out", "--checkpoints", "--scalars", "--cache")
# What the endpoint's image answers, under any of its models' names.
HEALTH, PREDICT, PORT = "/readyz", "/v1/models/default:predict", 8080
Json = dict[str, Any]


@dataclass(frozen=True)
class Estimate:
    """US dollars, without disks and discounts; None: the table has no price."""

    hour: float | None
    longest: float | None
    text: str


def check_run(name: str, data: str, arguments: Sequence[str]) -> None:
    """Raises SettingsError for what the job would only find out once it is paid for."""
    if not NAME.fullmatch(name):
        raise SettingsError(f"the bundle's name {name!r} must be 1 to 63 of a-z, 0-9 and '-': name another --out")
    if not re.fullmatch(r"gs://[a-z0-9][a-z0-9_.-]+[a-z0-9](/.*)?", data):
        raise SettingsError(f"{data} is no gs:// address")
    for word in arguments:
        option = word.split("=")[0]
        if option in GIVEN:
            raise SettingsError(f"{option}: where a job's results go is Vertex AI's to say; leave it out")
        if option == "--no-worse-than":
            raise SettingsError(
                f"{option}: a bundle here is not there; vertex-pipeline compares with the one in service"
            )


def custom_job(s: Settings, name: str, image: str, data: str, arguments: Sequence[str], base: str) -> Json:
    """A CustomJob that trains `name` from `data`, its results under `base`, a gs:// address."""
    check_run(name, data, arguments)
    return {
        "displayName": name,
        "labels": s.label_map,
        "jobSpec": _job_spec(s, image, [data, "--name", name, *arguments], base),
    }


def tuning_job(
    s: Settings, name: str, image: str, data: str, arguments: Sequence[str], base: str, ranges: Sequence[str]
) -> Json:
    """A HyperparameterTuningJob over `ranges` (see `parameter`): each trial's results under `base`/its number."""
    check_run(name, data, arguments)
    if not ranges:
        raise SettingsError("no ranges to tune over: RANGES='lr=1e-4:2e-3:log dropout=0:0.5 augment=light,strong'")
    parameters = [parameter(text) for text in ranges]
    names = [one["parameterId"] for one in parameters]
    if twice := [one for one in names if names.count(one) > 1 or f"--{one}" in arguments]:
        raise SettingsError(f"{twice[0]} is given twice: once as a range, and not as an option beside it")
    return {
        "displayName": name,
        "labels": s.label_map,
        "studySpec": {"metrics": [{"metricId": METRIC, "goal": "MAXIMIZE"}], "parameters": parameters},
        "maxTrialCount": s.trials,
        "parallelTrialCount": s.parallel,
        "trialJobSpec": _job_spec(s, image, [data, "--name", name, *arguments], base),
    }


def parameter(text: str) -> Json:
    """lr=1e-4:1e-2:log, epochs=4:12, augment=light,strong -> a ParameterSpec, by whose id the program gets its value.

    Whole numbers on both sides of the colon are a range of whole numbers. Raises SettingsError.
    """
    name, equals, values = text.partition("=")
    if not equals or not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise SettingsError(
            f"range {text!r}: write option=lowest:highest, option=lowest:highest:log or option=one,other"
        )
    if ":" not in values:
        found = [value for value in values.split(",") if value]
        if len(found) < 2 or len(set(found)) < len(found):
            raise SettingsError(f"range {text!r}: needs at least two different values, as augment=light,strong")
        return {"parameterId": name, "categoricalValueSpec": {"values": found}}
    bounds, scale = values.split(":"), "UNIT_LINEAR_SCALE"
    if len(bounds) == 3 and bounds[2] == "log":
        bounds, scale = bounds[:2], "UNIT_LOG_SCALE"
    try:
        low, high = map(float, bounds)
    except ValueError as exc:
        raise SettingsError(
            f"range {text!r}: write {name}=lowest:highest with numbers, and :log for a log scale"
        ) from exc
    if not low < high or low in (float("-inf"), float("inf")) or high == float("inf"):
        raise SettingsError(f"range {text!r}: the first number must be below the second")
    if scale == "UNIT_LOG_SCALE" and low <= 0:
        raise SettingsError(f"range {text!r}: a log scale needs a lowest value above 0")
    if all(re.fullmatch(r"-?\d{1,18}", bound) for bound in bounds):
        whole = {"minValue": int(bounds[0]), "maxValue": int(bounds[1])}
        return {"parameterId": name, "integerValueSpec": whole, "scaleType": scale}
    return {"parameterId": name, "doubleValueSpec": {"minValue": low, "maxValue": high}, "scaleType": scale}


def example(text: str) -> str:
    """The option that a trial of this range may get: lr=1e-4:1e-2:log -> --lr=0.0001."""
    one = parameter(text)
    kind = next(key for key in one if key.endswith("ValueSpec"))
    lowest = one[kind]["values"][0] if "values" in one[kind] else one[kind]["minValue"]
    return f"--{one['parameterId']}={lowest}"


def _job_spec(s: Settings, image: str, arguments: Sequence[str], base: str) -> Json:
    machine: Json = {"machineType": s.machine}
    if s.gpu:
        machine |= {"acceleratorType": s.gpu, "acceleratorCount": s.gpus}
    container = {"imageUri": image, "command": COMMAND, "args": list(arguments)}
    # The first pool is one machine, the others follow it:
    # https://docs.cloud.google.com/vertex-ai/docs/training/distributed-training
    counts = [1, s.workers - 1] if s.workers > 1 else [1]
    scheduling: Json = {"timeout": f"{s.timeout}s", "strategy": STRATEGIES[s.strategy]}
    # Workers meet anew, all together: torchrun's do not take one back alone.
    scheduling |= {"restartJobOnWorkerRestart": True} if s.restart else {"disableRetries": True}
    if s.strategy == "flex-start":
        scheduling |= {"maxWaitDuration": f"{s.wait}s"}
    spec: Json = {
        "workerPoolSpecs": [{"machineSpec": machine, "replicaCount": n, "containerSpec": container} for n in counts],
        "scheduling": scheduling,
        "baseOutputDirectory": {"outputUriPrefix": base},
    }
    return spec | ({"serviceAccount": s.service_account} if s.service_account else {})


def estimate(s: Settings, parallel: int = 1, runs: int = 1) -> Estimate:
    """What `runs` runs cost, `parallel` at a time."""
    known = table()
    machine, series = known["machines"][s.machine], known["series"].get(s.machine.split("-")[0])
    gpu = known["gpus"].get(s.gpu, 0.0 if not s.gpu else None)
    if not series or gpu is None:
        where = "https://cloud.google.com/vertex-ai/pricing#custom-trained_models"
        return Estimate(None, None, f"cost: no price for {s.machine} in vertex/machines.toml, see {where}")
    one = (machine["vcpus"] * series["vcpu"] + machine["gb"] * series["gb"] + s.gpus * gpu) * (1 + known["fee"])
    hour, longest = one * s.workers * parallel, one * s.workers * runs * s.timeout / 3600
    cheaper = "" if s.strategy == "standard" else f"; {s.strategy} is cheaper than that"
    text = f"cost: about ${hour:.2f} an hour, at most ${longest:.2f} by the timeout of {s.timeout / 3600:.3g} h"
    text += f" ({known['checked']}, us-central1, on demand{cheaper}; vertex/machines.toml)"
    return Estimate(hour, longest, text)


def model(s: Settings, name: str, image: str, artifact: str, version: str) -> Json:
    """A Model of the registry: the endpoint's image with the bundle at `artifact`, a gs:// folder.

    https://docs.cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements
    """
    return {
        "displayName": name,
        "labels": s.label_map,
        "artifactUri": artifact,
        "versionDescription": version,
        "containerSpec": {
            "imageUri": image,
            "ports": [{"containerPort": PORT}],
            "healthRoute": HEALTH,
            "predictRoute": PREDICT,
        },
    }


def deployed_model(s: Settings, name: str, model_name: str) -> Json:
    machine = {"machineType": s.endpoint_machine}
    counts = {"minReplicaCount": s.endpoint_replicas, "maxReplicaCount": s.endpoint_max_replicas}
    deployed: Json = {
        "model": model_name,
        "displayName": name,
        "dedicatedResources": {"machineSpec": machine, **counts},
    }
    return deployed | ({"serviceAccount": s.service_account} if s.service_account else {})


def bundle_name(out: Path) -> str:
    """The bundle's name, from the folder it comes to, as training.train makes it."""
    return re.sub(r"[^a-z0-9]+", "-", out.name.lower()).strip("-")
