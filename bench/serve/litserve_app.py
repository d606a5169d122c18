"""LitServe: decode_request in the server's workers, JSON with the picture as base64, a worker a CPU."""

import base64
from typing import Any

import litserve

from bench.serve import model


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.model = model.Classifier()

    def decode_request(self, request: dict[str, str]) -> Any:
        return self.model.decode(base64.b64decode(request["image"]))

    def predict(self, pixels: Any) -> Any:
        return self.model.run(pixels[None])[0]

    def encode_response(self, logits: Any) -> dict[str, Any]:
        return self.model.decide(logits)


if __name__ == "__main__":
    server = litserve.LitServer(Api(), accelerator="cpu", workers_per_device=model.workers())
    server.run(host="127.0.0.1", port=model.port(), generate_client_file=False, log_level="warning")
