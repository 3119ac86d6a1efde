"""A build: its defaults, resuming after a kill anywhere, refusals before anything expensive."""

import errno
import inspect
import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import gradindex
from gradindex.cli import main_group
from gradindex.demo.small_model import train_tokenizer
from gradindex.errors import GradindexError, IndexMismatchError, InputError, ResourceError
from gradindex.model.config import context_length
from gradindex.model.load_tokenizer import load_tokenizer
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.objective.batch import Text
from gradindex.objective.next_token import NextToken
from gradindex.storage import records, sealed_json
from gradindex.storage.locks import only_writer
from indexer import build as build_module
from indexer import build_request, prepare
from indexer import encode as encode_module
from indexer.build_request import make_request
from indexer.state import Settled
from indexer.upkeep.append import append
from support.documents import small_documents
from support.indexes import SMALL, files_of
from support.kills import KilledError
from support.models import SIZES, VOCABULARY, random_network


@pytest.mark.parametrize("every", [11, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_anywhere_it_ends_with_the_same_bytes(
    every, model_folder, data_file, index_folder, tmp_path, monkeypatch
):
    """Killed at a sync of a file or folder, and at later ones (tests/faults takes every call)."""
    whole = files_of(index_folder)
    real = os.fsync
    killed = 0
    while True:
        out = tmp_path / f"killed-{killed}"
        left = [killed]

        def fsync(descriptor, left=left):
            if left[0] == 0:
                raise KilledError
            left[0] -= 1
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        try:
            gradindex.build(str(model_folder), data_file, out, **SMALL)
            break
        except KilledError:
            killed += every
        monkeypatch.setattr(os, "fsync", real)
        gradindex.build(str(model_folder), data_file, out, **SMALL)
        assert files_of(out) == whole, f"killed at sync {killed - every}"
        shutil.rmtree(out)
    assert killed > 40  # 4 segments, 4 blocks in each of two passes, and what is around them


def test_what_an_earlier_version_began_to_encode_goes_on_as_it_began(
    model_folder, data_file, tmp_path, monkeypatch
):
    """Its state says nothing of a recipe of codes: segments of two recipes would lie side by side.
    """
    def settled(*chosen, recipe):
        return Settled(*chosen, recipe=2)

    def end(*arguments, **more):
        raise KilledError

    with monkeypatch.context() as before:
        before.setattr(prepare, "Settled", settled)
        gradindex.build(str(model_folder), data_file, tmp_path / "whole", **SMALL)
        before.setattr(build_module, "calibrate", end)  # everything is encoded
        with pytest.raises(KilledError):
            gradindex.build(str(model_folder), data_file, tmp_path / "killed", **SMALL)
    state = tmp_path / "killed" / "build.json"
    content = sealed_json.parse(state.read_bytes())
    del content["settled"]["recipe"], content[sealed_json.KEY]
    state.write_bytes(sealed_json.with_digest(content))
    index = gradindex.build(str(model_folder), data_file, tmp_path / "killed", **SMALL)
    assert index.manifest.code["recipe"] == 2
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_resuming_repeats_no_finished_work(model_folder, data_file, tmp_path, monkeypatch):
    """After a kill in the third segment only what wasn't sealed is encoded again."""
    encoded = []
    real = encode_module.encode_segment

    def encode(model, codes, batch, folder, batch_tokens, progress, before):
        encoded.append(folder.name)
        if len(encoded) == 3:
            raise KilledError
        return real(model, codes, batch, folder, batch_tokens, progress, before)

    monkeypatch.setattr(encode_module, "encode_segment", encode)
    monkeypatch.setattr(build_module, "fit", fits := _Counting(build_module.fit))
    with pytest.raises(KilledError):
        gradindex.build(str(model_folder), data_file, tmp_path / "index", **SMALL)
    data = Path(tmp_path / "index" / "curvature")
    before = {path.name: path.stat().st_mtime_ns for path in data.iterdir()}
    gradindex.build(str(model_folder), data_file, tmp_path / "index", **SMALL)
    assert encoded[:4] == ["000000.partial", "000001.partial", "000002.partial", "000002.partial"]
    assert encoded.count("000000.partial") == 1
    assert {path.name: path.stat().st_mtime_ns for path in data.iterdir()} == before
    assert fits.calls == 2


def test_a_segment_is_sealed_while_the_next_one_is_encoded(
    model_folder, data_file, index_folder, tmp_path, monkeypatch
):
    """Sealing may take as long as it likes, and nothing but the third segment waits for it."""
    seal, batch, under_way = encode_module.seal, encode_module.encode_batch, threading.Event()
    sealed = []

    def late(folder, *rest):
        assert under_way.wait(60)
        sealed.append(folder.name)
        seal(folder, *rest)

    def note(model, codes, records):
        if records[0].id >= SMALL["segment_size"]:  # of the second segment, or a later one
            under_way.set()
        return batch(model, codes, records)

    monkeypatch.setattr(encode_module, "seal", late)
    monkeypatch.setattr(encode_module, "encode_batch", note)
    gradindex.build(str(model_folder), data_file, tmp_path / "index", **SMALL)
    assert sealed == sorted(sealed) and len(sealed) > 2
    assert files_of(tmp_path / "index") == files_of(index_folder)


def test_what_sealing_raises_ends_the_build(model_folder, data_file, tmp_path, monkeypatch):
    """An error in the thread that seals is the build's own, and costs no other segment."""
    seal = encode_module.seal

    def full(folder, *rest):
        if folder.name == "000001.partial":
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        seal(folder, *rest)

    monkeypatch.setattr(encode_module, "seal", full)
    with pytest.raises(ResourceError, match="disk is full"):
        gradindex.build(str(model_folder), data_file, tmp_path / "index", **SMALL)
    assert (tmp_path / "index" / "segments" / "000000").is_dir()
    assert (tmp_path / "index" / "segments" / "000001.partial").is_dir()


class _Counting:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.function(*arguments)


def test_the_same_command_again_does_nothing_and_another_is_refused(
    model_folder, data_file, index_folder, tmp_path
):
    index = shutil.copytree(index_folder, tmp_path / "index")
    before = files_of(index)
    gradindex.build(str(model_folder), data_file, index, **SMALL)
    assert files_of(index) == before
    with pytest.raises(InputError, match=r"damping: 0\.1 before, 0\.2 now"):
        gradindex.build(str(model_folder), data_file, index, **SMALL, damping=0.2)
    assert files_of(index) == before
    gradindex.build(str(model_folder), data_file, index, **SMALL, train_sequences=10**6)
    assert gradindex.open(index).manifest.train_sequences == 10**6


def test_a_finished_index_of_other_weights_is_refused(model_folder, data_file, tmp_path):
    model = shutil.copytree(model_folder, tmp_path / "model")
    gradindex.build(str(model), data_file, tmp_path / "index", **SMALL)
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    network = random_network("gpt_neox", torch.float32, vocab_size=vocabulary)
    (model / "model.safetensors").unlink()
    network.save_pretrained(model, max_shard_size="8KB")  # the same weights in other files
    gradindex.build(str(model), data_file, tmp_path / "index", **SMALL)
    with torch.no_grad():
        network.lm_head.weight[0, 0] += 1e-3
    network.save_pretrained(model, max_shard_size="8KB")
    with pytest.raises(IndexMismatchError, match="not the one the index was built with"):
        gradindex.build(str(model), data_file, tmp_path / "index", **SMALL)


def test_a_changed_model_is_refused_on_resuming(model_folder, data_file, tmp_path, monkeypatch):
    copied = shutil.copytree(model_folder, tmp_path / "model")
    monkeypatch.setattr(build_module, "fit", lambda *_: (_ for _ in ()).throw(KilledError()))
    with pytest.raises(KilledError):
        gradindex.build(str(copied), data_file, tmp_path / "index", **SMALL)
    vocabulary = json.loads((copied / "config.json").read_text())["vocab_size"]
    random_network("gpt2", torch.float32).save_pretrained(tmp_path / "other")
    network = random_network("gpt_neox", torch.float32, vocab_size=vocabulary)
    with torch.no_grad():
        network.lm_head.weight[0, 0] += 1e-3
    network.save_pretrained(copied)
    with pytest.raises(IndexMismatchError, match="not the one the index was built with"):
        gradindex.build(str(copied), data_file, tmp_path / "index", **SMALL)


def test_a_command_that_failed_early_can_be_corrected(model_folder, data_file, tmp_path):
    out = tmp_path / "index"
    for wrong in ({"keep_fields": ["ulr"]}, {"modules": "no such module"}, {"id_field": "ulr"}):
        with pytest.raises(InputError):
            gradindex.build(str(model_folder), data_file, out, **{**SMALL, **wrong})
    index = gradindex.build(str(model_folder), data_file, out, **SMALL)
    assert index.manifest.plan.keep_fields == ("place",)


def test_the_index_returned_keeps_the_options(tmp_path):
    network = random_network("gpt_neox", torch.float32)
    network.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(network.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 37, (5, 9)))
    index = gradindex.build(str(tmp_path / "model"), tmp_path / "tokens.npy", tmp_path / "index",
                            bits=512, allow_pickle=True)
    assert len(index.search(token_ids=[1, 2, 3])) == 5


def test_weights_with_missing_tensors_are_refused(tmp_path):
    random_network("gpt_neox", torch.float32).gpt_neox.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())  # of the class with a head
    (tmp_path / "config.json").write_text(json.dumps(
        {**config, "architectures": ["GPTNeoXForCausalLM"]}))
    with pytest.raises(InputError, match=r"lack 1 tensor \(lm_head\.weight\)"):
        LanguageModel.load(ModelSource(str(tmp_path), device="cpu"))
    damaged = (tmp_path / "model.safetensors").read_bytes()[:-100]
    (tmp_path / "model.safetensors").write_bytes(damaged)
    with pytest.raises(InputError, match="is damaged or cut short"):
        LanguageModel.load(ModelSource(str(tmp_path), device="cpu"))


