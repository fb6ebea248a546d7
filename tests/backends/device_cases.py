"""Tests of the device layer over the imitated driver; `test_device.py` runs them in a process of their own."""

from __future__ import annotations

import ctypes
import json
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Loaded under the name that cuda.core looks for, and before it does.
DRIVER = ctypes.CDLL(os.environ["IMITATED_DRIVER"], mode=ctypes.RTLD_GLOBAL)
DRIVER.imitated_log.restype = ctypes.c_char_p

import imitated_tensorrt as imitated  # noqa: E402
from imitated_tensorrt import FREE, Checked, Engine, TensorInfo, real  # noqa: E402

from longclip_rt.backends.device import Gpu, gpu_errors  # noqa: E402
from longclip_rt.backends.engine_runner import EngineRunner  # noqa: E402
from longclip_rt.backends.head_kernel import KERNELS, HeadFiles, load_head, weights_file  # noqa: E402
from longclip_rt.errors import BackendError  # noqa: E402

LIBRARY = imitated.library({})
DIM, WIDTH = 8, 16


@pytest.fixture(autouse=True)
def empty_log() -> Iterator[None]:
    DRIVER.imitated_log_clear()
    yield
    DRIVER.imitated_fail_allocations(-1)
    DRIVER.imitated_fail_waiting(0)


def log(pattern: str = "") -> list[str]:
    return [line for line in DRIVER.imitated_log().decode().splitlines() if re.search(pattern, line)]


def text_engine(head: bool = False, plugin: bool = False) -> Engine:
    tensors = [
        TensorInfo("input_ids", (FREE, FREE), real.DataType.INT32, is_input=True),
        TensorInfo("text_embeds", (FREE, DIM)),
        TensorInfo("last_hidden_state", (FREE, FREE, WIDTH)),
    ]
    if head:
        tensors.append(TensorInfo("text_head_states", (FREE, WIDTH), real.DataType.HALF))
    if plugin:
        tensors.append(TensorInfo("text_pca", (FREE, 5)))
    return Engine(DRIVER, tensors, [((1, 1), (4, 8)), ((2, 1), (6, 20))])


def image_engine() -> Engine:
    pixels = TensorInfo("pixel_values", (FREE, 3, 4, 4), is_input=True)
    return Engine(DRIVER, [pixels, TensorInfo("image_embeds", (FREE, DIM))], [((1, 3, 4, 4), (5, 3, 4, 4))])


def runner(engine: Engine, tower: str = "text", gpu: int = 0, **more: Any) -> EngineRunner:
    return EngineRunner(LIBRARY, Checked(engine, real.ICudaEngine), Gpu(gpu), tower, **more)


def ids(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 50, (rows, length), dtype=np.int32)


def sums(inputs: np.ndarray) -> np.ndarray:
    flat = inputs.reshape(len(inputs), -1).astype(np.float64)
    return (flat * (np.arange(flat.shape[1]) % 7 + 1)).sum(axis=1)


def expected(inputs: np.ndarray, columns: int = DIM) -> np.ndarray:
    return (sums(inputs)[:, None] + np.arange(columns)).astype(np.float32)


@pytest.mark.parametrize("graphs", [0, 2, 32])
def test_every_size_and_length_gives_its_own_numbers(graphs: int) -> None:
    opened = runner(text_engine(), graphs=graphs)
    for turn in range(3):
        for rows in (1, 2, 4, 5, 6, 7, 13, 30):
            for length in (1, 5, 8, 9, 20):
                batch = ids(rows, length, seed=turn)
                embeds, states = opened.run(batch, ["text_embeds", "last_hidden_state"])
                np.testing.assert_array_equal(embeds, expected(batch))
                assert states.shape == (rows, length, WIDTH) and states.dtype == np.float32
                np.testing.assert_array_equal(states.reshape(rows, -1), expected(batch, length * WIDTH))
    opened.close()


