"""Shared by all tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test never waits for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ORDER = {"test_project": 0, "test_wheel": 2, "test_notebooks": 3}  # every other file is 1


def pytest_collection_modifyitems(items):
    "The cheap checks of the project first, then the library's tests, the wheel and the notebooks last."
    items.sort(key=lambda item: ORDER.get(item.path.stem, 1))


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
    "A function that runs a study's notebook at the scale of the paper, with other settings, in a folder; its output is out.ipynb there."
    papermill = pytest.importorskip("papermill")

    def run(study, folder, settings):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TQDM_DISABLE", "1")
            parameters = dict(scale="paper", settings=settings)
            papermill.execute_notebook(study, folder / "out.ipynb", parameters, cwd=folder, kernel_name="python3", progress_bar=False)
        return folder

    return run
