from __future__ import annotations

import signal

import pytest

from longclip_rt.errors import EngineError
from longclip_rt.export.tensorrt.progress import BuildLog, Fraction, Interruption


def test_phases_within_phases_add_up() -> None:
    fraction = Fraction()
    assert fraction.value == 0
    fraction.start("build", None, 4)
    fraction.step("build", 0)
    assert fraction.value == 0.25
    fraction.start("time", "build", 2)
    fraction.start("cast", "time", 10)
    fraction.step("cast", 4)  # half of the first of two steps of one of four
    assert fraction.value == 0.25 + 0.25 * 0.25
    fraction.step("time", 0)
    fraction.finish("cast")
    assert fraction.value == 0.25 + 0.25 * 0.5
    fraction.finish("time")
    assert fraction.value == 0.25 + 0.25 * 0.5  # not less, though the step it was part of is not reported yet
    fraction.step("build", 3)
    assert fraction.value == 1


def test_more_steps_than_were_told_and_steps_of_unknown_phases_do_no_harm() -> None:
    fraction = Fraction()
    fraction.step("never begun", 3)
    fraction.finish("never begun")
    fraction.start("build", "unknown", 0)
    fraction.step("build", 7)
    assert fraction.value == 1


def test_an_interruption_is_raised_in_the_place_of_a_refusal() -> None:
    interruption = Interruption()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruption.keeping_ctrl_c():
        signal.raise_signal(signal.SIGINT)
        raise EngineError("The library refused the profile.")
    assert signal.getsignal(signal.SIGINT) is before


def test_that_there_is_no_gpu_is_no_error_of_a_build_for_another_machine() -> None:
    noise = "cudaError 35: CUDA driver version is insufficient for CUDA runtime version"
    for here, kept in ((True, [noise, "kOPT values."]), (False, ["kOPT values."])):
        log = BuildLog(here)
        log.note(noise, is_error=True)
        log.note("kOPT values.", is_error=True)
        assert log.errors == kept and log.reason().startswith("the library said: kOPT values")


def test_the_log_keeps_errors_and_the_account_of_memory() -> None:
    log = BuildLog()
    for message in ("Total Activation Memory: 30 bytes", "Total Activation Memory: 50 bytes", "[MemUsage] CPU 3 MiB"):
        log.note(message, is_error=False)
    log.note("Total Weights Memory: 3840 bytes", is_error=False)
    assert (log.activations, log.weights, log.errors) == ([30, 50], 3840, [])
    assert log.reason() == "the library gave no reason"
    log.note("Total Activation Memory: 70 bytes could not be allocated", is_error=True)
    assert log.activations == [30, 50] and "too little memory" in log.reason()