def test_images_too() -> None:
    opened = runner(image_engine(), "image")
    pixels = np.random.default_rng(0).integers(-9, 9, (12, 3, 4, 4)).astype(np.float32)
    for _ in range(3):
        np.testing.assert_array_equal(opened.run(pixels, ["image_embeds"])[0], expected(pixels))
    opened.close()


def test_memory_is_allocated_once_as_computed_and_freed_at_the_end() -> None:
    engine = text_engine()
    opened = runner(engine)
    allocated = log("^allocate")
    sizes = {kind: sum(int(line.split()[2]) for line in allocated if kind in line) for kind in ("device", "pinned")}
    assert sizes["device"] == opened.memory.device + opened.memory.workspace
    assert sizes["pinned"] == opened.memory.pinned
    assert opened.memory.workspace == imitated.WORKSPACE
    # Two slots, two profiles, three tensors, each on both sides; and the workspace.
    assert len(allocated) == 2 * 2 * 3 * 2 + 1
    for rows in range(1, 30):
        for _ in range(3):
            opened.run(ids(rows, 5), ["text_embeds"])
            opened.run(ids(rows, 15), ["text_embeds", "last_hidden_state"])
    assert log("^allocate") == allocated
    assert not log("^free")
    assert len(engine.contexts) > 2
    opened.close()
    opened.close()
    assert len(log("^free")) == len(allocated)
    assert len(log("^destroy stream")) == len(log("^create stream")) == 3
    assert len(log("^destroy graph")) == len(log("^capture graph")) > 0
    assert len(engine.contexts) == 0
    assert DRIVER.imitated_log().decode().rstrip().endswith("destroy stream 0") or log("^destroy stream")
    last_free = max(index for index, line in enumerate(log()) if line == "free")
    assert last_free < min(index for index, line in enumerate(log()) if line.startswith("destroy stream"))


def test_a_graph_is_captured_at_the_second_run_of_a_shape_and_launched_from_then_on() -> None:
    opened = runner(text_engine())
    DRIVER.imitated_log_clear()
    opened.run(ids(3, 5), ["text_embeds"])
    assert len(log("^enqueue compute")) == 2 and not log("graph")  # one for each output
    DRIVER.imitated_log_clear()
    opened.run(ids(3, 5), ["text_embeds"])
    # TensorRT's own warm-up of the new context, then the capture, then the launch.
    kinds = [" ".join(line.split()[:2]) for line in log("compute|graph") if not line.startswith("run")]
    assert kinds == ["enqueue compute"] * 2 + ["capture graph"] + ["capture compute"] * 2 + ["launch graph"]
    for _ in range(5):
        DRIVER.imitated_log_clear()
        batch = ids(3, 7, seed=5)  # another length, the same bucket
        np.testing.assert_array_equal(opened.run(batch, ["text_embeds"])[0], expected(batch))
        assert len(log("^launch graph")) == 1 and not log("^capture") and not log("^enqueue compute")
    opened.close()


def test_graphs_are_bounded() -> None:
    engine = text_engine()
    opened = runner(engine, graphs=3)
    for rows in (1, 2, 3, 4):
        for length in (5, 15):
            for _ in range(3 + 8 * 3):
                batch = ids(rows, length)
                np.testing.assert_array_equal(opened.run(batch, ["text_embeds"])[0], expected(batch))
                assert len(log("^capture graph")) - len(log("^destroy graph")) <= 3
                assert len(engine.contexts) <= 3 + 2
    assert len(log("^destroy graph")) >= 4
    opened.close()


def test_the_next_batch_is_copied_in_before_the_last_one_is_done() -> None:
    opened = runner(text_engine())
    DRIVER.imitated_log_clear()
    batch = ids(12, 5)
    np.testing.assert_array_equal(opened.run(batch, ["text_embeds"])[0], expected(batch))
    lines = log()
    second_in = [i for i, line in enumerate(lines) if line.startswith("enqueue copy")][2]
    first_run = next(i for i, line in enumerate(lines) if line.startswith("run"))
    assert second_in < first_run
    # Copies are on streams of their own, and what they depend on is said to the GPU, not waited for here.
    copies = {line.split()[3] for line in log("^enqueue copy")}
    computes = {line.split()[3] for line in log("^enqueue compute")}
    assert len(copies) == 2 and len(computes) == 1 and not copies & computes
    opened.close()


