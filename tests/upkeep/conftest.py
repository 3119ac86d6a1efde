"""A small index to be changed, of tokens or of text, and the model it was built with."""

import shutil

import pytest

import gradindex
from gradindex.model.load_tokenizer import load_tokenizer
from gradindex.model.network import LanguageModel
from support.documents import save, tiny_tokens
from support.indexes import TINY
from support.models import tiny_network


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """An index of eight sequences in two segments; tests copy it."""
    folder = tmp_path_factory.mktemp("tiny")
    gradindex.build(tiny_network(), save(folder / "old.npy", tiny_tokens(0)), folder / "index",
                    **TINY)
    return folder / "index"


@pytest.fixture
def more(tmp_path):
    return save(tmp_path / "more.npy", tiny_tokens(1, 6))


@pytest.fixture(scope="module")
def place(model_folder):
    """The model of index_folder, loaded once, as arguments."""
    from gradindex.model.model_source import ModelSource

    source = ModelSource(str(model_folder), device="cpu")
    return {"model": LanguageModel.load(source).network, "tokenizer": load_tokenizer(source)}


@pytest.fixture
def index(index_folder, tmp_path):
    return shutil.copytree(index_folder, tmp_path / "index")
