"""Several classifiers in one index, and members that read or mean something else."""

import pytest
import torch

import gradindex
from gradindex.errors import InputError
from support.models import other_model
from support.task_models import NAMES, SMALL, network_of_texts, save, sentences, tokenizer_of_texts

QUESTION = {"text": "a great plot", "label": "positive"}


def classifier(**changes):
    return network_of_texts("bert", 2, torch.float64, **{**NAMES, **changes})


def test_a_score_is_the_mean_of_both_classifiers(tmp_path):
    first, rows, tokenizer = classifier(), sentences(24), tokenizer_of_texts()
    models = {"last": first, "other": other_model(first)}
    both = gradindex.build(first, rows, tmp_path / "both", tokenizer=tokenizer,
                           also={"other": models["other"]}, **SMALL)
    alone = {name: gradindex.build(model, rows, tmp_path / name, tokenizer=tokenizer, **SMALL)
             for name, model in models.items()}
    ids = range(len(both))
    parts = [{hit.id: hit.influence for hit in index.rescore(**QUESTION, ids=ids)}
             for index in alone.values()]
    for hit in both.rescore(**QUESTION, ids=ids):
        expected = sum(part[hit.id] for part in parts) / 2
        assert hit.influence == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_classes_in_another_order_are_refused(tmp_path):
    turned = classifier()
    turned.config.id2label = dict(enumerate(reversed(turned.config.id2label.values())))
    with pytest.raises(InputError, match=r"--also turned: its classes are .*, the model's"):
        gradindex.build(classifier(), sentences(24), tmp_path / "i", also={"turned": turned},
                        tokenizer=tokenizer_of_texts(), **SMALL)


def test_a_member_that_reads_less_is_refused(tmp_path):
    first = classifier()
    short = classifier(max_position_embeddings=6)
    folder = save(tmp_path / "short", short, tokenizer_of_texts())
    with pytest.raises(InputError, match="--also short: it reads 6 tokens at most, and sequences"):
        gradindex.build(first, sentences(24), tmp_path / "i", also=[folder],
                        tokenizer=tokenizer_of_texts(), **SMALL)
