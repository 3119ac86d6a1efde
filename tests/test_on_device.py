"""What would run on a GPU runs on a pretend one, in processes of its own (support/pretend)."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.pretend.process import environment, needs_compiler
from support.waiting import HANG

ROOT = Path(__file__).parent.parent
OWN = sorted((ROOT / "tests" / "on_device").glob("test_*.py"))
# The product's own tests with "auto" being a device, and what of them is about a host alone.
SUITES = {
    "tests/influence": [], "tests/fit": [], "tests/rank": [], "tests/study": [], "tests/ask": [],
    "tests/dry_run": [], "tests/pace": [], "tests/model": [], "tests/upkeep": [],
    "tests/test_engine.py": [], "tests/test_build.py": [], "tests/test_calibrate.py": [],
    "tests/test_memory.py": [], "tests/test_runs_out.py": [], "tests/serve": [], "tests/show": [],
}
pytestmark = needs_compiler


def passes_on_the_device(*arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, arguments)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=4 * HANG)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]


@pytest.mark.parametrize("file", OWN, ids=lambda file: file.stem)
def test_on_the_pretend_device(file):
    passes_on_the_device(file)


@pytest.mark.slow
@pytest.mark.parametrize("file", [file for file in OWN if "mark.slow" in file.read_text()],
                         ids=lambda file: file.stem)
def test_more_on_the_pretend_device(file):
    passes_on_the_device(file, "-m", "slow")


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_the_products_own_tests_pass_on_the_device(suite):
    passes_on_the_device(suite, *(f"--deselect={suite}{name}" for name in SUITES[suite]))
