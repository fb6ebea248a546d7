"""open_clip's vocabulary as a tokenizer.json that the Hugging Face `tokenizers` library reads in any language."""

from __future__ import annotations

import json
from typing import Any

from longclip_rt.errors import ExportError
from longclip_rt.model.architecture import UNMERGED, VOCAB_SIZE
from longclip_rt.model.tokenizer import END, PAD_ID, START, WORD_END
from longclip_rt.system.extras import require

# The reference applies its pattern with the case folding of the `regex` package. On lower-cased text this still does
# two things: the long s (U+017F) counts as an "s", and the combining iota subscript (U+0345), a mark whose upper case
# is a letter, belongs to no class at all and is dropped.
_PATTERN = (
    r"<[s\x{17f}]tart_of_text>|<end_of_text>|'[s\x{17f}]|'t|'re|'ve|'m|'ll|'d"
    r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"
)
_BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def tokenizer_json(context_length: int = 248, vocab_size: int = VOCAB_SIZE) -> str:
    """Describes CLIP's tokenizer in the format of the Hugging Face `tokenizers` library.

    Loaded as it is, the file lower-cases, collapses white space, composes characters (NFC), adds the start and end
    tokens, truncates and pads a batch to its longest text with 0. That equals the reference but for the repairs of ftfy
    and for HTML entities, which such a file cannot express; `model.tokenizer.Tokenizer` makes those in Python.

    Args:
        context_length: Tokens to which the file's own truncation cuts, start and end tokens included.
        vocab_size: Entries of the vocabulary. Fewer than CLIP's 49408 leave its last merges out: a merge only joins
            what earlier ones made, so what is left encodes every text, rare words in more tokens. The start and end
            tokens stay the last two entries.

    Returns:
        The JSON text.

    Raises:
        ExportError: CLIP's vocabulary cannot be cut to `vocab_size`.
        MissingExtraError: open_clip is not installed.
    """
    if not UNMERGED < vocab_size <= VOCAB_SIZE:
        raise ExportError(
            f"CLIP's vocabulary can be cut to between {UNMERGED + 1} and {VOCAB_SIZE} entries; got {vocab_size}."
        )
    reference = require("open_clip.tokenizer", "export").SimpleTokenizer()
    merges = sorted(reference.bpe_ranks, key=reference.bpe_ranks.__getitem__)[: vocab_size - UNMERGED]
    ids = _cut(reference.encoder, vocab_size)
    description = {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": context_length, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": "BatchLongest",
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": PAD_ID,
            "pad_type_id": 0,
            "pad_token": reference.decoder[PAD_ID],
        },
        "added_tokens": [_special(name, ids[name]) for name in (START, END)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Strip", "strip_left": True, "strip_right": True},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _PATTERN}, "behavior": "Removed", "invert": True},
                _BYTES,
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": START, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": END, "type_id": 0}},
            ],
            "pair": [
                {"SpecialToken": {"id": START, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
                {"SpecialToken": {"id": END, "type_id": 0}},
            ],
            "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (START, END)},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                # U+0120 is how the byte alphabet writes a space.
                {"type": "Replace", "pattern": {"String": WORD_END}, "content": "\u0120"},
                _BYTES,
                # Not the library's "Strip", which fails on a text without tokens (tokenizers 0.23).
                {"type": "Replace", "pattern": {"Regex": r" \z"}, "content": ""},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": WORD_END,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [list(pair) for pair in merges],
        },
    }
    return json.dumps(description, ensure_ascii=False)


def _cut(ids: dict[str, int], vocab_size: int) -> dict[str, int]:
    """The first entries of CLIP's vocabulary, and its two special tokens behind them."""
    kept = {token: token_id for token, token_id in ids.items() if token_id < vocab_size - 2}
    return kept | {START: vocab_size - 2, END: vocab_size - 1}


def _special(name: str, token_id: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": name, **flags}
