"""A dry run: what it says of the disk is so, it writes nothing, refuses what a build refuses."""

import itertools
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import gradindex
from gradindex import cli
from gradindex.errors import DamagedIndexError, IndexMismatchError, InputError, ResourceError
from gradindex.influence import curvature
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.modules import Module
from gradindex.storage import code_index, layout, records, token_file
from gradindex.storage.records import Part, Record
from indexer import build as build_module
from indexer.dry_run import estimate as estimate_module
from indexer.fit.budget import disk_bytes
from indexer.read.sources import DataSource, count_rows
from support.documents import small_documents
from support.indexes import SMALL


def files_of(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size
            for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def found(model_folder, data_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("dry") / "deep" / "small.index"
    made = gradindex.estimate(str(model_folder), data_file, out, **SMALL)
    assert not out.parent.exists()
    return made


def test_the_disk_of_a_small_build(found, index_folder):
    """Records and codes to the byte; the header of the curvature has some digits more."""
    sizes = files_of(index_folder)

    def total(*names: str) -> int:
        return sum(count for name, count in sizes.items() if name.rpartition("/")[2] in names)

    assert found.disk["records"] == total("records.lmdb")
    assert found.disk["codes"] == total("vectors.faiss", "rows.npy")
    curved = sum(count for name, count in sizes.items()
                 if name.startswith("curvature/") and name.endswith(".safetensors"))
    assert found.disk["background"] == pytest.approx(total("background.safetensors"), abs=600)
    assert found.disk["curvature"] == pytest.approx(curved, rel=0.01)
    assert found.disk["token matrices"] == pytest.approx(total("tokens.npz"), rel=0.05)
    assert sum(found.disk.values()) == pytest.approx(sum(sizes.values()), rel=0.05)


def test_the_counts_are_the_builds(found, index_folder):
    built = gradindex.open(index_folder).manifest
    assert (found.documents, found.sequences, found.tokens, found.read) == (
        built.documents, built.sequences, built.tokens, 1.0)
    assert {name: count for name, (_, count) in found.stages.items()} == {
        "start": 0, "read": 0, "covariance": built.sequences, "eigenvectors": 0,
        "eigenvalues": built.sequences, "pairs": 0, "encode": built.sequences, "calibrate": 0,
        "background": 0}
    assert found.lacking == [] and found.seconds > 0 and found.memory.device == 0


def test_the_most_on_the_disk_while_it_is_fitted(model_folder, data_file, tmp_path, monkeypatch):
    """Looked at before and after every file is written, whose temporary copy lies beside it."""
    import gradindex.storage.tensors as files

    out, most = tmp_path / "index", 0
    real = files.atomic_write

    def write(path, content, needed=None):
        nonlocal most
        if path.name != "background.safetensors":  # after the fit
            most = max(most, (needed or len(content)) + sum(files_of(out).values()))
        return real(path, content, needed)

    monkeypatch.setattr(files, "atomic_write", write)
    index = gradindex.build(str(model_folder), data_file, out, **SMALL)
    text = sum(count for name, count in files_of(out).items() if name.endswith(".lmdb"))
    assert text + disk_bytes([index.manifest.modules], 1, 4) == pytest.approx(most, rel=0.12)


@pytest.mark.parametrize("count, low, high",
                         [(1, 2, 9), (40, 2, 60), (900, 2, 30), (700, 300, 3000)])
def test_the_size_of_a_file_of_records(count, low, high, tmp_path):
    random = np.random.default_rng(0)
    lengths = random.integers(low, high, count)
    made = [Record(n, np.zeros(length, np.int32), np.ones(length, bool),
                   [Part(n, "x" * int(random.integers(40)), n, 0, 1, 0)])
            for n, length in enumerate(lengths)]
    written = records.write(tmp_path / "records.lmdb", made)
    assert records.file_bytes(map(records.value_bytes, made)) == written.size


def test_nothing_is_written(model_folder, data_file, index_folder, tmp_path):
    """Neither beside nothing, nor in an empty folder, nor in a build under way or complete."""
    def dry(out):
        return gradindex.estimate(str(model_folder), data_file, out, **SMALL)

    index = shutil.copytree(index_folder, tmp_path / "index")
    before = {path: path.stat().st_mtime_ns for path in [index, *index.rglob("*")]}
    assert dry(index).note == f"{index} is complete: the same command has nothing to do"
    assert {path: path.stat().st_mtime_ns for path in [index, *index.rglob("*")]} == before
    half = tmp_path / "half"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, "fit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            gradindex.build(str(model_folder), data_file, half, **SMALL)
    sizes = files_of(half)
    assert "less than estimated is left" in dry(half).note
    assert files_of(half) == sizes
    (tmp_path / "empty").mkdir()
    assert dry(tmp_path / "empty").note == "" and not any((tmp_path / "empty").iterdir())


def test_errors_are_the_builds(model_folder, data_file, index_folder, tmp_path):
    model = str(model_folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "curvature").symlink_to(tmp_path / "full")
    (tmp_path / "none.jsonl").write_text('{"text": " "}\n')
    index = shutil.copytree(index_folder, tmp_path / "index")
    out = tmp_path / "new"
    for arguments in (
        dict(data=tmp_path / "absent.jsonl"), dict(data=tmp_path / "none.jsonl"),
        dict(seq_len=65), dict(bits=100), dict(damping=0), dict(text_field="body"),
        dict(device="gpu"), dict(dtype="float8"), dict(seed=-1), dict(keep_fields="url"),
        dict(keep_fields=["ulr"]), dict(id_field="ulr"), dict(modules="no such module"),
        dict(model=str(tmp_path)), dict(out=tmp_path / "file"), dict(out=tmp_path / "full"),
        dict(out=tmp_path / "linked"), dict(out=index, damping=0.2),
    ):
        asked = {**SMALL, "model": model, "data": data_file, "out": out, **arguments}
        with pytest.raises((InputError, DamagedIndexError)) as dry:
            gradindex.estimate(**asked)
        assert not out.exists()
        with pytest.raises(type(dry.value)) as real:
            gradindex.build(**asked)
        assert str(dry.value) == str(real.value)
        shutil.rmtree(out, ignore_errors=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        gradindex.estimate(model, data_file, out, colour=1)


def test_another_model_than_the_build_began_with(model_folder, data_file, tmp_path, monkeypatch):
    copied = shutil.copytree(model_folder, tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "fit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            gradindex.build(str(copied), data_file, tmp_path / "index", **SMALL)
    network = LanguageModel.load(ModelSource(str(copied), device="cpu")).network
    with torch.no_grad():
        network.lm_head.weight[0, 0] += 1
    network.save_pretrained(copied)
    with pytest.raises(IndexMismatchError, match="not the one the index was built with"):
        gradindex.estimate(str(copied), data_file, tmp_path / "index", **SMALL)


def run_cli(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["gradindex", *map(str, arguments)])
    return cli._run()


def test_the_command(model_folder, data_file, tmp_path, monkeypatch, capsys):
    command = ("build", model_folder, data_file, "-o", tmp_path / "index", "--seq-len", "24",
               "--bits", "512", "--dry-run")
    assert run_cli(monkeypatch, *command) == 0
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == [
        "model", "data", "stages", "disk", "memory", "of", "estimate", "codes"]
    assert "40 documents → " in shown.out and "± 30%" in shown.out
    codes = shown.out.splitlines()[-1]
    # 46 sequences are all among the first 100
    assert "512 bits (3.74 kB) 100%, 1,024 bits" in codes and codes.endswith("before a fit")
    assert run_cli(monkeypatch, *(part for part in command if part not in ("--bits", "512"))) == 0
    codes = capsys.readouterr().out.splitlines()[-1]
    # such small maps give no more numbers
    assert "5,440 bits" in codes and codes.endswith("chooses; 5,440 bits are reckoned here")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert run_cli(monkeypatch, *command) == ResourceError.exit_code == 4
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("not enough disk: the build needs ") and \
        f"{tmp_path} has 1 kB free. Free some space, use fewer " in last
    assert not (tmp_path / "index").exists()


def test_memory_that_will_not_suffice_is_said(model_folder, data_file, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate_module, "available", lambda: 10**6)
    found = gradindex.estimate(str(model_folder), data_file, tmp_path / "index", **SMALL)
    [line] = found.lacking
    assert line.startswith("not enough memory: the build needs ") and "--batch-tokens" in line


def test_large_data_are_read_in_part(model_folder, tmp_path, monkeypatch):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in small_documents() * 50))
    whole = gradindex.estimate(str(model_folder), path, tmp_path / "index", **SMALL)
    seconds = SimpleNamespace(perf_counter=itertools.count().__next__)  # one a sequence
    monkeypatch.setattr(estimate_module, "time", seconds)
    monkeypatch.setattr(estimate_module, "READING", 1000)
    found = gradindex.estimate(str(model_folder), path, tmp_path / "index", **SMALL)
    assert found.read == pytest.approx(1000 / whole.sequences, rel=0.02)
    assert f"scaled from {found.read:.1%} of the rows" in found.lines()[1]
    assert found.stages["read"][0] == pytest.approx(whole.sequences, rel=0.02)
    for name in ("documents", "sequences", "tokens"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=0.03)
    for part in ("records", "codes", "token matrices"):
        assert found.disk[part] == pytest.approx(whole.disk[part], rel=0.05)


def test_rows_are_counted_without_parsing(tmp_path):
    import gzip

    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * 7)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 5))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"] * 9}), tmp_path / "c.parquet")
    np.save(tmp_path / "two.npy", np.zeros((4, 6), np.int32))
    np.save(tmp_path / "one.npy", np.zeros(13, np.int32))
    counts = [count_rows(DataSource(kind, "", content), 6) for kind, content in (
        ("jsonl", tmp_path / "a.jsonl"), ("jsonl", tmp_path / "b.jsonl.gz"),
        ("parquet", tmp_path / "c.parquet"), ("npy", tmp_path / "two.npy"),
        ("npy", tmp_path / "one.npy"), ("rows", [{}] * 3), ("text", tmp_path / "a.jsonl"))]
    assert counts == [7, 5, 9, 4, 3, 3, 1]


def test_sizes_of_files(tmp_path):
    index = code_index.CodeIndex(512)
    index.add(np.zeros((7, layout.code_bytes(512)), np.uint8))
    assert code_index.file_bytes(512, 7) == index.write(tmp_path / "vectors.faiss").size
    sequences = [np.arange(n % 9 + 1) for n in range(30)]
    written = token_file.write(tmp_path / "t.npz", sequences, 50)
    assert len(token_file.pack(sequences, 50)) == written.size
    module = Module("blocks.0.mlp", 0, "mlp", 20, 40, True)
    o, i = module.shape
    made = curvature.Curvature(torch.eye(i), torch.eye(o), torch.ones(o, i))
    written = curvature.save(tmp_path, module, made).size
    assert curvature.file_bytes(module, torch.float32, 1) == pytest.approx(written, abs=32)
