from __future__ import annotations

import pytest
import torch

from longclip_rt.kernels import launch
from longclip_rt.kernels.launch import KernelConfig, bucket, chosen_config, within_int32

CONFIGS = (KernelConfig("few", 16, 64, 32, 4, 2), KernelConfig("many", 64, 64, 32, 8, 2))


def test_the_fastest_configuration_is_timed_once_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def do_bench(run: object, warmup: int, rep: int) -> float:
        run()  # type: ignore[operator]
        return {"few": 2.0, "many": 1.0}[timed[-1]]

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    monkeypatch.setattr(launch, "_fastest", {})
    for _ in range(2):
        chosen = chosen_config(CONFIGS, None, lambda config: timed.append(config.name), ("kernel", "cuda:0", 64))
        assert chosen.name == "many" and timed == ["few", "many"]
    # Without a device to time on, in the interpreter, and with nothing to run, nothing is timed.
    assert chosen_config(CONFIGS, None, lambda config: timed.append("x"), ("kernel", None, 64)).name == "few"
    assert chosen_config(CONFIGS, "many", lambda config: timed.append("x"), ("kernel", None, 64)).name == "many"
    assert timed == ["few", "many"]


def test_a_row_that_is_spread_too_far_for_32_bits_is_copied() -> None:
    rows = torch.empty(4, 5, dtype=torch.float16)
    assert within_int32(rows) is rows
    far = torch.empty(1, dtype=torch.float16, device="meta").expand(2**31).as_strided((2, 3), (1, 2**30))
    assert within_int32(far).stride() == (3, 1)


@pytest.mark.parametrize(("rows", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (1024, 1024), (1025, 2048)])
def test_numbers_of_rows_share_buckets(rows: int, power: int) -> None:
    assert bucket(rows) == power
