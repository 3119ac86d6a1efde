"""The rules of the house, held by reading imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gradindex

ROOT = Path(__file__).parent.parent
PACKAGES = ("gradindex", "indexer", "search")
FRONT = {"gradindex/__init__.py", "gradindex/cli.py", "gradindex/facade.py"}  # where all meet
DOORS = {  # library: the files that it enters through
    "transformers": {f"gradindex/model/{name}.py"
                     for name in ("loading", "network", "source", "tracked")},
    "lmdb": {"gradindex/storage/records.py"},
    "faiss": {"gradindex/storage/code_file.py"},
    "safetensors": {"gradindex/storage/tensors.py"},
    "pyarrow": {"indexer/read/sources.py", "search/show/data_files.py"},
    "jinja2": {"search/show/html.py"},
    "starlette": {f"search/serve/{name}.py" for name in
                  ("api", "guard", "pages", "reception", "server")},
    "uvicorn": {"search/serve/connections.py", "search/serve/listening.py"},
    "scipy": {"gradindex/storage/token_file.py", "indexer/fit/eigen.py"},
    "sklearn": {"search/study/evaluate.py"},
    "matplotlib": {"search/study/evaluate.py"},
    "peft": set(),
    "tqdm": {"gradindex/progress.py"},
    "ray": {"gradindex/cluster.py"},
}


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names of the modules a file imports."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(str(node.module))
    return found


def roots(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path):
    name = str(path.relative_to(ROOT))
    room = path.relative_to(ROOT).parts[0]
    used = roots(imports(path))
    if room == "gradindex" and name not in FRONT:
        assert not used & {"indexer", "search"}
    if room == "indexer":
        assert "search" not in used
    if room == "search":
        assert "indexer" not in used
    for library, doors in DOORS.items():
        assert library not in used or name in doors, f"{library} enters through {doors}"
    assert not used & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    if path.name == "cli.py":
        heavy = roots(imports(path, top_level_only=True)) - set(sys.stdlib_module_names)
        assert heavy <= {"click", "gradindex", room}


def test_no_unsafe_readers():
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                call = ast.unparse(node.func)
                assert call not in ("torch.load", "torch.save"), path
                if call == "faiss.write_index":  # with a path it reports success on a full disk
                    assert "PyCallbackIOWriter" in ast.unparse(node), path
                if call in ("np.load", "numpy.load"):
                    assert "allow_pickle=False" in ast.unparse(node), path


@pytest.mark.parametrize("statement, absent", [
    ("import gradindex", ("torch", "faiss", "transformers", "numpy", "click")),
    ("import gradindex.cli, sys; sys.argv = ['gradindex', '--help']; gradindex.cli._run()",
     ("torch", "faiss", "transformers", "numpy", "pyarrow")),
    ("import search.opening, search.serve.listening, indexer.ray_build", ("ray",)),
])
def test_what_is_not_imported(statement, absent):
    code = f"{statement}\nimport sys\nprint([m for m in {absent!r} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "[]"


def test_without_faiss_there_is_one_clear_message():
    code = ("import sys; sys.modules['faiss'] = None; sys.argv = ['gradindex', 'info', 'x']\n"
            "from gradindex.cli import _run; sys.exit(_run())")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 1 and shown.stdout == ""
    assert "needs one of its two builds, never both" in shown.stderr
    assert 'pip install "gradindex[cpu]"' in shown.stderr and "Traceback" not in shown.stderr


def test_public_names():
    assert sorted(gradindex.__all__) == gradindex.__all__
    for name in gradindex.__all__:
        assert getattr(gradindex, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = gradindex.nonsense


def test_a_shadowed_package_is_named(tmp_path):
    (tmp_path / "search.py").write_text("")
    shown = subprocess.run([sys.executable, "-c", "import gradindex; gradindex.open"],
                           capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 1
    assert "which hides gradindex's own" in shown.stderr and "search.py" in shown.stderr


def test_no_test_file_imports_another():
    """What several need stands in tests/support, or with the harness of faults."""
    tests = ROOT / "tests"
    folders = {path.name for path in tests.iterdir() if path.is_dir()} - {"support"}
    for path in tests.rglob("*.py"):
        for name in imports(path):
            first, last = name.partition(".")[0], name.rpartition(".")[2]
            assert not last.startswith("test_") and last != "conftest", f"{path} imports {name}"
            assert first not in folders or name == "faults.harness", f"{path} imports {name}"


def test_every_command_has_an_example():
    from gradindex.cli import COMMANDS, main_group

    for name in COMMANDS:
        command = main_group.get_command(None, name)
        assert "Example:" in command.help and f"gradindex {name} " in command.help
