"""A job from its submission to its end: states, logs, trials."""

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from vertex.cloud import CONSOLE, Cloud, CloudError, Json, MissingError, PassingError, now

DONE = ("JOB_STATE_SUCCEEDED", "JOB_STATE_PARTIALLY_SUCCEEDED")
FAILED = ("JOB_STATE_FAILED", "JOB_STATE_CANCELLED", "JOB_STATE_EXPIRED")
MEANS = {
    "QUEUED": "waits for its turn, or for quota",
    "PENDING": "machines are being made ready: some minutes, with flex-start until there is room",
    "RUNNING": "all workers run",
    "CANCELLING": "is being cancelled",
}
PATIENCE = 30  # answers that may fail in a row while a job is followed


def console(cloud: Cloud, name: str) -> str:
    """Where a job's logs are, for people."""
    query = f"resource.labels.job_id%3D%22{name.rpartition('/')[2]}%22?project={cloud.settings.project}"
    return f"{CONSOLE};query={query} or: {gcloud(cloud, name, 'stream-logs')}"


def gcloud(cloud: Cloud, name: str, verb: str) -> str:
    """`verb` on the job, as a command."""
    kind, s = "hp-tuning-jobs" if "hyperparameter" in name else "custom-jobs", cloud.settings
    return f"gcloud ai {kind} {verb} {name.rpartition('/')[2]} --region={s.region} --project={s.project}"


def follow(cloud: Cloud, name: str, door: str, pause: float = 10.0) -> Json:
    """The job as it ended. Its states and logs are printed as they come; passing failures to ask are waited out.

    Raises CloudError where it cannot be followed any longer, which says how to go on: the job does.
    """
    number = name.rpartition("/")[2]
    say(f"{name}; to stop it: {gcloud(cloud, name, 'cancel')}")
    reader, told = Reader(cloud, name), ""
    trials: dict[str, str] = {}

    def ask() -> Json:
        job = cloud.job(name)
        reader.read()
        return job

    for job in answers(ask, f"The job goes on: make vertex-{door} JOB={number}", pause):
        if (state := job["state"].removeprefix("JOB_STATE_")) != told:
            told = state
            say(f"{state}{': ' + MEANS[state] if state in MEANS else ''}")
        for trial in job.get("trials", []):
            if (line := trial_line(trial)) != trials.get(trial["id"]):
                trials[trial["id"]] = line
                say(line)
        if job["state"] in (*DONE, *FAILED):
            reader.read()
            return job
    raise AssertionError("answers never end by themselves")


def answers(ask: Callable[[], Json], going: str, pause: float) -> Iterator[Json]:
    """What `ask` gives, again and again; passing failures are waited out.

    Raises CloudError where it can be asked no longer, with `going`, which says how to go on.
    """
    failures = 0
    while True:
        try:
            found = ask()
        except PassingError as exc:
            if (failures := failures + 1) > PATIENCE:
                raise CloudError(f"{exc}. {going}") from exc
            say(f"{exc}; trying again")
        except CloudError as exc:
            raise CloudError(f"{exc}. {going}") from exc
        else:
            failures = 0
            yield found
        time.sleep(pause)


class Reader:
    """A job's log, each entry once."""

    def __init__(self, cloud: Cloud, name: str) -> None:
        self.cloud, self.name = cloud, name
        self.since, self.seen = "1970-01-01T00:00:00Z", set[str]()

    def read(self) -> None:
        while True:
            entries = self.cloud.logs(self.name, self.since)
            new = [one for one in entries if one["insertId"] not in self.seen]
            for one in new:
                self.seen.add(one["insertId"])
                message = one.get("jsonPayload", {}).get("message") or one.get("textPayload", "")
                worker = one.get("resource", {}).get("labels", {}).get("task_name", "")
                print(f"  {worker}  {message}" if worker != "workerpool0-0" else f"  {message}", file=sys.stderr)
            if not new:
                return
            self.since = new[-1]["timestamp"]


def trial_line(trial: Json) -> str:
    values = " ".join(f"{one['parameterId']}={_value(one.get('value'))}" for one in trial.get("parameters", []))
    metrics = [f"{m['metricId']} {m.get('value', 0):.4f}" for m in trial.get("finalMeasurement", {}).get("metrics", [])]
    text = f"trial {trial['id']} {trial.get('state', 'REQUESTED')}: {values}"
    return f"{text}: {', '.join(metrics)}" if metrics else text


def best_trial(job: Json) -> Json:
    """The trial with the highest metric. Raises CloudError where none has one."""
    measured = [
        (metric.get("value", 0.0), -int(trial["id"]), trial)
        for trial in job.get("trials", [])
        for metric in trial.get("finalMeasurement", {}).get("metrics", [])[:1]
        if trial.get("state") == "SUCCEEDED"
    ]
    if not measured:
        reasons = {trial.get("infeasibleReason", "") for trial in job.get("trials", [])} - {""}
        raise CloudError(
            f"no trial ended well: {'; '.join(sorted(reasons)) or job.get('error', {}).get('message') or job['state']}"
        )
    best: Json = max(measured)[2]
    say(f"the best: {trial_line(best)}")
    return best


def show(cloud: Cloud, job: str = "") -> int:
    """The last jobs and endpoints, or one job's state and log."""
    s = cloud.settings
    if job:
        name = f"{s.parent}/customJobs/{job}"
        try:
            one = cloud.job(name)
        except MissingError:
            one = cloud.job(name := f"{s.parent}/hyperparameterTuningJobs/{job}")
        print(line(one))
        for trial in one.get("trials", []):
            print(f"  {trial_line(trial)}")
        Reader(cloud, name).read()
        if "error" in one:
            print(f"  {one['error'].get('message', '')}")
        print(f"  logs: {console(cloud, name)}")
        return 0
    found = cloud.recent()
    for one in found:
        print(line(one))
    if not found:
        print(f"no jobs and no endpoints in {s.project}, {s.region}")
    return 0


def line(one: Json) -> str:
    kind, number = one["name"].split("/")[-2:]
    named = f"{one['createTime'][:19]}  {kind.removesuffix('s'):<24} {number}  {one['displayName']:<24}"
    if kind == "endpoints":
        models = [
            f"{each['displayName']} ({each['model'].rpartition('/')[2]})" for each in one.get("deployedModels", [])
        ]
        return f"{named} {', '.join(models) or 'nothing deployed'}"
    spec = one.get("jobSpec") or one.get("trialJobSpec", {})
    base = spec.get("baseOutputDirectory", {}).get("outputUriPrefix", "")
    return f"{named} {one['state'].removeprefix('JOB_STATE_'):<10} {base}  TensorBoard: {base}logs"


def say(text: str) -> None:
    print(f"{now()[11:19]} {text}", file=sys.stderr)


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
