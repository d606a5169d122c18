"""The HTTP side, through Flask's test client and a real gRPC connection behind it."""

import base64
import json
import logging
from io import BytesIO

import grpc
import pytest
from tiny import WAYS, picture

from bundle.picture import PictureError
from gateway import errors
from gateway.app import create_app
from gateway.settings import Settings
from gateway.telemetry import LOGGING

JSON = "/v1/models/tiny:predict"


@pytest.fixture
def client(torchserve, tiny):
    torchserve.models["tiny"] = tiny["1"]
    return client_of(torchserve)


def client_of(torchserve, **settings):
    values = {"models": ("tiny", "other"), "model_server": torchserve.target, "max_bytes": 100_000, **settings}
    return create_app(Settings(**values)).test_client()


def b64(colour):
    return base64.b64encode(picture(colour)).decode()


def test_a_picture_as_the_body_and_as_a_form_give_the_same_answer(client, tiny):
    raw = client.post("/predict", data=picture("blue"))
    form = client.post("/predict", data={"image": (BytesIO(picture("blue")), "x.png")})
    assert raw.json == form.json
    assert raw.json["label"] == "blue"
    assert raw.json["known"] is True
    assert raw.json["top"][0]["label"] == "blue"
    assert len(raw.json["top"]) == 2  # the manifest's own top_k
    assert raw.json["probability"] == raw.json["top"][0]["probability"] > 0.5
    assert (raw.json["model"], raw.json["version"], raw.json["digest"]) == ("tiny", "1", tiny["1"].manifest.digest)


@pytest.mark.parametrize("body", [picture("blue"), picture("red")[:80], b"hello", b""])
def test_the_short_way_answers_counts_and_logs_as_flask_does(client, body, caplog):
    caplog.set_level("INFO")
    counted = [client.get("/metrics").text]
    answers = []
    for path in WAYS:
        answers.append(client.post(path, data=body, headers={"X-Request-Id": "a"}))
        counted.append(client.get("/metrics").text)
    short, flask = answers
    assert (short.status_code, short.json) == (flask.status_code, flask.json)
    assert dict(short.headers) == dict(flask.headers)
    line = f'kennel_requests_total{{route="/predict",status="{short.status_code}"}} '
    before, one, two = (float((text + line + "0").split(line)[1].split()[0]) for text in counted)
    assert (one - before, two - one) == (1, 1)
    first, second = (
        vars(record) for record in caplog.records if record.message == "request" and record.path == "/predict"
    )
    assert first["stages_ms"].keys() == second["stages_ms"].keys()
    told = ("request_id", "method", "path", "status", "bytes", "model", "digest", "labels", "problem")
    assert [first.get(key) for key in told] == [second.get(key) for key in told]


def test_the_short_way_goes_around_flask(client):
    client.application.before_request(lambda: pytest.fail("by Flask"))
    assert client.post("/predict", data=picture("blue")).json["label"] == "blue"


def test_what_nobody_foresaw_is_told_and_logged_on_either_way(client, monkeypatch, caplog):
    monkeypatch.setattr("gateway.schemas.decide", lambda *_: 1 / 0)
    for path in WAYS:
        caplog.clear()
        answer = client.post(path, data=picture("blue"))
        assert (answer.status_code, answer.json["detail"]) == (500, "an error of ours, logged under this request_id")
        unexpected = [record for record in caplog.records if record.message == "unexpected"]
        assert [record.request_id for record in unexpected] == [answer.json["request_id"]]
        assert unexpected[0].exc_info[0] is ZeroDivisionError


def test_several_pictures_as_json_come_back_in_order(client):
    instances = [{"b64": b64(colour)} for colour in ("red", "blue", "green", "red")]
    answer = client.post(JSON, json={"instances": instances, "parameters": {"top_k": 3}})
    assert [p["label"] for p in answer.json["predictions"]] == ["red", "blue", "green", "red"]
    assert [len(p["top"]) for p in answer.json["predictions"]] == [3] * 4
    assert sum(score["probability"] for score in answer.json["predictions"][0]["top"]) == pytest.approx(1)


