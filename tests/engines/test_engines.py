from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from longclip_rt.bundle.bundle import Bundle, load_bundle
from longclip_rt.errors import BackendError, EngineError
from longclip_rt.system.machine import CudaDevice
from longclip_rt.tensorrt.engines import (
    ENGINES,
    MANIFEST,
    EngineKey,
    Target,
    engines_of,
    find_engine,
    graph_hashes,
    head_hash,
    import_library,
    plan_name,
    why_not_here,
    write_engine_manifest,
)

TARGET = Target("tensorrt", "11.4.0.106", "NVIDIA L4", 89)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    return load_bundle(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def key_for(bundle: Bundle) -> EngineKey:
    onnx = {tower: bundle.manifest["files"][f"{tower}.fp16.onnx"]["sha256"] for tower in ("text", "image")}
    return EngineKey("tensorrt", "11.4.0.106", "NVIDIA L4", (89,), "fp16", onnx, {"text_buckets": [32, 248]})


def put(bundle: Bundle, key: EngineKey, name: str = "", age: int = 0) -> Path:
    folder = bundle.path / ENGINES / (name or key.name)
    folder.mkdir(parents=True)
    for tower in ("text", "image"):
        (folder / plan_name(tower)).write_bytes(f"{tower} plan".encode())
    write_engine_manifest(folder, key, {"seconds": 4.0})
    os.utime(folder / MANIFEST, (1_000_000 - age, 1_000_000 - age))
    return folder


def test_the_newest_engine_that_fits_is_found_and_read(bundle: Bundle) -> None:
    key = key_for(bundle)
    put(bundle, key, "old", age=50)
    new = put(bundle, key, age=10)
    put(bundle, dataclasses.replace(key, version="10.13"), "newest-of-another-version")
    found = find_engine(bundle, TARGET, "fp16")
    assert found.path == new and found.key == key and found.plan("image") == b"image plan"
    assert key.name.startswith("tensorrt-sm89-")
    load_bundle(bundle.path)  # engines do not make a bundle a damaged one


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"library": "tensorrt-rtx"}, "built for tensorrt-rtx, not tensorrt"),
        ({"version": "11.3.0"}, r"built by version 11\.3\.0, and 11\.4\.0\.106 is installed"),
        ({"archs": (80, 90)}, "built for sm_80, sm_90, and this GPU is sm_89"),
        ({"gpu": "NVIDIA L40S"}, "built on NVIDIA L40S, and this GPU is NVIDIA L4"),
        ({"precision": "fp32"}, "computes in fp32, and fp16 is wanted"),
        ({"onnx": {"text": "0", "image": "1"}}, r"from another text\.fp16\.onnx"),
    ],
)
def test_an_engine_that_does_not_match_is_passed_over_with_the_reason(
    bundle: Bundle, change: dict[str, object], reason: str
) -> None:
    key = dataclasses.replace(key_for(bundle), **change)  # type: ignore[arg-type]
    put(bundle, key)
    with pytest.raises(BackendError, match=rf"no tensorrt engine in fp16.*{key.name}: it .*{reason}.*engine build"):
        find_engine(bundle, TARGET, "fp16")


def test_an_engine_for_every_card_of_an_architecture_needs_no_name(bundle: Bundle) -> None:
    put(bundle, dataclasses.replace(key_for(bundle), gpu="", archs=(75, 89)))
    assert find_engine(bundle, TARGET, "fp16").key.gpu == ""


def test_damage_is_named(bundle: Bundle) -> None:
    folder = put(bundle, key_for(bundle))
    engine = find_engine(bundle, TARGET, "fp16")
    (folder / "text.plan").write_bytes(b"text plam")
    with pytest.raises(BackendError, match=r"text\.plan is damaged.*engine build"):
        engine.plan("text")
    (folder / "text.plan").unlink()
    with pytest.raises(BackendError, match=r"text\.plan cannot be read"):
        engine.plan("text")
    for content, reason in (("{", "double quotes"), ('{"format": 9}', "newer version"), ('{"format": 1}', "key is mi")):
        (folder / MANIFEST).write_text(content)
        assert reason in engines_of(bundle)[1][0]
    with pytest.raises(BackendError, match=r"Passed over: .*key is missing.*engine build"):
        find_engine(bundle, TARGET, "fp16")


