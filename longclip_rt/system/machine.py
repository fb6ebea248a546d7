"""What this machine has: its processor, its graphics cards, and which libraries are installed in which version."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# What decides which CPU kernels run: bf16 and int8 products, vectors of 256 and 512 bits.
_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "bf16")

PACKAGES = (
    "longclip-rt", "numpy", "Pillow", "tokenizers", "ftfy", "pyarrow", "openvino", "onnxruntime", "onnxruntime-gpu",
    "torch", "open_clip_torch", "onnx", "onnxscript", "transformers", "tensorrt", "tensorrt_rtx", "cuda-core",
)  # fmt: skip
"""Distributions whose versions matter when vectors or speeds are compared."""


def cpu_name() -> str:
    """The processor's name, as the system gives it."""
    for line in _cpuinfo():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Those of the processor's features that decide which kernels run; empty where the system does not list them."""
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            flags = set(line.partition(":")[2].split())
            return [flag for flag in _CPU_FLAGS if flag in flags]
    return []


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int | None:
    """The machine's memory in bytes, or None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def gpus() -> list[str]:
    """NVIDIA cards as `nvidia-smi` lists them: name, memory, driver version; without it, what CUDA tells of them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [f"{device.name}, {device.memory >> 20} MiB" for device in cuda_devices()]
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in result.stdout.splitlines() if line.strip()]


@dataclass(frozen=True)
class CudaDevice:
    """An NVIDIA card as CUDA sees it.

    Attributes:
        name: Such as `NVIDIA L4`.
        arch: Compute capability times ten.
        memory: Its memory in bytes.
    """

    name: str
    arch: int
    memory: int


def cuda_devices() -> list[CudaDevice]:
    """The cards that this process may use, in CUDA's own order; empty where there is none, or no driver.

    It asks the driver rather than `nvidia-smi`, which knows neither that order nor CUDA_VISIBLE_DEVICES.
    """
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    devices = []
    for number in range(count.value):
        handle, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
        statuses = [
            driver.cuDeviceGet(ctypes.byref(handle), number),
            driver.cuDeviceGetName(name, len(name), handle),
            driver.cuDeviceTotalMem_v2(ctypes.byref(memory), handle),
            driver.cuDeviceGetAttribute(ctypes.byref(major), 75, handle),  # compute capability, major and minor
            driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, handle),
        ]
        if not any(statuses):
            devices.append(CudaDevice(name.value.decode(), 10 * major.value + minor.value, memory.value))
    return devices


def package_versions() -> dict[str, str | None]:
    """The version of each of `PACKAGES`, None where it is not installed. Imports nothing."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
