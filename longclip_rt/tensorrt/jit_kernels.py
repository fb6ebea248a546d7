"""The kernels that TensorRT-RTX compiles where an engine runs: which ones, and what is kept of them.

TensorRT has none of this: it compiles when it builds.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger("longclip_rt")


class JitKernels:
    """How TensorRT-RTX's contexts of one engine compile their kernels; all share what was compiled.

    Only kernels that fit all of a profile, not those for one shape that TensorRT-RTX would compile in the background: a
    batch must not get other vectors when it comes again, and neither memory nor this cache may grow with the shapes
    seen.

    Args:
        library: `tensorrt_rtx`, imported.
        engine: A deserialised `ICudaEngine`.
        file: Where compiled kernels are kept for the next start; they fit this engine, GPU and driver alone.
    """

    def __init__(self, library: Any, engine: Any, file: Path) -> None:
        self._library, self._engine, self._file = library, engine, file
        self._cache = engine.create_runtime_config().create_runtime_cache()
        self._kept = b""
        if self._cache is not None:
            self._read()

    def _read(self) -> None:
        try:
            content = self._file.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            logger.info("the kernels that TensorRT-RTX compiled before cannot be read: %s", error)
            return
        if self._cache.deserialize(content):
            self._kept = content
        else:
            logger.info("%s is of another GPU, driver or version, and is written anew", self._file)
            self._cache.reset()

    def config(self) -> Any:
        """What a context is created with."""
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._library.ExecutionContextAllocationStrategy.USER_MANAGED)
        strategies = self._library.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.NONE
        if self._cache is not None and not config.set_runtime_cache(self._cache):
            logger.debug("TensorRT-RTX refused a cache for its kernels, and compiles them for each context")
        return config

    def save(self) -> None:
        """Keeps the kernels for the next start, if there are new ones; that they cannot be kept is logged."""
        content = None if self._cache is None else self._cache.serialize()
        if content is None or bytes(content) == self._kept:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._file.with_name(f".{self._file.name}.{os.getpid()}")  # processes may close at once
            temporary.write_bytes(content)
            temporary.replace(self._file)
        except OSError as error:
            logger.info("the kernels that TensorRT-RTX compiled are not kept: %s", error)
        else:
            self._kept = bytes(content)
