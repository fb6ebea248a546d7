from __future__ import annotations

import functools
import importlib.metadata
import json
import random
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from longclip_rt.errors import BundleError, InputError, LongClipError
from longclip_rt.model.tokenizer import Tokenizer, pad_tokens
from longclip_rt.model.vocabulary import tokenizer_json

SOT, EOT = 49406, 49407
REFERENCE = SimpleTokenizer(context_length=248)
EVERYTHING = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)

CAPTION = (
    "A weathered fishing boat rests on wet sand at low tide; two children, barefoot, don't notice the photographer. "
    "Behind them it's getting dark & the harbour's 12 lamps are lit."
)
WITHOUT_BLANKS = (
    r"<start_of_text> <end_of_text> <START_OF_TEXT> <End_Of_Text> <start_of_text end_of_text> </w> < > ' ` \ "
    "<\u017ftart_of_text> <\u017fTART_OF_TEXT> <\ufb06art_of_text> \u0345 \u0130 \u0131 \u212a \u03a3 \u00df "
    "' 's 'S '\u017f 't 're 'VE 'm 'll 'd \u2019s \uff07s \" \u201cquoted\u201d "
    "\u200b \u180e \x00 \x1b \x1b[31m \x7f \x9d \ufeff \ufffc "
    "e\u0301 \ufb01 \ufb06 \uff21\uff11 \u2167 \u00bd \u0663 \u65e5\u672c\u8a9e \u0645\u0631\u062d\u0628\u0627 "
    "\U0001f469\u200d\U0001f680 \ud83d \ude00 \ud83d\ude00 "
    "\u00e2\u20ac\u2122 \u00c3\u00a9 \u00f0\u0178\u02dc\u20ac "
    "& &amp; &AMP; &amp &lt; &amp;lt; &amp;amp;lt; &amp;amp;amp;lt; &eacute; &EACUTE; &notin &nbsp; &amp;nbsp; "
    "&#39; &#x27;s &amp;#39; &#0; &#1; &#13; &#128; &#xd800; &#x110000; &#x17f; &#837; "
    "&lt;start_of_text&gt; &lt;&#x17f;tart_of_text&gt; 0123 supercalifragilisticexpialidocious"
)
BLANKS = (" ", "\n", "\t", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0", "\u2028", "\u3000")
FRAGMENTS = [*WITHOUT_BLANKS.split(" "), *BLANKS, "x" * 300, "!" * 70]


def reference_members(pattern: str) -> set[str]:
    return set("".join(regex.findall(f"(?:{pattern})+", EVERYTHING, regex.IGNORECASE)))


def our_members(pattern: str) -> set[str]:
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(f"(?:{pattern})+"), "removed", invert=True)
    return set("".join(piece for piece, _ in split.pre_tokenize_str(EVERYTHING)))


@functools.cache
def disputed() -> tuple[frozenset[str], frozenset[str]]:
    """Letters and digits that only one of the two Unicode versions knows."""
    letters, digits = (frozenset(reference_members(p) ^ our_members(p)) for p in (r"\p{L}", r"\p{N}"))
    return letters, digits


def is_settled(text: str) -> bool:
    """Whether both versions agree on the text once it is clean: repairs bring characters that it did not hold."""
    cleaned = REFERENCE.clean_fn(text)
    return all(characters.isdisjoint(cleaned) for characters in disputed())


texts_of_fragments = st.lists(
    st.one_of(
        st.sampled_from(FRAGMENTS),
        st.characters(exclude_categories=()),
        st.characters(max_codepoint=127),
        st.text("abcdefgh", max_size=12),
    ),
    max_size=20,
).map("".join)
arbitrary_texts = st.one_of(texts_of_fragments, st.text(st.characters(exclude_categories=()))).filter(is_settled)


@pytest.fixture(scope="module")
def bundle_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "tokenizer.json"
    path.write_text(tokenizer_json(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(bundle_file: Path) -> Tokenizer:
    return Tokenizer.from_file(bundle_file)


def assert_same_as_reference(tokenizer: Tokenizer, texts: list[str]) -> None:
    for text, tokens in zip(texts, tokenizer.encode(texts), strict=True):
        expected = [SOT, *REFERENCE.encode(text), EOT]
        assert tokens.length == len(expected), ascii(text)
        np.testing.assert_array_equal(tokens.ids, REFERENCE([text])[0].numpy()[: len(tokens.ids)], err_msg=ascii(text))


@settings(max_examples=600, deadline=None)
@given(texts=st.lists(arbitrary_texts, min_size=1, max_size=4))
def test_arbitrary_unicode_gives_the_reference_ids(tokenizer: Tokenizer, texts: list[str]) -> None:
    np.testing.assert_array_equal(tokenizer(texts), REFERENCE(texts).numpy())


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(max_codepoint=127)))
def test_arbitrary_ascii_gives_the_reference_ids(tokenizer: Tokenizer, text: str) -> None:
    assert_same_as_reference(tokenizer, [text])


