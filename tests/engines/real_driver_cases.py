"""Cases of the imitated engine that hold on a real GPU too: copies, slots, events, capture and closing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from device_cases import (
    test_every_size_and_length_gives_its_own_numbers,
    test_images_too,
    test_threads_do_not_mix,
)
from imitated_engines import expected, ids, runner, text_engine
from trouble_cases import test_use_after_close_is_an_error_for_every_thread

from longclip_rt.errors import BackendError

__all__ = [
    "test_every_size_and_length_gives_its_own_numbers",
    "test_images_too",
    "test_threads_do_not_mix",
    "test_use_after_close_is_an_error_for_every_thread",
]


def test_graphs_are_captured_and_launched() -> None:
    opened = runner(text_engine())
    for turn in range(6):
        batch = ids(3, 7, seed=turn)
        np.testing.assert_array_equal(opened.run(batch, ["text_embeds"])[0], expected(batch))
    assert len(opened._graphs) == 1
    opened.close()


@pytest.mark.parametrize("trouble", ["capture", "invalidated"])
def test_what_cannot_be_captured_runs_without_a_graph(trouble: str) -> None:
    engine = text_engine()
    if trouble == "capture":
        engine.refuse.add("capture")
    else:
        engine.driver = WaitsMeanwhile(engine.driver)
    opened = runner(engine)
    for turn in range(4):
        batch = ids(3, 5, seed=turn)
        np.testing.assert_array_equal(opened.run(batch, ["text_embeds"])[0], expected(batch))
    assert len(opened._graphs) == 0
    opened.close()


class WaitsMeanwhile:
    """Invalidates a capture as a library would that waits for the stream."""

    def __init__(self, driver: object) -> None:
        self._driver = driver

    def __getattr__(self, name: str) -> object:
        return getattr(self._driver, name)

    def imitated_compute(self, stream: object, *rest: object) -> None:
        import ctypes

        from cuda.bindings import driver

        self._driver.imitated_compute(stream, *rest)  # type: ignore[attr-defined]
        status = ctypes.c_int()
        self._driver.cuStreamIsCapturing(stream, ctypes.byref(status))  # type: ignore[attr-defined]
        if status.value:
            driver.cuStreamSynchronize(stream.value)  # type: ignore[attr-defined]


def test_a_failed_batch_costs_no_slot() -> None:
    engine = text_engine()
    opened = runner(engine)
    engine.refuse.add("run")
    for _ in range(5):
        with pytest.raises(BackendError):
            opened.run(ids(3, 5), ["text_embeds"])
    engine.refuse.clear()
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: opened.run(ids(3, 5), ["text_embeds"])[0], range(20)):
            np.testing.assert_array_equal(got, expected(ids(3, 5)))
    opened.close()


def test_memory_comes_back() -> None:
    from cuda.bindings import driver

    def free() -> int:
        return int(driver.cuMemGetInfo()[1])

    def use() -> None:
        opened = runner(text_engine())
        for rows in range(1, 12):
            for _ in range(3):
                opened.run(ids(rows, 5), ["text_embeds"])
        opened.close()
        opened._gpu.release()

    use()
    before = free()
    for _ in range(5):
        use()
    assert before - free() < 8 << 20
