"""API keys and rates, through Flask's test client."""

import base64

import pytest
from fake_torchserve import FakeTorchServe
from tiny import picture

from gateway.app import create_app
from gateway.settings import Settings


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text("first-key\n\nsecond-key\n")
    return str(path)


@pytest.fixture
def client_of(torchserve, tiny):
    torchserve.models["tiny"] = tiny["1"]

    def make(**settings):
        return create_app(Settings(models=("tiny",), model_server=torchserve.target, **settings)).test_client()

    return make


def ask(client, **headers):
    return client.post("/predict", data=picture("red"), headers=headers)


def password(key):
    return "Basic " + base64.b64encode(f":{key}".encode()).decode()


@pytest.mark.parametrize(
    "headers",
    [{"X-API-Key": "first-key"}, {"X-API-Key": "second-key"}, {"Authorization": password("second-key")}],
)
def test_a_key_as_a_header_or_as_a_password_opens(client_of, keys, headers):
    assert ask(client_of(api_keys_file=keys), **headers).json["label"] == "red"


@pytest.mark.parametrize(
    ("headers", "sentence"),
    [
        ({}, "is missing"),
        ({"X-API-Key": ""}, "is missing"),
        ({"X-API-Key": "first-ke"}, "is not one of"),
        ({"X-API-Key": "first-key\u00e9"}, "is not one of"),
        ({"Authorization": password("third")}, "is not one of"),
        ({"Authorization": "Bearer first-key"}, "is missing"),
    ],
)
def test_without_a_right_key_nothing_is_told(client_of, keys, headers, sentence):
    client = client_of(api_keys_file=keys)
    answer = ask(client, **headers)
    assert answer.status_code == 401
    assert sentence in answer.json["detail"]
    assert answer.headers["WWW-Authenticate"].startswith("Basic")  # browsers ask for it by themselves
    assert client.get("/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/metrics", "/openapi.json"])
def test_the_page_and_the_probes_need_no_key(client_of, keys, path):
    with client_of(api_keys_file=keys).get(path) as answer:
        assert answer.status_code == 200


def test_one_client_cannot_take_anothers_share(client_of, keys):
    client = client_of(api_keys_file=keys, rate="2/minute")
    statuses = [ask(client, **{"X-API-Key": "first-key"}).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    refused = ask(client, **{"X-API-Key": "first-key"})
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    assert ask(client, **{"X-API-Key": "second-key"}).status_code == 200


def test_without_keys_a_client_is_the_address_that_the_trusted_proxy_saw(client_of):
    client = client_of(rate="1/minute", proxies=1)
    assert ask(client, **{"X-Forwarded-For": "10.0.0.1"}).status_code == 200
    assert ask(client, **{"X-Forwarded-For": "10.0.0.2"}).status_code == 200
    # What a client wrote into the header itself stands before what the proxy added.
    assert ask(client, **{"X-Forwarded-For": "10.0.0.9, 10.0.0.1"}).status_code == 429
    alone = client_of(rate="1/minute")
    assert ask(alone, **{"X-Forwarded-For": "10.0.0.1"}).status_code == 200
    assert ask(alone, **{"X-Forwarded-For": "10.0.0.2"}).status_code == 429, "a header that nobody vouches for"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"api_keys_file": "/nowhere"}, "API_KEYS_FILE='/nowhere' cannot be read"),
        ({"api_keys_file": "/dev/null"}, "has no key"),
        ({"rate": "often"}, "RATE='often' is no rate"),
    ],
)
def test_a_bad_setting_stops_the_start(client_of, settings, sentence):
    with pytest.raises(SystemExit, match=sentence):
        client_of(**settings)


def test_a_canary_gets_its_share_and_a_dead_one_costs_no_answer(client_of, tiny):
    canary = FakeTorchServe()
    try:
        canary.models["tiny"] = tiny["2"]
        client = client_of(canary=canary.target, canary_share=0.5)
        versions = [ask(client).json["version"] for _ in range(60)]
        assert 12 <= versions.count("2") <= 48, "half, but for a chance of one in a million"
        canary.end()
        assert {ask(client).json["version"] for _ in range(20)} == {"1"}
    finally:
        canary.end()
