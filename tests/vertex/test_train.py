"""make vertex-train, from pictures here to a bundle here, through the stand-in; and everything that can go wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from standin import StandIn

from bundle import manifest


@pytest.mark.slow
def test_pictures_here_become_a_bundle_here(
    vertex: Callable[..., int], pictures: Path, bucket: Any, standin: StandIn, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "bundles" / "colours"
    assert vertex("train", str(pictures), "--out", str(out), "--workers", "2", "--", "--quick", "--size", "64") == 0
    made = manifest.read(out)
    assert made.classes == ("blue", "red", "yellow")
