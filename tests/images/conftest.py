import subprocess
import uuid

import pytest
from containers import ROOT, docker, engine, make


@pytest.fixture(scope="session")
def images():
    """The images, built by the README's commands: {part: name}."""
    if reason := engine():
        pytest.skip(reason)
    subprocess.run([ROOT / "tests/images/base.sh"], check=True)
    made = make("endpoint-image")  # it is made of the others
    print(made)
    names = [line.split()[0] for line in made.splitlines() if line.startswith("  kennel/")]
    return {name.removeprefix("kennel/").split(":")[0]: name for name in names}


@pytest.fixture(scope="module")
def network():
    name = f"kennel-{uuid.uuid4().hex[:8]}"
    docker("network", "create", name)
    yield name
    docker("network", "rm", name, check=False)
