"""k8s/gke.sh and the gke overlay: every command that would be run, without a cloud."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
SETTINGS = {
    "PROJECT": "zoo-42",
    "REGION": "europe-west4",
    "MODE": "autopilot",
    "CLUSTER": "paw",
    "REPOSITORY": "images",
    "BUCKET": "zoo-42-models",
    "DOMAIN": "dogs.zoo.org",
    "MODEL_URI": f"gs://zoo-42-models/bundles/a&b#sha256={'0' * 64}",
    "MODELS": "a",
}
# Stands for gcloud, docker, kubectl: notes what it is asked, and answers.
FAKE = r"""#!/bin/bash
tool=${0##*/}
printf '%s\x1f' "$tool" "$@" >>"$CALLS"; echo >>"$CALLS"
case "$tool $*" in
  "gcloud projects describe "*) echo 123 ;;
  "gcloud "*" describe "*"--format=value"*) echo 203.0.113.7 ;;
  "gcloud "*" describe "*) [[ $THERE == 1 ]] ;;
  "docker image inspect "*) echo "sha256:c0ffeec0ffeec0ffee ${ARCHITECTURE:-amd64}" ;;
esac
"""
TOOLS = ("gcloud", "docker", "kubectl", "gke-gcloud-auth-plugin")


class Desk:
    """A copy of k8s/ with settings of its own, and tools that only take notes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        shutil.copytree(ROOT / "k8s", folder / "k8s")
        (folder / "bin").mkdir()
        for tool in TOOLS:
            (folder / "bin" / tool).write_text(FAKE)
            (folder / "bin" / tool).chmod(0o755)

    def run(self, door: str, there: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "k8s/gke.sh", door],
            cwd=self.folder,
            env={
                "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
                "CALLS": str(self.calls),
                "THERE": str(int(there)),
                "GKE_ENV": "settings.env",
                "DOCKER": "docker",
                "GATEWAY_IMAGE": "kennel/gateway:1.2.3",
                "MODEL_SERVER_IMAGE": "kennel/model-server:1.2.3-cuda",
                "PAUSE": "0",
                **environment,
            },
            input="no\n",
            capture_output=True,
            text=True,
            timeout=60,
        )

    def settings(self, **changes: str) -> None:
        lines = [f"{key}={shlex.quote(value)}\n" for key, value in {**SETTINGS, **changes}.items() if value]
        (self.folder / "settings.env").write_text("".join(lines))

    def called(self, tool: str) -> list[str]:
        """Each call once, as one line."""
        lines = self.calls.read_text().split("\n") if self.calls.exists() else []
        calls = [line.split("\x1f")[:-1] for line in lines if line]
        return list(dict.fromkeys(shlex.join(call) for call in calls if call[0] == tool))


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    desk = Desk(tmp_path)
    desk.settings()
    return desk


