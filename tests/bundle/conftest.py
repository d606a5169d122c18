import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

PARTS = Path(__file__).parents[2] / "bundle"


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Path]:
    """Makes a library of our sources, each changed in one place: build(name=(part, other)) -> where it is."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler (cc)")

    def make(**changes: tuple[str, str]) -> Path:
        folder = tmp_path / f"library-{len(list(tmp_path.iterdir()))}"
        (folder / "bundle").mkdir(parents=True)
        shutil.copy(PARTS / "compile.sh", folder / "bundle")
        for name in ("resample", "jpeg"):
            source, (part, other) = (PARTS / f"{name}.c").read_text(), changes.get(name, ("", ""))
            assert part in source
            (folder / "bundle" / f"{name}.c").write_text(source.replace(part, other) if part else source)
        subprocess.run([folder / "bundle" / "compile.sh"], check=True, capture_output=True)
        return folder / "build" / "pixels.so"

    return make
