from __future__ import annotations

import pytest
from tiny_models import TINY

from longclip_rt.errors import WeightsError
from longclip_rt.weights.refusals import refuse_incomplete_models, refuse_other_architectures

CLIP = set(TINY.shapes())
HUGGING_FACE = {
    "text_model.embeddings.position_embedding.weight",
    "text_model.encoder.layers.0.mlp.fc1.weight",
    "vision_model.encoder.layers.0.mlp.fc1.weight",
    "vision_model.embeddings.class_embedding",
}


@pytest.mark.parametrize(
    ("found", "what"),
    [
        ("text_model.embeddings.position_embedding_ori.weight", "FG-CLIP: .*third position table"),
        ("text_filip_projection.weight", "FG-CLIP: .*second text projection"),
        ("text_decoder.resblocks.0.ln_1.weight", "CoCa"),
        ("text.transformer.embeddings.word_embeddings.weight", "BERT"),
        ("text.transformer.encoder.layer.0.attention.self.query.weight", "BERT"),
        ("bert.embeddings.LayerNorm.weight", "BERT"),
        ("vision_model.head.attention.in_proj_weight", "SigLIP"),
        ("text_model.head.weight", "SigLIP"),
        ("visual.trunk.attn_pool.q.weight", "SigLIP"),
        ("transformer.resblocks.0.attn.rotary_emb.inv_freq", "rotary"),
        ("text.transformer.freqs_cis", "rotary"),
        ("transformer.resblocks.3.attn.rope.freqs", "rotary"),
        ("transformer.resblocks.3.attn.cope.pos_emb", "rotary or contextual"),
        ("visual.layer1.0.conv1.weight", "ResNet"),
        ("visual.attnpool.positional_embedding", "ResNet"),
        ("visual.blocks.0.attn.q_proj.weight", "EVA"),
        ("visual.trunk.blocks.0.attn.qkv.weight", "EVA's or one of timm's"),
        ("visual.rope.freqs_cos", "EVA"),
        ("visual.transformer.resblocks.0.ls_1.gamma", "LayerScale"),
    ],
)
@pytest.mark.parametrize("others", [CLIP, HUGGING_FACE], ids=["openai", "huggingface"])
def test_other_architectures_are_called_by_name_with_what_was_found(found: str, what: str, others: set[str]) -> None:
    with pytest.raises(WeightsError, match=rf"weights\.pt is .*{what}.*found .*{found}.*Expected are CLIP"):
        refuse_other_architectures(others | {found}, "weights.pt")


@pytest.mark.parametrize("names", [CLIP, HUGGING_FACE, CLIP | {"logit_bias", "positional_embedding_res"}])
def test_clip_is_not_refused(names: set[str]) -> None:
    refuse_other_architectures(names, "weights.pt")


def test_a_whole_clip_is_complete() -> None:
    refuse_incomplete_models(CLIP, "weights.pt")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({name for name in CLIP if not name.startswith("visual.")}, "the text tower alone; the image tower is missing"),
        ({name for name in CLIP if name.startswith("visual.")}, "the image tower alone; the text tower is missing"),
        (CLIP - {"positional_embedding"}, "no text position table .*rotary positions .*TULIP"),
        (CLIP - {"visual.class_embedding"}, "no class embedding .*SigLIP"),
        ({"layer.weight", "layer.bias"}, "something else than a CLIP: layer.bias, layer.weight"),
    ],
)
def test_what_is_missing_as_a_whole_is_said(names: set[str], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        refuse_incomplete_models(names, "weights.pt")
