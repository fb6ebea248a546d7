from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import TINY, long_clip_tensors, tiny_checkpoint, tiny_tensors, token_ids
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from longclip_rt.commands.convert import convert
from longclip_rt.errors import OutputError
from longclip_rt.weights.checkpoint import Checkpoint, checkpoint_from_tensors, load_checkpoint, towers_from_checkpoint
from longclip_rt.weights.convert import Format, save_converted

NAMES: dict[Format, str] = {"longclip": "converted.safetensors", "huggingface": "hf", "open_clip": "oc"}
LENGTHS = [2, 20, 21, 77, 78, 248]


def pixels() -> torch.Tensor:
    size = TINY.image_size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def long_clip(quick_gelu: bool = True) -> Checkpoint:
    return checkpoint_from_tensors(
        long_clip_tensors(), "longclip.pt", activation="quick_gelu" if quick_gelu else "gelu"
    )


@torch.no_grad()
def embeddings(checkpoint: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
    text, image = towers_from_checkpoint(checkpoint)
    return text(token_ids(LENGTHS))[0], image(pixels())[0]


@pytest.mark.parametrize("quick_gelu", [True, False])
@torch.no_grad()
def test_transformers_loads_the_folder_and_gives_the_same_vectors(quick_gelu: bool, tmp_path: Path) -> None:
    checkpoint = long_clip(quick_gelu)
    folder = save_converted(checkpoint, tmp_path / "hf", "huggingface")
    model, report = CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    text, image = embeddings(checkpoint)
    theirs = model(input_ids=token_ids(LENGTHS).long(), pixel_values=pixels())
    torch.testing.assert_close(theirs.text_embeds, text, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs.image_embeds, image, rtol=0, atol=1e-5)
    # Its own padding, with 49407, leads to the same.
    padded = model(input_ids=token_ids(LENGTHS, pad=49407).long(), pixel_values=pixels())
    torch.testing.assert_close(padded.text_embeds, text, rtol=0, atol=1e-5)


@pytest.mark.parametrize("quick_gelu", [True, False])
@torch.no_grad()
def test_open_clip_loads_the_folder_and_gives_the_same_vectors(quick_gelu: bool, tmp_path: Path) -> None:
    checkpoint = long_clip(quick_gelu)
    folder = save_converted(checkpoint, tmp_path / "oc", "open_clip")
    model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()
    text, image = embeddings(checkpoint)
    torch.testing.assert_close(model.encode_text(token_ids(LENGTHS), normalize=True), text, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.encode_image(pixels(), normalize=True), image, rtol=0, atol=1e-5)
    assert open_clip.get_tokenizer(f"local-dir:{folder}")(["a cat"]).shape == (1, 248)


def test_long_clips_file_has_both_tables_under_openais_names(tmp_path: Path) -> None:
    checkpoint = long_clip()
    path = save_converted(checkpoint, tmp_path / "longclip.safetensors", "longclip")
    tensors = load_file(path)
    assert tensors.keys() == checkpoint.state_dict.keys() | {"positional_embedding_res"}
    for table in ("positional_embedding", "positional_embedding_res"):
        torch.testing.assert_close(tensors[table], checkpoint.state_dict["positional_embedding"], rtol=0, atol=0)


@pytest.mark.parametrize("format", NAMES)
def test_what_was_written_is_read_back_without_loss(format: Format, tmp_path: Path) -> None:
    changes = {"vision_mlp_width": 251, "vision_head_width": 32, "quick_gelu": False}
    checkpoint = dataclasses.replace(
        tiny_checkpoint(**changes), trained=False, image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6)
    )
    back = load_checkpoint(save_converted(checkpoint, tmp_path / NAMES[format], format))
    assert back.architecture == checkpoint.architecture
    assert back.config == checkpoint.config and not back.trained
    for name, tensor in checkpoint.state_dict.items():
        torch.testing.assert_close(back.state_dict[name], tensor, rtol=0, atol=0)


