"""The pipeline's steps, as they run inside the images: `python3.11 -m vertex.steps STEP ARGUMENT...`

Each step is a component of vertex/pipeline.py, whose inputs and outputs are the function's parameters, in order. A
place is an address that fsspec knows: gs:// on Vertex AI, a folder here. `archive` runs in the model server's
image, whose archiver it calls, all others in training's; so each imports what it needs when it runs.
"""

import inspect
import json
import os
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NewType

from bundle import manifest
from bundle.manifest import MANIFEST, BundleError, Manifest

GATE_FAILED = 3  # training's exit code
PASSED, FAILED = "passed", "failed"
SCOPE = "https://www.googleapis.com/auth/cloud-platform"
# What a parameter of a step is, where it is no input.
File = NewType("File", str)  # an output: the file for its value
Model = NewType("Model", str)  # the address for a folder of a model
Page = NewType("Page", str)  # the address for an HTML page
REQUEST_S, REGISTER_S = 60, 1800  # one request; until the registry has the model


class StepError(ValueError):
    """What keeps a step from ending well; the message says what would be right."""


def validate(data: str, split: str, require: str, in_service: str, digest: File) -> None:
    """Read the data, and ask of it all that will be asked of the models: before anything is trained.

    `require` is a requirement a line; `digest` says what the data are.
    """
    from training import gate, sources
    from training.data import SPLITS, catalogue
    from training.evaluate import known_labels

    found = catalogue(data)
    held = {each: found.of(each, evaluation=True) for each in SPLITS}
    counts = ", ".join(f"{each} {len(records)}" for each, records in held.items())
    judged = next((records for each, records in held.items() if each == split), ())
    if not judged:
        raise StepError(f"{data}: the gate's split {split!r} has no pictures; there are: {counts}")
    for text in require.splitlines():
        gate.parse(text, found.classes)
    if in_service:
        address = in_service.partition("#")[0]
        filesystem, root = sources.open_address(address)
        with sources.explained(address):
            content = filesystem.cat_file(f"{root}/{MANIFEST}")
        known_labels(manifest.parse(content), found, held["validation"] + judged)
    print(f"{data}: {len(found.classes)} classes; {counts}; {len(found.unreadable)} unreadable; digest {found.digest}")
    _output(digest, found.digest)


def train(data: str, digest: str, name: str, to: Model, bundle: File, *options: str) -> None:
    """Train as a job of Vertex AI does, to `to`/model. The data must be those that were validated, by `digest`."""
    from training import job

    # What a custom job with a base output directory is given; a pipeline's step is not:
    # https://docs.cloud.google.com/vertex-ai/docs/training/code-requirements#environment-variables
    places = {"MODEL_DIR": "model", "CHECKPOINT_DIR": "checkpoints", "TENSORBOARD_LOG_DIR": "logs"}
    os.environ.update({f"AIP_{key}": f"{to}/{place}/" for key, place in places.items()})
    if code := job.main([data, "--name", name, *options]):
        raise SystemExit(code)
    with _fetched(f"{to}/model") as (_, made):
        pass
    if made.provenance["data"]["digest"] != digest:
        raise StepError(f"{data}: has changed since it was validated: start the pipeline again")
    _output(bundle, f"{to}/model#sha256={made.digest}")


def evaluate(family: str, bundle: str, data: str, report: Page, candidate: File) -> None:
    """Measure as it will be served, on validation, where the families are compared."""
    summary = _judged(bundle, data, "validation", html=report)
    _output(candidate, f"{family} {summary['accuracy']:.6f} {bundle}")


def choose(candidates: str, bundle: File) -> None:
    """A line a family, as `evaluate` writes it -> the bundle of the most accurate, of equals the first."""
    rows = [line.split(" ", 2) for line in candidates.splitlines()]
    best = max(rows, key=lambda row: float(row[1]))
    for row in rows:
        print(f"{'->' if row is best else '  '} {row[0]}: {float(row[1]):.2%} of validation right")
    _output(bundle, best[2])


