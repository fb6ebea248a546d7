from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from longclip_rt import Embedder
from longclip_rt.bundle import bundle as bundles
from longclip_rt.bundle.bundle import (
    bundles_home,
    default_bundle,
    find_bundle,
    known_bundles,
    load_bundle,
    rename_weights,
    write_manifest,
)
from longclip_rt.bundle.manifest import content_hash, write_fields
from longclip_rt.errors import BackendError, BundleError
from longclip_rt.system.files import sha256_of_file


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


def test_a_whole_bundle_is_read(tiny_bundle: Path) -> None:
    bundle = load_bundle(tiny_bundle)
    assert bundle.precisions == ("fp32", "fp16")
    assert bundle.architecture.context_length == 248
    assert bundle.outputs("text")[0] == "text_embeds"
    assert len(bundle.sha256) == 64
    assert set(bundle.manifest["files"]) == {
        "text.onnx", "image.onnx", "text.fp16.onnx", "image.fp16.onnx", "tokenizer.json", "self_check.safetensors",
    }  # fmt: skip


def test_a_changed_byte_is_found_on_first_load(copy: Path) -> None:
    file = copy / "text.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"text\.onnx is damaged"):
        load_bundle(copy)


def test_files_are_hashed_once_and_again_when_they_change(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    real = bundles.sha256_of_file
    monkeypatch.setattr(bundles, "sha256_of_file", lambda path: (hashed.append(path), real(path))[1])
    load_bundle(copy)
    assert len(hashed) == 6
    load_bundle(copy)
    assert len(hashed) == 6
    file = copy / "image.onnx"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)  # the same size, a later date
    with pytest.raises(BundleError, match="damaged"):
        load_bundle(copy)


def test_a_cut_file_is_named_with_both_sizes(copy: Path) -> None:
    file = copy / "image.onnx"
    size = file.stat().st_size
    os.truncate(file, size - 7)
    with pytest.raises(BundleError, match=f"{size - 7} bytes.*{size}"):
        load_bundle(copy, verify=False)


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"lacks tokenizer\.json"):
        load_bundle(copy)


NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99.*pip install -U"),
        ({"format": 1}, "older version.*Export it again"),
        ({"format": "one"}, "no format number"),
        ({"files": {}}, "does not say what it should"),
        ({"files": {"../escape": {"size": 1, "sha256": "0" * 64}}}, "outside the bundle"),
        ({"files": {"text.onnx": {"size": 1, "sha256": "0" * 64}}}, r"lists no tokenizer\.json, image\.onnx"),
        ({"files": {"text.onnx": {"size": -1, "sha256": "0" * 64}}}, "does not say what it should"),
        ({"image": {"size": 24, "mean": [0, 0, 0], "std": [0, 0, 0]}}, "does not say what it should"),
        ({"image": {"size": 24, "mean": [NAN] * 3, "std": [0.3] * 3}}, "does not say what it should"),
        ({"image": {"size": 32, "mean": [0.5] * 3, "std": [0.3] * 3}}, "contradicts itself: image_size"),
        ({"context_length": 77}, "contradicts itself: context_length"),
        ({"outputs": {"text": ["text_embeds"]}}, "does not say what it should"),
        ({"outputs": None}, "does not say what it should"),
        ({"precisions": ["int3"]}, "does not say what it should"),
        ({"architecture": None}, "does not say what it should"),
        ({"architecture": {"image_size": 24}}, "does not say what it should"),
        ({"source": []}, "does not say what it should"),
        ({"pca": {"sha256": "0", "mode": "project"}}, r"lists no pca\.safetensors"),
        ({"name": 7}, "does not say what it should"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused_and_passed_over(
    copy: Path, change: dict[str, object], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Though the hash of its content was made anew."""
    manifest = json.loads((copy / "bundle.json").read_text()) | change
    manifest["content"] = content_hash(manifest)
    (copy / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=message):
        load_bundle(copy)
    shutil.copytree(copy, bundles_home() / "odd")
    assert known_bundles() == [] and "passed over a bundle" in caplog.text


def test_a_manifest_that_was_changed_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / "bundle.json").read_text())
    changed = manifest | {"trained": not manifest["trained"]}
    (copy / "bundle.json").write_text(json.dumps(changed))
    with pytest.raises(BundleError, match="was changed after the export"):
        load_bundle(copy)


@pytest.mark.parametrize("content", ["{", "[" * 100_000, '{"format": 2, "name": ' + "[" * 100_000, "\x00", ""])
def test_what_is_no_json_is_refused(content: str, copy: Path) -> None:
    (copy / "bundle.json").write_text(content)
    with pytest.raises(BundleError, match=r"cannot be read as JSON"):
        load_bundle(copy)


def test_another_models_tokenizer_is_refused_though_the_manifest_names_it(copy: Path) -> None:
    from longclip_rt.model.vocabulary import tokenizer_json

    (copy / "tokenizer.json").write_text(tokenizer_json(248, 4096), encoding="utf-8")
    (copy / "bundle.json").rename(copy / "old.json")
    fields = json.loads((copy / "old.json").read_text())
    (copy / "old.json").unlink()
    write_manifest(copy, {key: value for key, value in fields.items() if key not in ("files", "content", "format")})
    problem = "is another model's: it has 4096 tokens"
    with Embedder.from_bundle(copy, "onnxruntime") as embedder, pytest.raises(BundleError, match=problem):
        embedder.embed_texts(["a cup"])


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_graphs_of_another_model_are_refused_though_the_manifest_names_them(copy: Path, backend: str) -> None:
    shutil.copy(copy / "text.onnx", copy / "image.onnx")
    fields = json.loads((copy / "bundle.json").read_text())
    write_manifest(copy, {key: value for key, value in fields.items() if key not in ("files", "content", "format")})
    with Embedder.from_bundle(copy, backend, "fp32") as embedder, pytest.raises(BackendError, match="not this model's"):
        embedder.embed_images([Image.new("RGB", (30, 30))])


def test_a_folder_without_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="longclip-rt export --out"):
        load_bundle(tmp_path)
    with pytest.raises(BundleError, match="is no directory"):
        load_bundle(tmp_path / "absent")


def test_the_default_is_the_newest_and_can_be_found_by_its_hash(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="longclip-rt export"):
        default_bundle()
    for age, name in enumerate(["new", "old", "older"]):
        directory = shutil.copytree(tiny_bundle, bundles_home() / name)
        stamp = 1_700_000_000 - age
        os.utime(directory / "bundle.json", (stamp, stamp))
    (bundles_home() / "broken").mkdir()
    (bundles_home() / "broken" / "bundle.json").write_text("{}")
    assert [bundle.path.name for bundle in known_bundles()] == ["new", "old", "older"]
    assert default_bundle().path.name == "new"
    assert find_bundle(default_bundle().sha256) == default_bundle().path
    assert find_bundle("0" * 64) is None


def test_a_newest_bundle_that_is_damaged_is_passed_over_whatever_its_size(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, stamp in (("older", 1), ("newer", 2)):
        directory = shutil.copytree(tiny_bundle, bundles_home() / name)
        os.utime(directory / "bundle.json", (stamp, stamp))
    file = bundles_home() / "newer" / "text.onnx"
    content = file.read_bytes()
    for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        caplog.clear()
        file.write_bytes(damaged)
        assert default_bundle().path.name == "older"
        assert "passed over a bundle" in caplog.text and "text.onnx" in caplog.text


def test_the_built_in_model_is_the_last_known(tiny_bundle: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "BUILT_IN", copy)
    assert default_bundle().path == copy
    assert find_bundle(load_bundle(copy).sha256) == copy
    shutil.copytree(tiny_bundle, bundles_home() / "own")
    os.utime(bundles_home() / "own" / "bundle.json", (0, 0))  # however old: exported ones come first
    assert [bundle.path for bundle in known_bundles()] == [bundles_home() / "own", copy]


@pytest.mark.parametrize("cache_is_writable", [True, False])
def test_loading_writes_nothing_into_the_bundle(
    copy: Path, own_cache: Path, cache_is_writable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not cache_is_writable:
        (own_cache / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(own_cache / "file"))  # no folder can be made in it, even by root
    (copy / "README.md").write_text("A model card, which the manifest does not list.")
    for path in (*copy.iterdir(), copy):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in (*copy.iterdir(), copy)}
    for _ in range(2):
        with Embedder.from_bundle(copy) as embedder:
            assert embedder.embed_texts(["a cup"]).shape == (1, embedder.dim)
    assert {path: path.stat().st_mtime_ns for path in (*copy.iterdir(), copy)} == before


def test_weights_are_renamed_without_a_change_of_identity(copy: Path) -> None:
    before = load_bundle(copy)
    after = rename_weights(copy, "tiny.safetensors")
    assert after.manifest["source"] == {**before.manifest["source"], "weights": "tiny.safetensors"}
    assert after.sha256 == before.sha256
    other = {"source": None, "content": None}
    assert {**after.manifest, **other} == {**before.manifest, **other}
    assert load_bundle(copy).manifest == after.manifest
    with pytest.raises(BundleError, match="is no directory"):
        rename_weights(copy / "absent", "x")


def test_the_identity_ignores_dates_and_follows_content(tiny_bundle: Path, copy: Path) -> None:
    manifest = json.loads((copy / "bundle.json").read_text())
    write_fields(copy, manifest | {"created": "another day"})
    assert load_bundle(copy).sha256 == load_bundle(tiny_bundle).sha256
    manifest["files"]["text.onnx"]["sha256"] = "0" * 64
    write_fields(copy, manifest)
    assert load_bundle(copy, verify=False).sha256 != load_bundle(tiny_bundle).sha256


def test_only_files_that_changed_are_hashed_again(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def note(path: Path) -> str:
        hashed.append(path.name)
        return sha256_of_file(path)

    monkeypatch.setattr(bundles, "sha256_of_file", note)
    files = set(load_bundle(copy).manifest["files"])
    assert set(hashed) == files
    hashed.clear()
    load_bundle(copy)
    assert hashed == []
    (copy / "image.onnx").write_bytes((copy / "image.onnx").read_bytes())  # the same content at another time
    load_bundle(copy)
    load_bundle(copy)
    assert hashed == ["image.onnx"]
    shutil.copy(copy / "text.onnx", copy / "another")  # the same content, size and date in another file
    shutil.copystat(copy / "text.onnx", copy / "another")
    (copy / "another").replace(copy / "text.onnx")
    load_bundle(copy)
    assert hashed == ["image.onnx", "text.onnx"]
