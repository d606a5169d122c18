"""How many CPUs this process may use: affinity and container limits, not what the node has. What they can do, and how
many GPUs there are. How their programs ask for memory."""

import importlib.metadata
import os
from pathlib import Path

# Memory in pages of 2 MB, where Linux has them: a virtual machine looks for one of 4 kB in two tables, and where its
# host is busy a worker on a CPU took 9 to 16% longer for that, and the JVM a fifth (docs/speed.md).
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """CPUs (may be a fraction) by affinity and by the cgroup's quota, version 2 or 1.

    A container sees its own limit at the root of its cgroup mount. Files and units: the kernel's
    Documentation/admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst (v1).
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = _quota(cgroup)
    return min(available, quota / period) if quota > 0 and period > 0 else available


def whole_cpus() -> int:
    """CPUs rounded down, at least one: how many busy threads fit."""
    return max(1, int(cpus()))


def features(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """The CPU's, by the kernel's names, as amx_bf16; none where the kernel does not tell them on a line of flags."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}


def gpus(devices: Path = Path("/dev")) -> int:
    """NVIDIA's that this process sees and that the installed torch can use: its CPU build can use none."""
    try:
        able = not importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        able = False
    found = len(list(devices.glob("nvidia[0-9]*"))) if able else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if visible is None else min(found, len(list(filter(None, visible.split(",")))))


def _quota(cgroup: Path) -> tuple[int, int]:
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        return (-1 if quota == "max" else int(quota)), int(period)
    except (OSError, ValueError):
        pass
    try:
        v1 = cgroup / "cpu"
        return int((v1 / "cpu.cfs_quota_us").read_text()), int((v1 / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return -1, 1
