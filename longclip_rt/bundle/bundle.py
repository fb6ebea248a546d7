"""The exported directory: both encoders, the tokenizer, and a manifest of what they are and how they were checked."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longclip_rt.bundle.manifest import MANIFEST, read_fields, write_fields
from longclip_rt.errors import BundleError, OutputError, PcaError
from longclip_rt.model.architecture import Architecture
from longclip_rt.model.preprocess import ImageTransform
from longclip_rt.model.tokenizer import Tokenizer
from longclip_rt.system.files import path_from_argument, sha256_of_file, sha256_of_json, write_text_atomically

if TYPE_CHECKING:
    from longclip_rt.pca.basis import Pca

logger = logging.getLogger("longclip_rt")

TOKENIZER = "tokenizer.json"
PCA = "pca.safetensors"
TOWERS = ("text", "image")
BUILT_IN = Path(__file__).parent.parent / "assets" / "tiny"


def onnx_name(tower: str, precision: str) -> str:
    """The file that holds a tower: `text.onnx`, or `text.fp16.onnx` for the half-precision graph."""
    return f"{tower}.onnx" if precision == "fp32" else f"{tower}.{precision}.onnx"


def int8_name(tower: str) -> str:
    """The file that holds a tower in int8, in OpenVINO's own format; its weights are in a `.bin` beside it."""
    return f"{tower}.int8.xml"


@dataclass(frozen=True)
class Bundle:
    """An exported model on disk.

    Attributes:
        path: Its directory.
        manifest: What `bundle.json` holds; README's "The bundle" lists the fields.
    """

    path: Path
    manifest: Mapping[str, Any]

    @cached_property
    def sha256(self) -> str:
        """What identifies the bundle: a hash over the model's numbers and the hashes of all files, not over dates."""
        return sha256_of_json({key: self.manifest[key] for key in ("architecture", "image", "outputs", "files")})

    @property
    def name(self) -> str:
        """The model's name for people, such as `ViT-B-16`."""
        return str(self.manifest["name"])

    @cached_property
    def architecture(self) -> Architecture:
        """The model's numbers."""
        return Architecture.from_dict(self.manifest["architecture"])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Texts to token ids, as many as the context length at most.

        Raises:
            BundleError: The file cannot be read, or is of a model with another vocabulary.
        """
        tokenizer = Tokenizer.from_file(self.file(TOKENIZER), self.architecture.context_length)
        if (tokenizer.vocab_size, tokenizer.eot) != (self.architecture.vocab_size, self.architecture.eot_id):
            raise BundleError(
                f"{self.file(TOKENIZER)} is another model's: it has {tokenizer.vocab_size} tokens and ends texts with "
                f"{tokenizer.eot}; the model has {self.architecture.vocab_size} and {self.architecture.eot_id}. "
                "Export or copy the bundle again."
            )
        return tokenizer

    @cached_property
    def transform(self) -> ImageTransform:
        """Images to crops and pixels."""
        image = self.manifest["image"]
        return ImageTransform(image["size"], tuple(image["mean"]), tuple(image["std"]))

    @property
    def trained(self) -> bool:
        """False where the weights are random numbers, made to test or to measure with."""
        return bool(self.manifest["trained"])

    @property
    def weights_sha256(self) -> str:
        """The SHA-256 of the weights that the graphs were made of; empty where it is not known."""
        return str(self.manifest["source"].get("sha256") or "")

    @cached_property
    def pca(self) -> Pca | None:
        """The PCA that the bundle carries, or None.

        Raises:
            PcaError: Its file is damaged, or is not the one that the manifest names.
        """
        from longclip_rt.pca.basis import load_pca

        if (named := self.manifest.get("pca")) is None:
            return None
        pca = load_pca(self.file(PCA))
        if pca.sha256 != named["sha256"]:
            raise PcaError(f"{self.file(PCA)} is not the PCA that the manifest names. Export or copy the bundle again.")
        return pca

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that there are graphs of: `fp32`, and `fp16` where it was exported."""
        return tuple(self.manifest["precisions"])

    @property
    def has_int8(self) -> bool:
        """Whether it was exported with --int8."""
        return self.manifest.get("int8") is not None

    def outputs(self, tower: str) -> tuple[str, ...]:
        """Names of a tower's outputs, in the graph's order."""
        return tuple(self.manifest["outputs"][tower])

    def file(self, name: str) -> Path:
        """The path of one of the bundle's files."""
        return self.path / name

    def onnx(self, tower: str, precision: str) -> Path:
        """The graph of `tower` (`text` or `image`) in `precision`.

        Raises:
            BundleError: The bundle was exported without this precision.
        """
        if precision not in self.precisions:
            raise BundleError(
                f"The bundle {self.path} holds {' and '.join(self.precisions)}, not {precision}. "
                f"Export it again with --{precision}, or choose one that it holds."
            )
        return self.file(onnx_name(tower, precision))


def bundles_home() -> Path:
    """Where `export` puts bundles unless told otherwise: `bundles` in the user's cache folder for this program."""
    from platformdirs import user_cache_path

    return user_cache_path("longclip-rt") / "bundles"


def load_bundle(path: str | Path, *, verify: bool = True) -> Bundle:
    """Opens a bundle and checks that it is whole.

    Every file is hashed the first time; afterwards only those whose size, date or inode is not the one noted then.

    Args:
        path: The bundle's directory.
        verify: False compares sizes only, for listings.

    Raises:
        BundleError: There is no bundle at `path`, it cannot be read, a file is missing or altered, or the format is
            newer than this program.
    """
    directory = path_from_argument(path, "A bundle", BundleError)
    try:
        return _loaded(directory, verify)
    except OSError as error:
        raise BundleError(f"The bundle {str(directory)!r} cannot be read: {error.strerror or error}.") from error


