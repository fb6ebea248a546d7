"""Compiles every kernel for named GPUs on a machine without one, and reads from the machine code what became of it."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longclip_rt.choices import ARCHITECTURES
from longclip_rt.errors import KernelError
from longclip_rt.kernels import pca_head
from longclip_rt.kernels.launch import KernelConfig, interpreted
from longclip_rt.system.files import directory_in_the_making

# What a program may ask for, in bytes.
_SHARED_LIMITS = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# Ampere, Ada and desktop Blackwell; Hopper; data centre Blackwell.
_TENSOR_CORES = re.compile(r"\b(HMMA|HGMMA|UTCHMMA)\b")
_LOCAL_MEMORY = re.compile(r"\b(STL|LDL)\b")

# Triton parses a kernel's source, and CPython 3.11 counts the depth of all threads' syntax trees in one place: two at
# once end in "AST constructor recursion depth mismatch".
_COMPILING = threading.Lock()


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel.

    Attributes:
        kernel: Its name.
        variant: What is fixed at compile time, in words.
        dtype: `fp16`, `bf16` or `fp32`: of its input and weights.
        config: How it cuts its work.
        constants: Compile-time arguments, without those of the configuration.
    """

    kernel: str
    variant: str
    dtype: str
    config: KernelConfig
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        """For files and messages."""
        return f"{self.kernel}.{self.variant}.{self.config.name}.{self.dtype}"


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a variant for one architecture.

    Attributes:
        kernel: As in `Variant`, and so the next three.
        variant: What is fixed.
        config: Name of the configuration.
        dtype: Of input and weights.
        arch: Compute capability times ten.
        registers: A thread's.
        spilled: Bytes of a thread's registers kept in memory.
        shared: Bytes of shared memory of a program.
        tensor_cores: Matrix instructions in the machine code, such as `HGMMA 8`; empty where there are none.
        warps: Of a program.
        entry: The function's name in the cubin.
        cubin: The machine code.
        ptx: What the machine code was assembled from; its entry shows the parameters.
        scratch: Bytes of memory that a launch must hand it beside its arguments.
    """

    kernel: str
    variant: str
    config: str
    dtype: str
    arch: int
    registers: int
    spilled: int
    shared: int
    tensor_cores: str
    warps: int
    entry: str
    cubin: bytes
    ptx: str = ""
    scratch: int = 0

    @property
    def name(self) -> str:
        """For files and messages."""
        return f"{self.kernel}.{self.variant}.{self.config}.{self.dtype}.sm_{self.arch}"

    def row(self) -> dict[str, Any]:
        """The table's columns."""
        fields = asdict(self)
        for hidden in ("warps", "entry", "cubin", "ptx", "scratch"):
            del fields[hidden]
        return fields


def variants(dtypes: Iterable[str] = ("fp16", "bf16", "fp32")) -> Iterator[Variant]:
    """Every kernel in every configuration; each in the two forms that differ most."""
    for dtype in dtypes:
        half = dtype != "fp32"
        common = {"WIDE": dtype != "fp16", "WIDE_DOT": False, "NORMALIZE": True}
        for config in pca_head.HALF_CONFIGS if half else pca_head.SINGLE_CONFIGS:
            for embedding in (False, True):
                constants = {**common, "WITH_EMBEDDING": embedding, "ONE_TILE": not embedding}
                form = "embedding-too" if embedding else "one-tile"
                yield Variant("pca_head", form, dtype, config, constants)


