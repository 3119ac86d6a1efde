"""Fields that are made of pairs: what they count, and of which tasks they are."""

import pytest

from gradindex.errors import InputError
from gradindex.storage.build_plan import CorpusSettings
from gradindex.task import Task
from indexer.read.corpus import Corpus
from indexer.tasks import derived_fields
from support.task_models import tokenizer_of_texts

BOTH = ("length-difference", "longer-chosen")
CHAT = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}" \
    "{% if add_generation_prompt %}assistant {% endif %}"


def fields_of(rows, task="reward", length=32, tokenizer=None, **settings):
    corpus = Corpus([rows], tokenizer or tokenizer_of_texts(), CorpusSettings(
        length, task=task, **{"derive": BOTH, **settings}), vocabulary=40)
    return [record.parts[0].fields for record in corpus.sequences()]


def test_lengths_are_those_of_the_answers_in_tokens():
    answers = [("good", "so very bad"), ("it was so good", "bad"), ("good film", "bad plot")]
    rows = [{"prompt": "why was it", "chosen": f" {one}", "rejected": f" {other}"}
            for one, other in answers]
    assert fields_of(rows) == [
        {"length-difference": len(one.split()) - len(other.split()),
         "longer-chosen": len(one.split()) > len(other.split())} for one, other in answers]
    [own] = {type(found["length-difference"]) for found in fields_of(rows)}
    assert own is int and fields_of(rows)[1]["longer-chosen"] is True
    # of whole dialogues the same, whatever both begin with
    opening = "\n\nHuman: why was it so\n\nAssistant:"
    dialogues = [{"chosen": opening + row["chosen"], "rejected": opening + row["rejected"]}
                 for row in rows]
    assert fields_of(dialogues) == fields_of(rows)


def test_lengths_of_chats():
    tokenizer = tokenizer_of_texts()
    tokenizer.chat_template = CHAT
    row = {"prompt": [{"role": "user", "content": "why was it"}],
           "chosen": [{"role": "assistant", "content": "so very good"}],
           "rejected": [{"role": "assistant", "content": "bad"}]}
    assert fields_of([row], tokenizer=tokenizer) == [
        {"length-difference": 2, "longer-chosen": True}]


def test_a_policys_answers_count_as_far_as_training_saw_them():
    row = {"prompt": "why was it", "chosen": " good and so very very good",
           "rejected": " bad and not so", "ref_chosen_logps": -3.0, "ref_rejected_logps": -5.5}
    assert fields_of([row], "preference") == [{"length-difference": 2, "longer-chosen": True}]
    cut = fields_of([row], "preference", length=5)
    assert cut == [{"length-difference": 0, "longer-chosen": False}]


def test_they_stand_beside_kept_fields():
    row = {"chosen": "so good", "rejected": "bad", "annotator": 7}
    settings = {"keep_fields": ("annotator",), "derive": ("longer-chosen",)}
    assert fields_of([row], **settings) == [{"annotator": 7, "longer-chosen": True}]
    assert CorpusSettings(8, **settings).record_fields == ("annotator", "longer-chosen")
    assert fields_of([row], derive=()) == [{}]


@pytest.mark.parametrize("given, kept, task, said", [
    (["long-chosen"], [], "reward",
     r"--derive long-chosen: expected one or more of length-difference, longer-chosen\."),
    (["longer-chosen", ""], [], "reward", "--derive : expected one or more of"),
    (["longer-chosen"], [], "classification",
     "--derive longer-chosen is for pairs of a chosen and a rejected answer; the task is "
     "classification"),
    (["length-difference"], [], "causal", "the task is causal. Leave it out"),
    (["length-difference", "longer-chosen"], ["longer-chosen"], "preference",
     "--derive longer-chosen and --keep-fields longer-chosen would be two fields"),
    ("longer-chosen", [], "reward", "derive='longer-chosen': expected a list of names"),
    ([3], [], "reward", "--derive 3: expected one or more of"),
])
def test_what_cannot_be_derived_is_refused(given, kept, task, said):
    with pytest.raises(InputError, match=said):
        derived_fields(given, kept, Task(task))
