"""What takes part: this package's backends, and what one would use instead, all called on the same arrays."""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longclip_rt.backends.base import EMBEDDINGS, INPUT_NAMES
from longclip_rt.backends.batching import padded_length
from longclip_rt.bench.rates import dtype_of
from longclip_rt.bundle.bundle import Bundle
from longclip_rt.choices import REFERENCES
from longclip_rt.errors import BackendError
from longclip_rt.opening import open_backend
from longclip_rt.system.extras import require

Array = NDArray[Any]


class Contender(ABC):
    """Runs both towers of a model in one precision.

    Attributes:
        concurrency: Calls at a time that give the most throughput.
        whole: Why `parts` does not tell some stages apart; empty where it does.
        details: Version and device, for the table's head.
    """

    concurrency = 1
    whole = ""
    details: str

    @abstractmethod
    def length(self, tokens: int) -> int:
        """Tokens that a batch of texts of `tokens` tokens is computed for."""

    @abstractmethod
    def images(self, crops: Array) -> Array:
        """Crops [B, n, n, 3] uint8 as the contender takes images: so, or as pixels [B, 3, n, n] float32."""

    @abstractmethod
    def run(self, tower: str, inputs: Array) -> Array:
        """Ids [B, S] int32, or what `images` gives, to embeddings [B, D] float32, all in ordinary memory."""

    def parts(self, tower: str, inputs: Array) -> Mapping[str, float]:
        """Seconds of the stages of one such run that can be told apart."""
        started = time.perf_counter()
        self.run(tower, inputs)
        return {"encoder": time.perf_counter() - started}


class Ours(Contender):
    """A backend of this package, as `Embedder` calls it."""

    def __init__(self, bundle: Bundle, backend: str, precision: str) -> None:
        self._backend = open_backend(bundle, backend, precision)
        self._context = bundle.architecture.context_length
        self.concurrency = self._backend.concurrency
        self.details = f"{self._backend.version} on {self._backend.device}"
        self.whole = self._backend.not_apart

    def length(self, tokens: int) -> int:
        """Up to the backend's next length."""
        return padded_length(tokens, self._backend.pad_multiple, self._context, self._backend.buckets)

    def images(self, crops: Array) -> Array:
        """As the backend takes them."""
        return self._backend.images(crops)

    def run(self, tower: str, inputs: Array) -> Array:
        """One call."""
        return self._backend.run(tower, inputs)[0]

    def parts(self, tower: str, inputs: Array) -> Mapping[str, float]:
        """What the backend tells."""
        return self._backend.timed(tower, inputs)


class Reference(Contender):
    """Something else on the same weights; every text goes in at the model's whole context."""

    def __init__(self, bundle: Bundle) -> None:
        self._context, self._transform = bundle.architecture.context_length, bundle.transform

    def length(self, tokens: int) -> int:
        """The context."""
        return self._context

    def images(self, crops: Array) -> Array:
        """Normalised."""
        return self._transform.normalize(crops)


class TorchReference(Reference):
    """A model of PyTorch, an operator at a time or compiled; copies are made as a user writes them."""

    whole = "the head is a part of the encoder"

    def __init__(self, bundle: Bundle, name: str, precision: str, on_gpu: bool) -> None:
        super().__init__(bundle)
        torch: Any = require("torch", "bench")
        self._torch, self._on_gpu = torch, on_gpu
        self._device = torch.device("cuda:0" if on_gpu else "cpu")
        self._dtype = dtype_of(torch, precision)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32, for all
        build = _transformers if name == "transformers" else _open_clip
        model, self._calls, version = build(torch, bundle)
        model.to(self._device, self._dtype)
        if name == "torch.compile":
            torch._dynamo.config.recompile_limit = 256  # one program a shape
            mode = "reduce-overhead" if on_gpu else "default"
            self._calls = {tower: torch.compile(call, mode=mode, dynamic=False) for tower, call in self._calls.items()}
            version = f"{version}, compiled ({mode})"
        self.details = f"{version}, PyTorch {torch.__version__} on {self._device}"

    def run(self, tower: str, inputs: Array) -> Array:
        """One call."""
        with self._torch.inference_mode():
            result: Array = self._calls[tower](self._copied_in(tower, inputs)).float().cpu().numpy()
        return result

    def parts(self, tower: str, inputs: Array) -> Mapping[str, float]:
        """Wall clock on a CPU; CUDA events on a GPU."""
        if not self._on_gpu:
            return super().parts(tower, inputs)
        events = [self._torch.cuda.Event(enable_timing=True) for _ in range(4)]
        with self._torch.inference_mode():
            self._torch.cuda.synchronize()
            events[0].record()
            given = self._copied_in(tower, inputs)
            events[1].record()
            result = self._calls[tower](given)
            events[2].record()
            result.float().cpu()
            events[3].record()
            self._torch.cuda.synchronize()
        times = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]
        return dict(zip(("copy in", "encoder", "copy out"), times, strict=True))

    def _copied_in(self, tower: str, inputs: Array) -> Any:
        tensor = self._torch.from_numpy(inputs).to(self._device)
        return tensor.long() if tower == "text" else tensor.to(self._dtype)


