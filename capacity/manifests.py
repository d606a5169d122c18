"""What the rendered manifests say of the two tiers: requests, limits, probes, and how they scale."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from capacity.hpa import DOWN, UP, Policy, Rules, Scaling
from local.processes import ROOT

TIERS = ("gateway", "model-server")
UNITS = {"m": 1e-3, "": 1.0, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "k": 1e3, "M": 1e6, "G": 1e9}
Object = dict[str, Any]


@dataclass(frozen=True)
class Tier:
    """One Deployment and its HPA. CPU in CPUs, memory in bytes, times in seconds.

    request: what the HPA's percent are of, the pod's or the container's; probe: seconds between looks at readiness;
    leaves: from the end of its traffic to its SIGTERM; settings: its main container's environment.
    """

    name: str
    request: float
    memory_request: float
    limit: float
    memory_limit: float
    probe: float
    leaves: float
    settings: Mapping[str, str]
    scaling: Scaling
    container: str = ""  # that the HPA looks at; "": the whole pod

    @property
    def target(self) -> float:
        """CPUs of a pod's that its HPA aims at."""
        return self.scaling.utilization * self.request / 100 or self.scaling.value / 1e3


def render(folder: Path, components: Sequence[Path] = ()) -> list[Object]:
    """The objects of a kustomization, with components on top. Raises SystemExit that says what kustomize said."""
    with tempfile.TemporaryDirectory(prefix="kennel-") as scratch:
        place = Path(scratch).resolve()
        inside = {
            "resources": [os.path.relpath(folder.resolve(), place)],
            "components": [os.path.relpath(component.resolve(), place) for component in components],
        }
        (place / "kustomization.yaml").write_text(yaml.safe_dump(inside))
        if shutil.which("kubectl"):
            command = ["kubectl", "kustomize", str(place)]
        elif shutil.which("kustomize"):
            command = ["kustomize", "build", str(place)]
        else:
            raise SystemExit(
                "neither kubectl nor kustomize is there, which render k8s/: https://kubernetes.io/docs/tasks/tools/"
            )
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{folder} cannot be rendered: {done.stderr.strip()}")
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def read(objects: Sequence[Object]) -> tuple[Tier, ...]:
    """The gateway and the model server. Raises SystemExit where one is missing or scales by something else than CPU."""
    return tuple(_tier(objects, name) for name in TIERS)


def _tier(objects: Sequence[Object], name: str) -> Tier:
    deployment, hpa = (_find(objects, kind, name) for kind in ("Deployment", "HorizontalPodAutoscaler"))
    pod = deployment["spec"]["template"]["spec"]
    main = pod["containers"][0]
    settings: dict[str, str] = {}
    for source in main.get("envFrom", []):
        settings |= _find(objects, "ConfigMap", source["configMapRef"]["name"])["data"]
    settings |= {one["name"]: one.get("value", "") for one in main.get("env", [])}
    spec = hpa["spec"]
    metric = spec["metrics"][0]
    kind = metric["type"]
    asked = {"Resource": metric.get("resource"), "ContainerResource": metric.get("containerResource")}.get(kind)
    if len(spec["metrics"]) != 1 or not asked or asked["name"] != "cpu":
        raise SystemExit(f"HorizontalPodAutoscaler {name} scales by {kind}: only CPU is simulated, leave hpa-queue out")
    container = asked.get("container", "")
    wanted = [one for one in pod["containers"] if container in ("", one["name"])]
    target, behavior = asked["target"], spec.get("behavior", {})
    return Tier(
        name,
        sum(amount(one["resources"]["requests"]["cpu"]) for one in wanted),
        sum(amount(one["resources"]["requests"]["memory"]) for one in pod["containers"]),
        amount(main["resources"]["limits"]["cpu"]),
        amount(main["resources"]["limits"]["memory"]),
        main["readinessProbe"].get("periodSeconds", 10),
        main.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0),
        settings,
        Scaling(
            name,
            spec.get("minReplicas", 1),
            spec["maxReplicas"],
            target.get("averageUtilization", 0),
            round(1000 * amount(target["averageValue"])) if "averageValue" in target else 0,
            _rules(behavior.get("scaleUp"), UP),
            _rules(behavior.get("scaleDown"), DOWN),
        ),
        container,
    )


def _find(objects: Sequence[Object], kind: str, name: str) -> Object:
    for one in objects:
        if one["kind"] == kind and one["metadata"]["name"] == name:
            return one
    raise SystemExit(f"the manifests have no {kind} {name}")


def _rules(told: Object | None, default: Rules) -> Rules:
    told = told or {}
    policies = tuple(Policy(p["type"], p["value"], p["periodSeconds"]) for p in told.get("policies", []))
    return Rules(
        told.get("stabilizationWindowSeconds", default.window),
        policies or default.policies,
        told.get("selectPolicy", default.select),
        amount(str(told["tolerance"])) if "tolerance" in told else None,
    )


def amount(text: str | int | float) -> float:
    """Kubernetes' quantity: "200m" is 0.2, "1Gi" is 2**30."""
    found = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(text))
    if not found or found[2] not in UNITS:
        raise SystemExit(f"{text!r} is no quantity of Kubernetes: write it like 200m, 1.5 or 512Mi")
    return float(found[1]) * UNITS[found[2]]


BASE = ROOT / "k8s" / "base"
COMPONENT = ROOT / "k8s" / "components" / "calibrated"