def test_a_sequence_without_a_gradient_leaves_the_calibration_finite(tmp_path):
    """Token 0 after token 0 is made certain: such a sequence has log p = 0 and gradient 0."""
    network = random_network("gpt_neox", torch.float32)
    with torch.no_grad():
        network.gpt_neox.embed_in.weight[0] = 50.0
        network.gpt_neox.final_layer_norm.weight.fill_(1.0)
        states = network.gpt_neox(input_ids=torch.zeros(1, 6, dtype=torch.long)).last_hidden_state
        network.lm_head.weight[0] += 500 * states[0].mean(0)
    tokens = np.random.default_rng(1).integers(1, 37, (20, 6))
    tokens[3] = 0
    np.save(tmp_path / "tokens.npy", tokens)
    network.save_pretrained(tmp_path / "model")
    index = gradindex.build(str(tmp_path / "model"), tmp_path / "tokens.npy", tmp_path / "index",
                            bits=512)
    assert index.snapshot.norms[3] == 0 and (np.delete(index.snapshot.norms, 3) > 0).all()
    assert 0 < index.manifest.calibration["c"] < 10
    assert index.manifest.background == {"queries": 19, "sample": 20}
    result = index.search(token_ids=tokens[5], k=20)
    assert json.loads(result.to_json())["hits"]
    assert next(hit for hit in result if hit.id == 3).influence == 0


