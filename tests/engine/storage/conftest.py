"""Layer files that can be read around the page cache."""

from __future__ import annotations

import pytest

from mlx_flash.engine.storage.pread_reader import OpenFile

from .aio import WIDE
from .test_readers import ALIGNED, make_file


def make_direct(folder, layout, name):
    """A layer file and its bundles; skips the test if this file system has no direct reads."""
    made = make_file(folder, layout, name)
    if OpenFile(made[0].path, True).align == 1:
        pytest.skip("this file system has no direct reads")
    return made


@pytest.fixture
def file(tmp_path):
    """A layer of 300 bundles of 2 KiB that may be read directly, and its bundles."""
    return make_direct(tmp_path, ALIGNED, "layer")


@pytest.fixture
def wide(tmp_path):
    """The same with bundles of 16 KiB: reading all of it takes milliseconds."""
    return make_direct(tmp_path, WIDE, "wide")
