"""Spans, loss masks and the text of tokens, with tokenizers of the usual kinds."""

import numpy as np
import pytest

from gradindex.errors import InputError
from gradindex.model import tokenise
from support.tokenizers import (
    byte_tokenizer,
    fallback_tokenizer,
    plain_ids,
    unigram_tokenizer,
)

KINDS = [byte_tokenizer, unigram_tokenizer, fallback_tokenizer]


def scored_text(tokenizer, tokenised):
    return tokenizer.decode(tokenised.tokens[tokenised.scored].tolist())


# ---- plain text and spans


def test_a_plain_document_scores_every_token_with_the_tokenizers_own_special_tokens():
    tokenizer = byte_tokenizer("<b> $A <e>")
    tokenised = tokenise.encode(tokenizer, "hello world")
    assert tokenised.tokens.tolist() == [1, *plain_ids(tokenizer, "hello world"), 0]
    assert tokenised.tokens.dtype == np.int32
    assert tokenised.scored.tolist() == [True] * 4
    assert tokenised.spans.tolist() == [[0, 0], [0, 5], [5, 11], [11, 11]]


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("string", [
    "hello world", "  the   water \n\n is  cold \n ", "<e> is not special here", " a",
])
def test_spans_point_to_the_text_of_each_token(string, trim):
    tokenizer = byte_tokenizer("<b> $A <e>", trim)
    tokenised = tokenise.encode(tokenizer, string)
    found = [string[start:end] for start, end in tokenised.spans[1:-1]]
    assert found == [tokenizer.decode([token]) for token in tokenised.tokens[1:-1]]
    assert "".join(found) == string


@pytest.mark.parametrize("trim", [False, True])
def test_tokens_that_share_a_character_share_its_span(trim):
    tokenised = tokenise.encode(byte_tokenizer(trim=trim), "hello\t𝄞é")
    assert tokenised.spans.tolist() == [[0, 5], [5, 6], *[[6, 7]] * 4, *[[7, 8]] * 2]


def test_spans_of_a_tokenizer_that_prepends_a_space():
    tokenised = tokenise.encode(unigram_tokenizer(), "the world is cold")
    found = ["the world is cold"[start:end] for start, end in tokenised.spans]
    assert found == ["the", " world", " is", " co", "ld"]


def test_an_empty_text_has_no_tokens():
    tokenised = tokenise.encode(byte_tokenizer(), "")
    assert (tokenised.tokens.tolist(), tokenised.scored.tolist()) == ([], [])
    assert tokenised.spans.tolist() == []


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(InputError, match="gives no character offsets; expected a fast tokenizer"):
        tokenise.encode(object(), "hello")


@pytest.mark.parametrize(("frame", "string", "ids"), [
    ("<b> $A <e>", "<b>hello", "1 h 0"), ("<b> $A <e>", "hello<e>", "1 h 0"),
    ("<b> $A <e>", "<b>hello<e>", "1 h 0"), ("<b> $A", "<b><b>hello", "1 1 h"),
    ("<b> $A", " <b>hello", "1 s 1 h"), ("$A", "<b>hello", "1 h"), ("<b> $A", "<b>", "1"),
    ("<b> <e> $A", "<b>hello", "1 0 1 h"), ("<b> <e> $A", "<b><e>hello", "1 0 h"),
    ("$A <e>", "<e>", "0"), ("<b> $A <e>", "<b><e>", "1 0"),
])
def test_special_tokens_that_the_text_has_are_not_added_to_it(frame, string, ids):
    tokenizer = byte_tokenizer(frame)
    [hello], [space] = plain_ids(tokenizer, "hello"), plain_ids(tokenizer, " ")
    expected = [{"h": hello, "s": space}.get(part) or int(part) for part in ids.split()]
    tokenised = tokenise.encode(tokenizer, string)
    assert tokenised.tokens.tolist() == expected
    assert tokenised.spans.max() == len(string)


# ---- prompt and completion


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize(("prompt", "completion", "scored"), [
    ("hello", " world", " world"),
    ("hello ", "world", " world"),  # one token for the space and the word
    ("hel", "lo world", "hello world"),
    ("hello", "  \n world \n ", "  \n world \n "),
    ("hello  ", " world", " world"),
    ("", "  world", "  world"),
    ("hello \n", "world", "world"),
    ("", "hello world", "hello world"),
    ("hello", " yes<e>", " yes<e>"),
    ("the naïve 😀", "中文", "中文"),
    ("hello", "", ""), ("<b>hello", " world", " world"), ("<b>", "hello", "hello"),
])
def test_only_the_completions_tokens_are_scored(prompt, completion, scored, trim):
    tokenizer = byte_tokenizer("<b> $A <e>", trim)
    tokenised = tokenise.encode_pair(tokenizer, prompt, completion)
    text = (prompt + completion).removeprefix("<b>")  # which isn't there twice
    assert tokenised.tokens.tolist() == [1, *plain_ids(tokenizer, text)]
    assert not tokenised.scored[0]
    assert scored_text(tokenizer, tokenised) == scored
    assert tokenised.spans[-1, 1] == len(prompt + completion)


@pytest.mark.parametrize(("frame", "ids"), [("$A", []), ("$A <e>", []), ("<b> $A <e>", [1])])
def test_an_empty_pair_is_what_stands_before_a_text(frame, ids):
    tokenised = tokenise.encode_pair(byte_tokenizer(frame), "", "")
    assert tokenised.tokens.tolist() == ids
    assert tokenised.scored.tolist() == [False] * len(ids)


# ---- the text of tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(20))
def test_joined_pieces_are_the_decoded_text_whatever_the_ids(kind, seed):
    tokenizer = kind()
    ids = np.random.default_rng(seed).integers(0, len(tokenizer), 40).tolist()
    found = tokenise.pieces(tokenizer, ids)
    assert "".join(found) == tokenizer.decode(ids)
    assert len(found) == len(ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("string", [
    "hello world", " hello  world ", "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}", "",
    "naïve 中文 😀😀", "\U0001f469\u200d\U0001f467 𝄞", "<e>hello<e><e>",
])
def test_joined_pieces_are_the_decoded_text(kind, string):
    tokenizer = kind()
    ids = tokenizer(string)["input_ids"]
    assert "".join(tokenise.pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_split_character_belongs_to_its_last_token():
    tokenizer = byte_tokenizer()
    assert tokenise.pieces(tokenizer, plain_ids(tokenizer, "hello\t𝄞")) == [
        "hello", "\t", "", "", "", "𝄞"]
    ids = plain_ids(fallback_tokenizer(), "hé")
    assert tokenise.pieces(fallback_tokenizer(), ids) == ["", "h", "", "é"]


def test_bytes_that_are_no_text_are_replaced_one_by_one():
    tokenizer = byte_tokenizer()
    lead, rest = plain_ids(tokenizer, "é")
    letter = plain_ids(tokenizer, "q")
    assert tokenise.pieces(tokenizer, [lead, *letter, rest, lead, lead, rest]) == [
        "�", "q", "�", "�", "", "é"]
    assert tokenise.pieces(tokenizer, [rest] * 20) == ["�"] * 20


def test_the_first_space_goes_as_when_decoding():
    tokenizer = unigram_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["▁the", "▁world", "▁", "▁the", "ld"])
    assert tokenise.pieces(tokenizer, ids) == ["the", " world", " ", " the", "ld"]


def test_pieces_without_a_tokenizer_are_the_ids():
    assert tokenise.pieces(None, [5, 0]) == ["⟨5⟩", "⟨0⟩"]
