from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from onnx import numpy_helper
from PIL import Image
from tiny_models import token_ids
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from longclip_rt import BundleError, Embedder, InputError, MissingExtraError
from longclip_rt.backends.graph_weights import weights_of
from longclip_rt.bundle.bundle import BUILT_IN, load_bundle, write_manifest
from longclip_rt.bundle.samples import example_captions
from longclip_rt.integrations.diffusers import LongClipTextEncoder, prompt_embeds
from longclip_rt.weights.checkpoint import Checkpoint
from longclip_rt.weights.convert import save_converted

LONG = [" ".join([caption.long] * 2)[:1000] for caption in example_captions()[:2]]
WIDTH, DIM, LAYERS = 64, 32, 3


@pytest.fixture(scope="module")
def embedders(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Embedder, Embedder]:
    """Two models of one shape: the second is the first with other weights in its graph."""
    other = tmp_path_factory.mktemp("second") / "bundle"
    shutil.copytree(tiny_bundle, other)
    model = onnx.load(other / "text.onnx")
    for tensor in model.graph.initializer:
        if tensor.name in ("positional_embedding", "ln_final.weight", "text_projection"):
            changed = numpy_helper.to_array(tensor)[::-1].copy()
            tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
    onnx.save(model, other / "text.onnx")
    write_manifest(other, load_bundle(tiny_bundle).manifest)
    first, second = (Embedder.from_bundle(path, "openvino", "fp32") for path in (tiny_bundle, other))
    return first, second


@pytest.fixture(scope="module")
def reference(embedders: tuple[Embedder, Embedder], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """diffusers' own encoders, on the weights that `convert` writes."""
    folder, models = tmp_path_factory.mktemp("hf"), []
    for number, kind in enumerate((CLIPTextModel, CLIPTextModelWithProjection)):
        bundle = embedders[number].bundle
        state = {name: torch.tensor(array) for name, array in weights_of(bundle).items()}
        checkpoint = Checkpoint(state | {"logit_scale": torch.zeros(())}, bundle.architecture, "", None, trained=True)
        models.append(kind.from_pretrained(save_converted(checkpoint, folder / str(number), "huggingface")).eval())
    return models[0], models[1]


def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=1, latent_channels=4, sample_size=16)


def unet(cross: int, **options: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=cross,
        **options,
    )


def stable_diffusion(encoder: Any, tokenizer: Any) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae(), encoder, tokenizer, unet(WIDTH), DDIMScheduler(), None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl(encoders: Any, tokenizers: Any) -> StableDiffusionXLPipeline:
    options = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + DIM,
        "transformer_layers_per_block": 1,
    }
    pipe = StableDiffusionXLPipeline(
        vae(), *encoders, *tokenizers, unet(2 * WIDTH, **options), DDIMScheduler(), add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: Any, **arguments: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    size = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "np"}
    images: np.ndarray = pipe(generator=generator, **size, **arguments).images
    return images


