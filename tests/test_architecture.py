"""The rules of the house, held by reading its code."""

import ast
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import gradindex

ROOT = Path(__file__).parent.parent
PACKAGES = ("gradindex", "indexer", "search")
FRONT = {"gradindex", "gradindex.cli", "gradindex.facade"}  # where all packages meet
DOORS = {  # library: the files that it enters through
    "transformers": {f"gradindex/model/{name}.py"
                     for name in ("checkpoint", "linear_maps", "load_adapter", "load_errors",
                                  "load_tokenizer", "model_source", "network")} |
                    {f"gradindex/demo/{name}.py" for name in
                     ("make_demo", "small_classifier", "small_model")},
    "lmdb": {"gradindex/storage/records.py"},
    "faiss": {"gradindex/storage/code_index.py"},
    "safetensors": {"gradindex/model/saved_files.py"},
    "pyarrow": {"indexer/read/compressed.py", "indexer/read/sources.py",
                "search/ask/query_tables.py", "search/show/data_files.py",
                "search/show/table_files.py"},
    "jinja2": {"search/show/html.py"},
    "starlette": {f"search/serve/{name}.py" for name in
                  ("api", "guard", "pages", "reception", "server")},
    "uvicorn": {"search/serve/connections.py", "search/serve/listening.py"},
    "scipy": {"gradindex/influence/codes.py", "gradindex/storage/token_file.py",
              "indexer/code_length.py", "indexer/fit/eigen.py"},
    "sklearn": {"search/study/evaluate.py", "search/study/truth.py"},
    "matplotlib": {"search/study/evaluate.py"},
    "peft": {"gradindex/model/load_adapter.py"},
    "tqdm": {"gradindex/progress.py"},
    "triton": {"gradindex/influence/sign_kernel.py"},
    "ray": {"gradindex/ray_cluster.py"},
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
    if room == "gradindex" and module_of(path) not in FRONT:
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


WINGS = {  # a wing: those that it may import; all may import the rooms at gradindex's root
    "gradindex.storage": set(),
    "gradindex.objective": set(),
    "gradindex.model": {"gradindex.storage", "gradindex.objective"},
    "gradindex.influence": {"gradindex.storage", "gradindex.model", "gradindex.objective"},
    "gradindex.demo": {"gradindex.storage", "gradindex.model"},
}
CORE = {"gradindex", *WINGS}
WINGS |= {
    "indexer.read": CORE, "indexer.fit": CORE | {"indexer"},
    "indexer.pace": CORE | {"indexer", "indexer.fit", "indexer.read"},
    "indexer.dry_run": CORE | {"indexer", "indexer.fit", "indexer.pace", "indexer.read"},
    "indexer.parallel": CORE | {"indexer", "indexer.fit", "indexer.read"},
    "indexer.upkeep": CORE | {"indexer", "indexer.fit", "indexer.read"},
    "search.ask": CORE,
    "search.rank": CORE | {"search.ask"},
    "search.show": CORE,
    "search.study": CORE | {"search", "search.ask", "search.rank", "search.show"},
    "search.serve": CORE | {"search", "search.ask", "search.show", "search.study"},
}


def wing_of(module: str) -> str:
    """gradindex.storage of gradindex.storage.files; gradindex of gradindex.memory."""
    parts = module.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 else parts[0]


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def arrows() -> dict[str, set[str]]:
    """Which rooms of the three packages each one imports."""
    modules = {module_of(path): path for path in sources()}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{name.name}" for name in node.names} | {str(node.module)}
            elif isinstance(node, ast.Import):
                names |= {name.name for name in node.names}
        found[module] = {name for name in names if name in modules and modules[name].stem
                         != "__init__"} - {module}
    return found


def test_arrows_between_wings():
    for module, imported in arrows().items():
        own = wing_of(module)
        for other in imported:
            wing = wing_of(other)
            if wing == own or module in FRONT or own in ("indexer", "search") or \
                    module.endswith(".cli"):  # which share the flags at their package's root
                continue
            if module.endswith(".cli") and other == "search.query_flags":
                continue  # what the commands of all wings share
            assert own != "gradindex", f"{module}, at the root, imports {other}"
            assert wing == "gradindex" or wing in WINGS[own], f"{module} imports {other}"


def test_no_circle_of_rooms():
    graph, done, path = arrows(), set(), []

    def visit(module: str) -> None:
        assert module not in path, " → ".join([*path[path.index(module):], module])
        if module in done:
            return
        path.append(module)
        for other in sorted(graph[module]):
            visit(other)
        path.pop()
        done.add(module)

    for module in graph:
        visit(module)


# ---- words

MEANINGS = {  # a name: what its annotation may say, in signatures and classes of the three packages
    "ids": ("list[int]", "Iterable[int]", "Iterable[Any]", "np.ndarray", "set[int]"),
    "places": ("list[int]", "Sequence[int]", "Iterable[int]", "np.ndarray", "Tensor",
               "Tensor | None", "range", "Sequence[int] | np.ndarray"),
    "tokens": ("np.ndarray", "Tensor", "list[int]", "Sequence[int]", "Iterable[int]", "int",
               "Count"),
    "pieces": ("list[str]", "Sequence[str]"),
    "manifest": ("Manifest",),
    "index": ("Path", "str | Path"),
    "snapshot": ("Snapshot", "SharedSnapshot"),
}
KEPT = {  # names of the saved JSON of a result, and counts that are called after what they count
    ("gradindex/results.py", "tokens"), ("gradindex/results.py", "token_ids"),
    ("gradindex/results.py", "index"),  # its digest
}


def annotated(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Names of arguments and attributes with their annotations."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None:
            yield node.arg, ast.unparse(node.annotation)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, ast.unparse(node.annotation)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_word_means_one_thing(path):
    name = str(path.relative_to(ROOT))
    for word, kind in annotated(ast.parse(path.read_text())):
        kind = kind.strip("'\"")
        if word in MEANINGS and (name, word) not in KEPT:
            assert kind in MEANINGS[word], f"{name}: {word}: {kind}"


def test_no_class_and_no_file_stands_twice():
    classes = Counter(node.name for path in sources() for node in ast.walk(
        ast.parse(path.read_text())) if isinstance(node, ast.ClassDef))
    assert [name for name, count in classes.items() if count > 1] == []
    files = Counter(path.name for path in sources())
    assert {name for name, count in files.items() if count > 1} <= {"cli.py", "__init__.py"}


def prose(path: Path) -> Iterator[str]:
    """The docstrings and comments of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type == tokenize.COMMENT:
                yield token.string


def test_files_that_are_named_exist():
    files = [path.as_posix() for room in (*PACKAGES, "tests", "benchmarks")
             for path in (ROOT / room).rglob("*.py")]
    strange = [f"{path.relative_to(ROOT)}: {name}" for path in sources() for text in prose(path)
               for name in re.findall(r"`([\w/]+\.py)`", text)
               if not any(file.endswith(f"/{name}") for file in files)]
    assert strange == []


# ---- what stands in one place only

REMOTE_CODE = {  # where a ModelSource is made of what the user said, at the front of each command
    "gradindex/flags.py", "gradindex/model/model_source.py", "indexer/build_request.py",
    "indexer/cli.py", "indexer/parallel/merge.py", "indexer/upkeep/append.py",
    "indexer/upkeep/verify.py", "search/opening.py",
}


def test_remote_code_is_decided_at_the_front():
    users = {str(path.relative_to(ROOT)) for path in sources()
             if "trust_remote_code" in path.read_text()}
    assert users <= REMOTE_CODE | {"gradindex/model/load_errors.py"}, users - REMOTE_CODE


def test_random_numbers_are_drawn_in_one_room():
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute) or path.name == "draws.py":
                continue
            call = ast.unparse(node)
            assert not call.startswith(("np.random.", "numpy.random.")) or \
                call == "np.random.Generator", f"{path}: {call}"
            assert not re.fullmatch(r"torch\.(manual_seed|rand\w*|normal|bernoulli|multinomial|"
                                    r"Generator)", call), f"{path}: {call}"
            assert not re.search(r"\.(uniform|normal|bernoulli|random|exponential)_$", call), \
                f"{path}: {call}"
        assert "random" not in roots(imports(path)), f"{path} imports random"


def test_no_control_flow_by_the_text_of_our_own_errors():
    """A comparison with an error's text is for what foreign libraries say; ours carry fields."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ExceptHandler) or node.type is None:
                continue
            texts = [rf"str\({node.name}\)"] + [  # and what is made of it
                rf"\b{inner.targets[0].id}\b" for inner in ast.walk(node)
                if isinstance(inner, ast.Assign) and isinstance(inner.targets[0], ast.Name)
                and f"str({node.name})" in ast.unparse(inner.value)]
            by_text = any(
                isinstance(inner, ast.Compare) and isinstance(inner.ops[0], (ast.In, ast.NotIn))
                and any(re.search(text, ast.unparse(inner.comparators[0])) for text in texts)
                for inner in ast.walk(node))
            kinds = {name.strip() for name in ast.unparse(node.type).strip("()").split(",")}
            assert not by_text or kinds <= FOREIGN, f"{path}: {kinds}"


# `Exception` where a model is loaded: everything below it is another library's
FOREIGN = {"RuntimeError", "MemoryError", "Exception", "kinds.RayError", "lmdb.Error"}

# ---- sizes


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_is_small(path):
    text = path.read_text()
    assert text.count("\n") <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            methods = [inner.name for inner in node.body
                       if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef))]
            assert len(methods) <= 15, f"{node.name} has {len(methods)} methods"