DAMAGES = [
    ("key.onnx", None), ("key.onnx", {"text": 3}), ("key.archs", "89"), ("key.archs", [None]), ("key.gpu", None),
    ("key.options", []), ("key.options", {"batches": 7}), ("key.head", None), ("key.precision", True), ("key", []),
    ("towers", []), ("towers.text", None), ("towers.text.weights", "x"), ("towers.text.profiles", {}),
    ("towers.text.profiles", [7]), ("files", None), ("files.text.plan", 7), ("files", {}), ("format", "1"),
    ("files", {"../x": "1"}), ("files", {"": "1"}), ("files", {"..": "1"}), ("files", {"a\0": "1"}),
    ("key.library", "tensorrt-lean"), ("towers.text.profiles", [{"index": 0, "length": 32, "least": 1, "most": 8}]),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), DAMAGES)
def test_a_field_of_another_type_passes_one_engine_over_and_stops_nothing(
    bundle: Bundle, field: str, value: object
) -> None:
    key = key_for(bundle)
    put(bundle, key, "good", age=50)
    folder = put(bundle, key, "bad")
    write_engine_manifest(folder, key, facts())
    about = json.loads((folder / MANIFEST).read_text())
    *path, last = field.split(".", 1) if field.startswith("files") else field.split(".")
    holder = about
    for name in path:
        holder = holder[name]
    holder[last] = value
    (folder / MANIFEST).write_text(json.dumps(about))
    (wrong,) = engines_of(bundle)[1]
    assert wrong.startswith("bad: its engine.json cannot be used (")
    assert wrong.endswith("; build it again with: longclip-rt engine build (and remove this folder if it stays)")
    assert find_engine(bundle, TARGET, "fp16").path.name == "good"


@pytest.mark.parametrize("field", ["key.gpu", "key.head", "towers.text.weights", "files"])
def test_an_older_layout_has_a_remedy(bundle: Bundle, field: str) -> None:
    folder = put(bundle, key_for(bundle))
    write_engine_manifest(folder, key_for(bundle), facts())
    about = json.loads((folder / MANIFEST).read_text())
    *path, last = field.split(".")
    holder = about
    for name in path:
        holder = holder[name]
    del holder[last]
    (folder / MANIFEST).write_text(json.dumps(about))
    with pytest.raises(EngineError, match=rf"{field} is missing\); build it again with: longclip-rt engine build"):
        find_engine(bundle, TARGET, "fp16")
    (folder / MANIFEST).write_text("[" * 100_000)
    assert "nested too deeply" in engines_of(bundle)[1][0]


def test_a_folder_of_engines_that_may_not_be_read_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    put(bundle, key_for(bundle))

    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(EngineError, match=r"Passed over: engines: the folder cannot be read \(.*Permission denied"):
        find_engine(bundle, TARGET, "fp16")


def test_every_file_of_an_engine_counts(bundle: Bundle) -> None:
    folder = bundle.path / ENGINES / "whole"
    folder.mkdir(parents=True)
    (folder / "pca_head.json").write_text("{}")
    (folder / "kernel.cubin").write_bytes(b"code")
    (folder / "timing.cache").write_bytes(b"timings")
    shutil.copytree(folder, put(bundle, key_for(bundle)), dirs_exist_ok=True)
    shutil.rmtree(folder)
    folder = bundle.path / ENGINES / key_for(bundle).name
    write_engine_manifest(folder, key_for(bundle), {})
    engine = find_engine(bundle, TARGET, "fp16")
    engine.check_head()
    assert engine.damage() == "" and len(engine.files) == 5
    (folder / "timing.cache").write_bytes(b"other")
    engine.check_head()
    assert "timing.cache is damaged" in engine.damage()
    (folder / "kernel.cubin").write_bytes(b"\0\0\0\0")
    with pytest.raises(EngineError, match=r"kernel\.cubin is damaged: .*\. Build it again with: longclip-rt engine"):
        engine.check_head()
    (folder / "kernel.cubin").unlink()
    assert "kernel.cubin cannot be read" in engine.damage()
    with pytest.raises(EngineError, match=r"kernel\.cubin cannot be read.*Build it again"):
        engine.check_head()