def test_every_pair_of_ascii_characters_gives_the_reference_ids(tokenizer: Tokenizer) -> None:
    ascii_characters = [chr(code) for code in range(128)]
    texts = [first + second for first in ascii_characters for second in ascii_characters]
    for text, tokens in zip(texts, tokenizer.encode(texts), strict=True):
        assert tokens.ids.tolist() == [SOT, *REFERENCE.encode(text), EOT], ascii(text)


@pytest.mark.parametrize("fragment", FRAGMENTS, ids=ascii)
def test_awkward_fragments_give_the_reference_ids(tokenizer: Tokenizer, fragment: str) -> None:
    neighbours = ["", " ", "a", "1", "!", "'", "<", ";", "&", "\u00e9", "'s", "<end_of_text>", fragment]
    assert_same_as_reference(tokenizer, [left + fragment + right for left in neighbours for right in neighbours])


def test_every_code_point_splits_as_in_the_reference(bundle_file: Path) -> None:
    pattern = json.loads(bundle_file.read_text(encoding="utf-8"))["pre_tokenizer"]["pretokenizers"][0]["pattern"][
        "Regex"
    ]
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "removed", invert=True)
    agreed = sorted(set(EVERYTHING).difference(*disputed()))
    # What cleaning cannot produce is left out: upper case, and white space other than the blank.
    characters = [c for c in agreed if c == c.lower() and (c == " " or not c.isspace())]
    assert len(characters) > 1_000_000
    assigned = [c for c in characters if unicodedata.category(c) not in {"Cn", "Co"}]
    random.Random(0).shuffle(assigned)
    for text in ("".join(characters), "".join(assigned)):
        assert [piece for piece, _ in split.pre_tokenize_str(text)] == REFERENCE.pat.findall(text)


def test_unicode_versions_disagree_on_unassigned_code_points_only() -> None:
    letters, digits = disputed()
    assert reference_members(r"\p{Cn}") ^ our_members(r"\p{Cn}") >= letters | digits
    versions = (importlib.metadata.version("regex"), importlib.metadata.version("tokenizers"))
    # The counts in the module's docstring; other versions may have others.
    documented = {("2026.11.15", "0.23.3"): (17_144, 336)}
    counts = (len(letters), len(digits))
    assert documented.get(versions, counts) == counts


@pytest.mark.parametrize(
    ("text", "specials"),
    [
        ("<start_of_text>", [SOT]),
        ("a <START_of_text> b<end_of_text>", [SOT, EOT]),
        ("<end_of_text><end_of_text>", [EOT, EOT]),
        ("!<start_of_text>", []),
        ("<<end_of_text>", []),
        ("<\u017ftart_of_text>", []),
        ("&lt;start_of_text&gt;", [SOT]),
        ("&amp;amp;lt;end_of_text&amp;amp;gt;", [EOT]),
    ],
)
def test_a_written_out_special_token_counts_only_where_the_reference_finds_it(
    tokenizer: Tokenizer, text: str, specials: list[int]
) -> None:
    assert_same_as_reference(tokenizer, [text])
    ids = tokenizer.encode([text])[0].ids[1:-1]
    assert [i for i in ids if i in (SOT, EOT)] == specials


def test_long_words_and_texts_give_the_reference_ids(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    word = "".join(rng.choice("etaoinshrdlu") for _ in range(1500))
    text_over_one_call = " ".join(rng.choice(CAPTION.split()) for _ in range(220_000))
    assert len(text_over_one_call) > 1 << 20
    text_with_late_special = "a " * 40_000 + "!<end_of_text> <end_of_text>"
    texts = [word, "!" * 1500, "\u65e5" * 700, text_over_one_call, "short", text_with_late_special]
    for text, tokens in zip(texts, tokenizer.encode(texts), strict=True):
        expected = REFERENCE.encode(text)
        assert tokens.length == len(expected) + 2
        np.testing.assert_array_equal(tokens.ids, [SOT, *expected[:246], EOT])


def test_a_word_too_long_to_be_cut_is_encoded_whole(tokenizer: Tokenizer) -> None:
    # "a" a hundred thousand times, for which the reference takes minutes.
    alone, before_another = tokenizer.encode(["a" * 100_000, "a" * 100_000 + " b"])
    assert before_another.length == alone.length + 1
    assert alone.length > 10_000


def test_truncation_keeps_the_end_token(tokenizer: Tokenizer) -> None:
    for words in (245, 246, 247, 300):
        (tokens,) = tokenizer.encode(["dog " * words])
        assert tokens.length == words + 2
        assert tokens.truncated == (words > 246)
        assert len(tokens.ids) == min(words + 2, 248)
        assert (tokens.ids[0], tokens.ids[-1], tokens.ids.dtype) == (SOT, EOT, np.int32)
        np.testing.assert_array_equal(tokenizer(["dog " * words]), REFERENCE(["dog " * words]).numpy())


@pytest.mark.parametrize("context_length", [2, 3, 77])
def test_other_context_lengths(bundle_file: Path, context_length: int) -> None:
    short = Tokenizer.from_file(bundle_file, context_length)
    texts = ["", "dog", CAPTION]
    np.testing.assert_array_equal(short(texts), REFERENCE(texts, context_length=context_length).numpy())


def test_rows_are_padded_with_zero(tokenizer: Tokenizer) -> None:
    rows = tokenizer(["", CAPTION])
    assert rows.shape == (2, 248)
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows[0], [SOT, EOT] + [tokenizer.pad] * 246)
    np.testing.assert_array_equal(tokenizer(CAPTION)[0], rows[1])
    assert tokenizer([]).shape == (0, 248)
    assert tokenizer.encode([]) == []


