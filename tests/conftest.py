"""Shared by all tests."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

WORKERS = int(os.environ.get("NOTEBOOK_WORKERS") or 2)  # pytest itself is one of them
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test never waits for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))  # they share the processor's cores

BYTECODE = Path(__file__).parent.parent / ".cache" / "bytecode"
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):  # or each of some hundred processes would compile PyTorch and transformers anew
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(BYTECODE)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix

ORDER = {"test_project": 0, "test_wheel": 2, "test_notebooks": 3}  # every other file is 1


def pytest_collection_modifyitems(items):
    "The cheap checks of the project first, then the library's tests, the wheel and the notebooks last."
    items.sort(key=lambda item: ORDER.get(item.path.stem, 1))


@pytest.fixture(scope="session")
def runs(request):
    """The runs of the notebooks that this session collected, under way while pytest does the other tests, which keep one core busy.
    The last ones, which are the longest, come first: pytest takes those that are left from the other end."""
    from test_notebooks import run

    wanted = [item.callspec.params["notebook"] for item in request.session.items if item.path.stem == "test_notebooks"]
    pool = ThreadPoolExecutor(max(1, WORKERS - 1))
    yield {notebook: pool.submit(run, notebook) for notebook in reversed(wanted)} if WORKERS > 1 else {}
    pool.shutdown(cancel_futures=True)


@pytest.fixture(autouse=True)
def notebooks_under_way(request):
    "They begin after the tests of the project, which want to find its files as they are."
    if request.node.path.stem != "test_project":
        request.getfixturevalue("runs")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    "An empty cache folder, for the tests of what fills it."
    monkeypatch.setenv("ONESHOT_STEERING_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The folder of the site, built as `make docs` builds it."
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"the site cannot be built:\n{done.stdout}\n{done.stderr}"
    return folder


@pytest.fixture(scope="session")
def run_study():
    "A function that runs a study's notebook at a scale of the paper, with other settings, in a folder; its output is out.ipynb there."
    papermill = pytest.importorskip("papermill")

    def run(study, folder, settings, scale="paper"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TQDM_DISABLE", "1")
            parameters = dict(scale=scale, settings=settings)
            papermill.execute_notebook(study, folder / "out.ipynb", parameters, cwd=folder, kernel_name="python3", progress_bar=False)
        return folder

    return run
