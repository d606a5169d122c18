"""The HPA's algorithm by cases of the controller's own tests, and worked by hand from the documentation.

Those named after a test of Kubernetes 1.36 have its numbers: pkg/controller/podautoscaler/replica_calculator_test.go
and horizontal_test.go, TestScalingWithRules.
"""

import itertools

import pytest

from capacity.hpa import DOWN, UP, Autoscaler, Flags, Metric, Pod, Policy, Rules, Scaling, group, wanted

NOW, FLAGS = 10_000.0, Flags()


def pod(usage: int | None = None, request: int = 1000, ready: bool = True, age: float = 5000, **more) -> Pod:
    """An old one that took `usage` in the last minute; None: without a metric."""
    started = NOW - age
    metric = None if usage is None else Metric(NOW - 5, 60, usage)
    return Pod(started, ready, started + 3, request, metric, **more)


def spec(utilization: int = 0, value: int = 0, **more) -> Scaling:
    return Scaling("x", 1, 100, utilization, value, **more)


NEW = 100  # seconds of age: within the period in which CPU may still be that of the start


@pytest.mark.parametrize(
    ("name", "current", "expected", "target", "pods"),
    [
        ("ScaleUp", 3, 5, 30, [pod(300), pod(500), pod(700)]),
        ("ScaleUpUnreadyLessScale", 3, 4, 30, [pod(300, ready=False, age=NEW), pod(500), pod(700)]),
        ("ScaleUpHotCpuLessScale", 3, 4, 30, [pod(300, age=30), pod(500), pod(700)]),
        ("ScaleUpUnreadyNoScale", 3, 3, 30,
         [pod(400), pod(500, ready=False, age=NEW), pod(700, ready=False, age=NEW)]),
        ("ScaleUpIgnoresDeletionPods", 2, 4, 30, [pod(500), pod(700), pod(leaving=True), pod(900, leaving=True)]),
        ("ScaleDown", 5, 3, 50, [pod(100), pod(300), pod(500), pod(250), pod(250)]),
        ("ScaleDownIgnoreHotCpuPods", 5, 2, 50, [pod(100), pod(300), pod(500), pod(250, age=30), pod(250, age=30)]),
        ("Tolerance", 3, 3, 100, [pod(1010, 900), pod(1030, 1000), pod(1020, 1100)]),
        ("MissingMetrics", 4, 3, 100, [pod(400), pod(95), pod(), pod()]),
        ("MissingMetricsNoChangeEq", 2, 2, 100, [pod(1000), pod()]),
        ("MissingMetricsNoChangeGt", 2, 2, 100, [pod(1900), pod()]),
        ("MissingMetricsNoChangeLt", 2, 2, 100, [pod(600), pod()]),
        ("MissingMetricsUnreadyChange", 3, 3, 50, [pod(100, ready=False, age=NEW), pod(450), pod()]),
        ("MissingMetricsUnreadyScaleUp", 3, 4, 50, [pod(100, ready=False, age=NEW), pod(2000), pod()]),
        ("MissingMetricsHotCpuScaleUp", 3, 4, 50, [pod(100, age=30), pod(2000), pod()]),
        ("MissingMetricsUnreadyScaleDown", 4, 3, 50, [pod(100, ready=False, age=NEW), pod(100), pod(100), pod()]),
        ("MissingMetricsScaleDownTargetOver100", 4, 2, 300,
         [pod(200, ready=False, age=NEW), pod(100), pod(100, 2000), pod(None, 2000)]),
        ("DuringRollingUpdateWithMaxSurge", 2, 2, 50, [pod(100), pod(100), pod()]),
    ],
)  # fmt: skip
def test_replicas_as_the_controllers_own_tests_want_them(name, current, expected, target, pods):
    assert wanted(spec(target), current, pods, NOW, FLAGS) == expected, name


def test_the_documentation_s_ratios():
    """ "if the current metric value is 200m, and the desired value is 100m, the number of replicas will be doubled";
    50m halves them."""
    assert wanted(spec(value=100), 3, [pod(200)] * 3, NOW, FLAGS) == 6
    assert wanted(spec(value=100), 4, [pod(50)] * 4, NOW, FLAGS) == 2
    assert wanted(spec(value=100), 3, [pod(110)] * 3, NOW, FLAGS) == 3, "within a tenth"
    assert wanted(spec(value=100), 3, [pod(111)] * 3, NOW, FLAGS) == 4


def test_a_tolerance_of_its_own_for_each_direction():
    careful = spec(value=100, up=Rules(0, UP.policies, tolerance=0.0), down=Rules(300, DOWN.policies, tolerance=0.5))
    assert wanted(careful, 3, [pod(101)] * 3, NOW, FLAGS) == 4
    assert wanted(careful, 4, [pod(51)] * 4, NOW, FLAGS) == 4


def test_nobody_with_a_metric_that_counts_changes_nothing():
    assert wanted(spec(50), 2, [pod(), pod(900, pending=True)], NOW, FLAGS) is None
    assert Autoscaler(spec(50)).sync(NOW, 2, [pod()]) == 2


def test_a_new_pod_counts_once_a_whole_window_lies_after_its_readiness():
    ready = NOW - 20
    young = [Pod(NOW - 25, True, ready, 1000, Metric(at, 15, 500)) for at in (ready + 14, ready + 15)]
    counted, unready, _ = group(young, NOW, FLAGS)
    assert (counted, unready) == (young[1:], young[:1])


def test_after_the_first_minutes_only_who_never_was_ready_is_left_out():
    never = Pod(NOW - 400, False, NOW - 395, 1000, Metric(NOW - 5, 15, 500))
    was = Pod(NOW - 400, False, NOW - 100, 1000, Metric(NOW - 5, 15, 500))
    assert group([never, was], NOW, FLAGS)[:2] == ([was], [never])


