"""The real photographs and captions that ship with the package; the export parity gate runs on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol

from longclip_rt.errors import LongClipError

# The borders that matter: Long-CLIP's 20 kept position rows, CLIP's 77, and the context's last rows (247 is the longest
# text whose EOT still has a free row after it).
EXACT_LENGTHS = (3, 4, 5, 8, 12, 15, 16, 17, 20, 21, 24, 32, 48, 64, 76, 77, 78, 100, 128, 160, 192, 224, 246, 247, 248)

_FOLDER = Path(__file__).parent.parent / "assets" / "examples"


@dataclass(frozen=True, slots=True)
class Caption:
    """What a person would say about one photograph, in a sentence and at length."""

    photo: Path
    short: str
    long: str


class _Tokens(Protocol):
    @property
    def length(self) -> int: ...


class Encoder(Protocol):
    """The part of `longclip_rt.model.tokenizer.Tokenizer` that measures texts."""

    def encode(self, texts: Sequence[str], /) -> Sequence[_Tokens]:
        """Tokens of each text; `.length` counts SOT and EOT, before truncation."""
        ...


def example_photos() -> list[Path]:
    """Paths of the photographs, in the order of `example_captions`.

    Raises:
        LongClipError: the files are not where the package keeps them.
    """
    return [caption.photo for caption in example_captions()]


def example_captions() -> list[Caption]:
    """A short caption (8 to 20 words) and a long one (120 to 246 CLIP tokens) of each photograph.

    Raises:
        LongClipError: the files are not where the package keeps them.
    """
    rows = json.loads(_read("captions.json"))
    return [Caption(_FOLDER / row["photo"], row["short"], row["long"]) for row in rows]


def unicode_texts() -> list[str]:
    """Sentences in many languages and scripts, and with emoji and typographic signs.

    Raises:
        LongClipError: the file is not where the package keeps it.
    """
    return _read("unicode.txt").splitlines()


def parity_texts(tokenizer: Encoder) -> list[str]:
    """The texts an export must get right: every border of length, truncation, and many scripts.

    Deterministic, without duplicates: the empty text (2 tokens), a piece of the captions for each of `EXACT_LENGTHS`,
    two texts that are truncated (249 tokens and all captions in one), each caption, and `unicode_texts`.

    Args:
        tokenizer: measures the texts, so that "exactly 248 tokens" is true for the tokenizer that is exported.

    Raises:
        LongClipError: no prefix has one of the lengths (another vocabulary), or the files are not in the package.
    """
    captions = example_captions()
    sentences = [sentence for caption in captions for sentence in _sentences(caption.long)]
    exact = [
        # Each begins with another sentence: texts that share a long prefix are such near neighbours of one
        # another that the order of their scores would say nothing about the export.
        _prefix_of_length(sentences, 7 * index, length, tokenizer)
        for index, length in enumerate((*EXACT_LENGTHS, 249))
    ]
    everything = " ".join(caption.long for caption in captions)
    whole = chain.from_iterable((caption.short, caption.long) for caption in captions)
    return list(dict.fromkeys(["", *exact, everything, *whole, *unicode_texts()]))


def _sentences(text: str) -> list[str]:
    """Splits at a full stop that is followed by a space, and keeps it."""
    return [part if part.endswith(".") else part + "." for part in text.split(". ")]


def _prefix_of_length(sentences: list[str], start: int, length: int, tokenizer: Encoder) -> str:
    """The first run of whole words, from the sentence `start` on, that has exactly `length` tokens."""
    for shift in range(len(sentences)):
        first = (start + shift) % len(sentences)
        # A word is at least one token, so `length` words are enough.
        words = " ".join(sentences[first:] + sentences[:first]).split()[:length]
        prefixes = [" ".join(words[:count]) for count in range(1, len(words) + 1)]
        for prefix, tokens in zip(prefixes, tokenizer.encode(prefixes), strict=True):
            if tokens.length == length:
                return prefix
    raise LongClipError(
        f"No part of the example captions has exactly {length} tokens with this tokenizer; "
        "CLIP's byte-pair vocabulary is expected."
    )


def _read(name: str) -> str:
    try:
        return (_FOLDER / name).read_text(encoding="utf-8")
    except OSError as error:
        raise LongClipError(
            f"The example data of the package cannot be read ({error.strerror}: {_FOLDER / name}). "
            "It belongs to every installation: install longclip-rt again."
        ) from error
