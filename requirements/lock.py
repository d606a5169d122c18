"""Pin every dependency group of pyproject.toml with hashes: `make lock`.

One universal resolution (all groups together, so parts never disagree on a version), then
one file a group. What only torch's CUDA build needs goes to torch-cuda.txt, which is installed
where that build is found; so one lock serves the CPU wheel and the CUDA wheel of torch.
torch-cpu.txt asks for the CPU wheel by name and is tried first: of two wheels that one lock
accepts, pip prefers the one whose index states its hash, which is rarely the small one.
"""

import re
import subprocess
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
PYPROJECT = HERE.parent / "pyproject.toml"

OTHER_PYTHON = re.compile(r"python_full_version >= '3\.12'")  # uv resolves upwards without a bound
CUDA = re.compile(r"(nvidia|cuda|triton)\b")
# The wheels of torch's own CPU index are other files than the package index has: their
# sha256 by hand, taken from the files, so that hash checking accepts either build.
TORCH_CPU = {
    "torch==2.13.0": ["6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"],
}

# Programs whose dependencies would rule ours: resolved alone, and installed into an environment of their own.
APART = ["checkov", "vertex"]


def compile_groups(groups: list[str], constraint: Path | None = None) -> dict[str, str]:
    """Resolve groups together -> {requirement line: the line with its hashes}."""
    command = ["uv", "pip", "compile", str(PYPROJECT), "--universal", "--python-version", "3.11"]
    command += ["--generate-hashes", "--no-header", "--no-annotate", "--quiet"]
    command += [word for group in groups for word in ("--group", group)]
    command += ["--constraint", str(constraint)] if constraint else []
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    entries = re.findall(r"^(\S.*?)((?: \\\n    --hash=\S+)+)$", text, re.MULTILINE)
    return {head: head + hashes for head, hashes in entries if not OTHER_PYTHON.search(head)}


def main() -> None:
    groups = [g for g in tomllib.loads(PYPROJECT.read_text())["dependency-groups"] if g not in APART]
    everything = compile_groups(groups)
    for head, hashes in TORCH_CPU.items():
        if head not in everything:
            raise SystemExit(f"{head} is not what the groups resolve to: renew TORCH_CPU in {__file__}")
        everything[head] += "".join(f" \\\n    --hash=sha256:{value}" for value in hashes)

    with tempfile.NamedTemporaryFile("w", suffix=".txt") as pins:
        pins.write("\n".join(everything))
        pins.flush()
        parts = {group: list(compile_groups([group], Path(pins.name))) for group in groups}
    locks = {group: [h for h in heads if not CUDA.match(h)] for group, heads in parts.items()}
    locks["torch-cuda"] = [head for head in everything if CUDA.match(head)]
    for head, hashes in TORCH_CPU.items():
        cpu = f"{head}+cpu ; sys_platform == 'linux' and platform_machine == 'x86_64'"
        everything[cpu] = cpu + "".join(f" \\\n    --hash=sha256:{value}" for value in hashes)
        locks["torch-cpu"] = [cpu]
    for group in APART:
        alone = compile_groups([group])
        everything |= alone
        locks[group] = list(alone)
    for name, heads in locks.items():
        lines = ["# Made by `make lock` from pyproject.toml.", *(everything[head] for head in heads)]
        (HERE / f"{name}.txt").write_text("\n".join(lines) + "\n")
        print(f"requirements/{name}.txt: {len(heads)} packages")


if __name__ == "__main__":
    main()
