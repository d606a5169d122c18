"""bench.processes: whose CPU and memory it was."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import processes

BURN = "import time\nend = time.process_time() + {}\nwhile time.process_time() < end: pass\n"
CHILD = BURN.format(1.0) + "input()"
# As TorchServe starts a worker: the child of what was started, known by its command line.
PARENT = (
    BURN.format(0.3) + "import subprocess, sys\nsubprocess.run([sys.executable, *sys.argv[1:], 'model_service_worker'])"
)


def test_cpu_and_memory_are_told_by_process(tmp_path: Path) -> None:
    (tmp_path / "-m gateway").write_text(PARENT)
    (tmp_path / "child.py").write_text(CHILD)
    words = [sys.executable, tmp_path / "-m gateway", tmp_path / "child.py"]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as parent:
        assert parent.stdin
        before = processes.cpu(processes.tree(parent.pid))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            after = processes.cpu(processes.tree(parent.pid))
            if (cost := processes.spent(before, after)).get("worker", 0) >= 1.0:
                break
            time.sleep(0.1)
        assert cost["worker"] == pytest.approx(1.0, abs=0.3)
        assert cost["gateway"] == pytest.approx(0.3, abs=0.3)
        memory = processes.memory(processes.tree(parent.pid))
        assert set(memory) == {"worker", "gateway"}
        assert all(3 < mb < 60 for mb in memory.values())
        family = processes.tree(parent.pid)
        parent.stdin.write(b"\n")
    ended = processes.cpu(family)
    assert sorted(processes.lost(after, ended)) == ["gateway", "worker"]
    assert processes.tree(parent.pid) == []


def test_preferred_processes_come_first_in_every_session() -> None:
    words = [sys.executable, "-c", "input()"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True) as process:
        done = processes.prefer(processes.tree(process.pid))
        assert done == (os.geteuid() == 0)
        if done:
            assert os.getpriority(os.PRIO_PROCESS, process.pid) == processes.PREFERRED
            group = Path("/proc") / str(process.pid) / "autogroup"
            assert not group.exists() or f"nice {processes.PREFERRED}" in group.read_text()
        process.communicate(b"\n")
    assert not processes.prefer(processes.tree(process.pid))


def test_busy_counts_what_any_process_did() -> None:
    before, own = processes.busy(), time.process_time()
    subprocess.run([sys.executable, "-c", BURN.format(0.5)], check=True)
    assert processes.busy() - before >= 0.45 + time.process_time() - own


@pytest.mark.parametrize(
    ("command", "role"),
    [
        ("java -cp x org.pytorch.serve.ModelServer --python python", "JVM"),
        ("python ts/model_service_worker.py --sock-type unix", "worker"),
        ("python model-server/serve.py", "model server's start"),
        ("ray::ServeReplica:default:Service", "worker"),
        ("ray::ServeController", "ray's own"),
        ("python -c from multiprocessing.spawn import spawn_main; spawn_main(3)", "worker"),
        ("/usr/sbin/nginx -g daemon", "nginx"),
        ("", "others"),
    ],
)
def test_role(command: str, role: str) -> None:
    assert processes.role(command.split()) == role
