"""Files that are made to confuse, by an accident or an attacker: each is refused in a sentence, at once."""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_tensors
from torch import Tensor

from longclip_rt.errors import WeightsError
from longclip_rt.weights.checkpoint import load_checkpoint
from longclip_rt.weights.naming import huggingface_names

Q = "text_model.encoder.layers.0.self_attn.q_proj.weight"
MLP = "visual.transformer.resblocks.0.mlp.c_fc"


def openai(**changes: Any) -> dict[str, Any]:
    return tiny_tensors() | {name.replace("__", "."): value for name, value in changes.items()}


def huggingface(name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    tensors = huggingface_names(tiny_tensors())
    return tensors | {name: change(tensors[name])}


def geometric(**changes: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """One weight as GmP has it: its rows' lengths and directions."""
    tensors = tiny_tensors()
    theta = tensors.pop(f"{MLP}.weight")
    parts = {"r": theta.norm(dim=1, keepdim=True), "theta": theta}
    return tensors | {f"{MLP}.{name}": changes.get(name, lambda x: x)(part) for name, part in parts.items()}


def holding_itself() -> dict[str, Any]:
    inner: dict[str, Any] = {"state_dict": {}}
    inner["state_dict"]["model"] = inner
    return inner


def nested(depth: int) -> dict[str, Any]:
    content: dict[str, Any] = tiny_tensors()
    for _ in range(depth):
        content = {"state_dict": content}
    return content


def block(number: str) -> dict[str, Tensor]:
    return tiny_tensors() | {f"transformer.resblocks.{number}.ln_1.weight": torch.zeros(64)}


def expanded(*shape: int) -> Tensor:
    return torch.ones(()).expand(shape)


ARCHIVES: dict[str, tuple[Callable[[], Any], str]] = {
    "a dictionary that holds itself": (holding_itself, "in one that holds itself"),
    "many dictionaries": (lambda: nested(300), "more than 8 dictionaries"),
    "block 99,999,999": (lambda: block("99999999"), r"unexpected: transformer\.resblocks\.99999999"),
    "block 10^5000": (lambda: block("9" * 5000), r"unexpected: transformer\.resblocks\.9{50,}\.\.\."),
    "sparse": (lambda: openai(visual__proj=torch.eye(128, 32).to_sparse()), r"visual\.proj \(sparse_coo\)"),
    "sparse q": (lambda: huggingface(Q, Tensor.to_sparse), r"not dense .*q_proj\.weight \(sparse_coo\)"),
    "without data": (lambda: openai(visual__proj=torch.empty(128, 32, device="meta")), r"visual\.proj \(on meta\)"),
    "40 TB": (lambda: openai(visual__proj=expanded(10**7, 10**6)), r"visual\.proj \[10000000, 1000000\]"),
    "2^40 positions": (lambda: openai(positional_embedding=expanded(2**40, 64)), "fewer numbers than their shapes"),
    "int8 beside floats": (lambda: huggingface(Q, Tensor.char), r"q_proj\.weight \(torch\.int8\)\. Quantised"),
    "int8 in GmP": (lambda: geometric(theta=Tensor.char), r"c_fc\.theta \(torch\.int8\)\. Quantised"),
    "scalar in GmP": (lambda: geometric(theta=Tensor.sum), r"direction .*c_fc\.theta \[\]"),
    "too few lengths in GmP": (lambda: geometric(r=lambda r: r[:7]), r"lengths \[7, 1\]"),
    "scalar table": (lambda: openai(positional_embedding=torch.tensor(1.0)), r"position table of shape \[\]"),
    "scalar second table": (lambda: openai(positional_embedding_res=torch.ones(())), r"position table of shape \[\]"),
    "scalar q": (lambda: huggingface(Q, Tensor.sum), r"q, k and v of transformer\.resblocks\.0\.attn\.in_proj_weight"),
    "other q": (lambda: huggingface(Q, lambda q: q[:5, :7]), r"q, k and v .* \[\[5, 7\], \[64, 64\], \[64, 64\]\]"),
    "q alone": (
        lambda: huggingface_names(tiny_tensors()) | {Q.replace(".0.", ".00."): torch.zeros(64, 64)},
        r"unexpected: transformer\.resblocks\.00\.attn\.in_proj_weight \(q without the other two\)",
    ),
    "two schemes": (lambda: huggingface_names(tiny_tensors()) | tiny_tensors(), "two tensors for .* under two names"),
    "two text projections": (
        lambda: openai(text_projection__weight=torch.randn(32, 64)),
        "two tensors for text_projection, ",
    ),
    "two norms": (
        lambda: huggingface_names(tiny_tensors()) | {"vision_model.pre_layernorm.weight": torch.ones(128)},
        r"two tensors for visual\.ln_pre\.weight, ",
    ),
    "GmP and plain": (lambda: geometric() | {f"{MLP}.weight": torch.ones(192, 128)}, "two tensors for visual"),
    "a tower inside and out": (
        lambda: (
            {(f"text.{n}" if not n.startswith("visual.") else n): t for n, t in tiny_tensors().items()}
            | {"ln_final.weight": torch.ones(64)}
        ),
        r"two tensors for ln_final\.weight, ",
    ),
    "zeros": (
        lambda: {name: torch.zeros_like(tensor) for name, tensor in tiny_tensors().items()},
        r"nothing but zeros in visual\.conv1\.weight.* and 4 more: every text or every image",
    ),
    "one projection of zeros": (
        lambda: openai(text_projection=torch.zeros(64, 32)),
        "nothing but zeros in text_projection",
    ),
    "a name for terminals": (lambda: openai(**{"a\x1b[31m": torch.ones(1)}), r"unexpected: a\\x1b\[31m"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_of_an_odd_structure_is_refused(kind: str, tmp_path: Path) -> None:
    make, message = ARCHIVES[kind]
    torch.save(make(), tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match=message):
        load_checkpoint(tmp_path / "weights.pt")


def header(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def bomb() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bomb(), "unpacks to more than its own size"),
        # GLOBAL bytearray, with the argument 10^15
        (b"\x80\x02cbuiltins\nbytearray\n\x8a\x07" + (10**15).to_bytes(7, "little") + b"\x85R.", "damaged"),
        (b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".", "damaged"),
        (header(b'{"a":' * 50_000), "no readable safetensors"),
        (header(b'{"a":{"dtype":"F32","shape":[10000000,1000000],"data_offsets":[0,40000000000000]}}'), "damaged"),
    ],
    ids=["zip bomb", "a petabyte", "deep pickle", "deep header", "40 TB"],
)
def test_bytes_that_claim_more_than_there_is_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        load_checkpoint(path)


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", DEEP, "no readable JSON"),
        ("config.json", {"text_config": {"num_attention_heads": "8", "hidden_size": 64}}, "num_attention_heads='8'"),
        ("config.json", {"text_config": {"num_attention_heads": [8], "hidden_size": 64}}, r"num_attention_heads=\[8\]"),
        ("config.json", {"text_config": {"num_attention_heads": True, "hidden_size": 64}}, "heads=True"),
        (
            "config.json",
            {"text_config": {"num_attention_heads": 100, "hidden_size": 64}},
            "64 channels among 100 heads",
        ),
        ("config.json", {"text_config": {"hidden_act": ["gelu"]}}, r"activation \['gelu'\]"),
        (
            "open_clip_config.json",
            {"model_cfg": {"vision_cfg": None, "text_cfg": None, "embed_dim": 1}},
            "no two towers",
        ),
        ("open_clip_config.json", {"text_cfg": {"heads": 0}}, "heads=0"),
        ("open_clip_config.json", {"vision_cfg": {"mlp_ratio": 1e999}}, "mlp_ratio=inf"),
        ("open_clip_config.json", {"vision_cfg": {"mlp_ratio": "4"}}, "mlp_ratio='4'"),
        ("open_clip_config.json", {"vision_cfg": {"width": [128]}}, r"width=\[128\]"),
        ("open_clip_config.json", {"quick_gelu": "false"}, "'false'; true or false was expected"),
        ("preprocessor_config.json", {"image_mean": [float("nan")] * 3}, "three numbers from 0 to 1"),
        ("preprocessor_config.json", {"image_mean": [10**400] * 3}, "three numbers from 0 to 1"),
        ("preprocessor_config.json", {"image_mean": [123.7, 116.8, 103.9]}, "three numbers from 0 to 1"),
        ("preprocessor_config.json", {"image_mean": [True] * 3}, "three numbers from 0 to 1"),
        ("preprocessor_config.json", {"image_std": [float("inf")] * 3}, "three numbers from 1/255 to 1"),
        ("model.safetensors.index.json", DEEP, "no index of split weights"),
        ("model.safetensors.index.json", {"weight_map": {"a": ""}}, "not a file of weights beside it"),
        (
            "model.safetensors.index.json",
            {"weight_map": {"a": "model.safetensors.index.json"}},
            "not a file of weights",
        ),
    ],
)
def test_odd_json_beside_the_weights_is_refused(name: str, content: Any, message: str, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(tiny_tensors(), weights)
    if name == "open_clip_config.json" and "model_cfg" not in content:
        model: dict[str, Any] = {"embed_dim": 32, "vision_cfg": {"width": 128}, "text_cfg": {"width": 64, "heads": 1}}
        for part, value in content.items():
            model[part] = model.get(part, {}) | value if isinstance(value, dict) else value
        content = {"model_cfg": model}
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(WeightsError, match=rf"{re.escape(name)}.*{message}"):
        load_checkpoint(tmp_path / name if "index" in name else weights)


def test_parts_of_split_weights_that_hold_the_same_tensor_are_refused(tmp_path: Path) -> None:
    for part in ("one", "two"):
        save_file({"a": torch.ones(1), part: torch.ones(1)}, tmp_path / f"{part}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "two": "two.safetensors"}}))
    with pytest.raises(WeightsError, match="several parts hold a"):
        load_checkpoint(index)


def test_q_k_and_v_may_be_of_different_float_types_and_their_count_is_told(tmp_path: Path) -> None:
    torch.save(huggingface(Q, Tensor.half), tmp_path / "weights.pt")
    checkpoint = load_checkpoint(tmp_path / "weights.pt")
    assert "float16 converted to float32 (1 of 94 tensors)" in checkpoint.notes
    expected = tiny_tensors()["transformer.resblocks.0.attn.in_proj_weight"]
    expected[:64] = expected[:64].half().float()
    torch.testing.assert_close(
        checkpoint.state_dict["transformer.resblocks.0.attn.in_proj_weight"], expected, rtol=0, atol=0
    )
