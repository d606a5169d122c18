"""Calls to the model server: the gateway's one module that knows TorchServe and gRPC.

One channel a process, made at first use and thus after gunicorn's fork; round robin over every
address of the target; a deadline on every call; bounded calls in flight; one retry, within the
deadline and a budget, and only where the connection failed.
"""

import contextlib
import json
import math
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from bundle.wire import Bytes, Value
from gateway.errors import BadAnswer, ConnectionLost, Overloaded, Problem, TimedOut, Unavailable

METHOD = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
MAX_MESSAGE = 64 << 20  # as the model server's max_request_size
SLOW = "the model did not answer in time: try again soon"
RECONNECT_SECONDS = 0.7  # before a retry: names are resolved and a connection made in a tenth of it

CHANNEL_OPTIONS = [
    ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
    ("grpc.enable_retries", 0),  # ours below has a budget
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    # Connections live 10 s (the server's max_connection_age), then names are resolved again: a pod
    # that was added gets its share. The default of 30 s between resolutions would hold that up.
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Only a connection whose peer vanished without a word lives long enough to be pinged.
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.use_local_subchannel_pool", 1),
]


def _response() -> Any:
    """TorchServe's PredictionResponse by its field number (its inference.proto), so that no generated code needs to be
    kept."""
    file = descriptor_pb2.FileDescriptorProto(name="kennel/predictions.proto", package="kennel", syntax="proto3")
    kind = descriptor_pb2.FieldDescriptorProto
    response = file.message_type.add(name="PredictionResponse")
    response.field.add(name="prediction", number=1, type=kind.TYPE_BYTES, label=kind.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("kennel.PredictionResponse"))


Response = _response()


def encode(model: str, entries: Mapping[str, Value]) -> bytes:
    """TorchServe's PredictionsRequest: model_name = 1, map<string, bytes> input = 3.

    protobuf would copy the pixels three times, which leaves nothing else in the caches: 0.3 ms of CPU a picture
    (https://protobuf.dev/programming-guides/encoding: length-delimited records, an entry of a map is a message of its
    key, 1, and its value, 2).
    """
    parts = _record(1, model.encode())
    for key, value in entries.items():
        parts += _record(3, *_record(1, key.encode()), *_record(2, *(value if isinstance(value, list) else [value])))
    return b"".join(parts)


def _record(number: int, *parts: Bytes) -> list[Bytes]:
    head, size = [number << 3 | 2], sum(map(len, parts))
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    return [bytes([*head, size]), *parts]


class RetryBudget:
    """Retries may add at most a tenth to the calls, so that an outage is not made worse by them.

    The token bucket of gRPC's own retry throttling (gRFC A6): a call earns a tenth of a token, a
    retry costs one, ten are the most.
    """

    def __init__(self) -> None:
        self._tokens, self._lock = 10.0, threading.Lock()

    def earn(self) -> None:
        with self._lock:
            self._tokens = min(10.0, self._tokens + 0.1)

    def spend(self) -> bool:
        with self._lock:
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True


