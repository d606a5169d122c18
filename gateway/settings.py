"""The gateway's settings: one frozen dataclass, from the environment by these names in capitals."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from bundle.cpus import whole_cpus
from bundle.picture import MAX_PIXELS
from gateway.admission import BURST, OTHERS

_PARSE: dict[Any, Callable[[str], Any]] = {
    str: str,
    int: int,
    float: float,
    tuple[str, ...]: lambda text: tuple(name.strip() for name in text.split(",") if name.strip()),
}


@dataclass(frozen=True)
class Settings:
    models: tuple[str, ...]  # names, comma separated; the first is the default
    model_server: str = "dns:///127.0.0.1:7070"  # a gRPC target; every address behind it gets its share
    host: str = "0.0.0.0"
    port: int = 8080
    # 0: one for every two CPUs. Decoding, most of the work, needs no interpreter lock; and what one process has under
    # way shares calls to the model server, which two processes would not.
    processes: int = 0
    threads: int = 0  # a process; 0: as many as pictures may be in at a time, and some that come and go
    in_flight: int = 48  # pictures a process takes at a time, in a burst twice as many; more are refused at once
    late_seconds: float = 0.6  # answers later than that: fewer pictures at a time are taken, see gateway/admission.py
    deadline_seconds: float = 5.0  # from a request's arrival to its answer
    # One call to the model server, waiting there included. TorchServe queues calls without a word while
    # its workers load; who waits longer than this is told to come back. As the model server's.
    model_seconds: float = 1.5
    max_bytes: int = 32 << 20  # of a request body
    max_pixels: int = MAX_PIXELS
    max_instances: int = 32  # pictures in one request
    grace_seconds: float = 25.0  # between SIGTERM and the end of unfinished requests
    canary: str = ""  # a second model server's gRPC target, for canary_share of the calls
    canary_share: float = 0.0  # 0 to 1
    api_keys_file: str = ""  # one key a line; predictions and models are then for those who send one
    rate: str = ""  # requests of one client, like 60/minute
    proxies: int = 0  # in front of the gateway, which name the client in X-Forwarded-For
    # Paths of another platform's for /readyz and for the JSON form of a prediction, of the default model.
    health_route: str = ""
    predict_route: str = ""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> "Settings":
        """Raises SystemExit naming the key, its value and the type that would be right."""
        values: dict[str, object] = {}
        for field in fields(cls):
            key = field.name.upper()
            if key in environ:
                try:
                    values[field.name] = _PARSE[field.type](environ[key])
                except ValueError:
                    raise SystemExit(f"{key}={environ[key]!r} is not of type {field.type}") from None
        if not values.get("models"):
            raise SystemExit("MODELS is not set: the names of the models to serve, separated by commas")
        share = values.get("canary_share", 0.0)
        if not 0 <= float(str(share)) <= 1:
            raise SystemExit(f"CANARY_SHARE={share!r} is no share: write 0 to 1")
        for key in ("health_route", "predict_route"):
            route = str(values.get(key, ""))
            if route and (not route.startswith("/") or set(route) & set("<>?#")):
                raise SystemExit(f"{key.upper()}={route!r} is no path: write it like /predict")
        return cls(**values)  # type: ignore[arg-type]  # each parsed to its field's own type

    @property
    def worker_threads(self) -> int:
        return self.threads or int(self.in_flight * (1 + BURST + OTHERS)) + 8  # all that gateway/admission.py lets in

    @property
    def worker_processes(self) -> int:
        return self.processes_on(whole_cpus())

    def processes_on(self, cpus: int) -> int:
        """Worker processes of a gateway that has so many CPUs."""
        return self.processes or (cpus + 1) // 2
