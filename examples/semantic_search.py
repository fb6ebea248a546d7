"""Searches pictures by long descriptions with sentence-transformers, with a bundle underneath.

    pip install "longclip-rt[sentence-transformers]"
    python examples/semantic_search.py [BUNDLE]

Without BUNDLE it takes the newest exported one, else the built-in model, which knows drawn scenes only.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image
from sentence_transformers import SentenceTransformer, util

from longclip_rt.integrations.sentence_transformers import LongClip

SCENES = Path(__file__).parent / "scenes"


def main() -> None:
    """Prints what each description finds, best first."""
    model = SentenceTransformer(modules=[LongClip(sys.argv[1] if len(sys.argv) > 1 else None)], device="cpu")
    pictures = sorted(SCENES.glob("scene-*.png"))
    corpus = model.encode([Image.open(picture) for picture in pictures], convert_to_tensor=True)
    descriptions = [path.read_text(encoding="utf-8").strip() for path in sorted(SCENES.glob("scene-*.txt"))]
    queries = model.encode(descriptions, convert_to_tensor=True)
    for description, hits in zip(descriptions, util.semantic_search(queries, corpus, top_k=2), strict=True):
        print(f"{description[:70]}...")
        for hit in hits:
            print(f"  {hit['score']:.3f}  {pictures[int(hit['corpus_id'])].name}")


if __name__ == "__main__":
    main()
