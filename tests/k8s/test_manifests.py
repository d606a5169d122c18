"""The manifests, in every combination of their parts, say what the programs and Kubernetes need."""

import ast
import copy
import functools
import http.client
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import serve
import yaml
from manifests import (
    COMPONENTS,
    OVERLAYS,
    ROOT,
    VERSION,
    Combination,
    Object,
    Rendered,
    kustomize,
    labels,
    pod,
    selects,
)
from network import Outside, Peer, Pod, allowed

from gateway.app import create_app
from gateway.settings import Settings

SCHEMAS = Path(__file__).with_name("schemas")
KUBERNETES = ("1.35", "1.36", "1.37")
PRIVATE = ("/metrics", "/healthz", "/readyz")

# What a program reads besides the fields of its Settings.
ALSO_READ = {"gateway": set(), "model-server": {"MODEL_URI", "MODEL_SECONDS"}}
SETTINGS = {"gateway": Settings, "model-server": serve.Settings}
# How the container ports are named: by these fields.
PORTS = {
    "gateway": {"http": "port"},
    "model-server": {"grpc": "grpc_port", "metrics": "metrics_port", "health": "health_port"},
}


def program(container: Object) -> str:
    """gateway or model-server, by the image."""
    return next(name for name in SETTINGS if re.search(rf"/{name}(:[^/]*)?$", container["image"]))


@functools.cache
def image_environment(name: str) -> dict[str, str]:
    text = (ROOT / name / "Dockerfile").read_text().replace("\\\n", " ")
    words = [word for line in re.findall(r"^ENV (.*)", text, re.MULTILINE) for word in shlex.split(line)]
    return dict(word.split("=", 1) for word in words)


def settings(rendered: Rendered, container: Object) -> Any:
    """As the program itself would read them."""
    name = program(container)
    return SETTINGS[name].from_environment(image_environment(name) | rendered.settings(container))


@functools.cache
def routes() -> dict[str, set[str]]:
    """{an example path: its methods} of the gateway's app."""
    rules = create_app(Settings(models=("dog-breeds",))).url_map.iter_rules()
    return {re.sub(r"<[^>]*>", "dog-breeds", rule.rule): rule.methods or set() for rule in rules}


@functools.cache
def model_server_answers(path: str) -> bool:
    """Asks the model server's real probe handler."""
    server = serve.Health(("127.0.0.1", 0))
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status != 404
    finally:
        connection.close()
        server.shutdown()
        server.server_close()


# Each check yields what is wrong: object, field, and why.


def probes(rendered: Rendered) -> Iterator[str]:
    for one in rendered.deployments:
        for container in pod(one)["containers"]:
            where = f"{one['metadata']['name']}: containers[{container['name']}]"
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            values = settings(rendered, container)
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if probe not in container:
                    yield f"{where}.{probe} is missing"
                    continue
                asked = container[probe]["httpGet"]
                number = ports.get(asked["port"], asked["port"])
                if program(container) == "gateway":
                    known = number == values.port and "GET" in routes().get(asked["path"], ())
                else:
                    known = number == values.health_port and model_server_answers(asked["path"])
                if not known:
                    yield f"{where}.{probe}: the program answers nothing at {asked['path']} on {asked['port']}"


def ports(rendered: Rendered) -> Iterator[str]:
    for one in rendered.deployments:
        for container in pod(one)["containers"]:
            values = settings(rendered, container)
            expected = {name: getattr(values, field) for name, field in PORTS[program(container)].items()}
            found = {port["name"]: port["containerPort"] for port in container["ports"]}
            if found != expected:
                yield f"{one['metadata']['name']}: containers[{container['name']}].ports: {found}, not {expected}"
    for service in rendered.kind("Service"):
        name = service["metadata"]["name"]
        behind = [
            one for one in rendered.deployments if selects({"matchLabels": service["spec"]["selector"]}, labels(one))
        ]
        if len(behind) != 1:
            yield f"Service {name}: spec.selector: fits {len(behind)} Deployments, not one"
        for port in service["spec"]["ports"]:
            if behind and port["targetPort"] not in port_numbers(behind[0]):
                yield f"Service {name}: spec.ports: targetPort: no container port is named {port['targetPort']}"
    for monitoring in rendered.kind("PodMonitoring"):
        behind = [one for one in rendered.deployments if selects(monitoring["spec"]["selector"], labels(one))]
        wanted = {endpoint["port"] for endpoint in monitoring["spec"]["endpoints"]}
        if not behind or any(not wanted <= port_numbers(one).keys() for one in behind):
            yield f"PodMonitoring {monitoring['metadata']['name']}: spec: its pods have no port {wanted}"
    for one in rendered.deployments:
        noted = one["spec"]["template"]["metadata"].get("annotations", {})
        if "prometheus.io/scrape" in noted:
            metrics = port_numbers(one)[
                "http" if labels(one)["app.kubernetes.io/component"] == "gateway" else "metrics"
            ]
            if (noted["prometheus.io/port"], noted["prometheus.io/path"]) != (str(metrics), "/metrics"):
                yield f"{one['metadata']['name']}: annotations: prometheus.io/port is not {metrics}"