def lint(commands: list[str], folder: Path) -> dict[str, str | None]:
    """gcloud's own opinion of each command: None, or what is wrong. Nothing is sent anywhere."""
    (folder / "commands.json").write_text(json.dumps([{"command_string": command} for command in commands]))
    result = subprocess.run(
        ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={folder / 'commands.json'}"],
        env={**os.environ, "CLOUDSDK_CONFIG": str(folder / "gcloud")},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    verdicts = json.loads(result.stdout)
    assert len(verdicts) == len(commands)
    return {
        command: None if verdict["success"] else verdict["error_message"]
        for command, verdict in zip(commands, verdicts, strict=True)
    }


def every_gcloud_command(desk: Desk) -> list[str]:
    for mode in ("autopilot", "standard"):
        desk.settings(MODE=mode)
        assert desk.run("up").returncode == 0
        assert desk.run("deploy").returncode == 0
        for bucket in ("0", "1"):
            assert desk.run("down", there=True, YES="1", BUCKET_TOO=bucket).returncode == 0
    return desk.called("gcloud")


@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not on this machine, and lints its own commands")
def test_every_gcloud_command_is_one_that_gcloud_has(desk: Desk) -> None:
    commands = every_gcloud_command(desk)
    for path in (ROOT / "README.md", *(ROOT / "k8s").rglob("*.md")):
        commands += re.findall(r"^(?: {4}|> )(gcloud .+)$", path.read_text(), re.MULTILINE)
    wrong = [f"{command} --no-such-flag=1" for command in commands]
    verdicts = lint([*commands, *wrong], desk.folder)
    assert [(command, verdicts[command]) for command in commands if verdicts[command]] == []
    assert [command for command in wrong if not verdicts[command]] == []


def test_no_gcloud_line_goes_unseen(desk: Desk) -> None:
    commands = every_gcloud_command(desk)
    written = re.findall(r"\bgcloud ((?:[a-z-]+ )+)", re.sub(r'".*https.*"|components install', "", script()))
    assert len(written) > 20
    for words in written:
        assert any(command.startswith(f"gcloud {words}") for command in commands), words
    assert "gcloud" not in (ROOT / "k8s" / "gke.mk").read_text()


def script() -> str:
    return (ROOT / "k8s" / "gke.sh").read_text()


def test_what_is_there_is_not_made_again(desk: Desk) -> None:
    assert desk.run("up", there=True).returncode == 0
    assert [call for call in desk.called("gcloud") if re.search(r" create(-auto)? ", call)] == []


def test_the_model_servers_account_reads_the_bucket_and_nothing_else(desk: Desk) -> None:
    assert desk.run("up").returncode == 0
    rights = [call for call in desk.called("gcloud") if "principal://" in call]
    assert len(rights) == 1
    assert rights[0].startswith("gcloud storage buckets add-iam-policy-binding gs://zoo-42-models ")
    assert "workloadIdentityPools/zoo-42.svc.id.goog/subject/ns/kennel/sa/model-server" in rights[0]
    assert "roles/storage.objectViewer" in rights[0]
    accounts = {d["metadata"]["name"] for d in documents(ROOT / "k8s/overlays/gke") if d["kind"] == "ServiceAccount"}
    assert "model-server" in accounts


@pytest.mark.parametrize("key", SETTINGS)
def test_a_setting_that_is_missing_is_named(desk: Desk, key: str) -> None:
    desk.settings(**{key: ""})
    # The environment's does not count: another tool's REGION would be taken for ours.
    result = desk.run("up", **{key: "other"})
    assert result.returncode == 1
    assert result.stderr == f"gke-up: {key} is not set in ./settings.env\n"
    assert desk.called("gcloud") == []


def test_a_setting_left_as_the_example_is_named(desk: Desk) -> None:
    result = desk.run("deploy", GKE_ENV="k8s/gke.env")
    assert result.returncode == 1
    assert "PROJECT=your-project in k8s/gke.env is the example" in result.stderr
    desk.settings(DOMAIN="kennel.example.com")
    assert "DOMAIN=kennel.example.com" in desk.run("deploy").stderr
    assert set(re.findall(r"^([A-Z_]+)=", (ROOT / "k8s/gke.env").read_text(), re.MULTILINE)) == set(SETTINGS)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"MODE": "cheap"}, "MODE=cheap in ./settings.env is neither autopilot nor standard"),
        ({}, "settings.env is not"),
    ],
)
def test_wrong_settings_are_told(desk: Desk, changes: dict[str, str], error: str) -> None:
    desk.settings(**changes)
    if not changes:
        (desk.folder / "settings.env").unlink()
    assert error in desk.run("up").stderr


@pytest.mark.parametrize(("door", "tool"), [("up", "gcloud"), ("deploy", "docker"), ("deploy", "kubectl")])
def test_a_missing_tool_is_named_with_a_way_to_get_it(desk: Desk, door: str, tool: str) -> None:
    (desk.folder / "bin" / tool).unlink()
    for shell in ("bash", "sed"):
        (desk.folder / "bin" / shell).symlink_to(str(shutil.which(shell)))
    result = desk.run(door, PATH=str(desk.folder / "bin"))
    assert result.returncode == 1
    assert re.search(f"gke-{door}: needs {tool}: https://", result.stderr)


def test_nothing_is_deleted_without_a_yes(desk: Desk) -> None:
    result = desk.run("down", there=True)
    assert result.returncode == 1
    assert "cluster paw" in result.stdout
    assert "nothing was deleted" in result.stderr
    assert [call for call in desk.called("gcloud") if "describe" not in call] == []


def test_the_bucket_stays_unless_told(desk: Desk) -> None:
    assert desk.run("down", there=True, YES="1").returncode == 0
    assert [call for call in desk.called("gcloud") if call.startswith("gcloud storage rm")] == []
    # The load balancer goes with the namespace, before the cluster that would do it.
    lines = desk.calls.read_text()
    assert lines.index("delete\x1fnamespace") < lines.index("clusters\x1fdelete")
    assert desk.run("down", there=True, YES="1", BUCKET_TOO="1").returncode == 0
    assert [call for call in desk.called("gcloud") if call.startswith("gcloud storage rm gs://zoo-42-models ")]


def test_images_for_another_processor_are_refused(desk: Desk) -> None:
    result = desk.run("deploy", ARCHITECTURE="arm64")
    assert result.returncode == 1
    assert "kennel/gateway:1.2.3 is for arm64" in result.stderr
    assert [call for call in desk.called("docker") if "push" in call] == []


def documents(folder: Path) -> list[dict]:
    result = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(result.stdout))


