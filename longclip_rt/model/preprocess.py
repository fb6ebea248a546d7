"""Images to float32 pixels, without torch.

Equal to torchvision's `Resize(n, BICUBIC)`, `CenterCrop(n)`, `convert("RGB")`, `ToTensor`, `Normalize` on PIL images,
in this order, bit for bit: an image is resized in its own mode, so that a palette image is resized by nearest
neighbour, and an EXIF orientation is left to Pillow, which applies it to TIFF files only.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from longclip_rt.errors import InputError
from longclip_rt.model.architecture import CLIP_MEAN, CLIP_STD
from longclip_rt.system.files import tells_of_system

ImageSource = str | Path | bytes | Image.Image

# Without a handler, Python would print the remarks of Pillow's decoders on damaged files to stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class ImageTransform:
    """CLIP's image transform. Threads may share one; no state of Pillow is changed.

    Attributes:
        size: Height and width n of the crop, in pixels.
        mean: Channel means in [0, 1], red, green, blue.
        std: Channel standard deviations in [0, 1], red, green, blue.
        max_pixels: Images of more pixels, before or after the resize, are refused undecoded. Pillow's own limit,
            `PIL.Image.MAX_IMAGE_PIXELS` times two, applies as well and is the same number by default.
    """

    size: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    max_pixels: int = 178_956_970

    def __call__(self, source: ImageSource) -> npt.NDArray[np.float32]:
        """Turns one image into the image tower's input.

        Args:
            source: As for `crop`.

        Returns:
            float32 [3, size, size].

        Raises:
            InputError: As for `crop`.
        """
        return cast("npt.NDArray[np.float32]", self.normalize(self.crop(source)[np.newaxis])[0])

    def crop(self, source: ImageSource) -> npt.NDArray[np.uint8]:
        """Decodes an image, resizes its shorter side to `size` and cuts out the centre.

        An animation gives its first frame. Grey values over 255 of 16-bit and 32-bit images become white, as in the
        reference; scale such images yourself and pass the PIL image.

        Args:
            source: A file's path, a file's content, or a PIL image, which is left open and read at its current frame.

        Returns:
            uint8 [size, size, 3], RGB.

        Raises:
            InputError: The file is absent, empty, not an image, damaged or too large.
            OSError: Open files or memory ran out.
        """
        name = _name(source)
        with _muted_warnings():
            try:
                if isinstance(source, Image.Image):
                    return self._cropped(source, name)
                with _opened(source, name) as image:
                    return self._cropped(image, name)
            except InputError:
                raise
            except UnidentifiedImageError as error:
                raise InputError(f"{name} is not an image, or of a format that Pillow cannot read.") from error
            except Image.DecompressionBombError as error:
                raise InputError(f"{name} is too large to decode. {error} Scale it down.") from error
            except MemoryError as error:
                raise InputError(f"{name} needs more memory than there is, or is damaged. Scale it down.") from error
            except Exception as error:
                if isinstance(error, OSError) and tells_of_system(error):
                    raise
                # Pillow promises no list of what its forty decoders raise on damaged data. 200,000 damaged files gave
                # OSError, ValueError and SyntaxError; struct.error, EOFError and others can be read in its code.
                detail = f"{type(error).__name__}: {error}".splitlines()[0]
                raise InputError(f"{name} cannot be decoded, it seems truncated or damaged ({detail}).") from error

    def normalize(self, crops: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Scales pixels to [0, 1], subtracts the mean and divides by the standard deviation.

        Args:
            crops: uint8 [B, H, W, 3].

        Returns:
            float32 [B, 3, H, W], contiguous.

        Raises:
            InputError: Another shape or dtype.
        """
        if not isinstance(crops, np.ndarray):
            raise InputError(f"Crops must be one numpy array, uint8 [B, H, W, 3]; got {type(crops).__name__}.")
        if crops.dtype != np.uint8 or crops.ndim != 4 or crops.shape[3] != 3:
            raise InputError(f"Crops of {crops.dtype} {list(crops.shape)} were given; expected uint8 [B, H, W, 3].")
        pixels = np.empty((crops.shape[0], 3, *crops.shape[1:3]), np.float32)
        for channel, levels in enumerate(self._levels):
            # "clip" spares numpy a buffered copy; every uint8 is a valid index.
            np.take(levels, crops[..., channel], out=pixels[:, channel], mode="clip")
        return pixels

    @cached_property
    def _levels(self) -> npt.NDArray[np.float32]:
        """Normalised value of each uint8, float32 [3, 256], rounded after each step as torch does."""
        mean, std = (np.array(values, np.float32)[:, np.newaxis] for values in (self.mean, self.std))
        levels: npt.NDArray[np.float32] = (np.arange(256, dtype=np.float32) / np.float32(255) - mean) / std
        return levels

    def _cropped(self, image: Image.Image, name: str) -> npt.NDArray[np.uint8]:
        width, height = image.size
        if min(width, height) == 0:
            raise InputError(f"{name} has no pixels: it is {width} x {height}.")
        if width * height > self.max_pixels:
            raise InputError(
                f"{name} is {width} x {height} = {width * height:,} pixels; at most {self.max_pixels:,} are decoded. "
                "Scale it down, or raise max_pixels."
            )
        resized = _resized(width, height, self.size)
        if resized[0] * resized[1] > self.max_pixels:
            raise InputError(
                f"{name} is too elongated: at {width} x {height} pixels it would be resized to "
                f"{resized[0]} x {resized[1]}. Crop it first."
            )
        if resized != (width, height):
            image = image.resize(resized, Image.Resampling.BICUBIC)
        # Python rounds halves to even, as torchvision's centre crop does.
        left, top = (round((side - self.size) / 2) for side in resized)
        box = (left, top, left + self.size, top + self.size)
        return np.array(image.crop(box).convert("RGB"), np.uint8)


