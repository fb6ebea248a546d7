from __future__ import annotations

from collections.abc import Hashable

from longclip_rt.backends.graph_cache import GraphCache


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
    for key in "aabbabcc":  # b was used last before c, and a before b
        cache.get(key)
    assert log == ["capture a", "capture b", "close graph a", "capture c"]
    assert len(cache) == 2
    assert cache.get("a") is None  # to be warmed up again
    cache.clear()
    assert log[-2:] == ["close graph c", "close graph b"] and len(cache) == 0
    assert cache.get("b") is None


def test_it_stays_within_its_limit_whatever_shapes_come() -> None:
    cache, log = cache_with_log(3)
    for key in range(1000):
        cache.get(key)
    assert log == [] and len(cache._runs) <= 24
    for key in range(1000):
        cache.get(key)
        cache.get(key)
        assert len(cache) <= 3
    none, log = cache_with_log(0)
    assert [none.get("a") for _ in range(3)] == [None] * 3 and log == []
