"""Tests of what goes wrong over the imitated driver; `test_device.py` runs them in a process of their own."""

from __future__ import annotations

import threading
from typing import Any

import imitated_tensorrt as imitated
import numpy as np
import pytest
from imitated_engines import (
    DRIVER,
    LIBRARY,
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
from longclip_rt.tensorrt.device import Gpu
from longclip_rt.tensorrt.runner import EngineRunner

__all__ = ["empty_log"]


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


def test_a_driver_that_is_too_old_is_said_with_the_one_that_is_needed() -> None:
    DRIVER.imitated_driver_version(12080)
    try:
        with pytest.raises(BackendError, match=r"takes CUDA 12\.8 at most, and CUDA 13 is needed: install driver 580"):
            Gpu(0)
    finally:
        DRIVER.imitated_driver_version(13000)


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
