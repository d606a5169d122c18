"""Mosec: one stage that reads the raw body, a worker a CPU."""

from typing import Any

import mosec

from bench.serve import model


class Service(mosec.Worker):
    def __init__(self) -> None:
        self.model = model.Classifier()

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: bytes) -> dict[str, Any]:
        return self.model(data)


if __name__ == "__main__":
    server = mosec.Server()
    server.append_worker(Service, num=model.workers())
    server.run()
