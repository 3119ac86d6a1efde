"""The wheel: it holds what the packages need, and works without the checkout it was built from."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support.waiting import HANG

ROOT = Path(__file__).parent.parent
PACKAGES = ("gradindex", "indexer", "search")
JOURNEYS = "tests/journeys/test_commands.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make wheel` makes, without an environment of its own for the backend."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", out,
        folder=ROOT)
    made, = out.iterdir()
    return made


def run(*command: object, folder: Path, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run([str(one) for one in command], cwd=folder, text=True, timeout=HANG,
                          env={**os.environ, **environment}, check=False, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_every_file_of_the_packages(wheel):
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES,
                 folder=ROOT).split()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        about, = {name.split("/")[0] for name in names if ".dist-info/" in name}
        assert {name for name in names if not name.startswith(about)} == {
            name for name in listed if (ROOT / name).is_file()}
        for package in PACKAGES:
            assert f"{package}/py.typed" in names
        said = archive.read(f"{about}/METADATA").decode()
        assert archive.read(f"{about}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert "gradindex = gradindex.cli:main" in archive.read(
            f"{about}/entry_points.txt").decode()
    for extra in ("cpu", "gpu", "peft", "ray"):
        assert f"Provides-Extra: {extra}" in said
    assert "Requires-Python: >=3.11" in said
    for page in ("README.md", "docs/install.md"):
        assert f'pip install "./{wheel.name}[cpu]"' in (ROOT / page).read_text(encoding="utf-8")


COMMANDS = """
import sys
from gradindex.cli import main_group
for arguments in (["demo", "--help"], ["export", sys.argv[1], "-o", "result.html"]):
    main_group.main(args=arguments, standalone_mode=False)
for name, module in list(sys.modules.items()):
    if name.split(".")[0] in ("gradindex", "indexer", "search"):
        print("from", module.__file__)
"""


def test_the_unpacked_wheel_works_elsewhere(wheel, tmp_path):
    """Its own files are found, templates among them, where the checkout is neither path nor cwd."""
    unpacked, desk = tmp_path / "unpacked", tmp_path / "desk"
    desk.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    said = run(sys.executable, "-c", COMMANDS, ROOT / "docs" / "transcript.json", folder=desk,
               PYTHONPATH=str(unpacked))
    homes = [line.removeprefix("from ") for line in said.splitlines() if line.startswith("from ")]
    assert len(homes) > 20 and all(Path(home).is_relative_to(unpacked) for home in homes)
    assert "gradindex demo -o .demo" in said
    assert (desk / "result.html").read_text().startswith("<!doctype html>")


def interpreter(minor: int) -> str | None:
    """A Python 3.`minor` of this machine, which may be one of pyenv's that its shims don't give."""
    if minor == sys.version_info.minor:
        return sys.executable
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for found in (shutil.which(f"python3.{minor}"), *versions.glob(f"3.{minor}.*/bin/python")):
        if found and subprocess.run([found, "-c", "import venv"], check=False,
                                    capture_output=True).returncode == 0:
            return str(found)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("minor", [11, 12, 13, 14], ids="3.{}".format)
def test_the_journey_runs_in_an_empty_environment(wheel, tmp_path, minor):
    """The wheel with its extra and pytest, installed into a new environment; nothing else."""
    if (base := interpreter(minor)) is None:
        pytest.skip(f"no Python 3.{minor} here")
    environment, desk = tmp_path / "venv", tmp_path / "desk"
    run(base, "-m", "venv", environment, folder=tmp_path)
    python = environment / "bin" / "python"
    install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
               "--constraint", ROOT / "constraints.txt")
    run(*install, "torch", folder=tmp_path)  # first, as the pages say
    run(*install, f"{wheel}[cpu]", "pytest", folder=tmp_path)
    # the tests alone, in a folder of their own; the packages are those of the environment
    shutil.copytree(ROOT / "tests", desk / "tests")
    (desk / "pytest.ini").write_text("[pytest]\npythonpath = tests\nmarkers = slow\n"
                                     "addopts = --import-mode=importlib\n")
    clean = {"PYTHONPATH": "", "PATH": f"{environment / 'bin'}:{os.environ['PATH']}"}
    home = run(python, "-c", "import gradindex; print(gradindex.__file__)", folder=desk, **clean)
    assert Path(home.strip()).is_relative_to(environment)
    said = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", JOURNEYS, folder=desk,
               **clean)
    assert " passed" in said and "failed" not in said
