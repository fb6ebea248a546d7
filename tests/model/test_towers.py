from __future__ import annotations

import collections
import dataclasses
import logging

import open_clip
import pytest
import torch
from tiny_models import TINY, tiny_checkpoint, token_ids
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from longclip_rt.errors import LongClipError
from longclip_rt.model.towers import ImageTower, TextTower
from longclip_rt.weights.checkpoint import Checkpoint, towers_from_checkpoint
from longclip_rt.weights.convert import huggingface_config
from longclip_rt.weights.naming import huggingface_names

LENGTHS = [2, 3, 17, 76, 77, 78, 247, 248]


def pixels(count: int = 3, seed: int = 0) -> torch.Tensor:
    size = TINY.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def reference(checkpoint: Checkpoint) -> torch.nn.Module:
    """open_clip's own model with the same weights, built through its public constructor."""
    a = checkpoint.architecture
    model = open_clip.CLIP(
        embed_dim=a.embed_dim,
        quick_gelu=a.quick_gelu,
        vision_cfg={
            "layers": a.vision_layers,
            "width": a.vision_width,
            "head_width": 64,
            "mlp_ratio": a.vision_mlp_width / a.vision_width,
            "patch_size": a.patch_size,
            "image_size": a.image_size,
        },
        text_cfg={
            "context_length": a.context_length,
            "vocab_size": a.vocab_size,
            "width": a.text_width,
            "heads": a.text_width // 64,
            "layers": a.text_layers,
        },
    )
    model.load_state_dict(checkpoint.state_dict)
    return model.eval()


def huggingface(checkpoint: Checkpoint) -> CLIPModel:
    model = CLIPModel(CLIPConfig(**huggingface_config(checkpoint.architecture)))
    model.load_state_dict(huggingface_names(checkpoint.state_dict))
    return model.eval()


