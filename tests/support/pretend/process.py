"""Processes that have the pretend device: what their environment says."""

import os
import shutil
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TESTS = HERE.parent.parent
COMPILER = "g++"
PRETEND = "PRETEND_DEVICE"

needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER) is None,
    reason=f"no C++ compiler here: apt-get install {COMPILER}")  # as support/needed.py reads it


def environment(**more: str) -> dict[str, str]:
    """Variables with which every Python that starts has the pretend device, and `more` of them."""
    path = os.pathsep.join(map(str, (HERE / "site", TESTS, TESTS.parent)))
    return {**os.environ, PRETEND: "1", "PYTHONPATH": path, **more}


def on_pretend_device() -> bool:
    """Whether this process has the pretend device."""
    return bool(os.environ.get(PRETEND))