def rules(pods: int, pods_period: float, percent: int, percent_period: float, window: float) -> Rules:
    policies = []
    if pods:
        policies.append(Policy("Pods", pods, pods_period))
    if percent:
        policies.append(Policy("Percent", percent, percent_period))
    return Rules(window, tuple(policies))


EVENTS = [(NOW - 120 + 120 / 6 + 40 * i, n) for i, n in enumerate((1, 5, 9))]  # generateEventsUniformDistribution


@pytest.mark.parametrize(
    ("current", "asked", "least", "most", "up", "down", "events", "expected"),
    [
        (5, 7, 3, 8, UP, DOWN, [], 7),
        (3, 1, 2, 8, UP, DOWN, [], 2),
        (100, 1000, 100, 150, UP, DOWN, [], 150),
        (3, 1000, 1, 2000, rules(0, 0, 1, 60, 0), DOWN, [], 4),
        (1000, 3, 3, 2000, UP, rules(20, 60, 0, 0, 0), [], 980),
        (10, 50, 1, 1000, UP, DOWN, [], 20),
        (10, 500, 1, 1000, rules(100, 60, 100, 60, 0), DOWN, [], 110),
        (10, 500, 1, 1000, rules(2, 60, 100, 60, 0), DOWN, [], 20),
        (10, 50, 1, 1000, rules(30, 60, 0, 0, 0), DOWN, [], 40),
        (10, 50, 1, 1000, rules(0, 0, 200, 60, 0), DOWN, [], 30),
        (100, 2, 1, 1000, UP, rules(20, 60, 1, 60, 300), [], 80),
        (100, 2, 1, 1000, UP, rules(2, 60, 1, 60, 300), [], 98),
        (10, 0, 1, 1000, UP, rules(100, 60, 0, 0, 300), [], 1),
        (10, 2, 1, 1000, UP, rules(5, 60, 0, 0, 300), [], 5),
        (10, 5, 1, 1000, UP, rules(0, 0, 50, 60, 300), [], 5),
        (100, 500, 1, 200, rules(300, 60, 0, 0, 0), DOWN, EVENTS, 200),
        (100, 500, 1, 1000, rules(5, 120, 0, 0, 0), DOWN, EVENTS, 100),
    ],
)
def test_limits_as_the_controllers_own_tests_want_them(current, asked, least, most, up, down, events, expected):
    scaler = Autoscaler(Scaling("x", least, most, 50, up=up, down=down))
    scaler._changes = list(events)
    assert scaler.limited(current, asked, NOW) == expected


def test_policies_select_the_most_the_least_or_nothing():
    policies = (Policy("Pods", 4, 60), Policy("Percent", 10, 60))
    found = {
        select: Autoscaler(spec(50, up=Rules(0, policies, select), down=Rules(0, policies, select)))
        for select in ("Max", "Min", "Disabled")
    }
    assert {select: one.limited(80, 200, NOW) for select, one in found.items()} == {
        "Max": 88,
        "Min": 84,
        "Disabled": 80,
    }
    assert {select: one.limited(80, 1, NOW) for select, one in found.items()} == {"Max": 72, "Min": 76, "Disabled": 80}


def test_what_went_in_the_period_may_come_back_too():
    """periodStartReplicas counts both directions (calculateScaleUpLimitWithScalingRules)."""
    scaler = Autoscaler(spec(50, up=rules(2, 60, 0, 0, 0)))
    scaler._changes = [(NOW - 30, -5), (NOW - 20, 1)]
    assert scaler.limited(10, 100, NOW) == 10 + 5 - 1 + 2


def test_base_s_policies_by_hand():
    """100% or 2 pods in 30 s, whatever is more, of pods at 1.43 times their target: 2 want 3; 3 want 5, but of the 2
    that there were 30 s before 4 may come; 4 want 6 of the 3 of then; 6 want 9, 8 of the 4 of then; 8 want 12, 10 is
    the most."""
    scaler = Autoscaler(Scaling("x", 2, 10, 70, up=rules(2, 30, 100, 30, 0), down=rules(1, 60, 0, 0, 300)))
    counts = [2]
    for look in range(5):
        counts.append(scaler.sync(NOW + 15 * look, counts[-1], [pod(1000)] * counts[-1]))
    assert counts == [2, 3, 4, 6, 8, 10]


def test_scaling_down_waits_for_the_highest_of_its_window():
    scaler = Autoscaler(spec(50, down=rules(1, 60, 0, 0, 300)))
    counts = [4]
    for look in itertools.count():
        now = NOW + 15 * look
        usage = 500 if look == 0 else 100
        metric = Metric(now - 5, 15, usage)
        counts.append(scaler.sync(now, counts[-1], [Pod(0, True, 3, 1000, metric)] * counts[-1]))
        if counts[-1] < 4:
            break
    assert now - NOW == 300
    assert counts[-1] == 3, "one a minute"


def test_scaling_up_waits_for_the_lowest_of_its_window():
    scaler = Autoscaler(spec(50, up=rules(10, 15, 0, 0, 60)))
    found = {}
    for look in range(6):
        now = NOW + 15 * look
        usage = 500 if look == 0 else 1000
        found[15 * look] = scaler.sync(now, 2, [Pod(0, True, 3, 1000, Metric(now - 5, 15, usage))] * 2)
    assert found == {0: 2, 15: 2, 30: 2, 45: 2, 60: 4, 75: 4}


def test_more_than_the_most_goes_at_once():
    assert Autoscaler(Scaling("x", 2, 3, 50)).sync(NOW, 7, []) == 3
    assert Autoscaler(Scaling("x", 2, 3, 50)).sync(NOW, 1, []) == 2
