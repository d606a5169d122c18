"""The Flask app: routes, and nothing that happens at import."""

import base64
import binascii
import contextlib
import copy
import functools
import http.client
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import flask
import numpy as np
from flask import Response, current_app, g, request
from flask_openapi3 import Info, OpenAPI
from numpy.typing import NDArray
from pydantic import ValidationError
from werkzeug.exceptions import HTTPException
from werkzeug.middleware.proxy_fix import ProxyFix

from bundle.cpus import whole_cpus
from bundle.manifest import Manifest
from gateway import access, errors, plain, schemas, telemetry
from gateway.admission import BURST, Admission, Place
from gateway.client import Client, Split
from gateway.errors import Problem
from gateway.front import PLACE, READ_SECONDS, App, Environ, Front, wanted
from gateway.models import Model
from gateway.settings import Settings

STATIC = Path(__file__).with_name("static")
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
FORM = "multipart/form-data"
POST = re.compile(rb"POST (/[A-Za-z0-9._:/-]*)(?:\?[!-~]*)? HTTP/1\.[01]\r\n")
# The page needs nothing from another host; the docs' own page brings inline scripts with it.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


class Request(flask.Request):
    def _get_file_stream(self, *_: Any, **__: Any) -> BytesIO:
        """Uploads stay in memory: werkzeug would write those over 500 kB to a file."""
        return BytesIO()

    def get_json(self, *_: Any, **__: Any) -> Any:
        """JSON whatever the content type says, as curl -d sends it; what is wrong with it is said."""
        return super().get_json(force=True)

    def on_json_loading_failed(self, e: ValueError | None) -> Any:
        raise errors.BadRequest(f'the body is not JSON ({e}): send {{"instances": [{{"b64": "..."}}]}}') from e


