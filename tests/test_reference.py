"""Which model is the reference of preference pairs, and what is refused."""

import json

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from gradindex.errors import IndexMismatchError, InputError
from gradindex.model.adapters import without_adapters
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from indexer.build_request import make_request
from indexer.dry_run.estimate import estimate
from indexer.reference import reference_at_build
from support.references import (
    SMALL,
    Said,
    adapted,
    bare,
    offsets_of,
    other_network,
    save_both,
    tokenizer,
    told,
    written,
)
from support.task_models import save

pytestmark = pytest.mark.filterwarnings(  # peft asks transformers by an old name
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_both(tmp_path_factory.mktemp("models"))


def test_an_adapters_own_base(models, tmp_path):
    """The policy without its adapter says what the base by itself says; the adapter runs after."""
    base = transformers.AutoModelForCausalLM.from_pretrained(models[0])
    adapted(base).save_pretrained(tmp_path / "adapter")
    policy_folder, said = str(tmp_path / "adapter"), Said()
    own = make_request(policy_folder, bare(), "nowhere", progress=said, **SMALL)
    assert own.plan.reference == {"name": models[0], "revision": None, "own_base": True,
                                  "files": None, "tensors": None}
    assert any("the adapter's own base" in line and models[0] in line for line in said.lines)
    named = make_request(policy_folder, bare(), "nowhere", reference=models[0], **SMALL)
    other = make_request(policy_folder, bare(), "nowhere", reference=models[1], **SMALL)
    found = offsets_of(own, tmp_path / "own")
    assert found == offsets_of(named, tmp_path / "named")
    assert found != offsets_of(other, tmp_path / "other")
    # columns go first, and of another adapter's folder that adapter runs
    told = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in bare()]
    assert make_request(policy_folder, told, "nowhere", **SMALL).plan.reference is None
    adapter = make_request(models[0], bare(), "nowhere", reference=policy_folder, **SMALL)
    assert offsets_of(adapter, tmp_path / "of adapter") != found

    # an object is as it was afterwards
    wrapped = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(models[0]), policy_folder)
    tokens = torch.arange(4, 12)[None]
    before = wrapped(tokens).logits
    of_object = make_request(wrapped, bare(), "nowhere", tokenizer=tokenizer(), **SMALL)
    assert of_object.plan.reference["own_base"]
    assert offsets_of(of_object, tmp_path / "object") == found
    assert torch.equal(wrapped(tokens).logits, before)
    wrapped.merge_adapter()
    with pytest.raises(InputError, match="so the base can't be run alone"), \
            without_adapters(wrapped):
        pass


def test_an_object_is_known_by_its_tensors(models, tmp_path):
    network = other_network()
    request = make_request(models[0], bare(), "nowhere", reference=network, **SMALL)
    assert request.plan.reference["files"] is None and request.plan.reference["tensors"]
    named = make_request(models[0], bare(), "nowhere", reference=models[1], **SMALL)
    assert named.plan.reference["files"] and named.plan.reference["tensors"] is None
    assert offsets_of(request, tmp_path / "one") == offsets_of(named, tmp_path / "other")
    with pytest.raises(InputError, match="was a model object; pass it"):
        reference_at_build(request.plan.reference, None, request.source, "float32")
    # the folder that holds the same tensors is it, and others aren't
    found = reference_at_build(request.plan.reference, models[1], request.source, "float32")
    assert found.source.name == models[1]
    with pytest.raises(IndexMismatchError, match="not the one that the index was built with"):
        reference_at_build(request.plan.reference, other_network(4), request.source, "float32")


@pytest.mark.parametrize("rows, arguments, message", [
    (told(ref_chosen_logps=-1.0, ref_rejected_logps=-2.0), {},
     r"\(ref_chosen_logps and ref_rejected_logps\), and the reference .* \(--reference"),
    (bare(4), {"task": "causal"}, "--reference is the model that a policy .* the task is causal"),
    (bare(4), {"task": None}, "--reference is the model that a policy .* the task is causal"),
    (bare(4), {"reference": "/nowhere/at/all"}, "--reference: the model /nowhere/at/all can't be"),
    (bare(4), {"reference": 3}, "--reference: the model is a int"),
    ([{"text": "good"}], {}, "expected a chosen and a rejected answer"),
    (bare(4), {"reference": None}, "Name the model to ask for them with --reference MODEL"),
])
def test_what_is_refused(rows, arguments, message, models):
    with pytest.raises(InputError, match=message):
        make_request(models[0], rows, "nowhere",
                     **{"reference": models[1], **SMALL, **arguments})


