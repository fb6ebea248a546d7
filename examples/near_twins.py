"""Long queries among near-identical pictures: does a model read to the end of a caption?

    python examples/near_twins.py [BUNDLE]

Each scene in examples/scenes/ stands beside three that differ from it in one detail late in the caption. Every caption
is asked for its picture among the four, once whole and once cut to CLIP's 77 tokens; then the captions of the real
photographs in examples/photos/ are asked for theirs, of which the built-in model knows nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from longclip_rt import Embedder
from longclip_rt.bundle.samples import example_captions

FOLDER = Path(__file__).parent / "scenes"


def main() -> None:
    """Prints one line a scene, and two totals."""
    embedder = Embedder.from_bundle(sys.argv[1] if len(sys.argv) > 1 else None)
    rows = json.loads((FOLDER / "captions.json").read_text(encoding="utf-8"))
    images = embedder.embed_images([FOLDER / row["image"] for row in rows])
    captions = [row["caption"] for row in rows]
    whole = embedder.embed_texts(captions)
    ids = [tokens.ids for tokens in embedder.tokenizer.encode(captions)]
    cut = np.concatenate(
        [embedder.encode_tokens(np.append(one[:76], embedder.tokenizer.eot)[None].astype(np.int32)) for one in ids]
    )
    scenes = np.array([row["scene"] for row in rows])
    print("scene  tokens  whole caption  cut to 77  (its own picture among the four that differ in one detail)")
    found = np.zeros(2, int)
    for number in np.unique(scenes):
        places = np.flatnonzero(scenes == number)
        hits = [int(((text[places] @ images[places].T).argmax(axis=1) == np.arange(len(places))).sum())
                for text in (whole, cut)]  # fmt: skip
        found += hits
        print(f"{number:>5}  {len(ids[places[0]]):>6}  {hits[0]:>7} of {len(places)}  {hits[1]:>4} of {len(places)}")
    print(f"In all: {found[0]} of {len(rows)} with whole captions, {found[1]} with 77 tokens; chance finds a quarter.")

    photos = example_captions()
    pictures = embedder.embed_images([photo.photo for photo in photos])
    texts = embedder.embed_texts([photo.long for photo in photos])
    right = int(((texts @ pictures.T).argmax(axis=1) == np.arange(len(photos))).sum())
    print(f"Real photographs found by their long captions: {right} of {len(photos)}; chance finds 1.")


if __name__ == "__main__":
    main()