@pytest.mark.parametrize("length", [77, 248])
@torch.no_grad()
def test_the_states_are_those_of_transformers(
    length: int, embedders: tuple[Embedder, Embedder], reference: tuple[Any, Any]
) -> None:
    ids = token_ids([2, 20, length], width=length, pad=49407).long()
    ours, theirs = LongClipTextEncoder(embedders[0])(ids), reference[0](ids, output_hidden_states=True)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-4)
    norm: Any = LongClipTextEncoder(embedders[0]).text_model.final_layer_norm
    torch.testing.assert_close(norm(theirs.hidden_states[-1]), theirs[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.pooler_output, theirs.pooler_output, rtol=0, atol=1e-4)
    for behind in (2, 3):
        torch.testing.assert_close(ours.hidden_states[-behind], theirs.hidden_states[-behind], rtol=0, atol=1e-4)
    ours = LongClipTextEncoder(embedders[1], with_projection=True)(ids)
    torch.testing.assert_close(ours[0], reference[1](ids)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("clip_skip", [None, 1, 2])
def test_stable_diffusion_draws_the_same_from_a_long_prompt(
    clip_skip: int | None, embedders: tuple[Embedder, Embedder], reference: tuple[Any, Any]
) -> None:
    encoder = LongClipTextEncoder(embedders[0])
    tokenizer = encoder.tokenizer()
    assert all(190 < len(ids) <= 248 for ids in tokenizer(LONG)["input_ids"])
    pipe = stable_diffusion(encoder, tokenizer)
    given = {"negative_prompt": ["blurred", ""], "clip_skip": clip_skip}
    drawn = picture(pipe, prompt=LONG, **given)
    if clip_skip is None:  # with a newer transformers it fails in diffusers: CLIPTextModel has no text_model
        pipe.register_modules(text_encoder=reference[0])
        np.testing.assert_allclose(drawn, picture(pipe, prompt=LONG, **given), atol=1e-4)
    pipe.register_modules(text_encoder=None, tokenizer=None)
    embeds = prompt_embeds(embedders[0], LONG, given["negative_prompt"], clip_skip=clip_skip)  # type: ignore[arg-type]
    np.testing.assert_allclose(drawn, picture(pipe, **embeds), atol=1e-5)
    cut = prompt_embeds(embedders[0], [" ".join(text.split()[:50]) for text in LONG], clip_skip=clip_skip)
    assert np.abs(drawn - picture(pipe, **cut)).max() > 1e-3, "what follows the first 77 tokens counts"


@pytest.mark.parametrize("clip_skip", [None, 1])
def test_sdxl_draws_the_same_from_a_long_prompt(
    clip_skip: int | None, embedders: tuple[Embedder, Embedder], reference: tuple[Any, Any]
) -> None:
    first, second = LongClipTextEncoder(embedders[0]), LongClipTextEncoder(embedders[1], with_projection=True)
    pipe = sdxl((first, second), (first.tokenizer(), second.tokenizer()))
    drawn = picture(pipe, prompt=LONG[0], clip_skip=clip_skip)
    pipe.register_modules(text_encoder=reference[0], text_encoder_2=reference[1])
    np.testing.assert_allclose(drawn, picture(pipe, prompt=LONG[0], clip_skip=clip_skip), atol=1e-4)
    pipe.register_modules(text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None)
    embeds = prompt_embeds(embedders[0], LONG[:1], second=embedders[1], clip_skip=clip_skip)
    assert embeds["prompt_embeds"].shape == (1, 248, 2 * WIDTH) and embeds["pooled_prompt_embeds"].shape == (1, DIM)
    np.testing.assert_allclose(drawn, picture(pipe, **embeds), atol=1e-5)
    embeds = prompt_embeds(embedders[0], LONG[:1], ["blurred"], second=embedders[1])
    assert embeds["negative_prompt_embeds"].abs().max() > 0


def test_the_last_block_for_sdxl(embedders: tuple[Embedder, Embedder]) -> None:
    embedder, other = embedders
    usual, last = LongClipTextEncoder(embedder), LongClipTextEncoder(embedder, last_for_sdxl=True)
    ids = token_ids([20, 248]).long()
    states, shifted = usual(ids), last(ids).hidden_states
    torch.testing.assert_close(shifted[-2], states[0], rtol=0, atol=0)
    norm = usual.text_model.final_layer_norm
    torch.testing.assert_close(shifted[-3], norm(states.hidden_states[-2]), rtol=0, atol=0)  # type: ignore[operator]
    pipe = sdxl((last, LongClipTextEncoder(other, with_projection=True, last_for_sdxl=True)), (last.tokenizer(0),) * 2)
    drawn = picture(pipe, prompt=LONG[0], negative_prompt="blurred", clip_skip=1)
    pipe.register_modules(text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None)
    embeds = prompt_embeds(embedder, LONG[:1], ["blurred"], second=other, clip_skip=1, last_for_sdxl=True, pad_id=0)
    np.testing.assert_allclose(drawn, picture(pipe, **embeds), atol=1e-5)
    for skip in (LAYERS + 1, 12):
        with pytest.raises(InputError, match=r"has 3 blocks.*smaller clip_skip"):
            prompt_embeds(embedder, LONG, second=other, clip_skip=skip, last_for_sdxl=True)


def test_too_large_a_clip_skip_is_told(embedders: tuple[Embedder, Embedder]) -> None:
    for pair in ({}, {"second": embedders[1]}):
        with pytest.raises(InputError, match=r"has 3 blocks.*smaller clip_skip"):
            prompt_embeds(embedders[0], LONG, clip_skip=4, **pair)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="clip_skip is -1"):
        prompt_embeds(embedders[0], LONG, clip_skip=-1)
    encoder = LongClipTextEncoder(embedders[0])
    with pytest.raises(InputError, match="smaller clip_skip"):
        picture(stable_diffusion(encoder, encoder.tokenizer()), prompt="a cat", clip_skip=7)


def test_it_goes_where_the_pipeline_goes(embedders: tuple[Embedder, Embedder]) -> None:
    encoder = LongClipTextEncoder(embedders[0]).to(torch.float16)
    assert encoder.dtype == torch.float16 and encoder.device.type == "cpu"
    assert encoder(token_ids([20]))[0].dtype == torch.float16
    embeds = prompt_embeds(embedders[0], ["a cat"], dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in embeds.values()} == {torch.bfloat16}


def test_a_bundle_without_the_states_says_how_to_add_them(embedders: tuple[Embedder, Embedder]) -> None:
    with Embedder.from_bundle(BUILT_IN, "openvino", "fp32") as embedder:
        with pytest.raises(
            BundleError, match=r"last_hidden_state, .*longclip-rt export --weights .* --output"
        ) as error:
            prompt_embeds(embedder, ["a cat"])
        assert str(error.value).endswith("--output-name text:last_hidden_state")
        encoder = LongClipTextEncoder(embedder)
        with pytest.raises(BundleError, match="without the text encoder's last_hidden_state"):
            picture(stable_diffusion(encoder, encoder.tokenizer()), prompt="a cat")
    with pytest.raises(BundleError, match=r"text:hidden_states\.-3 --output-name text:hidden_states\.-4$"):
        prompt_embeds(embedders[0], ["a cat"], clip_skip=3)


def test_lists_are_checked(embedders: tuple[Embedder, Embedder], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InputError, match=r"Write \[prompt\]"):
        prompt_embeds(embedders[0], "a cat")
    with pytest.raises(InputError, match="1 prompts and 2 negative"):
        prompt_embeds(embedders[0], ["a cat"], ["a", "b"])
    prompt_embeds(embedders[0], ["many words " * 200])
    assert "1 of 1 prompts were cut to 248 tokens" in caplog.text


@pytest.mark.parametrize("absent", ["transformers", "onnx"])
def test_the_extra_is_named(absent: str, embedders: tuple[Embedder, Embedder], monkeypatch: pytest.MonkeyPatch) -> None:
    from longclip_rt.integrations import diffusers

    diffusers._head.cache_clear()
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(MissingExtraError, match=r"longclip-rt\[diffusers\]"):
        LongClipTextEncoder(embedders[0])


def test_the_example_draws_from_the_whole_prompt(
    embedders: tuple[Embedder, Embedder], reference: tuple[Any, Any], tmp_path: Path
) -> None:
    stable_diffusion(reference[0], LongClipTextEncoder(embedders[0]).tokenizer()).save_pretrained(tmp_path / "model")
    example = Path(__file__).parents[2] / "examples" / "long_prompt.py"
    bundle, out = embedders[0].bundle.path, tmp_path / "picture.png"
    arguments = [tmp_path / "model", bundle, LONG[0], "--out", out, "--steps", "1", "--negative", "blurred"]
    result = subprocess.run([sys.executable, example, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    tokens = re.search(r"drawn from (\d+) of (\d+) tokens", result.stdout)
    assert tokens and 190 < int(tokens[1]) == int(tokens[2]) and Image.open(out).size == (8, 8)
