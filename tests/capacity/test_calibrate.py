"""Finding what a replica carries, with a replica whose figures are known, and with the real parts beside it."""

import dataclasses
from pathlib import Path

import numpy as np
import psutil
import pytest
from replicas import step
from tiny import picture, tiny_bundle

from bench.load import GOOD, Row
from bundle import picture as pictures
from bundle import wire
from capacity import calibrate, manifests, measured, replica, stand
from capacity.measured import Step
from capacity.replica import Bench, line


class Known:
    """A Bench that answers `saturated` images a second, and at low load after 20 ms."""

    name, cpus, start_seconds, start_cores, idle_cores, peak_mb, objective_ms = (
        "gateway",
        [0],
        1.0,
        0.9,
        0.02,
        250.0,
        300.0,
    )

    def __init__(self, saturated: float, luck: float = 0.0) -> None:
        self.saturated, self.luck = saturated, luck
        self.steps: list[Step] = []

    def idle(self) -> None:
        pass

    def saturate(self, seconds: float) -> tuple[float, float]:
        return self.saturated, 1.0

    def step(self, rate: float, seconds: float = 0.0) -> Step:
        real = self.saturated * (1 + self.luck if seconds < calibrate.CONFIRM else 1)
        load = min(rate / real, 0.999)
        found = step(load * real, real, 20.0)
        found = dataclasses.replace(found, rate=rate, passed=found.p99_ms <= self.objective_ms)
        self.steps.append(found)
        return found


def test_finds_the_highest_rate_that_keeps_the_objective():
    """p99 = 20 + 46 load / (1 - load) ms: 300 ms at 0.858 of what saturates."""
    bench = Known(200)
    found = calibrate.search(bench)
    assert 0.858 - 2 * calibrate.PRECISION < found.capacity / 200 <= 0.858
    assert found.saturated == 200
    assert len(bench.steps) <= 8, "a minute and a half"
    assert found.steps[-1].rate == found.capacity


def test_what_a_longer_run_does_not_confirm_is_not_what_it_carries():
    found = calibrate.search(Known(200, luck=0.2))
    assert found.capacity / 200 <= 0.858
    assert not all(one.passed for one in found.steps)


def test_little_load_answered_too_late_is_told():
    bench = Known(200)
    bench.objective_ms = 25.0
    with pytest.raises(SystemExit, match=r"even 50 images/s, a quarter of .* miss the objective of 25 ms"):
        calibrate.search(bench)


def test_cpus_are_kept_apart(monkeypatch):
    monkeypatch.setattr(stand.os, "sched_getaffinity", lambda _: {2, 5, 7})
    assert stand.split({"gateway": 1.0, "model-server": 2.0}, None) == {
        "gateway": ([2], [5, 7]),
        "model-server": ([2, 5], [7]),
    }
    assert stand.split({"gateway": 0.5}, 2) == {"gateway": ([2, 5], [7])}


@pytest.mark.parametrize(
    ("limit", "given", "says"),
    [
        (1.0, None, r"there are 1 CPU\(s\) here and one gateway takes 1: at least one more is needed"),
        (4.0, None, "one gateway takes 4"),
        (0.5, None, r"may take 0.5 CPUs by its limit, and only whole ones can be kept apart"),
        (0.5, 2, "one gateway takes 2"),
    ],
)
def test_too_few_cpus_are_told(monkeypatch, limit, given, says):
    monkeypatch.setattr(stand.os, "sched_getaffinity", lambda _: {0})
    with pytest.raises(SystemExit, match=says):
        stand.split({"gateway": limit}, given)


def test_what_is_started_inside_has_those_cpus_alone():
    before = stand.os.sched_getaffinity(0)
    one = min(before)
    with stand.pinned([one]):
        assert stand.os.sched_getaffinity(0) == {one}
    assert stand.os.sched_getaffinity(0) == before


def test_the_light_bundle_is_the_same_to_a_gateway(tmp_path: Path):
    import handler

    real = tiny_bundle(tmp_path / "real", size=40)
    stand.light(tmp_path / "real", tmp_path / "light")
    model = handler.Model(tmp_path / "light")
    assert (model.manifest.name, model.manifest.classes) == (real.name, real.classes)
    assert model.manifest.input.contract == real.input.contract
    pixels = pictures.load(picture("red"), real.input.resize)
    [frame] = model.answer([wire.request({real.input.contract: pixels.tobytes()}, ())])
    answer = wire.unpack(frame)
    assert answer.status == "ok"
    assert answer.logits is not None
    assert answer.logits.reshape(-1).shape == (len(real.classes),)