def of(rendered: list[dict], kind: str, name: str) -> dict:
    [found] = [
        d for d in rendered if d["kind"] == kind and re.fullmatch(rf"{name}(-[a-z0-9]{{10}})?", d["metadata"]["name"])
    ]
    return found


needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl renders the overlay")


@needs_kubectl
def test_settings_are_written_into_what_is_applied(desk: Desk) -> None:
    assert desk.run("deploy").returncode == 0
    assert "kubectl --context=gke_zoo-42_europe-west4_paw apply -k build/gke/overlays/gke" in desk.called("kubectl")
    rendered = documents(desk.folder / "build/gke/overlays/gke")
    assert not re.search(r"\$\{|your-project|example\.com", yaml.safe_dump_all(rendered))
    server = of(rendered, "Deployment", "model-server")["spec"]["template"]
    image = "europe-west4-docker.pkg.dev/zoo-42/images/model-server:1.2.3-cuda-c0ffeec0ffee"
    assert {c["image"] for c in server["spec"]["initContainers"] + server["spec"]["containers"]} == {image}
    assert f"docker push --quiet {image}" in desk.called("docker")
    assert server["metadata"]["labels"]["kennel/model"] == "remote"
    assert of(rendered, "ConfigMap", "model-server")["data"]["MODEL_URI"] == SETTINGS["MODEL_URI"]
    assert of(rendered, "ConfigMap", "gateway")["data"]["MODELS"] == "a"
    assert of(rendered, "Ingress", "kennel")["spec"]["rules"][0]["host"] == "dogs.zoo.org"
    assert of(rendered, "ManagedCertificate", "kennel")["spec"]["domains"] == ["dogs.zoo.org"]


@needs_kubectl
def test_another_model_rolls_the_model_server_alone(desk: Desk) -> None:
    maps = []
    for model in ("one", "two"):
        desk.settings(MODEL_URI=f"gs://zoo-42-models/{model}")
        assert desk.run("deploy").returncode == 0
        rendered = documents(desk.folder / "build/gke/overlays/gke")
        maps.append({part: of(rendered, "ConfigMap", part)["metadata"]["name"] for part in ("gateway", "model-server")})
    assert maps[0]["model-server"] != maps[1]["model-server"]
    assert maps[0]["gateway"] == maps[1]["gateway"]


@needs_kubectl
def test_the_overlay_refers_to_what_is_there() -> None:
    rendered = documents(ROOT / "k8s/overlays/gke")
    ingress, service = of(rendered, "Ingress", "kennel"), of(rendered, "Service", "gateway")
    notes = ingress["metadata"]["annotations"]
    assert of(rendered, "ManagedCertificate", notes["networking.gke.io/managed-certificates"])
    assert of(rendered, "FrontendConfig", notes["networking.gke.io/v1beta1.FrontendConfig"])
    assert "ingressClassName" not in ingress["spec"]  # GKE's controller reads the annotation
    backend = of(
        rendered,
        "BackendConfig",
        json.loads(service["metadata"]["annotations"]["cloud.google.com/backend-config"])["default"],
    )
    assert {d["metadata"]["namespace"] for d in (backend, ingress, service)} == {"kennel"}
    [container] = of(rendered, "Deployment", "gateway")["spec"]["template"]["spec"]["containers"]
    assert backend["spec"]["healthCheck"]["port"] == container["ports"][0]["containerPort"]
    assert backend["spec"]["healthCheck"]["requestPath"] == container["readinessProbe"]["httpGet"]["path"]


@needs_kubectl
def test_pods_stay_until_the_load_balancer_has_let_go() -> None:
    rendered = documents(ROOT / "k8s/overlays/gke")
    draining = of(rendered, "BackendConfig", "gateway")["spec"]["connectionDraining"]["drainingTimeoutSec"]
    for part in ("gateway", "model-server"):
        pod = of(rendered, "Deployment", part)["spec"]["template"]["spec"]
        stop = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        grace = int(of(rendered, "ConfigMap", part)["data"]["GRACE_SECONDS"])
        assert stop + grace < pod["terminationGracePeriodSeconds"], part
        assert part != "gateway" or stop >= max(60, draining)


@needs_kubectl
def test_only_the_load_balancer_reaches_the_gateway_and_names_are_found_on_the_node() -> None:
    rendered = documents(ROOT / "k8s/overlays/gke")
    [rule] = of(rendered, "NetworkPolicy", "gateway")["spec"]["ingress"]
    assert [peer["ipBlock"]["cidr"] for peer in rule["from"]] == ["130.211.0.0/22", "35.191.0.0/16"]
    [rule] = of(rendered, "NetworkPolicy", "dns")["spec"]["egress"]
    assert {peer["ipBlock"]["cidr"] for peer in rule["to"] if "ipBlock" in peer} == {
        "169.254.20.10/32",
        "169.254.169.254/32",
    }
    assert {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}} in rule["to"]
