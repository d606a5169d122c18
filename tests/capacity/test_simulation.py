"""Two autoscalers over time, by what can be said beforehand."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from replicas import GATEWAY, MEASURED, MODEL_SERVER, WHERE

from capacity import component, headroom, manifests, measured, report, simulate, traffic
from capacity.hpa import Autoscaler, Flags, Policy, Rules, Scaling
from capacity.manifests import Tier
from capacity.measured import LEVELS, Latencies
from capacity.simulation import Group, Limits, Shared, Timing, settled
from capacity.simulation import simulate as run

UP, DOWN = Rules(0, (Policy("Percent", 100, 30), Policy("Pods", 2, 30))), Rules(300, (Policy("Pods", 1, 60),))


def tier(name: str, most: int = 50, target: int = 60, **more) -> Tier:
    scaling = Scaling(name, 2, most, target, up=UP, down=DOWN)
    return Tier(name, 1.0, 400e6, 1.0, 1e9, 2.0, 10.0, {"MODELS": "x"}, dataclasses.replace(scaling, **more))


BOTH = [(tier("gateway"), GATEWAY), (tier("model-server"), MODEL_SERVER)]
LIMITS = Limits(48, 32, 0.6, 100)


def steady(rate: float, seconds: int = 600) -> np.ndarray:
    return np.full(seconds, float(rate))


def test_a_steady_load_changes_nothing_and_has_the_latency_that_was_measured():
    result = run(BOTH, steady(300), 0.3, limits=LIMITS)
    counts = {name: set(found) for name, found in result.replicas.items()}
    assert counts == {"gateway": {3.0}, "model-server": {4.0}}
    assert np.allclose(result.served, 300)
    assert not result.refused.any()
    # The two latencies' distribution, by drawing from each.
    random = np.random.default_rng(0)
    drawn = sum(
        random.choice(one.latencies.at(round(100 * 300 / count / one.saturated) / 100), 200_000)
        for one, count in ((GATEWAY, 3), (MODEL_SERVER, 4))
    )
    assert result.percentile(0.99) == pytest.approx(np.quantile(drawn, 0.99), rel=0.05)
    assert result.percentile(0.5) == pytest.approx(np.quantile(drawn, 0.5), rel=0.05)


def test_no_picture_is_lost_or_made():
    load = traffic.spike(1000)
    result = run(BOTH, load, 0.3, limits=LIMITS)
    waiting_at_most = 100 * 50 + 48 * 50
    assert 0 <= load.sum() - result.served.sum() - result.refused.sum() < waiting_at_most
    assert result.refused.sum() > 0


@pytest.mark.parametrize("moments", headroom.MOMENTS)
def test_more_load_is_seen_late_by_as_much_as_the_parts_say(moments):
    """A window that ended up to 25 s ago, a look every 15 s: the first new replica is asked for within 10 to 45 s, and
    serves a start later."""
    load = np.concatenate([steady(100, 120), steady(250, 300)])
    result = run(BOTH[1:], load, 0.3, timing=Timing(scrape=moments[0], sync=moments[1]))
    asked = int(np.argmax(result.replicas["model-server"] > 2)) - 120
    serves = int(np.argmax(result.ready["model-server"] > 2)) - 120
    assert 10 <= asked <= 45
    # 2 s until its container starts, 2.7 s of it, looked at every 2: at 4.
    assert serves - asked == 6


def test_a_node_that_must_be_made_first_takes_its_time():
    load = np.concatenate([steady(100, 120), steady(250, 300)])
    quick, slow = (run(BOTH[1:], load, 0.3, timing=Timing(node=node)) for node in (0.0, 90.0))
    first = [int(np.argmax(result.ready["model-server"] > 2)) for result in (quick, slow)]
    assert first[1] - first[0] == 90
    assert slow.late.sum() > quick.late.sum()


def test_a_node_that_was_there_a_moment_ago_is_there_again():
    group = Group(BOTH[1][0], MODEL_SERVER, Autoscaler(BOTH[1][0].scaling), Timing(node=90.0), 1.0)
    group.begin(4)
    group.scale(0, 3)
    group.paid(60)
    group.scale(60, 5)
    assert [pod.started - 60 for pod in group.pods[3:]] == [2.0, 92.0]


def test_replicas_go_one_a_minute_after_the_window():
    load = np.concatenate([steady(800, 60), steady(100, 1500)])
    replicas = run(BOTH[1:], load, 0.3).replicas["model-server"]
    steps = np.flatnonzero(np.diff(replicas) < 0)
    assert 60 + 300 <= steps[0] + 1 <= 60 + 300 + 45
    assert (np.diff(steps) >= 60).all()
    assert replicas[-1] == 2


def test_beyond_the_most_everything_waits_or_is_refused_and_nobody_waits_without_bound():
    result = run(
        [(tier("gateway", most=2), GATEWAY), (tier("model-server", most=2), MODEL_SERVER)],
        steady(600),
        0.3,
        limits=LIMITS,
    )
    assert set(result.replicas["model-server"]) == {2.0}
    assert result.served[-1] == pytest.approx(280)
    assert result.refused[-1] == pytest.approx(320)
    # What two gateways let in, at the rate at which two model servers answer.
    assert result.p99[-1] < 2 * 84 / 280 + MODEL_SERVER.latencies.at(1)[-1] + GATEWAY.latencies.at(1)[-1]
    assert result.late[-1] > 0.5 * result.served[-1]


def test_steps_that_look_faster_under_more_load_have_their_mean():
    found = Latencies.of({0.1: (10, 20), 0.5: (30, 90), 0.6: (20, 60), 0.9: (40, 80)}, {0.1: 9, 0.5: 1, 0.6: 2, 0.9: 9})
    assert found.seconds == pytest.approx(np.array([[10, 20], [70 / 3, 70], [70 / 3, 70], [40, 80]]) / 1e3)


def test_on_one_node_its_cpus_are_the_limit_and_a_start_takes_of_them():
    quiet = Latencies.of({0.2: tuple([20.0] * len(LEVELS)), 0.9: tuple([60.0] * len(LEVELS))})
    shared = Shared(2.0, 0.4, 0.001, quiet)
    # 0.4 and four idle pods' 0.08 leave 1.52 CPUs; an image takes 1 + 0.98 * 1000 (1/220 + 1/140) ms.
    able = 1.52 / (0.001 + 0.98 / 220 + 0.98 / 140)
    two = [(tier(one.name, most=2), replica) for one, replica in BOTH]
    result = run(two, steady(2 * able), 0.3, shared=shared, limits=LIMITS)
    assert result.served[1] == pytest.approx(able, rel=0.01)
    calm = run(BOTH, steady(0.5 * able, 60), 0.3, shared=shared)
    assert calm.p99[-1] == pytest.approx(0.0371, rel=0.02)
    load = np.concatenate([steady(60, 60), steady(110, 240)])
    grown = run(
        [(tier("gateway", target=20), GATEWAY), (tier("model-server", target=30), MODEL_SERVER)],
        load,
        0.3,
        shared=shared,
    )
    starts = grown.replicas["model-server"] > grown.ready["model-server"]
    assert starts.any()
    assert grown.p99[starts].max() > grown.p99[-1]
    as_measured = {"gateway": np.full(len(LEVELS), 0.2), "model-server": np.full(len(LEVELS), 0.5)}
    slowed = dataclasses.replace(shared, slowed=as_measured)
    for name, seconds in (("gateway", 0.2), ("model-server", 0.5)):
        grows = [(tier(one.name, target=20 if one.name == name else 95), replica) for one, replica in BOTH]
        felt = run(grows, load, 0.3, shared=slowed)
        starts = felt.replicas[name] > felt.ready[name]
        assert set(felt.p99[starts]) == {seconds}  # as measured, and nothing waits beyond that
        assert felt.p99[-1] < 0.1


def test_the_replicas_of_a_steady_load():
    one = tier("model-server", target=51)
    assert [settled(one, MODEL_SERVER, rate) for rate in (0, 140, 141, 280, 281)] == [2, 2, 3, 4, 5]
    assert settled(tier("model-server", most=3), MODEL_SERVER, 1e6) == 3


def test_targets_leave_room_that_a_slower_start_makes_larger():
    tiers = [tier("gateway"), tier("model-server")]
    found = headroom.targets(tiers, MEASURED)
    slow = [dataclasses.replace(one, start_seconds=60.0) for one in MEASURED.replicas]
    slower = headroom.targets(tiers, dataclasses.replace(MEASURED, replicas=tuple(slow)))
    for one in MEASURED.replicas:
        assert 30 < found[one.name] < 90, "of a CPU that is used to 90% at capacity"
        assert slower[one.name] < found[one.name] - 5


def test_no_room_at_all_is_told():
    never = [dataclasses.replace(one, start_seconds=3600.0) for one in MEASURED.replicas]
    with pytest.raises(SystemExit, match="doubles in 300 s is answered too late"):
        headroom.targets([tier("gateway"), tier("model-server")], dataclasses.replace(MEASURED, replicas=tuple(never)))


def test_the_gateway_s_own_limits_are_taken():
    one, two = tier("gateway"), tier("model-server")
    one = dataclasses.replace(one, settings={"MODELS": "x", "IN_FLIGHT": "20", "PROCESSES": "3"})
    two = dataclasses.replace(two, settings={"QUEUE_SIZE": "7"})
    found = headroom.limits([one, two])
    assert (found.most, found.queue) == (60, 7)


@pytest.mark.parametrize("name", traffic.LOADS)
def test_loads_reach_their_peak_and_never_nothing(name):
    load = traffic.LOADS[name](10_000)
    assert load.max() == pytest.approx(10_000)
    assert load.min() > 500
    assert np.array_equal(load, traffic.LOADS[name](10_000)), "the same every time"
    assert len(load) == {"ramp": 2700, "spike": 1800, "day": 86_400}[name]


def test_a_run_in_numbers_and_dollars():
    tiers, price = [tier("gateway"), tier("model-server")], simulate.Price("e2", 0.02, 0.003, "2026-11-25")
    result = run(BOTH, steady(100, 3600), 0.3, limits=LIMITS)
    found = simulate.figures(result, tiers, price)
    # Two of each for an hour, a CPU and 0.4 GB each.
    assert found["dollars"] == pytest.approx(4 * (0.02 + 0.4 * 0.003))
    assert found["images"] == 360_000
    assert found["dollars_per_million"] == pytest.approx(found["dollars"] / 0.36, rel=1e-3)
    assert found["peak_replicas"] == {"gateway": 2, "model-server": 2}
    assert (found["late"], found["refused"], found["seconds_late"]) == (0, 0, 0)


def test_prices_are_those_of_the_table_and_an_unknown_series_is_named():
    assert simulate.Price.of("e2").vcpu > 0.01
    with pytest.raises(SystemExit, match=r"'c99' has no price in vertex/machines.toml: .*e2"):
        simulate.Price.of("c99")


def test_enough_replicas_for_the_peak():
    small, large = (
        simulate.enough([tier("gateway", 10), tier("model-server", 10)], MEASURED, peak) for peak in (100, 10_000)
    )
    assert [one.scaling.most for one in small] == [10, 10]
    assert [one.scaling.most > 10_000 / each for one, each in zip(large, (220, 140), strict=True)] == [True, True]
    assert not run([(one, MEASURED.replica(one.name)) for one in large], steady(10_000, 60), 0.3).refused.any()


def test_the_page_stands_alone_and_escapes(tmp_path: Path):
    tiers, price = [tier("gateway"), tier("model-server")], simulate.Price.of("e2")
    result = run(BOTH, traffic.spike(1000), 0.3, limits=LIMITS)
    one = report.Run("spike", 1000, result, simulate.figures(result, tiers, price))
    notes = report.notes(MEASURED, tiers, price, Timing(), Flags())
    page = report.page([one], notes, MEASURED)
    assert "A &lt;fast&gt; one" in page
    assert WHERE["machine"]["cpu"] not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page
    assert page.count('<svg class="chart"') == 3
    assert "nan" not in page
    assert len(report.row(one).splitlines()) == 1


def test_what_was_measured_is_read_as_it_was_written(tmp_path: Path):
    path = tmp_path / "measured.json"
    path.write_text(MEASURED.to_json(targets={"gateway": 50}))
    found = measured.read(path)
    assert found.objective_ms == 300
    assert found.where == WHERE
    assert found.replica("gateway").cores(150) == pytest.approx(GATEWAY.cores(150), rel=1e-3)
    assert np.allclose(found.replica("gateway").latencies.at(0.6), GATEWAY.latencies.at(0.6), rtol=1e-3)
    assert sum(line.strip().startswith('{"rate"') for line in path.read_text().splitlines()) == 12


@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "is not there: `make calibrate`"), ("{", "JSONDecodeError"), ('{"replicas": [{}]}', "KeyError: 'steps'")],
)
def test_what_is_no_measurement_is_named(tmp_path: Path, text, says):
    path = tmp_path / "measured.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match=says):
        measured.read(path)


def test_usage_and_latency_between_what_was_measured():
    assert MODEL_SERVER.cores(0) == 0.02
    assert MODEL_SERVER.cores(70) == pytest.approx(0.51)
    assert MODEL_SERVER.cores(1e6) == 1.0
    between = MODEL_SERVER.latencies.at(0.6)
    assert (MODEL_SERVER.latencies.at(0.5) < between).all()
    assert (between < MODEL_SERVER.latencies.at(0.7)).all()
    assert np.array_equal(MODEL_SERVER.latencies.at(3), MODEL_SERVER.latencies.at(0.95))
    assert math.isfinite(between[-1])


def test_the_program_writes_table_numbers_and_page(tmp_path: Path, capsys):
    base = manifests.read(manifests.render(manifests.BASE))
    component.write(tmp_path / "calibrated", MEASURED, base, {"gateway": 60, "model-server": 55})
    words = ["--calibrated", str(tmp_path / "calibrated"), "--out", str(tmp_path / "out"), "--peak", "2000"]
    simulate.main([*words, "--load", "ramp", "spike"])
    said = capsys.readouterr().out
    assert "The manifests allow 10 replicas; up to" in said
    told = json.loads((tmp_path / "out" / "simulation.json").read_text())
    assert [run["load"] for run in told["runs"]] == ["ramp", "spike"]
    assert all(run["peak_replicas"]["model-server"] > 2000 / 140 for run in told["runs"])
    assert told["runs"][1]["late"] > told["runs"][0]["late"], "a spike is worse than a ramp"
    assert "target 55%" in (tmp_path / "out" / "simulation.html").read_text()
    simulate.main([*words, "--load", "ramp", "--as-it-is"])
    [run] = json.loads((tmp_path / "out" / "simulation.json").read_text())["runs"]
    assert run["peak_replicas"] == {"gateway": 10, "model-server": 10}
    assert run["refused"] > 0.1
    assert "target 70%" in capsys.readouterr().out


def test_without_a_measurement_it_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(SystemExit, match=r"measured.json is not there: `make calibrate` measures it"):
        simulate.main(["--calibrated", str(tmp_path)])
