"""Weights files to raw tensors: torch archives (data only, never code) and safetensors, told apart by their content."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longclip_rt.errors import WeightsError
from longclip_rt.model.architecture import few
from longclip_rt.system.extras import require
from longclip_rt.system.files import sha256_of_file

# What is taken where a folder or repository holds several files of weights, in this order. open_clip's come first: in
# timm's repositories they are the whole CLIP, and model.safetensors is the image tower alone.
_PREFERRED = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
"""Endings of files that may hold weights."""

_INDEX = ".index.json"
_MOST_WRAPPERS = 8


@dataclass(frozen=True)
class RawWeights:
    """The content of a weights file, before any name was looked at.

    Attributes:
        content: Usually names to tensors; a torch archive may wrap them in further dictionaries or hold something else.
        sha256: Hash of the file; None where the weights are split over several.
        metadata: The strings that a safetensors file carries beside its tensors.
    """

    content: Any
    sha256: str | None
    metadata: dict[str, str] = field(default_factory=dict)


def choose_weights(names: Collection[str], source: str) -> str:
    """Chooses the file of weights among the files of a folder or repository.

    The usual names come first, then a single safetensors file, then a single file of another kind. Files in subfolders
    count only where there is none at the top.

    Args:
        names: Paths relative to the folder, with forward slashes.
        source: What the user named, for error messages.

    Returns:
        One of `names`.

    Raises:
        WeightsError: There is none, or there are several that might be meant (named).
    """
    for name in _PREFERRED:
        if name in names:
            return name
    # Parts of split weights, and what trainers leave beside a model.
    beside = re.compile(r".*-\d{5}-of-\d{5}\.\w+|(training_args|optimizer|scheduler|rng_state|scaler)\b.*")
    found = [n for n in names if n.endswith(SUFFIXES) and not beside.fullmatch(n.rpartition("/")[2])]
    found = sorted(n for n in found if "/" not in n) or sorted(found)
    found = [n for n in found if n.endswith(".safetensors")] or found
    if not found:
        raise WeightsError(f"{source} holds no file of weights ({', '.join(SUFFIXES)}).")
    if len(found) > 1:
        raise WeightsError(
            f"{source} holds several files of weights; name one of them: "
            + ", ".join(f"{source.rstrip('/')}/{name}" for name in found)
            + "."
        )
    return found[0]


def read_weights(path: Path) -> RawWeights:
    """Reads a weights file, or the index of one that is split (`*.safetensors.index.json`).

    A torch archive is read with `weights_only`: tensors and plain containers, no code.

    Args:
        path: An existing file.

    Returns:
        Its content, with every tensor on the CPU.

    Raises:
        WeightsError: The file is empty, damaged, of another kind, or would have to run code to be read.
        MissingExtraError: torch or safetensors is not installed.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
        size = path.stat().st_size
    except OSError as error:
        raise WeightsError(f"Cannot read {path}: {error.strerror}.") from error
    _refuse_stand_ins(path, head)
    if path.name.endswith(_INDEX):
        return _read_split(path)
    # A safetensors file begins with the length of its JSON header, 8 bytes little-endian, and the header itself. One
    # such length in 32 begins as a pickle does, with 0x80; no pickle goes on with four zeros and a brace.
    is_pickle = head.startswith(b"\x80") and head[4:9] != b"\0\0\0\0{"
    if is_pickle or head.startswith(b"PK\x03\x04"):
        return RawWeights(_read_torch(path, head), sha256_of_file(path))
    if len(head) > 8 and head[8:9] == b"{":
        tensors, metadata = _read_safetensors(path, size)
        return RawWeights(tensors, sha256_of_file(path), metadata)
    raise WeightsError(
        f"{path} is neither a torch archive nor a safetensors file: it begins with {head[:8]!r}. "
        "If it was downloaded, it may be damaged; download it again."
    )


def _refuse_stand_ins(path: Path, head: bytes) -> None:
    """Refuses what often lies in the place of weights."""
    if not head:
        raise WeightsError(f"{path} is empty. Download it again.")
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise WeightsError(
            f"{path} is a Git LFS pointer, not the weights themselves. Run `git lfs pull` in its repository, or "
            "download the file from the hub's page."
        )
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise WeightsError(f"{path} is a web page, not weights. Download the file itself (its `resolve` link).")
    if head.startswith(b"GGUF"):
        raise WeightsError(f"{path} is a GGUF file (quantised). Pass the original weights: .pt or .safetensors.")


