"""Atomic writes: a killed writer leaves the old file whole, and its temporary file does not stay."""

import subprocess
import sys
import time

import pytest

from oneshot_steering import files
from oneshot_steering.files import atomic_write

SLOW_DISK = """
import os, sys, time
from oneshot_steering import files
os.fsync = lambda handle: (print("written", flush=True), time.sleep(60))
files.atomic_write(sys.argv[1], b"never finished")
"""
MANY_WRITES = """
import sys
from oneshot_steering.files import atomic_write
for number in range(100): atomic_write(sys.argv[1], sys.argv[2].encode() * 10_000)
"""


def run(program, *arguments):
    return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def writer_at_work(path):
    process = run(SLOW_DISK, path)
    assert process.stdout.readline() == "written\n"
    return process


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_killed_writers_leave_nothing_for_long_and_living_ones_are_left_alone(tmp_path):
    path = tmp_path / "vector.safetensors"
    atomic_write(path, b"old")
    killed, living = writer_at_work(path), writer_at_work(path)
    killed.kill()
    killed.wait()
    assert path.read_bytes() == b"old" and len(names(tmp_path)) == 3
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new" and len(names(tmp_path)) == 2  # the living writer's is still there
    living.kill()
    living.wait()
    atomic_write(path, b"newer")
    assert path.read_bytes() == b"newer" and names(tmp_path) == [path.name]


def test_writers_that_are_killed_at_any_moment(tmp_path):
    path = tmp_path / "table.csv"
    atomic_write(path, b"a" * 10_000)
    for _ in range(5):
        writer = run(MANY_WRITES, path, "b")
        time.sleep(0.15)
        writer.kill()
        writer.wait()
        assert path.read_bytes() in (b"a" * 10_000, b"b" * 10_000)
    atomic_write(path, b"c")
    assert names(tmp_path) == [path.name]


def test_writers_at_the_same_time_do_not_disturb_one_another(tmp_path):
    path = tmp_path / "figures.json"
    writers = [run(MANY_WRITES, path, letter) for letter in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert path.read_bytes() in [letter * 10_000 for letter in (b"a", b"b", b"c")] and names(tmp_path) == [path.name]


def test_files_that_only_look_like_temporary_ones_stay(tmp_path):
    others = [".vector.x.partial", ".vector.abcd1234", ".other.abcd1234.partial", "vector.abcd1234.partial"]
    for name in others:
        (tmp_path / name).write_bytes(b"mine")
    atomic_write(tmp_path / "vector", b"whole")
    assert names(tmp_path) == sorted([*others, "vector"])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file"
    atomic_write(path, b"old")
    monkeypatch.setattr(files.os, "replace", lambda *names: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old" and names(path.parent) == ["file"]
