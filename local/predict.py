"""`make predict`: one photo as a table, or a folder as a CSV that goes on where it stopped."""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
COLUMNS = ["file", "label", "probability", "known", "model", "version", "error"]
BAR = 30


class NoGateway(Exception):
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="make predict", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--photo", type=Path, help="PHOTO: a picture file")
    what.add_argument("--dir", type=Path, help="DIR: a folder of picture files, with its subfolders")
    parser.add_argument("--model", help="MODEL: the first one served where left out")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="URL: of the gateway")
    args = parser.parse_args(arguments)
    try:
        if args.photo:
            one(args.photo, args.url, args.model)
        else:
            folder(args.dir, args.url, args.model)
    except NoGateway as exc:
        sys.exit(f"predict: {exc}")
    except KeyboardInterrupt:
        sys.exit("predict: stopped; the same command goes on from here")


def one(photo: Path, url: str, model: str | None) -> None:
    if not photo.is_file():
        sys.exit(f"predict: {photo} is not a file")
    answer = ask(requests.Session(), photo, url, model)
    if error := answer.get("detail"):
        sys.exit(f"predict: {photo}: {error}")
    width = max(len(score["label"]) for score in answer["top"])
    print(f"{photo.name}: {answer['label']}   ({answer['model']} {answer['version']}, {answer['digest'][:12]})")
    for score in answer["top"]:
        print(f"  {score['label']:{width}}  {score['probability']:6.1%}  {'#' * round(BAR * score['probability'])}")


def folder(folder: Path, url: str, model: str | None) -> None:
    """Writes <folder>.csv, a row a picture as each is answered; pictures that are in it already are passed over."""
    if not folder.is_dir():
        sys.exit(f"predict: {folder} is not a folder")
    photos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not photos:
        sys.exit(f"predict: {folder} has no pictures ({', '.join(sorted(SUFFIXES))})")
    target = folder.resolve().with_suffix(".csv") if not folder.suffix else Path(f"{folder.resolve()}.csv")
    done = set()
    if target.exists():
        with target.open(newline="") as rows:
            done = {row["file"] for row in csv.DictReader(rows) if row.get("error") is not None}
    session = requests.Session()
    with target.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        if not file.tell():
            writer.writeheader()
        for photo in tqdm(photos, unit="picture", disable=None):
            if (name := str(photo.relative_to(folder))) in done:
                continue
            answer = ask(session, photo, url, model)
            writer.writerow({"file": name, **answer, "error": answer.get("detail", "")})
            file.flush()
    print(f"{target}: {len(photos)} pictures, {len(done)} of them from before")


def ask(session: requests.Session, photo: Path, url: str, model: str | None) -> dict[str, Any]:
    """The gateway's answer, or its problem where the picture is to blame. Raises NoGateway."""
    try:
        response = session.post(
            f"{url}/predict", params={"model": model} if model else {}, data=photo.read_bytes(), timeout=30
        )
        answer: dict[str, Any] = response.json()
    except (requests.RequestException, ValueError) as exc:
        raise NoGateway(f"no gateway answers at {url}: start one with `make run` in another terminal ({exc})") from exc
    if response.status_code >= 500 or response.status_code == 404:  # the server, or the name of the model
        raise NoGateway(f"{url}: {answer['detail']}")
    return answer


if __name__ == "__main__":
    main()
