"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])

# As in `longclip_rt.backends`, which is too heavy to import for a help text; a test compares them.
BACKENDS = ("auto", "openvino", "onnxruntime", "torch")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


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
