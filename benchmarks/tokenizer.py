"""How fast is the tokenizer against open_clip's SimpleTokenizer, on one core and with worker threads?

    python benchmarks/tokenizer.py

Texts are the lines of mixed_lengths.txt with every tenth word replaced by a random one of the vocabulary, so that
neither side finds every word in its cache. The second corpus adds an accent, curly quotes and an HTML entity to each
text, which is what sends it through ftfy on our side too. Both sides produce ids for a context of 248 tokens; the
reference also fills a tensor, which is left out here by timing its `encode` alone. All ways take turns after one round
of warming up, and the ids are compared first. Writes results/tokenizer.csv.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# One call of ours would otherwise use every core, and the comparison is per core.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from common import median_ratio, rates_in_turns, save_table
from open_clip.tokenizer import SimpleTokenizer

from longclip_rt.export.vocabulary import tokenizer_json
from longclip_rt.tokenizer import Tokenizer

CHUNK = 250


def corpora(count: int, reference: SimpleTokenizer) -> dict[str, list[str]]:
    """Plain captions, and the same with characters that need cleaning."""
    lines = Path(__file__).with_name("mixed_lengths.txt").read_text(encoding="utf-8").splitlines()
    words_of_one_token = [token[:-4] for token in reference.encoder if token.endswith("</w>")]
    ascii_words = [word for word in words_of_one_token if word.isascii() and word.isalpha()]
    rng = random.Random(0)
    plain = []
    for index in range(count):
        words = lines[index % len(lines)].split()
        for place in range(rng.randrange(10), len(words), 10):
            words[place] = rng.choice(ascii_words)
        plain.append(" ".join(words))
    awkward = [f"{text} \u201cCaf\u00e9\u201d &amp; bar" for text in plain]
    return {"plain": plain, "accents, quotes, entities": awkward}


def main() -> None:
    """Measures, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=2000, help="texts a corpus")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    reference = SimpleTokenizer(context_length=248)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(tokenizer_json(), encoding="utf-8")
        ours = Tokenizer.from_file(path)

    rows = []
    with ThreadPoolExecutor(options.threads) as pool:
        for corpus, texts in corpora(options.texts, reference).items():
            lengths = [tokens.length for tokens in ours.encode(texts)]
            if lengths != [len(reference.encode(text)) + 2 for text in texts]:
                raise SystemExit(f"the ids of {corpus} differ from the reference")
            chunks = [texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK)]
            threads = f"ours, {options.threads} threads"
            ways: dict[str, Callable[[], object]] = {
                "reference": lambda texts=texts: [reference.encode(text) for text in texts],
                "ours, 1 thread": lambda chunks=chunks: [ours.encode(chunk) for chunk in chunks],
                threads: lambda chunks=chunks: list(pool.map(ours.encode, chunks)),
            }
            rates = rates_in_turns({name: (run, len(texts)) for name, run in ways.items()}, options.rounds)
            for name, measured in rates.items():
                rows.append(
                    {
                        "corpus": corpus,
                        "tokens a text": round(statistics.mean(lengths)),
                        "tokenizer": name,
                        "texts/s": round(statistics.median(measured)),
                        "times the reference": round(median_ratio(measured, rates["reference"]), 2),
                    }
                )
    save_table("tokenizer", rows)


if __name__ == "__main__":
    main()
