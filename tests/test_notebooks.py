"""Every notebook runs: nbdev_test on each, a few at a time, skipping the cells flagged notest, slow or gpu. A study, which has
parameters, runs through papermill at its smallest scale.

NOTEBOOK_WORKERS says how many run at once; they share the processor's cores."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from notebooks import ROOT, has_parameters, notebooks

NOTEBOOKS = [path.relative_to(ROOT).as_posix() for path in notebooks()]
WORKERS = int(os.environ.get("NOTEBOOK_WORKERS") or 2)


def command(notebook):
    if not has_parameters(ROOT / notebook):
        return [Path(sys.executable).with_name("nbdev_test"), "--path", notebook]
    options = ["-p", "scale", "smoke", "--cwd", (ROOT / notebook).parent, "--no-progress-bar", "--kernel", "python3"]
    return [sys.executable, "-m", "papermill", notebook, os.devnull, *options]


def run(notebook):
    "In a process of its own, so that no notebook leans on what another left behind."
    threads = str(max(1, (os.cpu_count() or 1) // WORKERS))
    env = os.environ | {"IN_TEST": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": threads}
    return subprocess.run(command(notebook), cwd=ROOT, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="session")
def runs(request):
    "The runs of the notebooks that this session collected, already under way."
    wanted = [item.callspec.params["notebook"] for item in request.session.items if "runs" in item.fixturenames]
    pool = ThreadPoolExecutor(WORKERS)
    yield {notebook: pool.submit(run, notebook) for notebook in wanted}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_runs(notebook, runs):
    done = runs[notebook].result()
    assert done.returncode == 0, f"{' '.join(map(str, command(notebook)))} failed:\n{done.stdout}\n{done.stderr}"
    assert has_parameters(ROOT / notebook) or "Success." in done.stdout
