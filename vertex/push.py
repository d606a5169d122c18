"""An image made here: asked what it would refuse, and into Artifact Registry under a tag by its content."""

import subprocess
from collections.abc import Sequence

from vertex.cloud import CloudError
from vertex.settings import Settings, SettingsError

PUSH_S, ASK_S = 3600, 300
PARSE = "import sys; from training.train import parse; parse(['data', '--out', 'out', *sys.argv[1:]])"


def push(docker: str, image: str, s: Settings, dry: bool = False) -> str:
    """Image here -> its address there. `dry`: only looks. Raises CloudError."""
    if image.count("/") > 1:  # as it is
        return image
    build = "make endpoint-image" if image.startswith("kennel/endpoint:") else "make images"
    build += " TORCH=cuda" if image.endswith("-cuda") else ""
    words = _run([docker, "image", "inspect", "--format", "{{.Id}} {{.Architecture}}", image], f"not here: {build}")
    identity, architecture = words.split()
    if architecture != "amd64":
        raise CloudError(
            f"{image} is for {architecture}, Vertex AI is amd64: DOCKER_DEFAULT_PLATFORM=linux/amd64 {build}"
        )
    registry = f"{s.region}-docker.pkg.dev"
    there = f"{registry}/{s.project}/{s.repository}/{image.rpartition('/')[2]}-{identity.removeprefix('sha256:')[:12]}"
    if not dry:
        _run(["gcloud", "auth", "configure-docker", registry, "--quiet"], "log in: gcloud auth login")
        _run([docker, "tag", image, there], "see docker's message")
        make = f"gcloud artifacts repositories create {s.repository} --repository-format=docker"
        make += f" --location={s.region} --project={s.project}"
        _run([docker, "push", "--quiet", there], f"log in (gcloud auth login), or make the repository: {make}")
    return there


def check_options(docker: str, image: str, options: Sequence[str]) -> None:
    """Training's options, read by the image that will read them. Raises SettingsError for those it refuses.

    An image that is not here is not asked, and the job finds out.
    """
    if image.count("/") > 1:
        return
    command = [docker, "run", "--rm", "--network=none", "--entrypoint=python3.11", image, "-c", PARSE, *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S)
    except subprocess.TimeoutExpired as exc:
        raise CloudError(f"{image} did not read its options within {ASK_S} s: try again") from exc
    if done.returncode:
        # argparse's or TrainError's own sentence, after its name
        said = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise SettingsError(
            f"training refuses {' '.join(options)}: {said.rpartition('rror: ')[2]} (make train ARGS=--help)"
        )


def _run(command: Sequence[str], remedy: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=PUSH_S).stdout
    except FileNotFoundError as exc:
        where = (
            "https://cloud.google.com/sdk/docs/install"
            if command[0] == "gcloud"
            else "https://docs.docker.com/get-docker/"
        )
        raise CloudError(f"needs {command[0]}: {where}") from exc
    except subprocess.CalledProcessError as exc:
        said = " ".join((exc.stderr or exc.stdout).split())[-300:]
        raise CloudError(f"{' '.join(command[-2:])}: {said or 'failed'}: {remedy}") from exc
    except subprocess.TimeoutExpired as exc:
        raise CloudError(f"{' '.join(command[-2:])}: not done within {PUSH_S / 3600:.0f} h: try again") from exc