def _resized(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height after the shorter side becomes `size`; the longer one is rounded down, as torchvision does."""
    longer = int(size * max(width, height) / min(width, height))
    return (size, longer) if width <= height else (longer, size)


def _opened(source: str | Path | bytes, name: str) -> Image.Image:
    """Opens a file or its content, reading no more than the header."""
    if isinstance(source, (str, os.PathLike)):
        _check_file(Path(source), name)
        image: Image.Image = Image.open(source)
    elif isinstance(source, bytes):
        if not source:
            raise InputError(f"{name} is empty; expected the content of an image file.")
        image = Image.open(io.BytesIO(source))
    else:
        raise InputError(f"{name} was given as an image; expected a path, bytes or a PIL image.")
    if image.format == "EPS":
        image.close()
        raise InputError(f"{name} is PostScript, a program that Pillow would run with Ghostscript. Convert it to PNG.")
    return image


def _check_file(path: Path, name: str) -> None:
    """Refuses what is no regular file, because opening a pipe would wait for ever, with a plain sentence."""
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise InputError(f"{name} does not exist.") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{name} cannot be read: {reason}.") from error
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"{name} is a directory; expected an image file.")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{name} is not a regular file; expected an image file.")
    if status.st_size == 0:
        raise InputError(f"{name} is empty; expected an image file.")
    if not os.access(path, os.R_OK):
        raise InputError(f"{name} cannot be read: permission denied.")


def _name(source: object) -> str:
    """How an error message calls a source."""
    if isinstance(source, Image.Image):
        return "The PIL image"
    if isinstance(source, bytes):
        return f"The image given as {len(source)} bytes"
    return repr(str(source)) if isinstance(source, (str, os.PathLike)) else f"A {type(source).__name__}"


class _Muting(threading.local):
    """Message pattern of a warning filter: matches everything, but only in a thread that is inside `crop`."""

    active = False

    def match(self, _message: str) -> bool:
        return self.active


_FILTER: Any = ("ignore", _Muting(), Warning, None, 0)


@contextlib.contextmanager
def _muted_warnings() -> Iterator[None]:
    """Keeps Pillow's warnings on odd files from the user.

    `warnings.catch_warnings` swaps the list of filters of the whole process and so loses other threads' filters. This
    adds one filter, once, that stays without effect in other threads and outside this context.
    """
    filters = cast("list[Any]", warnings.filters)
    if _FILTER not in filters:
        filters.insert(0, _FILTER)
    muting: _Muting = _FILTER[1]
    before, muting.active = muting.active, True
    try:
        yield
    finally:
        muting.active = before
