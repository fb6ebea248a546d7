"""What `convert` writes, in the pipelines of transformers and under the names that ComfyUI's loaders look for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from transformers import CLIPImageProcessor, CLIPVisionModel, pipeline

from longclip_rt.bundle.samples import example_photos
from longclip_rt.commands.convert import convert
from longclip_rt.model.preprocess import ImageTransform
from longclip_rt.weights.checkpoint import load_checkpoint, towers_from_checkpoint


@pytest.fixture(scope="module")
def folder(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "hf"
    result = CliRunner().invoke(convert, [str(tiny_weights), "--to", "huggingface", "--out", str(target)])
    assert result.exit_code == 0, result.output
    return target


@torch.no_grad()
def test_pipelines_take_converted_weights_and_long_labels(folder: Path, tiny_weights: Path) -> None:
    photo = str(example_photos()[0])
    labels = ["a drawing", "a photograph " + "of a person who looks into the camera and smiles, " * 12]
    checkpoint = load_checkpoint(tiny_weights)
    text, image = towers_from_checkpoint(checkpoint)
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    ids = classify.tokenizer(labels, padding=True, return_tensors="pt")["input_ids"]
    assert ids.shape[1] > 77
    transform = ImageTransform(checkpoint.architecture.image_size, checkpoint.image_mean, checkpoint.image_std)
    pixels = torch.from_numpy(transform(photo))[None]
    scale = checkpoint.state_dict["logit_scale"].exp()
    expected = (scale * image(pixels)[0] @ text(ids)[0].T).softmax(dim=-1)[0].tolist()
    scores = {found["label"]: found["score"] for found in classify(photo, labels, hypothesis_template="{}")}
    assert [scores[label] for label in labels] == pytest.approx(expected, abs=1e-3)

    model, processor = CLIPVisionModel.from_pretrained(folder), CLIPImageProcessor.from_pretrained(folder)
    extract = pipeline("image-feature-extraction", model=model, image_processor=processor)
    pooled = extract(photo, pool=True, return_tensors=True)
    torch.testing.assert_close(pooled, image.with_outputs(["pooler_output"])(pixels)[0], rtol=0, atol=1e-3)


@torch.no_grad()
def test_comfyui_finds_its_names_in_the_same_file(folder: Path) -> None:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        # It takes a file for CLIP's text encoder by the first, and reads the length of prompts off the second.
        assert "text_model.encoder.layers.0.mlp.fc1.weight" in names
        assert file.get_slice("text_model.embeddings.position_embedding.weight").get_shape()[0] == 248
        assert {"text_model.final_layer_norm.weight", "text_projection.weight"} <= names
