"""What the messages of TensorRT and TensorRT-RTX mean, and what a user can do about them."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NOT_FUSED = r"not supported by a dedicated kernel"
_NO_GPU = re.compile(
    r"driver version is insufficient|no cuda-capable device|cuda ?error (?:35|100)\b|cuda initialization failure|"
    r"no_device|cuinit",
    re.IGNORECASE,
)

# The first that matches any message is taken, so what is said of the cause stands before what follows from it.
_MEANINGS = (
    (
        r"plugin (?:creator )?not found|(?:could not|unable to|cannot) find plugin|no plugin creator",
        "it asks for a plug-in that is not registered. Register the plug-in first, or export the bundle without it",
    ),
    (
        r"within workspace limit|out ?of ?memory|memory_?alloc|could not be allocated|insufficient memory|"
        r"cuda ?error 2\b|bad_alloc",
        "there is too little memory. Free memory on the GPU (nvidia-smi shows who uses it), or build with a smaller "
        "last number of --batches, or a larger --workspace where one was given",
    ),
    (
        _NOT_FUSED,
        "there is no fused attention for this model's head width or precision on this GPU. Use another backend there",
    ),
    (
        r"FP32 GEMM is not supported",
        "the library has no matrix products in fp32 for this GPU. Build it with --precision fp16, or leave its "
        "architecture out",
    ),
    (
        r"version tag does not match|version_mismatch|not compatible with this version|expecting library version|"
        r"incompatible with the version|incompatible with current version|with the version of this library",
        "it was built by another version of the library. Build it again with: longclip-rt engine build",
    ),
    (
        r"incompatible device|expecting compute|across different models of devices|unsupported_cc|"
        r"different (?:gpu|compute capability)|got compute capability|no kernel image",
        "it was built for another GPU. Build it on this machine with: longclip-rt engine build",
    ),
    (
        r"magic ?tag|malformed|corrupt|checksum|serialization assertion|deserializ\w* failed|truncated|"
        r"failed to parse the onnx model",
        "the file is damaged. Copy it or build it again: longclip-rt engine build",
    ),
)  # fmt: skip


def is_no_gpu(message: str) -> bool:
    """Whether an error only says that no GPU can be used here."""
    return _NO_GPU.search(message) is not None


def no_fused_attention(messages: Iterable[str]) -> bool:
    """Whether errors say that an attention has no fused kernel."""
    return any(re.search(_NOT_FUSED, message, re.IGNORECASE) for message in messages)


def meaning(messages: Iterable[str]) -> str:
    """What errors of TensorRT amount to: a clause that begins in lower case and ends without a full stop.

    Args:
        messages: The errors that it logged, first to last.

    Returns:
        The cause and how to mend it, with TensorRT's own words where they are not understood.
    """
    found = list(messages)
    for pattern, sentence in _MEANINGS:
        if any(re.search(pattern, message, re.IGNORECASE) for message in found):
            return sentence
    if not found:
        return "the library gave no reason"
    told = [message for message in found if not is_no_gpu(message)]
    if not told:
        return "there is no NVIDIA GPU with a driver new enough here. Check with: nvidia-smi"
    words = f"the library said: {' '.join(told[0].split()).rstrip('.')}"
    if len(told) < len(found):
        # The library goes on without a GPU where it can, so that may not be why.
        words += ". There may also be no NVIDIA GPU with a driver new enough here. Check with: nvidia-smi"
    return words
