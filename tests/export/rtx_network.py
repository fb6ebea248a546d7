"""A graph as a network of the real TensorRT-RTX, for tests on machines without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longclip_rt.export.tensorrt.network import network_from_graph
from longclip_rt.export.tensorrt.progress import BuildLog, logger_for

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not to be had for this system")


def parsed(graph: bytes, path: Path = Path("a graph")) -> tuple[Any, ...]:
    """The network, with what must live as long."""
    log = BuildLog()
    logger = logger_for(trt, log)
    builder = trt.Builder(logger)
    return (*network_from_graph(trt, builder, logger, log, graph, path), builder, logger)
