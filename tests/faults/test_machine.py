"""Random journeys through the life of an index, against a plain model: a list of what is in it."""

import os
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import gradindex
from gradindex.errors import InputError
from gradindex.model.load_tokenizer import load_tokenizer
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from support.documents import FRUIT, PLACES
from support.kills import KilledError

QUESTION = {"prompt": "The apple number", "completion": " 3 grows"}
FIRST = [f"The {FRUIT[n % 8]} number {n} grows by the {PLACES[n % 5]}." for n in range(9)]
POOL = [f"Later the {FRUIT[n % 8]} of {PLACES[n % 5]} ripens, {n} times." for n in range(8)] + \
    FIRST[:3]
SETTINGS = {"seq_len": 24, "bits": 512, "segment_size": 4, "batch_tokens": 96, "id_field": "url",
            "fit_sequences": 9}


class Kill:
    """Kills at the so-manieth sync from here on; `after` None never does."""

    def __init__(self, after):
        self.left, self.real = after, os.fsync

    def __enter__(self):
        def fsync(descriptor):
            if self.left is not None:
                if self.left == 0:
                    raise KilledError
                self.left -= 1
            self.real(descriptor)

        os.fsync = fsync
        return self

    def __exit__(self, kind, *_):
        os.fsync = self.real
        return kind is KilledError


def rows_of(texts):
    return [{"text": text, "url": text} for text in texts]


@pytest.fixture(scope="module")
def oracle(model_folder, tmp_path_factory):
    """The model, and the exact influence of every text under the first texts' curvature."""
    source = ModelSource(str(model_folder), device="cpu")
    model = {"model": LanguageModel.load(source).network, "tokenizer": load_tokenizer(source)}
    out = tmp_path_factory.mktemp("oracle") / "index"
    gradindex.build(model["model"], rows_of(FIRST), out, tokenizer=model["tokenizer"], **SETTINGS)
    index = gradindex.append(out, rows_of(POOL), **model)
    hits = index.search(**QUESTION, k=len(index), shortlist="all").hits
    return model, {hit.user_id: hit.influence for hit in hits}


KILLS = st.one_of(st.none(), st.integers(0, 60))


def machine_for(oracle, faults):
    model, influence = oracle

    class Life(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            self.home = Path(tempfile.mkdtemp())
            self.index = self.home / "index"
            self.texts: dict[int, str] = {}  # the plain model: id → text, of what is live
            self.next = 0
            self.held = None  # an open searcher, and what it saw

        def teardown(self):
            shutil.rmtree(self.home)
            faults.count("random lives of an index against a plain model", lives=1)

        def add(self, texts):
            for text in texts:
                self.texts[self.next] = text
                self.next += 1

        @initialize(kill=KILLS)
        def build(self, kill):
            arguments = (model["model"], rows_of(FIRST), self.index)
            with Kill(kill):
                gradindex.build(*arguments, tokenizer=model["tokenizer"], **SETTINGS)
            gradindex.build(*arguments, tokenizer=model["tokenizer"], **SETTINGS)
            self.add(FIRST)

        @rule(texts=st.lists(st.sampled_from(POOL), min_size=1, max_size=6), kill=KILLS,
              then=st.sampled_from(["resume", "discard", "delete, resume", "other"]),
              pick=st.randoms(use_true_random=False))
        def append(self, texts, kill, then, pick):
            before = gradindex.open(self.index, **model).manifest.next_id
            with Kill(kill) as killing:
                gradindex.append(self.index, rows_of(texts), **model)
            made = gradindex.open(self.index, **model).manifest.next_id > before
            unfinished = not made and (self.index / "append.json").is_file()
            if unfinished and then == "other":
                with pytest.raises(InputError, match="--discard"):
                    gradindex.append(self.index, rows_of([*texts, POOL[0]]), **model)
                with pytest.raises(InputError, match="unfinished append"):
                    gradindex.compact(self.index)
            if unfinished and then == "discard":
                gradindex.append(self.index, discard=True, **model)
                made = True
                texts = []
            if unfinished and then == "delete, resume" and self.texts:
                self.delete(pick)
            if not made:
                gradindex.append(self.index, rows_of(texts), **model)
            assert killing.left is None or killing.left >= 0
            self.add(texts)

        @precondition(lambda self: self.texts)
        @rule(pick=st.randoms(use_true_random=False), kill=KILLS)
        def delete_some(self, pick, kill):
            self.delete(pick, kill)

        def delete(self, pick, kill=None):
            ids = pick.sample(sorted(self.texts), pick.randint(1, min(4, len(self.texts))))
            with Kill(kill):
                gradindex.delete(self.index, ids)
            gradindex.delete(self.index, ids)
            for one in ids:
                del self.texts[one]

        @rule(kill=KILLS)
        def compact(self, kill):
            with Kill(kill):
                gradindex.compact(self.index)
            gradindex.compact(self.index)

        @rule()
        def hold(self):
            """Open it now, and see later that nothing changed for this reader."""
            if self.held is None and self.texts:
                searcher = gradindex.open(self.index, **model)
                self.held = (searcher, dict(self.texts))
            else:
                self.held = None

        @rule()
        def verify(self):
            found = gradindex.verify(self.index, **model)
            assert found.sound and found.records == sum(
                one.rows for one in gradindex.open(self.index, **model).manifest.segments)

        @invariant()
        def answers_are_those_of_the_plain_model(self):
            if self.next:
                check(gradindex.open(self.index, **model), self.texts)
            if self.held is not None:
                check(*self.held)
            faults.count("random lives of an index against a plain model", steps_all_as_told=1)

    def check(searcher, texts):
        assert len(searcher) == len(texts)
        if not texts:
            with pytest.raises(InputError, match="holds no sequence"):
                searcher.search(**QUESTION)
            return
        groups = {}
        for one, text in sorted(texts.items()):
            groups.setdefault(text, []).append(one)
        hits = searcher.search(**QUESTION, k=len(texts), shortlist="all").hits
        found = {hit.id: (hit.user_id, hit.duplicates) for hit in hits}
        assert found == {own[0]: (text, own[1:]) for text, own in groups.items()}
        for hit in hits:
            assert hit.influence == pytest.approx(influence[hit.user_id], rel=1e-4, abs=1e-3)

    return Life


def test_a_life(faults, oracle):
    run_state_machine_as_test(machine_for(oracle, faults), settings=settings(
        max_examples=faults.size(6, 50), stateful_step_count=faults.size(8, 14), deadline=None,
        derandomize=not faults.long, database=None, suppress_health_check=list(HealthCheck)))
