"""These tests run where there is a pretend device: `test_on_device.py` starts such processes."""

from pathlib import Path

import pytest

from support.pretend.process import on_pretend_device


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if on_pretend_device() else True