class Client:
    """Calls one model server address, which may stand for many servers."""

    def __init__(self, target: str, in_flight: int, on_retry: Callable[[], None] = lambda: None) -> None:
        """in_flight: calls at a time."""
        self._target, self._on_retry = target, on_retry
        self._free = threading.BoundedSemaphore(in_flight)
        self._budget = RetryBudget()
        self._lock = threading.Lock()
        self._call: Any = None

    def predictions(
        self,
        model: str,
        entries: Mapping[str, Value],
        deadline: float,
        request_id: str = "",
        seconds: float = math.inf,
    ) -> tuple[bytes, float]:
        """One Predictions call -> its answer's bytes, and the seconds that they took, without a try before.

        deadline: time.monotonic() at which the caller gives up; seconds: that it may take with its retry, until then.
        Raises Unavailable, Overloaded, TimedOut or BadAnswer.
        """
        if not self._free.acquire(blocking=False):
            raise Overloaded("more pictures are waiting for the model than may wait: try again soon")
        try:
            request = encode(model, entries)
            deadline = min(deadline, time.monotonic() + seconds)
            self._budget.earn()
            try:
                return self._once(request, deadline, request_id)
            except ConnectionLost:
                if deadline - time.monotonic() <= 0 or not self._budget.spend():
                    raise
                self._on_retry()
                self._reconnect(deadline)
                return self._once(request, deadline, request_id)
        finally:
            self._free.release()

    def _reconnect(self, deadline: float) -> None:
        """Until some server is connected, not long: where the lost one was the only one known, names are
        resolved again at once, and another may have come."""
        time.sleep(0.05)  # a connection takes a moment to be known as lost
        seconds = min(RECONNECT_SECONDS, deadline - time.monotonic())
        ready = grpc.channel_ready_future(self._channel)
        with contextlib.suppress(grpc.FutureTimeoutError):
            ready.result(seconds)
        ready.cancel()  # or a thread of its would watch the channel until it is connected, which may be never

    def _once(self, request: bytes, deadline: float, request_id: str) -> tuple[bytes, float]:
        started = time.monotonic()
        remaining = deadline - started
        if remaining <= 0:
            raise TimedOut(SLOW)
        try:
            response = self._connected()(request, timeout=remaining, metadata=(("x-request-id", request_id),))
        except grpc.RpcError as exc:
            code, details = exc.code(), exc.details() or ""
        else:
            return response.prediction, time.monotonic() - started
        # Here and without a name: with gRPC's error, or as a local, it would hold the request in a circle.
        raise problem(code, details)

    def _connected(self) -> Any:
        with self._lock:
            if self._call is None:
                self._channel = grpc.insecure_channel(self._target, options=CHANNEL_OPTIONS)
                self._call = self._channel.unary_unary(METHOD, None, Response.FromString)
            return self._call


class Split:
    """A share of the calls goes to another model server, a canary; where that fails, the main one answers."""

    def __init__(self, main: Client, canary: Client, share: float, on_failure: Callable[[], None]) -> None:
        self._main, self._canary, self._share, self._on_failure = main, canary, share, on_failure

    def predictions(self, *asked: Any) -> tuple[bytes, float]:
        """As Client.predictions, of the same arguments; `seconds` are for each of the two."""
        if random.random() < self._share:
            try:
                return self._canary.predictions(*asked)
            except Problem:
                self._on_failure()
        return self._main.predictions(*asked)


# What TorchServe's own messages mean: its status codes alone do not tell (InferenceImpl.java,
# ApiUtils.java, WorkerThread.java, BatchAggregator.java of 0.12).
_MESSAGES: list[tuple[str, Callable[[str], Problem]]] = [
    ("has no worker to serve", lambda _: Overloaded("the model server's queue is full: try again soon")),
    ("Model not found", lambda _: Unavailable("the model server does not have this model (yet): try again soon")),
    ("Worker died", lambda _: Unavailable("the model stopped while it was answering: try again soon")),
    ("Worker scaled down", lambda _: Unavailable("the model is being stopped: try again soon")),
    ("Prediction failed", lambda _: BadAnswer("the model failed on this batch of pictures")),
    ("InternalServerException", lambda text: BadAnswer(f"the model server failed: {text}")),
]

_LOST = "the model server cannot be reached: try again soon"
_CODES: dict[grpc.StatusCode, Callable[[str], Problem]] = {
    grpc.StatusCode.UNAVAILABLE: lambda _: ConnectionLost(_LOST),
    grpc.StatusCode.CANCELLED: lambda _: Unavailable(_LOST),  # by a server that ends
    grpc.StatusCode.DEADLINE_EXCEEDED: lambda _: TimedOut(SLOW),
    grpc.StatusCode.RESOURCE_EXHAUSTED: lambda text: (
        BadAnswer(f"the model server refuses the size of a message: {text}")
        if "larger than max" in text or "exceeds maximum" in text
        else Overloaded("the model server is overloaded: try again soon")
    ),
    grpc.StatusCode.UNAUTHENTICATED: lambda text: BadAnswer(
        f"the model server wants a token ({text}): set disable_token_authorization=true there"
    ),
}


def problem(code: grpc.StatusCode, details: str) -> Problem:
    """A gRPC status and its message -> our error. Codes without a meaning here become BadAnswer."""
    found = _meant(code, details)
    found.cause = f"{code.name}: {details}"
    return found


def _meant(code: grpc.StatusCode, details: str) -> Problem:
    for part, make in _MESSAGES:
        if part in details:
            return make(details)
    if code is grpc.StatusCode.INTERNAL and "RST_STREAM" in details:
        return ConnectionLost(_LOST)
    make = _CODES.get(code, lambda text: BadAnswer(f"the model server answered {code.name}: {text}"))
    return make(details)
