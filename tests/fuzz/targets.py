"""What is fuzzed. A target makes one spoiled input of a seed, uses it as a user would, and looks at what came out.

It returns where the input could be used, and raises a `LongClipError` where it was refused; anything else is a finding:
another exception, an `AssertionError` about a wrong result, a crash, and (found by the runner) a hang.
"""

from __future__ import annotations

import functools
import io
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "embedding"), str(TESTS / "fuzz")]

from mutations import spoiled_bytes, spoiled_json  # noqa: E402

ROOT = TESTS.parent
TINY = ROOT / "longclip_rt/assets/tiny"
PHOTOS = sorted((ROOT / "longclip_rt/assets/examples/photos").glob("*.jpg"))


def weights(rng: random.Random, folder: Path) -> None:
    """Weights files: odd tensors, names and wrappers; spoiled bytes; odd JSON beside them."""
    import torch
    from safetensors.torch import save_file

    from longclip_rt.weights.checkpoint import load_checkpoint

    tensors = dict(_state_dicts()[rng.randrange(3)])
    for _ in range(rng.choice((0, 1, 1, 2))):
        _spoil_tensor(rng, tensors)
    path = folder / rng.choice(("weights.pt", "weights.safetensors"))
    if path.suffix == ".pt":
        content: Any = tensors
        for _ in range(rng.choice((0, 0, 1, 2, 20))):
            content = {rng.choice(("state_dict", "model", "epoch")): content}
        if rng.random() < 0.05:
            content["state_dict"] = content
        torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.8)
    else:
        plain = {name: one.to_dense() if one.is_sparse else one for name, one in tensors.items() if not one.is_meta}
        header = {"longclip_rt.image_mean": spoiled_json(rng, [0.5, 0.5, 0.5]).decode(errors="replace")}
        save_file(
            {name: one.clone().contiguous() for name, one in plain.items() if one.numel() < 10**8},
            path,
            metadata=header if rng.random() < 0.1 else None,
        )
    if rng.random() < 0.4:
        path.write_bytes(spoiled_bytes(rng, path.read_bytes()))
    if rng.random() < 0.4:
        name, config = rng.choice(_configs())
        (folder / name).write_bytes(spoiled_json(rng, config))
    checkpoint = load_checkpoint(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.state_dict.items()}
    assert shapes == checkpoint.architecture.shapes(), "tensors of other shapes than the architecture's"
    assert all(bool(torch.isfinite(one).all()) for one in checkpoint.state_dict.values()), "numbers that are not finite"
    assert np.isfinite([checkpoint.image_mean, checkpoint.image_std]).all() and min(checkpoint.image_std) > 0


@functools.cache
def _state_dicts() -> list[dict[str, Any]]:
    """One small model with OpenAI's, Hugging Face's and CustomTextCLIP's names."""
    from tiny_models import tiny_tensors

    from longclip_rt.weights.naming import huggingface_names

    plain = tiny_tensors(context_length=77)
    plain["token_embedding.weight"] = plain["token_embedding.weight"].half()  # the bulk of the file
    custom = {name if name.startswith("visual.") else f"text.{name}": tensor for name, tensor in plain.items()}
    return [plain, huggingface_names(plain), custom]


@functools.cache
def _configs() -> list[tuple[str, Any]]:
    from longclip_rt.model.architecture import Architecture
    from longclip_rt.weights.convert import huggingface_config

    tiny = Architecture(24, 8, 128, 2, 64, 3, 32, vision_mlp_width=192)
    clip = {"embed_dim": 32, "vision_cfg": {"width": 128, "layers": 2}, "text_cfg": {"width": 64, "heads": 1}}
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_center_crop": True}
    return [
        ("config.json", huggingface_config(tiny)),
        ("open_clip_config.json", {"model_cfg": clip, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}),
        ("preprocessor_config.json", processor),
    ]


def _spoil_tensor(rng: random.Random, tensors: dict[str, Any]) -> None:
    import torch

    name = rng.choice([name for name, one in tensors.items() if not one.is_sparse and not one.is_meta])
    tensor = tensors[name]
    number = rng.choice(("99999999", "00", "-1", "9" * 400, "3"))
    changes: list[Callable[[], Any]] = [
        lambda: torch.tensor(1.0),
        lambda: torch.zeros(rng.choice(((0,), (1,) * 5, (5, 7), (10**3, 10**3)))),
        lambda: torch.ones(()).expand(rng.choice(((10**7, 10**6), (2**40, 64), tuple(tensor.shape)))),
        lambda: torch.empty(tensor.shape, device="meta"),
        lambda: tensor.to_sparse(),
        lambda: tensor.to(rng.choice((torch.int8, torch.float16, torch.bfloat16, torch.float64, torch.bool))),
        lambda: tensor * rng.choice((0.0, 1e38, float("nan"), float("inf"))),
        lambda: tensor.t() if tensor.ndim == 2 else tensor.reshape(-1),
        lambda: tensor[:-1] if tensor.ndim else tensor,
    ]
    places = (
        name, name, name, name, f"text.{name}", f"module.{name}", f"{name}.r", f"{name.removesuffix('.weight')}.theta",
        f"transformer.resblocks.{number}.ln_1.weight", f"text_model.encoder.layers.{number}.layer_norm1.weight", "",
        "text_projection.weight", "positional_embedding_res", "\x1b[31m\n",
    )  # fmt: skip
    if rng.random() < 0.1:
        del tensors[name]
    else:
        tensors[rng.choice(places)] = rng.choice(changes)()


