"""Long queries among near-identical pictures: does a model read to the end of a caption?

    python examples/near_twins.py [BUNDLE] [--html FILE]

Each scene in examples/scenes/ stands beside three that differ from it in one detail late in the caption. Every caption
is asked for its picture among the four, once whole and once cut to CLIP's 77 tokens; then the captions of the real
photographs in examples/photos/ are asked for theirs, of which the built-in model knows nothing.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
from itertools import zip_longest
from pathlib import Path

import numpy as np

from longclip_rt import Embedder
from longclip_rt.bundle.samples import example_captions

FOLDER = Path(__file__).parent / "scenes"

_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Near twins · longclip-rt</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; }}
section {{ margin: 2.5rem 0; }}
mark {{ padding: 0 .2em; border-radius: .2em; background: #ffd54a; color: #000; }}
ol {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 1rem; padding: 0;
  list-style: none; }}
img {{ display: block; width: 100%; border-radius: .5rem; }}
.own img {{ outline: 4px solid #1a9a6c; outline-offset: 2px; }}
li p {{ margin: .5rem 0 0; font-size: .875rem; }}
</style>
<h1>Does it read to the end?</h1>
<p>{result} Each caption below describes one of the four pictures below it, the one with the green frame; the
<mark>marked</mark> words alone tell it from the others.</p>
{sections}
</html>
"""


def main() -> None:
    """Prints one line a scene and two totals; writes the page where one was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", help="the built-in model where none is named")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with the pictures")
    options = parser.parse_args()
    embedder = Embedder.from_bundle(options.bundle)
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
    sections = []
    for number in np.unique(scenes):
        places = np.flatnonzero(scenes == number)
        # [2, captions]: the picture that each caption finds, whole and cut
        chosen = np.array([(text[places] @ images[places].T).argmax(axis=1) for text in (whole, cut)])
        hits = (chosen == np.arange(len(places))).sum(axis=1)
        found += hits
        print(f"{number:>5}  {len(ids[places[0]]):>6}  {hits[0]:>7} of {len(places)}  {hits[1]:>4} of {len(places)}")
        sections.append(section([rows[place] for place in places], *chosen[:, 0].tolist()))
    photos = example_captions()
    pictures = embedder.embed_images([photo.photo for photo in photos])
    texts = embedder.embed_texts([photo.long for photo in photos])
    right = int(((texts @ pictures.T).argmax(axis=1) == np.arange(len(photos))).sum())
    print(f"Real photographs found by their long captions: {right} of {len(photos)}; chance finds 1.")
    result = (
        f"Asked for the right one of four pictures that differ in one late detail of a long caption, the model found "
        f"{found[0]} of {len(rows)} when it read the whole caption, and {found[1]} when it read 77 tokens, as CLIP "
        f"does; guessing finds {len(rows) // 4}."
    )
    print(result)
    if options.html is not None:
        options.html.write_text(_PAGE.format(result=result, sections="\n".join(sections)), encoding="utf-8")
        print(f"Look at {options.html}.")


def section(rows: list[dict[str, str]], whole: int, cut: int) -> str:
    """HTML of four pictures, the caption of the first, and which of them it found, whole and cut to 77 tokens."""
    words = [row["caption"].split() for row in rows]
    caption = " ".join(
        html.escape(own) if all(own == other for other in others) else f"<mark>{html.escape(own)}</mark>"
        for own, *others in zip_longest(*words, fillvalue="")
    )
    items = []
    for place, row in enumerate(rows):
        picture = base64.b64encode((FOLDER / row["image"]).read_bytes()).decode("ascii")
        difference = row["change"].replace("->", "→") or "as the caption says"
        choices = [name for name, choice in (("248 tokens", whole), ("77 tokens", cut)) if choice == place]
        sign = "✗" if place else "✓"
        chosen = f"<br><strong>{sign} chosen with {' and with '.join(choices)}</strong>" if choices else ""
        items.append(
            f'<li{"" if place else " class=own"}><img alt="{html.escape(difference)}" '
            f'src="data:image/png;base64,{picture}"><p>{html.escape(difference)}{chosen}</p></li>'
        )
    return f"<section><p>{caption}</p><ol>{''.join(items)}</ol></section>"


if __name__ == "__main__":
    main()