def port_numbers(deployment: Object) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for c in pod(deployment)["containers"] for port in c["ports"]}


def environment(rendered: Rendered) -> Iterator[str]:
    for one in rendered.deployments:
        for container in [*pod(one).get("initContainers", []), *pod(one)["containers"]]:
            name, where = program(container), f"{one['metadata']['name']}: containers[{container['name']}]"
            read = {field.name.upper() for field in fields(SETTINGS[name])} | ALSO_READ[name]
            for key in rendered.settings(container).keys() - read:
                yield f"{where}: {key} is a setting that {name} does not read"
            for source in container.get("envFrom", []):
                if not rendered.get("ConfigMap", source["configMapRef"]["name"]):
                    yield f"{where}.envFrom: there is no ConfigMap {source['configMapRef']['name']}"
            try:
                values = settings(rendered, container)
            except SystemExit as exc:
                yield f"{where}: {exc}"
                continue
            for target in filter(None, [getattr(values, "model_server", ""), getattr(values, "canary", "")]):
                if not list(behind(rendered, target)):
                    yield f"{where}: {target} is no Service's name and port"


def behind(rendered: Rendered, target: str) -> Iterator[tuple[Object, int]]:
    """The Deployments and container port behind a gRPC target, dns:///service:port."""
    host, _, port = target.removeprefix("dns:///").partition(":")
    if service := rendered.get("Service", host):
        for one in service["spec"]["ports"]:
            if one["port"] == int(port):
                for deployment in rendered.deployments:
                    if selects({"matchLabels": service["spec"]["selector"]}, labels(deployment)):
                        yield deployment, port_numbers(deployment)[one["targetPort"]]


def ingress(rendered: Rendered) -> Iterator[str]:
    for one in rendered.kind("Ingress"):
        paths = [path for rule in one["spec"]["rules"] for path in rule["http"]["paths"]]
        for path in paths:
            backend = path["backend"]["service"]
            service = rendered.get("Service", backend["name"])
            if not service or backend["port"]["name"] not in {port["name"] for port in service["spec"]["ports"]}:
                yield f"Ingress {one['metadata']['name']}: {path['path']}: no Service {backend}"
        for route in routes():
            if any(_covers(path, route) for path in paths) == (route in PRIVATE):
                state = "reachable from outside" if route in PRIVATE else "not reachable"
                yield f"Ingress {one['metadata']['name']}: spec.rules: {route} is {state}"


def _covers(path: Object, route: str) -> bool:
    if path["pathType"] == "Exact":
        return bool(route == path["path"])
    assert path["pathType"] == "Prefix", f"{path['pathType']}: what it means is each controller's own"
    return f"{route.rstrip('/')}/".startswith(f"{path['path'].rstrip('/')}/")


def selectors(rendered: Rendered) -> Iterator[str]:
    for one in rendered.deployments:
        name, selector = one["metadata"]["name"], one["spec"]["selector"]
        if not selects(selector, labels(one)):
            yield f"{name}: spec.selector: does not fit its own pods"
        for other in rendered.deployments:
            if other is not one and selects(selector, labels(other)):
                yield f"{name}: spec.selector: fits the pods of {other['metadata']['name']} too"
        for i, spread in enumerate(pod(one).get("topologySpreadConstraints", [])):
            if not selects(spread["labelSelector"], labels(one)):
                yield f"{name}: topologySpreadConstraints[{i}].labelSelector: does not fit its own pods"
        if not rendered.get("ServiceAccount", pod(one).get("serviceAccountName", "default")):
            yield f"{name}: serviceAccountName: there is no such ServiceAccount"


