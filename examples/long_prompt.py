"""Draws a picture from a prompt of up to 248 tokens: Stable Diffusion 1.5 or 2.x with a bundle as its text encoder.

    pip install "longclip-rt[diffusers]"
    longclip-rt export --weights BeichenZhang/LongCLIP-L --out bundle --output-name text:last_hidden_state
    python examples/long_prompt.py stable-diffusion-v1-5/stable-diffusion-v1-5 bundle "a very long prompt" --out a.png

The encoder's states must be as wide as the pipeline expects: 768, those of ViT-L/14, for Stable Diffusion 1.5.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from longclip_rt import Embedder
from longclip_rt.integrations.diffusers import LongClipTextEncoder


def main() -> None:
    """Writes one picture, and says how many tokens of the prompt it was drawn from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a hub id or a folder")
    parser.add_argument("bundle", help="exported with --output-name text:last_hidden_state")
    parser.add_argument("prompt")
    parser.add_argument("--negative", help="what the picture should not show")
    parser.add_argument("--out", type=Path, default=Path("picture.png"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = StableDiffusionPipeline.from_pretrained(options.model)
    encoder = LongClipTextEncoder(Embedder.from_bundle(options.bundle, precision="fp32"))
    # from_pretrained(text_encoder=encoder) is refused: diffusers takes only the class that the model's index names.
    pipe.register_modules(text_encoder=encoder, tokenizer=encoder.tokenizer())
    pipe.to(device)
    tokens = len(pipe.tokenizer(options.prompt)["input_ids"])
    picture = pipe(
        options.prompt,
        negative_prompt=options.negative,
        num_inference_steps=options.steps,
        generator=torch.Generator().manual_seed(options.seed),
    ).images[0]
    picture.save(options.out)
    print(f"{options.out}, drawn from {min(tokens, pipe.tokenizer.model_max_length)} of {tokens} tokens")


if __name__ == "__main__":
    main()
