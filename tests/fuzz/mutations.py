"""Ways to spoil bytes and JSON, each drawn from a seeded generator."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

_BYTES = (b"\0", b"\xff" * 8, b"\x80", b"{", b'"', b"\n", b"\xff\xff\xff\x7f", b"\0" * 64, b"-1", b"NaN", b"9" * 30)
_ODD = (
    None, True, 0, 1, -1, 7, 0.5, -0.0, 1e308, float("nan"), float("inf"), 2**31, 2**63, 10**400, "", "x", "x" * 5000,
    "../../etc/passwd", "a\0b", "\ud800", "\x1b[31m", [], {}, [None], [[]], [0, 0, 0], {"": None}, "1", ["a", 1],
)  # fmt: skip


def spoiled_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four changes; most near the beginning or the end, where formats have their headers and tables."""
    spoiled = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        size = len(spoiled)
        at = rng.choice((rng.randrange(size + 1), rng.randrange(min(size, 512) + 1), max(size - rng.randrange(512), 0)))
        length = rng.choice((1, 4, 64, size // 2))
        change = rng.randrange(6)
        if change == 0:
            del spoiled[at:]
        elif change == 1:
            del spoiled[at : at + length]
        elif change == 2:
            spoiled[at:at] = rng.choice(_BYTES)
        elif change == 3:
            spoiled[at:at] = spoiled[at : at + length]
        elif change == 4:
            spoiled[at : at + length] = rng.randbytes(min(length, 64))
        elif at < size:
            spoiled[at] ^= 1 << rng.randrange(8)
    return bytes(spoiled)


def spoiled_json(rng: random.Random, value: Any) -> bytes:
    """One to three values replaced, removed, renamed or swapped; now and then bytes of the text as well."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        value = _changed(rng, value)
    text = json.dumps(value).encode()
    if rng.random() < 0.02:
        return b"[" * 100_000
    return spoiled_bytes(rng, text) if rng.random() < 0.1 else text


def _changed(rng: random.Random, value: Any) -> Any:
    """Walks down to a random place and changes what is there."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        return copy.deepcopy(rng.choice(_ODD))
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    change = rng.randrange(8)
    if change == 0:
        del value[key]
    elif change == 1 and isinstance(value, dict):
        value[rng.choice(("", "x", "../x", "a\0"))] = value.pop(key)
    elif change == 2:
        other = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        value[key], value[other] = value[other], value[key]
    else:
        value[key] = _changed(rng, value[key])
    return value
