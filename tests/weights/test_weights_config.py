from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longclip_rt.errors import WeightsError
from longclip_rt.weights.config import CLIP_MEAN, CLIP_STD, ModelConfig, architecture_from_open_clip, read_config


def written(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def huggingface(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"model_type": "clip", "text_config": text or {}, "vision_config": vision or {}}


def test_a_folder_that_says_nothing_leaves_everything_open(tmp_path: Path) -> None:
    assert read_config(tmp_path) == ModelConfig()
    assert ModelConfig().quick_gelu is None and ModelConfig().image_mean == CLIP_MEAN


@pytest.mark.parametrize(("name", "quick"), [("quick_gelu", True), ("gelu", False)])
def test_huggingfaces_activation_is_read(name: str, quick: bool, tmp_path: Path) -> None:
    written(tmp_path, config=huggingface({"hidden_act": name}, {"hidden_act": name}))
    assert read_config(tmp_path).quick_gelu is quick


def test_huggingfaces_default_activation_is_quick_gelu(tmp_path: Path) -> None:
    assert read_config(written(tmp_path, config=huggingface())).quick_gelu is True


def test_huggingfaces_heads_are_read(tmp_path: Path) -> None:
    vision = {"hidden_size": 1280, "num_attention_heads": 16}
    config = read_config(written(tmp_path, config=huggingface({"hidden_size": 1024}, vision)))
    assert (config.vision_head_width, config.text_head_width) == (80, None)


@pytest.mark.parametrize(
    ("text", "vision", "message"),
    [
        ({"hidden_act": "relu"}, {}, "activation 'relu'; known are quick_gelu, gelu"),
        ({"hidden_act": "gelu"}, {"hidden_act": "quick_gelu"}, "two towers different activations"),
        ({"layer_norm_eps": 1e-6}, {}, "layer_norm_eps=1e-06"),
    ],
)
def test_what_the_towers_cannot_do_is_refused(
    text: dict[str, Any], vision: dict[str, Any], message: str, tmp_path: Path
) -> None:
    written(tmp_path, config=huggingface(text, vision))
    with pytest.raises(WeightsError, match=rf"config\.json .*{message}"):
        read_config(tmp_path)


def test_another_programs_config_is_passed_over(tmp_path: Path) -> None:
    assert read_config(written(tmp_path, config={"theme": "dark"}, open_clip_config=[1])) == ModelConfig()


@pytest.mark.parametrize("content", ["{", b"\xff\xfe".decode("latin1") + "{}"])
def test_a_damaged_config_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"config\.json is no readable JSON"):
        read_config(written(tmp_path, config=content))


def test_open_clips_config_is_read(tmp_path: Path) -> None:
    half = [0.5, 0.5, 0.5]
    model = open_clip.get_model_config("ViT-H-14-quickgelu")
    written(tmp_path, open_clip_config={"model_cfg": model, "preprocess_cfg": {"mean": half, "std": half}})
    assert read_config(tmp_path) == ModelConfig(
        quick_gelu=True,
        vision_head_width=80,
        text_head_width=64,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    )


def test_the_image_processors_normalisation_is_read(tmp_path: Path) -> None:
    written(tmp_path, preprocessor_config={"image_mean": [0.1, 0.2, 0.3], "do_center_crop": True})
    config = read_config(tmp_path)
    assert config.image_mean == (0.1, 0.2, 0.3) and config.image_std == CLIP_STD


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"image_std": [1, 2]}, r"\(std\) gives \[1, 2\]; three numbers from 1/255 to 1"),
        ({"image_mean": "grey"}, r"\(mean\) gives 'grey'; three numbers"),
        ({"image_std": [1, 0, 1]}, r"\(std\) gives \[1, 0, 1\]"),
        ({"do_center_crop": False}, "resize_mode='squash'"),
    ],
)
def test_images_that_are_prepared_in_another_way_are_refused(
    content: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=rf"preprocessor_config\.json .*{message}"):
        read_config(written(tmp_path, preprocessor_config=content))


def test_a_header_says_everything_again() -> None:
    config = ModelConfig(False, 80, 64, (0.1, 0.2, 0.3), (0.2, 0.3, 1.0), trained=False, vocab_size=8192)
    assert ModelConfig().with_metadata(config.to_metadata() | {"format": "pt"}) == config
    assert config.with_metadata({"format": "pt"}) == config


