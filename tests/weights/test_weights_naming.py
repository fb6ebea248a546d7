from __future__ import annotations

import pytest
import torch
from tiny_models import TINY, tiny_tensors
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from longclip_rt.weights.convert import huggingface_config
from longclip_rt.weights.naming import SECOND_TABLE, canonical_names, huggingface_names


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0)


def test_openais_names_stay_as_they_are() -> None:
    tensors = tiny_tensors()
    renamed, notes = canonical_names(tensors)
    assert_same(renamed, tensors)
    assert notes == []


def test_huggingfaces_names_are_those_of_its_own_model_and_come_back() -> None:
    tensors = tiny_tensors()
    theirs = huggingface_names(tensors)
    expected = CLIPModel(CLIPConfig(**huggingface_config(TINY))).state_dict()
    assert {name: tensor.shape for name, tensor in theirs.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    assert all(tensor.is_contiguous() for tensor in theirs.values())
    renamed, notes = canonical_names(theirs)
    assert_same(renamed, tensors)
    assert notes == ["renamed from Hugging Face's names"]


@pytest.mark.parametrize(
    "spelling",
    [
        "text_model.embeddings.position_embedding_res.weight",
        "text_model.embeddings.position_embedding_res",
        "text_model.embeddings.positional_embedding_res",
        "text_model.text_model.embeddings.position_embedding_res",
        "positional_embedding_res",
    ],
)
def test_the_second_table_is_found_under_every_spelling(spelling: str) -> None:
    tensors = tiny_tensors()
    second = torch.randn(248, 64)
    renamed, _ = canonical_names(huggingface_names(tensors) | {spelling: second})
    assert_same(renamed, tensors | {SECOND_TABLE: second})


def test_towers_that_are_wrapped_twice_are_unwrapped() -> None:
    tensors = tiny_tensors()
    doubled = {}
    for name, tensor in huggingface_names(tensors).items():
        tower = name.partition(".")[0]
        doubled[f"{tower}.{name}" if tower in ("text_model", "vision_model") else name] = tensor
    assert_same(canonical_names(doubled)[0], tensors)


def test_the_other_spelling_of_the_first_norm_is_known() -> None:
    tensors = tiny_tensors()
    theirs = {name.replace("pre_layrnorm", "pre_layernorm"): t for name, t in huggingface_names(tensors).items()}
    assert_same(canonical_names(theirs)[0], tensors)


def test_open_clips_custom_text_names_are_mapped() -> None:
    tensors = tiny_tensors()
    custom = {
        name if name.startswith("visual.") or name == "logit_scale" else f"text.{name}": tensor
        for name, tensor in tensors.items()
    }
    renamed, notes = canonical_names(custom)
    assert_same(renamed, tensors)
    assert notes == ["renamed from open_clip's CustomTextCLIP"]


def test_a_projection_that_is_a_linear_layer_is_transposed() -> None:
    tensors = tiny_tensors()
    linear = dict(tensors)
    linear["text_projection.weight"] = linear.pop("text_projection").T
    assert_same(canonical_names(linear)[0], tensors)


@pytest.mark.parametrize(
    "name",
    [
        "text_model.embeddings.position_ids",
        "vision_model.embeddings.position_ids",
        "input_resolution",
        "context_length",
        "vocab_size",
        "text.attn_mask",
        "mask1",
        "text_model.embeddings.mask2",
        "logit_bias",
    ],
)
def test_constants_are_dropped(name: str) -> None:
    tensors = tiny_tensors()
    assert_same(canonical_names(tensors | {name: torch.tensor(3)})[0], tensors)


@pytest.mark.parametrize("flat", [False, True])
def test_gmp_weights_are_multiplied_out(flat: bool) -> None:
    tensors = tiny_tensors()
    name = "visual.transformer.resblocks.1.mlp.c_fc"
    geometric = dict(tensors)
    weight = geometric.pop(f"{name}.weight")
    length = weight.norm(dim=1, keepdim=True)
    # The direction need not have length 1: the layer normalises it whenever it runs.
    geometric[f"{name}.theta"] = 3 * weight / length
    geometric[f"{name}.r"] = length.flatten() if flat else length
    renamed, notes = canonical_names(geometric)
    torch.testing.assert_close(renamed.pop(f"{name}.weight"), weight, rtol=1e-6, atol=1e-7)
    del tensors[f"{name}.weight"]
    assert_same(renamed, tensors)
    assert notes == ["multiplied out 1 GmP weights"]


def test_a_direction_of_length_zero_gives_a_row_of_zeros() -> None:
    renamed, _ = canonical_names({"a.theta": torch.zeros(2, 3), "a.r": torch.ones(2, 1)})
    torch.testing.assert_close(renamed["a.weight"], torch.zeros(2, 3), rtol=0, atol=0)


def test_what_is_unknown_keeps_its_name_and_a_third_of_an_attention_is_not_made_up() -> None:
    theirs = huggingface_names(tiny_tensors())
    del theirs["text_model.encoder.layers.0.self_attn.k_proj.bias"]
    renamed, _ = canonical_names(theirs | {"vision_model.surprise.weight": torch.ones(1)})
    assert "vision_model.surprise.weight" in renamed
    assert "transformer.resblocks.0.attn.in_proj_bias" not in renamed