def bundle(rng: random.Random, folder: Path) -> None:
    """Bundles: a spoiled manifest, as it is or written anew around its content, or another spoiled file."""
    from longclip_rt.bundle.bundle import write_manifest
    from longclip_rt.runtime import Embedder

    directory = folder / "bundle"
    directory.mkdir()
    for file in TINY.iterdir():
        (directory / file.name).symlink_to(file)
    kind = rng.choice(("manifest", "manifest", "manifest", "rewritten", "file"))
    name = rng.choice(("tokenizer.json", "text.onnx", "image.onnx")) if kind == "file" else "bundle.json"
    (directory / name).unlink()
    original = (TINY / name).read_bytes()
    if kind == "file":
        (directory / name).write_bytes(spoiled_bytes(rng, original))
    else:
        (directory / name).write_bytes(spoiled_json(rng, json.loads(original)))
    if kind == "rewritten":
        try:
            fields = json.loads((directory / name).read_bytes())
            write_manifest(directory, {key: fields[key] for key in fields if key not in ("format", "files")})
        except (ValueError, TypeError, RecursionError):
            return  # no manifest to write anew
    with Embedder.from_bundle(directory, "openvino", "fp32") as embedder:
        vectors = _vectors(embedder)
    assert all(np.allclose(np.linalg.norm(one, axis=1), 1, atol=1e-3) for one in vectors), "no unit vectors"
    if kind != "rewritten":  # then it is another bundle, which may give other vectors
        assert all(np.allclose(a, b, atol=1e-3) for a, b in zip(vectors, _expected(), strict=True)), "wrong vectors"


def _vectors(embedder: Any) -> tuple[Any, Any]:
    return embedder.embed_texts(["a red cube", "two blue balls on a green floor"]), embedder.embed_images(PHOTOS[:1])


@functools.cache
def _expected() -> tuple[Any, Any]:
    from longclip_rt.runtime import Embedder

    with Embedder.from_bundle(TINY, "openvino", "fp32") as embedder:
        return _vectors(embedder)


def tokenizer(rng: random.Random, folder: Path) -> None:
    """tokenizer.json spoiled, and texts of any characters through what can still be read."""
    from longclip_rt.model.tokenizer import Tokenizer

    path = folder / "tokenizer.json"
    original = (TINY / "tokenizer.json").read_bytes()
    if rng.random() < 0.3:
        path.write_bytes(original)
    elif rng.random() < 0.5:
        path.write_bytes(spoiled_bytes(rng, original))
    else:
        path.write_bytes(spoiled_json(rng, json.loads(original)))
    read = Tokenizer.from_file(path, 248)
    tokens = read.encode([_text(rng)])[0]
    assert tokens.ids[0] == read.sot and tokens.ids[-1] == read.eot and len(tokens.ids) <= 248, "no whole text"


def _text(rng: random.Random) -> str:
    pieces = (
        "a red cup ",
        "&#xD800;",
        "\0",
        "é",
        "e\u0301",
        "\U0001f600",
        "\u202e",
        "&amp;" * 50,
        "x" * 3000,
        "\ud800",
    )
    drawn = (
        rng.choice(pieces) if rng.random() < 0.7 else chr(rng.randrange(0x110000)) for _ in range(rng.randrange(30))
    )
    return "".join(drawn)


def embeddings(rng: random.Random, folder: Path) -> None:
    """Embeddings files: spoiled bytes of a table or of what lies beside it; an id never gets another's vector.

    Changed numbers are not found here: search and the PCA refuse those that are not finite.
    """
    from longclip_rt.formats.embeddings import load_embeddings

    files = _embeddings(rng.choice((".parquet", ".npy", ".jsonl")))
    spoiled = rng.choice(sorted(files))
    for name, content in files.items():
        is_json = name.endswith(".meta.json") and rng.random() < 0.7
        if name == spoiled:
            content = spoiled_json(rng, json.loads(content)) if is_json else spoiled_bytes(rng, content)
        (folder / name).write_bytes(content)
    output = min(files, key=len)
    read = load_embeddings(folder / output)
    good = _good_rows()
    owners = {vector.tobytes(): name for name, vector in good.items()}
    for name, vector in zip(read.ids, read.vectors, strict=True):
        owner = owners.get(vector.astype(np.float32).tobytes())
        assert owner in (None, name) or name not in good, f"{name} has the vector of {owner}"


