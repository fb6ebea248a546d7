"""How much of the bare encoder's rate does `embed` reach on 200 photographs, reading, decoding and writing included?

    python benchmarks/end_to_end.py --bundle demo/bundle

The photographs are different crops of the example photographs, about 500 pixels wide, as JPEG files. "bare encoder":
crops that are in memory, in the batches that `embed` makes. "embed": `embed_files`, from the list to the renamed
Parquet file, in the same process with the encoders loaded. "embed, whole command": in a process of its own, from its
start to its end. The three take turns. Writes results/end_to_end.csv.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from common import median_ratio, rates_in_turns, save_table
from PIL import Image

from longclip_rt import Embedder
from longclip_rt.bundle.samples import example_photos
from longclip_rt.embedding.pipeline import EmbedOptions, embed_files

PHOTOS = 200
TARGET = 0.85


def write_photos(folder: Path) -> Path:
    """Writes the photographs and a list of them; returns the list."""
    rng = random.Random(0)
    sources = [Image.open(path).convert("RGB") for path in example_photos()]
    names = []
    for number in range(PHOTOS):
        image = sources[number % len(sources)]
        width, height = (int(side * rng.uniform(0.8, 1)) for side in image.size)
        left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
        names.append(f"{number:03}.jpg")
        image.crop((left, top, left + width, top + height)).save(folder / names[-1], quality=90)
    listing = folder / "files.txt"
    listing.write_text("\n".join(names) + "\n", encoding="utf-8")
    return listing


def main() -> None:
    """Measures and saves the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    embedder = Embedder.from_bundle(arguments.bundle)
    with tempfile.TemporaryDirectory() as folder:
        listing = write_photos(Path(folder))
        photos = sorted(Path(folder).glob("*.jpg"))
        crops = np.stack([embedder.transform.crop(photo) for photo in photos])
        out = Path(folder) / "out.parquet"

        def bare() -> None:
            size = embedder.batch_size
            with ThreadPoolExecutor(embedder.concurrency) as pool:
                list(pool.map(embedder.encode_crops, [crops[at : at + size] for at in range(0, len(crops), size)]))

        def end_to_end() -> None:
            embed_files([str(listing)], out, embedder, EmbedOptions(overwrite=True, restart=True))
            out.unlink()  # the next turn does the work anew

        def whole_command() -> None:
            command = [sys.executable, "-m", "longclip_rt", "embed", str(listing), "-o", str(out)]
            subprocess.run([*command, "--bundle", str(arguments.bundle)], check=True, capture_output=True)
            out.unlink()

        ways = {"bare encoder": bare, "embed": end_to_end, "embed, whole command": whole_command}
        rates = rates_in_turns({name: (way, PHOTOS) for name, way in ways.items()}, arguments.rounds)
        embedder.close()
    rows = [
        {
            "way": name,
            "photographs per second": f"{statistics.median(rate):.2f}",
            "share of the bare encoder": f"{median_ratio(rate, rates['bare encoder']):.2f}",
            "target": TARGET if name != "bare encoder" else "",
        }
        for name, rate in rates.items()
    ]
    save_table("end_to_end", rows)


if __name__ == "__main__":
    main()
