"""An imitation of TensorRT's runtime over the imitated driver, held to the real library's classes.

Whatever is asked of an imitated object must exist in the real bindings under that name, and take such arguments; so a
method that TensorRT does not have, or a keyword that it does not know, fails here as it would on a GPU.
"""

from __future__ import annotations

import ctypes
import importlib
import inspect
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from trt_signatures import signatures

real: Any
if "IMITATED_LIBRARY" in os.environ:
    # `tensorrt_bindings`, or `tensorrt_rtx`, whose classes are the same where they are used.
    real = importlib.import_module(os.environ["IMITATED_LIBRARY"])
else:
    from real_driver import BINDINGS as real
PACKAGE = "tensorrt_rtx" if real.__name__ == "tensorrt_rtx" else "tensorrt"
VERSION = {"tensorrt": "11.4.0", "tensorrt_rtx": "1.7.1"}[PACKAGE]

WORKSPACE = 5000
FREE = -1


def callables(function: Any) -> list[inspect.Signature]:
    """What a function of the bindings takes, for Python to hold arguments to."""
    kind, required = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    return [
        inspect.Signature([
            inspect.Parameter(name, kind, default=None if optional else required)
            for name, optional in zip(known.names, known.optional, strict=True)
        ])
        for known in signatures(function.__doc__, function.__name__)
    ]  # fmt: skip


class Checked:
    """An imitated object that can do only what objects of the real class can."""

    def __init__(self, imitation: Any, real_class: type | None) -> None:
        self.__dict__.update(imitation=imitation, real_class=real_class)

    def __getattr__(self, name: str) -> Any:
        if self.real_class is None:
            return getattr(self.imitation, name)
        member = inspect.getattr_static(self.real_class, name)  # AttributeError: TensorRT has no such thing
        value = getattr(self.imitation, name)
        if not callable(value):
            assert isinstance(member, property), f"{name} is a method in TensorRT"
            return value

        def call(*arguments: Any, **keywords: Any) -> Any:
            known = callables(getattr(self.real_class, name))
            assert known, f"no signature of {name} was found"
            for signature in known:
                try:
                    signature.bind(self, *arguments, **keywords)
                except TypeError:
                    continue
                return value(*arguments, **keywords)
            raise TypeError(f"{name} takes {known}; got {arguments} and {keywords}")

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        member = inspect.getattr_static(self.real_class, name)
        assert isinstance(member, property) and member.fset, f"{name} cannot be set in TensorRT"
        setattr(self.imitation, name, value)


@dataclass
class TensorInfo:
    """An input or output of the imitated engine."""

    name: str
    shape: tuple[int, ...]
    kind: Any = real.DataType.FLOAT
    is_input: bool = False


