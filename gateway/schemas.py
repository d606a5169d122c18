"""What goes in and out as JSON; /openapi.json is made from these."""

import functools
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from bundle.manifest import Manifest

TopK = Annotated[int, Field(ge=1, description="How many classes to list; the model's own number where left out.")]


class Strict(BaseModel):
    """Unknown keys and values of another type are refused, not guessed at."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ModelPath(BaseModel):
    name: str = Field(description="The model's name.")


class PredictQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="The model's name; the first one served where left out.")
    top_k: TopK | None = None

    @classmethod
    @functools.cache
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Made once: flask-openapi3 asks for it at every request, which costs more than all else that Flask does."""
        return super().model_json_schema(*args, **kwargs)


PICTURE_BODY = {
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"image": {"type": "string", "format": "binary"}},
                "required": ["image"],
            }
        },
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    }
}


class Instance(Strict):
    b64: str = Field(description="A picture file's bytes, base64.")


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Parameters(Strict):
    # Vertex AI's client sends protobuf's Struct, which has no integers, and null for what was left out.
    top_k: Annotated[TopK | None, BeforeValidator(_whole)] = None


class PredictRequest(Strict):
    """The form of TensorFlow Serving, KServe V1 and Vertex AI."""

    instances: list[Instance] = Field(min_length=1)
    parameters: Annotated[Parameters, BeforeValidator(lambda value: {} if value is None else value)] = Parameters()


class Score(BaseModel):
    label: str
    probability: float


class Prediction(BaseModel):
    label: str = Field(description='The most probable class, or "unknown" below the model\'s threshold.')
    probability: float = Field(description="Of the most probable class, calibrated.")
    known: bool = Field(description="Whether the probability reached the model's threshold.")
    top: list[Score] = Field(description="The most probable classes, in order.")
    model: str
    version: str
    digest: str = Field(description="Names the very bundle that answered.")


class PredictResponse(BaseModel):
    predictions: list[Prediction]


class ModelInfo(BaseModel):
    name: str
    ready: bool = Field(description="Whether a server of this model answers right now.")
    version: str | None = None
    digest: str | None = None
    classes: list[str] | None = None
    threshold: float | None = None
    metrics: dict[str, Any] | None = None
    licence: str | None = None


class ModelList(BaseModel):
    models: list[ModelInfo] = Field(description="The first one is the default.")


class ProblemDetails(BaseModel):
    """RFC 9457, application/problem+json."""

    type: str
    title: str
    status: int
    detail: str = Field(description="What was wrong, and what would be right.")
    request_id: str


def decide(manifest: Manifest, logits: NDArray[np.float32], top_k: int | None = None) -> Prediction:
    """Logits float32 [C] -> calibrated probabilities, the best `top_k`, and whether to call it known."""
    decision = manifest.decision
    scaled = logits.astype(np.float64) / decision.temperature
    weights = np.exp(scaled - scaled.max())
    probabilities = weights / weights.sum()
    order = np.argsort(-probabilities, kind="stable")[: min(top_k or decision.top_k, len(logits))]
    top = [Score(label=manifest.classes[i], probability=float(probabilities[i])) for i in order]
    known = top[0].probability >= decision.threshold
    return Prediction(
        label=top[0].label if known else "unknown",
        probability=top[0].probability,
        known=known,
        top=top,
        model=manifest.name,
        version=manifest.version,
        digest=manifest.digest,
    )


def describe(manifest: Manifest) -> ModelInfo:
    return ModelInfo(
        name=manifest.name,
        ready=True,
        version=manifest.version,
        digest=manifest.digest,
        classes=list(manifest.classes),
        threshold=manifest.decision.threshold,
        metrics=dict(manifest.metrics),
        licence=manifest.licence,
    )
