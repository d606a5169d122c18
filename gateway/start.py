"""gunicorn with our settings, worker and log.

It forks the worker processes; each makes its own app, and with it its own channel.
"""

import ctypes
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from gunicorn.app.base import BaseApplication

from gateway.settings import Settings

ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}
SECONDS = 5.0  # between two times that free memory goes back to the system


class Server(BaseApplication):  # type: ignore[misc]
    def __init__(self, settings: Settings, shared: Path) -> None:
        self.settings, self.shared = settings, shared
        super().__init__()

    def load_config(self) -> None:
        from gateway.telemetry import LOGGING

        options: dict[str, Any] = {
            "bind": f"{self.settings.host}:{self.settings.port}",
            "worker_class": "gateway.worker.Worker",
            "workers": self.settings.worker_processes,
            "threads": self.settings.worker_threads,
            "graceful_timeout": int(self.settings.grace_seconds),
            # Longer than the load balancers in front keep their connections (GKE: 600 s).
            "keepalive": 620,
            "worker_tmp_dir": str(self.shared),
            "logconfig_dict": LOGGING,
            "logger_class": "gateway.worker.Log",
            "when_ready": _heed,
            "post_worker_init": _heed,
            "child_exit": _forget,
            "worker_exit": _tell_the_rest,
            "control_socket_disable": True,
        }
        for key, value in options.items():
            self.cfg.set(key, value)

    def load(self) -> Any:
        """In each worker process."""
        from gateway.app import create_app
        from gateway.telemetry import later

        later.begin()
        threading.Thread(target=_keep_giving_memory_back, daemon=True).start()
        return create_app(self.settings, self.shared / "ready")


def _hold() -> None:
    """A signal to end waits until it can be heeded. It would be lost on a worker process just forked, which has the
    main process's handlers until it sets its own: the gateway would end only after its grace. And a container's first
    process without a handler goes on."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)


def _heed(_: Any = None) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


def _tell_the_rest(_: Any, __: Any) -> None:
    from gateway.telemetry import later

    later.flush()


def _forget(_: Any, worker: Any) -> None:
    """A worker process that ended no longer counts in gauges."""
    from prometheus_client import multiprocess

    multiprocess.mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]


def _keep_giving_memory_back() -> None:
    """What overload took, whose bodies lie scattered among what stays, goes back once it is over."""
    from gateway.turn import turn

    if hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        while True:
            time.sleep(SECONDS)
            if not turn.needed:  # it holds up every thread
                library.malloc_trim(0)


def main() -> None:
    _hold()
    os.register_at_fork(before=_hold, after_in_parent=_heed)
    settings = Settings.from_environment()
    with tempfile.TemporaryDirectory(prefix="gateway-") as shared:
        # Read by prometheus_client when it is imported, which is why the imports above wait.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = shared
        Server(settings, Path(shared)).run()
