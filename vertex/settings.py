"""Settings of the vertex doors: one file, and flags that win over it. What could not work is refused here."""

import argparse
import dataclasses
import re
import shlex
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MACHINES = Path(__file__).parent / "machines.toml"
STRATEGIES = {"standard": "STANDARD", "spot": "SPOT", "flex-start": "FLEX_START"}
# https://docs.cloud.google.com/vertex-ai/docs/training/schedule-jobs-dws#requirements
FLEX_START_GPUS = re.compile(r"NVIDIA_(L4|TESLA_A100|A100_80GB|H100_80GB|H100_MEGA_80GB|H200_141GB|B200)")
FLEX_START_SECONDS = 7 * 86400
LONGEST = 30 * 86400  # ours: a longer run is a slip of the hand
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
LABEL = re.compile(r"[a-z][a-z0-9_-]{0,62}=[a-z0-9_-]{0,63}")


class SettingsError(ValueError):
    """Settings that cannot work; a line for each, which says what would be right."""


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """What vertex.env says: where, on which machines, for how long. Durations in seconds."""

    project: str = _setting("", "the project's id")
    region: str = _setting("", "as europe-west4")
    bucket: str = _setting("", "for data, jobs and bundles; without gs://")
    repository: str = _setting("", "of Artifact Registry, for images")
    service_account: str = _setting("", "as whom jobs and endpoints run; empty: Vertex AI's own")
    machine: str = _setting("n1-standard-8", "of each worker")
    gpu: str = _setting("", "as NVIDIA_L4; empty: none")
    gpus: int = _setting(0, "GPUs of each worker")
    workers: int = _setting(1, "machines that train together")
    strategy: str = _setting("standard", "standard, spot or flex-start")
    restart: bool = _setting(True, "start a worker that died again: yes or no")
    timeout: int = _setting(86400, "the longest run, as 90m, 12h or 2d")
    wait: int = _setting(86400, "the longest wait for machines with flex-start")
    labels: str = _setting("", "of the job: app=kennel,team=pets")
    trials: int = _setting(12, "runs of a tuning job")
    parallel: int = _setting(3, "runs at a time")
    endpoint_machine: str = _setting("n1-standard-4", "of each replica")
    endpoint_replicas: int = _setting(1, "at least")
    endpoint_max_replicas: int = _setting(2, "at most")

    @property
    def label_map(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for pair in self.labels.split(",") if pair)

    @property
    def parent(self) -> str:
        return f"projects/{self.project}/locations/{self.region}"


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("settings", "each wins over its line in the file")
    for one in dataclasses.fields(Settings):
        group.add_argument(f"--{one.name.replace('_', '-')}", help=one.metadata["help"])


def read(path: Path, flags: Mapping[str, str | None]) -> Settings:
    """The file's settings with the flags' over them. Raises SettingsError: all that is wrong, a line each."""
    try:
        text = path.read_text()
    except OSError as exc:
        raise SettingsError(f"{path} cannot be read ({exc.strerror}): copy vertex/vertex.env and fill it in") from exc
    found: dict[str, tuple[str, str]] = {}
    known = {one.name for one in dataclasses.fields(Settings)}
    for number, line in enumerate(text.splitlines(), 1):
        if not (words := shlex.split(line, comments=True)):
            continue
        key, equals, value = words[0].partition("=")
        if len(words) > 1 or not equals or key.lower() not in known:
            raise SettingsError(f"{path}, line {number}: {line!r} is no setting: there are {', '.join(known_as())}")
        found[key.lower()] = value, f"{key} in {path}"
    found |= {key: (value, f"--{key.replace('_', '-')}") for key, value in flags.items() if value is not None}
    types, values, wrong = typing.get_type_hints(Settings), dict[str, Any](), list[str]()
    for key, (value, where) in found.items():
        try:
            values[key] = _convert(key, types[key], value)
        except ValueError as exc:
            wrong.append(f"{where}: {exc}")
    if wrong:
        raise SettingsError("\n".join(wrong))
    settings = Settings(**values)
    for key in ("project", "region", "bucket", "repository"):
        if not getattr(settings, key):
            wrong.append(f"{key.upper()} is not set in {path}")
        elif "your-project" in getattr(settings, key):
            wrong.append(f"{key.upper()}={getattr(settings, key)} in {path} is the example: write yours")
    if wrong := wrong or problems(settings):
        raise SettingsError("\n".join(wrong))
    return settings


def known_as() -> list[str]:
    return [one.name.upper() for one in dataclasses.fields(Settings)]


def _convert(key: str, kind: Any, value: str) -> Any:
    if kind is bool:
        if value not in ("yes", "no"):
            raise ValueError(f"{value!r} is neither yes nor no")
        return value == "yes"
    if key in ("timeout", "wait"):
        return seconds(value)
    if kind is int:
        if not re.fullmatch(r"\d{1,6}", value or "0"):
            raise ValueError(f"{value!r} is not a number")
        return int(value or "0")
    return value


def seconds(text: str) -> int:
    """90m, 12h, 2d, 45s -> seconds. Raises ValueError."""
    if not (match := re.fullmatch(r"(\d{1,6})([smhd])", text)):
        raise ValueError(f"{text!r} is no duration: write it as 90m, 12h or 2d")
    return int(match[1]) * SECONDS[match[2]]


def table() -> dict[str, Any]:
    """machines.toml."""
    with MACHINES.open("rb") as file:
        return tomllib.load(file)


def problems(s: Settings) -> list[str]:
    """Every reason why Vertex AI, or we, would not run this; each says what would be right."""
    return [*_names(s), *_machine(s), *_schedule(s), *_numbers(s)]


