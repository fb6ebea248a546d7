"""PyTorch: the reference that the exported graphs are held against, run from the weights the bundle was made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longclip_rt.backends.base import Backend, Float32
from longclip_rt.bundle.bundle import Bundle
from longclip_rt.errors import BackendError, LongClipError
from longclip_rt.system.extras import require

PRECISIONS = ("fp32", "bf16", "fp16")


class TorchBackend(Backend):
    """Runs the towers themselves. A bundle holds graphs, not weights, so the weights it names must still be there."""

    name = "torch"

    def __init__(self, bundle: Bundle, precision: str) -> None:
        super().__init__(bundle, precision)
        self._torch: Any = require("torch", "export")
        from longclip_rt.weights.checkpoint import load_checkpoint, towers_from_checkpoint

        source = bundle.manifest["source"]
        try:
            checkpoint = load_checkpoint(source["weights"], activation=source["activation"])
        except LongClipError as error:
            raise BackendError(
                f"The torch backend runs the weights that the bundle was exported from, {source['weights']}, and they "
                f"cannot be loaded: {error} Another backend needs only the bundle: --backend auto."
            ) from error
        if checkpoint.sha256 != source["sha256"]:
            raise BackendError(
                f"{source['weights']} is not what the bundle was exported from: its SHA-256 is "
                f"{checkpoint.sha256}, and the bundle names {source['sha256']}. Export it again, or use --backend auto."
            )
        dtype = {"fp32": self._torch.float32, "bf16": self._torch.bfloat16, "fp16": self._torch.float16}[precision]
        text, image = towers_from_checkpoint(checkpoint)
        if bundle.pca is not None:
            mode = bundle.manifest["pca"]["mode"]
            text, image = text.with_pca(bundle.pca, mode), image.with_pca(bundle.pca, mode)
        self._towers: dict[str, Any] = {
            "text": text.with_outputs(bundle.outputs("text")).to(dtype),
            "image": image.with_outputs(bundle.outputs("image")).to(dtype),
        }

    @property
    def version(self) -> str:
        """PyTorch's version."""
        return str(self._torch.__version__)

    @property
    def device(self) -> str:
        """The CPU, by the instructions PyTorch uses on it."""
        return f"CPU ({self._torch.backends.cpu.get_cpu_capability()})"

    def _run(self, tower: str, inputs: NDArray[np.generic], outputs: Sequence[str]) -> list[Float32]:
        with self._torch.inference_mode():
            results = self._towers[tower](self._torch.from_numpy(np.ascontiguousarray(inputs)))
        named = dict(zip(self.bundle.outputs(tower), results, strict=True))
        return [named[name].numpy() for name in outputs]

    def close(self) -> None:
        """Does nothing: the towers go with the backend."""
