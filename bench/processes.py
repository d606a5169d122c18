"""What a server's processes cost: CPU seconds and memory, by what each of them is."""

import contextlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

# What is found in a command line -> what the process is called.
ROLES = {
    "org.pytorch.serve.ModelServer": "JVM",
    "model_service_worker": "worker",
    "model-server/serve.py": "model server's start",
    "-m gateway": "gateway",
    "-m local.run": "make run",
    "resource_tracker": "others",
    "gcs_server": "ray's own",
    "raylet": "ray's own",
    "ray::ServeReplica": "worker",
    "ray::ProxyActor": "HTTP",
    "ray::": "ray's own",
    "ray/": "ray's own",
    "spawn_main": "worker",
    "gunicorn": "worker",
    "bentoml_impl.worker": "worker",
    "bin/bentoml": "others",
    "mosec_app": "others",
    "mosec/bin": "HTTP",
    "litserve_app": "HTTP",
    "kserve_app": "worker",
}

PREFERRED = -15  # a nice value: thirty times the share of what has none


def tree(pid: int) -> list[psutil.Process]:
    """The process and all that it started, as far as they live."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


def role(command: Iterable[str]) -> str:
    text = " ".join(command)
    return next((name for part, name in ROLES.items() if part in text), Path(text.split(" ")[0]).name or "others")


def cpu(processes: Iterable[psutil.Process]) -> dict[int, tuple[str, float]]:
    """{pid: (role, CPU seconds so far)}: user and system, of the process alone."""
    found = {}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            times = process.cpu_times()
            found[process.pid] = (role(process.cmdline()), times.user + times.system)
    return found


def spent(before: dict[int, tuple[str, float]], after: dict[int, tuple[str, float]]) -> dict[str, float]:
    """CPU seconds between two looks, by role. A process that ended in between is missing: `lost` tells."""
    total: dict[str, float] = defaultdict(float)
    for pid, (name, seconds) in after.items():
        total[name] += seconds - (before[pid][1] if pid in before else 0.0)
    return dict(total)


def lost(before: dict[int, tuple[str, float]], after: dict[int, tuple[str, float]]) -> list[str]:
    """Roles of the processes that ended between two looks."""
    return [name for pid, (name, _) in before.items() if pid not in after]


def prefer(processes: Iterable[psutil.Process]) -> bool:
    """Before all other work of the machine, where we may (root) -> whether it was done.

    Other work would take more from a contender of one session than from one of several, like ours: Linux shares CPUs
    out between sessions first (autogroups, sched(7)), and the nice value of a process counts only within its own.
    """
    done = False
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.nice(PREFERRED)
            done = True
        with contextlib.suppress(OSError):  # a kernel without them
            (Path("/proc") / str(process.pid) / "autogroup").write_text(str(PREFERRED))
    return done


def busy() -> float:
    """CPU seconds of the whole machine that were not idle, so far; what a host took away (steal) among them."""
    return _not_idle(psutil.cpu_times())


def busy_each() -> list[float]:
    """The same of each CPU."""
    return [_not_idle(times) for times in psutil.cpu_times(percpu=True)]


def _not_idle(times: Any) -> float:
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


def memory(processes: Iterable[psutil.Process]) -> dict[str, float]:
    """Megabytes (1e6) by role as PSS: what is shared counts once, in shares."""
    total: dict[str, float] = defaultdict(float)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total[role(process.cmdline())] += process.memory_full_info().pss / 1e6
    return dict(total)
