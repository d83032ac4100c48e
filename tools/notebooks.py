"""Two things that notebooks need and nbdev leaves to Quarto: `readme` makes README.md from nbs/index.ipynb,
`execute [NOTEBOOK or FOLDER ...]` runs notebooks in place (all of them by default) and cleans them.
And `claims` prints what the studies found."""

import os
import posixpath
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"


def notebooks(path=NBS):
    "The notebooks at or under `path`, in reading order: the numbered ones, then each folder."
    found = [path] if path.is_file() else [p for p in path.rglob("*.ipynb") if not hidden(p.relative_to(path))]
    return sorted(found, key=lambda p: (len(p.relative_to(path).parts), p))


def hidden(path):
    return any(part.startswith((".", "_")) for part in path.parts)


def directives(cell):
    "The `#|` lines at the top of a code cell: {'hide', 'eval: false', ...}."
    lines = cell.source.splitlines() if cell.cell_type == "code" else []
    return {line[2:].strip() for line in lines if line.startswith("#|")}


def readme_text():
    "What README.md must say: index.ipynb without hidden cells, with links that work from the project's folder."
    nb = nbformat.read(NBS / "index.ipynb", as_version=4)
    nb.metadata.language_info = {"name": "python"}
    nb.cells = [cell for cell in nb.cells if not directives(cell) & {"hide", "include: false"}]
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.source = re.sub(r"^#\|.*\n", "", cell.source, flags=re.MULTILINE)
    text, resources = MarkdownExporter().from_notebook_node(nb)
    if resources.get("outputs"):
        raise ValueError("index.ipynb has a picture in an output: save it in nbs/images and link to it instead.")
    text = re.sub(r"\]\((?![a-z]+:|#)([^)\s]+)", lambda m: f"]({posixpath.normpath(posixpath.join('nbs', m[1]))}", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def has_parameters(path):
    "Whether papermill can run this notebook at another scale."
    nb = nbformat.read(path, as_version=4)
    return any("parameters" in cell.metadata.get("tags", []) for cell in nb.cells)


class Runner(NotebookClient):
    "Runs what nbdev_test runs plus the slow cells; cells that cannot run here keep the output that they have."

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        skipped = {"eval: false"} if has_gpu() else {"eval: false", "gpu"}
        return cell if directives(cell) & skipped else await super().async_execute_cell(cell, cell_index, **kwargs)


def has_gpu():
    import torch

    return torch.cuda.is_available()


def execute(path):
    "Run one notebook where it lies and write it back with its outputs; a notebook that fails stays as it was."
    nb, start = nbformat.read(path, as_version=4), time.monotonic()
    nb.metadata.pop("widgets", None)  # the state of an earlier session's widgets
    runner = Runner(
        nb,
        timeout=None,
        kernel_name="python3",
        store_widget_state=False,
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    try:
        runner.execute()
    except CellExecutionError as error:
        print(f"FAILED {path.relative_to(ROOT)}\n{error}", flush=True)
        return False
    nbformat.write(nb, path)
    subprocess.run([Path(sys.executable).with_name("nbdev_clean"), "--fname", path], cwd=ROOT, check=True)
    print(f"{time.monotonic() - start:6.1f} s  {path.relative_to(ROOT)}", flush=True)
    return True


def print_claims():
    import pandas as pd

    from oneshot_steering.study import claims_table

    with pd.option_context("display.max_colwidth", 60, "display.width", 200):
        print(claims_table(NBS / "studies" / "claims").to_string(index=False))


def main(command, *paths):
    if command == "readme":
        (ROOT / "README.md").write_text(readme_text(), encoding="utf-8")
    elif command == "execute":
        # IN_TEST keeps an nbdev_export() cell from rewriting the package; a progress bar is noise in a saved output.
        os.environ.update(IN_TEST="1", TQDM_DISABLE="1")
        results = [execute(nb) for path in paths or [NBS] for nb in notebooks(Path(path).resolve())]
        sys.exit(not all(results))
    elif command == "claims":
        print_claims()
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["help"])
