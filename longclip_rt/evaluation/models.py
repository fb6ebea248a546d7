"""Which models are evaluated: bundles, backends and precisions, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from longclip_rt.choices import BACKENDS, PRECISIONS
from longclip_rt.errors import InputError
from longclip_rt.runtime import Embedder
from longclip_rt.system.closing import closed_after

_Result = TypeVar("_Result")

_KEYS = ("bundle", "backend", "precision")


@dataclass(frozen=True)
class ModelSpec:
    """A model and what runs it.

    Attributes:
        bundle: Its folder; None: the newest exported one, else the built-in one.
        backend: `auto` or one of `BACKENDS`.
        precision: `auto` or one of `PRECISIONS`.
    """

    bundle: Path | None = None
    backend: str = "auto"
    precision: str = "auto"

    def open(self) -> Embedder:
        """Opens it.

        Raises:
            BundleError: There is no such bundle.
            BackendError: It cannot be run so here.
        """
        return Embedder.from_bundle(self.bundle, self.backend, self.precision)


def spec_from_text(text: str, bundle: Path | None) -> ModelSpec:
    """Reads `onnxruntime,fp16`, `other-bundle` or `bundle=other-bundle,backend=torch`.

    Args:
        text: Words with commas between: backends, precisions, else a bundle's folder; or `key=value`.
        bundle: The bundle where none is named.

    Raises:
        InputError: It is not understood.
    """
    found: dict[str, str] = {}
    for part in (part.strip() for part in text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key not in _KEYS:
            key, value = "backend" if part in BACKENDS else "precision" if part in PRECISIONS else "bundle", part
        if not value or key in found:
            raise InputError(
                f"{text!r} is not understood. Write words with commas between: one of the backends "
                f"{', '.join(BACKENDS)}, one of the precisions {', '.join(PRECISIONS)}, and a bundle's folder, each at "
                "most once."
            )
        found[key] = value
    folder = Path(found["bundle"]) if "bundle" in found else bundle
    return ModelSpec(folder, found.get("backend", "auto"), found.get("precision", "auto"))


@dataclass(frozen=True)
class Made:
    """What one model gave.

    Attributes:
        label: How tables call it; no two are the same.
        made_by: Model, bundle, backend, precision, device.
    """

    label: str
    made_by: dict[str, str]


def each_model(specs: Sequence[ModelSpec], work: Callable[[Embedder], _Result]) -> Iterator[tuple[Made, _Result]]:
    """Opens one model after the other, and gives what `work` made with it; no two are open at a time.

    Raises:
        InputError: Two of them are the same model, run in the same way.
    """
    seen: list[dict[str, str]] = []
    for spec in specs:
        with closed_after(spec.open()) as embedder:
            made_by = embedder.describe()
            if made_by in seen:
                raise InputError(
                    f"{_label(embedder, False)} is named twice, and would be compared with itself. Name another "
                    "backend, precision or bundle."
                )
            seen.append(made_by)
            labels = [(one["model"], one["backend"], one["precision"]) for one in seen[:-1]]
            twin = (made_by["model"], made_by["backend"], made_by["precision"]) in labels
            yield Made(_label(embedder, twin), made_by), work(embedder)


def _label(embedder: Embedder, twin: bool) -> str:
    """The model's name, backend and precision; and the bundle's folder where there is another one like it."""
    folder = f" ({embedder.bundle.path.name}, {embedder.bundle.sha256[:8]})" if twin else ""
    return f"{embedder.bundle.name}{folder}, {embedder.backend.name} {embedder.backend.precision}"
