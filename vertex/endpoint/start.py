"""An online prediction container for Vertex AI: gateway and model server as one image, for who wants no cluster.

    AIP_STORAGE_URI=gs://bucket/bundles/mine python vertex/endpoint/start.py

https://cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements

    AIP_STORAGE_URI     the bundle's folder; empty: the one in the image
    AIP_HTTP_PORT       where it listens (8080)
    AIP_HEALTH_ROUTE    GET: 200 once a full round trip gave a right answer, 503 before (/health)
    AIP_PREDICT_ROUTE   POST {"instances": [{"b64": "..."}], "parameters": {"top_k": 5}} (/predict), answered
                        with {"predictions": [...]}; what is wrong with a request is said with status 400

A request may have 1.5 MB, on a dedicated endpoint 10 MB, so a picture a quarter less:
https://cloud.google.com/vertex-ai/docs/predictions/get-online-predictions. Other settings are those of both
programs, by their own names. SIGTERM: what was asked is answered, then it ends with 0; it ends with 1 where one of
the two programs ends by itself or the bundle is refused, so that it is started anew.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from local.processes import ROOT, both, environment, free_ports


@dataclass(frozen=True)
class Settings:
    """What Vertex AI says."""

    storage_uri: str
    http_port: int
    health_route: str
    predict_route: str

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "Settings":
        """From the AIP_ variables. Raises SystemExit for a port that is none; the gateway checks the routes."""
        port = environ.get("AIP_HTTP_PORT") or "8080"
        if not port.isdecimal() or not 0 < int(port) < 65536:
            raise SystemExit(f"AIP_HTTP_PORT={port!r} is no port: write 1 to 65535")
        health, predict = environ.get("AIP_HEALTH_ROUTE"), environ.get("AIP_PREDICT_ROUTE")
        uri = environ.get("AIP_STORAGE_URI", "").rstrip("/")
        return cls(uri, int(port), health or "/health", predict or "/predict")


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    settings = Settings.from_environment(os.environ)
    with tempfile.TemporaryDirectory(prefix="endpoint-") as scratch:
        uri = {"model_uri": settings.storage_uri} if settings.storage_uri else {}
        fetch = [sys.executable, "model-server/fetch.py"]
        if code := subprocess.run(fetch, cwd=ROOT, env=environment(model_store=scratch, **uri)).returncode:
            raise SystemExit(code)  # it has said why
        names = sorted(path.stem for path in Path(scratch).glob("*.mar"))
        with both(
            names,
            Path(scratch),
            settings.http_port,
            free_ports(1)[0],
            sys.stdout.buffer,
            host="0.0.0.0",
            health_route=settings.health_route,
            predict_route=settings.predict_route,
        ) as kennel:
            while kennel.gateway.poll() is None and kennel.model_server.poll() is None:
                time.sleep(0.5)
            raise SystemExit("start: one of the two programs ended by itself")


if __name__ == "__main__":
    main()
