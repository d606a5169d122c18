"""What is in the images, and that they run as the cluster runs them: no root, no shell, nothing writable."""

import json
import subprocess
import tarfile
import time

import pytest
from containers import DOCKER, ROOT, Spec, docker, version

LARGEST_MB = {"gateway": 220, "model-server": 550, "training": 1400, "endpoint": 600}
PARTS = list(LARGEST_MB)
# Files that a container's processes have in memory.
MAPPED = """
import psutil
print(*{part.path for process in psutil.process_iter(["memory_maps"]) for part in process.info["memory_maps"] or ()})
"""
DOCKERFILES = [ROOT / {"endpoint": "vertex/endpoint"}.get(part, part) / "Dockerfile" for part in PARTS]


@pytest.mark.parametrize("path", DOCKERFILES, ids=PARTS)
def test_hadolint_finds_nothing(path):
    found = subprocess.run([".venv/bin/hadolint", "--config", ".hadolint.yaml", path], cwd=ROOT, capture_output=True)
    assert found.returncode == 0, found.stdout.decode()


def test_hadolint_can_find_something(tmp_path):
    path = tmp_path / "Dockerfile"
    path.write_text((ROOT / "gateway/Dockerfile").read_text().replace("WORKDIR /app", "WORKDIR app"))
    found = subprocess.run([".venv/bin/hadolint", "--config", ".hadolint.yaml", path], cwd=ROOT, capture_output=True)
    assert b"DL3000" in found.stdout


@pytest.fixture(scope="session")
def contents(images):
    """{part: the image's files as tar members}"""

    def members(name):
        container = docker("create", name)
        try:
            with (
                subprocess.Popen([DOCKER, "export", container], stdout=subprocess.PIPE) as process,
                tarfile.open(fileobj=process.stdout, mode="r|") as tar,
            ):
                return list(tar)
        finally:
            docker("rm", container)

    return {part: members(name) for part, name in images.items()}


@pytest.mark.parametrize("part", PARTS)
def test_no_larger_than_promised(images, part):
    size = int(docker("image", "inspect", "--format", "{{.Size}}", images[part])) / 1e6
    assert size <= LARGEST_MB[part], f"{size:.0f} MB"


@pytest.mark.parametrize("part", PARTS)
def test_no_shell_no_package_manager_no_compiler_and_nothing_left_of_the_build(contents, part):
    names = ["/" + member.name for member in contents[part]]
    programs = {name.rsplit("/", 1)[1] for name in names if "/bin/" in name or "/sbin/" in name}
    assert not programs & {"sh", "bash", "dash", "busybox", "apt", "apt-get", "dpkg", "gcc", "cc", "ld", "pip", "pip3"}
    assert not [name for name in names if name.startswith(("/wheels", "/requirements", "/docker/", "/root/", "/debs"))]
    assert not [name for name in names if "/.cache/" in name or name.endswith((".whl", ".deb"))]
    left = [name for name in names if name.startswith("/tmp/") and "hsperfdata" not in name]
    assert not left


@pytest.mark.parametrize("part", PARTS)
def test_nothing_runs_as_another_user_or_is_writable_by_anybody(contents, part):
    assert not [member.name for member in contents[part] if member.isfile() and member.mode & 0o6000]
    open_to_all = {"/" + m.name for m in contents[part] if m.mode & 0o002 and not m.issym() and not m.isdev()}
    assert open_to_all <= {"/tmp", "/var/tmp", "/var/lock"}


@pytest.mark.parametrize("part", PARTS)
def test_what_the_label_and_the_configuration_say(images, part):
    config = json.loads(docker("image", "inspect", images[part]))[0]["Config"]
    assert config["User"] == "10001:10001"
    labels = config["Labels"]
    assert labels["org.opencontainers.image.version"] == version()
    assert labels["org.opencontainers.image.title"] == f"kennel/{part}"
    assert len(labels["org.opencontainers.image.revision"].removesuffix("-dirty")) == 40
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert part == "training" or config["Healthcheck"]["Test"][0] == "CMD"


@pytest.mark.parametrize("part", PARTS)
def test_a_scanner_finds_the_debian_packages(contents, part):
    packages = {m.name.rsplit("/", 1)[1] for m in contents[part] if "var/lib/dpkg/status.d/" in m.name}
    assert {"libc6", "libssl3", "python3.11-minimal"} <= packages


@pytest.mark.parametrize("tier", ["gateway", "model-server"])
def test_starts_without_any_right_becomes_healthy_and_ends_on_sigterm(images, tier):
    spec = Spec(tier)
    name = docker("run", "--detach", *spec.flags, "-e", "MODELS=dog-breeds", spec.image)
    try:
        # A gateway alone is alive and never ready.
        wanted = "healthy" if tier == "model-server" else "starting"
        deadline = time.monotonic() + 90
        while docker("inspect", "--format", "{{.State.Health.Status}}", name) != wanted:
            assert time.monotonic() < deadline, docker("logs", name)
            time.sleep(0.5)
        listening = f"import socket; socket.create_connection(('127.0.0.1', {next(iter(spec.port.values()))}), 2)"
        while subprocess.run([DOCKER, "exec", name, "python3.11", "-c", listening], capture_output=True).returncode:
            assert time.monotonic() < deadline, docker("logs", name)
        if tier == "model-server":  # the JVM's classes come parsed, and nobody imported torch
            mapped = docker("exec", name, "python3.11", "-c", MAPPED)
            assert all(name in mapped for name in ("/classes.jsa", "/torchserve.jsa", "onnxruntime"))
            assert "libtorch" not in mapped
        started = time.monotonic()
        docker("stop", "--time", "60", name)
        assert time.monotonic() - started < 15
        assert docker("inspect", "--format", "{{.State.ExitCode}}", name) == "0"
    finally:
        docker("rm", "--force", name)


def test_training_with_a_read_only_root_leaves_a_bundle_in_the_mounted_folder(images, tmp_path):
    from learner import folder  # imports torch

    folder(tmp_path / "data")
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o777)
    flags = ["--read-only", "--cap-drop", "ALL", "--tmpfs", "/tmp", "-v", f"{tmp_path}/data:/data:ro"]
    flags += ["-v", f"{tmp_path}/out:/out", "--network", "none"]
    docker("run", "--rm", *flags, images["training"], "/data", "--out", "/out/mine", "--quick")
    manifest = json.loads((tmp_path / "out/mine/manifest.json").read_text())
    assert manifest["provenance"]["commit"] not in ("", "unknown")
