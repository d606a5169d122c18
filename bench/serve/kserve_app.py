"""KServe: a custom model behind the V1 protocol, a process a CPU."""

import base64
from functools import cached_property
from typing import Any

import kserve

from bench.serve import model


class Service(kserve.Model):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.ready = True

    @cached_property
    def classifier(self) -> model.Classifier:
        """Loaded by each process with its first call: KServe sends models to its processes by pickle, which sessions
        do not survive, and kills a process that takes more than 5 s to unpickle."""
        return model.Classifier()

    def preprocess(self, payload: dict[str, Any], headers: Any = None) -> Any:
        return [self.classifier.decode(base64.b64decode(item["image"]["b64"])) for item in payload["instances"]]

    def predict(self, pixels: Any, headers: Any = None) -> dict[str, Any]:
        return {"predictions": [self.classifier.decide(self.classifier.run(item[None])[0]) for item in pixels]}


if __name__ == "__main__":
    kserve.ModelServer(
        http_port=model.port(), workers=model.workers(), enable_grpc=False, enable_latency_logging=False
    ).start([Service("bench")])
