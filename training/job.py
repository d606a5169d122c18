"""What a Vertex AI custom job runs: training.train over all its workers and GPUs, from and to its bucket.

    python -m training.job DATA [options of training.train but --out, --checkpoints, --scalars and --cache]

Reads the variables that Vertex AI sets for a job with a base output directory:
https://cloud.google.com/vertex-ai/docs/training/code-requirements

    AIP_MODEL_DIR             gs://bucket/base/model/: where the bundle goes, manifest.json last. Beside it, in the
                              base, go report.html, report.json and curve.json; with --int8 quantize.json and
                              model-int8/; the bundle that failed the gate goes to the base's rejected/
    AIP_CHECKPOINT_DIR        where the run's state goes, and where it is found after a preemption
    AIP_TENSORBOARD_LOG_DIR   where the scalars go
    CLUSTER_SPEC              the workers, see Cluster
    CLOUD_ML_HP_METRIC_FILE   in a tuning trial: where the metric "accuracy" goes

Plain folders do as well as gs://. With several workers the same command runs on each. Exit codes are
training.train's: 0 good; 1 bad input; 3 the gate failed; 75 stopped by SIGTERM: the same command goes on.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bundle.cpus import whole_cpus

# The libraries are imported where they are used: who only starts processes needs few of them.

STOPPED = os.EX_TEMPFAIL  # 75, as training.train's
WAIT_S = 1800  # for the other workers: Vertex AI starts each when it has its machine
OURS = ("--out", "--checkpoints", "--scalars", "--cache")
METRIC = "accuracy"


class JobError(ValueError):
    """A job whose environment is not a job's; the message names the variable and what would be right."""


@dataclass(frozen=True)
class Places:
    """Where the results go: folders or gs://bucket/path, without a slash at the end."""

    model: str
    checkpoints: str
    logs: str

    @property
    def base(self) -> str:
        return os.path.dirname(self.model) or "."

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "Places":
        """Raises JobError where a variable is missing."""
        keys = ("AIP_MODEL_DIR", "AIP_CHECKPOINT_DIR", "AIP_TENSORBOARD_LOG_DIR")
        if missing := [key for key in keys if not environ.get(key)]:
            raise JobError(
                f"{', '.join(missing)} not set: Vertex AI sets them for a job with a base output directory "
                "(baseOutputDirectory); elsewhere name a gs://bucket/path or a folder in each"
            )
        return cls(*(environ[key].rstrip("/") for key in keys))


