"""The pipeline: from data to what the cluster serves next, where that is good enough.

    validate ─▶ train ─▶ evaluate ─┬▶ choose ─▶ gate ─▶ archive ─▶ register ─▶ release
             └▶ train ─▶ evaluate ─┘                │
                a branch a family                   └ not passed, or worse than the model in service: nothing more

Each step is a function of vertex/steps.py in a container of our own images. Those have neither a shell nor pip, so that
KFP's Python components, which begin with `sh -c "pip install kfp"`, could not start there. The families are branches
made when this is compiled, each with a name, options and a cache of its own; a loop (dsl.ParallelFor) has one of each.
The gate is asked about pictures that chose nothing, the data's test split, and compares with the model in service on
the same: both decisions are one step and one report. Its condition lies in a pipeline of its own, `deliver`, because
kfp.local 2.17 looks for a condition's values among the inputs of the pipeline around it, and nowhere else.
What goes on is decided by outputs, never by exit codes: kfp.local's DockerRunner removes a container as it ends, and
may take a step that failed quickly for one that ended well.
"""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfp import compiler, dsl

from vertex import steps

COMMAND = ["python3.11", "-m", "vertex.steps"]
# What a parameter of a step is to KFP.
KINDS = {
    str: str,
    steps.File: dsl.OutputPath(str),
    steps.Model: dsl.Output[dsl.Model],
    steps.Page: dsl.Output[dsl.HTML],
}


CACHED = (steps.train, steps.evaluate)


class PipelineError(RuntimeError):
    """A pipeline that did not end well; the message says where, and what to do."""


@dataclass(frozen=True)
class Images:
    training: str
    model_server: str


@dataclass(frozen=True)
class Machine:
    """Of each training step; the other steps have Vertex AI's own, e2-standard-4.

    It is found by what is asked for: https://docs.cloud.google.com/vertex-ai/docs/pipelines/machine-types
    """

    cpus: int
    gb: int
    gpu: str = ""
    gpus: int = 0


def component(step: Callable[..., None], image: str, branch: str = "", options: Sequence[str] = ()) -> Any:
    """A step as a KFP component, named for its branch too; `options` follow its arguments, where it takes any."""
    parameters = steps.parameters(step)

    def container(*given: Any) -> Any:
        values = [getattr(value, "uri", value) for value in given]
        words = [f"{one.name}={value}" for one, value in zip(parameters, values, strict=True)]
        return dsl.ContainerSpec(image=image, command=COMMAND, args=[step.__name__, *words, *options])

    container.__name__ = "_".join(filter(None, [step.__name__, branch]))
    container.__doc__ = (step.__doc__ or "").partition("\n")[0]
    signature = inspect.Signature([one.replace(annotation=KINDS[one.annotation]) for one in parameters])
    container.__signature__ = signature  # type: ignore[attr-defined]
    return dsl.container_component(container)


def build(families: Mapping[str, Sequence[str]], images: Images, machine: Machine | None = None) -> Any:
    """The pipeline, a branch for each family: {name: options of training.train}."""

    def task(step: Callable[..., None], branch: str = "", options: Sequence[str] = (), /, **inputs: Any) -> Any:
        # Training comes from the cache where data (by digest), options and image are as before; what else looks
        # at an address, behind which something else may lie by now, never does.
        image = images.model_server if step is steps.archive else images.training
        return component(step, image, branch, options)(**inputs).set_caching_options(step in CACHED)

    def deliver(verdict: str, bundle: str, models: str, endpoint: str, registry: str, model: str, out: str) -> None:
        with dsl.If(verdict == steps.PASSED):
            archived = task(steps.archive, bundle=bundle, models=models)
            registered = task(
                steps.register, bundle=bundle, models=models, endpoint=endpoint, registry=registry, model=model
            )
            registered.after(archived)
            task(steps.release, released=registered.outputs["released"], out=out).after(registered)

    delivery = dsl.pipeline(name="deliver")(deliver)

    def kennel(
        data: str,
        name: str,
        models: str,
        out: str,
        split: str = "test",
        require: str = "",
        in_service: str = "",
        endpoint: str = "",
        registry: str = "",
        model: str = "",
    ) -> None:
        asked = {"data": data, "split": split, "require": require, "in_service": in_service}
        digest = task(steps.validate, **asked).outputs["digest"]
        candidates = []
        for family, options in families.items():
            trained = task(steps.train, family, options, data=data, digest=digest, name=name)
            if machine:
                trained.set_cpu_limit(str(machine.cpus)).set_memory_limit(f"{machine.gb}G")
            if machine and machine.gpu:
                trained.set_accelerator_type(machine.gpu).set_accelerator_limit(machine.gpus)
            bundle = trained.outputs["bundle"]
            evaluated = task(steps.evaluate, family, family=family, bundle=bundle, data=data)
            candidates.append(str(evaluated.outputs["candidate"]))
        best = task(steps.choose, candidates="\n".join(candidates)).outputs["bundle"]
        verdict = task(steps.gate, **asked, bundle=best, out=out).outputs["verdict"]
        places = {"models": models, "endpoint": endpoint, "registry": registry, "model": model, "out": out}
        delivery(verdict=verdict, bundle=best, **places)

    return dsl.pipeline(name="kennel", description="From labelled pictures to what the cluster serves next")(kennel)


def compile_to(
    path: Path, families: Mapping[str, Sequence[str]], images: Images, machine: Machine | None = None
) -> None:
    """Write the pipeline as YAML: the same for the same arguments, to the last byte."""
    compiler.Compiler().compile(build(families, images, machine), str(path))


def in_docker(
    root: Path, folders: Sequence[Path], environment: Mapping[str, str] | None = None, *, cached: bool = False
) -> None:
    """What is called from now on runs in Docker here, as whoever calls; its containers see `root` and `folders`.

    `cached`: what was done for the same arguments is not done again; an image of the same name counts as the same.
    """
    from docker.types import Mount  # type: ignore[import-not-found]  # only here: a submission needs no engine
    from kfp import local

    root.mkdir(parents=True, exist_ok=True)
    runner = local.DockerRunner(
        entrypoint="",  # the images' own start something else
        user=f"{os.getuid()}:{os.getgid()}",
        network_mode="host",
        shm_size="1g",
        environment={"USER": "kennel", **(environment or {})},  # torch asks for a name, which a number may not have
        mounts=[Mount(str(folder), str(folder), type="bind") for folder in folders],
    )
    local.init(runner, pipeline_root=str(root), enable_caching=cached)


def run_here(path: Path, arguments: Mapping[str, str]) -> None:
    """Run a compiled pipeline where `in_docker` says. Raises PipelineError, where kfp.local sees that a step failed."""
    from kfp import components

    try:
        components.load_component_from_file(str(path))(**arguments)
    except RuntimeError as exc:
        raise PipelineError(f"{exc} What it said is above") from exc
