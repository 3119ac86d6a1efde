"""What would run on a GPU runs on a pretend one, in processes of its own (support/pretend)."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.pretend.process import environment, needs_compiler
from support.waiting import HANG

ROOT = Path(__file__).parent.parent
OWN = sorted((ROOT / "tests" / "on_device").glob("test_*.py"))
# The product's own tests, with "auto" being the device; and what of them is about a host alone.
HOSTS = {
    "tests/ask": (), "tests/fit": (), "tests/influence": (), "tests/pace": (), "tests/serve": (),
    "tests/show": (), "tests/upkeep": (), "tests/test_calibrate.py": (),
    "tests/test_memory.py": (), "tests/test_runs_out.py": (),
    "tests/rank": ("test_ray_search.py",),  # Ray knows no such device
    "tests/model": (
        "test_quantised.py",  # bitsandbytes has kernels of its own
        "test_devices.py",
        "test_adapters.py::test_a_search_over_base_and_adapter",  # puts a host's tensor in
        "test_adapters.py::test_builds_over_one_kind",  # compares every bit with a host's
        "test_fused_experts.py::test_a_mixture_is_built_and_searched",
    ),
    # its reference takes the best by FAISS's scan, whose rounding of a query is another
    "tests/study": ("test_report.py::test_a_sample_and_the_best_by_code_stand_for_all",),
    "tests/dry_run": ("test_estimate.py::test_the_counts_are_the_builds",),  # no GPU memory
    "tests/test_engine.py": ("::test_without_a_completion_the_models_own_is_explained",),
    "tests/test_build.py": (
        "::test_default_plan",
        "::test_default_dtype_is_float32_on_a_cpu_and_the_checkpoints_own_on_a_gpu",
        "::test_objects_are_accepted_where_paths_are",
    ),
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
@pytest.mark.parametrize("suite", HOSTS)
def test_the_products_own_tests_pass_on_the_device(suite):
    left_out = [f"{suite}{name}" if name.startswith("::") else f"{suite}/{name}"
                for name in HOSTS[suite]]
    passes_on_the_device(suite, *(f"--deselect={name}" for name in left_out))
