"""What a run needs beforehand: photographs, environments, and what it is a run of."""

import contextlib
import dataclasses
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from PIL import Image, ImageOps

from bench import contenders
from bench.contenders import HOME, Contender, Failed
from bundle import jpeg, resample
from bundle.cpus import features, whole_cpus
from bundle.golden import draw
from bundle.manifest import BundleError
from bundle.manifest import read as read_bundle
from local.processes import ROOT
from local.run import BUNDLES

SMALL, LARGE = (533, 400), (4032, 3024)  # width and height of the photographs: as from the web, as from a phone
PHOTOS = 4  # small ones, sent in turn


def jpegs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))


def photographs(folder: Path | None) -> dict[str, list[Path]]:
    """Small ones and one of 12 megapixels, under build/bench/photos: from a folder, or drawn where there is none."""
    folder = folder or ROOT.parent / "shared" / "data" / "photos"
    found = jpegs(folder) if folder.is_dir() else []
    target = HOME / "photos"
    target.mkdir(parents=True, exist_ok=True)
    step = max(1, len(found) // PHOTOS)
    images = [Image.open(path).convert("RGB") for path in found[::step][:PHOTOS]]
    images = images or [Image.fromarray(pixels) for pixels in draw(PHOTOS, SMALL[1], SMALL[0], seed=11)]
    small = []
    for i, image in enumerate(images):
        ImageOps.fit(image, SMALL, Image.Resampling.LANCZOS).save(path := target / f"small-{i}.jpg", quality=80)
        small.append(path)
    ImageOps.fit(images[0], LARGE, Image.Resampling.BICUBIC).save(large := target / "large-0.jpg", quality=90)
    return {"small": small, "large": [large]}


def prepare(chosen: Sequence[Contender]) -> dict[str, str]:
    """Install what is needed -> {contender: why it cannot take part}."""
    broken = {}
    failed: dict[str, str] = {}
    for contender in chosen:
        try:
            read_bundle(BUNDLES / contender.bundle)
        except BundleError as exc:
            broken[contender.name] = str(exc)
            continue
        if contender.runtime == "bf16" and "amx_bf16" not in features():
            broken[contender.name] = "this CPU has no AMX"
            continue
        try:
            if contender.environment not in failed:
                contenders.install(contender.environment)
        except (Failed, subprocess.CalledProcessError) as exc:
            failed[contender.environment] = str(exc)
        if contender.environment in failed:
            broken[contender.name] = failed[contender.environment]
    for name, reason in broken.items():
        print(f"without {name}: {reason}", flush=True)
    return broken


def identity(
    chosen: Sequence[Contender], photos: dict[str, list[Path]], quick: bool, rounds: int | None
) -> dict[str, Any]:
    """What a run is of: another machine, another commit or another plan is another run."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
    )
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    decoder = "bundle/jpeg.c" if jpeg.jpegs else "Pillow"
    resizer = "Pillow" if resample.resample is resample.by_pillow else "bundle/resample.c"
    flags = features()
    wide = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "amx_int8", "amx_bf16") if flag in flags]
    bundles = {}
    for name in sorted({contender.bundle for contender in chosen}):
        with contextlib.suppress(BundleError):  # told by `prepare`
            bundles[name] = read_bundle(BUNDLES / name).digest[:12]
    return {
        "commit": git.stdout.strip() or "unknown",
        "machine": {
            "cpu": model,
            "cpus": whole_cpus(),
            "flags": " ".join(wide),
            "memory_gb": round(psutil.virtual_memory().total / 1e9),
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
        },
        "bundles": bundles,
        "photos": {size: [_kilobytes(path) for path in paths] for size, paths in photos.items()},
        "versions": {"ours": f"decoded by {decoder}, resized by {resizer}"}
        | {c.environment: versions(c.environment) for c in chosen if c.environment},
        "contenders": [dataclasses.asdict(c) for c in chosen],
        "quick": quick,
        "rounds": rounds,
    }


def versions(environment: str) -> str:
    """What the first line of its requirements names."""
    first = (ROOT / "bench" / f"requirements-{environment}.txt").read_text().splitlines()[0]
    return first.split(": ")[1].split(", with")[0]


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _kilobytes(path: Path) -> str:
    with Image.open(path) as image:
        return f"{image.width}x{image.height}, {path.stat().st_size / 1e3:.0f} kB"
