"""PyTorch on an NVIDIA GPU: for machines without TensorRT. Fixed shapes, each captured as a CUDA graph."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longclip_rt.backends.base import EMBEDDINGS, Backend, Float32
from longclip_rt.backends.graph_weights import weights_of
from longclip_rt.bundle.bundle import Bundle
from longclip_rt.errors import BackendError
from longclip_rt.system.extras import require

PRECISIONS = ("fp16", "bf16", "fp32")
ROWS = (1, 8, 32, 64, 128)
"""Sizes of a batch: rows are filled up to the next one, and more rows than the last are several batches."""

LENGTHS = (32, 77, 128)
"""Tokens that texts are padded to, and the model's context length."""


@dataclass(frozen=True, eq=False)
class _Captured:
    graph: Any
    inputs: Any
    output: Any


class TorchCudaBackend(Backend):
    """Runs the towers on one GPU, from the weights in the bundle's own fp32 graphs.

    Args:
        bundle: The model.
        precision: One of `PRECISIONS`.
        device: The GPU's number.

    Raises:
        BackendError: There is no such GPU, or the graphs do not hold the weights.
        MissingExtraError: torch, open_clip or onnx is not installed.
    """

    name = "torch-cuda"
    batch_size = 64
    concurrency = 2  # one on the GPU, and one that copies in or out

    def __init__(self, bundle: Bundle, precision: str, device: int = 0) -> None:
        super().__init__(bundle, precision)
        self._torch = torch = require("torch", "export")
        if device >= torch.cuda.device_count():
            raise BackendError(
                f"PyTorch {torch.__version__} sees {torch.cuda.device_count()} NVIDIA GPUs, and GPU {device} was asked "
                "for. Check with: nvidia-smi; and that this PyTorch is one with CUDA."
            )
        self._place = torch.device("cuda", device)
        self._name = str(torch.cuda.get_device_name(device))
        self._towers: dict[str, Any] = {}
        self._graphs: dict[tuple[str, int, int], _Captured] = {}
        self._launch = threading.Lock()
        self._stream: Any = None

    @property
    def version(self) -> str:
        """PyTorch's version."""
        return str(self._torch.__version__)

    @property
    def device(self) -> str:
        """The GPU's name."""
        return self._name

    @property
    def buckets(self) -> tuple[int, ...]:
        """Lengths that text batches are padded to."""
        context = self.bundle.architecture.context_length
        return (*(length for length in LENGTHS if length < context), context)

    def corners(self, tower: str) -> list[tuple[str, int | None, int]]:
        """Every shape that is captured, so that opening captures and checks them all; and one batch of two pieces."""
        lengths = self.buckets if tower == "text" else (None,)
        shapes = [(length, rows) for length in lengths for rows in ROWS]
        shapes.append((lengths[-1], ROWS[-1] + 1))
        return [(f"{rows} rows{f' of {length} tokens' if length else ''}", length, rows) for length, rows in shapes]

    def _run(self, tower: str, inputs: NDArray[np.generic], outputs: Sequence[str]) -> list[Float32]:
        parts = [
            self._piece(tower, inputs[start : start + ROWS[-1]], list(outputs))
            for start in range(0, len(inputs), ROWS[-1])
        ]
        return parts[0] if len(parts) == 1 else [np.concatenate(each) for each in zip(*parts, strict=True)]

    def _piece(self, tower: str, inputs: NDArray[np.generic], outputs: list[str]) -> list[Float32]:
        torch, count, length = self._torch, len(inputs), inputs.shape[1]
        filled = self._filled(tower, inputs)
        try:
            with self._launch, torch.inference_mode(), torch.cuda.device(self._place), full_fp32(torch):
                self._open()
                with torch.cuda.stream(self._stream):
                    results = self._results(tower, filled, outputs)
                    hosts = []
                    for name, result in zip(outputs, results, strict=True):
                        cut = result[:count]
                        if tower == "text" and (name == "last_hidden_state" or name.startswith("hidden_states")):
                            cut = cut[:, :length]
                        host = torch.empty(cut.shape, dtype=torch.float32, pin_memory=True)
                        hosts.append(host.copy_(cut, non_blocking=True))
                    done = self._stream.record_event(torch.cuda.Event(blocking=True))
            done.synchronize()
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            raise BackendError(
                f"{self.name} failed on {count} {tower}s on {self._name}: {str(error).splitlines()[0]}"
            ) from error
        return [np.array(host.numpy()) for host in hosts]

    def _filled(self, tower: str, inputs: NDArray[np.generic]) -> Any:
        """The inputs in page-locked memory, filled up with zeros to a size that is captured."""
        torch, count = self._torch, len(inputs)
        rows = next(size for size in ROWS if size >= count)
        if tower == "text":
            length = next(length for length in self.buckets if length >= inputs.shape[1])
            filled = torch.zeros((rows, length), dtype=torch.int32, pin_memory=True)
            filled.numpy()[:count, : inputs.shape[1]] = inputs
            return filled
        filled = torch.zeros((rows, *inputs.shape[1:]), dtype=torch.float32, pin_memory=True)
        filled.numpy()[:count] = inputs
        return filled

    def _results(self, tower: str, filled: Any, outputs: list[str]) -> list[Any]:
        """Outputs on the GPU; the embedding out of a captured graph, others, which few ask for, without one."""
        if outputs != [EMBEDDINGS[tower]]:
            given = filled.to(self._place, non_blocking=True)
            return list(self._towers[tower].with_outputs(outputs)(given))
        key = (tower, filled.shape[0], filled.shape[1])
        if key not in self._graphs:
            self._graphs[key] = self._captured(tower, filled)
        captured = self._graphs[key]
        captured.inputs.copy_(filled, non_blocking=True)
        captured.graph.replay()
        return [captured.output]

    def _captured(self, tower: str, filled: Any) -> _Captured:
        torch, encode = self._torch, self._towers[tower].with_outputs([EMBEDDINGS[tower]])
        inputs = filled.to(self._place)
        for _ in range(2):  # libraries load kernels and choose among them in the first runs, which no graph can
            encode(inputs)
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            (output,) = encode(inputs)
        return _Captured(graph, inputs, output)

    def _open(self) -> None:
        if self._stream is not None:
            return
        torch = self._torch
        text, image = towers_of(self.bundle, self.precision)
        self._towers = {"text": text.to(self._place), "image": image.to(self._place)}
        for tower in self._towers.values():
            if tower.pca_head is not None:
                tower.pca_head.shift = tower.pca_head.shift.to(self._place)  # no buffer, so that it is never rounded
        self._pool = torch.cuda.graph_pool_handle()  # one for all: the graphs run one after another
        torch.cuda.synchronize(self._place)  # the weights came on another stream
        self._stream = torch.cuda.Stream(self._place)

    def close(self) -> None:
        """Lets go of the graphs and the towers. The next call opens them again."""
        with self._launch:
            if self._stream is not None:
                self._stream.synchronize()
            self._graphs.clear()
            self._towers.clear()
            self._stream = None


