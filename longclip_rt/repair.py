"""`ftfy.fix_text` with its defaults, in a tenth of the time on texts that are no mojibake.

ftfy spends that time on proving, again after each change, that a text is no mojibake, with one large regular
expression over all of it, and on tables that it applies to every character though they change few. Here the expression
sees only the neighbourhood of characters without which it cannot match, and a table is applied only where it changes
something. Lines that may be mojibake are handed to ftfy itself.

The code follows that of ftfy 6.3.1, and `tests/test_repair.py` proves what it rests on: that each alternative of ftfy's
expression needs one of `_CLUES` and spans seven characters at most, and which characters the tables change.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable

import ftfy
from ftfy import chardata, fixes
from ftfy.badness import BADNESS_RE, MOJIBAKE_CATEGORIES

_CLUE_CATEGORIES = (
    "c1", "bad", "law", "currency", "start_punctuation", "end_punctuation", "numeric", "box", "upper_accented",
)  # fmt: skip
_CLUES = "".join(MOJIBAKE_CATEGORIES[name] for name in _CLUE_CATEGORIES) + "°œÙЂ"
# How far a match reaches beyond its clue, to either side.
_REACH = 6
# Clues whose neighbourhoods overlap, taken together; a hundred at most, to bound the memory of matching.
_CLUSTER = re.compile(f"[{_CLUES}](?:.{{0,{2 * _REACH}}}[{_CLUES}]){{0,99}}", re.DOTALL)

# ftfy fixes lines on their own, each with its line feed.
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
# It cuts lines that are longer.
_LONGEST_LINE = 1_000_000


def _all_of(table: Iterable[int]) -> str:
    return re.escape("".join(map(chr, table)))


# The characters that each of ftfy's fixes changes, in its order. Its fix of C1 control characters is left out, since a
# line with one of them is bad.
_CHANGED: tuple[tuple[str, Callable[[str], str]], ...] = (
    (_all_of(chardata.LIGATURES), fixes.fix_latin_ligatures),
    (_all_of(chardata.WIDTH_MAP), fixes.fix_character_width),
    ("\u02bc\u2018-\u201f", fixes.uncurl_quotes),
    ("\r\u2028\u2029", fixes.fix_line_breaks),
    ("\ud800-\udfff", fixes.fix_surrogates),
    ("\x1b", fixes.remove_terminal_escapes),
    (_all_of(chardata.CONTROL_CHARS), fixes.remove_control_chars),
)
_FIXES = [(re.compile(f"[{characters}]"), fix) for characters, fix in _CHANGED]
_FIXABLE = re.compile(f"[{''.join(characters for characters, _ in _CHANGED)}]")


def fix_text(text: str) -> str:
    """Returns what `ftfy.fix_text` returns.

    Args:
        text: Any string.
    """
    # Where a "<" stands decides in which lines ftfy decodes entities; other lines know nothing of each other.
    if "<" in text or len(text) > _LONGEST_LINE:
        return str(ftfy.fix_text(text))
    return "".join(map(_fix_line, _LINE.findall(text)))


def _fix_line(line: str) -> str:
    """Fixes a line without "<" until there is nothing left to fix."""
    fixed = line
    while True:
        before = fixed
        if "&" in fixed:
            fixed = fixes.unescape_html(fixed)
        if _is_bad(fixed):
            return str(ftfy.fix_text(line))
        if _FIXABLE.search(fixed):
            for characters, fix in _FIXES:
                if characters.search(fixed):
                    fixed = fix(fixed)
        fixed = unicodedata.normalize("NFC", fixed)
        if fixed == before:
            return fixed


def _is_bad(text: str) -> bool:
    """Whether ftfy takes a text for mojibake."""
    clusters = _CLUSTER.finditer(text)
    return any(BADNESS_RE.search(text, max(0, c.start() - _REACH), c.end() + _REACH) for c in clusters)