@dataclass(frozen=True)
class Cluster:
    """The workers of a job: this one's number, from 0, how many there are, and where they meet.

    From CLUSTER_SPEC: https://cloud.google.com/vertex-ai/docs/training/distributed-training
    Worker 0 is the one replica of workerpool0, whose end is the job's.
    """

    worker: int = 0
    workers: int = 1
    host: str = ""
    port: int = 0

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "Cluster":
        """One worker where there is no CLUSTER_SPEC. Raises JobError for one that is none."""
        if not (text := environ.get("CLUSTER_SPEC")):
            return cls()
        try:
            spec = json.loads(text)
            pools, task = spec["cluster"], spec["task"]
            names = [(pool, i) for pool in sorted(pools) for i in range(len(pools[pool]))]
            host, _, port = pools["workerpool0"][0].rpartition(":")
            ports = spec.get("open_ports") or [port]
            return cls(names.index((task["type"], int(task["index"]))), len(names), host, int(ports[0]))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as exc:
            raise JobError(
                f"CLUSTER_SPEC={text!r} is not as Vertex AI writes it ({type(exc).__name__}: {exc}): it needs "
                'cluster.workerpool0 ["host:port"], task.type, task.index and open_ports'
            ) from exc


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _stop)  # as the first process of a container this one has no default for it
    try:
        places, cluster = Places.from_environment(os.environ), Cluster.from_environment(os.environ)
        if given := [word for word in arguments if word.split("=")[0] in OURS]:
            raise JobError(f"{given[0]}: a job's results go where the AIP_ variables say; leave it out")
        if "TORCHELASTIC_RUN_ID" in os.environ:  # one of the processes that `_launch` starts
            return _train(arguments, places)
        known = argparse.ArgumentParser(add_help=False)
        known.add_argument("--quick", action="store_true")
        known.add_argument("--device", default="")
        known.add_argument("--workers", type=int, default=-1)
        options, _ = known.parse_known_args(arguments)
        if options.quick and cluster.worker > 0:
            print("job: with --quick the first worker does it all; this one has nothing to do", file=sys.stderr)
            return 0
        processes = 1 if options.quick else _processes(options.device)
        if options.quick or cluster.workers * processes == 1:
            for key in ("RANK", "WORLD_SIZE"):  # another launcher's: here is one process
                os.environ.pop(key, None)
            return _train(arguments, places)
        if processes > 1 and options.workers < 0:  # pictures are decoded for every GPU
            arguments += ["--workers", str(max(1, whole_cpus() // processes))]
        return _launch(arguments, cluster, processes)
    except JobError as exc:
        print(f"job: {exc}", file=sys.stderr)
        return 1


def _processes(device: str) -> int:
    """Of training on this worker: one a GPU, or one."""
    import torch

    return max(1, torch.cuda.device_count()) if device in ("", "cuda") else 1


def _launch(arguments: list[str], cluster: Cluster, processes: int) -> int:
    """torchrun over all workers, `processes` on each -> the exit code of this worker."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    first = cluster.worker == 0
    config = LaunchConfig(
        min_nodes=cluster.workers,
        max_nodes=cluster.workers,
        nproc_per_node=processes,
        run_id="kennel",
        rdzv_backend="c10d",
        rdzv_endpoint=f"{cluster.host or 'localhost'}:{cluster.port}",
        # Whether a name is this machine's is not guessed. The store's own time limit is read_timeout.
        rdzv_configs={"is_host": first, "read_timeout": WAIT_S, "join_timeout": WAIT_S},
        max_restarts=0,  # the job is restarted, and goes on from its checkpoint
        # Ranks are given in the order of these names: rank 0, which makes the bundle, must be the first worker.
        local_addr=(cluster.host or "localhost") if first else f"~{cluster.worker:04}",
    )
    print(
        f"job: worker {cluster.worker} of {cluster.workers}, {processes} processes, meeting at {config.rdzv_endpoint}",
        file=sys.stderr,
        flush=True,
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "training.job", *arguments)
    except ChildFailedError as exc:
        code = exc.get_first_failure()[1].exitcode
        return code if code > 0 else 1
    except SignalException:
        return STOPPED
    except (RendezvousError, TimeoutError) as exc:
        raise JobError(
            f"the {cluster.workers} workers did not meet at {config.rdzv_endpoint} within {WAIT_S} s ({exc}): see "
            "the logs of the others"
        ) from exc
    return 0


def _train(arguments: list[str], places: Places) -> int:
    """training.train in this process, its results to their places -> the exit code."""
    from training import train
    from training.publish import publish, put

    trial = Trial.from_environment(os.environ)

    def judged(epoch: int, accuracy: float) -> None:
        if trial:
            trial.report(accuracy, epoch)

    def finished(bundle: Path, code: int) -> None:
        for kind in ("report.html", "report.json", "curve.json"):
            if (file := Path(f"{out}.{kind}")).exists():
                put(file, f"{places.base}/{kind}")
        if (file := out.with_name("model-int8.quantize.json")).exists():
            put(file, f"{places.base}/quantize.json")
        if (int8 := out.with_name("model-int8")).exists():
            publish(int8, f"{places.model}-int8")
        target = f"{places.base}/rejected" if code == train.GATE_FAILED else places.model
        made = publish(bundle, target)
        print(f"job: {target} is {made.name} {made.version}, sha256={made.digest}")
        if trial:  # once more, as the bundle has it; the last report is the trial's
            curve = Path(f"{out}.curve.json")
            epochs = len(json.loads(curve.read_text())["validation_accuracy"]) if curve.exists() else 0
            trial.report(made.metrics["validation"][METRIC], epochs + 1)

    with tempfile.TemporaryDirectory(prefix="job-") as scratch:
        out = Path(scratch) / "model"
        ours = ["--out", str(out), "--cache", f"{scratch}/cache"]
        ours += ["--checkpoints", places.checkpoints, "--scalars", places.logs]
        return train.main([*arguments, *ours], train.Hooks(judged, finished))


@dataclass(frozen=True)
class Trial:
    """A trial of a hyperparameter tuning job: its metric goes to a file that Vertex AI reads.

    Written as cloudml-hypertune 0.1.0.dev6 writes it, one JSON object a line, every value a string but the
    time. That package has no wheel, crashes where the path has no folder, and begins the file anew in every
    process. https://cloud.google.com/vertex-ai/docs/training/using-hyperparameter-tuning
    """

    file: Path
    number: str

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "Trial | None":
        """None where this is no trial."""
        if not (file := environ.get("CLOUD_ML_HP_METRIC_FILE")):
            return None
        return cls(Path(file), environ.get("CLOUD_ML_TRIAL_ID", "0"))

    def report(self, value: float, step: int) -> None:
        line = {"timestamp": time.time(), "trial": self.number, METRIC: str(float(value))}
        line |= {"global_step": str(step), "checkpoint_path": ""}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(line, sort_keys=True) + "\n")


def _stop(*_: object) -> None:
    print("job: stopped by SIGTERM; the same command goes on", file=sys.stderr)
    raise SystemExit(STOPPED)


if __name__ == "__main__":
    sys.exit(main())
