"""Passes what settings.ini says to setuptools; nothing about the package is written here."""

import re
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
STATUSES = ["Planning", "Pre-Alpha", "Alpha", "Beta", "Production/Stable", "Mature", "Inactive"]

parser = ConfigParser(delimiters=["="])
parser.read(HERE / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def extras():
    "Every X_requirements key of settings.ini as the extra X."
    return {key.removesuffix("_requirements"): shlex.split(cfg[key]) for key in cfg if key.endswith("_requirements")}


def readme():
    "The README, its relative links pointing into the repository, since a package index has no files beside it."
    text = (HERE / "README.md").read_text(encoding="utf-8")
    base = f"{cfg['git_url']}/blob/{cfg['branch']}/"
    text = re.sub(r"(!\[[^]]*\]\()(?![a-z]+:)([^)]+)\)", rf"\1{base}\2?raw=true)", text)
    return re.sub(r"\]\((?![a-z]+:|#)", f"]({base}", text)


setup(
    name=cfg["repo"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme(),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license=cfg["license"],
    license_files=["LICENSE"],
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    classifiers=[
        f"Development Status :: {cfg['status']} - {STATUSES[int(cfg['status']) - 1]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        *(f"Programming Language :: Python :: {python}" for python in PYTHONS[PYTHONS.index(cfg["min_python"]) :]),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]),
    package_data={cfg["lib_path"]: ["data/**/*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=shlex.split(cfg["requirements"]),
    extras_require=extras(),
    entry_points={
        "console_scripts": shlex.split(cfg["console_scripts"]),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
        "inspect_ai": shlex.split(cfg["inspect_ai"]),
    },
    zip_safe=False,
)
