"""Tests of the device layer over the imitated driver; `test_device.py` runs them in a process of their own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import imitated_tensorrt as imitated
import numpy as np
import pytest
from imitated_engines import (
    DRIVER,
    LIBRARY,
    WIDTH,
    empty_log,
    expected,
    ids,
    image_engine,
    log,
    runner,
    text_engine,
)  # fmt: skip
from imitated_tensorrt import Checked, real

from longclip_rt.errors import BackendError
from longclip_rt.tensorrt.device import Gpu, gpu_errors

__all__ = ["empty_log"]


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
