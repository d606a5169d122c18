"""The kustomize component that says what was measured: requests, limits, targets."""

import math
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from capacity.manifests import Tier
from capacity.measured import NAME, Measured, Replica

REQUEST, LIMIT = 1.25, 1.5  # times the highest memory that was measured
MIB = 2**20
KUSTOMIZATION = "kustomization.yaml"


def check(folder: Path) -> None:
    """Raises SystemExit for a folder that holds something else."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not (folder / NAME).exists():
        raise SystemExit(f"calibrate: {folder} holds something that `make calibrate` did not write: name another --out")


def write(folder: Path, measured: Measured, tiers: Sequence[Tier], targets: Mapping[str, int]) -> None:
    """kustomization.yaml and measured.json, in place of what was there."""
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    (new / NAME).write_text(measured.to_json(targets=dict(targets)))
    (new / KUSTOMIZATION).write_text(text(measured, tiers, targets))
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def text(measured: Measured, tiers: Sequence[Tier], targets: Mapping[str, int]) -> str:
    """The component. List it after one that scales by something else, like hpa-queue, or leave that out."""
    where, machine = measured.where, measured.where["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [
        f"# What one replica carries, as `make calibrate` measured it on {where['date']}, commit {where['commit']}:",
        f"# 99% of the answers within {measured.objective_ms:g} ms, none refused, Poisson arrivals, each tier alone.",
        f"# {machine['cpu']}, {machine['cpus']} CPUs ({machine['flags']}), {machine['system']},",
        f"# Python {machine['python']}, {versions};",
        f"# bundle {where['bundle']['name']} {where['bundle']['version']} {where['bundle']['digest'][:12]}.",
        "# On another processor or with another bundle these are other figures. Every step is in measured.json.",
        "# Percent are of these requests: an overlay with requests of its own, as kind's, overrules only them.",
        "apiVersion: kustomize.config.k8s.io/v1alpha1",
        "kind: Component",
        "patches:",
    ]
    for tier in tiers:
        replica = measured.replica(tier.name)
        lines += _deployment(tier, replica) + _scaler(tier, replica, targets[tier.name])
    return "\n".join(lines) + "\n"


def memory(tier: Tier, replica: Replica) -> tuple[int, int]:
    """Request and limit in MiB. A limit never falls below base's: that one is set by the largest picture and by what
    the JVM may come to, tests/images/test_memory.py, which minutes of photographs do not show."""
    peak = replica.memory_mb * 1e6
    limit = max(_round(LIMIT * peak), int(tier.memory_limit / MIB))
    return min(_round(REQUEST * peak), limit), limit


def _cpu_ms(replica: Replica) -> float:
    return 1e3 * replica.cores(replica.capacity) / replica.capacity


def _round(number: float) -> int:
    return 32 * math.ceil(number / MIB / 32)


def _deployment(tier: Tier, replica: Replica) -> list[str]:
    request, limit = memory(tier, replica)
    # A canary's model server bears the same label.
    target = "name: gateway" if tier.name == "gateway" else f"labelSelector: app.kubernetes.io/component={tier.name}"
    told = (
        f"{tier.name}: {replica.capacity:.0f} images/s on {replica.cpus} CPU(s), {replica.saturated:.0f} however late; "
        f"{_cpu_ms(replica):.1f} CPU ms an image; ready {replica.start_seconds:.1f} s after its start. Memory: "
        f"{replica.memory_mb:.0f} MB at most; {REQUEST:g} times that is the request, {LIMIT:g} times the limit, "
        "which is never below base's."
    )
    return [
        *textwrap.wrap(told, 118, initial_indent="  # ", subsequent_indent="  # "),
        f"  - target: {{kind: Deployment, {target}}}",
        "    patch: |",
        "      apiVersion: apps/v1",
        "      kind: Deployment",
        "      metadata: {name: any}",
        "      spec:",
        "        template:",
        "          spec:",
        "            containers:",
        f"              - name: {tier.name}",
        "                resources:",
        f'                  requests: {{cpu: "{replica.cpus}", memory: {request}Mi}}',
        f'                  limits: {{cpu: "{replica.cpus}", memory: {limit}Mi}}',
    ]


def _scaler(tier: Tier, replica: Replica, percent: int) -> list[str]:
    used = 100 * replica.cores(replica.capacity) / replica.cpus
    resource = "containerResource" if tier.container else "resource"
    container = [f"              container: {tier.container}"] if tier.container else []
    return [
        f"  # {used:.0f}% of its CPU at capacity, less what lets load double in five minutes while replicas start",
        "  # (capacity/headroom.py).",
        f"  - target: {{kind: HorizontalPodAutoscaler, name: {tier.name}}}",
        "    patch: |",
        "      - op: replace",
        "        path: /spec/metrics",
        "        value:",
        f"          - type: {resource[0].upper()}{resource[1:]}",
        f"            {resource}:",
        "              name: cpu",
        *container,
        f"              target: {{type: Utilization, averageUtilization: {percent}}}",
    ]


def summary(measured: Measured, tiers: Sequence[Tier], targets: Mapping[str, int]) -> str:
    """A table for the terminal."""
    heads = f"{'images/s':>9} {'CPU ms':>7} {'ready, s':>9} {'memory, MB':>11} {'request, limit, Mi':>19} {'target':>7}"
    lines = [f"{'':14} {heads}"]
    for tier in tiers:
        replica = measured.replica(tier.name)
        mib = ", ".join(map(str, memory(tier, replica)))
        lines.append(
            f"{tier.name:14} {replica.capacity:9.0f} {_cpu_ms(replica):7.1f} {replica.start_seconds:9.1f} "
            f"{replica.memory_mb:11.0f} {mib:>19} {targets[tier.name]:6}%"
        )
    return "\n".join(lines)
