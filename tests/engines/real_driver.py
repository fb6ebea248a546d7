"""What stands under the imitated engine on a real GPU: its arithmetic as a small kernel, and the driver as it is.

    python -m pytest --noconftest tests/engines/real_driver_cases.py   # `test_on_gpu.py` runs it so

TensorRT's bindings are not needed: their enumerations are imitated here, and nothing is held against them.
"""

from __future__ import annotations

import ctypes
import enum
from types import SimpleNamespace
from typing import Any

import numpy as np

SOURCE = r"""
extern "C" __global__ void compute(
    void *to, const void *from, int rows, int in_columns, int out_columns, int as_floats, int as_half) {
    int r = blockIdx.x;
    double sum = 0;
    for (int j = 0; j < in_columns; j++) {
        size_t at = (size_t)r * in_columns + j;
        sum += (j % 7 + 1) * (double)(as_floats ? ((const float *)from)[at] : ((const int *)from)[at]);
    }
    for (int c = threadIdx.x; c < out_columns; c += blockDim.x) {
        size_t at = (size_t)r * out_columns + c;
        if (as_half) ((unsigned short *)to)[at] = (unsigned short)((long long)sum % 1000 + c);
        else ((float *)to)[at] = (float)(sum + c);
    }
}
"""


class Driver:
    """As `imitated_driver.c`, for what the imitated engine asks of it."""

    def __init__(self) -> None:
        self._kernels: dict[int, Any] = {}

    def imitated_log(self) -> bytes:
        return b""

    imitated_log_clear = imitated_fail_allocations = imitated_fail_waiting = lambda *_: None

    def cuStreamIsCapturing(self, stream: ctypes.c_void_p, status: Any) -> None:
        from cuda.bindings import driver

        error, found = driver.cuStreamIsCapturing(stream.value)[:2]
        assert int(error) == 0
        status._obj.value = int(found)

    def imitated_compute(self, stream: ctypes.c_void_p, to: Any, source: Any, *numbers: int) -> None:
        from cuda.bindings import driver

        arguments = [to, source, *(ctypes.c_int(number) for number in numbers)]
        addresses = np.array([ctypes.addressof(each) for each in arguments], np.uint64)
        (status,) = driver.cuLaunchKernel(
            self._kernel(), numbers[0], 1, 1, 64, 1, 1, 0, stream.value, int(addresses.ctypes.data), 0
        )
        assert int(status) == 0, status

    def _kernel(self) -> Any:
        from cuda.core import Device, Program, ProgramOptions

        device = Device()
        if device.device_id not in self._kernels:
            options = ProgramOptions(arch=f"sm_{device.arch}")
            code = Program(SOURCE, "c++", options).compile("cubin")
            self._kernels[device.device_id] = code, code.get_kernel("compute")
        return int(self._kernels[device.device_id][1].handle)


class DataType(enum.Enum):
    """As TensorRT's."""

    FLOAT, HALF, INT32 = range(3)


BINDINGS = SimpleNamespace(
    __name__="tensorrt",
    DataType=DataType,
    TensorIOMode=enum.Enum("TensorIOMode", ["INPUT", "OUTPUT"]),
    ExecutionContextAllocationStrategy=enum.Enum("Strategy", ["USER_MANAGED"]),
    ILogger=object,
    Builder=None,
    Dims=tuple,
    Runtime=None,
    ICudaEngine=None,
    IExecutionContext=None,
)