class Told(Bench):
    """A Bench of which only the load is not real."""

    def __post_init__(self) -> None:
        self.steps, self.rows = [], []

    def run(self, *words: str):
        return self.rows, {"cpu_ms": 4.0, "beside": 0.5, "others": 0.0}


@pytest.mark.parametrize(
    ("status", "seconds", "passed"), [(200, 0.1, True), (200, 0.4, False), (503, 0.1, False), (0, 0.1, False)]
)
def test_a_step_passes_where_all_are_answered_in_time(status, seconds, passed):
    bench = Told("gateway", None, [], [0], [1], 1.0, 300.0, idle_cores=0.1)
    times = np.linspace(0, 9.5, 950, endpoint=False)
    bench.rows = [Row(t, 0.02, 200, GOOD) for t in times]
    bench.rows += [Row(1.5 + i, seconds, status, GOOD) for i in np.linspace(0, 7.9, 20)]
    bench.rows.append(Row(0.2, 9.0, 503, GOOD))  # in the lead, which does not count
    found = bench.step(100.0)
    assert found.passed is passed
    assert found.n == 820
    assert found.cores == pytest.approx(0.1 + 0.4)
    assert ("too much" in line(found)) is not passed


def test_no_more_cpus_are_told_than_a_replica_has():
    """A target above the request would never be reached. 300/s at 4 ms each are 1.2 CPUs."""
    bench = Told("gateway", None, [], [0], [1], 1.0, 9000.0)
    bench.rows = [Row(t, 2.0, 200, GOOD) for t in np.linspace(0, 9.5, 2850, endpoint=False)]
    assert bench.step(300.0).cores == 1.0
    assert bench.saturate(6.0) == (300.0, 1.0)


def test_what_nobody_answered_is_no_speed():
    bench = Told("gateway", None, [], [0], [1], 1.0, 300.0)
    bench.rows = [Row(0.1, 1.0, 503, GOOD)]
    with pytest.raises(SystemExit, match="the gateway answered nobody"):
        bench.saturate(6.0)


@pytest.mark.parametrize(("precision", "runtime"), [("", "onnxruntime"), ("bf16", "openvino")])
def test_where_it_was_measured(tmp_path: Path, monkeypatch, precision, runtime):
    tiny_bundle(tmp_path / "tiny")
    monkeypatch.setenv("PRECISION", precision)
    found = calibrate.where(tmp_path / "tiny")
    assert found["bundle"]["name"] == "tiny"
    assert {"cpu", "cpus", "flags", "system", "python"} <= found["machine"].keys()
    assert found["versions"][runtime]
    assert found["date"].endswith("+00:00")


@pytest.mark.slow
@pytest.mark.skipif(len(stand.os.sched_getaffinity(0)) < 2, reason="a tier and its load need a CPU each")
def test_both_tiers_are_measured_and_written_down(tmp_path: Path, monkeypatch):
    """The real processes, hurried, under an objective that even a busy machine keeps."""
    for module, name, seconds in (
        (calibrate, "WARM_UP", 1.0), (calibrate, "SATURATE", 1.0), (calibrate, "CONFIRM", 0.6),
        (replica, "LEAD", 0.2), (replica, "STEP", 0.5), (replica, "IDLE", 0.3), (replica, "LOOK", 0.3),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, seconds)
    monkeypatch.setattr(calibrate, "PRECISION", 0.3)
    seen = {}

    class Seen(Bench):
        def idle(self) -> None:
            family = psutil.Process(self.process.pid).children(recursive=True)
            seen[self.name] = {tuple(one.cpu_affinity()) for one in family if one.is_running()}
            super().idle()

    monkeypatch.setattr(calibrate, "Bench", Seen)
    tiny_bundle(tmp_path / "tiny", size=64)
    calibrate.main(["--model", str(tmp_path / "tiny"), "--out", str(tmp_path / "out"), "--objective", "9000"])
    found = measured.read(tmp_path / "out" / "measured.json")
    for tier in found.replicas:
        assert tier.capacity > 20, tier.name
        assert all(step.passed and step.cpu_ms > 0 and step.n for step in tier.steps[-1:])
        assert 0.1 < tier.start_seconds < 60
        assert tier.memory_mb > 50
        assert seen[tier.name] == {(min(stand.os.sched_getaffinity(0)),)}, "a CPU of its own"
    gateway, server = manifests.read(manifests.render(manifests.BASE, [tmp_path / "out"]))
    assert gateway.request == server.request == 1.0
    assert 0 < server.scaling.utilization <= 100
