from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from longclip_rt.choices import ARCHITECTURES
from longclip_rt.commands import kernels as command
from longclip_rt.errors import KernelError, OutputError
from longclip_rt.kernels import aot
from longclip_rt.kernels.aot import Compiled, compile_kernels, failed_gates, variants


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_configuration_compiles_for_every_architecture_and_passes_the_gates(arch: int) -> None:
    chosen = [entry for entry in variants(("fp16", "fp32")) if entry.variant == "one-tile"]
    named = {(entry.kernel, entry.config.name) for entry in variants()}
    assert {(entry.kernel, entry.config.name) for entry in chosen} == named
    compiled = compile_kernels([arch], chosen)
    assert [failure for entry in compiled for failure in failed_gates(entry)] == []
    for entry in compiled:
        assert bool(entry.tensor_cores) == (entry.dtype == "fp16") and 16 <= entry.registers <= 255
        assert entry.cubin.startswith(b"\x7fELF") and entry.entry == f"_{entry.kernel}_kernel"
    # Large tiles must use the warp-group instructions of the architectures that have them.
    many = {entry.tensor_cores.split()[0] for entry in compiled if entry.config == "half_many"}
    assert many == {{90: "HGMMA", 100: "UTCHMMA"}.get(arch, "HMMA")}


def test_bfloat16_and_the_other_forms_compile_too() -> None:
    chosen = [entry for entry in variants(("bf16",)) if entry.variant != "one-tile"]
    compiled = compile_kernels([80], chosen)
    assert {entry.variant for entry in compiled} == {"embedding-too"}
    assert [failure for entry in compiled for failure in failed_gates(entry)] == []


def test_a_kernel_that_spills_is_found() -> None:
    """A tile whose sums alone need 256 registers a thread: the gate reads that from the machine code."""
    variant = next(variants(("fp16",)))
    wide = dataclasses.replace(variant.config, name="too_wide", rows=128, columns=256, warps=4)
    (compiled,) = compile_kernels([80], [dataclasses.replace(variant, config=wide)])
    assert compiled.spilled > 0
    assert any("spills" in failure for failure in failed_gates(compiled))


def fine(**changes: object) -> Compiled:
    entry = Compiled("pca_head", "one-tile", "half_few", "fp16", 86, 100, 0, 50_000, "HMMA 32", 4, "f", b"cubin")
    return dataclasses.replace(entry, **changes)  # type: ignore[arg-type]


def test_the_gates() -> None:
    assert failed_gates(fine()) == []
    assert failed_gates(fine(spilled=8)) == [
        "pca_head.one-tile.half_few.fp16.sm_86 spills 8 bytes of registers a thread"
    ]
    assert "no tensor cores" in failed_gates(fine(tensor_cores=""))[0]
    assert failed_gates(fine(tensor_cores="", dtype="fp32")) == []
    assert "110000 bytes of shared memory" in failed_gates(fine(shared=110_000))[0]
    assert failed_gates(fine(shared=110_000, arch=80)) == []


def test_the_command_prints_and_stores_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [next(variants(("fp16",)))]
    monkeypatch.setattr(aot, "variants", lambda: few)
    arguments = ["compile", "--arch", "80,90", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(command.kernels, arguments)
    assert result.exit_code == 0, result.output
    for word in ("registers", "spilled", "shared", "tensor_cores", "HMMA"):
        assert word in result.stdout
    stored = json.loads((tmp_path / "out" / "kernels.json").read_text())
    assert [entry["arch"] for entry in stored["kernels"]] == [80, 90]
    for entry in stored["kernels"]:
        assert (tmp_path / "out" / entry["file"]).read_bytes().startswith(b"\x7fELF")
    again = CliRunner().invoke(command.kernels, arguments)
    assert isinstance(again.exception, OutputError)


def test_a_failed_gate_is_exit_status_1_after_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from longclip_rt.cli import main

    monkeypatch.setattr(aot, "compile_kernels", lambda *given: [fine(spilled=8)])
    with pytest.raises(SystemExit) as caught:
        main(["kernels", "compile", "--arch", "86", "--out", str(tmp_path / "out")])
    assert caught.value.code == 1
    captured = capsys.readouterr()
    assert "1 checks failed: pca_head.one-tile.half_few.fp16.sm_86 spills 8 bytes" in captured.err
    assert "registers" in captured.out and (tmp_path / "out" / "kernels.json").exists()


def test_unknown_architectures_are_refused() -> None:
    for value in ("70", "x", "", "80,,90"):
        assert CliRunner().invoke(command.kernels, ["compile", "--arch", value]).exit_code == 2
    with pytest.raises(KernelError, match="no architecture 70 here; there are 80, 86"):
        compile_kernels([70, 80])


def test_interpreted_kernels_are_not_compiled() -> None:
    script = (
        "from longclip_rt.errors import KernelError\n"
        "from longclip_rt.kernels.aot import compile_variant, variants\n"
        "try: compile_variant(next(variants()), 80)\n"
        "except KernelError as error: print(error)\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = [sys.executable, "-c", script]
    result = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert "TRITON_INTERPRET is set" in result.stdout


def test_without_a_gpu_a_launch_says_what_to_do() -> None:
    import torch
    from kernel_cases import Case, rows

    from longclip_rt.kernels.pca_head import head_weights, pca_head

    head = head_weights(*Case.seeded(16, 8, 4).parts(), dtype=torch.float16)
    with pytest.raises(KernelError, match=r"runs on an NVIDIA GPU; the rows are on cpu.*TRITON_INTERPRET=1"):
        pca_head(rows(2, 16, torch.float16), head)
