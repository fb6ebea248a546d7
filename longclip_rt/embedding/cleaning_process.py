"""A process that cleans texts for its parent: `python -m longclip_rt.embedding.cleaning_process`.

It reads lists of texts from standard input, answers each on standard output, and ends with its input: the system closes
that when the parent ends, even when it is killed, so that no process is left behind.
"""

from __future__ import annotations

import itertools
import os
import signal
import struct
import sys
from collections.abc import Sequence
from typing import IO

from longclip_rt.errors import InputError
from longclip_rt.model.cleaning import repair_text

# Tells the parent that what follows are answers, and not what something printed while Python started.
GREETING = b"longclip-rt cleans texts\n"
# The first character of an answer: the cleaned text follows, or why there is none.
CLEANED, REFUSED = "+", "-"


def send(stream: IO[bytes], texts: Sequence[str]) -> None:
    """Writes texts: how many, the length of each, then their UTF-8, in which a surrogate may stand alone.

    Raises:
        OSError: The other side has ended.
    """
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    stream.write(struct.pack(f"<{len(encoded) + 1}I", len(encoded), *map(len, encoded)) + b"".join(encoded))
    stream.flush()


def receive(stream: IO[bytes]) -> list[str]:
    """Reads what `send` wrote.

    Raises:
        EOFError: The other side has ended.
    """
    (count,) = struct.unpack("<I", _read(stream, 4))
    lengths = struct.unpack(f"<{count}I", _read(stream, 4 * count))
    # One long read: each waits for the interpreter's lock.
    encoded = _read(stream, sum(lengths))
    ends = itertools.accumulate(lengths)
    return [encoded[end - size : end].decode("utf-8", "surrogatepass") for end, size in zip(ends, lengths, strict=True)]


def _read(stream: IO[bytes], length: int) -> bytes:
    data = stream.read(length)
    if len(data) < length:
        raise EOFError
    return data


def _answer(text: str) -> str:
    try:
        return CLEANED + repair_text(text)
    except InputError as error:
        return REFUSED + str(error)


def main() -> None:
    """Answers until standard input ends."""
    # Ctrl-C reaches every process of a terminal, and what becomes of the run is for the parent to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What anything prints from here on must not come between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        answers.write(GREETING)
        answers.flush()
        while True:
            send(answers, [_answer(text) for text in receive(sys.stdin.buffer)])
    except (EOFError, BrokenPipeError):
        # At once: an orderly exit would try to write once more what the parent no longer reads.
        os._exit(0)


if __name__ == "__main__":
    main()
