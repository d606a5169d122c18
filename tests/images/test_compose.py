"""The compose file by the README's commands, against a real engine."""

import json

import pytest
from containers import Spec, docker, make

from local.processes import free_ports


@pytest.fixture(scope="module")
def up(images):
    port = f"PORT={free_ports(1)[0]}"
    try:
        yield make("compose-up", port), lambda: make("compose-test", port)
    finally:
        make("compose-down", port)


def test_up_says_where_it_answers_and_test_asks_it(up):
    said, test = up
    assert "Ready: http://127.0.0.1:" in said
    assert test().strip() == "not a dog"


@pytest.mark.parametrize("tier", ["gateway", "model-server"])
def test_limits_and_rights_are_the_clusters(up, tier):
    host = json.loads(docker("inspect", f"kennel_{tier}_1"))[0]["HostConfig"]
    spec = Spec(tier)
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["NanoCpus"] == int(spec.limits["cpu"]) * 10**9
    assert host["Memory"] == {"1536Mi": 1536 << 20, "1Gi": 1 << 30}[spec.limits["memory"]]
    assert set(host["Tmpfs"]) == set(spec.writable)
    environment = json.loads(docker("inspect", f"kennel_{tier}_1"))[0]["Config"]["Env"]
    assert {f"{key}={value}" for key, value in spec.environment.items()} <= set(environment)
