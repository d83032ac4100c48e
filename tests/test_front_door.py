"""`import oneshot_steering as oss`: fast, complete, and the same objects as in the modules."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from importlib.metadata import packages_distributions

import nbformat
import pytest
from notebooks import NBS, ROOT, directives, notebooks

import oneshot_steering as oss

SETTINGS = {"FLIP_DEMO", "TEXT_DEMO", "CAREFUL_DEMO", "OPEN_DEMO", "REAL_MODEL", "READABLE_RATES", "human_continuations", "text_prompts"}
HEAVY = {"torch", "transformers", "pandas", "numpy", "matplotlib", "sklearn", "ipywidgets", "fastcore"}


def fresh(code):
    "What a new interpreter prints."
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_import_loads_nothing_else():
    loaded = set(fresh("import sys, oneshot_steering; print(*sys.modules)"))
    assert loaded & HEAVY == set()
    assert {name for name in loaded if name.startswith("oneshot_steering.")} == set()


def test_names_are_shown_before_they_are_loaded():
    shown, loaded = fresh("import sys, oneshot_steering as oss; print(','.join(dir(oss)), 'torch' in sys.modules)")
    assert set(oss.__all__) <= set(shown.split(",")) and loaded == "False"


@pytest.mark.parametrize("name", oss.__all__)
def test_name_is_that_of_its_module(name):
    value = getattr(oss, name)
    assert value is getattr(importlib.import_module(value.__module__), name)
    assert inspect.getdoc(value)


def test_functions_win_over_modules_of_the_same_name():
    "Before a module of that name is imported, after it, and when another module imports it."
    shown = "print(callable(oss.optimize), callable(oss.calibrate), callable(oss.surprisal))"
    code = ["import oneshot_steering as oss", "oss.optimize_many", shown, "import oneshot_steering.all, oneshot_steering.calibrate", shown]
    assert fresh("\n".join(code)) == ["True"] * 6


def test_what_editors_read_is_what_there_is():
    tree = ast.parse((ROOT / "oneshot_steering" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    read = {alias.name: node.module for node in block.body for alias in node.names}
    assert read == oss._FRONT_DOOR


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        _ = oss.optimise


def test_all_leaks_nothing():
    "No inner name of an organism, nothing that hides a package."
    everything = importlib.import_module("oneshot_steering.all")
    names = [name for name in getattr(everything, "__all__", vars(everything)) if not name.startswith("_")]
    assert set(oss.__all__) <= set(names)
    of = {name: getattr(vars(everything)[name], "__module__", None) or "" for name in names}
    inner = [name for name in names if str(of[name]).startswith("oneshot_steering.organisms.")]
    assert set(inner) <= set(importlib.import_module("oneshot_steering.organisms").__all__)
    packages = {*packages_distributions(), *sys.stdlib_module_names, "requests"}
    assert [name for name in names if name in packages] == []
    values = {name: vars(everything)[name] for name in names}
    assert [name for name, value in values.items() if inspect.isroutine(value) or inspect.isclass(value) if not inspect.getdoc(value)] == []


@pytest.mark.parametrize("path", [path for path in notebooks() if not path.stem.endswith("_cli")], ids=lambda path: path.stem)
def test_no_notebook_imports_the_command(path):
    code = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    assert "oneshot_steering.cli" not in code


def test_tutorials_take_only_settings_and_texts_from_the_demonstrations():
    "What a tutorial does is seen in its cells, so that they can be copied to one's own model."
    for path in notebooks(NBS / "tutorials"):
        cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code" and "hide" not in directives(cell)]
        nodes = [node for cell in cells for node in ast.walk(ast.parse(re.sub(r"^[!%].*", "", cell.source, flags=re.MULTILINE)))]
        taken = [alias.name for node in nodes if getattr(node, "module", "") == "oneshot_steering.demos" for alias in node.names]
        assert set(taken) <= SETTINGS, path.stem
