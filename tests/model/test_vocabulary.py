from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import tokenizers
from open_clip.tokenizer import SimpleTokenizer

from longclip_rt.bundle.samples import parity_texts, unicode_texts
from longclip_rt.errors import ExportError, MissingExtraError
from longclip_rt.model.tokenizer import Tokenizer
from longclip_rt.model.vocabulary import tokenizer_json

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
WHOLE = tokenizers.Tokenizer.from_str(tokenizer_json(context_length=10_000))


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
    for text in ("a caf\u00e9 in \u6771\u4eac \U0001f600 at 3", "dog", ""):
        assert foreign.decode(foreign.encode(text).ids) == text


CUT = 8192


@pytest.fixture(scope="module")
def cut() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(tokenizer_json(vocab_size=CUT))


@pytest.fixture(scope="module")
def cut_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("cut") / "tokenizer.json"
    path.write_text(tokenizer_json(vocab_size=CUT), encoding="utf-8")
    return Tokenizer.from_file(path)


def pieces(word: str, merges: int) -> list[str]:
    """Byte-pair encoding as its definition goes: the earliest merge first, wherever it applies."""
    parts = [REFERENCE.byte_encoder[byte] for byte in word.encode()]
    parts[-1] += "</w>"
    ranks = {pair: rank for pair, rank in REFERENCE.bpe_ranks.items() if rank < merges}
    while pairs := [pair for pair in itertools.pairwise(parts) if pair in ranks]:
        first = min(pairs, key=ranks.__getitem__)
        joined: list[str] = []
        for part in parts:
            # A part that was joined a step ago cannot be the first half: it is longer than that half.
            if joined and (joined[-1], part) == first:
                joined[-1] += part
            else:
                joined.append(part)
        parts = joined
    return parts


def test_a_cut_vocabulary_is_the_first_entries_and_the_special_tokens(cut: tokenizers.Tokenizer) -> None:
    expected = {token: token_id for token, token_id in REFERENCE.encoder.items() if token_id < CUT - 2}
    assert cut.get_vocab() == expected | {"<start_of_text>": CUT - 2, "<end_of_text>": CUT - 1}
    merges = json.loads(tokenizer_json(vocab_size=CUT))["model"]["merges"]
    assert len(merges) == CUT - 514 == 7678
    assert [tuple(pair) for pair in merges] == list(REFERENCE.bpe_ranks)[:7678]


def test_words_of_early_merges_alone_keep_their_ids(cut_tokenizer: Tokenizer) -> None:
    texts = ["a red ball", "two small houses", "a photo of the cat and the dog"]
    for text, tokens in zip(texts, cut_tokenizer.encode(texts), strict=True):
        whole = REFERENCE.encode(text)
        assert max(whole) < CUT - 2
        assert tokens.ids.tolist() == [CUT - 2, *whole, CUT - 1]


def test_other_words_are_split_as_the_first_merges_alone_split_them(cut_tokenizer: Tokenizer) -> None:
    words = ["pyramid", "turquoise", "hourglass", "na\u00efve", "\u6771\u4eac", "aaaaaaa", "mississippi"]
    for word, tokens in zip(words, cut_tokenizer.encode(words), strict=True):
        expected = [REFERENCE.encoder[piece] for piece in pieces(word, CUT - 514)]
        assert tokens.ids.tolist() == [CUT - 2, *expected, CUT - 1]
        assert len(expected) >= len(REFERENCE.encode(word))


@pytest.mark.parametrize("size", [515, 1024, CUT])
def test_with_a_cut_vocabulary_every_text_encodes_and_decodes(size: int) -> None:
    cut = tokenizers.Tokenizer.from_str(tokenizer_json(context_length=10_000, vocab_size=size))
    for text in [*unicode_texts(), *TEXTS[:5], "a " + "".join(chr(code) for code in range(0x100, 0x180))]:
        ids = cut.encode(text).ids
        assert ids[0] == size - 2 and ids[-1] == size - 1 and max(ids[1:-1], default=0) < size - 2
        # What the text looks like once it is normalised and its tokens are set apart is the whole vocabulary's matter.
        assert cut.decode(ids) == WHOLE.decode(WHOLE.encode(text).ids)


def test_spelled_out_special_tokens_are_the_cut_vocabularys_own(cut_tokenizer: Tokenizer) -> None:
    (tokens,) = cut_tokenizer.encode(["a <start_of_text>b <end_of_text>"])
    a, b = REFERENCE.encode("a b")
    assert tokens.ids.tolist() == [CUT - 2, a, CUT - 2, b, CUT - 1, CUT - 1]
    assert cut_tokenizer(["a"])[0, :4].tolist() == [CUT - 2, a, CUT - 1, 0]


@pytest.mark.parametrize("size", [515, CUT])
def test_the_gates_texts_exist_with_a_cut_vocabulary(size: int, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer_json(vocab_size=size), encoding="utf-8")
    tokenizer = Tokenizer.from_file(path)
    lengths = {tokens.length for tokens in tokenizer.encode(parity_texts(tokenizer))}
    assert {2, 3, 20, 21, 77, 78, 247, 248, 249} <= lengths


@pytest.mark.parametrize("size", [0, 514, 49409])
def test_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(ExportError, match=f"between 515 and 49408 entries; got {size}"):
        tokenizer_json(vocab_size=size)


def test_without_open_clip_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip.tokenizer", None)
    with pytest.raises(MissingExtraError, match=r"longclip-rt\[export\]"):
        tokenizer_json()
