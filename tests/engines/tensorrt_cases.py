"""Tests of the TensorRT backend over the imitated driver; `test_device.py` runs them in a process of their own."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import imitated_tensorrt as imitated
import numpy as np
import pytest
from imitated_engines import DIM, DRIVER, empty_log, expected, head_folder, ids, image_engine, log, sums, text_engine

from longclip_rt.bundle.bundle import Bundle
from longclip_rt.errors import BackendError
from longclip_rt.model.architecture import Architecture
from longclip_rt.tensorrt.backend import TensorrtBackend, TensorrtRtxBackend
from longclip_rt.tensorrt.engines import EngineKey, write_engine_manifest

__all__ = ["empty_log"]

KIND = TensorrtRtxBackend if imitated.PACKAGE == "tensorrt_rtx" else TensorrtBackend

ARCHITECTURE = Architecture(
    image_size=4, patch_size=2, vision_width=64, vision_layers=1, text_width=64, text_layers=1, embed_dim=DIM,
    context_length=20,
)  # fmt: skip


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle with an engine whose plans the imitated library knows; its vectors are not of length 1."""
    plans = {
        b"text plan": text_engine, b"image plan": image_engine, b"head plan": lambda: text_engine(head=True),
        b"plugin plan": lambda: text_engine(plugin=True),
    }  # fmt: skip
    library = imitated.library(plans)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, imitated.PACKAGE, library)
    files = {f"{tower}.fp16.onnx": {"sha256": tower, "size": 0} for tower in ("text", "image")}
    outputs = {"text": ["text_embeds", "last_hidden_state", "text_pca"], "image": ["image_embeds"]}
    made = Bundle(
        tmp_path, {"name": "none", "architecture": ARCHITECTURE.to_dict(), "outputs": outputs, "files": files}
    )
    put_engine(made, b"text plan")
    return made


def put_engine(bundle: Bundle, text: bytes, head: bool = False, **changes: Any) -> Path:
    key = EngineKey(KIND.name, imitated.VERSION, "Imitated GPU", (89,), "fp16", {"text": "text", "image": "image"})
    key = dataclasses.replace(key, **changes)
    folder = bundle.path / "engines" / key.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.plan").write_bytes(text)
    (folder / "image.plan").write_bytes(b"image plan")
    if head:
        head_folder(folder)
    write_engine_manifest(folder, key, {})
    return folder


def test_the_backend_finds_its_engine_and_runs_it(bundle: Bundle) -> None:
    backend = KIND(bundle, "fp16", 1)
    assert (backend.version, backend.device) == (imitated.VERSION, "Imitated GPU")
    assert not log("^allocate")  # nothing is loaded before it is needed
    assert backend.buckets == (8, 20) and backend.fused_pca == ""
    for _ in range(2):
        batch = ids(9, 7)
        np.testing.assert_array_equal(backend.run("text", batch)[0], expected(batch))
        np.testing.assert_array_equal(backend.run("text", batch.astype(np.int64))[0], expected(batch))  # type: ignore[arg-type]
        pixels = np.random.default_rng(0).integers(-9, 9, (6, 3, 4, 4)).astype(np.float32)
        strided = pixels.transpose(0, 1, 3, 2)
        np.testing.assert_array_equal(backend.run("image", strided)[0], expected(strided))
        backend.close()  # and the next turn opens it again
        backend.close()
        assert len(log("^free")) == len(log("^allocate"))
    with pytest.raises(BackendError, match=r"must be \[batch, 1 to 20\]"):
        backend.run("text", ids(2, 21))
    with pytest.raises(BackendError, match=r"engine has no output text_pca; it has text_embeds, last_hidden_state"):
        backend.run("text", ids(2, 5), ["text_pca"])
    backend.close()


def test_the_self_check_is_to_try_both_ends_of_every_profile_and_both_slots(bundle: Bundle) -> None:
    backend = KIND(bundle, "fp16")
    assert backend.corners("text") == [
        ("profile 0, 1 to 4 rows of up to 8 tokens", 8, 1),
        ("profile 0, 1 to 4 rows of up to 8 tokens", 8, 4),
        ("profile 1, 2 to 6 rows of up to 20 tokens", 20, 2),
        ("profile 1, 2 to 6 rows of up to 20 tokens", 20, 6),
        ("two batches of profile 1, 2 to 6 rows of up to 20 tokens", 20, 7),
    ]
    assert [(length, rows) for _, length, rows in backend.corners("image")] == [(None, 1), (None, 5), (None, 6)]
    backend.close()


def test_threads_may_use_and_close_the_backend_at_once(bundle: Bundle) -> None:
    backend = KIND(bundle, "fp16")
    stop = threading.Event()
    wrong: list[BaseException] = []

    def use(seed: int) -> int:
        done = 0
        while not stop.is_set():
            batch = ids(1 + seed % 7, 1 + seed % 20, seed)
            try:
                np.testing.assert_array_equal(backend.run("text", batch)[0], expected(batch))
                done += 1
            except BackendError as error:
                assert "closed while it was in use" in str(error)
            except BaseException as error:
                wrong.append(error)
                raise
        return done

    with ThreadPoolExecutor(6) as pool:
        users = [pool.submit(use, seed) for seed in range(6)]
        for _ in range(20):
            time.sleep(0.02)
            backend.close()
        stop.set()
        assert all(user.result(20) > 0 for user in users) and not wrong
    backend.close()
    assert len(log("^free")) == len(log("^allocate"))


