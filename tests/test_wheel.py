"""The wheel and the sdist hold what they must, and the wheel works where nothing else is installed."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_NEEDED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "nbs", "out")

TINY_RUN = """
from importlib.metadata import version
import oneshot_steering
from oneshot_steering.all import Example, optimize, tiny_lm

assert "site-packages" in oneshot_steering.__file__ and oneshot_steering.__version__ == version("oneshot-steering")
lm = tiny_lm()
fit = optimize(lm, Example("the quick brown", promote=[" fox"]), layer=1, steps=5, seed=0)
assert fit.losses[-1] < fit.losses[0], fit.losses
with lm.steer(fit.steering):
    assert isinstance(lm.generate("the quick brown", max_new_tokens=3), str)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A folder with the sdist, and the wheel built from that sdist; made from a copy, so that nothing is left in the tree."
    folder = tmp_path_factory.mktemp("built")
    source = shutil.copytree(ROOT, folder / "source", ignore=NOT_NEEDED)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source)
    return folder


def run(*command, **kwargs):
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **kwargs)
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def package_files():
    "Every file of the package in the working tree, modules and data."
    files = (p for p in (ROOT / "oneshot_steering").rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {p.relative_to(ROOT).as_posix() for p in files}


def wheel_of(folder):
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_wheel_holds_the_package_and_nothing_else(built):
    names = set(zipfile.ZipFile(wheel_of(built)).namelist())
    assert {name for name in names if ".dist-info/" not in name} == package_files()


def test_sdist_holds_what_the_wheel_is_built_from(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert package_files() | {"settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert not [name for name in names if name.startswith(("tests", "nbs", "tools"))]


def test_metadata_is_that_of_settings_ini(built):
    cfg, archive = settings(), zipfile.ZipFile(wheel_of(built))
    (folder,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    metadata = message_from_string(archive.read(f"{folder}/METADATA").decode())
    assert (metadata["Name"], metadata["Version"]) == (cfg["repo"], cfg["version"])
    assert metadata["Requires-Python"] == f">={cfg['min_python']}"
    assert "Apache-2.0" in (metadata["License-Expression"] or metadata["License"])
    extras = {key.removesuffix("_requirements") for key in cfg if key.endswith("_requirements")}
    assert set(metadata.get_all("Provides-Extra")) == extras == {"dev", "widgets", "docs", "eval"}
    assert not re.search(r"\]\((?![a-z]+:|#)", metadata.get_payload()), "a relative link would be broken on a package index"
    entry_points = archive.read(f"{folder}/entry_points.txt").decode()
    assert "oneshot-steering = oneshot_steering.cli:main" in entry_points
    assert "oneshot_steering = oneshot_steering._modidx:d" in entry_points


def test_wheel_works_in_an_empty_environment(built, tmp_path):
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    commands = home / ("Scripts" if os.name == "nt" else "bin")
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | {"HF_HUB_OFFLINE": "1"}
    try:
        install = ["-m", "pip", "install", "--quiet", "--no-compile", "-c"]
        run(commands / "python", *install, ROOT / "constraints.txt", wheel_of(built), env=env)
        run(commands / "python", "-c", TINY_RUN, cwd=tmp_path, env=env)
        assert "demo" in run(commands / "oneshot-steering", "--help", cwd=tmp_path, env=env)
    finally:
        shutil.rmtree(home)  # torch is large