def long_functions(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Functions of 25 lines or more, with their lines; tables of flags are none."""
    text = path.read_text()
    lines = text.split("\n")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            last = node.end_lineno or node.lineno
            if last - node.lineno + 1 >= 25 and "click" not in "".join(
                    ast.unparse(one) for one in node.decorator_list):
                yield node.name, lines[node.lineno - 1 : last]


def test_every_long_function_says_why():
    silent = [f"{path.relative_to(ROOT)}: {name}" for path in sources()
              for name, lines in long_functions(path)
              if not any(line.lstrip().startswith("#") or "  # " in line for line in lines)]
    assert silent == []


def test_comments_are_at_least_one_line_in_twenty_five():
    lines = [line for path in sources() for line in path.read_text().split("\n")[:-1]]
    comments = sum(line.lstrip().startswith("#") or "  # " in line for line in lines)
    assert comments >= 0.04 * len(lines), f"{comments} of {len(lines)}"


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
    ("import search.opening, search.serve.listening, indexer.parallel.ray_build", ("ray",)),
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
    assert "FAISS can't be imported" in shown.stderr
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


def test_files_that_one_worker_has_are_there():
    from support.workers import TOGETHER

    assert all((ROOT / file).is_file() for file in TOGETHER)


def test_every_command_has_an_example():
    from gradindex.cli import COMMANDS, main_group

    for name in COMMANDS:
        command = main_group.get_command(None, name)
        assert "Example:" in command.help and f"gradindex {name} " in command.help
