"""Cleaning of texts as `open_clip.tokenizer.SimpleTokenizer` does it, before they are cut into tokens.

That is ftfy, HTML entities decoded twice, white space collapsed and lower case. Plain text, which is most text, needs
only the last two, and those the tokenizer leaves to Arrow.
"""

from __future__ import annotations

import html
import re

from longclip_rt.errors import InputError

# On these characters ftfy does nothing but decode HTML entities and rewrite line ends, which the white-space collapse
# undoes. The other ASCII control characters are left out because ftfy deletes them or reads terminal escapes from them.
_PLAIN = re.compile(r"[\t\n\r -~]*")
# An ampersand before white space or at the end begins no entity, neither for ftfy nor for html.unescape.
_ENTITY = re.compile(r"&\S")


def needs_repair(text: str) -> bool:
    """Whether cleaning changes more of a text than ASCII white space and ASCII case."""
    if not text.isascii() or not _PLAIN.fullmatch(text):
        return True
    return "&" in text and _ENTITY.search(text) is not None


def repair_text(text: str, name: str = "It") -> str:
    """Cleans a text that needs repair.

    Args:
        text: Any string.
        name: What the message calls the text.

    Returns:
        Lower case, words parted by single blanks.

    Raises:
        InputError: It holds a character reference that Python refuses to decode.
    """
    import ftfy

    try:
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    except ValueError as error:
        # Python refuses to convert integers of more than 4300 digits, in the reference as well.
        raise InputError(f"{name} holds a character reference that cannot be decoded: {error}.") from error
    return " ".join(text.split()).lower()
