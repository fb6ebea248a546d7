"""Towers to ONNX: opset 23, one `Attention` operator a block, dynamic batch and text length."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from longclip_rt.backends.base import INPUT_NAMES
from longclip_rt.errors import ExportError
from longclip_rt.model.towers import ImageTower, TextTower
from longclip_rt.system.extras import require

OPSET = 23
"""The first with `Attention`, which runtimes map to their fused kernels."""

_FLOAT = 1  # onnx.TensorProto.FLOAT

LARGEST_INSIDE = 64 << 20
"""Bytes of weights that a graph's file holds itself. Larger ones lie beside it in `<name>.data`: runtimes map that file
rather than parse it, and Protocol Buffers end at 2 GiB."""


def export_tower(tower: TextTower | ImageTower, path: Path) -> None:
    """Writes a tower as an ONNX file with the weights inside, or beside it (`<name>.data`) above `LARGEST_INSIDE`.

    The input is `input_ids` int32 [batch, length] or `pixel_values` float32 [batch, 3, H, W]; the outputs are float32
    and carry the names of `tower.outputs`.

    Args:
        tower: In fp32, or what `half_tower` returned; in eval mode.
        path: The file to write. Not atomic: write into a folder in the making.

    Raises:
        ExportError: PyTorch's exporter failed.
        MissingExtraError: onnx or onnxscript is not installed.
    """
    require("onnx", "export")
    require("onnxscript", "export")
    architecture = tower.architecture
    kind = "text" if isinstance(tower, TextTower) else "image"
    # Two rows, since the exporter would freeze a batch of 1; values are never looked at.
    if kind == "text":
        example = torch.ones(2, 16, dtype=torch.int32)
        dynamic: dict[int, Any] = {
            0: torch.export.Dim("batch"),
            1: torch.export.Dim("length", max=architecture.context_length),
        }
    else:
        example = torch.zeros(2, 3, architecture.image_size, architecture.image_size)
        dynamic = {0: torch.export.Dim("batch")}
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                tower,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=(dynamic,),
                input_names=[INPUT_NAMES[kind]],
                output_names=list(tower.outputs),
                verbose=False,
            )
        except Exception as error:  # the exporter wraps what went wrong in classes of its own, which are not public
            raise ExportError(f"PyTorch {torch.__version__} could not export the {kind} tower: {error}") from error
        assert program is not None
        _tidy(program.model)
        weights = sum(parameter.numel() * parameter.element_size() for parameter in tower.parameters())
        program.save(path, external_data=weights > LARGEST_INSIDE)


def _tidy(model: Any) -> None:
    """States fp32 softmax on every `Attention`, and removes the tracer's notes, which name files of this machine.

    ONNX would otherwise have fp16 graphs compute it in fp16. TensorRT's parser refuses the attribute (tried with
    TensorRT-RTX 1.7, which builds the same graphs without it), so an engine's builder has to take it out again.
    """
    import onnx_ir

    model.producer_name, model.producer_version = "longclip-rt", None
    for node in model.graph:
        node.metadata_props.clear()
        if node.op_type == "Attention":
            node.attributes.add(onnx_ir.AttrInt64("softmax_precision", _FLOAT))
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's chatter (prints, warnings on its own internals, its loggers) from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
