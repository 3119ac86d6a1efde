"""Small models of four families, in float64, and a helper to compare with."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import gradindex
from demo.prepare import train_tokenizer
from gradindex.model.network import LanguageModel
from gradindex.model.source import ModelSource
from gradindex.objective import Text

SIZES = {
    "gpt_neox": dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=2,
                     intermediate_size=20),
    "gpt2": dict(n_embd=12, n_layer=2, n_head=2, n_positions=64, n_inner=20),
    "llama": dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=2,
                  num_key_value_heads=1, intermediate_size=20),
    "qwen3": dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=2,
                  num_key_value_heads=1, intermediate_size=20, head_dim=6),
}
VOCABULARY = 37


def random_network(family: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A small random model whose every parameter matters."""
    settings = {**SIZES[family], "vocab_size": VOCABULARY, "max_position_embeddings": 64,
                "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
                "attention_dropout": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    if family == "gpt2":
        del settings["max_position_embeddings"], settings["attention_dropout"]
    config = AutoConfig.for_model(family, **{**settings, **changes})
    torch.manual_seed(7)
    network = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network.eval()


@pytest.fixture(params=list(SIZES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_model() -> Callable[..., LanguageModel]:
    def make(family: str = "gpt_neox", **changes: Any) -> LanguageModel:
        network = random_network(family, **changes)
        return LanguageModel(network.requires_grad_(False), None, ModelSource(network))
    return make


@pytest.fixture
def sequences() -> list[Text]:
    """Plain text, masked prompts, different lengths."""
    random = np.random.default_rng(3)
    made = []
    for length, prompt in ((11, 0), (7, 3), (9, 0), (5, 2), (11, 6), (2, 0)):
        ids = random.integers(0, VOCABULARY, length).astype(np.int32)
        scored = np.arange(length) >= prompt
        made.append(Text(ids, scored))
    return made


def labels_of(ids: np.ndarray, scored: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.where(scored, ids, -100).astype(np.int64))


FRUIT = ("apple", "pear", "plum", "fig", "lime", "cherry", "mango", "quince")
PLACES = ("hill", "river", "market", "garden", "harbour")


def small_documents() -> list[dict[str, Any]]:
    """Forty short documents, one of them twice, some longer than a sequence of 24 tokens."""
    documents = []
    for n in range(40):
        fruit, place = FRUIT[n % 8], PLACES[n % 5]
        body = f"The {fruit} number {n} grows by the {place}. " * (1 + n % 3)
        documents.append({"text": body.strip(), "url": f"doc/{n}", "place": place})
    documents[17]["text"] = documents[9]["text"]
    return documents


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random GPT-NeoX with a tokenizer, as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([document["text"] for document in small_documents()], 400)
    tokenizer.save_pretrained(folder)
    random_network("gpt_neox", torch.float32, vocab_size=len(tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in small_documents()))
    return path


SMALL = {"seq_len": 24, "bits": 512, "segment_size": 16, "batch_tokens": 96,
         "id_field": "url", "keep_fields": ["place"]}


@pytest.fixture(scope="session")
def index_folder(
    model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An index of the forty documents; tests that change it copy it first."""
    out = tmp_path_factory.mktemp("index") / "small.index"
    gradindex.build(str(model_folder), data_file, out, **SMALL)
    return out


# ---- faults (tests/faults), the long run with FAULTS=all


@pytest.fixture(scope="session")
def faults(model_folder: Path, data_file: Path) -> Iterator[Any]:
    """Children to be killed, and the report of how they fared."""
    from faults.harness import Faults, Zygote

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


@pytest.fixture(scope="session")
def more_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty further documents, to be appended."""
    path = tmp_path_factory.mktemp("more") / "more.jsonl"
    path.write_text("".join(json.dumps({
        "text": f"A late {FRUIT[n % 8]} ripens in the {PLACES[n % 5]}, number {n}.",
        "url": f"late/{n}", "place": PLACES[n % 5]}) + "\n" for n in range(20)))
    return path
