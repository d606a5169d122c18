"""What was measured of one replica: the form in which `make calibrate` leaves it and the simulation takes it up."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

Floats = NDArray[np.float64]
# Where latencies are kept: 200 levels, the last of which is what 0.25% exceed.
LEVELS = (np.arange(200) + 0.5) / 200
NAME = "measured.json"


@dataclass(frozen=True)
class Step:
    """One rate (images/s) that was held for some seconds. Latencies in milliseconds, of what was answered.

    cores: CPUs that the replica took; beside: the share of the load's CPUs that was busy; others: CPUs that neither
    took, on all of the machine. quantiles_ms: at LEVELS.
    """

    rate: float
    seconds: float
    n: int
    p50_ms: float
    p99_ms: float
    refused: int
    failed: int
    passed: bool
    cores: float
    cpu_ms: float
    memory_mb: float
    beside: float
    others: float
    quantiles_ms: tuple[float, ...]


@dataclass(frozen=True)
class Replica:
    """One replica of a tier.

    capacity: the highest rate (images/s) that passed; saturated: images/s that it answers when it is given as many as
    it takes; start_seconds: from its start to its first good answer, at start_cores CPUs; idle_cores: without load.
    """

    name: str
    cpus: int
    capacity: float
    saturated: float
    saturated_cores: float
    idle_cores: float
    start_seconds: float
    start_cores: float
    memory_mb: float
    steps: tuple[Step, ...]

    @cached_property
    def _used(self) -> tuple[Floats, Floats]:
        steps = sorted((step for step in self.steps if step.rate < self.saturated), key=lambda step: step.rate)
        rates = [0.0, *(step.rate for step in steps), self.saturated]
        # Never less for more: a step that others disturbed would make the HPA's ratio jump.
        cores = np.maximum.accumulate([self.idle_cores, *(step.cores for step in steps), self.saturated_cores])
        return np.array(rates), cores

    def cores(self, rate: float) -> float:
        """CPUs it takes at that rate, between and at the measured ones; no more than saturated."""
        return float(np.interp(rate, *self._used))

    def rate(self, cores: float) -> float:
        """The highest rate, to a 500th of what saturates, that takes no more CPUs than that; 0 where none does."""
        rates = np.linspace(0, self.saturated, 500)
        return float(max(rate for rate in rates if self.cores(rate) <= cores or not rate))

    @cached_property
    def latencies(self) -> "Latencies":
        good = [step for step in self.steps if not step.failed and not step.refused and step.rate < self.saturated]
        return Latencies.of({step.rate / self.saturated: step.quantiles_ms for step in good})


@dataclass(frozen=True, eq=False)
class Latencies:
    """Latency by load (a share of what saturates): measured at some, between them in proportion, beyond as the last."""

    loads: Floats
    seconds: Floats  # [load, level]

    @classmethod
    def of(cls, quantiles_ms: Mapping[float, Sequence[float]], calls: Mapping[float, int] | None = None) -> "Latencies":
        """calls: how many answers each was measured with; as many for all where nothing is said."""
        loads = np.array(sorted(quantiles_ms))
        rows = np.array([quantiles_ms[load] for load in loads]) / 1e3
        weights = [calls[load] for load in loads] if calls else None
        # Never faster under more load, as a short step may look: such steps have the mean of theirs. The slowest so far
        # would make of one bad moment what all higher loads have.
        return cls(loads, np.apply_along_axis(lambda level: isotonic_regression(level, weights=weights).x, 0, rows))

    def at(self, load: float) -> Floats:
        """Seconds at LEVELS."""
        place = np.interp(load, self.loads, np.arange(len(self.loads)))
        low, share = int(place), place - int(place)
        high = min(low + 1, len(self.loads) - 1)
        found: Floats = (1 - share) * self.seconds[low] + share * self.seconds[high]
        return found


@dataclass(frozen=True)
class Measured:
    """where: machine, versions, date, commit, bundle: whatever says where the figures hold."""

    objective_ms: float
    where: Mapping[str, Any]
    replicas: tuple[Replica, ...]

    def replica(self, name: str) -> Replica:
        return next(one for one in self.replicas if one.name == name)

    def to_json(self, **more: Any) -> str:
        """Every step on a line of its own."""
        told = dataclasses.asdict(self) | more
        lines = []
        for replica in told["replicas"]:
            for i, step in enumerate(replica["steps"]):
                step["quantiles_ms"] = [_short(value) for value in step["quantiles_ms"]]
                lines.append(json.dumps({key: _short(value) for key, value in step.items()}))
                replica["steps"] = (*replica["steps"][:i], f"line {len(lines) - 1}", *replica["steps"][i + 1 :])
            replica |= {key: _short(value) for key, value in replica.items()}
        text = json.dumps(told, indent=1, ensure_ascii=False)
        for i, line in enumerate(lines):
            text = text.replace(f'"line {i}"', line, 1)
        return text + "\n"


def read(path: Path) -> Measured:
    """Raises SystemExit that says what is wrong with the file."""
    try:
        told = json.loads(path.read_text())
        replicas = []
        for one in told["replicas"]:
            steps = tuple(Step(**step | {"quantiles_ms": tuple(step["quantiles_ms"])}) for step in one["steps"])
            replicas.append(Replica(**one | {"steps": steps}))
        return Measured(told["objective_ms"], told["where"], tuple(replicas))
    except FileNotFoundError:
        raise SystemExit(f"{path} is not there: `make calibrate` measures it, in about five minutes") from None
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise SystemExit(f"{path}: is not what `make calibrate` writes ({type(exc).__name__}: {exc})") from exc


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
