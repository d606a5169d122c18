"""Training on Vertex AI, from here: `python -m vertex train DATA --out build/bundles/NAME`, or make vertex-train.

train   data up, image pushed, a custom job submitted and followed, its bundle and report brought back
tune    the same as a tuning job over ranges; the best trial's bundle is brought back
status  the last jobs and endpoints, or one job's logs
deploy  a bundle behind an endpoint of Vertex AI

Options after -- are training.train's. Exit codes: 0 good; 1 refused, or failed; 3 the gate failed: the bundle is in
OUT.rejected and the report beside it.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vertex import spec
from vertex.bucket import bring_back, upload, upload_bundle
from vertex.cloud import Cloud, CloudError
from vertex.follow import FAILED, best_trial, console, follow, show
from vertex.push import check_options, push
from vertex.settings import Settings, SettingsError, add_flags, read

GATE_FAILED = 3


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = words[words.index("--") + 1 :] if "--" in words else []
    args = _parser().parse_args(words[: words.index("--")] if "--" in words else words)
    try:
        flags = {key: value for key, value in vars(args).items() if key in Settings.__dataclass_fields__}
        settings = read(args.env, flags)
        cloud = Cloud(settings, args.endpoint)
        match args.door:
            case "train" | "tune":
                return _run(args, options, settings, cloud)
            case "status":
                return show(cloud, args.job)
            case _:
                return _deploy(args, settings, cloud)
    except (SettingsError, CloudError) as exc:
        for line in str(exc).splitlines():
            print(f"vertex-{args.door}: {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nvertex-{args.door}: stopped here; what was submitted goes on: make vertex-status", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace, options: list[str], s: Settings, cloud: Cloud) -> int:
    name = spec.bundle_name(args.out)
    if args.job:  # it was submitted before
        kind = "hyperparameterTuningJobs" if args.door == "tune" else "customJobs"
        return _finish(args, cloud, f"{s.parent}/{kind}/{args.job}")
    if not args.data:
        raise SettingsError("DATA is not set: a folder with a folder of pictures a class, or gs://")
    data = _data(args.data, s)
    labels = _data(args.csv, s, under="labels/") if args.csv else None
    options = [*options, "--csv", labels.address] if labels else options
    image = args.image if args.image.count("/") > 1 or not s.gpu else f"{args.image}-cuda"
    base = f"gs://{s.bucket}/vertex/{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}/"

    def job(uri: str) -> spec.Json:
        if args.door == "tune":
            return spec.tuning_job(s, name, uri, data.address, options, base, args.range)
        return spec.custom_job(s, name, uri, data.address, options, base)

    draft = job(push(args.docker, image, s, dry=True))  # refused before anything is sent
    check_options(args.docker, image, [*options, *map(spec.example, args.range if args.door == "tune" else [])])
    cost = spec.estimate(s, s.parallel, s.trials) if args.door == "tune" else spec.estimate(s)
    print(cost.text, file=sys.stderr)
    if args.dry_run:
        print(json.dumps(draft, indent=1))
        return 0
    for one in (data, labels):
        if one and one.folder:
            upload(cloud, one.folder, one.prefix, prune=args.prune, files=one.files)
    return _finish(args, cloud, cloud.submit(job(push(args.docker, image, s))))


@dataclass(frozen=True)
class Data:
    """Where data is for the job; `folder`: where it is here, if it is; `files`: which of it, if not all."""

    address: str
    folder: Path | None = None
    prefix: str = ""
    files: tuple[Path, ...] = ()


def _data(given: str, s: Settings, under: str = "data/") -> Data:
    """A folder, one file, a pattern of files, or gs://. Raises SettingsError where nothing is there."""
    if given.startswith("gs://"):
        return Data(given)
    path = Path(given)
    prefix = under + (path if path.is_dir() else path.parent).resolve().name
    if path.is_dir():
        return Data(f"gs://{s.bucket}/{prefix}", path, prefix)
    if not (files := tuple(sorted(path.parent.glob(path.name)))):
        raise SettingsError(f"{given} is not there")
    return Data(f"gs://{s.bucket}/{prefix}/{path.name}", path.parent, prefix, files)


