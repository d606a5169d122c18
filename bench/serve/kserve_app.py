"""KServe: a custom model behind the V1 protocol, a process a CPU."""

import base64
from typing import Any

import kserve

from bench.serve import model


class Service(kserve.Model):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.model = model.Classifier()
        self.ready = True

    def __reduce__(self) -> Any:
        """KServe pickles models for its processes; sessions cannot be, so each process loads its own."""
        return Service, (self.name,)

    def preprocess(self, payload: dict[str, Any], headers: Any = None) -> Any:
        return [self.model.decode(base64.b64decode(item["image"]["b64"])) for item in payload["instances"]]

    def predict(self, pixels: Any, headers: Any = None) -> dict[str, Any]:
        return {"predictions": [self.model.decide(self.model.run(item[None])[0]) for item in pixels]}


if __name__ == "__main__":
    kserve.ModelServer(
        http_port=model.port(), workers=model.workers(), enable_grpc=False, enable_latency_logging=False
    ).start([Service("bench")])