def test_memory_that_runs_out_is_said_with_the_remedy(make_model, sequences, monkeypatch):
    from gradindex.influence.gradients import backward
    from gradindex.model.tracked import tracked_modules

    model = make_model("gpt_neox")
    batch = model.batch(sequences)

    def fail(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")

    with pytest.raises(ResourceError, match=r"batch of 6 × 11 tokens .*--batch-tokens"):
        backward(model, tracked_modules(model.network), batch, fail)


def test_two_builds_of_one_index(model_folder, data_file, tmp_path):
    said = f"another process is writing to .*: a test in process {os.getpid()}"
    with only_writer(tmp_path, "a test"), pytest.raises(GradindexError, match=said):
        gradindex.build(str(model_folder), data_file, tmp_path, **SMALL)


def test_every_sequence_knows_its_place(index_folder):
    documents = small_documents()
    stored = [
        record for segment in gradindex.open(index_folder).manifest.segments
        for record in records.read(
            index_folder / "segments" / segment.name / "records.lmdb", range(segment.rows))
    ]
    assert [record.id for record in stored] == list(range(len(stored)))
    seen = {}
    for record in stored:
        part, = record.parts
        document = documents[part.document]
        assert (part.row, part.user_id) == (part.document + 1, document["url"])
        assert part.fields == {"place": document["place"]}
        seen.setdefault(part.document, []).append(document["text"][part.start:part.end])
    assert sorted(seen) == list(range(40))
    for number, cuts in seen.items():
        joined = "".join(cuts).replace(" ", "")
        assert documents[number]["text"].replace(" ", "").startswith(joined)


def test_refusals_come_before_anything_expensive(model_folder, data_file, tmp_path, monkeypatch):
    monkeypatch.setattr(LanguageModel, "load", lambda *_: pytest.fail("the model was loaded"))
    model = str(model_folder)
    chat = tmp_path / "chat.jsonl"
    chat.with_suffix(".xlsx").touch()
    chat.write_text(json.dumps({"messages": [{"role": "assistant", "content": "yes"}]}) + "\n")
    for arguments, message in [
        (dict(model=model, data=tmp_path / "none.jsonl"), "does not exist; expected JSON lines"),
        (dict(model=model, data=chat), "field messages.*no chat template.*--chat-template"),
        (dict(model=model, data=data_file, seq_len=65), "expected 2 to 64"),
        (dict(model=model, data=data_file, bits=100), "multiple of 64"),
        (dict(model=model, data=data_file, damping=0), "--damping 0: expected a number above 0"),
        (dict(model=model, data=data_file, fit_sequences=-3), "--fit-sequences -3"),
        (dict(model=model, data=data_file, device="gpu"), "--device gpu: expected auto, cpu"),
        (dict(model=model, data=data_file, dtype="float8"), "--dtype float8: expected auto or"),
        (dict(model=model, data=data_file, fit_labels="true"), "expected model or data"),
        (dict(model=model, data=data_file, damping=float("inf")), "--damping inf: expected a num"),
        (dict(model=model, data=data_file, seed=-1), "--seed -1: expected a number from 0"),
        (dict(model=model, data=data_file, keep_fields="url"), "expected a list of field names"),
        (dict(model=model, data=data_file, device="mps"), "--device mps: expected auto, cpu"),
        (dict(model=model, data=chat.with_suffix(".xlsx")), "is a spreadsheet; expected JSON li"),
        (dict(model=str(tmp_path), data=data_file), "folder with config.json and model.safeten"),
        (dict(model="nobody/nothing", data=data_file), "nobody/nothing can't be loaded"),
    ]:
        with pytest.raises(InputError, match=f"(?s){message}"):
            gradindex.build(**arguments, out=tmp_path / "index")
    # what only the rows tell: the model has to be one that can be used before they are read
    monkeypatch.undo()
    for arguments, message in [(dict(text_field="body"), "missing field 'body'"),
                               (dict(keep_fields=["ulr"]), "no record has a field 'ulr'")]:
        with pytest.raises(InputError, match=message):
            gradindex.build(model, data_file, **arguments, out=tmp_path / "index")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty and holds no index"):
        gradindex.build(model, data_file, tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_a_disk_too_small_is_found_before_the_fit(model_folder, data_file, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ResourceError, match=r"the codes need .* and the fit .* has 1 kB free"):
        gradindex.build(str(model_folder), data_file, tmp_path / "index", **SMALL)
    monkeypatch.undo()
    gradindex.build(str(model_folder), data_file, tmp_path / "index", **SMALL)


# ---- the defaults, one by one


@pytest.mark.parametrize("context, expected", [(64, 64), (512, 512), (2048, 512)])
def test_default_sequence_length_is_the_context_at_most_512(context, expected):
    config = random_network("gpt_neox", max_position_embeddings=context).config
    assert context_length(config) == context
    assert build_request._sequence_length(None, config, []) == expected


LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 3,
            "long_factor": [4.0] * 3, "original_max_position_embeddings": 16}


def test_longrope_is_used_up_to_its_original_length(tmp_path, monkeypatch):
    """Beyond it the longest sequence of a batch would decide the angles of all."""
    monkeypatch.setitem(SIZES, "phi3", {**SIZES["llama"], "pad_token_id": 0})
    network = random_network("phi3", torch.float32, rope_parameters=dict(LONGROPE),
                             original_max_position_embeddings=16, pad_token_id=0)
    assert network.config.max_position_embeddings == 64 and context_length(network.config) == 16
    np.save(tmp_path / "long.npy", np.zeros((24, 17), np.int32))
    with pytest.raises(InputError, match=r"sequences of 17 tokens: expected 2 to 16 .*longrope"):
        gradindex.build(network, tmp_path / "long.npy", tmp_path / "index", bits=512)
    assert not (tmp_path / "index").exists()
    model = LanguageModel.load(ModelSource(network, device="cpu"))
    tokens = torch.arange(20)[None] % VOCABULARY
    with torch.no_grad():
        short = model.network(tokens[:, :12], use_cache=False).logits
        longer = model.network(tokens[:, :16], use_cache=False).logits[:, :12]
        torch.testing.assert_close(longer, short)
        whole = model.network(tokens, use_cache=False).logits[:, :12]
        assert not torch.allclose(whole, short, atol=1e-3)
    np.save(tmp_path / "short.npy", np.arange(24 * 16, dtype=np.int32).reshape(24, 16) % 37)
    index = gradindex.build(network, tmp_path / "short.npy", tmp_path / "index", bits=512)
    with pytest.raises(InputError, match="more than the model's context of 16"):
        index.search(token_ids=[1] * 17, labels=[1] * 17)


@pytest.mark.parametrize("rope, expected", [
    ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}, 64),
    ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
      "original_max_position_embeddings": 16}, 64)])
