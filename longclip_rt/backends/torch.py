"""PyTorch: the reference that the exported graphs are held against, from the weights that the bundle was made of.

Where those are not at hand any more, it takes them from the bundle's own fp32 graphs.

On a CPU it runs batches as they come. On an NVIDIA GPU it is a fast way without TensorRT: static shapes under CUDA
graphs, crops that become pixels there, and the Triton kernel of the PCA head.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from longclip_rt.backends.base import EMBEDDINGS, Backend, Float32
from longclip_rt.backends.graph_weights import weights_of
from longclip_rt.backends.torch_graphs import BUCKETS, SLOTS, StaticTowers
from longclip_rt.bundle.bundle import Bundle
from longclip_rt.errors import BackendError, LongClipError
from longclip_rt.system.extras import require

if TYPE_CHECKING:
    from longclip_rt.weights.checkpoint import Checkpoint

logger = logging.getLogger("longclip_rt")

PRECISIONS = ("fp32", "bf16", "fp16")


def checkpoint_of(bundle: Bundle) -> Checkpoint:
    """The weights that a bundle names; where they are not at hand, those in its fp32 graphs: the same.

    Raises:
        BackendError: The named weights are others by now, or are neither there nor in the graphs.
        MissingExtraError: PyTorch, open_clip or onnx is not installed.
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
        text, image = text.with_outputs(bundle.outputs("text")), image.with_outputs(bundle.outputs("image"))
        self._on_gpu, self._kernel = device is not None, False
        if self._on_gpu:
            self.batch_size, self.concurrency, self.takes_crops = 64, SLOTS, True
            self.not_apart = "the head is a part of the encoder"
            if bundle.pca is not None and bundle.manifest["pca"]["mode"] == "project":
                self._kernel = all(self._with_kernel(tower, dtype) for tower in (text, image))
        self._towers: dict[str, Any] = {
            "text": text.to(self._device, dtype),
            "image": image.to(self._device, dtype),
        }
        self._static = self._static_towers() if self._on_gpu else None

    def _static_towers(self) -> StaticTowers:
        names = {tower: self.bundle.outputs(tower) for tower in self._towers}
        towers = {"text": self._towers["text"], "image": self._image_encoder()}
        return StaticTowers(self._torch, self._device, towers, names, self.buckets)

    def _image_encoder(self) -> Callable[[Any], Any]:
        """The image tower on crops [B, H, W, 3] uint8, normalised as the host does it; or on pixels."""
        torch, transform, tower = self._torch, self.bundle.transform, self._towers["image"]
        # As tensors: PyTorch would multiply by the reciprocal of a number, which rounds otherwise.
        white = torch.tensor(255.0, device=self._device)
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=self._device)[:, None, None]
            for values in (transform.mean, transform.std)
        )

        def encode(images: Any) -> Any:
            if images.dtype == torch.uint8:
                images = (images.permute(0, 3, 1, 2).float() / white - mean) / std
            return tower(images)

        return encode

    def _with_kernel(self, tower: Any, dtype: Any) -> bool:
        """Lets a tower's PCA be computed by the Triton kernel; says so and leaves it where Triton is not there."""
        try:
            from longclip_rt.kernels.pca_head import head_weights, pca_head
        except ImportError as error:
            logger.info("the PCA is computed by operators, not by the Triton kernel: %s", error)
            return False
        assert self.bundle.pca is not None
        basis, norm = self.bundle.pca.basis(tower.kind), tower.final_norm
        mean, components = (self._torch.from_numpy(array) for array in (basis.mean, basis.components))
        given = (norm.weight, norm.bias, tower.projection, mean, components)
        weights = head_weights(*(each.to(self._device) for each in given), dtype=dtype, eps=norm.eps)

        def head(states: Any) -> tuple[Any, Any]:
            reduced, embedding = pca_head(states.to(dtype), weights, with_embedding=True)
            return embedding, reduced

        tower.fused_head = head
        return True

    @property
    def fused_pca(self) -> str:
        """SHA-256 of the PCA that the Triton kernel computes; empty where it does not."""
        return str(self.bundle.manifest["pca"]["sha256"]) if self._kernel else ""

    @property
    def tensors_on(self) -> str:
        """Its GPU."""
        return str(self._device) if self._on_gpu else ""

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
        if self._static is not None:
            return self._static.run(tower, inputs, outputs)
        with self._torch.inference_mode():
            computed = self._towers[tower](self._torch.from_numpy(np.ascontiguousarray(inputs)))
        named = dict(zip(self.bundle.outputs(tower), computed, strict=True))
        return [named[name].numpy() for name in outputs]

    def timed(self, tower: str, inputs: NDArray[np.generic]) -> dict[str, float]:
        """On a GPU by CUDA events; filling page-locked memory up to a captured shape counts as copying in."""
        if self._static is None:
            return super().timed(tower, inputs)
        return self._static.timed(tower, inputs, [EMBEDDINGS[tower]])

    def run_on_device(self, tower: str, inputs: Any, outputs: Sequence[str] | None = None) -> list[Any]:
        """Runs one tower on a tensor that lies on this backend's GPU.

        Args:
            tower: `text` or `image`.
            inputs: What gives it through DLPack: token ids [B, S], or crops [B, H, W, 3] uint8.
            outputs: As `run` takes them.

        Returns:
            One `torch.Tensor` float32 an output, on the same GPU and in order with PyTorch's current stream there.

        Raises:
            BackendError: This backend runs on the CPU, or the tensor is not what the tower takes.
        """
        if self._static is None:
            return super().run_on_device(tower, inputs, outputs)
        tensor, size = self._torch.from_dlpack(inputs), self.bundle.architecture.image_size
        context = self.bundle.architecture.context_length
        if tensor.device != self._device:
            raise BackendError(f"The tensor is on {tensor.device}, and this backend on {self._device}. Move one.")
        if tower == "text":
            fits = (
                tensor.ndim == 2 and len(tensor) and 1 <= tensor.shape[1] <= context and not tensor.is_floating_point()
            )
            wanted = f"integers [batch, 1 to {context}]"
        else:
            fits = tensor.ndim == 4 and len(tensor) and tuple(tensor.shape[1:]) == (size, size, 3)
            fits, wanted = fits and tensor.dtype == self._torch.uint8, f"uint8 [batch, {size}, {size}, 3]"
        if not fits:
            raise BackendError(f"The {tower} tower takes {wanted}; got {tensor.dtype} {list(tensor.shape)}.")
        tensor = tensor.to(self._torch.int32) if tower == "text" else tensor
        return self._static.run_on_device(tower, tensor, [EMBEDDINGS[tower]] if outputs is None else list(outputs))

    def _close(self) -> None:
        """Lets go of captured graphs; the towers go with the backend."""
        if self._static is not None:
            self._static.close()
