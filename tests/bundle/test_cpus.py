"""bundle.cpus: what the container allows, in both versions of cgroup."""

import importlib.metadata
from pathlib import Path

import pytest

from bundle import cpus

V1 = ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")


def test_features_are_those_on_lines_of_flags(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("model name\t: amx_int8\nflags\t\t: fpu amx_bf16\nflags\t\t: fpu\nbugs\t: mds\n")
    assert cpus.features(tmp_path / "cpuinfo") >= {"fpu", "amx_bf16"}
    assert not cpus.features(tmp_path / "cpuinfo") & {"amx_int8", "mds"}
    assert cpus.features(tmp_path / "none") == set()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "200000 100000\n"}, 2.0),
        ({"cpu.max": "50000 100000\n"}, 0.5),
        ({"cpu.max": "125000 50000\n"}, 2.5),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "9900000 100000\n"}, 8),  # never more than the process may be scheduled on
        ({V1[0]: "150000\n", V1[1]: "100000\n"}, 1.5),
        ({V1[0]: "-1\n", V1[1]: "100000\n"}, 8),
        ({V1[0]: "150000\n"}, 8),
        ({"cpu.max": "max 100000\n", V1[0]: "150000\n", V1[1]: "100000\n"}, 8),
        ({}, 8),
        ({"cpu.max": ""}, 8),
        ({"cpu.max": "0 0\n"}, 8),
        ({"cpu.max": "100000 0\n"}, 8),
        ({"cpu.max": "many\n"}, 8),
        ({"cpu.max": "1 2 3\n"}, 8),
        ({"cpu.max": "\xff\xfe"}, 8),
    ],
)
def test_cpus_are_the_quota_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: float
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    assert cpus.cpus(tmp_path) == expected


def test_without_affinity_the_machine_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    assert cpus.cpus(tmp_path) == 3


@pytest.mark.parametrize(("available", "whole"), [(0.25, 1), (1, 1), (1.99, 1), (2, 2), (7.5, 7)])
def test_whole_cpus_are_rounded_down_and_at_least_one(
    monkeypatch: pytest.MonkeyPatch, available: float, whole: int
) -> None:
    monkeypatch.setattr(cpus, "cpus", lambda: available)
    assert cpus.whole_cpus() == whole


@pytest.mark.parametrize(("torch", "found"), [("2.13.0", 2), ("2.13.0+cu130", 2), ("2.13.0+cpu", 0), (None, 0)])
def test_gpus_are_those_that_the_installed_torch_can_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: str | None, found: int
) -> None:
    def version(name: str) -> str:
        if torch is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return torch

    monkeypatch.setattr("importlib.metadata.version", version)
    for name in ("nvidia0", "nvidia11", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    for visible, most in ((None, 2), ("1", 1), ("0,1,2", 2), ("", 0)):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert cpus.gpus(tmp_path) == min(found, most)
