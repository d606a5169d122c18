"""A replica as if it had been measured: a queue whose figures are known."""

import numpy as np

from capacity.measured import LEVELS, Measured, Replica, Step

WHERE = {
    "date": "2026-11-25T19:00:00+00:00",
    "commit": "0123456789ab",
    "machine": {
        "cpu": "A <fast> one",
        "cpus": 2,
        "flags": "avx2",
        "memory_gb": 24,
        "system": "Linux 6",
        "python": "3.11.7",
    },
    "versions": {"onnxruntime": "1.31.1"},
    "bundle": {"name": "dog-breeds", "version": "lite0", "digest": "ab" * 32},
}


def step(rate: float, saturated: float, base_ms: float) -> Step:
    """Latency as of an M/M/1 queue with a base: exponential, of mean base/2 * load/(1 - load) beyond it."""
    load = rate / saturated
    quantiles = base_ms - np.log(1 - LEVELS) * base_ms / 2 * load / (1 - load)
    cores = 0.02 + 0.98 * load
    return Step(rate, 8, int(8 * rate), *(float(np.quantile(quantiles, s)) for s in (0.5, 0.99)), 0, 0, True, cores,
                1e3 * cores / rate, 300, 0.3, 0, tuple(quantiles.tolist()))  # fmt: skip


def replica(name: str, saturated: float, base_ms: float, start: float) -> Replica:
    steps = tuple(step(load * saturated, saturated, base_ms) for load in (0.25, 0.5, 0.7, 0.8, 0.9, 0.95))
    return Replica(name, 1, 0.9 * saturated, saturated, 1.0, 0.02, start, 0.9, 300.0, steps)


GATEWAY, MODEL_SERVER = replica("gateway", 220, 8, 1.6), replica("model-server", 140, 14, 2.7)
MEASURED = Measured(300.0, WHERE, (GATEWAY, MODEL_SERVER))