def _finish(args: argparse.Namespace, cloud: Cloud, name: str) -> int:
    """Follow a job to its end, and bring back what it made."""
    ended = follow(cloud, name, args.door, args.pause)
    job_spec = ended.get("jobSpec") or ended["trialJobSpec"]
    base = job_spec["baseOutputDirectory"]["outputUriPrefix"]
    if args.door == "tune":
        best = best_trial(ended)
        base = f"{base}{best['id']}/"
    elif ended["state"] in FAILED:
        rejected = Path(f"{args.out}.rejected")
        if bring_back(cloud, base, rejected, "rejected", reports=args.out):
            print(f"vertex-train: the gate failed; see {args.out}.report.html; the bundle: {rejected}", file=sys.stderr)
            return GATE_FAILED
        error = ended.get("error", {}).get("message", "no reason was given")
        raise CloudError(f"the job ended as {ended['state']}: {error}. Its logs: {console(cloud, name)}")
    made = bring_back(cloud, base, args.out, "model", reports=args.out)
    if made is None:
        raise CloudError(f"the job ended well and left no bundle in {base}model/. Its logs: {console(cloud, name)}")
    print(f"{args.out}: {made.name} {made.version}, sha256={made.digest}. Report: {args.out}.report.html")
    small = Path(f"{args.out}-int8")  # as training.train names it, where --int8 was given
    if bring_back(cloud, base, small, "model-int8", reports=args.out):
        print(f"{small}: the same in int8")
    print(f"The same in the bucket: {base}model#sha256={made.digest}")
    return 0


def _deploy(args: argparse.Namespace, s: Settings, cloud: Cloud) -> int:
    uri = push(args.docker, args.image, s, dry=args.dry_run)
    address, _, wanted = args.bundle.partition("#sha256=")
    if address.startswith("gs://"):
        name, version = address.rstrip("/").rpartition("/")[2], wanted or "unverified"
    elif args.dry_run:
        name, version, address = Path(address).name, "", f"gs://{s.bucket}/bundles/{Path(address).name}-DIGEST"
    else:
        address, made = upload_bundle(cloud, Path(address))
        name, version = made.name, f"{made.version} sha256={made.digest}"
    name = args.name or name
    model = spec.model(s, name, uri, address, version)
    if args.dry_run:
        print(json.dumps({"model": model, "deployedModel": spec.deployed_model(s, name, "MODEL")}, indent=1))
        return 0
    registered = cloud.upload_model(model)
    print(f"registered as {registered}; now the endpoint: mostly ten to twenty minutes", file=sys.stderr)
    endpoint = cloud.endpoint_named(name)
    cloud.deploy(endpoint, spec.deployed_model(s, name, registered))
    host = args.endpoint or f"https://{s.region}-aiplatform.googleapis.com"
    print(f"{endpoint} answers at {host}/v1/{endpoint}:predict")
    print(f"It costs until it is gone: gcloud ai endpoints list --region={s.region} --project={s.project}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vertex", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    doors = parser.add_subparsers(dest="door", required=True)
    for door in ("train", "tune", "status", "deploy"):
        one = doors.add_parser(door)
        one.add_argument("--env", type=Path, default=Path("vertex/vertex.env"), help="the settings' file")
        one.add_argument("--endpoint", default="", help=argparse.SUPPRESS)
        one.add_argument("--pause", type=float, default=10.0, help=argparse.SUPPRESS)
        add_flags(one)
        if door != "status":
            one.add_argument("--image", required=True, help="here, as kennel/training:0.1.0; or its address there")
            one.add_argument("--docker", default="docker")
            one.add_argument("--dry-run", action="store_true", help="print what would be sent, and send nothing")
        if door in ("train", "tune"):
            one.add_argument("data", nargs="?", default="", help="folder or gs://, as training.train takes it")
            one.add_argument("--out", type=Path, default=Path("build/bundles/mine"), help="where the bundle comes to")
            one.add_argument("--csv", default="", help="file and label of every picture")
            one.add_argument("--prune", action="store_true", help="delete in the bucket what is not in the folder")
        if door != "deploy":
            one.add_argument("--job", default="", help="the number of one that was submitted already")
        if door == "tune":
            one.add_argument("--range", nargs="+", default=[], help="lr=1e-4:2e-3:log augment=light,strong")
        if door == "deploy":
            one.add_argument("bundle", help="folder, or gs://bucket/folder#sha256=...")
            one.add_argument("--name", default="", help="of model and endpoint; the bundle's if left out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
