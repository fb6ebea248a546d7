from __future__ import annotations

import json
import sys

import pytest
import tokenizers
from open_clip.tokenizer import SimpleTokenizer

from longclip_rt.errors import MissingExtraError
from longclip_rt.export.vocabulary import tokenizer_json

REFERENCE = SimpleTokenizer(context_length=248)
TEXTS = [
    "",
    "A dog's life!",
    "  TWO\tlines,\nand 3 blanks   ",
    "na\u00efve caf\u00e9, cafe\u0301",
    "\u65e5\u672c\u8a9e \U0001f600 it'\u017f don't",
    "an end <end_of_text>",
    "word " * 300,
]


@pytest.fixture(scope="module")
def written() -> str:
    return tokenizer_json()


@pytest.fixture(scope="module")
def foreign(written: str) -> tokenizers.Tokenizer:
    """The file as another program loads it, with its own normalizer and post-processor."""
    return tokenizers.Tokenizer.from_str(written)


def test_ids_are_those_of_open_clip(foreign: tokenizers.Tokenizer) -> None:
    assert foreign.get_vocab() == REFERENCE.encoder


def test_merges_keep_their_order(written: str) -> None:
    merges = json.loads(written)["model"]["merges"]
    assert [tuple(pair) for pair in merges] == list(REFERENCE.bpe_ranks)


@pytest.mark.parametrize("text", TEXTS)
def test_other_programs_get_the_reference_ids(foreign: tokenizers.Tokenizer, text: str) -> None:
    ids = foreign.encode(text).ids
    assert ids + [0] * (248 - len(ids)) == REFERENCE([text])[0].tolist()


def test_a_batch_is_padded_to_its_longest_text_with_zero(foreign: tokenizers.Tokenizer) -> None:
    short, long = foreign.encode_batch(["dog", "three more words"])
    assert long.ids == [49406, *REFERENCE.encode("three more words"), 49407]
    assert short.ids == [49406, *REFERENCE.encode("dog"), 49407, 0, 0]
    assert short.attention_mask == [1, 1, 1, 0, 0]


def test_truncation_goes_to_the_given_length() -> None:
    short = tokenizers.Tokenizer.from_str(tokenizer_json(context_length=77))
    assert short.encode("word " * 100).ids == REFERENCE(["word " * 100], context_length=77)[0].tolist()


def test_ids_decode_to_the_text(foreign: tokenizers.Tokenizer) -> None:
    text = "a caf\u00e9 in \u6771\u4eac \U0001f600 at 3"
    assert foreign.decode(foreign.encode(text).ids) == text


def test_without_open_clip_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip.tokenizer", None)
    with pytest.raises(MissingExtraError, match=r"longclip-rt\[export\]"):
        tokenizer_json()
