"""Text to int32 token ids, without torch.

The ids are those of `open_clip.tokenizer.SimpleTokenizer` for every `str`, with one exception that is a matter of
Unicode versions. The reference decides what is a letter or a digit with the tables of the `regex` package, this module
with those of Oniguruma inside `tokenizers`. Between regex 2026.11.15 (Unicode 18) and tokenizers 0.23.3 (Unicode 16)
17,480 code points differ: all of them are unassigned in the older version, 17,144 are letters and 336 digits in the
newer one. Such a character counts as punctuation here, which changes the ids only where it touches a letter, a digit
or punctuation. `tests/model/test_tokenizer.py` computes the set for the installed versions and holds every other code
point to equality.

Cleaning is the reference's own sequence (`longclip_rt.model.cleaning`). No token spans a blank, so each different word
of a batch is looked up once: Arrow finds the words, byte-pair encoding of those not met before runs in Rust, both
without the GIL.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from longclip_rt.errors import BundleError, InputError, LongClipError
from longclip_rt.model.cleaning import needs_repair, repair_text

if TYPE_CHECKING:
    import tokenizers

START = "<start_of_text>"
END = "<end_of_text>"
WORD_END = "</w>"
PAD_ID = 0

# Bounds of memory: text handled at once; words in one call into Rust, which needs 100 bytes for every character; and
# words remembered, at some 200 bytes each.
_MAX_CHARACTERS_AT_ONCE = 1 << 20
_MAX_WORDS_A_CALL = 1 << 12
_MAX_KNOWN_WORDS = 1 << 16
_MAX_KNOWN_WORD_LENGTH = 32


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """One tokenized text.

    Attributes:
        ids: int32 [n], start token to end token, n <= context length, no padding. A truncated text keeps its end token.
        length: Tokens of the whole text before truncation, start and end tokens included.
    """

    ids: npt.NDArray[np.int32]
    length: int

    @property
    def truncated(self) -> bool:
        """Whether the text had more tokens than the context length."""
        return self.length > len(self.ids)


class Tokenizer:
    """CLIP's byte-pair tokenizer with the cleaning of open_clip. Threads may share one.

    Attributes:
        context_length: Largest number of ids of one text, start and end tokens included.
        sot: Id of the start token.
        eot: Id of the end token.
        vocab_size: Number of tokens.
        pad: Id that fills the rows which `__call__` returns; 0, as in the reference.
    """

    def __init__(self, rust: tokenizers.Tokenizer, context_length: int = 248) -> None:
        """Wraps a tokenizer of the `tokenizers` library that has no normalizer, added tokens or post-processor.

        Args:
            rust: Splits and encodes a cleaned text; `from_file` builds it.
            context_length: At least 2.

        Raises:
            LongClipError: The context length has no room for the start and the end token.
            BundleError: The vocabulary has no start or end token.
        """
        if context_length < 2:
            raise LongClipError(f"context_length is {context_length}; at least 2 are needed, for start and end tokens.")
        sot, eot = rust.token_to_id(START), rust.token_to_id(END)
        if sot is None or eot is None:
            raise BundleError(
                f"The tokenizer's vocabulary lacks {START} or {END}; expected the one that longclip-rt export writes."
            )
        self._rust = rust
        self.context_length = context_length
        self.sot: int = sot
        self.eot: int = eot
        self.vocab_size = int(rust.get_vocab_size())
        self.pad = PAD_ID
        # Word -> its ids as the bytes of an int32 array. Threads share it: losing or repeating an entry does no harm.
        self._known: dict[str, bytes] = {}

    @classmethod
    def from_file(cls, path: str | Path, context_length: int = 248) -> Tokenizer:
        """Reads a bundle's tokenizer.json.

        The file's normalizer, added tokens, post-processor, truncation and padding serve other programs and are left
        out: the normalizer is weaker than the reference's cleaning, and added tokens are found where the reference does
        not find them.

        Args:
            path: File that `longclip_rt.model.vocabulary.tokenizer_json` wrote.
            context_length: Largest number of ids of one text, start and end tokens included.

        Raises:
            BundleError: The file cannot be read or holds another kind of tokenizer.
        """
        import tokenizers

        description = _read_description(Path(path))
        description |= dict.fromkeys(("normalizer", "post_processor", "truncation", "padding", "decoder"))
        description["added_tokens"] = []
        try:
            rust = tokenizers.Tokenizer.from_str(json.dumps(description))
        except Exception as error:  # the library raises bare Exception for what it cannot parse
            raise BundleError(f"{path} is not a tokenizers file: {error}. Export the bundle again.") from error
        try:
            return cls(rust, context_length)
        except BundleError as error:
            raise BundleError(f"{path}: {error}") from error

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokenizes texts, truncating those longer than the context length.

        Args:
            texts: Any strings. A single `str` counts as one text.

        Returns:
            One `Tokens` a text, in order.

        Raises:
            InputError: An item is not a str, or holds a character reference that Python refuses to decode.
        """
        if isinstance(texts, str):
            texts = [texts]
        return self.encode_cleaned([_clean(text, index) for index, text in enumerate(texts)])

    def encode_cleaned(self, texts: Iterable[str]) -> list[Tokens]:
        """Tokenizes texts that need no cleaning any more, for callers who clean elsewhere.

        Args:
            texts: Each one a text that needs no repair, or the answer of `longclip_rt.model.cleaning.repair_text`.

        Returns:
            One `Tokens` a text, in order.
        """
        return [tokens for group in _groups(texts) for tokens in self._encode_group(group)]

    def __call__(self, texts: Sequence[str], truncate: bool = True) -> npt.NDArray[np.int32]:
        """Tokenizes texts into the reference's layout.

        Args:
            texts: Any strings. A single `str` counts as one text.
            truncate: Cut longer texts, keeping their end token; otherwise refuse them.

        Returns:
            int32 [N, context_length], padded with 0.

        Raises:
            InputError: As for `encode`, or a text is too long and `truncate` is false.
        """
        tokens = self.encode(texts)
        if not truncate:
            for index, item in enumerate(tokens):
                if item.truncated:
                    raise InputError(
                        f"Text {index} has {item.length} tokens, more than the context length of "
                        f"{self.context_length}. Shorten it, or allow truncation."
                    )
        return pad_tokens([item.ids for item in tokens], self.context_length)

    def _encode_group(self, texts: list[str]) -> Iterator[Tokens]:
        """Encodes cleaned texts: ids of each different word, then of all in their order, cut into texts."""
        import pyarrow as pa
        import pyarrow.compute as pc

        # In texts that were repaired both steps find nothing more to change.
        words = pc.ascii_split_whitespace(pc.ascii_lower(pa.array(texts, pa.large_string())))
        encoded = words.values.dictionary_encode()
        found = self._ids_of_words(encoded.dictionary.to_pylist())
        word_ids = np.frombuffer(b"".join(found), np.int32)
        word_counts = np.fromiter(map(len, found), np.int64, len(found)) // np.dtype(np.int32).itemsize
        word_starts = np.cumsum(word_counts) - word_counts

        order = encoded.indices.to_numpy()  # [W] which different word stands at each place
        counts = word_counts[order]
        ends = np.cumsum(counts)
        places = np.repeat(word_starts[order] - (ends - counts), counts) + np.arange(counts.sum())
        ids = word_ids[places]
        bounds = np.concatenate(([0], ends))[words.offsets.to_numpy()].tolist()
        for start, end in itertools.pairwise(bounds):
            kept = min(end - start, self.context_length - 2)
            framed = np.empty(kept + 2, np.int32)
            framed[0] = self.sot
            framed[1:-1] = ids[start : start + kept]
            framed[-1] = self.eot
            yield Tokens(framed, end - start + 2)

    def _ids_of_words(self, words: list[str]) -> list[bytes]:
        """Looks words up, and encodes and remembers those that are not known."""
        found = [self._known.get(word) for word in words]
        new = self._encode_words([word for word, ids in zip(words, found, strict=True) if ids is None])
        short = (item for item in new.items() if len(item[0]) <= _MAX_KNOWN_WORD_LENGTH)
        kept = dict(itertools.islice(short, _MAX_KNOWN_WORDS))
        if len(self._known) + len(kept) > _MAX_KNOWN_WORDS:
            self._known.clear()
        self._known.update(kept)
        return [new[word] if ids is None else ids for word, ids in zip(words, found, strict=True)]

    def _encode_words(self, words: list[str]) -> dict[str, bytes]:
        new: dict[str, bytes] = {}
        for start in range(0, len(words), _MAX_WORDS_A_CALL):
            call = words[start : start + _MAX_WORDS_A_CALL]
            encodings = self._rust.encode_batch_fast(call, add_special_tokens=False)
            for word, encoding in zip(call, encodings, strict=True):
                spelled = START in word or END in word
                ids = self._ids_with_specials(word) if spelled else encoding.ids
                new[word] = np.array(ids, np.int32).tobytes()
        return new

    def _ids_with_specials(self, word: str) -> list[int]:
        """Encodes a word in which a special token is spelled out.

        The reference takes it for the special token where its scan begins a token there, so not in "!<end_of_text>";
        the same scan, piece by piece, finds the same places.
        """
        ids: list[int] = []
        for piece, _ in self._rust.pre_tokenizer.pre_tokenize_str(word):
            if piece in (START, END):
                ids.append(self.sot if piece == START else self.eot)
            else:
                ids.extend(token.id for token in self._rust.model.tokenize(piece))
        return ids


