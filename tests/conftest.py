"""Shared by all tests."""

import os

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
