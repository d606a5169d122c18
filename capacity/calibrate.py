"""What one replica of each tier carries under a latency objective: `make calibrate`.

Each tier alone, on the CPUs of one replica, by affinity, which it honours as it does a container's limit
(bundle/cpus.py); the load, and whatever else the tier needs, on the others. The model server is called with
pixels by the gateway's own code, the gateway over HTTP with photographs, before a model server of the same input and
classes whose graph is nearly empty, so that the gateway is the first to be busy. Arrivals are Poisson, each on a
connection of its own; the highest rate at which all are answered and 99% within the objective is found by bisection
and confirmed by a longer run. The result is a kustomize component: requests, limits and the HPAs' targets for base,
with what was measured beside it.

A container's limit is a quota of time and not a CPU of its own: where several processes are busy at once it stops
them all for the rest of a tenth of a second. Here they share one CPU, which makes the same work a little smoother.
"""

import argparse
import datetime
import importlib.metadata
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.prepare import identity, photographs
from bundle import manifest
from bundle.manifest import BundleError
from capacity import component, headroom, manifests
from capacity.measured import Measured, Replica
from capacity.replica import CLIENTS, OTHERS, Bench
from capacity.stand import LOG, Split, gateway, light, model_server, split
from local.run import find

OBJECTIVE_MS = 300.0
WARM_UP, SATURATE = 8.0, 6.0  # seconds of clients who never pause; a JVM takes a thousand calls to become fast
CONFIRM = 20.0  # seconds of the last step
LOW, FIRST, PRECISION = 0.25, 0.7, 0.05  # shares of what saturates


def search(bench: Bench) -> Replica:
    """Warm up, saturate, bisect, confirm. Raises SystemExit where even little load is answered too late."""
    bench.idle()
    bench.saturate(WARM_UP)
    saturated, cores = bench.saturate(SATURATE)
    print(f"  {saturated:6.1f} images/s to {CLIENTS} clients who never pause", flush=True)
    if not bench.step(LOW * saturated).passed:
        raise SystemExit(
            f"calibrate: even {LOW * saturated:.0f} images/s, a quarter of what the {bench.name} answers at its best, "
            f"miss the objective of {bench.objective_ms:g} ms: set a higher one, or find a quiet machine"
        )
    low, high, share = LOW, 1.0 + PRECISION, FIRST
    while high - low > PRECISION:
        if bench.step(share * saturated).passed:
            low = share
        else:
            high = share
        share = (low + high) / 2
    while not bench.step(low * saturated, CONFIRM).passed:
        low -= PRECISION  # what passed for eight seconds did not for twenty
        if low < LOW:
            raise SystemExit(f"calibrate: no rate passed a longer run of the {bench.name}: find a quiet machine")
    last = bench.steps[-1]
    return Replica(
        name=bench.name,
        cpus=len(bench.cpus),
        capacity=last.rate,
        saturated=max(saturated, last.rate),
        saturated_cores=max(cores, last.cores),
        idle_cores=bench.idle_cores,
        start_seconds=bench.start_seconds,
        start_cores=bench.start_cores,
        memory_mb=bench.peak_mb,
        steps=tuple(bench.steps),
    )


def measure(bundle: Path, objective_ms: float, cpus: Split, data: Path | None) -> tuple[Replica, ...]:
    """Both tiers, each alone."""
    name, found = manifest.read(bundle).name, {}
    with LOG.open("wb") as output, tempfile.TemporaryDirectory(prefix="calibrate-") as scratch:
        own, load = cpus["model-server"]
        print(f"model server on CPU {_list(own)}, load from CPU {_list(load)}", flush=True)
        with model_server(bundle, own, output) as (process, target, seconds):
            call = ["--grpc", target, "--bundle", str(bundle)]
            bench = Bench("model-server", process, call, own, load, seconds, objective_ms)
            found["model-server"] = search(bench)
        light(bundle, other := Path(scratch) / "light")
        own, load = cpus["gateway"]
        print(f"gateway on CPU {_list(own)}, load and a model server of one pixel on CPU {_list(load)}", flush=True)
        with (
            model_server(other, load, output) as (_, target, _),
            gateway(name, target, own, output) as (process, url, seconds),
        ):
            call = ["--http", f"{url}/predict", "--bodies", *map(str, photographs(data)["small"])]
            bench = Bench("gateway", process, call, own, load, seconds, objective_ms)
            found["gateway"] = search(bench)
    return tuple(found[name] for name in manifests.TIERS)


def _list(cpus: Sequence[int]) -> str:
    return ", ".join(map(str, cpus))


def where(bundle: Path) -> dict[str, Any]:
    """Machine, versions, date, commit, bundle."""
    told, real = identity([], {}, False, None), manifest.read(bundle)
    runtime = "openvino" if os.environ.get("PRECISION") == "bf16" else "onnxruntime"
    versions = ("torchserve", runtime, "flask", "gunicorn", "grpcio", "pillow")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": told["commit"],
        "machine": told["machine"],
        "versions": {name: importlib.metadata.version(name) for name in versions},
        "bundle": {"name": real.name, "version": real.version, "digest": real.digest},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="make calibrate", description=__doc__)
    parser.add_argument("--model", default="dog-breeds", help="a bundle's name under build/bundles, or its path")
    parser.add_argument("--objective", type=float, default=OBJECTIVE_MS, help="ms within which 99%% are answered")
    parser.add_argument("--cpus", type=int, help="of one replica of either tier; base's limits by default")
    parser.add_argument("--data", type=Path, help="a folder of photographs; drawings where there is none")
    parser.add_argument("--out", type=Path, default=manifests.COMPONENT, help="the component's folder")
    args = parser.parse_args(arguments)
    base = manifests.read(manifests.render(manifests.BASE))
    cpus = split({tier.name: tier.limit for tier in base}, args.cpus)
    component.check(args.out)
    try:
        bundle = find(args.model)
    except BundleError as exc:
        raise SystemExit(f"calibrate: {exc}") from exc
    began = time.monotonic()
    LOG.parent.mkdir(exist_ok=True)
    replicas = measure(bundle, args.objective, cpus, args.data)
    measured = Measured(args.objective, where(bundle), replicas)
    targets = headroom.targets(base, measured)
    component.write(args.out, measured, base, targets)
    print(component.summary(measured, base, targets))
    noisy = max(step.others for replica in replicas for step in replica.steps)
    if noisy > OTHERS:
        print(f"Others took up to {noisy:.2f} CPUs of a replica's meanwhile: measure again on a quiet machine.")
    print(f"{args.out}: to be listed among an overlay's components ({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()