def gate(bundle: str, data: str, split: str, require: str, in_service: str, out: str, verdict: File) -> None:
    """The requirements and, where a model is in service, McNemar's test against it, on `split`; the report to `out`.

    Pictures that no choice was made on: those of validation chose the epoch, the temperature and the family.
    """
    options = ["--require", *wanted] if (wanted := require.splitlines()) else []
    if in_service:
        with _fetched(in_service) as (folder, _):
            summary = _judged(
                bundle, data, split, f"{out}/report.html", [*options, "--no-worse-than", str(folder)], out
            )
    else:
        print("gate: no model is in service, so there is none to compare with")
        summary = _judged(bundle, data, split, f"{out}/report.html", options, out)
    _output(verdict, FAILED if summary["gate"]["unmet"] else PASSED)


def archive(bundle: str, models: str, mar: File) -> None:
    """The .mar that the model server would make of the bundle, by its own archiver, to `models`/NAME/DIGEST.mar."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "model-server"))
    from archive import archive as make
    from fetch import fetch

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bundle"
        fetch(bundle, folder)
        made = make(folder, Path(scratch) / "store")
        address = f"{_kept(models, manifest.read(folder))}.mar"
        _put(made.read_bytes(), address)
    _output(mar, address)


def register(
    bundle: str, models: str, endpoint: str, registry: str, model: str, released: File, registered: File
) -> None:
    """Put the bundle where models are kept, for good, and into the Model Registry as a new version of its name.

    `registry`: projects/P/locations/R, or "" to register nothing; `model`: what vertex.spec.model says of it, as JSON.
    """
    from training.publish import publish

    with _fetched(bundle) as (folder, made):
        address = _kept(models, made)
        publish(folder, address)
    _output(released, f"{address}#sha256={made.digest}")
    _output(registered, _register(made, address, endpoint, registry, json.loads(model)) if registry else "")


def release(released: str, out: str) -> None:
    """Hand over: `out`/release.env, in the words of k8s/gke.env. Written last, so that all it names is there."""
    with _fetched(released) as (_, made):
        pass
    uri = released if "://" in released else f"file://{released}"
    _put(f"MODEL_URI={uri}\nMODELS={made.name}\n".encode(), f"{out}/release.env")
    print(f"release: {uri}")


def _register(made: Manifest, address: str, endpoint: str, registry: str, model: dict[str, Any]) -> str:
    """-> projects/P/locations/R/models/M@VERSION, of the model that bears the bundle's name.

    Done twice it is one version: an alias holds the digest. An alias is [a-z][a-zA-Z0-9-]{0,126}[a-z0-9]:
    https://docs.cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.models
    """
    ask = _session(endpoint)
    alias = f"sha256-{made.digest[:12]}"
    # The list's own filter knows display names: .../projects.locations.models/list
    query = urllib.parse.urlencode({"filter": f'display_name="{made.name}"'})
    older = ask("GET", f"{registry}/models?{query}").get("models", [])
    parent = {"parentModel": older[0]["name"]} if older else {}
    if older and (there := ask("GET", f"{older[0]['name']}@{alias}", may_lack=True)):
        return f"{older[0]['name']}@{there['versionId']}"
    model = {
        **model,
        "displayName": made.name,
        "artifactUri": address,
        "versionDescription": f"{made.version}, sha256:{made.digest}",
        "versionAliases": ["default", alias],
    }
    operation = ask("POST", f"{registry}/models:upload", {**parent, "model": model})
    deadline = time.monotonic() + REGISTER_S
    while not operation.get("done"):
        if time.monotonic() > deadline:
            raise StepError(f"{operation['name']}: is not done after {REGISTER_S} s: look at it, then start again")
        time.sleep(1)
        operation = ask("GET", operation["name"])
    if error := operation.get("error"):
        raise StepError(f"{registry}: the upload of {made.name} failed: {error.get('message')}")
    name = f"{operation['response']['model']}@{operation['response']['modelVersionId']}"
    print(f"register: {name}")
    return name


def _session(endpoint: str) -> Callable[..., dict[str, Any]]:
    """ask(method, path, body) -> the JSON answer; {} for a 404 where `may_lack`. Raises StepError."""
    import google.auth
    import requests
    from google.auth.exceptions import GoogleAuthError
    from google.auth.transport.requests import AuthorizedSession

    try:
        session: Any = AuthorizedSession(google.auth.default(scopes=[SCOPE])[0])
    except GoogleAuthError as exc:
        raise StepError(f"{endpoint}: no login for it ({exc}): run `gcloud auth application-default login`") from exc

    def ask(method: str, path: str, body: Any = None, may_lack: bool = False) -> dict[str, Any]:
        try:
            answer = session.request(method, f"{endpoint}/v1/{path}", json=body, timeout=REQUEST_S)
            found: dict[str, Any] = answer.json()
        except (requests.RequestException, GoogleAuthError) as exc:
            raise StepError(f"{endpoint}: does not answer as a registry does ({exc}): start again later") from exc
        if answer.status_code == 404 and may_lack:
            return {}
        if not answer.ok:
            said = found.get("error", {}).get("message", answer.reason)
            right = ": the pipeline's service account needs roles/aiplatform.user" if answer.status_code == 403 else ""
            raise StepError(f"{path}: refused with {answer.status_code} ({said}){right}")
        return found

    return ask


def _judged(
    bundle: str, data: str, split: str, html: str, options: Sequence[str] = (), out: str = ""
) -> dict[str, Any]:
    """training.evaluate on a bundle at an address -> the report's summary; the page to `html`, figures to `out`."""
    from training import evaluate

    with _fetched(bundle) as (folder, _), tempfile.TemporaryDirectory() as scratch:
        code = evaluate.main([str(folder), data, "--split", split, "--out", f"{scratch}/x", *options])
        if code not in (0, GATE_FAILED):
            raise SystemExit(code)
        _put(Path(f"{scratch}/x.report.html").read_bytes(), html)
        figures = Path(f"{scratch}/x.report.json").read_bytes()
    if out:
        _put(figures, f"{out}/report.json")
    summary: dict[str, Any] = json.loads(figures)
    return summary