@functools.cache
def _embedded(suffix: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    import tempfile

    from embed_case import make_inputs
    from fake_embedder import FakeEmbedder

    from longclip_rt.embedding.pipeline import EmbedOptions, embed_files
    from longclip_rt.formats.embeddings import load_embeddings

    before = Path.cwd()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        try:
            make_inputs()
            embed_files(["files.txt"], f"out{suffix}", FakeEmbedder(), EmbedOptions(shard_size=9, workers=2))
            rows = load_embeddings(f"out{suffix}")
            files = {path.name: path.read_bytes() for path in Path.cwd().glob("out.*") if "rejects" not in path.name}
        finally:
            os.chdir(before)
    return files, dict(zip(rows.ids, rows.vectors.astype(np.float32), strict=True))


def _embeddings(suffix: str) -> dict[str, bytes]:
    return _embedded(suffix)[0]


def _good_rows() -> dict[str, Any]:
    return _embedded(".parquet")[1]


def lists(rng: random.Random, folder: Path) -> None:
    """Lists of inputs: lines, JSON Lines and tables of any content; rows and rejects together are the inputs."""
    from fake_embedder import FakeEmbedder
    from PIL import Image

    from longclip_rt.embedding.pipeline import EmbedOptions, embed_files
    from longclip_rt.formats.embeddings import load_embeddings

    os.chdir(folder)
    Image.new("RGB", (6, 5)).save("a.png")
    Path("b.txt").write_text("a red cup")
    pool = [
        "a.png",
        "b.txt",
        "absent.png",
        "",
        "# x",
        ".",
        "/dev/zero",
        "a\0b",
        "\ufeffa.png",
        "é.png",
        "x" * 5000,
        "-",
    ]
    name = rng.choice(("list.txt", "list.jsonl", "list.lst", "list.parquet"))
    if name == "list.jsonl":
        records = [{rng.choice(("image", "path", "text")): rng.choice(pool)} for _ in range(rng.randrange(8))]
        data = b"\n".join(spoiled_json(rng, one) if rng.random() < 0.3 else json.dumps(one).encode() for one in records)
    else:
        lines = [rng.choice(pool) for _ in range(rng.randrange(12))]
        data = rng.choice(("\n", "\r\n", "\r")).join(lines).encode(rng.choice(("utf-8", "utf-8", "utf-16")))
    Path(name).write_bytes(spoiled_bytes(rng, data) if rng.random() < 0.4 else data)
    output = rng.choice(("out.parquet", "out.npy", "out.jsonl"))
    options = EmbedOptions(
        texts=rng.random() < 0.4,
        column=rng.choice((None, None, "image", "x")),
        workers=1,
        shard_size=rng.choice((3, 99)),
    )
    report = embed_files([name], output, FakeEmbedder(), options)
    rows = load_embeddings(report.output)
    assert len(rows.ids) == report.totals.rows, "rows that were not counted"
    rejects = report.rejects.read_bytes().count(b"\n") if report.rejects is not None else 0
    assert rejects == report.totals.rejects, "rejects that were not counted"


def images(rng: random.Random, folder: Path) -> None:
    """Image files of many formats with spoiled bytes, and the model's crop of them."""
    from PIL import Image

    from longclip_rt.model.preprocess import ImageTransform

    kind = rng.choice(("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "PNG"))
    mode = rng.choice(("RGB", "L", "RGBA", "P", "1", "CMYK", "I;16")) if kind in ("PNG", "TIFF") else "RGB"
    mode = "RGB" if kind == "PNG" and mode == "CMYK" else mode
    stream = io.BytesIO()
    with Image.open(rng.choice(PHOTOS)) as photo:
        small = photo.resize((rng.choice((1, 7, 64)), rng.choice((1, 9, 64))))
        (Image.new("I;16", small.size) if mode == "I;16" else small.convert(mode)).save(stream, kind)
    path = folder / rng.choice(("image.jpg", "image.png", "image"))
    path.write_bytes(spoiled_bytes(rng, stream.getvalue()))
    crop = ImageTransform(64, (0.5,) * 3, (0.5,) * 3).crop(path if rng.random() < 0.5 else path.read_bytes())
    assert crop.shape == (64, 64, 3) and crop.dtype == np.uint8, "no crop"


def kills(rng: random.Random, folder: Path) -> None:
    """An embedding that is killed at random moments, up to three times, and then goes on to the same bytes."""
    from embed_case import embed, make_inputs

    os.chdir(folder)
    make_inputs()
    output = rng.choice(("out.parquet", "out.npy", "out.jsonl"))
    embed(output, shard_size=4)
    unbroken = {path.name: path.read_bytes() for path in folder.glob("out.*")}
    for name in unbroken:
        Path(name).unlink()
    for _ in range(rng.randint(1, 3)):
        if (child := os.fork()) == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process on the spot
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.001, 0.1))
            embed(output, overwrite=True, shard_size=4)
            os._exit(0)
        os.waitpid(child, 0)
    embed(output, overwrite=True, shard_size=4)
    assert {path.name: path.read_bytes() for path in folder.glob("out.*")} == unbroken, "not as an unbroken run"


TARGETS: dict[str, Callable[[random.Random, Path], None]] = {
    "weights": weights,
    "bundle": bundle,
    "tokenizer": tokenizer,
    "embeddings": embeddings,
    "lists": lists,
    "images": images,
    "kills": kills,
}
