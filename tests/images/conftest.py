import os
import subprocess
import uuid

import pytest
from containers import ROOT, docker, engine


@pytest.fixture(scope="session")
def images():
    """The three images, built by the README's command: {part: name}."""
    if reason := engine():
        pytest.skip(reason)
    subprocess.run([ROOT / "tests/images/base.sh"], check=True)
    made = subprocess.run(["make", "images"], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-6000:]
    print(made.stdout)
    names = [line.split()[0] for line in made.stdout.splitlines() if line.startswith("  kennel/")]
    return {name.removeprefix("kennel/").split(":")[0]: name for name in names}


@pytest.fixture(scope="module")
def network():
    name = f"kennel-{uuid.uuid4().hex[:8]}"
    docker("network", "create", name)
    yield name
    docker("network", "rm", name, check=False)
