"""Ray Serve: a replica a CPU, the picture as the body."""

import time
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

from bench.serve import model


@serve.deployment(num_replicas=model.workers(), ray_actor_options={"num_cpus": 1})
class Service:
    def __init__(self) -> None:
        self.model = model.Classifier()

    async def __call__(self, request: Request) -> dict[str, Any]:
        return self.model(await request.body())


if __name__ == "__main__":
    ray.init(num_cpus=model.workers() + 1, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": model.port()})
    serve.run(Service.bind(), route_prefix="/predict")
    while True:
        time.sleep(1)
