"""Weights to a verified bundle: trace, lower, check, and only then give the folder its name."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from longclip_rt.bundle.bundle import (
    PCA,
    TOKENIZER,
    TOWERS,
    Bundle,
    bundles_home,
    load_bundle,
    write_manifest,
)
from longclip_rt.bundle.samples import example_photos
from longclip_rt.choices import ARCHITECTURES
from longclip_rt.errors import ExportError
from longclip_rt.export.int8 import Int8Sample, write_int8
from longclip_rt.export.onnx import OPSET, export_tower
from longclip_rt.export.precision import BlockActivation, half_tower
from longclip_rt.export.reference import reference_from_towers
from longclip_rt.export.rounding import RoundedHalfBackend
from longclip_rt.export.structure import structure_checks
from longclip_rt.export.tensorrt.head import head_checks, why_no_head, write_head, write_plugin_graphs
from longclip_rt.model.tokenizer import pad_tokens
from longclip_rt.model.towers import ImageTower, TextTower
from longclip_rt.model.vocabulary import tokenizer_json
from longclip_rt.opening import availability, open_backend
from longclip_rt.parity.gate import sample_for, verify_backend
from longclip_rt.parity.limits import Check, Reference, Sample
from longclip_rt.parity.self_check import IMAGES, TEXTS, write_self_check
from longclip_rt.pca.basis import Pca, check_mode, load_pca, save_pca
from longclip_rt.system.closing import closed_after
from longclip_rt.system.extras import require
from longclip_rt.system.files import directory_in_the_making, write_text_atomically
from longclip_rt.weights.checkpoint import Checkpoint, load_checkpoint, towers_from_checkpoint

logger = logging.getLogger("longclip_rt")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ExportOptions:
    """What to export.

    Attributes:
        weights: Anything `load_checkpoint` takes.
        out: The bundle's directory; None for one named after the model in the cache folder.
        fp16: Whether to add the half-precision graphs.
        outputs: Further outputs beside the embeddings, such as `pooler_output` (of both towers) or
            `text:hidden_states.-2` (of one).
        activation: `quick_gelu` or `gelu`, where the weights do not say; None leaves it to `load_checkpoint`.
        pca: File of a PCA of this model's embeddings; the graphs then have the outputs `text_pca` and `image_pca`.
        pca_mode: What these are, `project` or `reconstruct`.
        pca_in_engine: Whether to add fp16 graphs with the plug-in `longclip::pca_head` in the PCA's place.
        verify: False leaves the gate out, for a bundle that only its speed is asked of.
        int8: Whether to add models in int8 for OpenVINO.
        int8_sample: What these are calibrated and judged on; None for what ships with the package.
    """

    weights: str
    out: Path | None = None
    fp16: bool = False
    outputs: tuple[str, ...] = ()
    activation: Literal["quick_gelu", "gelu"] | None = None
    pca: Path | None = None
    pca_mode: str = "project"
    pca_in_engine: bool = False
    verify: bool = True
    int8: bool = False
    int8_sample: Int8Sample | None = None


@dataclass(frozen=True)
class ParityReport:
    """What the gate found.

    Attributes:
        checks: Every check, in the order in which it ran.
        activations: The largest activation of every block.
        texts: Number of texts in the sample.
        images: Number of photographs in the sample.
    """

    checks: tuple[Check, ...]
    activations: tuple[BlockActivation, ...]
    texts: int
    images: int

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return {
            "texts": self.texts,
            "images": self.images,
            "checks": [check.to_dict() for check in self.checks],
            "activations": [
                {"tower": entry.tower, "block": entry.block, "largest": entry.largest, "where": entry.where,
                 "headroom": entry.headroom, "kept_fp32": entry.keep_fp32}
                for entry in self.activations
            ],
        }  # fmt: skip


class ParityError(ExportError):
    """The exported files are not what the towers are; no bundle was written. `report` says where they differ."""

    def __init__(self, message: str, report: ParityReport) -> None:
        super().__init__(message)
        self.report = report


def export_bundle(options: ExportOptions, progress: Progress = lambda stage: None) -> tuple[Bundle, ParityReport]:
    """Exports weights to a bundle whose every file has passed the parity gate.

    The gate runs the files with ONNX Runtime (the fp16 graphs a second time with every intermediate result rounded to
    fp16, as on a GPU), and with OpenVINO in fp32 and, where the CPU computes in it, bf16: what the runtime will use.

    Args:
        options: What to export and where to.
        progress: Called with a few words as each of `stages(options)` begins.

    Returns:
        The bundle and the gate's report, which the manifest holds too.

    Raises:
        ParityError: A check failed; nothing was written.
        WeightsError: The weights cannot be used.
        ExportError: The exporter failed.
        PcaError: The PCA cannot be read, or is another model's.
        OutputError: The directory exists or cannot be written.
        MissingExtraError: A package is not installed; the message names the extra.
    """
    _check(options)
    progress("reading weights")
    checkpoint = load_checkpoint(options.weights, activation=options.activation)
    for note in checkpoint.notes:
        logger.info("%s: %s", options.weights, note)
    pca = None if options.pca is None else load_pca(options.pca)
    text, image = _towers(checkpoint, options, pca)
    target = options.out or _free_directory(checkpoint)
    with directory_in_the_making(target) as staging:
        fields = _manifest_fields(checkpoint, options, text, image, pca)
        bundle = Bundle(staging, {**fields, "files": {}})  # their hashes come last
        arch = checkpoint.architecture
        write_text_atomically(staging / TOKENIZER, tokenizer_json(arch.context_length, arch.vocab_size))
        sample = sample_for(bundle)
        progress("running the torch towers")
        reference, activations = reference_from_towers(text, image, sample)
        _refuse_without_vectors(reference, options.weights)
        if pca is not None:
            save_pca(pca, staging / PCA)
            reference = reference.with_pca(pca, options.pca_mode)
        checks = [*_write_graphs(bundle, text, image, activations, progress)]
        if options.int8:
            fields["int8"], fidelity_checks = write_int8(bundle, options.int8_sample, progress)
            bundle = Bundle(staging, {**fields, "files": {}})
            checks += fidelity_checks
        checks += [
            *(_gate(bundle, sample, reference, progress) if options.verify else ()),
            *_write_head(bundle, text, image, options, sample, reference, progress),
        ]
        report = ParityReport(tuple(checks), activations, len(sample.tokens), len(sample.pixels))
        if report.failed:
            raise ParityError(
                f"The export of {options.weights} failed {len(report.failed)} of {len(checks)} checks, so no bundle "
                f"was written. {_advice(report)}",
                report,
            )
        _keep_self_check(bundle, sample, reference)
        progress("hashing")
        write_manifest(staging, {**fields, "parity": report.to_dict()})
    return load_bundle(target), report


def _advice(report: ParityReport) -> str:
    if all(check.precision == "int8" for check in report.failed):
        return "All are of int8: leave --int8 out, or calibrate on more of your own inputs with --int8-sample."
    return "Please report this with the table above; another torch or onnxruntime version may help."


def _refuse_without_vectors(reference: Reference, weights: str) -> None:
    """Refuses weights whose vectors are no unit vectors even as torch computes them in fp32."""
    for tower in TOWERS:
        lengths = np.linalg.norm(reference.outputs[tower][f"{tower}_embeds"], axis=1)
        broken = int((~(np.abs(lengths - 1) < 1e-3)).sum())  # not-a-number too
        if broken:
            raise ExportError(
                f"{weights} gives {broken} of {len(lengths)} {tower}s of the sample no vector: numbers "
                "overflow, or all are zero. The weights are broken, as of a training that diverged; export others."
            )


def _check(options: ExportOptions) -> None:
    """Refuses, and says how to go on, before minutes of work."""
    for module, extra in (("torch", "export"), ("open_clip", "export"), ("onnxruntime", "cpu")):
        require(module, extra)
    if options.int8:
        require("nncf", "int8")
        if not availability("openvino").usable:
            raise ExportError("int8 models are OpenVINO's, which cannot be used here. Leave --int8 out.")
    if options.out is not None and options.out.exists():
        with directory_in_the_making(options.out):
            pass
    check_mode(options.pca_mode)
    if options.pca_in_engine and (options.pca is None or not options.fp16):
        raise ExportError("--pca-in-engine puts a PCA into fp16 graphs. Add --fp16 and --pca FILE.")


def _towers(checkpoint: Checkpoint, options: ExportOptions, pca: Pca | None) -> tuple[TextTower, ImageTower]:
    """Both, with the outputs that were asked for."""
    text, image = towers_from_checkpoint(checkpoint)
    text = text.with_outputs(_outputs(text, options.outputs))
    image = image.with_outputs(_outputs(image, options.outputs))
    if pca is None:
        return text, image
    pca.check_model(checkpoint.architecture.name, checkpoint.architecture.embed_dim, checkpoint.sha256 or "")
    return text.with_pca(pca, options.pca_mode), image.with_pca(pca, options.pca_mode)


def _gate(bundle: Bundle, sample: Sample, reference: Reference, progress: Progress) -> Iterator[Check]:
    """Runs the files with everything that may run them."""
    for runtime, precision in _runtimes("fp16" in bundle.precisions, bundle.has_int8):
        progress(f"checking with {runtime} in {precision}")
        rounded = runtime == RoundedHalfBackend.name
        with closed_after(
            RoundedHalfBackend(bundle) if rounded else open_backend(bundle, runtime, precision)
        ) as backend:
            yield from verify_backend(backend, sample, reference)


def _write_head(
    bundle: Bundle,
    text: TextTower,
    image: ImageTower,
    options: ExportOptions,
    sample: Sample,
    reference: Reference,
    progress: Progress,
) -> Iterator[Check]:
    """Adds the PCA head for engines, where the bundle has a PCA and fp16 graphs."""
    if bundle.pca is None or not options.fp16:
        return
    progress("compiling the PCA head")
    if reason := why_no_head(text, image, options.pca_mode):
        if options.pca_in_engine:
            raise ExportError(f"The PCA cannot be put into the engine: {reason}. Leave --pca-in-engine out.")
        logger.info("the bundle has no PCA head for GPUs beside its graphs: %s", reason)
        return
    write_head(bundle.path, text, image, bundle.pca, ARCHITECTURES)
    yield from head_checks(bundle, sample, reference, ARCHITECTURES[0])
    if options.pca_in_engine:
        write_plugin_graphs(bundle, ARCHITECTURES[0])


def stages(options: ExportOptions) -> int:
    """How many times `export_bundle` calls `progress`."""
    graphs = len(TOWERS) * (2 if options.fp16 else 1)
    graphs += len(TOWERS) * options.int8
    return 3 + graphs + len(_runtimes(options.fp16, options.int8)) + (options.fp16 and options.pca is not None)


def _runtimes(fp16: bool, int8: bool) -> list[tuple[str, str]]:
    """What the gate runs the files with: fp16 as a GPU rounds it, and every pair it may pick on this machine."""
    runtimes = [("onnxruntime", "fp32")]
    if fp16:
        runtimes += [(RoundedHalfBackend.name, "fp16"), ("onnxruntime", "fp16")]
    offered = (*availability("openvino").precisions, *(("int8",) if int8 else ()))
    return runtimes + [("openvino", precision) for precision in ("fp32", "bf16", "int8") if precision in offered]


def _outputs(tower: TextTower | ImageTower, names: tuple[str, ...]) -> list[str]:
    """The embedding first, then what was asked for of this tower, once each."""
    kind = "text" if isinstance(tower, TextTower) else "image"
    chosen = [tower.embedding]
    for name in names:
        target, colon, output = name.rpartition(":")
        if colon and target not in TOWERS:
            raise ExportError(
                f"There is no {target!r} tower; write --output-name {output}, text:{output} or image:{output}."
            )
        if target in ("", kind) and output not in chosen:
            chosen.append(output)
    return chosen


def _free_directory(checkpoint: Checkpoint) -> Path:
    """A new directory in the cache folder, named after the model and its weights' hash."""
    stem = f"{checkpoint.architecture.name}{'' if checkpoint.trained else '-untrained'}-{(checkpoint.sha256 or '')[:8]}"
    candidates = (bundles_home() / (stem if number == 1 else f"{stem}-{number}") for number in range(1, 10_000))
    return next(directory for directory in candidates if not directory.exists())