@pytest.mark.parametrize("quick_gelu", [True, False])
@torch.no_grad()
def test_embeddings_equal_open_clips(quick_gelu: bool) -> None:
    checkpoint = tiny_checkpoint(quick_gelu=quick_gelu)
    text, image = towers_from_checkpoint(checkpoint)
    model = reference(checkpoint)
    ids = token_ids(LENGTHS)
    expected = model.encode_text(ids, normalize=True)
    torch.testing.assert_close(text(ids)[0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(image(pixels())[0], model.encode_image(pixels(), normalize=True), rtol=0, atol=1e-5)
    # The comparison means something only where texts and activations differ by far more than the tolerance.
    assert (expected[0] - expected[-1]).abs().max() > 1e-3


@torch.no_grad()
def test_a_cut_vocabulary_is_pooled_at_its_own_end_token() -> None:
    checkpoint = tiny_checkpoint(vocab_size=8192)
    text, _ = towers_from_checkpoint(checkpoint)
    ids = token_ids(LENGTHS, vocab_size=8192)
    expected = reference(checkpoint).encode_text(ids, normalize=True)
    torch.testing.assert_close(text(ids)[0], expected, rtol=0, atol=1e-5)
    hidden = huggingface(checkpoint)(input_ids=ids.long(), pixel_values=pixels()).text_embeds
    torch.testing.assert_close(text(ids)[0], hidden, rtol=0, atol=1e-5)
    padded = token_ids(LENGTHS, vocab_size=8192, pad=8191)
    torch.testing.assert_close(text(padded)[0], text(ids)[0], rtol=0, atol=0)


@torch.no_grad()
def test_the_two_activations_differ() -> None:
    quick, exact = (towers_from_checkpoint(tiny_checkpoint(quick_gelu=flag))[1] for flag in (True, False))
    assert (quick(pixels())[0] - exact(pixels())[0]).abs().max() > 1e-4


@pytest.mark.parametrize("quick_gelu", [True, False])
@torch.no_grad()
def test_every_output_equals_the_one_that_huggingface_calls_so(quick_gelu: bool) -> None:
    checkpoint = tiny_checkpoint(quick_gelu=quick_gelu)
    text, image = towers_from_checkpoint(checkpoint)
    model = huggingface(checkpoint)
    ids = token_ids([5, 30, 40], width=40)
    for tower, inputs, theirs, projection in (
        (text, ids, model.text_model(ids.long(), output_hidden_states=True), model.text_projection),
        (image, pixels(), model.vision_model(pixels(), output_hidden_states=True), model.visual_projection),
    ):
        names = tower.output_names
        outputs = dict(zip(names, tower.with_outputs(names)(inputs), strict=True))
        embedding = F.normalize(projection(theirs.pooler_output), dim=-1)
        torch.testing.assert_close(outputs.pop(names[0]), embedding, rtol=0, atol=1e-5)
        torch.testing.assert_close(outputs.pop("pooler_output"), theirs.pooler_output, rtol=0, atol=1e-4)
        torch.testing.assert_close(outputs.pop("last_hidden_state"), theirs.last_hidden_state, rtol=0, atol=1e-4)
        assert len(outputs) == len(theirs.hidden_states) == len(tower.blocks) + 1
        for name, value in outputs.items():
            number = int(name.removeprefix("hidden_states."))
            torch.testing.assert_close(value, theirs.hidden_states[number], rtol=0, atol=1e-4)


@torch.no_grad()
def test_trimming_to_the_longest_text_is_exact() -> None:
    text, _ = towers_from_checkpoint(tiny_checkpoint())
    ids = token_ids([2, 9, 16])
    torch.testing.assert_close(text(ids[:, :16])[0], text(ids)[0], rtol=0, atol=1e-6)


@torch.no_grad()
def test_what_follows_the_first_eot_does_not_matter() -> None:
    text, _ = towers_from_checkpoint(tiny_checkpoint())
    ids, other = token_ids([2, 9, 16], width=24), token_ids([2, 9, 16], width=24, pad=49407)
    other[0, 5:9] = torch.tensor([49406, 7, 49407, 1])
    torch.testing.assert_close(text(other)[0], text(ids)[0], rtol=0, atol=0)


@torch.no_grad()
def test_a_text_without_eot_is_pooled_at_its_last_slot() -> None:
    text, _ = towers_from_checkpoint(tiny_checkpoint())
    text = text.with_outputs(["pooler_output", "last_hidden_state"])
    ids = token_ids([9], width=9)
    ids[0, -1] = 5
    pooled, states = text(ids)
    torch.testing.assert_close(pooled, states[:, -1], rtol=0, atol=1e-6)


@torch.no_grad()
def test_int32_and_int64_ids_give_the_same() -> None:
    text, _ = towers_from_checkpoint(tiny_checkpoint())
    ids = token_ids([4, 8], width=8)
    torch.testing.assert_close(text(ids.long())[0], text(ids)[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_in_half_precision_outputs_are_float32_normalised_and_near(dtype: torch.dtype) -> None:
    checkpoint = tiny_checkpoint()
    exact = towers_from_checkpoint(checkpoint)
    rounded = tuple(tower.to(dtype) for tower in towers_from_checkpoint(checkpoint))
    for inputs, one, other in zip((token_ids(LENGTHS), pixels()), exact, rounded, strict=True):
        vectors = other(inputs)[0]
        assert vectors.dtype == torch.float32
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(vectors)), rtol=0, atol=1e-6)
        assert F.cosine_similarity(vectors, one(inputs)[0]).min() > 0.999
        assert {value.dtype for value in other.with_outputs(other.output_names)(inputs)} == {torch.float32}
    # Casting a tower leaves the checkpoint, which shares its weights, as it was.
    assert {tensor.dtype for tensor in checkpoint.state_dict.values()} == {torch.float32}


@torch.no_grad()
def test_single_blocks_can_be_kept_in_fp32() -> None:
    checkpoint = tiny_checkpoint()
    exact, _ = towers_from_checkpoint(checkpoint)
    mixed, _ = towers_from_checkpoint(checkpoint)
    mixed.half()
    for block in mixed.blocks[1:]:
        block.float()
    seen = []
    hooks = [block.register_forward_hook(lambda module, args, out: seen.append(out.dtype)) for block in mixed.blocks]
    vectors = mixed(token_ids(LENGTHS))[0]
    for hook in hooks:
        hook.remove()
    assert seen == [torch.float16, torch.float32, torch.float32]
    assert F.cosine_similarity(vectors, exact(token_ids(LENGTHS))[0]).min() > 0.999


def test_outputs_are_chosen_by_name_and_in_order() -> None:
    text, image = towers_from_checkpoint(tiny_checkpoint())
    assert text.outputs == ("text_embeds",) and image.outputs == ("image_embeds",)
    assert text.output_names[:4] == ("text_embeds", "pooler_output", "last_hidden_state", "hidden_states.-1")
    assert text.output_names[-1] == "hidden_states.-4" and image.output_names[-1] == "hidden_states.-3"
    chosen = text.with_outputs(["hidden_states.-2", "text_embeds"])
    assert [tuple(value.shape) for value in chosen(token_ids([4, 8], width=8))] == [(2, 8, 64), (2, 32)]
    assert text.outputs == ("text_embeds",)


@pytest.mark.parametrize("names", [["image_embeds"], ["hidden_states.-5"], ["hidden_states.0"], ["embeds"]])
def test_unknown_outputs_are_refused_with_the_known_ones(names: list[str]) -> None:
    text, _ = towers_from_checkpoint(tiny_checkpoint())
    with pytest.raises(LongClipError, match=f"no output named '{names[0]}'.*text_embeds.*hidden_states.-4"):
        text.with_outputs(names)


@pytest.mark.parametrize("names", [[], ["text_embeds", "text_embeds"]])
def test_outputs_must_be_named_once_each(names: list[str]) -> None:
    text, _ = towers_from_checkpoint(tiny_checkpoint())
    with pytest.raises(LongClipError, match="once each"):
        text.with_outputs(names)


def test_towers_share_the_checkpoints_memory_and_take_no_gradients() -> None:
    checkpoint = tiny_checkpoint()
    text, image = towers_from_checkpoint(checkpoint)
    table = checkpoint.state_dict["token_embedding.weight"]
    assert text.token_embedding.weight.data_ptr() == table.data_ptr()
    assert not any(parameter.requires_grad for tower in (text, image) for parameter in tower.parameters())
    assert not text.training and not image.training


@torch.no_grad()
def test_heads_of_another_width_are_honoured() -> None:
    narrow = towers_from_checkpoint(tiny_checkpoint(vision_head_width=32))[1]
    usual = towers_from_checkpoint(tiny_checkpoint())[1]
    assert narrow.blocks[0].heads == 4 and usual.blocks[0].heads == 2
    assert (narrow(pixels())[0] - usual(pixels())[0]).abs().max() > 1e-4


@torch.no_grad()
def test_an_mlp_width_that_is_no_exact_ratio_is_built() -> None:
    checkpoint = tiny_checkpoint(vision_mlp_width=251, text_mlp_width=97)
    text, image = towers_from_checkpoint(checkpoint)
    assert text(token_ids([4], width=8))[0].shape == image(pixels(1))[0].shape == (1, 32)


def exported(tower: TextTower | ImageTower, inputs: torch.Tensor, dims: dict[int, str]) -> list[str]:
    """The operators of the tower's ONNX graph, with the checks that hold for both towers."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    ranges = {"batch": (1, 512), "length": (2, 248)}
    shapes = ({axis: torch.export.Dim(name, min=ranges[name][0], max=ranges[name][1]) for axis, name in dims.items()},)
    program = torch.onnx.export(tower, (inputs,), dynamo=True, opset_version=23, dynamic_shapes=shapes, verbose=False)
    graph = program.model_proto.graph
    assert [dim.dim_param for dim in graph.input[0].type.tensor_type.shape.dim][:1] == ["batch"]
    for node in graph.node:
        if node.op_type == "LayerNormalization":
            assert {a.name: a.i for a in node.attribute}["stash_type"] == 1
    constants = [torch.from_numpy(_array(tensor)) for tensor in graph.initializer]
    assert not any(torch.isinf(value).any() for value in constants if value.is_floating_point())
    return [node.op_type for node in graph.node]


def _array(tensor: object) -> object:
    import onnx

    return onnx.numpy_helper.to_array(tensor).copy()


def test_the_text_graph_has_fused_attention_and_finds_eot_on_integers() -> None:
    text, _ = towers_from_checkpoint(tiny_checkpoint())
    operators = collections.Counter(exported(text, token_ids([4, 9, 12], width=12), {0: "batch", 1: "length"}))
    assert operators["Attention"] == 3
    assert operators["LayerNormalization"] == 2 * 3 + 1
    assert operators["Slice"] == 1 and operators["ReduceMin"] == 1
    assert not {"ArgMax", "Softmax", "ReduceMean", "Cast"} & operators.keys()


def test_the_image_graph_has_fused_attention() -> None:
    _, image = towers_from_checkpoint(tiny_checkpoint())
    operators = collections.Counter(exported(image, pixels(), {0: "batch"}))
    assert operators["Attention"] == 2
    assert operators["LayerNormalization"] == 2 * 2 + 2
    assert not {"Softmax", "ReduceMean", "Cast"} & operators.keys()


def test_only_the_borders_of_a_half_precision_graph_are_cast() -> None:
    text, image = (tower.half() for tower in towers_from_checkpoint(tiny_checkpoint()))
    text_operators = collections.Counter(exported(text, token_ids([4, 9], width=12), {0: "batch", 1: "length"}))
    image_operators = collections.Counter(exported(image, pixels(), {0: "batch"}))
    assert text_operators["Cast"] == 1  # before the norm
    assert image_operators["Cast"] == 2  # pixels, and before the norm


def test_towers_need_no_particular_context_length() -> None:
    checkpoint = tiny_checkpoint(context_length=77)
    text, _ = towers_from_checkpoint(checkpoint)
    assert text.architecture == dataclasses.replace(TINY, context_length=77)
    assert text(token_ids([77], width=77))[0].shape == (1, 32)
