"""How fast is the tokenizer against open_clip's SimpleTokenizer, on one core and as `longclip-rt embed` uses it?

    python benchmarks/tokenizer.py

Three corpora. "plain": the lines of mixed_lengths.txt in ASCII, with every tenth word replaced by a random one of the
vocabulary. "repaired": the same with an accent, curly quotes and an HTML entity in each text, which send it through
ftfy on our side too. "unseen": ten random words a text, other ones in every round, so that nothing is remembered.

"ours" is `Tokenizer.encode`, in one thread and with the texts shared out over threads. "embed" is what `embed` does
with the texts of a list: tasks of 64 in so many workers. All sides start with empty caches and warm them in a round
that is not counted; all ways take turns. The ids are compared first. The reference's conversion to a tensor is left
out. Writes results/tokenizer.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import string
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

# One call of ours would otherwise encode unseen words on every core, and the comparison is per core.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from common import median_ratio, rates_in_turns, save_table
from open_clip.tokenizer import SimpleTokenizer

from longclip_rt.embedding.flow import TEXTS_PER_TASK
from longclip_rt.embedding.inputs.entries import Entry
from longclip_rt.embedding.tasks import tokenize
from longclip_rt.model.tokenizer import Tokenizer
from longclip_rt.model.vocabulary import tokenizer_json

CHUNK = 250


def corpora(texts: int, turns: int, vocabulary: Sequence[str]) -> dict[str, list[list[str]]]:
    """The texts of each turn, for each corpus."""
    rng = random.Random(0)
    path = Path(__file__).with_name("mixed_lengths.txt")
    lines = path.read_text(encoding="utf-8").encode("ascii", "ignore").decode().splitlines()
    single_tokens = [token.removesuffix("</w>") for token in vocabulary if token.endswith("</w>")]
    words = [word for word in single_tokens if word.isascii() and word.isalpha()]

    plain = []
    for index in range(texts):
        text = lines[index % len(lines)].split()
        for place in range(rng.randrange(10), len(text), 10):
            text[place] = rng.choice(words)
        plain.append(" ".join(text))
    repaired = [f"{text} \u201cCaf\u00e9\u201d &amp; bar" for text in plain]

    def unseen() -> str:
        return " ".join("".join(rng.choices(string.ascii_lowercase, k=rng.randint(6, 12))) for _ in range(10))

    return {
        "plain": [plain] * turns,
        "repaired": [repaired] * turns,
        "unseen": [[unseen() for _ in range(texts)] for _ in range(turns)],
    }


def chunks(texts: Sequence[str], size: int) -> list[Sequence[str]]:
    """Consecutive parts."""
    return [texts[start : start + size] for start in range(0, len(texts), size)]


class Embedding:
    """Tokenizing as `embed` does it, with so many workers."""

    def __init__(self, tokenizer: Tokenizer, workers: int, stack: contextlib.ExitStack) -> None:
        self._pool = stack.enter_context(ThreadPoolExecutor(workers))
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> None:
        """Tokenizes."""
        entries = [Entry(line, text, "text", inline=True) for line, text in enumerate(texts)]
        parts = [entries[start : start + TEXTS_PER_TASK] for start in range(0, len(entries), TEXTS_PER_TASK)]
        list(self._pool.map(partial(tokenize, self._tokenizer), parts))


def measured(corpus: str, turns: list[list[str]], bundle_file: Path, threads: int) -> list[dict[str, object]]:
    """Rates of all ways on one corpus, whose first turn warms up."""
    reference, *ours = SimpleTokenizer(), *(Tokenizer.from_file(bundle_file) for _ in range(5))
    lengths = [tokens.length for tokens in ours[0].encode(turns[0])]
    if lengths != [len(reference.encode(text)) + 2 for text in turns[0]]:
        raise SystemExit(f"the ids of the corpus {corpus!r} differ from the reference's")

    def over_turns(way: Callable[[list[str]], object]) -> tuple[Callable[[], object], int]:
        remaining = iter(turns)
        return lambda: way(next(remaining)), len(turns[0])

    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        ways: dict[str, Callable[[list[str]], object]] = {
            "reference": lambda texts: [reference.encode(text) for text in texts],
            "ours, 1 thread": lambda texts: [ours[1].encode(chunk) for chunk in chunks(texts, CHUNK)],
            f"ours, {threads} threads": lambda texts: list(pool.map(ours[2].encode, chunks(texts, CHUNK))),
            "embed, 1 worker": Embedding(ours[3], 1, stack),
            f"embed, {threads} workers": Embedding(ours[4], threads, stack),
        }
        rates = rates_in_turns({name: over_turns(way) for name, way in ways.items()}, len(turns) - 1)
    return [
        {
            "corpus": corpus,
            "tokens a text": round(statistics.mean(lengths)),
            "tokenizer": name,
            "texts/s": round(statistics.median(rate)),
            "times the reference": round(median_ratio(rate, rates["reference"]), 2),
            "times 1 worker": round(median_ratio(rate, rates["embed, 1 worker"]), 2) if "embed" in name else "",
        }
        for name, rate in rates.items()
    ]


def main() -> None:
    """Measures, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=2000, help="texts a corpus")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    vocabulary = list(SimpleTokenizer().encoder)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        bundle_file = Path(folder) / "tokenizer.json"
        bundle_file.write_text(tokenizer_json(), encoding="utf-8")
        for corpus, turns in corpora(options.texts, options.rounds + 1, vocabulary).items():
            rows += measured(corpus, turns, bundle_file, options.threads)
    save_table("tokenizer", rows)


if __name__ == "__main__":
    main()
