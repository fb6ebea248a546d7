from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torchvision import transforms

from longclip_rt.errors import InputError
from longclip_rt.model.preprocess import ImageTransform

SIZE = 32
TRANSFORM = ImageTransform(SIZE)


def reference_crop(image: Image.Image, size: int = SIZE) -> np.ndarray:
    steps = [
        transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(size),
        lambda cropped: cropped.convert("RGB"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(transforms.Compose(steps)(image))


def picture(mode: str, width: int = 61, height: int = 47, seed: int = 0) -> Image.Image:
    """Noise over a gradient, so that resampling has something to round."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, width)[None, :, None] * np.linspace(0.2, 1, height)[:, None, None]
    rgba = (ramp + rng.integers(0, 56, (height, width, 4))).astype(np.uint8)
    grey = rgba[..., 0].astype(np.int32)
    if mode == "LA":
        return Image.fromarray(rgba).convert("LA")
    if mode in {"I;16", "I;16B"}:
        # Pillow clips what is over 255 when it converts to RGB, and so does the reference.
        return Image.fromarray((grey * 2).astype(np.uint16)).convert(mode)
    if mode == "I":
        return Image.fromarray(grey * 3 - 100)
    if mode == "F":
        return Image.fromarray(grey.astype(np.float32) * 1.5 - 20)
    image = Image.fromarray(rgba)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def frames(count: int = 3) -> list[Image.Image]:
    return [picture("RGB", seed=seed) for seed in range(count)]


def paletted(transparency: int | bytes | None) -> bytes:
    options = {} if transparency is None else {"transparency": transparency}
    return encoded(picture("RGB").quantize(40), "PNG", **options)


def rotated_by_exif(file_format: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture("RGB"), file_format, exif=exif)


FILES: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encoded(picture("RGB"), "JPEG"),
    "jpeg progressive grey": lambda: encoded(picture("L"), "JPEG", progressive=True),
    "jpeg cmyk": lambda: encoded(picture("CMYK"), "JPEG"),
    "jpeg exif": lambda: rotated_by_exif("JPEG"),
    "jpeg 2000": lambda: encoded(picture("RGB"), "JPEG2000"),
    "png": lambda: encoded(picture("RGB"), "PNG"),
    "png rgba": lambda: encoded(picture("RGBA"), "PNG"),
    "png grey alpha": lambda: encoded(picture("LA"), "PNG"),
    "png 1 bit": lambda: encoded(picture("1"), "PNG"),
    "png 16 bit": lambda: encoded(picture("I;16"), "PNG"),
    "png exif": lambda: rotated_by_exif("PNG"),
    "png palette": lambda: paletted(None),
    "png palette, one transparent colour": lambda: paletted(3),
    "png palette, alpha for each colour": lambda: paletted(bytes(range(0, 240, 6))),
    "png animated": lambda: encoded(frames()[0], "PNG", save_all=True, append_images=frames()[1:]),
    "gif": lambda: encoded(picture("P"), "GIF", transparency=5),
    "gif animated": lambda: encoded(frames()[0], "GIF", save_all=True, append_images=frames()[1:]),
    "webp": lambda: encoded(picture("RGBA"), "WEBP"),
    "webp animated": lambda: encoded(frames()[0], "WEBP", save_all=True, append_images=frames()[1:]),
    "tiff": lambda: encoded(picture("RGB"), "TIFF", compression="tiff_lzw"),
    "tiff float": lambda: encoded(picture("F"), "TIFF"),
    "tiff exif": lambda: rotated_by_exif("TIFF"),
    "bmp": lambda: encoded(picture("RGB"), "BMP"),
    "ico": lambda: encoded(picture("RGBA", 64, 64), "ICO"),
    "tga": lambda: encoded(picture("RGB"), "TGA", compression="tga_rle"),
    "ppm": lambda: encoded(picture("RGB"), "PPM"),
    "pcx": lambda: encoded(picture("RGB"), "PCX"),
}
MODES = ["RGB", "RGBA", "LA", "P", "L", "1", "I;16", "I;16B", "I", "F", "CMYK", "YCbCr", "HSV", "LAB"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_cropped_as_by_torchvision(mode: str) -> None:
    image = picture(mode)
    assert image.mode == mode
    crop = TRANSFORM.crop(image)
    assert crop.dtype == np.uint8
    np.testing.assert_array_equal(crop, reference_crop(image))
    assert crop.std() > 5


@pytest.mark.parametrize("kind", FILES)
def test_every_file_is_cropped_as_by_torchvision(kind: str, tmp_path: Path) -> None:
    content = FILES[kind]()
    expected = reference_crop(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(TRANSFORM.crop(content), expected)
    path = tmp_path / "picture"
    path.write_bytes(content)
    np.testing.assert_array_equal(TRANSFORM.crop(path), expected)
    np.testing.assert_array_equal(TRANSFORM.crop(str(path)), expected)


@pytest.mark.parametrize("size", [7, 32, 33, 224])
@pytest.mark.parametrize(
    ("width", "height"),
    [(1, 1), (32, 32), (33, 32), (32, 35), (5, 3), (640, 427), (333, 500), (1, 40), (900, 3), (2, 77), (225, 224)],
)
def test_every_shape_is_cropped_as_by_torchvision(size: int, width: int, height: int) -> None:
    image = picture("RGB", width, height)
    np.testing.assert_array_equal(ImageTransform(size).crop(image), reference_crop(image, size))


def test_an_image_object_is_read_at_its_current_frame_and_left_open() -> None:
    with Image.open(io.BytesIO(FILES["gif animated"]())) as image:
        first = TRANSFORM.crop(image)
        image.seek(2)
        third = TRANSFORM.crop(image)
        np.testing.assert_array_equal(third, reference_crop(image))
        image.seek(1)
    np.testing.assert_array_equal(first, TRANSFORM.crop(FILES["gif animated"]()))
    assert np.abs(first.astype(int) - third).max() > 0


def test_normalize_is_bit_equal_to_torchvision() -> None:
    transform = ImageTransform(16)
    crops = np.arange(2 * 16 * 16 * 3, dtype=np.uint32).astype(np.uint8).reshape(2, 16, 16, 3)
    assert len(np.unique(crops[..., 0])) == 256
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(transform.mean, transform.std)])
    pixels = transform.normalize(crops)
    assert pixels.flags.c_contiguous
    torch.testing.assert_close(torch.from_numpy(pixels), torch.stack([reference(c) for c in crops]), rtol=0, atol=0)


def test_call_crops_and_normalizes() -> None:
    transform = ImageTransform(SIZE, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    pixels = transform(picture("RGB"))
    assert pixels.shape == (3, SIZE, SIZE)
    unit = reference_crop(picture("RGB")).astype(np.float64).transpose(2, 0, 1) / 255
    expected = (unit - np.reshape([0.1, 0.2, 0.3], (3, 1, 1))) / np.reshape([1.0, 2.0, 4.0], (3, 1, 1))
    np.testing.assert_allclose(pixels, expected, atol=1e-6)


@pytest.mark.parametrize("crops", [np.zeros((1, 4, 4, 3), np.float32), np.zeros((4, 4, 3), np.uint8)])
def test_normalize_refuses_other_arrays(crops: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"expected uint8 \[B, H, W, 3\]"):
        TRANSFORM.normalize(crops)


def test_files_that_are_no_images_are_input_errors(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not a picture\n")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for name, message in {
        "missing.jpg": "does not exist",
        "empty.jpg": "is empty",
        "text.jpg": "is not an image",
        "text.jpg/inside": "cannot be read: Not a directory",
        ".": "is a directory",
        "pipe": "is not a regular file",
        "loop": "cannot be read",
        "x" * 300: "cannot be read: File name too long",
        "nul\0byte": "cannot be read: embedded null byte",
    }.items():
        with pytest.raises(InputError, match=message):
            TRANSFORM.crop(str(tmp_path / name))


def test_an_unreadable_file_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(FILES["png"]())
    # Permission bits do not stop root, as which tests run in containers.
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match="permission denied"):
        TRANSFORM.crop(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "is empty"),
        (b"GIF89a", "is not an image|cannot be decoded"),
        (3, "A int was given as an image"),
        (Image.new("RGB", (0, 5)), "has no pixels: it is 0 x 5"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n", "is PostScript"),
    ],
)
def test_other_sources_that_are_no_images_are_input_errors(source: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TRANSFORM.crop(source)


def test_a_closed_image_is_an_input_error() -> None:
    image = Image.open(io.BytesIO(FILES["png"]()))
    image.close()
    with pytest.raises(InputError, match="The PIL image cannot be decoded"):
        TRANSFORM.crop(image)


def test_too_many_pixels_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("was decoded"))
    small = ImageTransform(SIZE, max_pixels=61 * 47 - 1)
    with pytest.raises(InputError, match=r"61 x 47 = 2,867 pixels; at most 2,866 are decoded"):
        small.crop(FILES["png"]())


def test_the_pixel_limit_itself_is_allowed() -> None:
    assert ImageTransform(SIZE, max_pixels=61 * 47).crop(FILES["png"]()).shape == (SIZE, SIZE, 3)


def test_pillows_own_limit_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match="too large to decode"):
        TRANSFORM.crop(FILES["png"]())


def test_an_elongated_image_is_refused_before_it_is_inflated() -> None:
    with pytest.raises(InputError, match="too elongated: at 9000 x 1 pixels it would be resized to 2016000 x 224"):
        ImageTransform(224).crop(Image.new("L", (9000, 1)))


def test_warnings_and_logs_of_pillow_stay_inside(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    warnings.simplefilter("error")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    content = FILES["png palette, alpha for each colour"]()
    TRANSFORM.crop(content)
    assert not recwarn.list
    with pytest.raises(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(content))
    assert logging.getLogger("PIL.TiffImagePlugin").hasHandlers()


def test_other_threads_keep_their_warnings_while_an_image_is_cropped(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, seen = threading.Event(), threading.Event()
    monkeypatch.setattr(Image.Image, "resize", lambda self, *_: inside.set() or (seen.wait(10) and self))
    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(1) as pool:
        warnings.simplefilter("always")
        cropping = pool.submit(TRANSFORM.crop, picture("RGB"))
        assert inside.wait(10)
        warnings.warn("from another thread", stacklevel=1)
        seen.set()
        cropping.result()
    assert [str(warning.message) for warning in caught] == ["from another thread"]


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files_raise_nothing_but_input_errors(kind: str, recwarn: pytest.WarningsRecorder) -> None:
    content = FILES[kind]()
    rng = random.Random(kind)
    damaged = [content[: rng.randrange(len(content))] for _ in range(15)]
    for _ in range(25):
        changed = bytearray(content)
        for _ in range(rng.choice([1, 1, 2, 8])):
            # Most decoders' decisions are in the header.
            changed[min(int(rng.expovariate(1 / 60)), len(content) - 1)] = rng.randrange(256)
        damaged.append(bytes(changed))
    refused = 0
    for source in damaged:
        try:
            crop = TRANSFORM.crop(source)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert crop.shape == (SIZE, SIZE, 3)
    assert refused > 0
    assert not recwarn.list


def test_files_are_closed(tmp_path: Path) -> None:
    paths = []
    for number, content in enumerate([FILES["gif animated"](), FILES["jpeg"](), FILES["jpeg"]()[:900], b"text"]):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for path in paths:
            with contextlib.suppress(InputError):
                TRANSFORM.crop(path)
    opened = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [name for name in opened if name.startswith(str(tmp_path))]
    assert not caught


def test_threads_share_one_transform() -> None:
    images = [FILES[kind]() for kind in ("jpeg", "png palette", "webp", "gif")] * 8
    with ThreadPoolExecutor(4) as pool:
        crops = list(pool.map(TRANSFORM.crop, images))
    for image, crop in zip(images, crops, strict=True):
        np.testing.assert_array_equal(crop, TRANSFORM.crop(image))


def test_needs_no_torch() -> None:
    code = (
        "import sys; from longclip_rt.model.preprocess import ImageTransform; from PIL import Image; "
        "print(ImageTransform(8)(Image.new('L', (9, 9), 128)).shape, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(3, 8, 8) False"
