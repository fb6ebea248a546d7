from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

import ftfy
import pytest
from ftfy import fixes
from ftfy.badness import BADNESS_RE, MOJIBAKE_CATEGORIES, is_bad
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longclip_rt import repair
from longclip_rt.repair import fix_text

if sys.version_info >= (3, 11):
    from re import _constants as sre_constants
    from re import _parser as sre_parse
else:
    import sre_constants
    import sre_parse

EVERYTHING = "".join(map(chr, range(0x110000)))
# What ftfy's expression names; of its ranges the ends.
SUSPICIOUS = sorted({c for c in EVERYTHING[128:0x2600] if any(c in text for text in MOJIBAKE_CATEGORIES.values())})
CODECS = ["latin-1", "sloppy-windows-1252", "sloppy-windows-1251", "sloppy-windows-1253", "macroman", "cp437"]
PIECES = [
    *("&amp;", "&eacute;", "&EACUTE;", "&#x85;", "&#233;", "&lt;", "&", "<", "\n", "\r\n", "\r", "\u2028", "\x85"),
    *("\x1b[31m", "\x1b", "\x00", "\x7f", "\ufeff", "\ufffc", "\ufffd", "\ud83d", "\ude00", "e\u0301", "\u0301"),
    *("\ufb01", "\u0132", "\uff21", "\uff76\uff9e", "\u3000", "\u2018", "\u201d", "\u02bc", "a", "Z", " ", "."),
    *("\u0413\u045e\u0412\u0402\u0412.a", "\u0432\u0402", "\u00e0\u00b2", "\u00d9\u00b7\u00d8\u2019", "x" * 15),
]


def mojibake(text: str, codec: str) -> str:
    return text.encode("utf-8", "replace").decode(codec, "replace")


pieces = (
    st.sampled_from(PIECES)
    | st.sampled_from(SUSPICIOUS)
    | st.characters(exclude_categories=())
    | st.text("ab ", max_size=9)
)
joined = st.lists(pieces, max_size=25).map("".join)
broken = st.builds(mojibake, joined, st.sampled_from(CODECS))
texts = joined | broken | st.builds(str.__add__, joined, broken)


@settings(max_examples=1500, deadline=None)
@given(text=texts)
@example(text="\u00c2 a\n\u00c2 b")
@example(text="a&lt;b\n&amp; < &amp;\n&amp;")
def test_it_equals_ftfy(text: str) -> None:
    assert fix_text(text) == ftfy.fix_text(text)
    assert repair._is_bad(text) == is_bad(text)


def test_texts_longer_than_ftfys_segments_equal_ftfys() -> None:
    # ftfy cuts them, here within an entity.
    text = "x" * 999_998 + "&amp;" + "caf\u00e9"
    assert fix_text(text) == ftfy.fix_text(text) != text.replace("&amp;", "&")


@pytest.mark.parametrize(
    ("text", "fixed"),
    [
        ("\u00ab caf\u00e9 \u00bb \u00e0 l\u2019\u00e9t\u00e9\n", "\u00ab caf\u00e9 \u00bb \u00e0 l'\u00e9t\u00e9\n"),
        ("\u201cIt\u2019s\u201d &amp; \uff21\ufb01e\u0301\r\n", "\"It's\" & Afi\u00e9\n"),
        ("\x1b[1mb\x00\ufeff\u2028\ud83d", "b\n\ufffd"),
        ("\u8d64\u3044\u30b3\u30fc\u30c8", "\u8d64\u3044\u30b3\u30fc\u30c8"),
    ],
)  # fmt: skip
def test_texts_that_are_no_mojibake_do_without_ftfys_search(
    text: str, fixed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ftfy.fix_text(text) == fixed
    monkeypatch.setattr(ftfy, "fix_text", None)
    assert fix_text(text) == fixed


def test_only_the_lines_that_may_be_mojibake_go_to_ftfy(monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = ftfy.fix_text, []
    monkeypatch.setattr(ftfy, "fix_text", lambda text: seen.append(text) or original(text))
    assert fix_text("caf\u00e9\n\u00e2\u20ac\u0153a\u00e2\u20ac\n\u8d64") == original(
        "caf\u00e9\n\u00e2\u20ac\u0153a\u00e2\u20ac\n\u8d64"
    )
    assert seen == ["\u00e2\u20ac\u0153a\u00e2\u20ac\n"]


def members(element: tuple[Any, Any]) -> str | None:
    """The characters that an element of an expression matches; None where it is no plain set of them."""
    operation, argument = element
    if operation is sre_constants.LITERAL:
        return chr(argument)
    if operation is not sre_constants.IN:
        return None
    characters = []
    for kind, value in argument:
        if kind is sre_constants.LITERAL:
            characters.append(chr(value))
        elif kind is sre_constants.RANGE:
            characters += map(chr, range(value[0], value[1] + 1))
        else:
            return None
    return "".join(characters)


def alternatives() -> Iterator[list[tuple[Any, Any]]]:
    assert not BADNESS_RE.flags & re.MULTILINE
    parsed = sre_parse.parse(BADNESS_RE.pattern, BADNESS_RE.flags)
    assert parsed.getwidth()[1] == repair._REACH + 1
    ((operation, (_, branches)),) = parsed
    assert operation is sre_constants.BRANCH
    yield from map(list, branches)


def test_every_alternative_of_ftfys_expression_needs_a_clue() -> None:
    """And none looks around itself, so that it matches the same in a part of the text, but for a text's beginning."""
    allowed = {"LITERAL", "IN", "ANY", "MAX_REPEAT", "AT"}
    clue = repair._CLUSTER
    count = 0
    for elements in alternatives():
        count += 1
        assert {str(operation) for operation, _ in elements} <= allowed
        places = [argument for operation, argument in elements if operation is sre_constants.AT]
        assert places in ([], [sre_constants.AT_BEGINNING])
        needed = [characters for element in elements if (characters := members(element)) is not None]
        assert any(all(clue.fullmatch(character) for character in characters) for characters in needed)
    assert count > 30


def test_each_fix_changes_only_the_characters_it_is_tried_for() -> None:
    c1 = "".join(map(chr, range(0x80, 0xA0)))
    assert all(is_bad(character) for character in c1)
    rest = EVERYTHING[:0x80] + EVERYTHING[0xA0:]
    assert fixes.fix_c1_controls(rest) == rest
    tried: set[str] = set()
    for characters, fix in repair._FIXES:
        others = characters.sub("", rest)
        assert fix(others) == others
        tried.update(characters.findall(rest))
    assert set(repair._FIXABLE.findall(EVERYTHING)) == tried
