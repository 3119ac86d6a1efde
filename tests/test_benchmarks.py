"""What benchmarks of classifiers and reward models are made of, on a small encoder."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from sklearn.metrics import roc_auc_score

from benchmarks import feedback, labels, lds_classifier
from benchmarks.detection import auroc, draw_counts, share_found
from benchmarks.encoder import (
    Hidden,
    Recipe,
    Retraining,
    new_network,
    outputs,
    padded,
    read_tokens,
    retrain_all,
    train,
)
from gradindex.progress import Progress
from support.task_models import (
    WORDS,
    answers,
    network_of_texts,
    save,
    sentences,
    tokenizer_of_texts,
    written,
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("encoder"),
                network_of_texts("bert", 2, torch.float32).bert, tokenizer_of_texts())


@pytest.fixture(scope="module")
def texts():
    return [row["sentence"] for row in sentences(40)]


def sentence_file(path, count, seed):
    rows = sentences(count, seed)
    path.write_text("".join(
        f"{row['sentence']}\t{int(row['label'] == 'positive')}\n" for row in rows))
    return path


def with_prompts(count):
    """Pairs of answers, three to a prompt; of every other the chosen is the longer."""
    return [{"prompt": f"why {WORDS[n // 3 % 20]} {WORDS[n // 60]}", "chosen": row[sides[0]],
             "rejected": row[sides[1]]} for n, row in enumerate(answers(count))
            for sides in [("chosen", "rejected")[:: 1 - 2 * (n % 2)]]]


@torch.no_grad()
def whole(network, ids):
    """What a network says of each text alone, float64 [n, outputs]."""
    return np.concatenate([network(**padded([one])).logits.double().numpy() for one in ids])


def mean_log_p(found, rows):
    """Of the labels, every other 1, or of the preference of the second of each two."""
    z = found[:, 1] - found[:, 0] if rows == "texts" else found[1::2, 0] - found[::2, 0]
    right = np.where(np.arange(len(z)) % 2, z, -z) if rows == "texts" else z
    return -np.logaddexp(0, -right).mean()


@pytest.mark.parametrize("rows, outcomes", [("texts", 2), ("pairs", 1)])
def test_trained_blocks_stand_on_the_kept_part_as_on_their_own(
        encoder, texts, tmp_path, rows, outcomes):
    recipe = Recipe(encoder, outcomes, epochs=40, blocks=1, learning_rate=1e-2, dropout=0.0)
    ids = read_tokens(encoder, texts, 32)
    hidden = Hidden.of(tmp_path, recipe, ids, Progress(None))
    assert hidden.lengths.tolist() == [len(one) for one in ids]
    numbers = np.arange(len(ids))
    wanted = numbers % 2  # the label that the sentence tells
    before = new_network(recipe, 5)
    np.testing.assert_allclose(outputs(before, hidden, numbers, 1), whole(before, ids), atol=1e-5)

    chosen = numbers[:, None] if rows == "texts" else np.stack([numbers[1::2], numbers[::2]], 1)
    after = train(hidden, recipe, chosen, wanted, seed=5)

    found, first = (outputs(one, hidden, numbers, 1) for one in (after, before))
    np.testing.assert_allclose(found, whole(after, ids), atol=1e-5)
    assert mean_log_p(found, rows) > mean_log_p(first, rows) + 0.1
    trained = {name for name, weight in after.named_parameters()
               if not torch.equal(weight, before.get_parameter(name))}
    assert trained and all(name.startswith(("bert.encoder.layer.2.", "bert.encoder.layer.1.",
                                            "bert.pooler.", "classifier.")) for name in trained)
    assert not any(name.startswith("bert.encoder.layer.0.") for name in trained)


@pytest.mark.slow
def test_a_retraining_is_kept_and_is_that_of_its_seed_alone(encoder, texts, tmp_path):
    recipe = Recipe(encoder, 2, epochs=1, blocks=1)
    Hidden.of(tmp_path, recipe, read_tokens(encoder, texts, 32), Progress(None))
    numbers, wanted = np.arange(20), np.arange(20) % 2
    both = [Retraining(numbers[:, None], wanted, seed, np.arange(20, 40)) for seed in (1, 2)]
    first = retrain_all(tmp_path, recipe, both, "retrained", 2, Progress(None))
    again = retrain_all(tmp_path, recipe, both[::-1], "retrained", 1, Progress(None))
    np.testing.assert_array_equal(first[::-1], again)
    assert first.shape == (2, 20, 2) and not np.array_equal(first[0], first[1])
    assert len(list((tmp_path / "retrained").iterdir())) == 2


def test_measures_of_draws_are_those_of_the_rows_drawn():
    random = np.random.default_rng(0)
    signal = random.integers(0, 12, 60).astype(float)  # some are equal
    truth = random.random(60) < 0.3
    counts = draw_counts(60, 0)[:, :20]
    for draw, found in enumerate(auroc(signal, truth, counts)):
        rows = np.repeat(np.arange(60), counts[:, draw])
        assert found == pytest.approx(roc_auc_score(truth[rows], signal[rows]))
    unequal = signal + np.arange(60) / 100
    for draw, found in enumerate(share_found(unequal, truth, counts, 0.2)):
        rows = np.repeat(np.arange(60), counts[:, draw])
        first = rows[np.argsort(-unequal[rows], kind="stable")[:12]]
        assert found == pytest.approx(truth[first].sum() / truth[rows].sum())


def test_swapped_pairs_gain_by_length_and_nothing_trusted_is_tested(encoder, tmp_path):
    found = feedback.used(feedback.sentence_pairs(
        encoder, sentence_file(tmp_path / "train.tsv", 300, 0),
        sentence_file(tmp_path / "test.tsv", 600, 1), 100, 300, 32))
    longer = found.lengths[found.training[:, 0]] > found.lengths[found.training[:, 1]]
    pairs, swapped = feedback.swap(found, 0)
    assert swapped.sum() == 10 and not longer[swapped].any()
    np.testing.assert_array_equal(pairs[swapped], found.training[swapped, ::-1])
    np.testing.assert_array_equal(pairs[~swapped], found.training[~swapped])
    assert len(found.trusted) == feedback.TRUSTED
    assert (found.lengths[found.trusted[:, 0]] < found.lengths[found.trusted[:, 1]]).all()
    for other in (found.training, found.test, found.alike):
        assert not np.isin(found.trusted, other).any()
    assert (found.lengths[found.alike[:, 0]] > found.lengths[found.alike[:, 1]]).all()
    told = [[{"good", "great"} & {*found.texts[n].split()} != set() for n in pair]
            for pair in found.alike]
    assert told and all(one == other for one, other in told)


def test_answers_are_split_by_prompt(encoder, tmp_path):
    rows = with_prompts(900)
    found = feedback.answer_pairs(encoder, written(tmp_path / "pairs.jsonl", rows), 100, 32)
    asked = [{found.prompts[n] for n in part.flatten()}
             for part in (found.training, found.trusted, found.test)]
    assert all(asked) and not asked[0] & (asked[1] | asked[2]) and not asked[1] & asked[2]
    assert len(found.training) <= 100 and found.lengths[found.training].max() <= 32


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", [labels, feedback, lds_classifier],
                         ids=lambda module: module.__name__.rpartition(".")[2])
def test_a_small_run_comes_to_its_end(benchmark, tmp_path):
    # as many blocks as the real one, a head wide enough for codes, and place for long answers
    encoder = save(tmp_path / "encoder", network_of_texts(
        "bert", 2, torch.float32, num_hidden_layers=6, hidden_size=32,
        max_position_embeddings=256).bert, tokenizer_of_texts())
    files = [sentence_file(tmp_path / f"{n}.tsv", 500, n) for n in range(2)]
    work = ["--work", str(tmp_path / "work"), "--small"]
    if benchmark is feedback:
        work += ["--pairs", str(written(tmp_path / "pairs.jsonl", with_prompts(900)))]
    done = CliRunner().invoke(benchmark.main, [encoder, *map(str, files), *work],
                              catch_exceptions=False)
    assert done.exit_code == 0
    assert "\ntotal " in done.stdout and "nan" not in done.stdout
