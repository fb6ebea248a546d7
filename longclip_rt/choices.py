"""The values that options take, apart from what heeds them: light, so that a help text can list them."""

from __future__ import annotations

LIBRARIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Backend -> the Python package that builds and runs its engines."""

GPU_BACKENDS = (*LIBRARIES, "onnxruntime-cuda")
"""Those that run on NVIDIA GPUs alone; `torch` does too, where it was built for CUDA."""

BACKENDS = (*GPU_BACKENDS, "openvino", "onnxruntime", "torch")
"""Every backend, as `--backend` takes them."""

PRECISIONS = ("fp32", "bf16", "fp16")

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
