"""`make vertex-pipeline`: run the pipeline on Vertex AI, and hand over to the cluster what passed its gate.

    python -m vertex.pipeline gs://bucket/photos --name clothes --family lite0 --family lite1 --require 'accuracy>=0.9'
    python -m vertex.pipeline photos --name clothes --here          in Docker on this machine, into build/pipeline

Options after -- are training.train's, for every family. A family is a model (lite0), or a name with options of its own
('long=--model lite1 --epochs 40'). The model in service is what MODEL_URI in k8s/gke.env names under this name; what
passed takes its place there, as a change to look at, commit and deploy.
Exit codes: 0 released; 1 refused, or failed; 3 the gate did not pass. Unless it is 0 all is as it was.
"""

import argparse
import dataclasses
import json
import re
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from bundle.manifest import NAME
from vertex import spec
from vertex.bucket import upload
from vertex.cloud import Cloud, CloudError
from vertex.follow import answers, say
from vertex.graph import Images, Machine, PipelineError, compile_to, in_docker, run_here
from vertex.push import check_options, push
from vertex.settings import Settings, SettingsError, add_flags, read, table
from vertex.steps import GATE_FAILED

# Of training.train, and not for a family to say.
GIVEN = {
    **dict.fromkeys(spec.GIVEN, "a step's results go where the pipeline says"),
    **dict.fromkeys(["--require", "--no-worse-than"], "that is the pipeline's gate, give it before the --"),
    **dict.fromkeys(["--validation", "--test"], "all steps see the same splits: make folders train, validation, test"),
    "--csv": "a pipeline reads a folder by class, or tar shards",
    "--name": "all families have the pipeline's",
}
WORKS = Path("build/pipeline")  # of --here
Branches = dict[str, list[str]]
ENDED = ("PIPELINE_STATE_SUCCEEDED", "PIPELINE_STATE_FAILED", "PIPELINE_STATE_CANCELLED")


@dataclass(frozen=True)
class Service:
    """What the cluster serves, as k8s/gke.env says: each model's bundle, and its name."""

    uris: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> "Service":
        """Nothing, where the file is still the example. Raises SettingsError."""
        found = {"MODEL_URI": "", "MODELS": ""}
        try:
            lines = path.read_text().splitlines()
        except OSError as exc:
            raise SettingsError(f"{path} cannot be read ({exc.strerror}): copy k8s/gke.env and fill it in") from exc
        for line in lines:
            key, equals, value = line.partition("=")
            if equals and key in found:
                found[key] = " ".join(shlex.split(value))
        if "your-project" in found["MODEL_URI"]:
            return cls()
        uris, names = tuple(found["MODEL_URI"].split()), tuple(filter(None, found["MODELS"].split(",")))
        if len(uris) != len(names):
            raise SettingsError(
                f"{path}: MODEL_URI has {len(uris)} bundles and MODELS {len(names)} names: give each its name, in order"
            )
        return cls(uris, names)

    def of(self, name: str) -> str:
        """The model's bundle; "" where it is not served."""
        return dict(zip(self.names, self.uris, strict=True)).get(name, "")

    def with_model(self, name: str, uri: str) -> "Service":
        served = dict(zip(self.names, self.uris, strict=True)) | {name: uri}
        return Service(tuple(served.values()), tuple(served))

    def write(self, path: Path) -> None:
        """Into the file's two lines; all others stay."""
        text = path.read_text()
        uris = " ".join(self.uris)
        for key, value in (("MODEL_URI", f"'{uris}'" if " " in uris else uris), ("MODELS", ",".join(self.names))):
            line = f"{key}={value}"
            text, count = re.subn(rf"^{key}=.*$", lambda _, line=line: line, text, flags=re.MULTILINE)  # type: ignore[misc]
            text += "" if count else f"{line}\n"
        new = path.with_name(f".{path.name}.new")
        new.write_text(text)
        new.replace(path)


def families(given: Sequence[str], options: Sequence[str]) -> dict[str, list[str]]:
    """Name -> options of training.train. Raises SettingsError."""
    found: dict[str, list[str]] = {}
    for text in given:
        name, equals, own = text.partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9]{0,19}", name) or name in found:
            raise SettingsError(f"family {text!r}: wants a name of its own, of a-z and 0-9, as big='--model lite2'")
        found[name] = [*(shlex.split(own) if equals else ["--model", name]), *options]
        for word in found[name]:
            if reason := GIVEN.get(word.split("=")[0]):
                raise SettingsError(f"{word}: {reason}; leave it out")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = words[words.index("--") + 1 :] if "--" in words else []
    args = _parser().parse_args(words[: words.index("--")] if "--" in words else words)
    try:
        if not args.job and not NAME.fullmatch(args.name):
            raise SettingsError(f"the model's name {args.name!r} must be 1 to 63 of a-z, 0-9 and '-': NAME=clothes")
        branches = families(args.family or ["lite0", "lite1"], options)
        return _here(args, branches) if args.here else _there(args, branches)
    except (SettingsError, CloudError, PipelineError) as exc:
        for line in str(exc).splitlines():
            print(f"vertex-pipeline: {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nvertex-pipeline: stopped here; what was submitted goes on, JOB=its id follows it", file=sys.stderr)
        return 130