def test_other_rotary_scaling_leaves_the_context_as_it_is(rope, expected):
    network = random_network("llama", torch.float32, rope_parameters=rope)
    assert context_length(network.config) == expected
    tokens = torch.arange(64)[None] % VOCABULARY
    with torch.no_grad():
        torch.testing.assert_close(network(tokens).logits[:, :9], network(tokens[:, :9]).logits)


def test_default_arguments():
    given = inspect.signature(gradindex.build).parameters
    assert {name: given[name].default for name in (
        "seq_len", "pack", "modules", "fit_sequences", "fit_labels", "covariance_blocks",
        "damping", "bits", "dtype",
        "device", "batch_tokens", "segment_size", "train_sequences", "strict", "limit",
        "trust_remote_code", "allow_pickle")} == {
        "seq_len": None, "pack": False, "modules": None, "fit_sequences": 4096,
        "fit_labels": "model", "covariance_blocks": 1, "damping": 0.1, "bits": None,
        "dtype": "auto", "device": "auto",
        "batch_tokens": None, "segment_size": 4096, "train_sequences": None, "strict": False,
        "limit": None, "trust_remote_code": False, "allow_pickle": False}


def test_default_plan(model_folder, data_file, index_folder):
    index = gradindex.open(index_folder)
    plan = index.manifest.plan
    assert {name: getattr(plan, name) for name in (
        "pack", "modules", "fit_sequences", "fit_labels", "damping", "seed", "limit", "dtype",
        "device")} == {
        "pack": False, "modules": "mlp,head", "fit_sequences": 4096, "fit_labels": "model",
        "damping": 0.1, "seed": 0, "limit": None, "dtype": "float32", "device": "cpu"}
    assert index.manifest.fit["sequences"] == len(index)  # all, where there are fewer than 4,096
    assert index.manifest.train_sequences is None and index.manifest.kind == "text"


