"""How much faster are the encoders than the reference way, PyTorch in fp32 with every text at 248 tokens?

    python benchmarks/encoders.py --bundle demo/bundle

The reference is open_clip's own model on the weights that the bundle names, run in batches of 8 on ids and pixels that
are ready. Ours is `Embedder` as a user calls it: its time includes tokenizing; images are cropped beforehand on both
sides. The two take turns, and the ratio is the median over the turns. Writes results/encoders.csv and a plot beside it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import open_clip
import torch
from common import median_ratio, rates_in_turns, save_table

from longclip_rt import Embedder
from longclip_rt.bundle.samples import example_captions, example_photos, parity_texts
from longclip_rt.weights.checkpoint import load_checkpoint

TARGETS = {"images": 3.0, "texts of 248 tokens": 2.8, "captions of 16 to 32 tokens": 20.0, "mixed lengths": 5.0}
BATCH = 8


def reference_model(weights: str) -> torch.nn.Module:
    """open_clip's CLIP with 248 positions and its own attention mask, in fp32."""
    checkpoint = load_checkpoint(weights)
    arch = checkpoint.architecture
    text = {"context_length": arch.context_length, "width": arch.text_width, "heads": arch.text_heads,
            "layers": arch.text_layers, "vocab_size": arch.vocab_size}  # fmt: skip
    vision = {"image_size": arch.image_size, "patch_size": arch.patch_size, "width": arch.vision_width,
              "layers": arch.vision_layers}  # fmt: skip
    model = open_clip.model.CLIP(arch.embed_dim, vision, text, quick_gelu=arch.quick_gelu)
    model.load_state_dict(checkpoint.state_dict)
    return model.eval()


def workloads(embedder: Embedder) -> dict[str, list[str]]:
    """The texts of each workload, made of the captions that people wrote."""
    captions = example_captions()
    words = " ".join(caption.long for caption in captions).split()
    exact = next(text for text, tokens in zip(
        parity_texts(embedder.tokenizer), embedder.tokenizer.encode(parity_texts(embedder.tokenizer)), strict=True
    ) if tokens.length == embedder.context_length)  # fmt: skip
    # Windows of 12 to 25 words, of which those of 16 to 32 tokens are kept.
    windows = [" ".join(words[start : start + 12 + start % 14]) for start in range(0, len(words) - 30, 3)]
    short = [text for text, tokens in zip(windows, embedder.tokenizer.encode(windows), strict=True)
             if 16 <= tokens.length <= 32]  # fmt: skip
    mixed = (Path(__file__).parent / "mixed_lengths.txt").read_text(encoding="utf-8").splitlines()
    return {
        "texts of 248 tokens": [exact] * 64,
        "captions of 16 to 32 tokens": short[:256],
        "mixed lengths": mixed,
    }


def main() -> None:
    """Runs the four workloads and saves the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    embedder = Embedder.from_bundle(arguments.bundle, arguments.backend, arguments.precision)
    model = reference_model(embedder.bundle.manifest["source"]["weights"])
    crops = np.stack([embedder.transform.crop(photo) for photo in example_photos() * 6][:64])
    pixels = torch.from_numpy(embedder.transform.normalize(crops[: 2 * BATCH]))

    def our_images() -> None:
        with ThreadPoolExecutor(embedder.concurrency) as pool:
            list(pool.map(embedder.encode_crops, np.split(crops, len(crops) // BATCH)))

    def reference(encode: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                for batch in inputs.split(BATCH):
                    encode(batch)

        return run

    rows = []
    for name, texts in {"images": [], **workloads(embedder)}.items():
        if name == "images":
            ours: tuple[Callable[[], object], int] = (our_images, len(crops))
            theirs: tuple[Callable[[], object], int] = (reference(model.encode_image, pixels), len(pixels))
        else:
            # The reference pads every text to 248, so its rate is that of any 16 of them.
            ids = torch.from_numpy(embedder.tokenizer(texts[: 2 * BATCH])).long()
            ours = (lambda texts=texts: embedder.embed_texts(texts), len(texts))
            theirs = (reference(model.encode_text, ids), len(ids))
        rates = rates_in_turns({"ours": ours, "reference": theirs}, arguments.rounds)
        ratio = median_ratio(rates["ours"], rates["reference"])
        rows.append({
            "workload": name,
            "reference per second": f"{statistics.median(rates['reference']):.2f}",
            "ours per second": f"{statistics.median(rates['ours']):.2f}",
            "ratio": f"{ratio:.2f}",
            "lowest ratio": f"{min(a / b for a, b in zip(rates['ours'], rates['reference'], strict=True)):.2f}",
            "target": TARGETS[name],
            "backend": f"{embedder.backend.name} {embedder.backend.precision}",
        })  # fmt: skip
    save_table("encoders", rows)


if __name__ == "__main__":
    main()