def test_threads_do_not_mix() -> None:
    opened = runner(text_engine(), graphs=4)
    batches = [ids(1 + seed % 14, 1 + seed % 20, seed) for seed in range(150)]
    with ThreadPoolExecutor(8) as pool:
        for batch, got in zip(batches, pool.map(lambda b: opened.run(b, ["text_embeds"])[0], batches), strict=True):
            np.testing.assert_array_equal(got, expected(batch))
    opened.close()


def test_several_instances_and_devices_in_one_process() -> None:
    many = [runner(text_engine(), gpu=number) for number in (0, 1, 1)]
    batch = ids(6, 5)
    for opened in many * 3:
        np.testing.assert_array_equal(opened.run(batch, ["text_embeds"])[0], expected(batch))
    many[1].close()
    for opened in (many[0], many[2]):
        np.testing.assert_array_equal(opened.run(batch, ["text_embeds"])[0], expected(batch))
        opened.close()
    with pytest.raises(BackendError, match="GPU 2 cannot be used"):
        Gpu(2)


def test_use_after_close_is_an_error_for_every_thread() -> None:
    opened = runner(text_engine())
    opened.close()
    results: list[str] = []

    def use() -> None:
        with pytest.raises(BackendError, match="closed while it was in use") as caught:
            opened.run(ids(2, 5), ["text_embeds"])
        results.append(str(caught.value))

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(results) == 3


def test_a_failed_batch_costs_no_slot_and_names_itself() -> None:
    engine = text_engine()
    opened = runner(engine)
    for _ in range(5):
        engine.refuse = {"run"}
        with pytest.raises(BackendError, match=r"refused a batch .* text engine on GPU 0"):
            opened.run(ids(13, 5), ["text_embeds"])
        engine.refuse = set()
        batch = ids(13, 5)
        np.testing.assert_array_equal(opened.run(batch, ["text_embeds"])[0], expected(batch))
    with pytest.raises(BackendError, match=r"no profile for 2 rows of 21 tokens; it has 1 to 4 rows of up to 8"):
        opened.run(ids(2, 21), ["text_embeds"])
    opened.close()


def test_too_little_memory_is_a_sentence_with_the_need() -> None:
    gpu = Gpu(0)
    for after in (0, 1, 7, 20):
        DRIVER.imitated_log_clear()
        DRIVER.imitated_fail_allocations(after)
        with pytest.raises(BackendError, match=r"needs 0 MiB on GPU 0, cannot be opened: .*OUT_OF_MEMORY.*smaller"):
            EngineRunner(LIBRARY, Checked(text_engine(), real.ICudaEngine), gpu, "text")
        assert len(log("^free")) == len(log("^allocate")) == after  # at once, for whoever opens next
        assert len(log("^destroy stream")) == len(log("^create stream"))
    DRIVER.imitated_fail_allocations(-1)
    DRIVER.imitated_log_clear()
    engine = text_engine()
    engine.refuse = {"context"}
    with pytest.raises(BackendError, match="no execution context"):
        runner(engine)
    assert len(log("^free")) == len(log("^allocate")) > 0