def test_default_dtype_is_float32_on_a_cpu_and_the_checkpoints_own_on_a_gpu(
    tmp_path, monkeypatch
):
    random_network("gpt_neox", torch.bfloat16).save_pretrained(tmp_path)
    source = ModelSource(str(tmp_path))
    assert LanguageModel.load(replace(source, device="cpu")).dtype == torch.float32
    narrow = LanguageModel.load(replace(source, device="cpu"), "bfloat16")
    assert narrow.dtype == torch.bfloat16 and narrow.accumulate == torch.float32
    with pytest.raises(InputError, match=r"sees no CUDA GPU. Use --device cpu"):
        replace(source, device="cuda").resolve("auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert source.resolve("auto") == (torch.device("cuda"), torch.bfloat16)
    second = replace(source, device="cuda:1").resolve("float32")
    assert second == (torch.device("cuda:1"), torch.float32)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_frequencies_are_not_rounded(tmp_path, family, dtype):
    """The model computes as transformers loads it, from a folder, given, or cast here."""
    random_network(family, torch.float32, max_position_embeddings=2048).save_pretrained(tmp_path)
    tokens = torch.arange(1500)[None] % VOCABULARY
    own = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected = own(tokens).logits
    name = str(dtype).removeprefix("torch.")
    for source, wanted in ((str(tmp_path), name), (whole, name), (own, "auto"), (own, name)):
        model = LanguageModel.load(ModelSource(source, device="cpu"), wanted)
        assert {one.dtype for one in model.network.parameters()} == {dtype}
        kept = [one for at, one in model.network.named_buffers() if at.endswith("inv_freq")]
        assert kept and all(one.dtype == torch.float32 for one in kept)
        with torch.no_grad():
            assert torch.equal(model.network(tokens, use_cache=False).logits, expected)


def test_a_given_model_is_cast_as_it_would_be_loaded(tmp_path, monkeypatch):
    """GPT's mask is a buffer in the dtype of its weights, unlike rotary frequencies."""
    monkeypatch.setitem(SIZES, "openai-gpt", {key: value for key, value in SIZES["gpt2"].items()
                                              if key != "n_inner"})
    network = random_network("openai-gpt", torch.float32)
    network.save_pretrained(tmp_path)
    tokens = torch.arange(20)[None]
    own = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    model = LanguageModel.load(ModelSource(network, device="cpu"), "bfloat16")
    assert {name: one.dtype for name, one in model.network.named_buffers()} == \
        {name: one.dtype for name, one in own.named_buffers()}
    with torch.no_grad():
        assert torch.equal(model.network(tokens, use_cache=False).logits, own(tokens).logits)


def test_the_model_folder_needs_no_pad_token(model_folder):
    tokenizer = load_tokenizer(ModelSource(str(model_folder)))
    assert tokenizer.pad_token is None
    texts = [Text(np.array([3, 4]), np.ones(2, bool)), Text(np.array([5, 6, 7]), np.ones(3, bool))]
    batch = NextToken().batch(texts, torch.device("cpu"))
    assert batch.targets.tolist() == [[4, -100, -100], [6, 7, -100]]


def test_weights_that_need_unpickling_need_a_flag(tmp_path):
    network = random_network("gpt_neox", torch.float32)
    network.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="--allow-pickle"):
        LanguageModel.load(ModelSource(str(tmp_path), device="cpu"))
    loaded = LanguageModel.load(ModelSource(str(tmp_path), allow_pickle=True, device="cpu"))
    assert torch.equal(loaded.network.lm_head.weight, network.lm_head.weight)


