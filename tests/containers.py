"""Real containers for tests: the images, run as the manifests say, on a network as a headless Service gives."""

import functools
import json
import os
import subprocess
import time
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCKER = os.environ.get("DOCKER", "docker")


def docker(*arguments: str, check: bool = True) -> str:
    """What the command printed. Raises AssertionError with what it complained of."""
    found = subprocess.run([DOCKER, *arguments], capture_output=True, text=True)
    assert not check or found.returncode == 0, f"docker {' '.join(arguments)}: {found.stderr}"
    return found.stdout.strip()


def make(*words: str) -> str:
    """What `make` printed, as from a shell: called by another make it would say so on its output."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    found = subprocess.run(["make", *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-6000:]
    return found.stdout


def engine() -> str:
    """Why there is no engine here; "" where there is one."""
    try:
        found = subprocess.run([DOCKER, "info"], capture_output=True, text=True)
    except FileNotFoundError:
        return "no docker here"
    return "" if found.returncode == 0 else "no Docker engine answers"


class Spec:
    """What base/ gives one tier's pods."""

    def __init__(self, tier: str) -> None:
        manifest = next((ROOT / "k8s/base").rglob(f"{tier}.yaml"))
        documents = yaml.safe_load_all(manifest.read_text())
        pod = next(one for one in documents if one["kind"] == "Deployment")["spec"]["template"]["spec"]
        container = pod["containers"][0]
        self.tier = tier
        self.image = f"{container['image']}:{version()}"
        self.user = f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
        self.limits, self.requests = container["resources"]["limits"], container["resources"]["requests"]
        self.pre_stop: int = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        self.grace: int = pod["terminationGracePeriodSeconds"] - self.pre_stop
        probe = container["readinessProbe"]["httpGet"]
        self.port = {port["name"]: port["containerPort"] for port in container["ports"]}
        self.ready = f":{self.port[probe['port']]}{probe['path']}"
        self.writable = [mount["mountPath"] for mount in container["volumeMounts"]]
        lines = manifest.with_suffix(".env").read_text().splitlines()
        self.environment = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))

    @property
    def flags(self) -> list[str]:
        flags = ["--user", self.user, "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges:true"]
        flags += ["--cpus", self.limits["cpu"], "--memory", self.limits["memory"].removesuffix("i")]
        for path in self.writable:
            flags += ["--tmpfs", f"{path}:uid={self.user.split(':')[0]},mode=700"]
        return flags


@functools.cache
def version() -> str:
    return next(
        line.split('"')[1] for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version")
    )


class Pod:
    """One container of a tier. It runs apart until it is ready, then gets the tier's name on the network:
    a headless Service has none but ready addresses either, which an alias from the start would not be."""

    def __init__(self, spec: Spec, network: str, *flags: str, **environment: str) -> None:
        self.spec, self.network = spec, network
        self.name = f"{spec.tier}-{uuid.uuid4().hex[:8]}"
        variables = [word for item in (spec.environment | environment).items() for word in ("-e", "=".join(item))]
        docker("run", "--detach", "--name", self.name, *spec.flags, *variables, *flags, spec.image)

    @property
    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(docker("inspect", self.name))[0]
        return found

    def url(self, where: str, network: str = "bridge") -> str:
        return f"http://{self.state['NetworkSettings']['Networks'][network]['IPAddress']}{where}"

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(self.url(self.spec.ready), timeout=2) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def wait_ready(self, seconds: float = 120) -> None:
        """Raises AssertionError with its last words where it is not ready by then."""
        deadline = time.monotonic() + seconds
        while not self.is_ready():
            assert self.state["State"]["Running"], f"{self.name} ended:\n{self.logs()}"
            assert time.monotonic() < deadline, f"{self.name} is not ready:\n{self.logs()}"
            time.sleep(0.2)

    def wait(self, seconds: float = 120) -> "Pod":
        """Until it is ready; then it is in the Service."""
        self.wait_ready(seconds)
        self.join()
        return self

    def join(self) -> None:
        docker("network", "connect", "--alias", self.spec.tier, self.network, self.name)

    def logs(self, lines: int = 20) -> str:
        found = subprocess.run([DOCKER, "logs", "--tail", str(lines), self.name], capture_output=True, text=True)
        return found.stdout + found.stderr

    def end(self) -> int:
        """SIGTERM, SIGKILL at the end of the grace -> the exit code; it is gone then."""
        docker("stop", "--time", str(self.spec.grace), self.name)
        code: int = self.state["State"]["ExitCode"]
        self.remove()
        return code

    def remove(self) -> None:
        docker("rm", "--force", "--volumes", self.name, check=False)


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(url, timeout=5) as response:
        return total(response.read().decode(), name)


def total(metrics: str, name: str) -> float:
    """The sum of a Prometheus metric's series."""
    lines = metrics.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))
