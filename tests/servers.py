"""Real servers for tests."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from local import run


@dataclass(frozen=True)
class Kennel:
    """Both processes and what they serve. `log` has what they printed."""

    running: run.Running
    bundles: dict[str, Path]
    log: Path
    target: str  # the model server's gRPC address

    @property
    def url(self) -> str:
        return self.running.url


@contextlib.contextmanager
def model_server(store: Path, grpc_port: int, log: Path, *bundles: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One model server of these bundles, not yet ready."""
    command = [sys.executable, "model-server/archive.py", *map(str, bundles), "--store", str(store)]
    subprocess.run(command, cwd=run.ROOT, env=run.environment(), check=True, stdout=subprocess.DEVNULL)
    with log.open("ab") as output:
        process = run.start_model_server(store, grpc_port, output)
        try:
            yield process
        finally:
            run.end(process)