def test_closing_a_gpu_that_failed_lets_go_of_all_and_of_those_who_wait() -> None:
    engine = text_engine()
    opened = runner(engine)
    for _ in range(3):
        opened.run(ids(3, 5), ["text_embeds"])
    DRIVER.imitated_fail_waiting(1)
    with pytest.raises(BackendError, match="GPU 0 failed while the text engine was closed"):
        opened.close()
    opened.close()
    # Page-locked memory waits for its stream before it is let go of, so that stays with the failed context.
    assert len(log("^free")) >= len(log("^allocate device")) and len(log("^destroy stream")) == 3
    assert len(log("^destroy graph")) == len(log("^capture graph")) == 1
    assert len(engine.contexts) <= 1  # the graph's, which the error's traceback still holds
    with pytest.raises(BackendError, match="was closed while it was in use"):
        opened.run(ids(3, 5), ["text_embeds"])


def test_what_a_failed_batch_left_in_flight_ends_before_its_memory_is_let_go_of() -> None:
    opened = runner(text_engine())
    slot = opened._slots[1]
    name = next(iter(slot.pinned))
    opened._gpu.copy(slot.pinned[name].buffer, slot.device[name], 64, slot.stream)
    DRIVER.imitated_log_clear()
    opened.close()
    lines = log()
    assert lines.index("free") > next(index for index, line in enumerate(lines) if line.startswith("run copy"))


def test_closing_that_was_interrupted_can_be_done_again() -> None:
    opened = runner(text_engine())
    slot = opened._free.get()  # a batch is under way

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    get = opened._free.get
    taken = [get()]
    opened._free.get = lambda *arguments, **keywords: taken.pop() if taken else interrupted()  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        opened.close()
    opened._free.get = get  # type: ignore[method-assign]
    assert not log("^free") and not opened.released
    with pytest.raises(BackendError, match="was closed while it was in use"):
        opened.run(ids(2, 5), ["text_embeds"])
    opened._free.put(slot)
    threads = [threading.Thread(target=opened.close) for _ in range(2)]  # at once, and neither waits for ever
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert opened.released and len(log("^free")) == len(log("^allocate"))


