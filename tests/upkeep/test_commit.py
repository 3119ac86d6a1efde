"""Who may write to an index, and what is none."""

import os
import shutil

import pytest

import gradindex
from gradindex.errors import GradindexError, InputError
from gradindex.storage.locks import only_writer
from indexer.upkeep.delete import give_up
from support.indexes import add, files_of
from support.models import tiny_network


def test_only_one_writer_at_a_time(tiny, more, tmp_path):
    index = shutil.copytree(tiny, tmp_path / "index")
    said = f"another process is writing to .*: gradindex test in process {os.getpid()} on .*Wait"
    for write in (lambda: add(index, more), lambda: add(index, discard=True),
                  lambda: gradindex.delete(index, [1]), lambda: gradindex.compact(index),
                  lambda: give_up(index, ["000000"])):
        with only_writer(index, "gradindex test"), pytest.raises(GradindexError, match=said):
            write()
        assert files_of(index) == files_of(tiny)
    with only_writer(index, "gradindex test"):
        assert len(gradindex.open(index, model=tiny_network()).search(token_ids=[1, 2, 3])) == 8


def test_what_is_no_index_is_said(tmp_path):
    (tmp_path / "build.json").write_text("{}")
    for run in (lambda: add(tmp_path, []), lambda: gradindex.delete(tmp_path, [1]),
                lambda: gradindex.compact(tmp_path), lambda: gradindex.verify(tmp_path)):
        with pytest.raises(InputError, match="is an unfinished build; run the same build command"):
            run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build.json"]