def _read_torch(path: Path, head: bytes) -> Any:
    torch = require("torch", "export")
    if head.startswith(b"PK"):
        _check_archive(path)
    try:
        # A stream, because torch goes by the ending of a file's name, and names lie.
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise WeightsError(
                f"{path} is damaged, or no torch archive: {_first_line(error)} Download it again."
            ) from error
        raise WeightsError(
            f"{path} holds code: its pickle calls for {found[1]}, and running code from a weights file is refused. "
            "Where you trust it, load it in Python, save model.state_dict() alone, and pass that file."
        ) from error
    # torch reports damaged archives through almost any exception, depending on which byte is wrong.
    except Exception as error:
        raise WeightsError(f"{path} is damaged or cut short ({_first_line(error)}). Download it again.") from error


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise WeightsError(f"{path} is a torch archive that was cut short ({error}). Download it again.") from error
    names = [entry.filename for entry in entries]
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise WeightsError(
            f"{path} is a zip archive that unpacks to more than its own size. torch compresses nothing, so that this "
            "may be a bomb; load it in Python where you trust it, and save model.state_dict() again."
        )
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise WeightsError(
            f"{path} is a TorchScript archive: a program, not plain weights (OpenAI's own CLIP files are such). "
            "For OpenAI's weights pass open_clip:ViT-B-16/openai (or another model of theirs) instead; "
            "of your own model, save model.state_dict()."
        )
    if not any(name.endswith("/data.pkl") for name in names):
        raise WeightsError(f"{path} is a zip archive of something else (it holds {few(names)}), not torch weights.")


def _read_safetensors(path: Path, size: int) -> tuple[dict[str, Any], dict[str, str]]:
    safetensors = require("safetensors", "export")
    require("torch", "export")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            # Copied, because the file is mapped: it may change or vanish while the weights are in use.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
            return tensors, dict(file.metadata() or {})
    # Among them what torch raises for types and sizes that it cannot hold.
    except (
        safetensors.SafetensorError,
        ValueError,
        RuntimeError,
        OSError,
        MemoryError,
        TypeError,
        AttributeError,
        KeyError,
        OverflowError,
    ) as error:
        raise WeightsError(
            f"{path} is no readable safetensors file of {size} bytes ({_first_line(error)}). "
            "It is damaged or cut short; download it again."
        ) from error


def _read_split(path: Path) -> RawWeights:
    """Joins the parts that a `*.index.json` names; they lie beside it."""
    tensors: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    parts = split_parts(path)
    for name in parts:
        part = path.with_name(name)
        if not part.is_file():
            raise WeightsError(f"{path} names the part {name}, which is missing beside it. Download it too.")
        raw = read_weights(part)
        if not isinstance(raw.content, dict):
            raise WeightsError(f"{part} holds a {type(raw.content).__name__}, not named tensors.")
        if twice := tensors.keys() & raw.content.keys():
            raise WeightsError(
                f"{path}: several parts hold {few(sorted(map(str, twice)))}. Which one is meant cannot be known; "
                "download the weights again."
            )
        tensors |= raw.content
        metadata |= raw.metadata
    return RawWeights(tensors, None, metadata)


def split_parts(index: Path) -> list[str]:
    """The file names, in order, that the index of split weights calls for.

    Raises:
        WeightsError: The index is no such JSON, or points out of its own folder.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(
            f"{index} is no index of split weights: its JSON has no weight_map of file names."
        ) from error
    for name in names:
        if not isinstance(name, str) or not name or Path(name).name != name or name.endswith(_INDEX):
            raise WeightsError(f"{index} names the part {name!r}, which is not a file of weights beside it.")
    return names


def tensors_of(content: Any, source: str) -> dict[str, Any]:
    """Finds the tensors in what a file held: unwraps `{"state_dict": ...}` and the like, drops shared prefixes.

    Args:
        content: What `read_weights` returned.
        source: What the user named, for error messages.

    Returns:
        Names to tensors.

    Raises:
        WeightsError: There is no dictionary of named tensors.
    """
    torch = require("torch", "export")
    wrappers = ("state_dict", "model_state_dict", "model", "module", "net", "model_ema", "ema")
    for _ in range(_MOST_WRAPPERS + 1):
        held = content if isinstance(content, dict) else {}
        inner = next((held[name] for name in wrappers if isinstance(held.get(name), dict)), None)
        if inner is None:
            break
        content = inner
    else:
        raise WeightsError(
            f"{source} wraps its tensors in more than {_MOST_WRAPPERS} dictionaries, or in one that holds itself. Save "
            "model.state_dict() alone, and pass that file."
        )
    if not isinstance(content, dict) or not content or not all(isinstance(name, str) for name in content):
        what = "an empty dictionary" if content == {} else f"a {type(content).__name__}"
        raise WeightsError(f"{source} holds {what}, not a state dict of named tensors.")
    odd = [name for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if len(odd) == len(content):
        raise WeightsError(f"{source} holds no tensors under the names {few(odd)}; a state dict was expected.")
    return _without_prefixes({name: content[name] for name in content if name not in odd})


def _without_prefixes(tensors: dict[str, Any]) -> dict[str, Any]:
    """Drops what wrappers put before every name: data parallelism, compilation, a class around the model."""
    prefixes = ("module.", "_orig_mod.", "model.", "clip_model.", "clip.")
    while True:
        prefix = next((one for one in prefixes if all(name.startswith(one) for name in tensors)), None)
        if prefix is None:
            return tensors
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
