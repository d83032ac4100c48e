"""What notebooks need and nbdev leaves to Quarto: `readme` makes README.md from nbs/index.ipynb,
`execute [NOTEBOOK or FOLDER ...]` runs notebooks in place (all of them by default) and cleans them,
`tidy [NOTEBOOK or FOLDER ...]` only saves the outputs that are there in the form in which they are kept.
And `claims [SCALE]` prints what the studies found."""

import base64
import io
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
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
REAL = NBS / "studies" / "real"  # studies that take an hour and need data of yours


def notebooks(path=NBS):
    "The notebooks at or under `path`, in reading order: the numbered ones, then each folder."
    found = [path] if path.is_file() else [p for p in path.rglob("*.ipynb") if not hidden(p.relative_to(path))]
    return sorted(found, key=lambda p: (len(p.relative_to(path).parts), p))


def to_execute(path):
    "The notebooks at or under `path`, studies of real models only where they are asked for."
    return [notebook for notebook in notebooks(path) if path.is_relative_to(REAL) or not notebook.is_relative_to(REAL)]


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
    for number, cell in enumerate(nb.cells):
        if "echo: false" in directives(cell):  # only its output is shown, which is Markdown
            text = "\n\n".join("".join(output.data["text/markdown"]) for output in cell.outputs)
            nb.cells[number] = nbformat.v4.new_markdown_cell(text)
        elif cell.cell_type == "code":
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
        if not directives(cell) & skipped:
            await super().async_execute_cell(cell, cell_index, **kwargs)
        if cell_index == len(self.nb.cells) - 1:  # what a study opens with is what it has just found
            for index, verdict in enumerate(self.nb.cells):
                if "verdict" in directives(verdict):
                    await super().async_execute_cell(verdict, index, **kwargs)
        return cell


def has_gpu():
    import torch

    return torch.cuda.is_available()


WIDGET = "application/vnd.jupyter.widget-view+json"  # shows nothing without a kernel, so the text stays with it


def tidy(cell):
    """Keep each output of a cell in one form, so that a change of it is seen once: a table as HTML with a row per line (GitHub,
    JupyterLab and the site all show it), a picture as an 8-bit PNG, what a library wrote to stderr not at all."""
    outputs = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
    for output in outputs:
        data = output.get("data", {})
        if WIDGET not in data and data.keys() & {"text/html", "image/png"}:
            data.pop("text/plain", None)
        if "<table" in data.get("text/html", ""):
            data["text/html"] = table_by_row(data["text/html"])
        if "image/png" in data:
            data["image/png"] = palette(data["image/png"])
    if "outputs" in cell:
        cell.outputs = outputs


def table_by_row(text):
    "The HTML of a DataFrame with each row on one line; other HTML as it is."
    if 'class="dataframe"' not in text:
        return text
    text = re.sub(r"<style scoped>.*?</style>\s*", "", text, flags=re.DOTALL)
    return re.sub(r"<tr.*?</tr>", lambda row: re.sub(r">\s*\n\s*<", "><", row[0]), text, flags=re.DOTALL)


def palette(png):
    "A PNG (in base64) with at most 256 colours: a third of the size, and no channel differs by more than a few steps of 255."
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    if image.mode == "P":
        return png
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    image = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def save(nb, path):
    "Write a notebook with tidy outputs; a file that would not change is left alone."
    for cell in nb.cells:
        tidy(cell)
    if nbformat.writes(nb) + "\n" != path.read_text(encoding="utf-8"):
        nbformat.write(nb, path)
        subprocess.run([Path(sys.executable).with_name("nbdev_clean"), "--fname", path], cwd=ROOT, check=True)


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
    save(nb, path)
    print(f"{time.monotonic() - start:6.1f} s  {path.relative_to(ROOT)}", flush=True)
    return True


def print_claims(scale="laptop"):
    import pandas as pd

    from oneshot_steering.study import claims_table

    with pd.option_context("display.max_colwidth", 60, "display.width", 200):
        print(claims_table(NBS / "studies" / "claims", scale).to_string(index=False))


def main(command, *paths):
    if command == "readme":
        (ROOT / "README.md").write_text(readme_text(), encoding="utf-8")
    elif command == "execute":
        # IN_TEST keeps an nbdev_export() cell from rewriting the package; a progress bar is noise in a saved output.
        os.environ.update(IN_TEST="1", TQDM_DISABLE="1")
        results = [execute(nb) for path in paths or [NBS] for nb in to_execute(Path(path).resolve())]
        sys.exit(not all(results))
    elif command == "tidy":
        for path in paths or [NBS]:
            for notebook in notebooks(Path(path).resolve()):
                save(nbformat.read(notebook, as_version=4), notebook)
    elif command == "claims":
        print_claims(*paths)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["help"])