def _open_clip(torch: Any, bundle: Bundle) -> tuple[Any, dict[str, Any], str]:
    from importlib.metadata import version

    from longclip_rt.backends.torch import checkpoint_of
    from longclip_rt.model.towers import open_clip_model

    arch = bundle.architecture
    model: Any = open_clip_model(arch, checkpoint_of(bundle).state_dict)
    length = arch.context_length
    model.attn_mask = torch.full((length, length), float("-inf")).triu_(1)  # the model was built without data for it
    calls = {
        "text": lambda ids: model.encode_text(ids, normalize=True),
        "image": lambda pixels: model.encode_image(pixels, normalize=True),
    }
    return model, calls, f"open_clip {version('open_clip_torch')}"


def _transformers(torch: Any, bundle: Bundle) -> tuple[Any, dict[str, Any], str]:
    from longclip_rt.backends.torch import checkpoint_of
    from longclip_rt.weights.convert import huggingface_config
    from longclip_rt.weights.naming import huggingface_names

    transformers: Any = require("transformers", "bench")
    checkpoint = checkpoint_of(bundle)
    model = transformers.CLIPModel(transformers.CLIPConfig(**huggingface_config(checkpoint.architecture)))
    model.load_state_dict(huggingface_names(checkpoint.state_dict))
    model.requires_grad_(False).eval()

    def normalized(found: Any) -> Any:
        vectors = getattr(found, "pooler_output", found)  # from transformers 5 on, it lies in an object
        return torch.nn.functional.normalize(vectors, dim=-1)

    calls = {
        "text": lambda ids: normalized(model.get_text_features(input_ids=ids)),
        "image": lambda pixels: normalized(model.get_image_features(pixel_values=pixels)),
    }
    return model, calls, f"transformers {transformers.__version__}"


class PlainOnnxRuntime(Reference):
    """ONNX Runtime on the bundle's graphs with its own defaults, without trimming."""

    whole = "copies, encoder and head are one call of the library"

    def __init__(self, bundle: Bundle, precision: str, on_gpu: bool) -> None:
        super().__init__(bundle)
        runtime: Any = require("onnxruntime", "gpu" if on_gpu else "cpu")
        provider = "CUDAExecutionProvider" if on_gpu else "CPUExecutionProvider"
        if provider not in runtime.get_available_providers():
            raise BackendError(f"This onnxruntime has no {provider}, and the CPU would not be a fair contender.")
        self._sessions = {
            tower: runtime.InferenceSession(str(bundle.onnx(tower, precision)), providers=[provider])
            for tower in INPUT_NAMES
        }
        self.details = f"onnxruntime {runtime.__version__}, {provider}"

    def run(self, tower: str, inputs: Array) -> Array:
        """One call."""
        result: Array = self._sessions[tower].run([EMBEDDINGS[tower]], {INPUT_NAMES[tower]: inputs})[0]
        return result


def opened(bundle: Bundle, name: str, precision: str, on_gpu: bool) -> Contender:
    """Opens a backend or one of `REFERENCES`.

    Raises:
        BackendError: It cannot be had in this precision, or not on this device.
        MissingExtraError: A package is not installed.
    """
    if name not in REFERENCES:
        return Ours(bundle, name, precision)
    if name == "plain-onnxruntime":
        return PlainOnnxRuntime(bundle, precision, on_gpu)
    return TorchReference(bundle, name, precision, on_gpu)


def same_vectors(first: Array, second: Array) -> float:
    """The least cosine of two batches of embeddings: whether two contenders did the same work."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(np.min(np.sum(first * second, axis=1) / norms))