def test_json_is_read_whatever_the_content_type_says(client):
    body = json.dumps({"instances": [{"b64": b64("red")}]})
    answer = client.post(JSON, data=body, content_type="application/x-www-form-urlencoded")
    assert answer.json["predictions"][0]["label"] == "red"


def test_parameters_may_come_as_protobuf_writes_them(client):
    instances = [{"b64": b64("red")}]
    assert client.post(JSON, json={"instances": instances, "parameters": None}).status_code == 200
    answer = client.post(JSON, json={"instances": instances, "parameters": {"top_k": 3.0}})
    assert len(answer.json["predictions"][0]["top"]) == 3
    assert client.post(JSON, json={"instances": instances, "parameters": {"top_k": 2.5}}).status_code == 400


@pytest.mark.parametrize(
    "predict", ["/v1/endpoints/1/deployedModels/2:predict", "/v1/models/default:predict", "/predict"]
)
@pytest.mark.parametrize("health", ["/v1/endpoints/1/deployedModels/2", "/healthz", "/readyz"])
def test_another_platforms_routes_lead_to_readiness_and_to_the_default_model(
    torchserve, tiny, tmp_path, health, predict
):
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    client = client_of(
        torchserve, models=("tiny",), health_route=health, predict_route=predict, api_keys_file=str(keys)
    )
    assert client.get(health).status_code == 503
    torchserve.models["tiny"] = tiny["1"]
    assert client.get(health).json == {"status": "ready"}
    body = {"instances": [{"b64": b64("green")}]}
    assert client.post(predict, json=body).status_code == 401  # the one is for probes, the other is not
    answer = client.post(predict, json=body, headers={"X-API-Key": "secret"})
    assert [each["label"] for each in answer.json["predictions"]] == ["green"]


def test_below_the_threshold_the_label_is_unknown_and_the_guesses_stay(client, tiny, monkeypatch):
    monkeypatch.setattr(tiny["1"], "run", lambda pixels: pixels[:, 0, 0].astype("f4") * 0)
    answer = client.post("/predict", data=picture("red")).json
    assert (answer["label"], answer["known"], len(answer["top"])) == ("unknown", False, 2)


