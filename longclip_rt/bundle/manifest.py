"""`bundle.json`: what it must hold, checked where it is read, and a hash of its own content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from longclip_rt.errors import BundleError, WeightsError
from longclip_rt.model.architecture import Architecture
from longclip_rt.system.files import sha256_of_json, write_text_atomically

FORMAT_VERSION = 2
MANIFEST = "bundle.json"

_LARGEST = 16 << 20  # bytes; a real one has some 30 KiB

Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Mean = Annotated[float, Meta(ge=0, le=1)]
Deviation = Annotated[float, Meta(ge=1 / 255, le=1)]
Name = Annotated[str, Meta(min_length=1)]
Outputs = Annotated[list[Name], Meta(min_length=1)]


class _Image(msgspec.Struct):
    size: Annotated[int, Meta(ge=1)]
    mean: tuple[Mean, Mean, Mean]
    std: tuple[Deviation, Deviation, Deviation]


class _Outputs(msgspec.Struct):
    text: Outputs
    image: Outputs


class _Source(msgspec.Struct):
    weights: str
    sha256: str | None
    activation: Literal["quick_gelu", "gelu"]


class _Pca(msgspec.Struct):
    sha256: str
    mode: Literal["project", "reconstruct"]


class _File(msgspec.Struct):
    sha256: Sha256
    size: Annotated[int, Meta(ge=0)]


class _Manifest(msgspec.Struct):
    """The fields that something here goes by; others (versions, date, the parity report) are for people."""

    format: int
    content: Sha256
    name: Name
    trained: bool
    architecture: dict[str, int | bool]
    context_length: Annotated[int, Meta(ge=2)]
    image: _Image
    outputs: _Outputs
    precisions: Annotated[list[Literal["fp32", "fp16"]], Meta(min_length=1)]
    source: _Source
    files: Annotated[dict[str, _File], Meta(min_length=1)]
    pca: _Pca | None = None
    int8: dict[str, Any] | None = None


def content_hash(fields: Mapping[str, Any]) -> str:
    """The SHA-256 of all fields but `content`, which holds it."""
    return sha256_of_json({key: value for key, value in fields.items() if key != "content"})


def write_fields(directory: Path, fields: Mapping[str, Any]) -> None:
    """Writes the manifest, with the format and the hash of what it holds.

    Raises:
        OutputError: The disk refuses.
    """
    whole = {"format": FORMAT_VERSION, **{key: value for key, value in fields.items() if key != "content"}}
    text = json.dumps({**whole, "content": content_hash(whole)}, indent=2) + "\n"
    write_text_atomically(directory / MANIFEST, text)


def read_fields(directory: Path, needed: Mapping[str, list[str]]) -> dict[str, Any]:
    """Reads the manifest of a bundle.

    Args:
        directory: The bundle's.
        needed: Files that it must list: for each precision, for a `pca`, for `int8`, and in any case (`all`).

    Raises:
        BundleError: There is none, or a field is absent, of another type, out of its range, or altered.
    """
    file = directory / MANIFEST
    if not file.is_file():
        hint = "is no directory" if not directory.is_dir() else f"holds no {MANIFEST}"
        raise BundleError(
            f"{directory} {hint}, so it is no bundle. Make one with: longclip-rt export --out {directory}"
        )
    again = "Export or copy the bundle again."
    try:
        with file.open("rb") as stream:
            content = stream.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise BundleError(f"{file} is larger than {_LARGEST >> 20} MiB, so it is no manifest. {again}")
        fields = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise BundleError(f"{file} cannot be read as JSON ({reason}). {again}") from error
    if not isinstance(fields, dict) or type(fields.get("format")) is not int:
        raise BundleError(f"{file} is not a manifest of this program: it has no format number.")
    if fields["format"] > FORMAT_VERSION:
        raise BundleError(
            f"The bundle {directory} has format {fields['format']}; this version reads {FORMAT_VERSION}. "
            "Update with: pip install -U longclip-rt"
        )
    if fields["format"] < FORMAT_VERSION:
        raise BundleError(
            f"The bundle {directory} was exported by an older version (format {fields['format']}), which noted no hash "
            "of the manifest itself. Export it again with: longclip-rt export"
        )
    try:
        manifest = msgspec.convert(fields, _Manifest)
        architecture = Architecture.from_dict(manifest.architecture)
    except (msgspec.ValidationError, WeightsError, RecursionError, UnicodeError) as error:
        reason = str(error) or "it nests too deeply"
        raise BundleError(f"{file} does not say what it should: {reason}. {again}") from error
    if unsafe := [name for name in manifest.files if Path(name).name != name or name in ("", "..") or "\0" in name]:
        raise BundleError(f"{file} names files outside the bundle ({', '.join(unsafe)}); it will not be used.")
    wanted = [*needed["all"], *(name for each in manifest.precisions for name in needed[each])]
    wanted += needed["pca"] if manifest.pca is not None else []
    wanted += needed["int8"] if manifest.int8 is not None else []
    if missing := [name for name in wanted if name not in manifest.files]:
        raise BundleError(f"{file} lists no {', '.join(missing)}. {again}")
    told = {"context_length": manifest.context_length, "image_size": manifest.image.size}
    if wrong := [name for name, value in told.items() if getattr(architecture, name) != value]:
        raise BundleError(f"{file} contradicts itself: {', '.join(wrong)} is not the architecture's. {again}")
    if manifest.content != content_hash(fields):
        raise BundleError(f"{file} was changed after the export: its content has another hash than it says. {again}")
    return fields
