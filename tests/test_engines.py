from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from longclip_rt.bundle import Bundle, load_bundle
from longclip_rt.engines import (
    ENGINES,
    MANIFEST,
    EngineKey,
    Target,
    engines_of,
    find_engine,
    plan_name,
    write_engine_manifest,
)
from longclip_rt.errors import BackendError

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
    for content, reason in (("{", "cannot be read"), ('{"format": 9}', "newer version"), ('{"format": 1}', "'key'")):
        (folder / MANIFEST).write_text(content)
        assert reason in engines_of(bundle)[1][0]
    with pytest.raises(BackendError, match=r"Passed over: .*'key'"):
        find_engine(bundle, TARGET, "fp16")


def test_no_engine_at_all(bundle: Bundle) -> None:
    assert engines_of(bundle) == ([], [])
    with pytest.raises(BackendError, match=r"no tensorrt engine in fp32 for NVIDIA L4 \(sm_89, version 11.*\)\. B"):
        find_engine(bundle, TARGET, "fp32")
    assert json.loads((put(bundle, key_for(bundle)) / MANIFEST).read_text())["seconds"] == 4.0
