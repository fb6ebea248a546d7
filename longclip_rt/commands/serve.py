"""`longclip-rt serve`: embeddings over HTTP."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import click

from longclip_rt.commands.options import KEY_VARIABLE, Function, SectionedCommand, gpu_numbers, runs_the_model

_SECTIONS = {
    "Model": ("bundle", "backend", "precision", "devices"),
    "Address": ("host", "port", "workers", "grace", "api_key_file"),
    "Search": ("index", "pictures"),
    "Bounds": ("max_wait", "max_body", "max_inputs", "max_pixels", "max_queue", "max_seconds", "max_requests"),
}


def _bound(name: str, default: int, unit: str, words: str) -> Callable[[Function], Function]:
    return click.option(name, type=click.IntRange(min=1), default=default, show_default=True, metavar=unit, help=words)


@click.command(cls=SectionedCommand, sections=_SECTIONS)
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The model. Default: the newest exported one, else the built-in one.",
)
@runs_the_model
@click.option(
    "--devices",
    callback=gpu_numbers,
    metavar="LIST",
    help="Numbers of the GPUs to run on, all at once, such as 0,1. Default: the first one, or the CPU.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0 is everywhere.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Where to listen; 0 is a free one."
)
@_bound("--workers", 1, "N", "Processes behind the port, each with the whole model.")
@_bound("--grace", 30, "SECONDS", "Time to answer what was begun, once SIGTERM came.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=f"Holds the key that clients must send. Default: the variable {KEY_VARIABLE}, else no key.",
)
@click.option(
    "--index",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Embeddings that `longclip-rt embed` wrote with this model, to offer search over.",
)
@click.option(
    "--pictures",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Show thumbnails of the index's images that lie below this folder. Default: none are shown.",
)
@_bound("--max-wait", 5, "MS", "How long a batch that is not full waits for more inputs.")
@_bound("--max-body", 32, "MIB", "Largest body of a request.")
@_bound("--max-inputs", 2048, "N", "Most texts and images of a request.")
@_bound("--max-pixels", 64, "MILLIONS", "Most pixels of an image.")
@_bound("--max-queue", 4096, "N", "Most texts and images that wait; further ones get 429 and Retry-After.")
@_bound("--max-seconds", 60, "SECONDS", "Longest time of a request, its arrival included.")
@_bound("--max-requests", 256, "N", "Most requests at a time; further ones get 503 and Retry-After.")
def serve(
    bundle: Path | None,
    backend: str,
    precision: str,
    devices: tuple[int, ...] | None,
    host: str,
    port: int,
    workers: int,
    grace: int,
    api_key_file: Path | None,
    index: Path | None,
    pictures: Path | None,
    **bounds: int,
) -> None:
    """Answer over HTTP: embeddings in OpenAI's shape, similarity, search over an index, and a page for people at /.

    Requests share batches. SIGTERM ends the server once what was begun is answered. It fetches no URLs, and listens on
    this machine alone unless --host says otherwise.

    \b
    Examples:
      longclip-rt serve
      longclip-rt serve --index photos.parquet --pictures photos/
      longclip-rt serve --host 0.0.0.0 --api-key-file key.txt --workers 2
      curl 127.0.0.1:8000/v1/embeddings -H 'Content-Type: application/json' -d '{"input": "a red cup"}'
    """
    from longclip_rt.system.extras import require

    for module in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
        require(module, "serve")
    from longclip_rt.serving.bounds import Bounds
    from longclip_rt.serving.run import Address, Model
    from longclip_rt.serving.run import serve as run
    from longclip_rt.serving.server import Options

    limits = Bounds(
        body_bytes=bounds["max_body"] << 20,
        inputs=bounds["max_inputs"],
        pixels=bounds["max_pixels"] * 1_000_000,
        queue=bounds["max_queue"],
        seconds=float(bounds["max_seconds"]),
        connections=bounds["max_requests"],
        wait_seconds=bounds["max_wait"] / 1000,
    )
    key = _key_of_environment() if api_key_file is None else _key_from(api_key_file)
    options = Options(limits, key, index, pictures)
    run(Model(bundle, backend, precision, devices), options, Address(host, port, workers, grace))


def _key_from(path: Path) -> str:
    """The key that a file holds, on its one line.

    Raises:
        InputError: The file cannot be read, or holds something else.
    """
    from longclip_rt.errors import InputError

    try:
        key = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} holds no API key: a key is of ASCII characters.") from error
    if not _is_key(key):
        raise InputError(f"{path} should hold an API key on one line, without blanks.")
    return key


def _key_of_environment() -> str:
    """The key in the environment; empty: there is none.

    Raises:
        InputError: It is none that a client could send.
    """
    from longclip_rt.errors import InputError

    key = os.environ.get(KEY_VARIABLE, "").strip()
    if key and not _is_key(key):
        raise InputError(f"{KEY_VARIABLE} should hold an API key of ASCII characters, without blanks.")
    return key


def _is_key(key: str) -> bool:
    return key.isascii() and key.isprintable() and key != "" and " " not in key
