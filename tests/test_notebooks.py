"""Every notebook runs: nbdev_test on each, a few at a time, skipping the cells flagged notest, slow or gpu. A study, which has
parameters, runs through papermill at its smallest scale.

NOTEBOOK_WORKERS says how many run at once; pytest is one of them, the others are under way from the beginning (`runs`)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from notebooks import ROOT, has_parameters, notebooks

NOTEBOOKS = [path.relative_to(ROOT).as_posix() for path in notebooks()]
ENVIRONMENT = os.environ | {"IN_TEST": "1", "TQDM_DISABLE": "1"}  # as it is now: other tests change it while notebooks begin


def command(notebook):
    if not has_parameters(ROOT / notebook):
        return [Path(sys.executable).with_name("nbdev_test"), "--path", notebook]
    options = ["-p", "scale", "smoke", "--cwd", (ROOT / notebook).parent, "--no-progress-bar", "--kernel", "python3"]
    return [sys.executable, "-m", "papermill", notebook, os.devnull, *options]


def run(notebook):
    "In a process of its own, so that no notebook leans on what another left behind."
    return subprocess.run(command(notebook), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_runs(notebook, runs):
    begun = runs.get(notebook)
    done = run(notebook) if begun is None or begun.cancel() else begun.result()
    assert done.returncode == 0, f"{' '.join(map(str, command(notebook)))} failed:\n{done.stdout}\n{done.stderr}"
    assert has_parameters(ROOT / notebook) or "Success." in done.stdout
