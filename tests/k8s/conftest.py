import shutil

import pytest
from manifests import COMPONENTS, OVERLAYS, Combination, Rendered, Tree, every_combination, render, render_all


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not there, which renders the manifests")
    return Tree(tmp_path_factory.mktemp("rendered"))


@pytest.fixture(scope="session")
def everything(tree: Tree) -> list[Rendered]:
    """Every combination of components, on base and on the overlays."""
    return list(render_all(tree, every_combination()))


@pytest.fixture(scope="session")
def singles(tree: Tree) -> list[Rendered]:
    """Base and each overlay as they are, and base with each component: in their own namespace."""
    wanted = [Combination(), *(Combination(name) for name in OVERLAYS), *(Combination("", (c,)) for c in COMPONENTS)]
    return [render(tree, one) for one in wanted]