class Gateway:
    """What the routes share: the models, and whether all of them have answered once."""

    def __init__(self, settings: Settings, ready_file: Path | None) -> None:
        self.settings = settings
        self.access = access.Access(access.keys(settings.api_keys_file), access.rate(settings.rate))
        main = self._client(settings.model_server)
        client: Client | Split = main
        if settings.canary:
            canary = self._client(settings.canary)
            client = Split(main, canary, settings.canary_share, telemetry.CANARY_FAILURES.inc)
        self.admission = Admission(settings.in_flight, settings.late_seconds)
        # More decoders than CPUs would only hold more memory.
        decoding = ThreadPoolExecutor(max(1, whole_cpus() // settings.worker_processes), "decode", _stand_back)
        self.models = {
            name: Model(name, client, decoding, settings.max_pixels, settings.model_seconds) for name in settings.models
        }
        self.several = ThreadPoolExecutor(min(8, settings.in_flight), "instances")
        self._ready_file, self._ready = ready_file, False
        self._overloads, self._told = 0, 0.0

    def asks(self, path: str) -> bool:
        """Whether a path is for those who may ask alone: the page, the docs and the probes are for everybody."""
        settings = self.settings
        return path != settings.health_route and (
            path.startswith(("/predict", "/v1/")) or path == settings.predict_route
        )

    def refusal(self, problem: Problem, environ: Environ, started: float) -> App:
        """The answer to a request that is refused. Of those under overload one a second is logged."""
        request_id = _request_id(environ.get("HTTP_X_REQUEST_ID", ""))
        fields: dict[str, Any] = {"problem": problem.detail}
        if isinstance(problem, errors.Overloaded):
            self._overloads += 1
            if time.monotonic() - self._told < 1:
                telemetry.refused()
                return _refused(problem, request_id)
            fields |= {"refused": self._overloads}
            self._overloads, self._told = 0, time.monotonic()
        size = int(environ.get("CONTENT_LENGTH") or 0)
        said = _line(request_id, environ["REQUEST_METHOD"], environ["PATH_INFO"], problem.status, size, fields)
        took = {"refusal": round(1000 * (time.perf_counter() - started), 2)}
        told = functools.partial(telemetry.answered, time.time(), "refused", problem.status)
        telemetry.later(lambda: told({}, {**said, "stages_ms": took}))
        return _refused(problem, request_id)

    def closed(self, head: bytes, address: str) -> bytes:
        """Like refusal, before gunicorn has read anything: the whole answer to a request with this head, if there is no
        place for it. Empty where there is one, and where telling who asks takes more than an address."""
        started, settings = time.perf_counter(), self.settings
        if settings.api_keys_file or settings.rate or settings.proxies or not (asks := POST.match(head)):
            return b""
        path = asks[1].decode()
        problem = self.admission.look(address) if self.asks(path) else None
        if not problem:
            return b""
        environ = {
            "REQUEST_METHOD": "POST",
            "PATH_INFO": path,
            "HTTP_X_REQUEST_ID": _header(head, b"x-request-id"),
            "CONTENT_LENGTH": _header(head, b"content-length"),
        }
        return plain.answer(self.refusal(problem, environ, started), environ, "Connection: close")

    def _client(self, target: str) -> Client:
        calls = int(self.settings.in_flight * (1 + BURST))  # as one client's pictures may be in, each with its own
        return Client(target, calls, telemetry.RETRIES.inc)

    def model(self, name: str | None) -> Model:
        """Raises UnknownModel, naming those there are."""
        name = name or self.settings.models[0]
        if name not in self.models:
            raise errors.UnknownModel(f"there is no model {name!r} here: there is {', '.join(self.models)}")
        return self.models[name]

    def check_ready(self) -> None:
        """Passes for good once every model gave a full round trip, in any of the worker processes.

        A later outage behind the gateway is answered with 503 and Retry-After, not by taking every
        gateway out of its Service. Raises the Problem of the first model that has not answered.
        """
        if self._ready or (self._ready_file and self._ready_file.exists()):
            return
        for model in self.models.values():
            model.check(time.monotonic() + 1)
        self._ready = True
        if self._ready_file:
            self._ready_file.touch()


def create_app(settings: Settings, ready_file: Path | None = None) -> OpenAPI:
    """A fresh app. ready_file: where worker processes tell each other that the gateway became ready."""
    body = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemDetails"}}}
    problems: dict[str | int, Any] = {
        kind.status: {"description": kind.title, "content": body} for kind in Problem.__subclasses__()
    }
    app = OpenAPI(
        __name__,
        info=Info(title="Kennel", version="1", description="Pictures in, named answers out."),
        static_folder=str(STATIC),
        doc_prefix="/docs",
        validation_error_status=400,
        validation_error_model=schemas.ProblemDetails,
        validation_error_callback=_invalid,
    )
    app.request_class = Request
    app.json.sort_keys = False  # type: ignore[attr-defined]  # answers read in the order they are written
    app.extensions["gateway"] = gateway = Gateway(settings, ready_file)
    app.wsgi_app = Front(  # type: ignore[method-assign]
        _short(app.wsgi_app, gateway),
        gateway.asks,
        gateway.access,
        gateway.admission,
        settings.max_bytes,
        gateway.refusal,
    )
    if settings.proxies:
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=settings.proxies, x_proto=settings.proxies)  # type: ignore[method-assign]
    app.before_request(_begin)
    app.after_request(_finish)
    app.register_error_handler(HTTPException, _http)
    app.register_error_handler(Exception, _failed)

    # First: where a path is one of those below, this is what it means.
    if settings.health_route:
        app.get(settings.health_route, doc_ui=False, endpoint="health_route")(readyz)
    if settings.predict_route:
        app.post(settings.predict_route, doc_ui=False, endpoint="predict_route")(predict_default)
    app.get("/", doc_ui=False)(index)
    app.get("/openapi.json", doc_ui=False)(lambda: app.api_doc)
    app.get("/healthz", summary="Alive")(healthz)
    app.get("/readyz", summary="Every model has answered", responses={503: problems[503]})(readyz)
    app.get("/metrics", summary="For Prometheus")(metrics)
    app.get("/v1/models", summary="The models served", responses={200: schemas.ModelList})(list_models)
    app.get("/v1/models/<name>", summary="One model", responses={200: schemas.ModelInfo, **problems})(get_model)
    app.post(
        "/predict",
        summary="One picture: multipart field `image`, or the file as the body",
        responses={200: schemas.Prediction, **problems},
        openapi_extensions={"requestBody": schemas.PICTURE_BODY},
    )(predict)
    app.post(
        "/v1/models/<string:name>:predict",
        summary="Several pictures as JSON",
        responses={200: schemas.PredictResponse, **problems},
    )(predict_json)
    return app


def index() -> Response:
    response = current_app.send_static_file("index.html")
    response.headers["Content-Security-Policy"] = PAGE_POLICY
    return response


def healthz() -> dict[str, str]:
    return {"status": "alive"}


def readyz() -> dict[str, str]:
    _gateway().check_ready()
    return {"status": "ready"}


def metrics() -> Response:
    return Response(telemetry.exposition(), content_type="text/plain; version=0.0.4; charset=utf-8")


def list_models() -> dict[str, Any]:
    """Every model; those whose server has not answered yet are there with `ready` false."""
    return {"models": [_info(model) for model in _gateway().models.values()]}


def get_model(path: schemas.ModelPath) -> dict[str, Any]:
    return schemas.describe(_gateway().model(path.name).current(g.call.deadline)).model_dump()


def predict(query: schemas.PredictQuery) -> Response:
    """One picture -> one prediction."""
    model = _gateway().model(query.model)
    if request.mimetype == FORM:
        if "image" not in request.files:
            raise errors.BadRequest("the form has no file in the field 'image': curl -F image=@photo.jpg")
        data = request.files["image"].read()
    else:
        data = request.get_data()
    return _json(_predict(g.call, model, [data], query.top_k)[0])


def _short(app: App, gateway: Gateway) -> App:
    """WSGI middleware: `predict` of a picture that is the body, with nothing else asked, as programs do, without Flask.

    Its routing, contexts, request and response cost 0.4 ms of CPU between two pictures, a twentieth of an answer in
    int8 (docs/speed.md). Answers are the same to all but the words beside their status, which nobody reads.
    """
    path = "/predict"
    if path in (gateway.settings.predict_route, gateway.settings.health_route):  # it means that, then
        return app

    def answer(environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        asks = environ["PATH_INFO"] == path and environ["REQUEST_METHOD"] == "POST" and not environ["QUERY_STRING"]
        if not asks or environ.get("CONTENT_TYPE", "").lower().startswith(FORM):
            return app(environ, start_response)
        call = Call(environ, gateway)
        try:
            body = _predict(call, gateway.model(None), [environ["wsgi.input"].getvalue()], None)[0]
            status, headers = 200, {"Content-Type": "application/json"}
        except Exception as exc:
            status, body, headers = _told(call.failed(exc), call.request_id)
        return _plain(status, body, headers | call.ended(path, path, status))(environ, start_response)

    return answer


def predict_json(path: schemas.ModelPath, body: schemas.PredictRequest) -> Response:
    """The form of TensorFlow Serving, KServe V1 and Vertex AI."""
    return _predict_json(_gateway().model(path.name), body)


def predict_default(body: schemas.PredictRequest) -> Response:
    return _predict_json(_gateway().model(None), body)


def _predict_json(model: Model, body: schemas.PredictRequest) -> Response:
    gateway = _gateway()
    if len(body.instances) > (most := gateway.settings.max_instances):
        raise errors.BadRequest(f"instances: {len(body.instances)} are too many for one request: send at most {most}")
    pictures = []
    for i, instance in enumerate(body.instances):
        try:
            pictures.append(base64.b64decode(instance.b64, validate=True))
        except (binascii.Error, ValueError) as exc:
            raise errors.BadRequest(f"instances[{i}].b64: is not base64 ({exc}): encode the file's bytes") from exc
    predictions = _predict(g.call, model, pictures, body.parameters.top_k, "instances[{}].b64: ")
    return _json(b'{"predictions":[' + b",".join(predictions) + b"]}")  # schemas.PredictResponse


def _predict(call: "Call", model: Model, pictures: list[bytes], top_k: int | None, where: str = "") -> list[bytes]:
    """Predictions for pictures as JSON, made side by side; the first that fails fails the request and is named."""
    if top_k and top_k > (most := len(model.manifest(call.deadline).classes)):
        raise errors.BadRequest(f"top_k: {top_k} is more than the {most} classes of {model.name}: send 1 to {most}")
    if call.place:
        call.place.holds(len(pictures))
    there = functools.partial(wanted, call.environ)

    def answer(manifest: Manifest, logits: NDArray[np.float32]) -> tuple[schemas.Prediction, bytes]:
        prediction = schemas.decide(manifest, logits, top_k)
        return prediction, prediction.model_dump_json().encode()

    def ask(data: bytes) -> Any:
        try:
            return model.predict(data, call.deadline, call.stages.add, answer, call.request_id, there)
        except Problem as exc:
            return errors.untraced(exc)  # raised by the request's own thread

    with telemetry.in_flight:
        if len(pictures) == 1:
            answers = [_named(where, 0, ask(pictures[0]))]
        else:
            running = [call.gateway.several.submit(ask, data) for data in pictures]
            try:
                answers = [_named(where, i, future.result()) for i, future in enumerate(running)]
            finally:
                for future in running:
                    future.cancel()
    labels = [prediction.label for prediction, _ in answers]
    call.said |= {"model": model.name, "digest": answers[0][0].digest, "labels": labels}
    return [body for _, body in answers]


def _named(where: str, i: int, found: Any) -> Any:
    """The answer; a Problem of the i-th picture is raised and says so."""
    if isinstance(found, Problem):
        found.detail = where.format(i) + found.detail
        raise copy.copy(found)  # the one that is found here must not have this frame
    return found


def _info(model: Model) -> dict[str, Any]:
    try:
        return schemas.describe(model.current(g.call.deadline)).model_dump()
    except Problem:
        return schemas.ModelInfo(name=model.name, ready=False).model_dump(exclude_none=True)


def _gateway() -> Gateway:
    gateway: Gateway = current_app.extensions["gateway"]
    return gateway


def _stand_back() -> None:
    """Decoding yields the CPU to those of the process's threads that have a little to do, like refusing."""
    with contextlib.suppress(OSError):
        if sys.platform == "linux":  # where a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + 5)


def _json(body: bytes) -> Response:
    return Response(body, content_type="application/json")


@dataclass
class Call:
    """What is known of the request under way. In Flask g.call, since every look through a proxy of flask's costs."""

    environ: Environ
    gateway: Gateway
    request_id: str = field(init=False)
    deadline: float = field(init=False)  # in time.monotonic()
    place: Place | None = field(init=False)
    started: float = field(default_factory=time.perf_counter)
    stages: telemetry.Stages = field(default_factory=telemetry.Stages)
    said: dict[str, Any] = field(default_factory=dict)  # for its log line
    timed_out: bool = False

    def __post_init__(self) -> None:
        self.request_id = _request_id(self.environ.get("HTTP_X_REQUEST_ID", ""))
        self.deadline = time.monotonic() + self.gateway.settings.deadline_seconds
        self.place = self.environ.get(PLACE)
        if self.environ["REQUEST_METHOD"] == "POST":
            self.stages.add("read", self.environ[READ_SECONDS])

    def failed(self, exc: Exception) -> Problem:
        """What is answered to it; what nobody foresaw is logged."""
        problem = exc if isinstance(exc, Problem) else Problem("an error of ours, logged under this request_id")
        if problem is not exc:
            telemetry.log.error("unexpected", exc_info=exc, extra={"request_id": self.request_id})
        self.said |= {"problem": problem.detail} | ({"cause": problem.cause} if problem.cause else {})
        self.timed_out = isinstance(problem, errors.TimedOut)
        return problem

    def ended(self, route: str, path: str, status: int) -> dict[str, str]:
        """Its place is given back, it is counted and logged -> headers for its answer."""
        if self.place:
            self.place.leave(tells=status == 200 or self.timed_out)
        method, stages = self.environ["REQUEST_METHOD"], self.stages
        if method == "POST":
            stages.add("request", time.perf_counter() - self.started)
        fields: dict[str, Any] = {}
        if status != 200 or route not in ("/healthz", "/readyz", "/metrics", self.gateway.settings.health_route):
            fields = _line(self.request_id, method, path, status, int(self.environ["CONTENT_LENGTH"]), self.said)
            fields["stages_ms"] = stages.milliseconds
        answered = functools.partial(telemetry.answered, time.time(), route, status, stages.milliseconds, fields)
        telemetry.later(answered)
        return _always(self.request_id)


def _begin() -> None:
    g.call = Call(request.environ, _gateway())


def _finish(response: Response) -> Response:
    rule = request.url_rule
    response.headers.update(g.call.ended(rule.rule if rule else "other", request.path, response.status_code))
    return response


def _line(request_id: str, method: str, path: str, status: int, size: int, fields: dict[str, Any]) -> dict[str, Any]:
    """What is logged of one request; size: of its body, in bytes."""
    return {"request_id": request_id, "method": method, "path": path, "status": status, "bytes": size, **fields}


def _header(head: bytes, name: bytes) -> str:
    found = re.search(rb"\r\n%s:[ \t]*([^\r\n]*)" % name, head, re.IGNORECASE)
    return found[1].decode("latin-1").strip() if found else ""


def _request_id(given: str) -> str:
    return given if REQUEST_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"


def _failed(exc: Exception) -> Response:
    status, body, headers = _told(g.call.failed(exc), g.call.request_id)
    return Response(body, status, headers)


def _told(problem: Problem, request_id: str) -> tuple[int, bytes, dict[str, str]]:
    """A problem's answer: status, body, headers."""
    details = schemas.ProblemDetails(
        type=problem.type, title=problem.title, status=problem.status, detail=problem.detail, request_id=request_id
    )
    headers = {"Content-Type": "application/problem+json"}
    if problem.status == 401:
        headers["WWW-Authenticate"] = 'Basic realm="Kennel: the API key as the password", charset="UTF-8"'
    if problem.retry_after is not None:
        headers["Retry-After"] = str(problem.retry_after)
    return problem.status, details.model_dump_json().encode(), headers


def _refused(problem: Problem, request_id: str) -> App:
    status, body, headers = _told(problem, request_id)
    return _plain(status, body, headers | _always(request_id))


def _always(request_id: str) -> dict[str, str]:
    """Headers of every answer."""
    return {"X-Request-Id": request_id, "X-Content-Type-Options": "nosniff"}


def _plain(status: int, body: bytes, headers: dict[str, str]) -> App:
    """An answer without what a response of Flask's takes."""
    line = f"{status} {http.client.responses.get(status, '')}"
    lines = [*headers.items(), ("Content-Length", str(len(body)))]

    def app(_: Environ, start_response: Callable[..., Any]) -> list[bytes]:
        start_response(line, lines)
        return [body]

    return app


def _http(exc: HTTPException) -> Response | HTTPException:
    """What Flask itself answers: no such path, wrong method, a form it cannot parse."""
    if exc.code is None or exc.code < 400:
        return exc
    problem = Problem(f"{request.method} {request.path}: {exc.description}")
    problem.status, problem.title = exc.code, exc.name
    response = _failed(problem)
    for key, value in exc.get_headers():
        if key == "Allow":
            response.headers[key] = value
    return response


def _invalid(exc: ValidationError) -> Response:
    """pydantic's complaints as one sentence that names each place and what would be right."""
    parts = []
    for error in exc.errors(include_url=False):
        place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error["loc"]).lstrip(".")
        got = repr(error["input"])
        parts.append(f"{place or 'the body'}: {error['msg']}, not {got if len(got) <= 60 else got[:57] + '...'}")
    return _failed(errors.BadRequest("; ".join(parts)))