def test_the_head_that_an_engine_was_built_with_is_part_of_its_key(bundle: Bundle) -> None:
    codes = {"codes": [{"file": "a.cubin"}]}
    (bundle.path / "pca_head.json").write_text(json.dumps(codes))
    names = ["pca_head.json", "a.cubin", *(f"{tower}.head.safetensors" for tower in ("text", "image"))]
    names += [f"{tower}.fp16.plugin.onnx" for tower in ("text", "image")]
    files = {**bundle.manifest["files"], **{name: {"sha256": name} for name in names}}

    def changed(name: str = "") -> Bundle:
        own = {**files, name: {"sha256": "changed"}} if name else files
        return dataclasses.replace(bundle, manifest={**bundle.manifest, "files": own})

    for head, own in (("kernel", names[:4]), ("plugin", names[4:])):
        hashed = head_hash(changed(), head)
        key = dataclasses.replace(key_for(bundle), options={"pca_head": head}, head=hashed)
        assert hashed and key.mismatch(changed(), TARGET, "fp16") == ""
        for name in names:
            reason = "it was built with another PCA head" if name in own else ""
            assert key.mismatch(changed(name), TARGET, "fp16") == reason, name
        assert "another PCA head" in key.mismatch(bundle, TARGET, "fp16")
    assert head_hash(changed(), "operators") == head_hash(changed(), "") == ""
    (bundle.path / "pca_head.json").write_text("[]")
    assert head_hash(changed(), "kernel") == ""