def test_a_later_row_with_columns_is_refused(models):
    rows = told(first=2, ref_chosen_logps=-1.0, ref_rejected_logps=-2.0)
    request = make_request(models[0], rows, "nowhere", reference=models[1], **SMALL)
    with pytest.raises(InputError, match=r":3: the data say what a reference gives"):
        list(request.corpus.sequences())


def test_files_of_which_some_have_columns(models, tmp_path):
    """Without --reference an adapter's base would be asked of some and not of others."""
    adapted(transformers.AutoModelForCausalLM.from_pretrained(models[0])).save_pretrained(
        tmp_path / "adapter")
    files = [written(tmp_path / "one.jsonl", bare(3)), written(tmp_path / "two.jsonl", told(
        ref_chosen_logps=-1.0, ref_rejected_logps=-2.0))]
    with pytest.raises(InputError, match=r"two\.jsonl says what .* \S*one\.jsonl doesn't"):
        make_request(str(tmp_path / "adapter"), files, "nowhere", **SMALL)


@pytest.mark.parametrize("changes, words, message", [
    ({"n_positions": 8}, None, "reads 8 tokens at most, and sequences have up to 12"),
    ({}, ("good", "bad"), "token 4 is 'bad' there and 'good' here"),
])
def test_a_reference_that_reads_other_texts(changes, words, message, models, tmp_path):
    read = tokenizer()
    if words:
        content = json.loads(read.backend_tokenizer.to_str())
        vocabulary = content["model"]["vocab"]
        one, other = words
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        read = transformers.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(content)), pad_token="[PAD]")
    folder = save(tmp_path / "other", other_network(**changes), read)
    with pytest.raises(InputError, match=message):
        make_request(models[0], bare(), "nowhere", reference=folder, **SMALL)


def test_tokens_that_the_reference_lacks(models, tmp_path):
    """A policy may have more tokens; rows that hold one can't be compared, and are counted."""
    words = tokenizer()
    words.add_tokens([f"<{number}>" for number in range(12)])  # 30 to 41
    wider = save(tmp_path / "wider", other_network(vocab_size=42), words)
    rows = bare(4)
    rows[1]["chosen"] += " <2>"
    rows[2]["chosen"] += " <11>"
    request = make_request(wider, rows, "nowhere", reference=models[1], **SMALL)
    assert [one.parts[0].row for one in request.corpus.sequences()] == [1, 2, 4]
    assert request.corpus.facts.skipped == {"token id outside the vocabulary": 1}


def test_no_finite_answer(models, tmp_path):
    broken = other_network()
    broken.transformer.wte.weight[5] = float("inf")
    request = make_request(models[0], bare(), "nowhere", reference=broken, **SMALL)
    with pytest.raises(InputError, match=r":\d+: the reference .* no finite log p"):
        offsets_of(request, tmp_path / "index")


def test_the_policy_itself_is_worth_a_word(models):
    said = Said()
    make_request(models[0], bare(), "nowhere", reference=models[0], progress=said, **SMALL)
    assert any("the policy's own weights" in line for line in said.lines)


@pytest.mark.parametrize("own", [False, True])
def test_a_dry_run_prices_it(own, models, tmp_path):
    """Its passes are a stage, its weights a part of memory; of an adapter's base they are there."""
    one, other = models
    if own:
        adapted(transformers.AutoModelForCausalLM.from_pretrained(one)).save_pretrained(
            tmp_path / "adapter")
        one, other = str(tmp_path / "adapter"), None
    priced = estimate(one, bare(), tmp_path / "index", reference=other, **SMALL)
    stages = list(priced.stages)
    assert stages.index("read") + 1 == stages.index("reference") == stages.index("covariance") - 1
    seconds, count = priced.stages["reference"]
    assert seconds > 0 and count == 20
    weights = LanguageModel.load(ModelSource(models[1], device="cpu")).bytes
    assert priced.memory_parts.get("reference") == (None if own else weights)
    assert not (tmp_path / "index").exists()
    plain = estimate(models[0], told(ref_chosen_logps=-1.0, ref_rejected_logps=-2.0),
                     tmp_path / "index", **SMALL)
    assert "reference" not in plain.stages


def test_an_index_that_asked_none(models, tmp_path):
    plan = make_request(models[0], told(ref_chosen_logps=-1.0, ref_rejected_logps=-2.0), "nowhere",
                        **SMALL)
    with pytest.raises(InputError, match=r"asked none\. Leave it out"):
        reference_at_build(plan.plan.reference, models[1], plan.source, "float32")
