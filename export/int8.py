"""Post-training quantisation to int8 with NNCF, for OpenVINO on CPUs; SmoothQuant's alpha is chosen by fidelity."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longclip_rt.backends.base import EMBEDDINGS, INPUT_NAMES, Float32
from longclip_rt.backends.openvino import hint_for, shared_core
from longclip_rt.bundle.bundle import TOWERS, Bundle, int8_name
from longclip_rt.bundle.samples import example_photos, parity_texts
from longclip_rt.errors import ExportError
from longclip_rt.parity.fidelity import cosines, fidelity
from longclip_rt.parity.limits import Check
from longclip_rt.system.extras import require

ALPHAS = (0.5, 0.6, 0.7, 0.95)
"""How much of an activation's outliers moves into the weights; the last is NNCF's own choice."""

LEAST, MOST = 16, 128
"""Inputs of a kind that are worth calibrating on, and that are used at most."""


@dataclass(frozen=True)
class Int8Sample:
    """What int8 is calibrated on, or judged on.

    Attributes:
        name: Where it is from.
        images: Photographs.
        texts: Texts.
    """

    name: str
    images: tuple[Path, ...] = ()
    texts: tuple[str, ...] = ()


Inputs = list[NDArray[Any]]


@dataclass(frozen=True)
class _Halves:
    """Inputs of one tower, each a batch of one; alternate ones are for calibrating and for judging."""

    calibration: Inputs
    judging: Inputs
    name: str


def write_int8(
    bundle: Bundle, sample: Int8Sample | None, progress: Callable[[str], None], alphas: Sequence[float] = ALPHAS
) -> tuple[dict[str, Any], list[Check]]:
    """Writes both towers in int8 beside their fp32 graphs.

    Every second input calibrates, and chooses alpha by the mean cosine with fp32; the others judge.

    Args:
        bundle: In the making, with its fp32 graphs.
        sample: Texts and photographs; of a kind of which it has less than `LEAST`, what ships with the package is used.
        progress: Called with a few words as each tower begins.
        alphas: SmoothQuant's alphas to try.

    Returns:
        The report for the manifest, and the checks.

    Raises:
        ExportError: NNCF failed.
        MissingExtraError: It is not installed.
    """
    nncf: Any = require("nncf", "int8")
    openvino: Any = require("openvino", "int8")
    core = shared_core(openvino)
    report: dict[str, Any] = {"nncf": str(nncf.__version__), "alphas": {}, "tried": {}, "calibrated_on": {}}
    got: dict[str, Float32] = {}
    expected: dict[str, Float32] = {}
    for tower, halves in (("text", _texts(bundle, sample)), ("image", _images(bundle, sample))):
        progress(f"quantising {tower} to int8")
        graph = bundle.onnx(tower, "fp32")
        true = core.compile_model(str(graph), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        wanted, expected[tower] = (_vectors(true, tower, half) for half in (halves.calibration, halves.judging))
        tried: dict[float, float] = {}
        for alpha in alphas:
            with _quiet():
                try:
                    quantised = _quantised(nncf, core.read_model(str(graph)), halves.calibration, alpha)
                except Exception as error:  # of many classes, which NNCF does not name
                    raise ExportError(f"NNCF {nncf.__version__} could not quantise {graph.name}: {error}") from error
            compiled = core.compile_model(quantised, "CPU", {"INFERENCE_PRECISION_HINT": hint_for("int8")})
            tried[alpha] = float(cosines(_vectors(compiled, tower, halves.calibration), wanted).mean())
            if tried[alpha] == max(tried.values()):
                got[tower] = _vectors(compiled, tower, halves.judging)
                openvino.save_model(quantised, str(bundle.file(int8_name(tower))), compress_to_fp16=False)
        report["alphas"][tower] = max(tried, key=lambda alpha: tried[alpha])
        report["tried"][tower] = {str(alpha): round(value, 6) for alpha, value in tried.items()}
        report["calibrated_on"][tower] = {"inputs": len(halves.calibration), "from": halves.name}
    found = fidelity(got, expected)
    report["fidelity"] = {tower: found[tower].to_dict() for tower in TOWERS}
    return report, [
        check for tower in TOWERS for check in found[tower].checks("openvino", "int8", tower, bundle.trained)
    ]


def _quantised(nncf: Any, model: Any, inputs: Inputs, alpha: float) -> Any:
    smooth = nncf.AdvancedSmoothQuantParameters(matmul=alpha)
    return nncf.quantize(
        model,
        nncf.Dataset(inputs),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(inputs),
        advanced_parameters=nncf.AdvancedQuantizationParameters(smooth_quant_alphas=smooth),
    )


def _vectors(compiled: Any, tower: str, inputs: Inputs) -> Float32:
    """The embeddings [N, D] of N inputs, each run on its own."""
    return np.concatenate([compiled({INPUT_NAMES[tower]: each})[EMBEDDINGS[tower]] for each in inputs])


def _texts(bundle: Bundle, sample: Int8Sample | None) -> _Halves:
    named = sample is not None and len(sample.texts) >= LEAST
    texts = _spread(sample.texts if named and sample else parity_texts(bundle.tokenizer))
    ids: Inputs = [tokens.ids[None] for tokens in bundle.tokenizer.encode(texts)]
    return _Halves(ids[::2], ids[1::2], sample.name if named and sample else "the captions of the package")


def _images(bundle: Bundle, sample: Int8Sample | None) -> _Halves:
    if sample is not None and len(sample.images) >= LEAST:
        pixels = [bundle.transform(path)[None] for path in _spread(sample.images)]
        return _Halves(pixels[::2], pixels[1::2], sample.name)
    photos = example_photos()
    calibration, judging = (
        [view for photo in half for view in _views(bundle, photo)] for half in (photos[::2], photos[1::2])
    )
    return _Halves(calibration, judging, "the photographs of the package and parts of them")


def _views(bundle: Bundle, path: Path) -> Iterator[NDArray[Any]]:
    """A photograph, and its four overlapping quarters."""
    from PIL import Image

    with Image.open(path) as photo:
        width, height = photo.size
        yield bundle.transform(photo)[None]
        for left in (0, width * 2 // 5):
            for top in (0, height * 2 // 5):
                yield bundle.transform(photo.crop((left, top, left + width * 3 // 5, top + height * 3 // 5)))[None]


def _spread(items: Sequence[Any]) -> list[Any]:
    """At most `MOST` items, from all over a sequence."""
    count = min(len(items), MOST)
    return [items[index * len(items) // count] for index in range(count)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps NNCF's bars, which it prints on stdout, and its log from the user."""
    # Not by its own function, which changes the handlers too: a program may have put its own there.
    nncf_logger = logging.getLogger("nncf")
    level = nncf_logger.level
    nncf_logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        nncf_logger.setLevel(level)