def test_the_advice_builds_for_the_card_that_was_asked_for(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [CudaDevice("NVIDIA A10", 86, 24 << 30), CudaDevice("NVIDIA L4", 89, 24 << 30)]
    monkeypatch.setattr("longclip_rt.tensorrt.engines.cuda_devices", lambda: cards)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def advice(target: Target, precision: str = "fp16") -> str:
        with pytest.raises(EngineError) as caught:
            find_engine(bundle, target, precision)
        return str(caught.value).partition("Build one with: ")[2]

    build = f"longclip-rt engine build {bundle.path} --engine tensorrt"
    assert advice(dataclasses.replace(TARGET, library="tensorrt-rtx")) == f"{build}-rtx --arch sm89"
    assert advice(TARGET) == f"CUDA_VISIBLE_DEVICES=1 {build}"
    assert advice(Target("tensorrt", "11", "NVIDIA A10", 86), "fp32") == f"{build} --precision fp32"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert advice(TARGET) == f"CUDA_VISIBLE_DEVICES=5 {build}"


def test_no_engine_at_all(bundle: Bundle) -> None:
    assert engines_of(bundle) == ([], [])
    with pytest.raises(BackendError, match=r"no tensorrt engine in fp32 for NVIDIA L4 \(sm_89, version 11.*\)\. B"):
        find_engine(bundle, TARGET, "fp32")
    assert json.loads((put(bundle, key_for(bundle)) / MANIFEST).read_text())["seconds"] == 4.0


def facts(memory: int | None = 1000, weights: int | None = 500) -> dict[str, object]:
    profiles = [
        {"index": 0, "length": 32, "least": 1, "most": 8, "memory": 10},
        {"index": 1, "length": 248, "least": 1, "most": 8, "memory": memory},
    ]
    return {"towers": {"text": {"profiles": profiles, "weights": weights}, "image": {"profiles": [], "weights": 1}}}


def test_what_the_builder_noted_is_read_back(bundle: Bundle) -> None:
    folder = put(bundle, key_for(bundle))
    noted = facts()
    noted["towers"]["image"] = noted["towers"]["text"]  # type: ignore[index]
    write_engine_manifest(folder, key_for(bundle), noted)
    engine = find_engine(bundle, TARGET, "fp16")
    assert [(one.index, one.length, one.least, one.most) for one in engine.profiles("text")] == [
        (0, 32, 1, 8),
        (1, 248, 1, 8),
    ]
    assert engine.device_bytes == 2 * (1000 + 500) and engine.damage() == ""
    (folder / "image.plan").write_bytes(b"image plam")
    assert "image.plan is damaged" in engine.damage()


@pytest.mark.parametrize(("memory", "weights"), [(None, 500), (1000, None)])
def test_memory_that_was_not_learnt_is_not_guessed(bundle: Bundle, memory: int | None, weights: int | None) -> None:
    write_engine_manifest(put(bundle, key_for(bundle)), key_for(bundle), facts(memory, weights))
    engine = find_engine(bundle, dataclasses.replace(TARGET, memory=1), "fp16")
    assert engine.device_bytes is None


def test_too_little_memory_passes_an_engine_over(bundle: Bundle) -> None:
    noted = facts(memory=3 << 30)
    noted["towers"].pop("image")  # type: ignore[attr-defined]
    write_engine_manifest(put(bundle, key_for(bundle)), key_for(bundle), noted)
    assert find_engine(bundle, dataclasses.replace(TARGET, memory=4 << 30), "fp16")
    with pytest.raises(EngineError, match=r"it needs 3,072 MiB of GPU memory, and this GPU has 2,048 MiB"):
        find_engine(bundle, dataclasses.replace(TARGET, memory=2 << 30), "fp16")


def test_weights_beside_a_graph_are_part_of_the_key(bundle: Bundle) -> None:
    """Above 2 GB a graph's file holds no weights, and would be the same for others."""
    key = key_for(bundle)
    assert graph_hashes(bundle, "fp16") == key.onnx
    files = {**bundle.manifest["files"], "text.fp16.onnx.data": {"sha256": "1", "size": 1}}
    larger = dataclasses.replace(bundle, manifest={**bundle.manifest, "files": files})
    hashes = graph_hashes(larger, "fp16")
    assert hashes["image"] == key.onnx["image"] and hashes["text"] != key.onnx["text"]
    assert key.mismatch(larger, TARGET, "fp16") == "it was built from another text.fp16.onnx"


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        (None, r"tensorrt_rtx cannot be imported \(.*\)\. Install it with: pip install tensorrt-rtx"),
        (SimpleNamespace(__version__="1.7"), "tensorrt_rtx is there and is empty"),
        (SimpleNamespace(__version__="0.9.1", Builder=1), "tensorrt_rtx 0.9.1 is too old; 1.7 or newer is needed"),
    ],
)
def test_a_library_that_cannot_be_used_says_why(module: object, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    with pytest.raises(EngineError, match=wanted):
        import_library("tensorrt-rtx")


def test_a_missing_library_of_the_library_is_a_sentence_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.11: cannot open shared object file')\n")
    with pytest.raises(EngineError, match=r"libnvinfer\.so\.11: cannot open.*pip install tensorrt$"):
        import_library("tensorrt")


def test_this_machine_is_asked_before_an_engine_is_called_usable(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put(bundle, key_for(bundle))
    engine = find_engine(bundle, TARGET, "fp16")
    cards = [CudaDevice("NVIDIA A10", 86, 24 << 30), CudaDevice("NVIDIA L4", 89, 24 << 30)]
    monkeypatch.setattr("longclip_rt.tensorrt.engines.cuda_devices", lambda: cards)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "cannot be imported" in why_not_here(engine, bundle)
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4.0.106", Builder=1))
    assert why_not_here(engine, bundle) == ""
    cards.pop()
    assert why_not_here(engine, bundle) == "it was built for sm_89, and this GPU is sm_86"
    cards[:] = [CudaDevice("NVIDIA L4", 89, 24 << 30)]
    (folder / "text.plan").write_bytes(b"")
    assert "text.plan is damaged" in why_not_here(engine, bundle)