def test_without_truncation_a_longer_text_is_refused(tokenizer: Tokenizer) -> None:
    assert tokenizer(["dog " * 246], truncate=False).shape == (1, 248)
    with pytest.raises(InputError, match=r"Text 1 has 249 tokens, more than the context length of 248"):
        tokenizer(["dog", "dog " * 247], truncate=False)


def test_what_the_reference_cannot_decode_is_an_input_error(tokenizer: Tokenizer) -> None:
    text = "&#" + "1" * 5000 + ";"
    with pytest.raises(ValueError, match="4300"):
        REFERENCE.encode(text)
    with pytest.raises(InputError, match="Text 1 holds a character reference"):
        tokenizer.encode(["fine", text])


def test_an_item_that_is_no_text_is_an_input_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="Text 1 is of type NoneType; expected str"):
        tokenizer.encode(["fine", None])  # type: ignore[list-item]


def test_small_bounds_of_memory_change_nothing(bundle_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bound in ("_MAX_CHARACTERS_AT_ONCE", "_MAX_WORDS_A_CALL", "_MAX_KNOWN_WORDS", "_MAX_KNOWN_WORD_LENGTH"):
        monkeypatch.setattr(f"longclip_rt.model.tokenizer.{bound}", 5)
    tokenizer = Tokenizer.from_file(bundle_file)
    for _ in range(2):
        assert_same_as_reference(tokenizer, [CAPTION, "", "a dog", "a dog <end_of_text>", "caf\u00e9", CAPTION.upper()])


def test_threads_share_one_tokenizer(tokenizer: Tokenizer) -> None:
    chunks = [[f"{CAPTION} {i} {j} \u00e9<end_of_text>" for j in range(20)] for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(tokenizer, chunks))
    for chunk, rows in zip(chunks, together, strict=True):
        np.testing.assert_array_equal(rows, tokenizer(chunk))


def test_needs_neither_torch_nor_open_clip(bundle_file: Path) -> None:
    code = (
        "import sys; from longclip_rt.model.tokenizer import Tokenizer; "
        f"print(Tokenizer.from_file({str(bundle_file)!r})(['caf\\u00e9 <end_of_text>'])[0, :5].tolist(), "
        "sorted({'torch', 'open_clip', 'regex', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[49406, 15304, 49407, 49407, 0] []"


def test_files_that_are_no_tokenizer_of_ours_are_refused(tmp_path: Path, bundle_file: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(BundleError, match="cannot be read"):
        Tokenizer.from_file(path)
    foreign = json.loads(bundle_file.read_text(encoding="utf-8"))
    foreign["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    for content, message in [
        (b"\xff", "is not a JSON file"),
        (b"{", "is not a JSON file"),
        (b"[]", "holds a JSON list"),
        (b'{"model": {}}', "is not a tokenizers file"),
        (json.dumps(foreign).encode(), "vocabulary lacks <start_of_text>"),
    ]:
        path.write_bytes(content)
        with pytest.raises(BundleError, match=message):
            Tokenizer.from_file(path)


def test_a_context_without_room_is_refused(bundle_file: Path) -> None:
    with pytest.raises(LongClipError, match="at least 2"):
        Tokenizer.from_file(bundle_file, context_length=1)


def test_pad_tokens_stacks_sequences() -> None:
    sequences = [np.array([1, 2, 3], np.int32), np.array([4], np.int32)]
    padded = pad_tokens(sequences, 5)
    assert padded.dtype == np.int32
    np.testing.assert_array_equal(padded, [[1, 2, 3, 0, 0], [4, 0, 0, 0, 0]])
    assert pad_tokens([], 5).shape == (0, 5)
    with pytest.raises(InputError, match="Token sequence 0 has 3 ids"):
        pad_tokens(sequences, 2)
