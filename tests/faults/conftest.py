"""The harness of faults: a short run in `make test`, the long one with FAULTS=all."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faults.harness import Faults, Zygote
from support.indexes import SMALL


@pytest.fixture(scope="session")
def faults(model_folder: Path, data_file: Path) -> Iterator[Any]:
    """Children to be killed, and the report of how they fared."""
    harness = Faults(Zygote(model_folder), model_folder, data_file,
                     {**SMALL, "segment_size": 18}, os.environ.get("FAULTS") == "all")
    yield harness
    harness.zygote.close()
    if os.environ.get("FAULTS_REPORT"):
        harness.write_report()
    print(f"\n{harness.report()}")


@pytest.fixture(scope="session")
def index_of_faults(faults: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of three segments that the harness built; tests copy it."""
    out = tmp_path_factory.mktemp("faults") / "three.index"
    ended = faults.zygote.run("build", {"model": faults.model, "data": faults.data, "out": out,
                                        "settings": faults.settings})
    assert ended.done, str(ended)
    return out
