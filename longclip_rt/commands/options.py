"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])

# As in `longclip_rt.opening` and `longclip_rt.pca.basis`, which are too heavy for a help text; tests compare them.
BACKENDS = (
    "auto", "tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime-tensorrt", "torch-cuda", "openvino",
    "onnxruntime", "torch",
)  # fmt: skip
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
PCA_MODES = ("project", "reconstruct")


def gpu_numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Numbers of GPUs with commas between them; a callback of click's."""
    if value is None:
        return None
    parts = value.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts) or len({int(part) for part in parts}) < len(parts):
        raise click.BadParameter(f"{value!r} should be numbers of GPUs, each once, with commas between, such as 0,1")
    return tuple(int(part) for part in parts)


def runs_the_model(command: Function) -> Function:
    """Adds `--backend` and `--precision`."""
    backend = click.option(
        "--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="What runs the model."
    )
    precision = click.option(
        "--precision",
        type=click.Choice(PRECISIONS),
        default="auto",
        show_default=True,
        help="Number format of the model.",
    )
    return backend(precision(command))


def takes_a_pca(command: Function) -> Function:
    """Adds `--pca` and `--pca-mode`."""
    pca = click.option(
        "--pca",
        metavar="FILE",
        help="Reduce the vectors with a PCA that `longclip-rt pca fit` wrote; `bundle` takes the one in the bundle.",
    )
    mode = click.option(
        "--pca-mode",
        type=click.Choice(PCA_MODES),
        default="project",
        show_default=True,
        help="K numbers, or back in the embedding's own space without what the components do not hold.",
    )
    return pca(mode(command))
