from __future__ import annotations

import dataclasses
import json

import open_clip
import pytest
from tiny_models import TINY

from longclip_rt.errors import WeightsError
from longclip_rt.model.architecture import Architecture, architecture_from_shapes
from longclip_rt.weights.config import architecture_from_open_clip

MODELS = ["ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "ViT-bigG-14"]


def of_open_clip(name: str) -> Architecture:
    return architecture_from_open_clip(open_clip.get_model_config(name), name)


@pytest.mark.parametrize("name", [*MODELS, "ViT-B-16-plus-240", "ViT-S-32-alt", "ViT-g-14", "ViT-e-14"])
def test_every_clip_shape_is_recognised_from_its_tensors(name: str) -> None:
    architecture = of_open_clip(name)
    assert architecture_from_shapes(architecture.shapes(), name, quick_gelu=False) == architecture


@pytest.mark.parametrize("name", MODELS)
def test_known_shapes_have_open_clips_names(name: str) -> None:
    assert of_open_clip(name).name == name


def test_unknown_shapes_have_a_name_that_tells_their_numbers() -> None:
    assert TINY.name == "ViT-w128-l2-p8-24"
    assert dataclasses.replace(of_open_clip("ViT-B-16"), embed_dim=640).name == "ViT-w768-l12-p16"


def test_base_16_has_the_numbers_of_the_paper() -> None:
    base = dataclasses.replace(of_open_clip("ViT-B-16"), context_length=248)
    parameters = sum(_product(shape) for shape in base.shapes().values())
    assert (base.image_tokens, base.vision_heads, base.text_heads) == (197, 12, 8)
    assert 149.6e6 < parameters < 149.9e6


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def test_it_survives_json() -> None:
    architecture = dataclasses.replace(TINY, quick_gelu=False)
    fields = json.loads(json.dumps(architecture.to_dict()))
    assert Architecture.from_dict(fields | {"a_field_of_a_later_version": 1}) == architecture


def test_a_missing_field_is_an_error() -> None:
    with pytest.raises(WeightsError, match="embed_dim"):
        Architecture.from_dict({name: value for name, value in TINY.to_dict().items() if name != "embed_dim"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_width": 100}, "vision width must be a multiple of its heads' 64 channels; got 100"),
        ({"text_width": 96}, "text width must be a multiple of its heads' 64 channels; got 96"),
        ({"image_size": 25}, "multiple of the patch size; got 25 and 8"),
        ({"text_layers": 0}, "text_layers must be positive; got 0"),
    ],
)
def test_impossible_numbers_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        dataclasses.replace(TINY, **changes)


def test_the_special_tokens_are_the_vocabularys_last_two() -> None:
    cut = dataclasses.replace(TINY, vocab_size=8192)
    assert (TINY.sot_id, TINY.eot_id, cut.sot_id, cut.eot_id) == (49406, 49407, 8190, 8191)


@pytest.mark.parametrize("size", [515, 8192, 49408])
def test_a_cut_vocabulary_is_accepted_where_the_weights_say_so(size: int) -> None:
    architecture = dataclasses.replace(TINY, vocab_size=size)
    assert architecture_from_shapes(architecture.shapes(), "weights.pt", vocab_size=size) == architecture


@pytest.mark.parametrize(
    ("rows", "stated", "message"),
    [
        (8192, None, "vocabulary of 8192 tokens; CLIP's has 49408"),
        (514, 514, "states a vocabulary of 514 tokens; .* from 515 to 49408"),
        (49409, 49409, "states a vocabulary of 49409 tokens"),
        (49408, 8192, "states a vocabulary of 8192 tokens, but has a table of 49408"),
    ],
)
def test_a_table_for_other_tokens_is_refused(rows: int, stated: int | None, message: str) -> None:
    shapes = TINY.shapes() | {"token_embedding.weight": (rows, 64)}
    with pytest.raises(WeightsError, match=rf"weights\.pt .*{message}"):
        architecture_from_shapes(shapes, "weights.pt", vocab_size=stated)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual.ln_post.bias": None}, r"ViT-w128-l2-p8-24, but has tensors missing: visual\.ln_post\.bias"),
        ({"visual.extra": (3,)}, r"unexpected: visual\.extra"),
        ({"ln_final.bias": (65,)}, r"of a wrong shape: ln_final\.bias \[65\] instead of \[64\]"),
        ({"text_projection": None}, r"lacks these tensors .*: text_projection\."),
        ({"visual.conv1.weight": (128, 192)}, r"another shape: visual\.conv1\.weight"),
        ({"visual.positional_embedding": (11, 128)}, "has 11 image positions; a class token and a square"),
        ({"token_embedding.weight": (32000, 64)}, "vocabulary of 32000 tokens; CLIP's has 49408"),
        ({"transformer.resblocks.1.ln_1.bias": None}, r"missing: transformer\.resblocks\.1\.ln_1\.bias"),
    ],
)
def test_tensors_that_do_not_fit_are_named(changes: dict[str, tuple[int, ...] | None], message: str) -> None:
    shapes = {name: shape for name, shape in (TINY.shapes() | changes).items() if shape is not None}
    with pytest.raises(WeightsError, match=message):
        architecture_from_shapes(shapes, "weights.pt")


def test_a_long_list_of_names_is_cut_with_its_count() -> None:
    shapes = {name: shape for name, shape in TINY.shapes().items() if ".ln_1." not in name}
    with pytest.raises(WeightsError, match=r"missing: (\S+, ){2}\S+ and 7 more"):
        architecture_from_shapes(shapes, "weights.pt")


def test_a_width_that_is_no_multiple_of_64_is_refused_from_tensors_too() -> None:
    shapes = dataclasses.replace(TINY, vision_width=96, vision_head_width=32).shapes()
    with pytest.raises(WeightsError, match="multiple of its heads' 64 channels; got 96"):
        architecture_from_shapes(shapes, "weights.pt")
    assert architecture_from_shapes(shapes, "weights.pt", vision_head_width=32).vision_heads == 3