def test_remote_code_needs_a_flag(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.Config"}}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(InputError, match="--trust-remote-code"):
        ModelSource(str(tmp_path)).load_config()
    assert not (tmp_path / "ran").exists()


def test_a_model_without_a_tokenizer_works_for_token_files(tmp_path):
    network = random_network("gpt2", torch.float32)
    network.save_pretrained(tmp_path / "model")
    tokens = np.random.default_rng(0).integers(0, 37, (9, 12)).astype(np.uint16)
    np.save(tmp_path / "tokens.npy", tokens)
    index = gradindex.build(str(tmp_path / "model"), tmp_path / "tokens.npy",
                            tmp_path / "index", bits=512)
    assert index.manifest.sequence_length == 12
    result = index.search(token_ids=tokens[4], labels=[-100] * 6 + tokens[4, 6:].tolist(), k=9)
    assert result[0].id == 4
    assert [hit.token_ids for hit in result] == [tokens[hit.id].tolist() for hit in result]


def test_objects_are_accepted_where_paths_are(tmp_path):
    """A loaded model, a tokenizer and a datasets.Dataset; the index then needs the model again."""
    from datasets import Dataset

    documents = small_documents()
    tokenizer = train_tokenizer([document["text"] for document in documents], 400)
    network = random_network("llama", torch.float32, vocab_size=len(tokenizer))
    index = gradindex.build(network, Dataset.from_list(documents), tmp_path / "index",
                            tokenizer=tokenizer, **SMALL)
    query = dict(prompt="The apple number", completion=" 8 grows")
    expected = [(hit.id, hit.influence) for hit in index.search(**query, k=3)]
    with pytest.raises(InputError, match="built from a model object; pass the model"):
        gradindex.open(tmp_path / "index").search(**query)
    network.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    moved = gradindex.open(tmp_path / "index", model=str(tmp_path / "model"))
    assert [(hit.id, hit.influence) for hit in moved.search(**query, k=3)] == expected


def test_bad_rows_are_counted_and_reported(model_folder, tmp_path, capfd):
    from gradindex.progress import stderr_progress

    path = tmp_path / "train.jsonl"
    good = [json.dumps(document) for document in small_documents()]
    path.write_bytes("\n".join([*good[:5], "{broken", '{"url": 3}', *good[5:]]).encode()
                     + b'\n{"text": "\xff"}\n')
    options = {**SMALL, "id_field": None, "keep_fields": []}
    index = gradindex.build(str(model_folder), path, tmp_path / "index", **options,
                            progress=stderr_progress())
    assert index.manifest.documents == 40
    assert index.manifest.skipped == {
        "invalid JSON": 1, "missing field 'text'": 1, "invalid UTF-8": 1}
    shown = capfd.readouterr().err
    assert f"{path}:6: invalid JSON" in shown and f"{path}:43: invalid UTF-8" in shown
    with pytest.raises(InputError, match=r"train\.jsonl:6: invalid JSON"):
        gradindex.build(str(model_folder), path, tmp_path / "strict", **options, strict=True)


@pytest.mark.parametrize("words, function", [
    (["build", "model", "data", "-o", "out"], make_request), (["append", "index", "data"], append),
])
def test_flags_have_the_defaults_of_arguments(words, function):
    """A default that stood twice would be shown wrong once it is changed."""
    arguments = inspect.signature(function).parameters
    command = main_group.get_command(None, words[0])
    taken = command.make_context(words[0], words[1:]).params
    given = {"model", "data", "out", "index"}
    assert len(set(taken) & set(arguments) - given) > 5
    for name in set(taken) & set(arguments) - given:
        assert (taken[name] or None) == (arguments[name].default or None), name
