"""A few texts and images with the vectors that they must give: kept in a bundle, and tried at first use on a GPU.

The gate ran at export, on another machine. An engine is built where it runs, by a library, a driver and a card that the
gate never saw; so it is held to the towers' own figures before its vectors go anywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from longclip_rt.backends.base import EMBEDDINGS, Backend, Float32
from longclip_rt.bundle.bundle import TOWERS, Bundle
from longclip_rt.errors import BackendError
from longclip_rt.metrics import unit_rows
from longclip_rt.parity.limits import LIMITS, LOOSEST
from longclip_rt.system.files import output_errors

logger = logging.getLogger("longclip_rt")

FILE = "self_check.safetensors"
TEXTS, IMAGES = 4, 2
"""How many are kept: 4 texts over the whole range of lengths, and 2 photographs, 0.3 MB for B/16."""


def write_self_check(
    folder: Path,
    ids: NDArray[np.int32],
    crops: NDArray[np.uint8],
    expected: Mapping[str, Mapping[str, Float32]],
    spans: Mapping[str, float],
) -> None:
    """Keeps inputs and what the fp32 towers give for them.

    Args:
        folder: Of the bundle in the making.
        ids: Token ids [n, context length], n at least 1.
        crops: Cropped images [m, size, size, 3], m at least 1.
        expected: Tower -> output -> [n or m, ...]; the embeddings and any PCA are kept.
        spans: Least length of a PCA's rows before they were scaled, by output name, as in the gate's reference.

    Raises:
        OutputError: The folder cannot be written.
    """
    from safetensors.numpy import save

    arrays: dict[str, NDArray[np.generic]] = {"text": ids, "image": crops}
    for tower, named in expected.items():
        for name in (EMBEDDINGS[tower], f"{tower}_pca"):
            if name in named:
                arrays[name] = np.ascontiguousarray(named[name])
                arrays[f"{name}.span"] = np.array([spans.get(name, 1.0)])
    with output_errors(folder / FILE):
        (folder / FILE).write_bytes(save(arrays))


def run_self_check(backend: Backend) -> None:
    """Holds a backend to the figures in its bundle.

    Every text is tried trimmed and padded, alone and together; and the same texts and images at every corner that the
    backend names, such as the ends of an engine's profiles: wrong fused kernels are known of single sizes and cards.
    All twice, so that captured graphs are used too.

    Args:
        backend: To be checked; its PCA too where it computes that by a kernel of its own.

    Raises:
        BackendError: A vector differs from its figure by more than the export's gate allows.
    """
    arrays = _figures(backend.bundle)
    if arrays is None:
        return
    limit = LIMITS[backend.precision]
    for tower in TOWERS:
        inputs = arrays[tower] if tower == "text" else backend.images(arrays[tower].astype(np.uint8))
        for name in (EMBEDDINGS[tower], f"{tower}_pca") if backend.fused_pca else (EMBEDDINGS[tower],):
            # An embedding's error grows where a PCA's rows are scaled to length 1.
            span = float(arrays[f"{name}.span"][0])
            bound = min(limit.bound / (span if limit.parity == "max difference" else span**2), LOOSEST)
            for where, batch, rows in _batches(backend, inputs, tower):
                for _ in range(2):
                    got = backend.run(tower, batch, [name])[0]
                    error = _error(got, arrays[name][rows], limit.parity)
                    if not error <= bound:
                        raise BackendError(
                            f"{backend.name} {backend.version} on {backend.device} fails its self-check and is not "
                            f"used: {name} of {len(batch)} {tower}s{where} has {limit.parity} {error:.3g}, and may "
                            f"have {bound:.3g}. Build the engine again (longclip-rt engine build), see the whole gate "
                            "with longclip-rt engine verify, or take another --backend."
                        )


def _figures(bundle: Bundle) -> dict[str, NDArray[np.generic]] | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not bundle.file(FILE).is_file():
        logger.warning("%s was exported by an older version and holds no figures for a self-check", bundle.path)
        return None
    try:
        arrays: dict[str, NDArray[np.generic]] = load_file(bundle.file(FILE))
    except (OSError, SafetensorError) as error:
        raise BackendError(f"{bundle.file(FILE)} cannot be read: {error}. Export or copy the bundle again.") from error
    return arrays


def _batches(
    backend: Backend, inputs: NDArray[np.generic], tower: str
) -> Iterator[tuple[str, NDArray[np.generic], NDArray[np.intp]]]:
    """Where in the backend, inputs, and which rows of the figures they should give.

    All together; each alone, texts trimmed behind their end token; and the backend's corners.
    """
    everything = np.arange(len(inputs))
    lengths = everything
    if tower == "text":
        lengths = np.argmax(inputs == backend.bundle.architecture.eot_id, axis=1) + 1
    yield "", inputs, everything
    for row in everything:
        one = inputs[row : row + 1]
        yield "", one[:, : lengths[row]] if tower == "text" else one, everything[row : row + 1]
    for where, length, count in backend.corners(tower):
        fitting = everything if length is None else np.flatnonzero(lengths <= length)
        if not len(fitting):
            logger.warning("no text of the self-check is short enough for %s, which is not checked", where)
            continue
        rows = np.resize(fitting, count)
        yield f" ({where})", inputs[rows] if length is None else inputs[rows, :length], rows


def _error(got: Float32, expected: NDArray[np.generic], measure: str) -> float:
    wanted = expected.astype(np.float64)
    if not np.isfinite(got).all():
        return float("nan")
    if measure == "max difference":
        return float(np.abs(got - wanted).max())
    return float(1.0 - (unit_rows(got.astype(np.float64)) * unit_rows(wanted)).sum(axis=1).min())
