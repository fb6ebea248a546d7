"""Which library builds, and for which cards: real TensorRT-RTX, and cards that are not there."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from longclip_rt.choices import EVERY
from longclip_rt.errors import EngineError
from longclip_rt.export.tensorrt.build import choose_builders
from longclip_rt.system.machine import CudaDevice

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not to be had for this system")


def test_what_cannot_be_built_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr("longclip_rt.export.tensorrt.builders.cuda_devices", lambda: [])
    with pytest.raises(EngineError, match=r"tensorrt: .*be imported.*pip install tensorrt\. tensorrt-rtx: .*--arch"):
        choose_builders()
    with pytest.raises(EngineError, match=r"does not build for sm_90; it builds for sm75, .*sm121"):
        choose_builders("tensorrt-rtx", (90, 89))
    chosen = choose_builders("auto", (89, 120))
    assert (chosen.backend, chosen.archs, chosen.here) == ("tensorrt-rtx", (89, 120), ())
    assert "pip install tensorrt" in chosen.passed_over
    with pytest.raises(EngineError, match="no library 'cuda'"):
        choose_builders("cuda")


def test_the_card_that_is_here_is_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "longclip_rt.export.tensorrt.builders.cuda_devices", lambda: [CudaDevice("RTX 4090", 89, 24 << 30)]
    )
    chosen = choose_builders("tensorrt-rtx")
    assert (chosen.archs, chosen.here, chosen.gpu) == ((89,), (89,), "")
    assert choose_builders("tensorrt-rtx", (75, 89)).here == (89,)


def test_every_card_that_is_here_is_built_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cards = [CudaDevice(f"card {arch}", arch, 24 << 30) for arch in (86, 89, 89)]
    monkeypatch.setattr("longclip_rt.export.tensorrt.builders.cuda_devices", lambda: cards)
    chosen = choose_builders("tensorrt-rtx")
    assert (chosen.archs, chosen.here) == ((86, 89), (86,))  # plans are tried on the first card alone
    cards[1] = CudaDevice("H100", 90, 80 << 30)
    assert choose_builders("tensorrt-rtx").archs == (86, 89)
    assert "a GPU of this machine gets no engine: tensorrt_rtx" in caplog.text
    assert "does not build for sm_90; it builds for" in caplog.text
    del cards[0], cards[1]
    with pytest.raises(EngineError, match="does not build for sm_90"):
        choose_builders("tensorrt-rtx")


def test_all_architectures_are_not_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT builds for the card that is here alone."""
    cards = [CudaDevice("RTX 4090", 89, 24 << 30)]
    monkeypatch.setattr("longclip_rt.export.tensorrt.builders.cuda_devices", lambda: cards)
    library = SimpleNamespace(__version__="11.4", __name__="tensorrt", Builder=1)
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    assert choose_builders().backend == "tensorrt" and choose_builders("tensorrt", EVERY).archs == (89,)
    chosen = choose_builders("auto", EVERY)
    assert chosen.backend == "tensorrt-rtx" and chosen.archs == tuple(
        sorted(int(name[2:]) for name in trt.ComputeCapability.__members__ if name.startswith("SM"))
    )
    assert "the GPU that it runs on alone, and every architecture was asked for" in chosen.passed_over