def test_no_engine_a_damaged_plan_and_an_unreadable_one(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BackendError, match=rf"no {KIND.name} engine in fp32 for Imitated GPU.*computes in fp16"):
        KIND(bundle, "fp32")
    folder = put_engine(bundle, b"plan of another version")
    with pytest.raises(BackendError, match=r"cannot load .*text\.plan: the library said: the plan is not what"):
        KIND(bundle, "fp16").run("text", ids(2, 5))
    assert "TensorRT: the plan is not what it should be" in caplog.text
    (folder / "text.plan").write_bytes(b"text plan")
    with pytest.raises(BackendError, match="damaged"):
        KIND(bundle, "fp16").run("text", ids(2, 5))


def test_an_error_of_before_is_not_taken_for_the_reason(bundle: Bundle) -> None:
    put_engine(bundle, b"plan of another version")
    backend = KIND(bundle, "fp16")
    backend._logger.log(imitated.real.ILogger.Severity.ERROR, "Out of memory")
    with pytest.raises(BackendError, match="the library said: the plan is not what"):
        backend.run("text", ids(2, 5))


def test_closing_gives_the_memory_back_even_where_one_tower_fails(bundle: Bundle) -> None:
    backend = KIND(bundle, "fp16")
    backend.prepare()
    DRIVER.imitated_fail_waiting(1)
    with pytest.raises(BackendError, match="failed while the text engine was closed"):
        backend.close()
    DRIVER.imitated_fail_waiting(0)
    assert len(log("^destroy stream")) == 6 and len(log("^destroy pool")) == 1
    backend.run("text", ids(2, 5))
    backend.close()
    assert len(log("^destroy pool")) == 2


def test_without_the_library_a_sentence_says_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match=r"package tensorrt cannot be imported.*pip install tensorrt"):
        TensorrtBackend(bundle, "fp16")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendError, match=r"pip install tensorrt-rtx"):
        TensorrtRtxBackend(bundle, "fp16")


def test_the_plugin_in_the_engine_gives_the_pca(bundle: Bundle) -> None:
    put_engine(bundle, b"plugin plan", options={"pca_head": "plugin"})
    made = Bundle(bundle.path, {**bundle.manifest, "pca": {"sha256": "def"}})
    backend = KIND(made, "fp16")
    assert backend.fused_pca == "def"
    batch = ids(9, 7)
    np.testing.assert_array_equal(backend.run("text", batch, ["text_pca"])[0], expected(batch, 5))
    backend.close()


def test_the_head_beside_the_engine_gives_the_pca(bundle: Bundle) -> None:
    folder = put_engine(bundle, b"head plan", head=True)
    backend = KIND(bundle, "fp16")
    assert backend.fused_pca == "abc"
    batch = ids(9, 7)
    reduced = backend.run("text", batch, ["text_pca"])[0]
    states = (sums(batch) % 1000)[:, None] + np.arange(5)
    np.testing.assert_array_equal(reduced, (states + 100 * np.arange(1, 6)).astype(np.float32))
    backend.close()
    for name in ("few.cubin", "pca_head.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(b"other machine code")
        for use in (lambda: backend.fused_pca, lambda: backend.run("text", batch)):
            with pytest.raises(BackendError, match=rf"{name} is damaged.*engine build"):
                use()
        (folder / name).write_bytes(content)
    (folder / "pca_head.json").unlink()
    with pytest.raises(BackendError, match=r"pca_head\.json cannot be read"):
        backend.run("text", batch)


if imitated.PACKAGE == "tensorrt_rtx":

    def test_kernels_that_fit_all_shapes_are_shared_and_kept(
        bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        backend = KIND(bundle, "fp16")
        batch = ids(4, 7)
        for _ in range(3):
            np.testing.assert_array_equal(backend.run("text", batch)[0], expected(batch))
        created = backend._runner("text")._engine.imitation.created
        assert created == ["NONE"] * 3  # two profiles, and the graph of the shape that came again
        file = tmp_path / "cache/longclip-rt/tensorrt-rtx" / backend.engine.path.name / "text.Imitated-GPU.kernels"
        assert not file.exists()
        backend.close()
        assert file.read_bytes() == b"NONE" * 3 and [each.name for each in file.parent.iterdir()] == [file.name]
        backend.run("text", batch)  # opened again, it begins with them
        backend.close()
        assert file.read_bytes() == b"NONE" * 5
        file.write_bytes(b"other driver")
        backend.run("text", batch)
        backend.close()
        assert file.read_bytes() == b"NONE" * 2 and "is of another GPU, driver or version" in caplog.text
        for in_the_way, said in (("folder", "compiled before cannot be read"), ("file", "compiled are not kept")):
            shutil.rmtree(file.parent.parent)
            if in_the_way == "folder":
                file.mkdir(parents=True)
                (file / "x").touch()
            else:
                file.parent.parent.write_text("")
            np.testing.assert_array_equal(backend.run("text", batch)[0], expected(batch))
            backend.close()
            assert said in caplog.text