def _loaded(directory: Path, verify: bool) -> Bundle:
    manifest = _manifest(directory)
    bundle = Bundle(directory.resolve(), manifest)
    files: Mapping[str, Mapping[str, Any]] = manifest["files"]
    for name, expected in files.items():
        file = bundle.file(name)
        if not file.is_file():
            raise BundleError(f"The bundle {directory} lacks {name}. Export or copy it again.")
        if file.stat().st_size != expected["size"]:
            raise BundleError(
                f"{file} has {file.stat().st_size} bytes, and the manifest says {expected['size']}: the copy is "
                "incomplete or was changed. Export or copy the bundle again."
            )
    if verify:
        _check_hashes(bundle)
    return bundle


def _manifest(directory: Path) -> dict[str, Any]:
    graphs = {precision: [onnx_name(tower, precision) for tower in TOWERS] for precision in ("fp32", "fp16")}
    graphs["int8"] = [name for tower in TOWERS for name in (int8_name(tower), f"{tower}.int8.bin")]
    return read_fields(directory, {"all": [TOKENIZER], "pca": [PCA], **graphs})


def _check_hashes(bundle: Bundle) -> None:
    """Hashes the files that were not hashed before in the state that they are in."""
    noted, states = _noted(bundle), {}
    for name, expected in bundle.manifest["files"].items():
        state = bundle.file(name).stat()
        states[name] = [expected["sha256"], state.st_size, state.st_mtime_ns, state.st_ino]
        if noted.get(name) != states[name] and (found := sha256_of_file(bundle.file(name))) != expected["sha256"]:
            raise BundleError(
                f"{bundle.file(name)} is damaged: its SHA-256 is {found[:12]}..., and the manifest says "
                f"{str(expected['sha256'])[:12]}.... Export or copy the bundle again."
            )
    if noted != states:
        _note(bundle, states)


def _notes_file(bundle: Bundle) -> Path:
    return bundles_home().parent / "verified" / f"{sha256_of_json(str(bundle.path))}.json"


def _noted(bundle: Bundle) -> dict[str, Any]:
    """File -> its hash, size, date and inode when it was hashed last; empty where nothing is noted."""
    try:
        noted = json.loads(_notes_file(bundle).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _note(bundle: Bundle, states: Mapping[str, Any]) -> None:
    notes = _notes_file(bundle)
    try:
        notes.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(notes, json.dumps(states))
    except (OSError, OutputError) as error:
        # Without the note the next load hashes again: slower, and just as safe.
        logger.debug("could not note that %s was verified: %s", bundle.path, error)


def known_bundles() -> list[Bundle]:
    """The bundles in the cache folder, newest first, then the built-in one; those that cannot be read are logged."""
    directories: list[Path] = []
    home = bundles_home()
    if home.is_dir():
        directories = [entry.parent for entry in home.glob(f"*/{MANIFEST}") if not entry.parent.name.startswith(".")]
    directories.sort(key=lambda directory: (directory / MANIFEST).stat().st_mtime_ns, reverse=True)
    if (BUILT_IN / MANIFEST).is_file():
        directories.append(BUILT_IN)
    bundles = []
    for directory in directories:
        try:
            bundles.append(load_bundle(directory, verify=False))
        except BundleError as error:
            logger.warning("passed over a bundle: %s", error)
    return bundles


def find_bundle(sha256: str) -> Path | None:
    """The directory of the known bundle with this identity, or None."""
    return next((bundle.path for bundle in known_bundles() if bundle.sha256 == sha256), None)


def default_bundle() -> Bundle:
    """The newest exported bundle, else the built-in model; damaged ones are passed over, which is logged.

    Raises:
        BundleError: There is none.
    """
    for bundle in known_bundles():
        try:
            return load_bundle(bundle.path)
        except BundleError as error:
            logger.warning("passed over a bundle: %s", error)
    raise BundleError(
        f"There is no bundle in {bundles_home()} yet that can be used. Make one with: longclip-rt export --fp16 "
        "--weights BeichenZhang/LongCLIP-B (or name one with --bundle)."
    )


def rename_weights(directory: Path, name: str) -> Bundle:
    """Lets the manifest name the weights as `name` rather than by their place on this machine, which `export` notes.

    For a bundle that goes to others: only the torch backend, which reads the weights, misses the place. The bundle's
    identity stays as it is.

    Args:
        directory: The bundle's directory.
        name: What to call the weights, such as their file's name.

    Returns:
        The bundle, read anew.

    Raises:
        BundleError: There is no bundle in `directory`.
        OutputError: Its manifest cannot be written.
    """
    manifest = _manifest(directory)
    manifest["source"] = {**manifest["source"], "weights": name}
    write_fields(directory, manifest)
    return load_bundle(directory)


def write_manifest(directory: Path, fields: Mapping[str, Any]) -> None:
    """Hashes every file in `directory` and writes the manifest around `fields`, without their `files` and `format`."""
    files = {
        file.name: {"sha256": sha256_of_file(file), "size": file.stat().st_size}
        for file in sorted(directory.iterdir())
        if file.name != MANIFEST and file.is_file()
    }
    write_fields(directory, {**fields, "files": files})