def ending(rendered: Rendered) -> Iterator[str]:
    """Let go of traffic, then end, within the time that Kubernetes gives."""
    age = re.search(r"max_connection_age_ms=(\d+)", serve.configuration(serve.Settings("x"), {"x": "1"}))
    for one in rendered.deployments:
        (container,) = pod(one)["containers"]
        where, values = f"{one['metadata']['name']}: containers[{container['name']}]", settings(rendered, container)
        wait = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        grace, total = values.grace_seconds, pod(one)["terminationGracePeriodSeconds"]
        if wait + grace >= total:
            yield f"{one['metadata']['name']}: terminationGracePeriodSeconds: {total}, not more than {wait} + {grace:g}"
        if program(container) == "gateway":
            least, longest = 5, values.deadline_seconds
        else:
            assert age
            gateway = next(c for d in rendered.deployments for c in pod(d)["containers"] if program(c) == "gateway")
            least, longest = int(age[1]) / 1000, settings(rendered, gateway).model_seconds
        if wait < least:
            yield f"{where}.lifecycle.preStop: {wait} s, less than {least:g}"
        if grace < longest:
            yield f"{where}: GRACE_SECONDS: {grace:g}, less than a call's {longest:g}"
    for config in rendered.kind("BackendConfig"):
        drain = config["spec"]["connectionDraining"]["drainingTimeoutSec"]
        gateway_pod = rendered.get("Deployment", "gateway")
        assert gateway_pod
        wait = pod(gateway_pod)["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        if drain > wait:
            yield f"BackendConfig: connectionDraining: {drain} s, more than the gateway's preStop of {wait}"


def images(rendered: Rendered) -> Iterator[str]:
    registries = set()
    for one in rendered.deployments:
        gpu = any("nvidia.com/gpu" in c["resources"].get("limits", {}) for c in pod(one)["containers"])
        for container in [*pod(one).get("initContainers", []), *pod(one)["containers"]]:
            repository, _, tag = container["image"].rpartition(":")
            registries.add(repository.rpartition("/")[0])
            where = f"{one['metadata']['name']}: containers[{container['name']}].image"
            if tag not in ((f"{VERSION}-cuda",) if gpu else (VERSION, f"{VERSION}-cuda")):
                yield f"{where}: {container['image']} has not the tag {VERSION}{'-cuda' if gpu else ''}"
    if len(registries) > 1:
        yield f"images come from several places: {sorted(registries)}"


def restricted(rendered: Rendered) -> Iterator[str]:
    """Pod Security's `restricted`, and a read-only root."""
    namespace = rendered.kind("Namespace")[0]["metadata"]
    if namespace.get("labels", {}).get("pod-security.kubernetes.io/enforce") != "restricted":
        yield f"Namespace {namespace['name']}: does not enforce restricted"
    kinds = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    for one in rendered.deployments:
        spec, name = pod(one), one["metadata"]["name"]
        for field in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(field):
                yield f"{name}: {field}"
        for volume in spec.get("volumes", []):
            if not set(volume) - {"name"} <= kinds:
                yield f"{name}: volumes[{volume['name']}]: of a kind that is not allowed"
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{name}: automountServiceAccountToken is not false"
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            security = spec.get("securityContext", {}) | container.get("securityContext", {})
            where = f"{name}: containers[{container['name']}].securityContext"
            wanted = {
                "runAsNonRoot": security.get("runAsNonRoot") is True and security.get("runAsUser", 0) > 0,
                "seccompProfile": security.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
                "allowPrivilegeEscalation": security.get("allowPrivilegeEscalation") is False,
                "capabilities": "ALL" in security.get("capabilities", {}).get("drop", [])
                and set(security["capabilities"].get("add", [])) <= {"NET_BIND_SERVICE"},
                "privileged": not security.get("privileged"),
                "procMount": security.get("procMount", "Default") == "Default",
                "sysctls": not security.get("sysctls"),
                "readOnlyRootFilesystem": security.get("readOnlyRootFilesystem") is True,
            }
            yield from (f"{where}.{field}" for field, holds in wanted.items() if not holds)
            if any("hostPort" in port for port in container.get("ports", [])):
                yield f"{where}: hostPort"


def writable(rendered: Rendered) -> Iterator[str]:
    for one in rendered.deployments:
        volumes = {volume["name"]: volume for volume in pod(one).get("volumes", [])}
        for container in [*pod(one).get("initContainers", []), *pod(one)["containers"]]:
            where, image = (
                f"{one['metadata']['name']}: containers[{container['name']}]",
                image_environment(program(container)),
            )
            mounts = {mount["mountPath"]: volumes.get(mount["name"]) for mount in container["volumeMounts"]}
            for path in {"/tmp", image["HOME"], image.get("MODEL_STORE", "/tmp")}:
                if not (mounts.get(path) or {}).get("emptyDir", {}).get("sizeLimit"):
                    yield f"{where}.volumeMounts: {path} is no emptyDir of a limited size"
            if None in mounts.values():
                yield f"{where}.volumeMounts: of no volume"
            if not {"cpu", "memory", "ephemeral-storage"} <= container["resources"].get("limits", {}).keys():
                yield f"{where}.resources.limits: needs cpu, memory and ephemeral-storage"


def scaling(rendered: Rendered) -> Iterator[str]:
    for one in rendered.kind("HorizontalPodAutoscaler"):
        name, spec = one["metadata"]["name"], one["spec"]
        target = rendered.get("Deployment", spec["scaleTargetRef"]["name"])
        if not target:
            yield f"HorizontalPodAutoscaler {name}: spec.scaleTargetRef: there is no such Deployment"
            continue
        if "replicas" in target["spec"]:
            yield f"{name}: spec.replicas: would undo the HorizontalPodAutoscaler's at every apply"
        if not 1 <= spec.get("minReplicas", 1) <= spec["maxReplicas"]:
            yield f"HorizontalPodAutoscaler {name}: spec.minReplicas: more than maxReplicas"
        for metric in spec["metrics"]:
            container = metric.get("containerResource", {}).get("container")
            if container and container not in {c["name"] for c in pod(target)["containers"]}:
                yield f"HorizontalPodAutoscaler {name}: spec.metrics: there is no container {container}"
        budgets = [b for b in rendered.kind("PodDisruptionBudget") if selects(b["spec"]["selector"], labels(target))]
        if len(budgets) != 1:
            yield f"{name}: has {len(budgets)} PodDisruptionBudgets, not one"
    for budget in rendered.kind("PodDisruptionBudget"):
        name, spec = budget["metadata"]["name"], budget["spec"]
        guarded = [d["metadata"]["name"] for d in rendered.deployments if selects(spec["selector"], labels(d))]
        if len(guarded) != 1:
            yield f"PodDisruptionBudget {name}: spec.selector: fits {len(guarded)} Deployments, not one"
        scalers = [h["spec"] for h in rendered.kind("HorizontalPodAutoscaler") if h["metadata"]["name"] in guarded]
        least = min((h["minReplicas"] for h in scalers), default=1)
        if spec.get("maxUnavailable", 0) < 1 and spec.get("minAvailable", 1) >= least:
            yield f"PodDisruptionBudget {name}: spec: no pod could be evicted from {least}"


def commands(rendered: Rendered) -> Iterator[str]:
    for one in rendered.deployments:
        for container in [*pod(one).get("initContainers", []), *pod(one)["containers"]]:
            entry = re.search(r"^ENTRYPOINT (.*)", (ROOT / program(container) / "Dockerfile").read_text(), re.MULTILINE)
            assert entry
            command = container.get("command") or ast.literal_eval(entry[1])
            files = [Path(word) for word in command if word.endswith(".py")]
            files += [Path(module.replace(".", "/")) for flag, module in pairwise(command) if flag == "-m"]
            if not files or not all((ROOT / file).exists() for file in files):
                yield f"{one['metadata']['name']}: containers[{container['name']}].command: {command} is not ours"


def connections(rendered: Rendered) -> Iterator[str]:
    """Every connection that a pod needs passes the NetworkPolicies, and no other."""
    policies = rendered.kind("NetworkPolicy")
    namespace = rendered.kind("Namespace")[0]["metadata"]["name"]
    pods = {d["metadata"]["name"]: Pod(namespace, labels(d), port_numbers(d)) for d in rendered.deployments}
    dns, internet = Pod("kube-system", {"k8s-app": "kube-dns"}), Outside("142.250.1.1")
    metadata = [(Outside("169.254.169.254"), 80), (Outside("169.254.169.252"), 988)]
    google = [Outside("130.211.0.7"), Outside("35.191.200.9")]
    strangers: list[Peer] = [
        Pod("default", {}),
        Pod(namespace, {}),
        Pod("default", labels(rendered.deployments[0])),
        internet,
    ]
    wanted: list[tuple[str, Peer, str, Peer, int]] = []
    refused: list[tuple[str, Peer, str, Peer, int]] = []

    for one in rendered.deployments:
        name = one["metadata"]["name"]
        (container,) = pod(one)["containers"]
        me, values = pods[name], settings(rendered, container)
        if program(container) == "gateway":
            for target in filter(None, [values.model_server, values.canary]):
                for server, port in behind(rendered, target):
                    wanted.append((name, me, server["metadata"]["name"], pods[server["metadata"]["name"]], port))
            for door in google if rendered.kind("BackendConfig") else [Pod("traefik")]:
                wanted.append(("the ingress", door, name, me, values.port))
            refused += [(name, me, str(there), there, port) for there, port in [(internet, 443), *metadata]]
            refused += [(name, me, other, pods[other], 8091) for other in pods if other != name]
        else:
            store = [(name, me, str(there), there, port) for there, port in [(internet, 443), *metadata]]
            if not rendered.settings(container)["MODEL_URI"].startswith("file:"):
                wanted += store
            elif "kennel/model" not in me.labels:
                refused += store
            refused += [(str(who), who, name, me, port) for who in strangers for port in port_numbers(one).values()]
            refused += [(name, me, "internet", internet, 80), (name, me, "gateway", pods["gateway"], 8080)]
            refused.append((name, me, "the metadata server", metadata[0][0], 443))
        if rendered.kind("BackendConfig"):
            refused.append(("the internet", internet, name, me, 8080))
        scraped = port_numbers(one).get("metrics", 8080)
        noted = one["spec"]["template"]["metadata"].get("annotations", {})
        readers = ["monitoring"] if "prometheus.io/scrape" in noted else []
        readers += ["gmp-system", "gke-gmp-system"] if rendered.kind("PodMonitoring") else []
        wanted += [(reader, Pod(reader), name, me, scraped) for reader in readers]
        if name != "gateway" and not readers:
            refused.append(("monitoring", Pod("monitoring"), name, me, scraped))
        for protocol in ("UDP", "TCP"):
            if not allowed(policies, me, dns, 53, protocol):
                yield f"NetworkPolicies: {name} cannot ask for names by {protocol}"
    for source, start, target, end, port in wanted:
        if not allowed(policies, start, end, port):
            yield f"NetworkPolicies: {source} cannot reach {target} on {port}"
    for source, start, target, end, port in refused:
        if allowed(policies, start, end, port):
            yield f"NetworkPolicies: {source} can reach {target} on {port}"


CHECKS = [
    probes,
    ports,
    environment,
    ingress,
    selectors,
    ending,
    images,
    restricted,
    writable,
    scaling,
    commands,
    connections,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_combination_says_what_programs_and_kubernetes_need(check, everything):
    faults = {fault: rendered.name for rendered in everything for fault in check(rendered)}
    assert not faults, "\n".join(f"{name}: {fault}" for fault, name in faults.items())


def test_every_object_fits_the_schema_of_its_kind(everything):
    for one in {id(one): one for rendered in everything for one in rendered.objects}.values():
        check_schema(one)


def check_schema(one: Object) -> None:
    """Kubernetes' own schema in every version, or ours."""
    own = SCHEMAS / f"{one['kind']}.json"
    if own.exists():
        jsonschema.validate(one, json.loads(own.read_text()))
        return
    for version in KUBERNETES:
        kubernetes_validate.validate(one, version, strict=True)


def test_every_object_is_in_one_namespace(singles):
    for rendered in singles:
        spaces = {one["metadata"].get("namespace", "none") for one in rendered.objects if one["kind"] != "Namespace"}
        assert spaces == {"kennel"}, f"{rendered.name}: {spaces}"


def test_what_people_apply_is_the_base(tree):
    """`kubectl apply -k k8s/`."""
    assert kustomize(tree.folder / "k8s") == kustomize(tree.folder / "k8s" / "base")


def test_gpu_image_is_found_after_an_overlay_named_its_registry(tree):
    """Whatever comes last: the component within the overlay, or on top of it as here."""
    folder = tree.folder / "k8s" / "overlays" / "on-top"
    folder.mkdir()
    named = tree.add(Combination("gke"), "below")
    lines = [f"resources: [../{named.name}]", "components: [../../components/gpu-l4]"]
    (folder / "kustomization.yaml").write_text("\n".join(lines))
    found = re.findall(r"image: (.*/model-server:.*)", kustomize(folder))
    assert set(found) == {f"europe-west1-docker.pkg.dev/a-project/kennel/model-server:{VERSION}-cuda"}


def test_no_component_goes_unrendered():
    assert sorted(path.name for path in (ROOT / "k8s" / "components").iterdir()) == COMPONENTS


@pytest.mark.parametrize(
    ("kind", "broken"),
    [
        ("BackendConfig", {"spec": {"drainTimeout": 60}}),
        ("FrontendConfig", {"spec": {"redirectToHttps": True}}),
        ("ManagedCertificate", {"spec": {"domains": ["not a name"]}}),
        ("PodMonitoring", {"spec": {"selector": {}, "endpoints": [{"path": "/metrics"}]}}),
        ("Deployment", {"spec": {"replica": 2}}),
        ("Unknown", {}),
    ],
)
def test_a_schema_refuses(kind, broken):
    own = SCHEMAS / f"{kind}.json"
    version = json.loads(own.read_text())["properties"]["apiVersion"]["const"] if own.exists() else "apps/v1"
    with pytest.raises(
        (jsonschema.ValidationError, kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError)
    ):
        check_schema({"apiVersion": version, "kind": kind, "metadata": {"name": "x"}} | broken)


# What each check must notice: (check, how base is broken, what the report names).


def spec(base: Rendered, kind: str, name: str) -> Object:
    return base.get(kind, name)["spec"]


def container(base: Rendered, name: str) -> Object:
    return pod(base.get("Deployment", name))["containers"][0]


def config(base: Rendered, name: str) -> dict[str, str]:
    return next(one["data"] for one in base.kind("ConfigMap") if one["metadata"]["name"].startswith(f"{name}-"))


MUTATIONS: list[tuple[Callable[[Rendered], Iterator[str]], Callable[[Rendered], object], str]] = [
    (probes, lambda b: container(b, "gateway")["readinessProbe"]["httpGet"].update(path="/ready"), "readinessProbe"),
    (probes, lambda b: container(b, "model-server")["livenessProbe"]["httpGet"].update(path="/ping"), "livenessProbe"),
    (probes, lambda b: container(b, "model-server").pop("startupProbe"), "startupProbe is missing"),
    (ports, lambda b: container(b, "gateway")["ports"][0].update(containerPort=8000), "containers[gateway].ports"),
    (ports, lambda b: config(b, "gateway").update(PORT="9000"), "containers[gateway].ports"),
    (ports, lambda b: spec(b, "Service", "model-server")["ports"][0].update(targetPort="rpc"), "named rpc"),
    (ports, lambda b: spec(b, "Service", "gateway")["selector"].update({"app.kubernetes.io/name": "gatway"}), "fits 0"),
    (environment, lambda b: config(b, "gateway").update(DEADLINE="5"), "DEADLINE is a setting that gateway does not"),
    (environment, lambda b: config(b, "model-server").update(BATCH_SIZE="many"), "BATCH_SIZE='many'"),
    (environment, lambda b: config(b, "gateway").update(MODEL_SERVER="dns:///models:7070"), "dns:///models:7070"),
    (ingress, lambda b: b.kind("Ingress")[0]["spec"]["rules"][0]["http"]["paths"].pop(), "/openapi.json is not"),
    (
        ingress,
        lambda b: b.kind("Ingress")[0]["spec"]["rules"][0]["http"]["paths"][0].update(pathType="Prefix"),
        "/metrics is reachable",
    ),
    (
        selectors,
        lambda b: spec(b, "Deployment", "gateway")["selector"]["matchLabels"].update({"app.kubernetes.io/name": "g"}),
        "gateway: spec.selector",
    ),
    (
        selectors,
        lambda b: spec(b, "Deployment", "gateway")["selector"].update(
            matchLabels={"app.kubernetes.io/part-of": "kennel"}
        ),
        "fits the pods of model-server too",
    ),
    (
        ending,
        lambda b: pod(b.get("Deployment", "gateway")).update(terminationGracePeriodSeconds=30),
        "terminationGracePeriod",
    ),
    (ending, lambda b: config(b, "gateway").update(GRACE_SECONDS="4"), "GRACE_SECONDS: 4, less than a call's 5"),
    (ending, lambda b: container(b, "model-server").pop("lifecycle"), "preStop: 0 s, less than 10"),
    (images, lambda b: container(b, "gateway").update(image="kennel/gateway:latest"), "containers[gateway].image"),
    (images, lambda b: container(b, "gateway").update(image=f"elsewhere/gateway:{VERSION}"), "several places"),
    (restricted, lambda b: container(b, "gateway")["securityContext"].pop("capabilities"), "capabilities"),
    (
        restricted,
        lambda b: pod(b.get("Deployment", "model-server")).update(hostNetwork=True),
        "model-server: hostNetwork",
    ),
    (
        restricted,
        lambda b: pod(b.get("Deployment", "gateway"))["securityContext"].pop("seccompProfile"),
        "seccompProfile",
    ),
    (writable, lambda b: container(b, "model-server")["volumeMounts"].pop(0), "/models is no emptyDir"),
    (writable, lambda b: pod(b.get("Deployment", "gateway"))["volumes"].pop(0), "containers[gateway].volumeMounts"),
    (
        scaling,
        lambda b: spec(b, "HorizontalPodAutoscaler", "gateway")["scaleTargetRef"].update(name="gate"),
        "scaleTargetRef",
    ),
    (scaling, lambda b: spec(b, "Deployment", "gateway").update(replicas=2), "gateway: spec.replicas"),
    (
        scaling,
        lambda b: spec(b, "PodDisruptionBudget", "gateway").update(minAvailable=2, maxUnavailable=0),
        "no pod could be evicted from 2",
    ),
    (commands, lambda b: container(b, "gateway").update(command=["python3.11", "gateway/main.py"]), "gateway/main.py"),
    (
        connections,
        lambda b: spec(b, "NetworkPolicy", "gateway").update(egress=[]),
        "gateway cannot reach model-server on 7070",
    ),
    (
        connections,
        lambda b: spec(b, "NetworkPolicy", "model-server").update(ingress=[{}]),
        "can reach model-server on 7070",
    ),
    (connections, lambda b: spec(b, "NetworkPolicy", "dns").update(egress=[]), "cannot ask for names"),
    (
        connections,
        lambda b: spec(b, "NetworkPolicy", "gateway").update(ingress=[]),
        "the ingress cannot reach gateway on 8080",
    ),
    (
        connections,
        lambda b: spec(b, "NetworkPolicy", "gateway")["egress"].append({}),
        "gateway can reach Outside(ip='142.250.1.1') on 443",
    ),
    (connections, lambda b: spec(b, "NetworkPolicy", "remote-model").update(podSelector={}), "gateway can reach"),
    (
        connections,
        lambda b: config(b, "model-server").update(MODEL_URI="gs://bucket/bundle"),
        "model-server cannot reach Outside(ip='169.254.169.254') on 80",
    ),
]


@pytest.mark.parametrize(("check", "breaks", "report"), MUTATIONS, ids=[mutation[2] for mutation in MUTATIONS])
def test_a_check_names_what_is_broken(check, breaks, report, singles):
    broken = Rendered("broken", copy.deepcopy(singles[0].objects))
    breaks(broken)
    assert any(report in fault for fault in check(broken)), list(check(broken))


@pytest.mark.slow
def test_checkov_finds_nothing_that_is_not_explained_beside_it(everything, tmp_path):
    """Explained: by an annotation checkov.io/skip<n> of the object, `rule=reason`."""
    checkov = ROOT / ".venv" / "checkov" / "bin" / "checkov"
    if not checkov.exists():
        pytest.skip("checkov is not there: `make .venv/checkov/done`")
    whole = {
        place: max((r for r in everything if r.name.split(" + ")[0] == place), key=lambda r: len(r.objects))
        for place in ("base", *OVERLAYS)
    }
    for place, rendered in whole.items():
        (tmp_path / f"{place}.yaml").write_text(yaml.safe_dump_all(rendered.objects))
    command = [checkov, "--framework", "kubernetes", "--skip-download", "--compact", "--quiet", "--output", "json"]
    done = subprocess.run([*command, "--directory", tmp_path], capture_output=True, text=True, cwd=tmp_path)
    report = json.loads(done.stdout)
    assert report["summary"]["resource_count"] > 20 * len(whole), done.stderr
    failed = {f"{one['check_id']} {one['check_name']}: {one['resource']}" for one in report["results"]["failed_checks"]}
    assert not failed, "\n".join(sorted(failed))