@contextmanager
def _fetched(uri: str) -> Iterator[tuple[Path, Manifest]]:
    """A bundle at an address, with or without #sha256= -> its folder here, for as long as it is wanted; checked."""
    from training.sources import explained, open_address

    address, _, digest = uri.partition("#sha256=")
    filesystem, root = open_address(address)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with explained(address):
            for file in (MANIFEST, *manifest.parse(filesystem.cat_file(f"{root}/{MANIFEST}")).files):
                filesystem.get_file(f"{root}/{file}", str(folder / file))
        made = manifest.read(folder)
        if digest and made.digest != digest:
            raise BundleError(f"{address}: is sha256={made.digest}, not {digest}: another bundle lies there")
        yield folder, made


def _kept(models: str, made: Manifest) -> str:
    """Where a bundle is kept: by its digest, so that what a MODEL_URI names never becomes another."""
    return f"{models.rstrip('/')}/{made.name}-{made.digest[:12]}"


def _output(file: str, value: str) -> None:
    """KFP names a file for each output. /gcs/bucket/path is gs://bucket/path, mounted:

    https://docs.cloud.google.com/vertex-ai/docs/training/cloud-storage-file-system
    The images' user may not be allowed to write to the mount, so it is written as an object.
    """
    _put(value.encode(), f"gs://{file.removeprefix('/gcs/')}" if file.startswith("/gcs/") else file)


def _put(content: bytes, address: str) -> None:
    import fsspec

    try:
        filesystem, path = fsspec.url_to_fs(address)
        if "://" not in address:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        filesystem.pipe_file(path, content)
    except Exception as exc:  # gcsfs, aiohttp and google-auth raise their own, without a common base
        raise StepError(f"{address}: cannot be written ({type(exc).__name__}: {exc})") from exc


def parameters(step: Callable[..., None]) -> list[inspect.Parameter]:
    """Of a step, but for the options that may follow."""
    return [one for one in inspect.signature(step).parameters.values() if one.kind is not one.VAR_POSITIONAL]


STEPS: dict[str, Callable[..., None]] = {
    step.__name__: step for step in (validate, train, evaluate, choose, gate, archive, register, release)
}


def main(words: Sequence[str]) -> int:
    """NAME=VALUE for each parameter, in order: so none of a container's arguments is empty; then options."""
    step = STEPS[words[0]]
    count = 1 + len(parameters(step))
    # As training.sources and model-server/fetch.py do, before gcsfs is imported.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        step(*(word.partition("=")[2] for word in words[1:count]), *words[count:])
    except (ValueError, OSError) as exc:  # every refusal of ours is a ValueError
        print(f"{words[0]}: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