def _keep_self_check(bundle: Bundle, sample: Sample, reference: Reference) -> None:
    """Keeps a few of the sample's inputs, from the shortest to the longest text, and what the towers gave for them."""
    by_length = sorted(range(len(sample.tokens)), key=lambda index: len(sample.tokens[index]))
    count = min(TEXTS, len(by_length))
    chosen = [by_length[index * (len(by_length) - 1) // max(count - 1, 1)] for index in range(count)]
    ids = pad_tokens([sample.tokens[index] for index in chosen], bundle.architecture.context_length)
    crops = np.stack([bundle.transform.crop(photo) for photo in example_photos()[:IMAGES]])
    expected = {
        "text": {name: rows[chosen] for name, rows in reference.outputs["text"].items()},
        "image": {name: rows[:IMAGES] for name, rows in reference.outputs["image"].items()},
    }
    write_self_check(bundle.path, ids, crops, expected, reference.spans)


def _write_graphs(
    bundle: Bundle,
    text: TextTower,
    image: ImageTower,
    activations: Sequence[BlockActivation],
    progress: Progress,
) -> Iterator[Check]:
    for precision in bundle.precisions:
        towers: tuple[TextTower | ImageTower, ...] = (text, image)
        for kind, tower in zip(TOWERS, towers, strict=True):
            progress(f"exporting {kind} in {precision}")
            kept = [entry.block for entry in activations if entry.tower == kind and entry.keep_fp32]
            kept = kept if precision == "fp16" else []
            path = bundle.onnx(kind, precision)
            export_tower(half_tower(tower, kept) if precision == "fp16" else tower, path)
            yield from structure_checks(path, kind, precision, len(tower.blocks), len(kept))


def _manifest_fields(
    checkpoint: Checkpoint, options: ExportOptions, text: TextTower, image: ImageTower, pca: Pca | None
) -> dict[str, Any]:
    architecture = checkpoint.architecture
    local = Path(options.weights)
    return {
        "name": architecture.name,
        "trained": checkpoint.trained,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "architecture": architecture.to_dict(),
        "context_length": architecture.context_length,
        "image": {
            "size": architecture.image_size,
            "mean": list(checkpoint.image_mean),
            "std": list(checkpoint.image_std),
        },
        "outputs": {"text": list(text.outputs), "image": list(image.outputs)},
        "precisions": ["fp32", "fp16"] if options.fp16 else ["fp32"],
        "opset": OPSET,
        "source": {
            "weights": str(local.resolve()) if local.exists() else options.weights,
            "sha256": checkpoint.sha256,
            "activation": "quick_gelu" if architecture.quick_gelu else "gelu",
            "notes": list(checkpoint.notes),
        },
        "tools": {
            name: _version(name)
            for name in ("longclip-rt", "torch", "open_clip_torch", "onnx", "onnxscript", "onnxruntime", "openvino")
        },
        **(
            {} if pca is None else {"pca": {"sha256": pca.sha256, "k": pca.k, "mode": options.pca_mode, "fit": pca.fit}}
        ),
    }


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed as a package"