def compile_variant(variant: Variant, arch: int) -> Compiled:
    """Compiles one variant for one architecture, and disassembles it.

    Raises:
        KernelError: Triton cannot compile it, or was told to interpret.
    """
    kernel = {"pca_head": pca_head._pca_head_kernel}[variant.kernel]
    if interpreted(kernel):
        raise KernelError("TRITON_INTERPRET is set, so Triton interprets the kernels. Unset it to compile them.")
    config = variant.config
    constants = {**variant.constants, "BLOCK_B": config.rows, "BLOCK_N": config.columns, "BLOCK_W": config.inner}
    constants["stride_col"] = 1
    names = list(kernel.arg_names)
    signature = {name: _type(name, variant.dtype, constants) for name in names}
    # What every launch with sizes that are multiples of 16 lets Triton assume; rows and K need not be.
    aligned = [name for name in names if name not in constants and name not in _FREE and name not in ("eps", "floor")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    try:
        with _COMPILING:
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # Triton's errors, ptxas's and LLVM's share no narrower class
        raise KernelError(f"{variant.name} does not compile for sm_{arch}: {error}") from error
    registers, spilled, tensor_cores = _inspected(compiled.asm["cubin"])
    return Compiled(
        variant.kernel,
        variant.variant,
        config.name,
        variant.dtype,
        arch,
        registers,
        spilled,
        compiled.metadata.shared,
        tensor_cores,
        config.warps,
        compiled.metadata.name,
        compiled.asm["cubin"],
        compiled.asm["ptx"],
        compiled.metadata.global_scratch_size + compiled.metadata.profile_scratch_size,
    )


_FREE = {"total_rows", "k"}


def _type(name: str, dtype: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in ("pooled", "weight"):
        return f"*{dtype}"
    if name in ("bias", "shift", "embedding", "reduced"):
        return "*fp32"
    return "fp32" if name in ("eps", "floor") else "i32"


def _inspected(cubin: bytes) -> tuple[int, int, str]:
    """Registers, spilled bytes, and tensor-core instructions of a cubin."""
    program = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage, code = (
            subprocess.run([program, flag, str(file)], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    counts: dict[str, int] = {}
    for name in _TENSOR_CORES.findall(code.replace(".", " ")):
        counts[name] = counts.get(name, 0) + 1
    spilled = found["STACK"] + found["LOCAL"]
    if _LOCAL_MEMORY.search(code) and not spilled:
        spilled = 4
    return found["REG"], spilled, ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def failed_gates(compiled: Compiled) -> list[str]:
    """What a compiled kernel must not be: spilled, without tensor cores in half precision, or too large to launch."""
    failures = []
    if compiled.spilled:
        failures.append(f"{compiled.name} spills {compiled.spilled} bytes of registers a thread")
    if compiled.dtype != "fp32" and not compiled.tensor_cores:
        failures.append(f"{compiled.name} uses no tensor cores")
    if compiled.shared > _SHARED_LIMITS.get(compiled.arch, 99 << 10):
        failures.append(f"{compiled.name} needs {compiled.shared} bytes of shared memory")
    return failures


def compile_kernels(
    architectures: Sequence[int],
    chosen: Sequence[Variant] | None = None,
    advance: Callable[[str], None] = lambda name: None,
) -> list[Compiled]:
    """Compiles variants for architectures, two at a time.

    Args:
        architectures: Out of `ARCHITECTURES`.
        chosen: What to compile; None: all of `variants()`.
        advance: Called with a name as each is done.

    Raises:
        KernelError: An architecture is unknown, or a variant does not compile.
    """
    if unknown := [str(arch) for arch in architectures if arch not in ARCHITECTURES]:
        raise KernelError(
            f"There is no architecture {', '.join(unknown)} here; there are {', '.join(map(str, ARCHITECTURES))}."
        )
    jobs = [(variant, arch) for arch in architectures for variant in (chosen or tuple(variants()))]

    def one(job: tuple[Variant, int]) -> Compiled:
        compiled = compile_variant(*job)
        advance(compiled.name)
        return compiled

    # Much of the time is spent in cuobjdump, a program that a second thread can wait for.
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, jobs))


def save_compiled(compiled: Sequence[Compiled], out: Path) -> None:
    """Writes the cubins and `kernels.json`: the table, and what a launch needs to know of each cubin.

    Raises:
        OutputError: The folder exists or cannot be written.
    """
    with directory_in_the_making(out) as staging:
        for entry in compiled:
            (staging / f"{entry.name}.cubin").write_bytes(entry.cubin)
        kernels = [
            {**entry.row(), "file": f"{entry.name}.cubin", "entry": entry.entry, "warps": entry.warps}
            for entry in compiled
        ]
        about = {"triton": triton.__version__, "kernels": kernels}
        (staging / "kernels.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