def _here(args: argparse.Namespace, branches: Branches) -> int:
    """All of it on this machine; nothing is registered, and k8s/gke.env stays as it is."""
    works, data = WORKS.resolve(), Path(args.data).resolve()
    if not data.is_dir():
        raise SettingsError(f"{args.data} is no folder here: a pipeline on this machine needs one")
    out = works / f"{args.name}-{_stamp()}"
    out.mkdir(parents=True)
    compile_to(out / "pipeline.yaml", branches, Images(args.image, args.model_server_image))
    rival = str(Path(args.in_service).resolve()) if args.in_service else ""
    parameters = _parameters(args, str(data), str(works / "models"), str(out), rival)
    in_docker(works / "steps", [data, works, *([Path(rival.partition("#")[0])] if rival else [])])
    run_here(out / "pipeline.yaml", parameters)
    released = outcome(lambda address: Path(address).read_bytes() if Path(address).exists() else None, str(out))
    if released:
        print(f"{released['MODELS']} passed: {released['MODEL_URI']}; the report: {out}/report.html")
    return 0 if released else GATE_FAILED


def _there(args: argparse.Namespace, branches: Branches) -> int:
    flags = {key: value for key, value in vars(args).items() if key in Settings.__dataclass_fields__}
    s = read(args.env, flags)
    cloud, service = Cloud(s, args.endpoint), Service.read(args.gke_env)
    if args.job:
        name = args.job if "/" in args.job else f"{s.parent}/pipelineJobs/{args.job}"
    else:
        in_service = service.of(args.name) if args.in_service is None else args.in_service
        name = _submit(args, branches, s, cloud, in_service)
        if args.dry_run:
            return 0
    given = follow(cloud, name, args.pause)["runtimeConfig"]["parameterValues"]
    released = outcome(lambda address: _object(cloud, address), given["out"])
    if released is None:
        print(f"vertex-pipeline: {args.gke_env} is as it was; the report: {given['out']}/report.html", file=sys.stderr)
        return GATE_FAILED
    now = Service.read(args.gke_env)
    if args.in_service is None and now.of(given["name"]) != given["in_service"]:
        raise PipelineError(
            f"{args.gke_env} names another {given['name']} than this was compared with, and is left as it is: run "
            f"the pipeline again; what passed is {released['MODEL_URI']}"
        )
    now.with_model(released["MODELS"], released["MODEL_URI"]).write(args.gke_env)
    print(f"{args.gke_env}: MODEL_URI is {released['MODEL_URI']} now. Look at the change, then: make gke-deploy")
    return 0


def _submit(args: argparse.Namespace, branches: Branches, s: Settings, cloud: Cloud, in_service: str) -> str:
    """-> the PipelineJob's resource name; "" of a dry run.

    https://docs.cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.pipelineJobs
    """
    gpu = "-cuda" if s.gpu and args.image.count("/") < 2 else ""
    wanted = [f"{args.image}{gpu}", args.model_server_image]
    images = Images(*(push(args.docker, image, s, dry=True) for image in wanted))
    folder = None if args.data.startswith("gs://") else Path(args.data)
    if folder and not folder.is_dir():
        raise SettingsError(f"{args.data} is neither gs:// nor a folder here")
    prefix = f"data/{folder.resolve().name}" if folder else ""
    data = f"gs://{s.bucket}/{prefix}" if folder else args.data
    for options in branches.values():
        spec.check_run(args.name, data, options)
        check_options(args.docker, wanted[0], options)
    run = f"kennel-{args.name}-{_stamp()}"
    out = f"gs://{s.bucket}/pipelines/{run}"
    parameters = _parameters(args, data, f"gs://{s.bucket}/bundles", out, in_service) | {
        "endpoint": args.endpoint or f"https://{s.region}-aiplatform.googleapis.com",
        "registry": s.parent,
        "model": json.dumps(spec.model(s, args.name, push(args.docker, args.serving_image, s, dry=True), "", "")),
    }
    if s.workers > 1 or s.strategy != "standard":
        say("each family trains on one machine, on demand: a step of a pipeline is no job of many, nor spot")
    one = dataclasses.replace(s, workers=1, strategy="standard")
    say(f"{len(branches)} families; of each, while it trains, {spec.estimate(one).text}")
    machine = table()["machines"][s.machine]
    path = WORKS / f"{run}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    compile_to(path, branches, images, Machine(machine["vcpus"], machine["gb"], s.gpu, s.gpus))
    if args.dry_run:
        print(json.dumps(parameters, indent=1))
        print(f"vertex-pipeline: nothing was sent; the pipeline is {path}", file=sys.stderr)
        return ""
    if folder:
        upload(cloud, folder, prefix, prune=args.prune)
    for image in (*wanted, args.serving_image):
        push(args.docker, image, s)
    job = {
        "displayName": run,
        "labels": s.label_map,
        "pipelineSpec": yaml.safe_load(path.read_text()),
        "runtimeConfig": {"gcsOutputDirectory": f"gs://{s.bucket}/pipelines/steps", "parameterValues": parameters},
        **({"serviceAccount": s.service_account} if s.service_account else {}),
    }
    return cloud.submit_pipeline(job, run)