def _names(s: Settings) -> list[str]:
    wrong = []
    # https://docs.cloud.google.com/resource-manager/docs/creating-managing-projects
    if not re.fullmatch(r"([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]", s.project):
        wrong.append(f"project {s.project!r} is no project id: 6 to 30 of a-z, 0-9 and '-'; see gcloud projects list")
    # https://docs.cloud.google.com/storage/docs/buckets#naming
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]{1,61}[a-z0-9]", s.bucket):
        wrong.append(f"bucket {s.bucket!r} is no bucket's name: 3 to 63 of a-z, 0-9, '-', '_' and '.', without gs://")
    # https://docs.cloud.google.com/artifact-registry/docs/repositories/create-repos
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", s.repository):
        wrong.append(f"repository {s.repository!r} must be 1 to 63 of a-z, 0-9 and '-', and begin with a letter")
    # https://docs.cloud.google.com/iam/docs/service-accounts-create
    if s.service_account and not re.fullmatch(r"[^@\s]+@[^@\s]+\.gserviceaccount\.com", s.service_account):
        wrong.append(f"service account {s.service_account!r} must be an address: NAME@PROJECT.iam.gserviceaccount.com")
    # https://docs.cloud.google.com/resource-manager/docs/labels-overview#requirements
    pairs = [pair for pair in s.labels.split(",") if pair]
    wrong += [
        f"label {pair!r} must be key=value, each up to 63 of a-z, 0-9, '_' and '-', the key beginning with a letter"
        for pair in pairs
        if not LABEL.fullmatch(pair)
    ]
    if len(pairs) > 64:
        wrong.append(f"{len(pairs)} labels are more than the 64 that a job may have")
    return wrong


def _machine(s: Settings) -> list[str]:
    known = table()
    machine = known["machines"].get(s.machine)
    if not machine:
        return [f"machine {s.machine!r} is not in vertex/machines.toml: there are {', '.join(known['machines'])}"]
    carries: dict[str, list[int]] = machine.get("gpus", {})
    series = s.machine.split("-")[0]
    wrong = []
    if s.gpu and s.gpu not in carries:
        others = [name for name, one in known["machines"].items() if s.gpu in one.get("gpus", {})]
        right = f"it carries {' or '.join(carries) or 'none'}"
        right += f"; {s.gpu} goes with {', '.join(others)}" if others else f"; no machine in the table has {s.gpu}"
        wrong.append(f"machine {s.machine} has no {s.gpu}: {right}")
    elif s.gpu and s.gpus not in carries[s.gpu]:
        wrong.append(f"machine {s.machine} takes {_either(carries[s.gpu])} of {s.gpu}, not {s.gpus}")
    elif not s.gpu and s.gpus:
        wrong.append(f"{s.gpus} GPUs of what type? {s.machine} carries {' or '.join(carries) or 'none'}")
    elif not s.gpu and carries and series != "n1":
        wrong.append(f"machine {s.machine} comes with its GPUs: set {' or '.join(carries)}, or take an N1 or E2")
    else:
        where = s.gpu or series
        places: list[str] = known["regions"][where]
        if s.region not in places:
            wrong.append(f"region {s.region} has no {where.upper()}: there is {', '.join(places)}")
    return wrong


def _schedule(s: Settings) -> list[str]:
    if s.strategy not in STRATEGIES:
        return [f"strategy {s.strategy!r} is none of {', '.join(STRATEGIES)}"]
    wrong = []
    if not 60 <= s.timeout <= LONGEST:
        wrong.append(f"timeout of {s.timeout} s: from a minute to {LONGEST // 86400} days")
    if s.strategy == "flex-start":
        if not FLEX_START_GPUS.fullmatch(s.gpu):
            wrong.append(
                f"flex-start is for L4, A100, H100, H200 and B200 GPUs, not {s.gpu or 'none'}: take standard or spot"
            )
        if s.timeout > FLEX_START_SECONDS:
            wrong.append(f"flex-start runs for at most 7 days: a timeout of {s.timeout / 86400:.3g} days is too long")
        if s.wait > LONGEST:
            wrong.append(f"wait of {s.wait} s: at most {LONGEST // 86400} days; 0s waits without end")
    elif s.strategy == "standard" and re.fullmatch(r"a3-highgpu-[124]g", s.machine):
        # https://docs.cloud.google.com/compute/docs/accelerator-optimized-machines#a3-high-vms
        wrong.append(f"machine {s.machine} is to be had with spot or flex-start only; with standard take a3-highgpu-8g")
    elif s.strategy == "spot" and not s.restart:
        wrong.append("spot without RESTART=yes ends at the first interruption: set it, or take standard")
    return wrong


def _numbers(s: Settings) -> list[str]:
    wrong = []
    if not 1 <= s.workers <= 64:
        wrong.append(f"workers: {s.workers} is not 1 to 64")
    # https://docs.cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.hyperparameterTuningJobs
    if not 1 <= s.parallel <= s.trials <= 100:
        wrong.append(f"trials {s.trials} and parallel {s.parallel}: 1 to 100 trials, not more at a time than in all")
    if s.endpoint_machine not in table()["machines"] or s.endpoint_machine.split("-")[0] not in ("n1", "e2"):
        wrong.append(f"endpoint machine {s.endpoint_machine!r}: the endpoint's image runs on CPUs, take an N1 or E2")
    if not 1 <= s.endpoint_replicas <= s.endpoint_max_replicas:
        wrong.append(f"endpoint replicas: {s.endpoint_replicas} to {s.endpoint_max_replicas}: 1 or more, then no fewer")
    return wrong


def _either(counts: list[int]) -> str:
    return " or ".join(map(str, counts))