def towers_of(bundle: Bundle, precision: str) -> tuple[Any, Any]:
    """The text and image towers of a bundle in a precision, on the CPU, with its PCA where it has one.

    Blocks whose activations overflowed fp16 in the export stay in fp32, as in the fp16 graphs.

    Raises:
        BackendError: The graphs do not hold the weights.
    """
    torch = require("torch", "export")
    from longclip_rt.model.towers import ImageTower, TextTower, open_clip_model

    weights = {name: torch.tensor(array) for name, array in weights_of(bundle).items()}
    weights["logit_scale"] = torch.tensor(100.0).log()
    model = open_clip_model(bundle.architecture, weights)
    text, image = TextTower(bundle.architecture, model), ImageTower(bundle.architecture, model)
    if bundle.pca is not None:
        mode = bundle.manifest["pca"]["mode"]
        text, image = text.with_pca(bundle.pca, mode), image.with_pca(bundle.pca, mode)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    for kind, tower in (("text", text), ("image", image)):
        tower.to(dtype)
        if tower.pca_head is not None:
            tower.pca_head.float()
        for noted in bundle.manifest.get("parity", {}).get("activations", ()) if precision == "fp16" else ():
            if noted["tower"] == kind and noted["kept_fp32"]:
                tower.blocks[noted["block"]].float()
    return text, image


@contextlib.contextmanager
def full_fp32(torch: Any) -> Iterator[None]:
    """Keeps TF32, of 10 bits where fp32 has 23, out of products and convolutions of fp32 inside the block."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value
