"""Kubernetes manifests as the tests see them: every combination of components, rendered."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
K8S = ROOT / "k8s"
COMPONENTS = sorted(path.parent.name for path in K8S.glob("components/*/kustomization.yaml"))
OVERLAYS = sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml"))
VERSION = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
# What `make gke-deploy` writes in place of ${...}: k8s/gke.env's settings and the pushed images' tags.
GKE = {
    "REGION": "europe-west1",
    "PROJECT": "a-project",
    "REPOSITORY": "kennel",
    "CLUSTER": "kennel",
    "DOMAIN": "kennel.example.org",
    "MODELS": "dog-breeds",
    "MODEL_URI": "gs://a-bucket/bundles/dog-breeds#sha256=" + 64 * "0",
    "GATEWAY_TAG": VERSION,
    "MODEL_SERVER_TAG": VERSION,
}
Object = dict[str, Any]


@dataclass(frozen=True)
class Combination:
    """Components listed in base's place (k8s/kustomization.yaml) or in an overlay."""

    overlay: str = ""
    components: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " + ".join([self.overlay or "base", *self.components])


def every_combination() -> list[Combination]:
    """On base every subset of the components that change objects. On overlays, and of the components that only
    add some, all at once, each and every pair: to disagree takes two."""
    changing = [name for name in COMPONENTS if _changes(name)]
    found = [Combination("", some) for n in range(len(changing) + 1) for some in combinations(changing, n)]
    for overlay in ["", *OVERLAYS]:
        others = [name for name in COMPONENTS if name not in _listed(overlay)]
        found += [Combination(overlay, some) for n in (0, 1, 2, len(others)) for some in combinations(others, n)]
    return list(dict.fromkeys(found))


def _changes(component: str) -> bool:
    kustomization = yaml.safe_load((K8S / "components" / component / "kustomization.yaml").read_text())
    merges = any("behavior" in one for one in kustomization.get("configMapGenerator", []))
    return merges or bool(kustomization.keys() - {"apiVersion", "kind", "resources", "configMapGenerator"})


def _listed(overlay: str) -> set[str]:
    """The components that an overlay has by itself."""
    text = (K8S / "overlays" / overlay / "kustomization.yaml").read_text() if overlay else "{}"
    return {Path(path).name for path in yaml.safe_load(text).get("components", [])}


def kustomize(folder: Path) -> str:
    environment = os.environ | {"GOGC": "400"}  # a fifth of the time was its garbage collector's
    command = ["kubectl", "kustomize", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"kubectl kustomize {folder}: {done.stderr}"
    return done.stdout


class Tree:
    """A copy of k8s/ to write combinations into: kustomize takes no paths from outside."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(K8S, folder / "k8s")

    def add(self, wanted: Combination, name: str, namespace: str = "") -> Path:
        """A folder that kustomize renders as the combination."""
        folder, components = (
            self.folder / "k8s" / "overlays" / name,
            [f"../../components/{c}" for c in wanted.components],
        )
        if wanted.overlay:
            shutil.copytree(K8S / "overlays" / wanted.overlay, folder)
            values = GKE | ({"MODEL_SERVER_TAG": f"{VERSION}-cuda"} if "gpu-l4" in wanted.components else {})
            for path in folder.iterdir():
                path.write_text(re.sub(r"\$\{(\w+)\}", lambda found: values[found[1]], path.read_text()))
            kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
        else:
            folder.mkdir()
            kustomization = {"resources": ["../../base"]}
        kustomization["components"] = components + kustomization.get("components", [])
        kustomization |= {"namespace": namespace} if namespace else {}
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return folder


def render(tree: Tree, wanted: Combination) -> "Rendered":
    return Rendered(
        str(wanted), [parse(text) for text in kustomize(tree.add(wanted, f"one-{wanted}")).split("\n---\n")]
    )


def render_all(tree: Tree, wanted: Sequence[Combination]) -> Iterator["Rendered"]:
    """Sixteen a process, told apart by a namespace each: starting kustomize takes longer than its work."""

    def some(numbered: Sequence[tuple[int, Combination]]) -> list[Rendered]:
        batch = tree.folder / f"batch-{numbered[0][0]}"
        batch.mkdir()
        folders = [tree.add(one, f"n{i}", f"namespace-{i}-") for i, one in numbered]
        resources = [f"../k8s/overlays/{folder.name}" for folder in folders]
        (batch / "kustomization.yaml").write_text(yaml.safe_dump({"resources": resources}))
        found: dict[int, list[Object]] = {i: [] for i, _ in numbered}
        for text in kustomize(batch).split("\n---\n"):
            (i,) = set(re.findall(r"\bnamespace-(\d+)-", text))
            found[int(i)].append(parse(text.replace(f"namespace-{i}-", "kennel")))
        return [Rendered(str(one), found[i]) for i, one in numbered]

    numbered = list(enumerate(wanted))
    with ThreadPoolExecutor(2) as threads:
        for rendered in threads.map(some, [numbered[i : i + 16] for i in range(0, len(numbered), 16)]):
            yield from rendered


@cache
def parse(text: str) -> Object:
    """Most objects are the same in most combinations: parsed once, and never to be changed."""
    document: Object = yaml.load(text, yaml.CSafeLoader)
    return document


@dataclass(frozen=True)
class Rendered:
    name: str
    objects: list[Object]

    def kind(self, *kinds: str) -> list[Object]:
        return [one for one in self.objects if one["kind"] in kinds]

    def get(self, kind: str, name: str) -> Object | None:
        return next((one for one in self.kind(kind) if one["metadata"]["name"] == name), None)

    @cached_property
    def deployments(self) -> list[Object]:
        return self.kind("Deployment")

    def settings(self, container: Object) -> dict[str, str]:
        """Its environment, as far as the manifests say it."""
        values = {}
        for source in container.get("envFrom", []):
            config = self.get("ConfigMap", source["configMapRef"]["name"])
            values |= config["data"] if config else {}
        return values | {one["name"]: one.get("value", "") for one in container.get("env", [])}


def pod(deployment: Object) -> Object:
    spec: Object = deployment["spec"]["template"]["spec"]
    return spec


def labels(deployment: Object) -> dict[str, str]:
    found: dict[str, str] = deployment["spec"]["template"]["metadata"]["labels"]
    return found


def selects(selector: Object | None, labels: dict[str, str]) -> bool:
    """Whether a LabelSelector does; an absent one selects nothing, an empty one everything."""
    if selector is None:
        return False
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for expression in selector.get("matchExpressions", []):
        key, operator, values = expression["key"], expression["operator"], expression.get("values", [])
        holds = {
            "In": labels.get(key) in values,
            "NotIn": labels.get(key) not in values,
            "Exists": key in labels,
            "DoesNotExist": key not in labels,
        }
        if not holds[operator]:
            return False
    return True