def test_transformers_tokenizers_and_image_processor_load(tmp_path: Path) -> None:
    checkpoint = dataclasses.replace(long_clip(), image_mean=(0.5, 0.5, 0.5))
    folder = save_converted(checkpoint, tmp_path / "hf", "huggingface")
    reference = open_clip.get_tokenizer("ViT-B-16", context_length=248)
    texts = ["A photo of 2 cats!", "it's  a  LONG  day, isn't it?", "中文 \u00e9\u00e8 \U0001f642", "word " * 400]
    expected = reference(texts).numpy()
    for tokenizer in (AutoTokenizer.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)):
        assert tokenizer.model_max_length == 248
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (49406, 49407, 49407)
        assert len(tokenizer) == 49408
        ids = tokenizer(texts, truncation=True, padding="max_length", return_tensors="np")["input_ids"]
        # The padding differs (49407 against 0); all else must not.
        after_eot = np.cumsum(expected == 49407, axis=1) - (expected == 49407) > 0
        np.testing.assert_array_equal(np.where(after_eot, 0, ids), expected)
        assert (ids[after_eot] == 49407).all()
    processor = CLIPImageProcessor.from_pretrained(folder)
    grey = np.full((40, 30, 3), 255, dtype=np.uint8)
    values = processor(grey, return_tensors="np")["pixel_values"]
    assert values.shape == (1, 3, 24, 24)
    np.testing.assert_allclose(values[0, 0], 0.5 / checkpoint.image_std[0], rtol=1e-5)


@torch.no_grad()
def test_a_cut_vocabulary_goes_with_the_model_to_transformers(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(vocab_size=8192)
    folder = save_converted(checkpoint, tmp_path / "hf", "huggingface")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) == (8192, 8190, 8191)
    batch = tokenizer(["a red ball", "a turquoise hourglass on a ladder"], padding=True, return_tensors="pt")
    theirs = CLIPModel.from_pretrained(folder)(**batch, pixel_values=pixels())
    text, image = towers_from_checkpoint(checkpoint)
    torch.testing.assert_close(theirs.text_embeds, text(batch["input_ids"])[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs.image_embeds, image(pixels())[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("format", ["longclip", "huggingface"])
def test_a_cut_vocabulary_is_read_back(format: Format, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(vocab_size=8192)
    back = load_checkpoint(save_converted(checkpoint, tmp_path / NAMES[format], format))
    assert back.architecture == checkpoint.architecture and back.architecture.vocab_size == 8192


def test_a_cut_vocabulary_is_refused_for_open_clip_whose_tokenizer_knows_the_whole(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"8192 entries .* open_clip's tokenizer .* 49408.*huggingface"):
        save_converted(tiny_checkpoint(vocab_size=8192), tmp_path / "oc", "open_clip")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", NAMES)
def test_nothing_is_overwritten(format: Format, tmp_path: Path) -> None:
    target = tmp_path / NAMES[format]
    target.write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        save_converted(tiny_checkpoint(), target, format)
    assert target.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("format", NAMES)
def test_a_failure_leaves_nothing_behind(format: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OutputError, match="No space left on device"):
        save_converted(tiny_checkpoint(), tmp_path / NAMES[format], format)
    assert list(tmp_path.iterdir()) == []


def test_the_disks_own_error_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"longclip\.safetensors"):
        save_converted(tiny_checkpoint(), Path("/dev/full/longclip.safetensors"), "longclip")


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("weights.pt", "longclip", r"named \*\.safetensors; got the name .*weights\.pt"),
        ("x", "onnx", "no format 'onnx'"),
    ],
)
def test_misnamed_targets_and_formats_are_refused(name: str, format: Format, message: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=message):
        save_converted(tiny_checkpoint(), tmp_path / name, format)


def test_missing_parents_are_made(tmp_path: Path) -> None:
    for format, name in NAMES.items():
        assert save_converted(tiny_checkpoint(), tmp_path / format / "deeper" / name, format).exists()


def test_files_have_the_mode_that_the_user_gives_to_new_files(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    path = save_converted(tiny_checkpoint(), tmp_path / "longclip.safetensors", "longclip")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_command_converts_tells_what_it_did_and_prints_the_path(tmp_path: Path) -> None:
    source, out = tmp_path / "clip.safetensors", tmp_path / "out"
    save_file(tiny_tensors(context_length=77), source)
    arguments = [str(source), "--to", "open_clip", "--out", str(out), "--activation", "gelu"]
    result = CliRunner().invoke(convert, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout == f"{out}\n"
    assert "stretched 77 -> 248 positions (KPS)" in result.stderr
    assert load_checkpoint(out).architecture == dataclasses.replace(TINY, quick_gelu=False)


def test_the_command_needs_a_layout_and_a_target(tmp_path: Path) -> None:
    for arguments in (["weights.pt"], ["weights.pt", "--to", "open_clip"], ["weights.pt", "--to", "x", "--out", "y"]):
        assert CliRunner().invoke(convert, arguments).exit_code == 2


def test_the_header_names_the_frameworks_format(tmp_path: Path) -> None:
    path = save_converted(tiny_checkpoint(), tmp_path / "longclip.safetensors", "longclip")
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
