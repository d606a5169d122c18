"""Flask under gunicorn's default worker, a process a CPU."""

from typing import Any

from flask import Flask, request

from bench.serve.model import Classifier

app = Flask(__name__)
classify = Classifier()


@app.post("/predict")
def predict() -> dict[str, Any]:
    return classify(request.get_data())