@pytest.mark.parametrize(
    ("method", "path", "kwargs", "status", "sentence"),
    [
        ("post", "/predict", {"data": b""}, 415, "empty (0 bytes)"),
        ("post", "/predict", {"data": b"hello"}, 415, "are not a picture"),
        ("post", "/predict", {"data": picture("red")[:80]}, 422, "cut off or damaged"),
        ("post", "/predict", {"data": bytes(100_001)}, 413, "larger than 100,000 bytes"),
        ("post", "/predict", {"data": {"file": "x"}, "content_type": "multipart/form-data"}, 400, "'image'"),
        ("post", "/predict?model=cat", {"data": picture("red")}, 404, "no model 'cat' here: there is tiny, other"),
        ("post", "/predict?top_k=0", {"data": picture("red")}, 400, "top_k: Input should be greater than"),
        ("post", "/predict?top_k=-1", {"data": picture("red")}, 400, "top_k"),
        ("post", "/predict?top_k=10000", {"data": picture("red")}, 400, "10000 is more than the 3 classes of tiny"),
        ("post", "/predict?top_k=five", {"data": picture("red")}, 400, "valid integer, unable to parse"),
        ("post", "/predict?topk=5", {"data": picture("red")}, 400, "topk: Extra inputs are not permitted"),
        ("post", JSON, {"data": b'{"instances": [{'}, 400, "the body is not JSON"),
        ("post", JSON, {"data": b"\xff\xfe"}, 400, "the body is not JSON"),
        ("post", JSON, {"json": []}, 400, "valid dictionary"),
        ("post", JSON, {"data": b"null"}, 400, "valid dictionary"),
        ("post", JSON, {"json": "text"}, 400, ""),
        ("post", JSON, {"json": {"instances": []}}, 400, "instances: List should have at least 1 item"),
        ("post", JSON, {"json": {"instances": [{"b64": 5}]}}, 400, "instances[0].b64: Input should be a valid string"),
        ("post", JSON, {"json": {"instances": [{"b64": "%%%"}]}}, 400, "instances[0].b64: is not base64"),
        ("post", JSON, {"json": {"instances": [{"b64": ""}]}}, 415, "instances[0].b64: the picture is empty"),
        ("post", JSON, {"json": {"instances": [{"b64": b64("red")}, {"b64": "aGVsbG8="}]}}, 415, "instances[1].b64:"),
        ("post", JSON, {"json": {"instances": [{"b64": b64("red")}] * 33}}, 400, "33 are too many"),
        ("post", JSON, {"json": {"instances": [{"b64": ""}], "parameters": {"top_k": "5"}}}, 400, "parameters.top_k"),
        ("post", "/v1/models/cat:predict", {"json": {"instances": [{"b64": ""}]}}, 404, "there is no model 'cat'"),
        ("get", "/v1/models/cat", {}, 404, "there is no model 'cat'"),
        ("get", "/predict", {}, 405, "method is not allowed"),
        ("get", "/nothing", {}, 404, "GET /nothing"),
    ],
)  # fmt: skip
def test_bad_input_is_a_problem_that_says_what_would_be_right(client, method, path, kwargs, status, sentence):
    answer = getattr(client, method)(path, **kwargs)
    assert answer.status_code == status, answer.text
    assert answer.content_type == "application/problem+json"
    assert answer.json["status"] == status
    assert sentence in answer.json["detail"]
    assert answer.json["request_id"] == answer.headers["X-Request-Id"]
    assert client.post("/predict", data=picture("green")).json["label"] == "green"  # the next one is unharmed


@pytest.mark.parametrize(
    ("code", "details", "status", "retry_after"),
    [("UNAVAILABLE", "refused", 503, "2"), ("RESOURCE_EXHAUSTED", "", 503, "1"), ("INTERNAL", "what?", 502, None)],
)
def test_trouble_behind_is_told_with_when_to_come_back(client, torchserve, code, details, status, retry_after):
    client.post("/predict", data=picture("red"))
    torchserve.fail = [(grpc.StatusCode[code], details)] * 2
    answer = client.post("/predict", data=picture("red"))
    assert (answer.status_code, answer.headers.get("Retry-After")) == (status, retry_after)


def test_ready_means_that_every_model_has_answered_and_stays(torchserve, tiny):
    client = client_of(torchserve)
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 503
    torchserve.models["tiny"] = tiny["1"]
    assert client.get("/readyz").status_code == 503  # "other" has not answered
    client = client_of(torchserve, models=("tiny",))
    assert client.get("/readyz").status_code == 200
    torchserve.models.clear()
    assert client.post("/predict", data=picture("red")).status_code == 503
    assert client.get("/readyz").status_code == 200


def test_ready_is_shared_between_worker_processes(torchserve, tiny, tmp_path):
    torchserve.models["tiny"] = tiny["1"]
    settings = Settings(models=("tiny",), model_server=torchserve.target)
    assert create_app(settings, tmp_path / "ready").test_client().get("/readyz").status_code == 200
    torchserve.models.clear()
    assert create_app(settings, tmp_path / "ready").test_client().get("/readyz").status_code == 200


def test_models_are_listed_the_default_first_and_described(client, tiny):
    first, second = client.get("/v1/models").json["models"]
    assert (first["name"], first["ready"], first["classes"]) == ("tiny", True, ["red", "green", "blue"])
    assert second == {"name": "other", "ready": False}
    described = client.get("/v1/models/tiny").json
    assert described["digest"] == tiny["1"].manifest.digest
    assert {"version", "metrics", "threshold", "licence"} <= set(described)