@pytest.mark.parametrize(
    "refused", ["capture", "invalidated", *(["capturable"] if imitated.PACKAGE == "tensorrt_rtx" else [])]
)
def test_what_cannot_be_captured_runs_without_a_graph_and_says_so_once(
    refused: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = text_engine()
    engine.refuse = {refused}
    opened = runner(engine)
    for turn in range(6):
        batch = ids(3 + turn % 2, 5, seed=turn)
        np.testing.assert_array_equal(opened.run(batch, ["text_embeds"])[0], expected(batch))
    assert not log("^launch graph")
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    reason = {
        "capture": "TensorRT refused a batch",
        "invalidated": "TensorRT refused a batch",
        "capturable": "would allocate memory or compile",
    }[refused]
    assert "cannot be captured as a CUDA graph, and runs without: " in record.message and reason in record.message
    opened.close()
    assert len(log("^free")) == len(log("^allocate"))


def test_an_engine_of_something_else_is_refused() -> None:
    with pytest.raises(BackendError, match=r"pixel_values is .*FLOAT, and should be .*INT32"):
        runner(image_engine(), "text")
    with pytest.raises(BackendError, match=r"input_ids is .*INT32, and should be .*FLOAT"):
        runner(text_engine(), "image")
    engine = text_engine()
    engine.tensors[1].kind = real.DataType.HALF
    with pytest.raises(BackendError, match=r"text_embeds is .*HALF"):
        runner(engine)
    engine = text_engine()
    engine.tensors[0].name = "tokens"
    with pytest.raises(BackendError, match="not one of a text tower"):
        runner(engine)


def head_folder(folder: Path, k: int = 5, arch: int = 89) -> Path:
    from safetensors.numpy import save_file

    for code in ("few", "many"):
        (folder / f"{code}.cubin").write_bytes(b"machine code")
    codes = [
        {"file": f"{name}.cubin", "arch": arch, "entry": "_pca_head_kernel", "rows": rows, "warps": warps,
         "shared": shared}
        for name, rows, warps, shared in (("few", 16, 4, 22528), ("many", 64, 8, 40960))
    ]  # fmt: skip
    numbers = {"dim": DIM, "k": k, "eps": 1e-5, "floor": 0.25}
    towers = {"text": numbers, "image": numbers}
    (folder / KERNELS).write_text(json.dumps({"format": 1, "pca": "abc", "codes": codes, "towers": towers}))
    arrays = {
        "weight": np.ones((WIDTH, 32), np.float16),
        "bias": np.zeros(32, np.float32),
        "shift": 100 * np.arange(1, 17, dtype=np.float32),
    }
    save_file(arrays, folder / weights_file("text"))
    return folder


def opened_head(folder: Path, arch: int = 89) -> HeadFiles:
    head = load_head(folder, "text", arch)
    assert head is not None
    return head


def test_the_head_runs_after_the_engine_inside_the_graph(tmp_path: Path) -> None:
    head = opened_head(head_folder(tmp_path))
    opened = runner(text_engine(head=True), head=head)
    assert opened.outputs == ("text_embeds", "last_hidden_state", "text_pca")
    batch = ids(3, 5)
    states = (sums(batch) % 1000)[:, None] + np.arange(5)
    for turn in range(4):
        DRIVER.imitated_log_clear()
        reduced, embeds = opened.run(batch, ["text_pca", "text_embeds"])
        np.testing.assert_array_equal(reduced, (states + 100 * np.arange(1, 6)).astype(np.float32))
        np.testing.assert_array_equal(embeds, expected(batch))
        calls = log("kernel")
        assert len(calls) == (1, 2, 0, 0)[turn]
        if turn == 1:
            kinds = [line.split()[0] for line in calls]
            assert kinds == ["enqueue", "capture"]
            assert calls[1].split(" grid ")[1] == (
                "1 block 128 shared 22528 rows 3 width 16 dim 8 k 5 k_start 16 strides 16 32 eps 1e-05 floor 0.25 "
                "hidden 0 0"
            )
    freed = len(log("^free"))
    opened.close()
    assert len(log("^free")) > freed
    assert head.code_for(1).file == "few.cubin" and head.code_for(10_000).file == "many.cubin"


def test_a_head_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    assert load_head(tmp_path, "text", 89) is None
    folder = head_folder(tmp_path)
    with pytest.raises(BackendError, match=r"compiled for sm_89, and this GPU is sm_90.*engine build"):
        load_head(folder, "text", 90)
    with pytest.raises(BackendError, match="does not hand out the states"):
        runner(text_engine(), head=opened_head(folder))
    with pytest.raises(BackendError, match=r"image\.head\.safetensors"):
        load_head(folder, "image", 89)
    about = json.loads((folder / KERNELS).read_text())
    about["codes"][0]["shared"] = 50_000
    (folder / KERNELS).write_text(json.dumps(about))
    with pytest.raises(BackendError, match="48 KiB"):
        load_head(folder, "text", 89)
    (folder / KERNELS).write_text(json.dumps({**about, "format": 2}))
    with pytest.raises(BackendError, match="newer version"):
        load_head(folder, "text", 89)
    (folder / KERNELS).write_text("{")
    with pytest.raises(BackendError, match="cannot be read"):
        load_head(folder, "text", 89)


def test_errors_of_the_program_are_not_dressed_up_as_the_gpus() -> None:
    with pytest.raises(AttributeError), gpu_errors("GPU 0 failed"):
        raise AttributeError("a slip")
    with pytest.raises(BackendError, match=r"^GPU 0 failed: no\. Check with: nvidia-smi$"), gpu_errors("GPU 0 failed"):
        raise RuntimeError("no.")


def test_the_imitation_refuses_what_tensorrt_does_not_have() -> None:
    engine = Checked(text_engine(), real.ICudaEngine)
    with pytest.raises(AttributeError):
        engine.get_binding_name(0)
    with pytest.raises(TypeError):
        engine.get_tensor_name(number=0)
    with pytest.raises(AttributeError):
        LIBRARY.DataType.FP16  # noqa: B018
    assert engine.get_tensor_name(index=0) == "input_ids"
