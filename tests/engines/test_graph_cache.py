from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import pytest

from longclip_rt.tensorrt.graph_cache import GraphCache


def cache_with_log(limit: int) -> tuple[GraphCache[str], list[str]]:
    log: list[str] = []

    def capture(key: Hashable) -> str:
        log.append(f"capture {key}")
        return f"graph {key}"

    return GraphCache(capture, lambda graph: log.append(f"close {graph}"), limit), log


def test_a_shape_is_captured_at_its_second_run_and_then_reused() -> None:
    cache, log = cache_with_log(2)
    assert [cache.get("a") for _ in range(4)] == [None, "graph a", "graph a", "graph a"]
    assert log == ["capture a"]


def test_the_least_recently_used_graph_goes_before_another_is_captured() -> None:
    cache, log = cache_with_log(2)
    for key in "aabbab" + "c" * 20:  # b was used last before c, and a before b
        cache.get(key)
    assert log == ["capture a", "capture b", "close graph a", "capture c"]
    assert len(cache) == 2
    assert cache.get("a") is None  # to be warmed up again
    cache.clear()
    assert log[-2:] == ["close graph c", "close graph b"] and len(cache) == 0
    assert cache.get("b") is None


def test_more_shapes_than_the_limit_do_not_capture_all_the_time() -> None:
    cache, log = cache_with_log(4)
    rng = np.random.default_rng(0)
    for key in rng.integers(0, 12, 5000):
        cache.get(int(key))
    assert len([line for line in log if line.startswith("capture")]) < 150
    cache, log = cache_with_log(4)
    for phase in range(10):  # and yet a change of traffic is followed
        for _ in range(40):
            for key in range(4):
                cache.get((phase, key))
        assert cache.get((phase, 0)) is not None
    assert len(cache) <= 4


def test_stopping_and_clearing() -> None:
    cache, log = cache_with_log(2)
    for key in "aabb":
        cache.get(key)
    cache.stop()
    assert cache.get("a") == "graph a" and cache.get("c") is cache.get("c") is None
    assert len([line for line in log if line.startswith("capture")]) == 2

    def refuse(graph: str) -> None:
        log.append(f"refuse {graph}")
        raise ValueError(graph)

    refusing = GraphCache(str, refuse, 2)
    for key in "aabb":
        refusing.get(key)
    with pytest.raises(ValueError, match="a"):
        refusing.clear()
    assert log[-2:] == ["refuse b", "refuse a"] and len(refusing) == 0


def test_it_stays_within_its_limit_whatever_shapes_come() -> None:
    cache, log = cache_with_log(3)
    for key in range(1000):
        cache.get(key)
    assert log == [] and len(cache._runs) <= 24
    for key in range(1000):
        for _ in range(30):
            cache.get(key)
        assert len(cache) <= 3
    assert len(log) > 1000
    none, log = cache_with_log(0)
    assert [none.get("a") for _ in range(3)] == [None] * 3 and log == []