@dataclass
class Engine:
    """An engine whose outputs are sums over the input; see `imitated_driver.c`."""

    driver: Any
    tensors: list[TensorInfo]
    profiles: list[tuple[tuple[int, ...], tuple[int, ...]]]  # least and most shapes of the input
    refuse: set[str] = field(default_factory=set)
    created: list[str] = field(default_factory=list)  # how TensorRT-RTX's contexts compile
    contexts: weakref.WeakSet[Context] = field(default_factory=weakref.WeakSet)

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def _tensor(self, name: str) -> TensorInfo:
        return next(tensor for tensor in self.tensors if tensor.name == name)

    def get_tensor_name(self, index: int) -> str:
        return self.tensors[index].name

    def get_tensor_dtype(self, name: str) -> Any:
        return self._tensor(name).kind

    def get_tensor_mode(self, name: str) -> Any:
        return real.TensorIOMode.INPUT if self._tensor(name).is_input else real.TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> Any:
        return real.Dims(self._tensor(name).shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        least, most = self.profiles[profile_index]
        return [real.Dims(least), real.Dims(most), real.Dims(most)]

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return WORKSPACE - profile_index

    def create_runtime_config(self) -> Checked:
        return Checked(RuntimeConfig(self), real.IRuntimeConfig)

    def create_execution_context(self, strategy: Any) -> Checked | None:
        if isinstance(strategy, Checked):
            strategy = strategy.imitation.settled()
        assert strategy == real.ExecutionContextAllocationStrategy.USER_MANAGED
        if "context" in self.refuse:
            return None
        context = Context(self)
        self.contexts.add(context)
        return Checked(context, real.IExecutionContext)


@dataclass
class RuntimeConfig:
    """What TensorRT-RTX creates contexts with; the engine notes how."""

    engine: Engine
    strategy: Any = None
    cache: Any = None
    dynamic_shapes_kernel_specialization_strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Checked:
        return Checked(RuntimeCache(self.engine), real.IRuntimeCache)

    def set_runtime_cache(self, cache: Checked) -> bool:
        self.cache = cache.imitation
        return "cache" not in self.engine.refuse

    def settled(self) -> Any:
        """The allocation's strategy; contexts leave a kernel in the cache."""
        how = self.dynamic_shapes_kernel_specialization_strategy.name
        self.engine.created.append(how)
        if self.cache is not None:
            self.cache.content += how.encode()
        return self.strategy


@dataclass
class RuntimeCache:
    """Compiled kernels, which are the names of strategies here."""

    engine: Engine
    content: bytes = b""

    def deserialize(self, blob: bytes) -> bool:
        self.content = blob
        return not blob.startswith(b"other")

    def reset(self) -> bool:
        self.content = b""
        return True

    def serialize(self) -> bytes:
        return self.content


class Context:
    """An execution context that refuses what TensorRT refuses."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.memory = 0
        self.profile: int | None = None
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}
        self.settled = False

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0 and size >= WORKSPACE
        self.memory = memory

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.profile = profile_index
        return 0 <= profile_index < len(self.engine.profiles) and stream_handle > 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert isinstance(shape, tuple) and self.profile is not None
        least, most = self.engine.profiles[self.profile]
        self.shape, self.settled = shape, False
        return all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return any(tensor.name == name for tensor in self.engine.tensors) and memory % 256 == 0

    def is_stream_capturable(self, stream: int) -> bool:
        return self.settled and stream > 0 and "capturable" not in self.engine.refuse

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine, status = self.engine, ctypes.c_int()
        engine.driver.cuStreamIsCapturing(ctypes.c_void_p(stream_handle), ctypes.byref(status))
        complete = self.memory and self.shape and set(self.addresses) == {tensor.name for tensor in engine.tensors}
        refused = "run" in engine.refuse or (status.value and {"capture", "invalidated"} & engine.refuse)
        if status.value and "invalidated" in engine.refuse:
            engine.driver.imitated_invalidate(ctypes.c_void_p(stream_handle))
        if not complete or (status.value and not self.settled) or refused:
            return False
        self.settled = True
        given = next(tensor for tensor in engine.tensors if tensor.is_input)
        rows, columns = self.shape[0], 1
        for size in self.shape[1:]:
            columns *= size
        for tensor in engine.tensors:
            if not tensor.is_input:
                per_row = 1
                for size in tensor.shape[1:]:
                    per_row *= self.shape[1] if size == FREE else size
                engine.driver.imitated_compute(
                    ctypes.c_void_p(stream_handle), ctypes.c_size_t(self.addresses[tensor.name]),
                    ctypes.c_size_t(self.addresses[given.name]), rows, columns, per_row,
                    int(given.kind == real.DataType.FLOAT), int(tensor.kind == real.DataType.HALF),
                )  # fmt: skip
        return True


def library(engines: dict[bytes, Callable[[], Engine]]) -> SimpleNamespace:
    """What stands for the imported package: its real enumerations, and a runtime that knows some plans."""

    class Runtime:
        def __init__(self, logger: Any) -> None:
            assert isinstance(logger, real.ILogger)
            self.logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Checked | None:
            if serialized_engine in engines:
                return Checked(engines[serialized_engine](), real.ICudaEngine)
            self.logger.log(real.ILogger.Severity.ERROR, "the plan is not what it should be")
            return None

    names: tuple[str, ...] = ("Builder", "DataType", "ExecutionContextAllocationStrategy", "ILogger", "TensorIOMode")
    if PACKAGE == "tensorrt_rtx":
        names += ("DynamicShapesKernelSpecializationStrategy",)
    return SimpleNamespace(
        **{name: getattr(real, name) for name in names},
        __name__=PACKAGE,
        __version__=VERSION,
        Runtime=lambda logger: Checked(Runtime(logger), real.Runtime),
    )
