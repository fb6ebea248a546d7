"""PyTorch: the reference that the exported graphs are held against, from the weights that the bundle was made of.

Where those are not at hand any more, it takes them from the bundle's own fp32 graphs.

On a CPU it runs batches as they come. On an NVIDIA GPU it is a fast way without TensorRT: texts are padded to a few
lengths and batches to a few sizes, each of which is captured once as a CUDA graph and then launched as a whole.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from longclip_rt.backends.base import Backend, Float32
from longclip_rt.backends.graph_weights import weights_of
from longclip_rt.bundle.bundle import Bundle
from longclip_rt.errors import BackendError, LongClipError
from longclip_rt.system.extras import require

if TYPE_CHECKING:
    from longclip_rt.weights.checkpoint import Checkpoint

logger = logging.getLogger("longclip_rt")

PRECISIONS = ("fp32", "bf16", "fp16")

SIZES = (1, 8, 32, 64, 256)
"""Rows of the batches that graphs are captured for; others are padded up to the next, larger ones are cut up."""

BUCKETS = (32, 77, 128, 248)
"""Tokens that texts are padded to on a GPU, as far as the model's context goes."""


def padded_size(rows: int) -> int:
    """The least of `SIZES` that holds so many rows."""
    return next(size for size in SIZES if size >= rows)


def pieces(rows: int) -> list[slice]:
    """Where a batch is cut, so that no part is larger than the largest of `SIZES`."""
    return [slice(start, min(start + SIZES[-1], rows)) for start in range(0, rows, SIZES[-1])]


def checkpoint_of(bundle: Bundle) -> Checkpoint:
    """The weights that a bundle names; where they are not at hand, those in its fp32 graphs: the same.

    Raises:
        BackendError: The named weights are others by now, or are neither there nor in the graphs.
        MissingExtraError: PyTorch or onnx is not installed.
    """
    torch: Any = require("torch", "export")
    from longclip_rt.weights.checkpoint import Checkpoint, load_checkpoint

    source = bundle.manifest["source"]
    try:
        checkpoint = load_checkpoint(source["weights"], activation=source["activation"])
    except LongClipError as error:
        logger.info(
            "%s cannot be loaded (%s); torch takes the weights in the bundle's graphs", source["weights"], error
        )
        state = {name: torch.tensor(array) for name, array in weights_of(bundle).items()}
        state["logit_scale"] = torch.zeros(())  # no embedding depends on it
        return Checkpoint(state, bundle.architecture, str(bundle.path), None, bundle.trained)
    if checkpoint.sha256 != source["sha256"]:
        raise BackendError(
            f"{source['weights']} is not what the bundle was exported from: its SHA-256 is "
            f"{checkpoint.sha256}, and the bundle names {source['sha256']}. Export it again, or use --backend auto."
        )
    return checkpoint


@dataclass(frozen=True, eq=False)
class _Static:
    """A tower for one shape: what is copied in, what runs it, and where its outputs are then."""

    given: Any
    run: Callable[[], object]
    outputs: Sequence[Any]