def test_a_request_id_comes_back_goes_on_and_is_logged(client, torchserve, caplog):
    with caplog.at_level(logging.INFO, "gateway"):
        answer = client.post("/predict", data=picture("red"), headers={"X-Request-Id": "a-1.b"})
    assert answer.headers["X-Request-Id"] == "a-1.b"
    assert torchserve.metadata[-1]["x-request-id"] == "a-1.b"
    (line,) = [record for record in caplog.records if record.message == "request"]
    assert (line.request_id, line.status, line.path, line.labels) == ("a-1.b", 200, "/predict", ["red"])
    assert set(line.stages_ms) == {"read", "decode", "model", "request"}


@pytest.mark.parametrize("bad", ["a b", "x" * 200, 'a"b', ""])
def test_a_request_id_that_could_forge_a_log_line_is_replaced(client, bad):
    given = client.get("/healthz", headers={"X-Request-Id": bad}).headers["X-Request-Id"]
    assert given != bad
    assert len(given) == 32


def test_a_log_line_is_json_and_never_holds_the_picture(client, capsys):
    import logging.config

    logging.config.dictConfig({**LOGGING, "root": {"level": "INFO", "handlers": ["stdout"]}})
    try:
        client.post(JSON, json={"instances": [{"b64": b64("red")}]})
    finally:
        logging.getLogger().handlers.clear()
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["status"] == 200
    assert b64("red")[:20] not in line


def test_metrics_count_requests_stages_and_labels(client):
    client.post("/predict", data=picture("red"))
    client.post("/predict", data=b"hello")
    text = client.get("/metrics").text
    for part in (
        'kennel_requests_total{route="/predict",status="200"}',
        'kennel_requests_total{route="/predict",status="415"}',
        'kennel_predictions_total{label="red",model="tiny"}',
        'kennel_stage_seconds_count{stage="decode"}',
        "kennel_in_flight 0.0",
    ):
        assert part in text


def test_the_docs_are_made_from_the_code_and_need_no_other_host(client):
    paths = client.get("/openapi.json").json["paths"]
    predict = paths["/predict"]["post"]
    assert set(predict["requestBody"]["content"]) == {"multipart/form-data", "application/octet-stream"}
    assert "application/problem+json" in predict["responses"]["415"]["content"]
    assert {"/predict", "/v1/models", "/v1/models/{name}", "/v1/models/{name}:predict", "/readyz"} <= set(paths)
    page = client.get("/docs/swagger")
    assert page.status_code == 200
    assert "https://" not in page.text.replace("https://www.w3.org", "")


def test_the_page_may_load_nothing_from_another_host(client):
    with client.get("/") as answer:
        assert answer.content_type.startswith("text/html")
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


def test_an_error_of_ours_is_logged_and_not_shown(client, tiny, monkeypatch, caplog):
    def bug(*_):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("gateway.schemas.decide", bug)
    answer = client.post("/predict", data=picture("red"))
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert any(record.exc_info and record.request_id == answer.json["request_id"] for record in caplog.records)


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [({}, "MODELS is not set"), ({"MODELS": "a", "THREADS": "many"}, "THREADS='many' is not of type"),
     ({"MODELS": "a", "CANARY_SHARE": "10"}, "CANARY_SHARE=10.0 is no share"),
     ({"MODELS": "a", "HEALTH_ROUTE": "health"}, "HEALTH_ROUTE='health' is no path"),
     ({"MODELS": " , "}, "MODELS is not set")],
)  # fmt: skip
def test_a_missing_or_bad_setting_stops_the_start_and_is_named(environ, sentence):
    with pytest.raises(SystemExit, match=sentence):
        Settings.from_environment(environ)


def test_every_way_a_picture_can_fail_has_its_status():
    assert set(errors.PICTURE_ERRORS) == set(PictureError.__subclasses__())
