"""BentoML: the picture as the whole body (root input), a worker a CPU."""

from pathlib import Path
from typing import Annotated, Any

import bentoml
from bentoml.validators import ContentType

from bench.serve import model


@bentoml.service(workers=model.workers(), traffic={"timeout": 60})
class Service:
    def __init__(self) -> None:
        self.model = model.Classifier()

    @bentoml.api
    def predict(self, image: Annotated[Path, ContentType("image/*")], /) -> dict[str, Any]:
        return self.model(image.read_bytes())