class TorchBackend(Backend):
    """Runs the towers themselves.

    Args:
        bundle: The model.
        precision: `fp32` (without TF32, on a GPU too), `bf16` or `fp16`.
        device: Number of a GPU; None: the CPU.

    Raises:
        BackendError: The weights that the bundle names are others by now, or are neither there nor in its graphs.
        MissingExtraError: PyTorch or open_clip is not installed.
    """

    name = "torch"

    def __init__(self, bundle: Bundle, precision: str, device: int | None = None) -> None:
        super().__init__(bundle, precision)
        self._torch: Any = require("torch", "export")
        self._device = self._torch.device("cpu" if device is None else f"cuda:{device}")
        from longclip_rt.weights.checkpoint import towers_from_checkpoint

        checkpoint = checkpoint_of(bundle)
        dtype = {"fp32": self._torch.float32, "bf16": self._torch.bfloat16, "fp16": self._torch.float16}[precision]
        text, image = towers_from_checkpoint(checkpoint)
        if bundle.pca is not None:
            mode = bundle.manifest["pca"]["mode"]
            text, image = text.with_pca(bundle.pca, mode), image.with_pca(bundle.pca, mode)
        self._towers: dict[str, Any] = {
            "text": text.with_outputs(bundle.outputs("text")).to(self._device, dtype),
            "image": image.with_outputs(bundle.outputs("image")).to(self._device, dtype),
        }
        self._on_gpu = device is not None
        if self._on_gpu:
            self.batch_size = 64
            self.not_apart = "the head is a part of the encoder"
        self._lock = threading.Lock()
        self._static: dict[tuple[str, tuple[int, ...]], _Static] = {}

    @property
    def version(self) -> str:
        """PyTorch's version."""
        return str(self._torch.__version__)

    @property
    def device(self) -> str:
        """The GPU's name and number; or the CPU, by the instructions PyTorch uses on it."""
        if self._on_gpu:
            return f"{self._torch.cuda.get_device_name(self._device)} ({self._device})"
        return f"CPU ({self._torch.backends.cpu.get_cpu_capability()})"

    @property
    def buckets(self) -> tuple[int, ...]:
        """The lengths that texts are padded to on a GPU."""
        context = self.bundle.architecture.context_length
        return (*(bucket for bucket in BUCKETS if bucket < context), context) if self._on_gpu else ()

    def _run(self, tower: str, inputs: NDArray[np.generic], outputs: Sequence[str]) -> list[Float32]:
        names = self.bundle.outputs(tower)
        if self._on_gpu:
            results = [self._run_static(tower, inputs[piece], outputs) for piece in pieces(len(inputs))]
            return [np.concatenate(parts) for parts in zip(*results, strict=True)]
        with self._torch.inference_mode():
            computed = self._towers[tower](self._torch.from_numpy(np.ascontiguousarray(inputs)))
        named = dict(zip(names, computed, strict=True))
        return [named[name].numpy() for name in outputs]

    def timed(self, tower: str, inputs: NDArray[np.generic]) -> dict[str, float]:
        """On a GPU by CUDA events: copy in (filling up to the captured shape included), encoder with head, copy out."""
        if not self._on_gpu:
            return super().timed(tower, inputs)
        events = [self._torch.cuda.Event(enable_timing=True) for _ in range(4)]
        seconds = np.zeros(3)
        for piece in pieces(len(inputs)):
            self._run_static(tower, inputs[piece], self.bundle.outputs(tower)[:1], events)
            seconds += [first.elapsed_time(second) / 1e3 for first, second in itertools.pairwise(events)]
        return dict(zip(("copy in", "encoder", "copy out"), map(float, seconds), strict=True))

    def _run_static(
        self, tower: str, inputs: NDArray[np.generic], outputs: Sequence[str], events: Sequence[Any] = ()
    ) -> list[Float32]:
        """Pads a batch to a size that there is a graph of, and drops what was added. Records events between parts."""
        rows, length = len(inputs), inputs.shape[1]
        shape = (padded_size(rows), *inputs.shape[1:])
        if tower == "text":
            shape = (shape[0], next(bucket for bucket in self.buckets if bucket >= length))
        marks = iter(events)
        with self._lock, self._exact():
            self._mark(marks)
            filled = np.zeros(shape, inputs.dtype)
            filled[tuple(slice(0, size) for size in inputs.shape)] = inputs
            if (tower, shape) not in self._static:
                self._static[tower, shape] = self._captured(tower, filled)
            static = self._static[tower, shape]
            static.given.copy_(self._torch.from_numpy(filled))
            self._mark(marks)
            static.run()
            self._mark(marks)
            named = dict(zip(self.bundle.outputs(tower), static.outputs, strict=True))
            results = [named[name][:rows].float().cpu().numpy() for name in outputs]
            if events:
                self._mark(marks)
                self._torch.cuda.synchronize()
        if tower == "text":  # states of all tokens have as many as were asked for
            results = [each[:, :length] if each.ndim == 3 else each for each in results]
        return results

    @staticmethod
    def _mark(events: Iterator[Any]) -> None:
        if event := next(events, None):
            event.record()

    @contextlib.contextmanager
    def _exact(self) -> Iterator[None]:
        """fp32 is fp32: without the 10-bit products that cuDNN takes for convolutions unless it is told."""
        cudnn, products = self._torch.backends.cudnn, self._torch.backends.cuda.matmul
        before = products.allow_tf32
        with cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            products.allow_tf32 = False
            try:
                with self._torch.inference_mode(), self._torch.cuda.device(self._device):
                    yield
            finally:
                products.allow_tf32 = before

    def _captured(self, tower: str, example: NDArray[np.generic]) -> _Static:
        """The CUDA graph of a tower for one shape, captured after two runs: libraries set up things at first use."""
        torch = self._torch
        given = torch.from_numpy(example).to(self._device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._towers[tower](given)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._towers[tower](given)
        return _Static(given, graph.replay, outputs)

    def close(self) -> None:
        """Lets go of captured graphs; the towers go with the backend."""
        with self._lock:
            self._static.clear()