def test_a_header_that_says_nothing_of_the_activation_leaves_it_to_the_files_beside() -> None:
    known = ModelConfig(quick_gelu=False, vision_head_width=80)
    assert known.with_metadata(ModelConfig().to_metadata()) == known


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("trained", "perhaps"),
        ("quick_gelu", "1"),
        ("vision_head_width", "-64"),
        ("vocab_size", "many"),
        ("image_mean", "[1, 2]"),
    ],
)
def test_a_broken_header_is_refused(name: str, text: str) -> None:
    with pytest.raises(WeightsError, match=rf"longclip_rt\.{name}.* expected"):
        ModelConfig().with_metadata({f"longclip_rt.{name}": text})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RN50", "ResNet"),
        ("EVA02-B-16", "vision_cfg sets timm_model_name='eva02"),
        ("ViT-B-16-SigLIP", "vision_cfg sets timm_model_name"),
        ("roberta-ViT-B-32", "text_cfg sets hf_model_name='roberta-base'"),
        ("coca_ViT-B-32", "attentional_pool|CoCa"),
        ("ViT-H-14-CLIPA", "vision_cfg sets no_ln_pre=True"),
        ("ViT-M-16-alt", "vision_cfg sets ls_init_value"),
        ("ViT-H-14-worldwide", "vocabulary|vocab"),
    ],
)
def test_models_of_open_clip_that_are_no_plain_clip_are_refused(name: str, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        architecture_from_open_clip(open_clip.get_model_config(name), name)


def test_every_plain_clip_of_open_clip_is_accepted_and_no_other_model() -> None:
    accepted = set()
    for name in open_clip.list_models():
        try:
            architecture_from_open_clip(open_clip.get_model_config(name), name)
        except WeightsError:
            continue
        accepted.add(name)
    assert {"ViT-B-16", "ViT-B-32", "ViT-L-14", "ViT-L-14-336", "ViT-L-14-quickgelu", "ViT-H-14"} <= accepted
    others = ("SigLIP", "EVA", "RN", "coca", "convnext", "PE-", "MobileCLIP", "CLIPA", "roberta", "ViTamin", "nllb")
    assert not [name for name in accepted if any(word in name for word in others)]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([0, 64, "gelu"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def part(*names: str) -> st.SearchStrategy[Any]:
    """JSON of any kind, mostly an object that has some of these fields, each of any kind."""
    return st.fixed_dictionaries({}, optional={name: JSON for name in names}) | JSON


TOWER = part("hidden_act", "hidden_size", "num_attention_heads", "layer_norm_eps")
OPEN_CLIP_TOWER = part("width", "layers", "heads", "head_width", "mlp_ratio", "image_size", "patch_size", "vocab_size")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=st.fixed_dictionaries({}, optional={"text_config": TOWER, "vision_config": TOWER}) | JSON,
    open_clip_config=st.fixed_dictionaries(
        {
            "model_cfg": st.fixed_dictionaries(
                {"embed_dim": JSON, "vision_cfg": OPEN_CLIP_TOWER, "text_cfg": OPEN_CLIP_TOWER},
                optional={"quick_gelu": JSON},
            )
        },
        optional={"preprocess_cfg": part("mean", "std", "interpolation")},
    )
    | JSON,
    preprocessor_config=part("image_mean", "image_std", "do_center_crop"),
)
def test_any_json_is_read_or_refused(
    config: Any, open_clip_config: Any, preprocessor_config: Any, tmp_path: Path
) -> None:
    content = {
        "config": config,
        "open_clip_config": open_clip_config,
        "preprocessor_config": preprocessor_config,
    }
    for name in content:
        written(tmp_path, **{name: content[name]})
    with contextlib.suppress(WeightsError):
        read = read_config(tmp_path)
        assert all(0 <= value <= 1 for value in read.image_mean) and min(read.image_std) > 0
        assert all(width is None or width > 0 for width in (read.vision_head_width, read.text_head_width))
        assert read.quick_gelu in (None, True, False)


@given(st.dictionaries(st.sampled_from(sorted(ModelConfig().to_metadata())), st.text() | JSON.map(json.dumps)))
def test_any_header_is_read_or_refused(header: dict[str, str]) -> None:
    with contextlib.suppress(WeightsError):
        read = ModelConfig().with_metadata(header)
        assert ModelConfig().with_metadata(read.to_metadata()) == read
