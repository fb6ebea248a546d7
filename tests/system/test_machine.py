from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from trt_stubs import compile_library

# A driver that knows two cards, the second of which fails; or none.
DRIVER = """
#include <stdlib.h>
#include <string.h>
int cuInit(unsigned flags) { return getenv("NO_CARDS") ? 100 : 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int number) { *device = 40 + number; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "NVIDIA L4", size); return device != 40; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 24ul << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 8 : 9; return 0; }
"""
SCRIPT = "from longclip_rt.system.machine import cuda_devices; print(cuda_devices())"


@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("cc"), reason="needs Linux and a compiler")
def test_cards_are_those_that_the_driver_shows(tmp_path: Path) -> None:
    compile_library(tmp_path, "libcuda.so.1", DRIVER)

    def found(**environment: str) -> str:
        path = {"LD_LIBRARY_PATH": str(tmp_path)}
        command = [sys.executable, "-c", SCRIPT]
        return subprocess.run(
            command, env=os.environ | path | environment, check=True, capture_output=True, text=True
        ).stdout.strip()

    assert found() == f"[CudaDevice(name='NVIDIA L4', arch=89, memory={24 << 30})]"
    assert found(NO_CARDS="1") == "[]"