def pad_tokens(tokens: Sequence[npt.NDArray[np.int32]], length: int, pad_id: int = PAD_ID) -> npt.NDArray[np.int32]:
    """Stacks token sequences into one array, padded on the right.

    Args:
        tokens: B sequences, int32 [n_i].
        length: Columns of the result, at least the longest n_i.
        pad_id: What pads.

    Returns:
        int32 [B, length].

    Raises:
        InputError: A sequence is longer than `length`.
    """
    padded = np.full((len(tokens), length), pad_id, np.int32)
    for index, ids in enumerate(tokens):
        if len(ids) > length:
            raise InputError(f"Token sequence {index} has {len(ids)} ids, which do not fit into {length} columns.")
        padded[index, : len(ids)] = ids
    return padded


def _clean(text: str, index: int) -> str:
    if not isinstance(text, str):
        raise InputError(f"Text {index} is of type {type(text).__name__}; expected str.")
    return repair_text(text, f"Text {index}") if needs_repair(text) else text


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """Groups texts so that a group, but for its last text, is of bounded size."""
    group: list[str] = []
    characters = 0
    for text in texts:
        group.append(text)
        characters += len(text)
        if characters >= _MAX_CHARACTERS_AT_ONCE:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _read_description(path: Path) -> dict[str, Any]:
    """Reads a tokenizer.json as a dictionary."""
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}. Export the bundle again.") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not a JSON file: {error}. Export the bundle again.") from error
    if not isinstance(description, dict):
        raise BundleError(f"{path} holds a JSON {type(description).__name__}, no tokenizer. Export the bundle again.")
    return description
