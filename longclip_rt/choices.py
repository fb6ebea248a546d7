"""The values that options take, apart from what heeds them: light, so that a help text can list them."""

from __future__ import annotations

from dataclasses import dataclass

PRECISIONS = ("fp32", "bf16", "fp16", "int8")
"""`int8` is of bundles exported with it, on the openvino backend, and never what `auto` takes."""


@dataclass(frozen=True)
class BackendSpec:
    """A backend, as far as it is known without being loaded.

    Attributes:
        name: As `--backend` takes it.
        where: Its class, as `module:class` of this package; called with a bundle, a precision and a GPU's number.
        packages: Python packages that it needs.
        install: What pip installs them with.
        precisions: What it computes in, the one that `auto` picks first; OpenVINO says itself which it has here.
        auto: Its place in what `auto` tries, the least first.
        gpu_only: Whether it runs on NVIDIA GPUs alone; `torch` does too, where it was built for CUDA.
        reads_fp16: Whether fp16 takes an fp16 graph; the others lower the fp32 one themselves.
    """

    name: str
    where: str
    packages: tuple[str, ...]
    install: str
    precisions: tuple[str, ...]
    auto: int
    gpu_only: bool = False
    reads_fp16: bool = False


SPECS = {
    spec.name: spec
    for spec in (
        BackendSpec(
            "tensorrt",
            "tensorrt.backend:TensorrtBackend",
            ("tensorrt", "cuda.core"),
            "longclip-rt[gpu,tensorrt]",
            ("fp16", "fp32"),
            auto=0,
            gpu_only=True,
            reads_fp16=True,
        ),
        BackendSpec(
            "tensorrt-rtx",
            "tensorrt.backend:TensorrtRtxBackend",
            ("tensorrt_rtx", "cuda.core"),
            "longclip-rt[gpu,rtx]",
            ("fp16", "fp32"),
            auto=1,
            gpu_only=True,
            reads_fp16=True,
        ),
        BackendSpec(
            "onnxruntime-cuda",
            "backends.onnxruntime:OnnxRuntimeCudaBackend",
            ("onnxruntime",),
            "longclip-rt[gpu]",
            ("fp16", "fp32"),
            auto=3,
            gpu_only=True,
            reads_fp16=True,
        ),
        BackendSpec("openvino", "backends.openvino:OpenVinoBackend", ("openvino",), "longclip-rt", PRECISIONS, auto=4),
        BackendSpec(
            "onnxruntime",
            "backends.onnxruntime:OnnxRuntimeBackend",
            ("onnxruntime",),
            "longclip-rt[cpu]",
            ("fp32", "fp16"),
            auto=5,
            reads_fp16=True,
        ),
        # On a GPU faster than ONNX Runtime at every size tried (docs/gpu.md); `auto` does not take it on a CPU.
        BackendSpec(
            "torch",
            "backends.torch:TorchBackend",
            ("torch", "open_clip"),
            "longclip-rt[export]",
            ("fp32", "bf16", "fp16"),
            auto=2,
        ),
    )
}
"""Name -> backend; another one is its file and an entry here."""

BACKENDS = tuple(SPECS)
"""Every backend, as `--backend` takes them."""

GPU_BACKENDS = tuple(spec.name for spec in SPECS.values() if spec.gpu_only)

LIBRARIES = {name: SPECS[name].packages[0] for name in ("tensorrt", "tensorrt-rtx")}
"""Backend -> the Python package that builds and runs its engines."""

PCA_MODES = ("project", "reconstruct")

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""Compute capabilities times ten that kernels are compiled for, with none of them at hand: Ampere (data centre,
desktop), Ada, Hopper, Blackwell (data centre, desktop)."""

EVERY = "all"
"""Instead of architectures: every one that a library builds engines for."""

TEXT_BUCKETS = (32, 77, 128, 248)
"""Tokens that text batches are padded to in an engine, where nothing else is asked for."""

BATCHES = (1, 32, 256)
"""Last rows of an engine's ranges of batch sizes, likewise."""

LARGEST_WORKSPACE = 1 << 20
"""MiB that a layer of an engine may compute in: 1 TiB, more than any GPU has. The library's own number has 64 bits and
overflows far above."""

REFERENCES = ("open_clip", "torch.compile", "transformers", "plain-onnxruntime")
"""What one would use instead, which `bench` measures beside the backends."""
