"""PRECISION=bf16 through a real TorchServe on a CPU with AMX: the same names, and almost the same probabilities."""

import numpy as np
import pytest
import requests

from bundle.cpus import features
from local import processes, run


@pytest.mark.skipif("amx_bf16" not in features(), reason="this CPU has no AMX")
def test_callers_get_almost_what_float32_gives(gateway, bundle, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("PRECISION", "bf16")
    port, grpc_port = processes.free_ports(2)
    with (tmp_path / "log").open("wb") as log, run.running([bundle], port, grpc_port, log) as running:
        both = [
            [requests.post(f"{url}/predict?top_k=119", data=data, timeout=30).json()["top"] for data, _ in photos[:12]]
            for url in (gateway.url, running.url)
        ]
    exact, found = (
        np.array([[score["probability"] for score in sorted(top, key=lambda score: score["label"])] for top in tops])
        for tops in both
    )
    assert 0 < np.abs(found - exact).max() < 0.1
    assert (found.argmax(1) == exact.argmax(1)).all()
