"""CIFAR-10 and CIFAR-100 as they are downloaded: the Python release (pickles) and the binary one."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from longclip_rt.errors import InputError

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE


@dataclass(frozen=True)
class _Release:
    """Names of one release.

    Attributes:
        folders: Of the Python release and of the binary one.
        test: The file of the test images in each.
        meta: The file of the class names in each.
        keys: Of the labels and of the class names in the pickles.
        label_bytes: Before each image in the binary file; the last is the class.
    """

    folders: tuple[str, str]
    test: tuple[str, str]
    meta: tuple[str, str]
    keys: tuple[str, str]
    label_bytes: int


RELEASES: Mapping[str, _Release] = {
    "cifar10": _Release(
        ("cifar-10-batches-py", "cifar-10-batches-bin"),
        ("test_batch", "test_batch.bin"),
        ("batches.meta", "batches.meta.txt"),
        ("labels", "label_names"),
        1,
    ),
    "cifar100": _Release(
        ("cifar-100-python", "cifar-100-binary"),
        ("test", "test.bin"),
        ("meta", "fine_label_names.txt"),
        ("fine_labels", "fine_label_names"),
        2,
    ),
}


@dataclass(frozen=True)
class Cifar:
    """Test images.

    Attributes:
        images: uint8 [N, 32, 32, 3], RGB.
        labels: int64 [N].
        classes: Names, with blanks for underscores.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]


def cifar_kind(path: Path) -> str | None:
    """`cifar10` or `cifar100` where a folder is one of the releases, or holds it."""
    for kind, release in RELEASES.items():
        if _place(path, release) is not None:
            return kind
    return None


def _place(path: Path, release: _Release) -> tuple[Path, bool] | None:
    """The folder, and whether it is the binary release."""
    for number, name in enumerate(release.folders):
        for folder in (path, path / name):
            if (folder / release.test[number]).is_file() and (folder / release.meta[number]).is_file():
                return folder, bool(number)
    return None


def load_cifar(path: Path, kind: str) -> Cifar:
    """Reads the test images.

    Args:
        path: The release's folder, or one that holds it.
        kind: `cifar10` or `cifar100`.

    Raises:
        InputError: It is not there, or damaged.
    """
    release = RELEASES[kind]
    place = _place(path, release)
    if place is None:
        raise InputError(f"{str(path)!r} holds neither {' nor '.join(release.folders)}. Unpack the download there.")
    folder, binary = place
    test, meta = folder / release.test[binary], folder / release.meta[binary]
    if binary:
        rows = np.fromfile(test, np.uint8)
        width = release.label_bytes + _PIXELS
        if not len(rows) or len(rows) % width:
            raise InputError(f"{str(test)!r} has {len(rows)} bytes, not a multiple of {width}. Download it again.")
        rows = rows.reshape(-1, width)
        labels, pixels = rows[:, release.label_bytes - 1].astype(np.int64), rows[:, release.label_bytes :]
        names = [line for line in meta.read_text(encoding="utf-8", errors="replace").splitlines() if line]
    else:
        content, described = _unpickled(test), _unpickled(meta)
        try:
            labels = np.asarray(content[release.keys[0]], np.int64)
            pixels = np.asarray(content["data"], np.uint8)
            names = [str(name) for name in described[release.keys[1]]]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{str(test)!r} is not CIFAR's test file: {error}. Download it again.") from error
    if (
        labels.ndim != 1
        or pixels.shape != (labels.size, _PIXELS)
        or not labels.size
        or not 0 <= labels.min() <= labels.max() < len(names)
    ):
        raise InputError(f"{str(test)!r} does not fit its {len(names)} classes. Download it again.")
    images = pixels.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)  # planes of red, green, blue
    return Cifar(images, labels, tuple(name.replace("_", " ") for name in names))


class _Arrays(pickle.Unpickler):
    """Reads lists, texts and numpy's arrays, and refuses everything else: a pickle could run any code."""

    _KNOWN = (
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.numeric", "_frombuffer"),
        ("_codecs", "encode"),  # how bytes are written in old protocols
    )

    def find_class(self, module: str, name: str) -> Any:
        """The classes that an array is pickled with."""
        module = module.replace("numpy.core", "numpy._core")
        if (module, name) in self._KNOWN:
            return getattr(importlib.import_module(module), name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def _unpickled(path: Path) -> dict[str, Any]:
    def read(stream: IO[bytes]) -> Any:
        return _Arrays(stream, encoding="latin1").load()

    try:
        with path.open("rb") as stream:
            content = read(stream)
    except (
        # A damaged pickle can fail in any of these ways.
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        OverflowError,
        MemoryError,
    ) as error:
        raise InputError(f"{str(path)!r} is not CIFAR's pickle: {error}. Download it again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{str(path)!r} holds a {type(content).__name__}, not CIFAR's dictionary. Download it again.")
    return content