def _parameters(args: argparse.Namespace, data: str, models: str, out: str, in_service: str) -> dict[str, str]:
    said = {"data": data, "name": args.name, "models": models, "out": out, "split": args.split}
    return said | {"require": "\n".join(args.require), "in_service": in_service}


def follow(cloud: Cloud, name: str, pause: float) -> spec.Json:
    """The pipeline as it ended, if well; its steps are printed as they come and go. Raises CloudError."""
    s, told = cloud.settings, dict[str, str]()
    number = name.rpartition("/")[2]
    where = "https://console.cloud.google.com/vertex-ai/locations"
    where += f"/{s.region}/pipelines/runs/{number}?project={s.project}"
    say(f"{number}: {where}")
    for job in answers(lambda: cloud.pipeline(name), f"The pipeline goes on: make vertex-pipeline JOB={number}", pause):
        for one in job.get("jobDetail", {}).get("taskDetails", []):
            step, state = one["taskName"], one.get("state", "PENDING")
            if told.get(step) != state:
                told[step] = state
                say(f"{step}: {state}  {one.get('error', {}).get('message', '')}".rstrip())
        if job["state"] == ENDED[0]:
            return job
        if job["state"] in ENDED:
            failed = ", ".join(step for step, state in told.items() if state == "FAILED") or "no step"
            error = job.get("error", {}).get("message", "no reason was given")
            raise CloudError(f"the pipeline ended as {job['state']}, {failed} failed: {error}. Its logs: {where}")
    raise AssertionError("answers never end by themselves")


def outcome(look: Callable[[str], bytes | None], out: str) -> dict[str, str] | None:
    """What was released, as release.env has it; None where the gate did not pass, which is said. Raises PipelineError.

    `look`: an address's content, or None where there is nothing.
    """
    if (report := look(f"{out}/report.json")) is None:
        raise PipelineError(f"{out}: has no report: the gate's step did not end well; what the steps said tells why")
    if unmet := json.loads(report)["gate"]["unmet"]:
        for sentence in unmet:
            print(f"vertex-pipeline: the gate did not pass: {sentence}", file=sys.stderr)
        return None
    if (text := look(f"{out}/release.env")) is None:
        raise PipelineError(f"{out}: the gate passed, and nothing was released: what the steps said tells why")
    return dict(line.split("=", 1) for line in text.decode().splitlines())


def _object(cloud: Cloud, address: str) -> bytes | None:
    bucket, _, name = address.removeprefix("gs://").partition("/")
    with cloud.explained(f"reading {address}"):
        blob = cloud.storage.bucket(bucket).blob(name)
        return bytes(blob.download_as_bytes(timeout=60)) if blob.exists(timeout=60) else None


def _stamp() -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vertex-pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="?", default="", help="folder by class, here or gs://")
    parser.add_argument("--name", default="", help="of the model")
    parser.add_argument("--family", action="append", default=[], help="a model, or NAME=OPTIONS; lite0 and lite1")
    parser.add_argument("--require", nargs="+", action="extend", default=[], metavar="METRIC>=VALUE")
    parser.add_argument("--split", default="test", choices=["validation", "test"], help="what the gate is asked about")
    parser.add_argument("--in-service", help="compare with this bundle instead; '' with none")
    parser.add_argument("--here", action="store_true", help="in Docker on this machine")
    parser.add_argument("--image", default="kennel/training:0.1.0", help="here, or its address there")
    parser.add_argument("--model-server-image", default="kennel/model-server:0.1.0")
    parser.add_argument("--serving-image", default="kennel/endpoint:0.1.0", help="what the registry names to serve it")
    parser.add_argument("--docker", default="docker")
    parser.add_argument("--dry-run", action="store_true", help="compile, and print what would be sent")
    parser.add_argument("--prune", action="store_true", help="delete in the bucket what is not in the folder")
    parser.add_argument("--job", default="", help="one that was submitted before")
    parser.add_argument("--env", type=Path, default=Path("vertex/vertex.env"), help="the settings' file")
    parser.add_argument("--gke-env", type=Path, default=Path("k8s/gke.env"), help="the cluster's")
    parser.add_argument("--endpoint", default="", help=argparse.SUPPRESS)
    parser.add_argument("--pause", type=float, default=10.0, help=argparse.SUPPRESS)
    add_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
