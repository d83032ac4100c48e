"""The project agrees with itself: what is made from notebooks is what they make, and they are clean and executed."""

import ast
import base64
import io
import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
import shape
from notebooks import NBS, ROOT, directives, notebooks, readme_text, table_by_row
from PIL import Image
from prose import files, rewrite

PACKAGE = ROOT / "oneshot_steering"
BY_HAND = {"__init__.py", "all.py", "organisms/__init__.py"}  # the only modules that no notebook makes
NOTEBOOKS = {path.relative_to(NBS).as_posix(): path for path in notebooks()}
SHORT_LINES = re.compile(r"08|09|10|11|12|14|16_|index")  # notebooks with no line of code beyond 120 characters
each_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


def tool(name, *args, cwd=ROOT):
    "Run a command of this environment; its output is the message when it fails."
    done = subprocess.run([Path(sys.executable).with_name(name), *args], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{name} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def read(name):
    return nbformat.read(NOTEBOOKS[name], as_version=4)


def code_cells(name):
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def text_of(output):
    "All that an output shows as text: of a stream, an error or a display."
    data = {kind: value for kind, value in output.get("data", {}).items() if kind.startswith("text/")}
    return "".join([output.get("text", ""), *map(str, data.values()), *output.get("traceback", [])])


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    "A copy of the project whose modules were all exported anew and whose notebooks were all cleaned anew."
    root = tmp_path_factory.mktemp("fresh")
    shutil.copy(ROOT / "settings.ini", root)
    shutil.copytree(NBS, root / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (root / PACKAGE.name).mkdir()
    for name in BY_HAND:
        if (PACKAGE / name).exists():
            target = root / PACKAGE.name / name
            target.parent.mkdir(exist_ok=True)
            shutil.copy(PACKAGE / name, target)
    tool("nbdev_export", cwd=root)
    tool("nbdev_clean", cwd=root)
    return root


def modules(root):
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in (root / PACKAGE.name).rglob("*.py")}


def test_package_is_what_the_notebooks_export(fresh):
    here, there = modules(ROOT), modules(fresh)
    assert sorted(here.keys() - there.keys()) == [], "modules that no notebook makes: delete them"
    differ = [name for name in there if here.get(name) != there[name]]
    assert differ == [], "not what the notebooks export: run `make export`"


@each_notebook
def test_notebook_is_valid(name):
    nbformat.validate(json.loads(NOTEBOOKS[name].read_text(encoding="utf-8")))


@each_notebook
def test_notebook_is_clean(name, fresh):
    same = NOTEBOOKS[name].read_bytes() == (fresh / "nbs" / name).read_bytes()
    assert same, "run `nbdev_clean`"
    assert "widgets" not in list(read(name).metadata), f"widget state was saved: run `make notebooks NBS=nbs/{name}`"


@each_notebook
def test_notebook_was_executed(name):
    runnable = [cell for cell in code_cells(name) if not directives(cell) & {"eval: false", "gpu"}]
    shown = [cell for cell in runnable if not any(d.split()[0] in ("default_exp", "hide") for d in directives(cell))]
    executed = not shown or any(cell.outputs for cell in shown)
    assert executed, f"no cell has an output: run `make notebooks NBS=nbs/{name}`"


@each_notebook
def test_outputs_are_fit_to_be_read(name):
    machine = rf"site-packages|/tmp/ipykernel|{re.escape(str(ROOT))}|{re.escape(sys.prefix)}"
    for cell in code_cells(name):
        for output in cell.outputs:
            assert output.output_type != "error", f"an error was saved:\n{text_of(output)}"
            assert output.get("name") != "stderr", f"stderr was saved:\n{text_of(output)}"
            assert not re.search(machine, text_of(output)), f"a path of one machine was saved:\n{text_of(output)}"


@each_notebook
def test_outputs_make_small_diffs(name):
    remedy = "run `make tidy`"
    for output in (output for cell in code_cells(name) for output in cell.outputs):
        data = output.get("data", {})
        table = data.get("text/html", "")
        if "<table" in table:
            assert "text/plain" not in data, f"a table was saved as HTML and as text: {remedy}"
            assert table == table_by_row(table), f"a table was not saved with a line per row: {remedy}"
        if "image/png" in data:
            picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
            assert picture.mode == "P", f"a picture was saved with 24 bits per point: {remedy}"


def test_readme_is_what_index_gives():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme_text(), "run `make readme`"


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_readme_has_no_figure_left_to_fill_in():
    left = [line for line in readme_text().splitlines() if "TO MEASURE" in line]
    assert left == []


def test_markdown_has_one_sentence_a_line():
    left = [path.name for path in files() if rewrite(path, write=False)]
    assert left == [], "run `python tools/prose.py`"


def test_ruff():
    tool("ruff", "check", ".")


@each_notebook
def test_lines_of_code_can_be_read(name):
    lines = [line for cell in code_cells(name) if "Markdown(" not in cell.source for line in cell.source.splitlines()]
    most = 120 if SHORT_LINES.match(name) else 140  # studies and tutorials: see their ruff.toml
    long = [line for line in lines if len(line) > most and not line.startswith("#|")]  # sentences are as long as they are
    assert long == [], f"lines of code have at most {most} characters here, better 120"


def test_modules_keep_to_the_order_in_which_they_are_read():
    assert shape.circles() == []
    assert shape.against_the_order() == []


def test_modules_take_nothing_private_from_each_other():
    assert shape.private_across_modules() == []


def test_long_literals_are_files():
    assert shape.long_literals() == [], "put data of more than thirty lines into oneshot_steering/data"


def test_versions_agree():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    expected = config["DEFAULT"]["version"]
    assert f'__version__ = "{expected}"' in (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    assert version("oneshot-steering") == expected, "installed from an older settings.ini: run `make test` again"
    assert f"## [{expected}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_no_file_names_a_package_registry():
    "Where packages come from is for the reader's own pip to know."
    hosts = [".".join(parts) for parts in [("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"), ("deb", "debian", "org"),
                                           ("download", "pytorch", "org")]]  # fmt: skip
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    named = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and path.suffix not in {".png", ".safetensors"}:
            text = path.read_text(encoding="utf-8", errors="ignore")
            named += [(name, host) for host in hosts if host in text]
    assert named == []


def test_one_import_names_what_it_gives():
    "`from oneshot_steering.all import *` lists its names, and leaves out what the command, other programs and inner modules hold."
    tree = ast.parse((ROOT / "oneshot_steering" / "all.py").read_text(encoding="utf-8"))
    taken = {node.module: {alias.name for alias in node.names} for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert "*" not in set().union(*taken.values())
    apart = {f"oneshot_steering.{name}" for name in ("app", "cli", "demos", "files", "inspect_provider", "widget_base")}
    assert taken.keys() & apart == set()
