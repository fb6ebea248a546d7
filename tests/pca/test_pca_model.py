"""A PCA with a model: embedded, searched and exported with it, on every backend."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner, Result
from tiny_models import tiny_checkpoint, token_ids

from longclip_rt import Embedder
from longclip_rt.bundle.bundle import load_bundle
from longclip_rt.bundle.samples import example_captions, example_photos
from longclip_rt.choices import ARCHITECTURES
from longclip_rt.commands.embed import embed
from longclip_rt.commands.export import export
from longclip_rt.commands.pca import pca as pca_command
from longclip_rt.commands.search import search
from longclip_rt.errors import BundleError, OutputError, PcaError
from longclip_rt.export import exporter
from longclip_rt.export.exporter import ExportOptions, ParityError, export_bundle
from longclip_rt.export.onnx import export_tower
from longclip_rt.formats.embeddings import load_embeddings
from longclip_rt.parity import gate
from longclip_rt.pca.basis import Pca, load_pca, save_pca
from longclip_rt.search.nearest import search_query
from longclip_rt.weights.checkpoint import towers_from_checkpoint

FILES = Path(__file__).parents[2] / "examples" / "files.txt"
K = 6
# Against torch in fp32, on vectors of length 1. A PCA that keeps a length of 0.4 of each makes the errors of the model
# 2.5 times as large: fp32 keeps to 1e-4 and bf16 and fp16 to a cosine of 0.99 and 0.999, as the gate has it.
TOLERANCES = {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.01}


def run(command: object, *arguments: object) -> Result:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])  # type: ignore[arg-type]
    assert result.exit_code == 0, result.output + str(result.exception)
    return result


def embedded(bundle: Path, out: Path, *more: object) -> Path:
    run(embed, FILES, "-o", out, "--bundle", bundle, "--backend", "onnxruntime", "-q", *more)
    return out


@pytest.fixture(scope="module")
def folder(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings of the examples, and two PCAs of them."""
    folder = tmp_path_factory.mktemp("pca")
    whole = embedded(tiny_bundle, folder / "whole.parquet")
    run(pca_command, "fit", whole, "-k", K, "-o", folder / "joint.safetensors")
    run(pca_command, "fit", whole, "-k", K, "-o", folder / "apart.safetensors", "--fit", "apart")
    return folder


@pytest.fixture(scope="module")
def with_pca(folder: Path, tiny_weights: Path) -> Path:
    """A bundle that carries the PCA; the gate ran on a sixth of its texts, to save time."""
    out, texts = folder / "bundle", gate.parity_texts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "parity_texts", lambda tokenizer: texts(tokenizer)[::6])
        pca = ("--pca", folder / "joint.safetensors", "--pca-in-engine")
        run(export, "--weights", tiny_weights, "--out", out, "--fp16", *pca)
    return out


@pytest.mark.parametrize("mode", ["project", "reconstruct"])
@pytest.mark.parametrize("fit", ["joint", "apart"])
def test_every_backend_gives_the_same_vectors(tiny_bundle: Path, folder: Path, mode: str, fit: str) -> None:
    pca = load_pca(folder / f"{fit}.safetensors")
    captions, photos = [caption.long for caption in example_captions()], example_photos()
    plain = Embedder.from_bundle(tiny_bundle, "torch", "fp32")
    expected = [
        pca.apply(plain.embed_texts(captions), "text", mode),
        pca.apply(plain.embed_images(photos), "image", mode),
    ]
    for backend, precisions in (("torch", ["fp32"]), ("onnxruntime", ["fp32", "fp16"]), ("openvino", ["fp32", "bf16"])):
        for precision in precisions:
            if (backend, precision) == ("openvino", "bf16") and "bf16" not in exporter.availability(
                "openvino"
            ).precisions:
                continue
            embedder = Embedder.from_bundle(tiny_bundle, backend, precision, folder / f"{fit}.safetensors", mode)
            assert embedder.dim == (K if mode == "project" else 32)
            got = [embedder.embed_texts(captions), embedder.embed_images(photos)]
            for ours, wanted in zip(got, expected, strict=True):
                assert ours.shape == wanted.shape and ours.dtype == np.float32
                np.testing.assert_allclose(ours, wanted, atol=TOLERANCES[precision], err_msg=f"{backend} {precision}")
                np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
            assert embedder.embed_texts([]).shape == (0, embedder.dim)
            embedder.close()


def test_embeddings_name_the_pca_and_are_what_the_whole_ones_give(tiny_bundle: Path, folder: Path) -> None:
    pca = load_pca(folder / "joint.safetensors")
    short = load_embeddings(embedded(tiny_bundle, folder / "short.parquet", "--pca", folder / "joint.safetensors"))
    assert short.metadata["longclip_rt.pca"] == pca.sha256 and short.metadata["longclip_rt.pca_k"] == str(K)
    assert short.metadata["longclip_rt.pca_mode"] == "project" and short.metadata["longclip_rt.dim"] == str(K)
    whole = load_embeddings(folder / "whole.parquet")
    assert "longclip_rt.pca" not in whole.metadata and pca.weights == whole.metadata["longclip_rt.weights"] != ""
    assert short.ids == whole.ids
    np.testing.assert_allclose(short.vectors, pca.apply(whole.vectors, "text"), atol=1e-5)


def test_a_search_makes_its_query_as_the_file_was_made(tiny_bundle: Path, folder: Path) -> None:
    pca = folder / "joint.safetensors"
    photo = example_photos()[2]
    for mode in ("project", "reconstruct"):
        path = embedded(tiny_bundle, folder / f"s-{mode}.npy", "--pca", pca, "--pca-mode", mode)
        answer = search_query(path, str(photo), 3, kinds=("image",), bundle=tiny_bundle, pca=pca, backend="onnxruntime")
        assert answer.hits[0].id.endswith(photo.name) and answer.hits[0].score == pytest.approx(1, abs=1e-5)
        assert answer.embedder["pca_mode"] == mode
    page = folder / "page.html"
    run(search, path, photo, "--bundle", tiny_bundle, "--pca", pca, "--backend", "onnxruntime", "--html", page)
    assert f"K = {K}, reconstruct" in page.read_text()


def test_vectors_of_different_pcas_are_never_compared(tiny_bundle: Path, folder: Path) -> None:
    joint, apart = folder / "joint.safetensors", folder / "apart.safetensors"
    short = embedded(tiny_bundle, folder / "mixed.parquet", "--pca", joint)
    options = {"bundle": tiny_bundle, "backend": "onnxruntime"}
    arguments = [FILES, "-o", short, "--bundle", tiny_bundle, "--backend", "onnxruntime", "--pca", apart]
    again = CliRunner().invoke(embed, [str(argument) for argument in arguments])
    assert isinstance(again.exception, OutputError) and "pca was" in str(again.exception)
    with pytest.raises(PcaError, match=rf"made with the PCA \w+ \(K = {K}\), and the bundle carries none.*--pca"):
        search_query(short, "a cup", **options)
    with pytest.raises(PcaError, match=r"Vectors of two PCAs cannot be compared: give the first one"):
        search_query(short, "a cup", pca=apart, **options)
    for given in (joint, "bundle"):
        with pytest.raises(PcaError, match=r"made without a PCA.*(leave|Leave) --pca out"):
            search_query(folder / "whole.parquet", "a cup", pca=given, **options)
    by_kind = embedded(tiny_bundle, folder / "apart.parquet", "--pca", apart)
    with pytest.raises(PcaError, match=r"fitted to texts and images apart.*--kind text"):
        search_query(by_kind, "a cup", pca=apart, **options)
    assert search_query(by_kind, "a cup", pca=apart, kinds=("text",), **options).hits
    coarse = embedded(tiny_bundle, folder / "coarse.parquet", "--pca", apart, "--pca-mode", "reconstruct")
    assert search_query(coarse, "a cup", pca=apart, **options).hits


def test_a_pca_of_another_model_is_refused(tiny_bundle: Path, tiny_weights: Path, folder: Path, tmp_path: Path) -> None:
    ours = load_pca(folder / "joint.safetensors")
    save_pca(Pca(ours.bases, "ViT-L-14", "f" * 64), tmp_path / "other.safetensors")
    with pytest.raises(PcaError, match="fitted to embeddings of ViT-L-14"):
        Embedder.from_bundle(tiny_bundle, "onnxruntime", pca=tmp_path / "other.safetensors")
    with pytest.raises(PcaError, match="fitted to embeddings of ViT-L-14"):
        export_bundle(ExportOptions(str(tiny_weights), tmp_path / "new", pca=tmp_path / "other.safetensors"))
    assert not (tmp_path / "new").exists()
    with pytest.raises(PcaError, match="carries no PCA"):
        Embedder.from_bundle(tiny_bundle, "onnxruntime", pca="bundle")


def test_the_bundle_carries_the_pca_and_its_hash(with_pca: Path, folder: Path, tmp_path: Path) -> None:
    bundle, pca = load_bundle(with_pca), load_pca(folder / "joint.safetensors")
    assert bundle.manifest["pca"] == {"sha256": pca.sha256, "k": K, "mode": "project", "fit": "joint"}
    assert "pca.safetensors" in bundle.manifest["files"] and bundle.pca is not None
    assert bundle.pca.sha256 == pca.sha256
    embedder = Embedder.from_bundle(with_pca, "onnxruntime", pca="bundle")
    assert embedder.describe()["pca"] == pca.sha256 and embedder.dim == K
    # Its own vectors are found again without naming the PCA.
    path = embedded(with_pca, folder / "own.parquet", "--pca", "bundle")
    assert search_query(path, "a cup", bundle=with_pca, backend="onnxruntime").hits
    broken = tmp_path / "broken"
    shutil.copytree(with_pca, broken)
    shutil.copy(folder / "apart.safetensors", broken / "pca.safetensors")
    with pytest.raises(BundleError, match=r"pca\.safetensors"):
        load_bundle(broken)


def test_every_runtime_gives_the_pca_output(with_pca: Path) -> None:
    """The graph's plain operators against the PCA applied to the graph's embedding."""
    bundle = load_bundle(with_pca)
    assert bundle.outputs("text") == ("text_embeds", "text_pca") and bundle.pca is not None
    texts = [caption.short for caption in example_captions()][:6]
    for backend, precision in (
        ("onnxruntime", "fp32"),
        ("onnxruntime", "fp16"),
        ("openvino", "fp32"),
        ("torch", "fp32"),
    ):
        embedder = Embedder.from_bundle(with_pca, backend, precision)
        ids = embedder.tokenizer(texts)
        embedding, reduced = embedder.backend.run("text", ids, ["text_embeds", "text_pca"])
        expected = bundle.pca.apply(embedding, "text")
        atol = 1e-5 if precision == "fp32" else 5e-3
        np.testing.assert_allclose(reduced, expected, atol=atol, err_msg=f"{backend} {precision}")


@pytest.mark.parametrize("tower", ["text", "image"])
@pytest.mark.parametrize("half", [False, True])
def test_the_head_is_one_product(with_pca: Path, tower: str, half: bool) -> None:
    model = onnx.load(with_pca / f"{tower}{'.fp16' if half else ''}.onnx")
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    width = {"text": 64, "image": 128}[tower]
    of_head = [
        weights[name]
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm")
        for name in node.input
        if name in weights and 32 in (weights[name][-1] - K, weights[name][-1])
    ]
    assert of_head == [(width, 32 + K)]


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Changes the columns of P V in the exported text graph."""
    real = exporter.export_tower

    def spoiled(tower: object, path: Path) -> None:
        real(tower, path)  # type: ignore[arg-type]
        model = onnx.load(path)
        for tensor in model.graph.initializer:
            if tuple(tensor.dims) == (64, 32 + K):
                values = onnx.numpy_helper.to_array(tensor).copy()
                values[:, 32:] = change(values[:, 32:])
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
                onnx.save(model, path)

    monkeypatch.setattr(exporter, "export_tower", spoiled)


def test_a_wrong_head_ends_the_export(
    tiny_weights: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = gate.parity_texts
    monkeypatch.setattr(gate, "parity_texts", lambda tokenizer: texts(tokenizer)[::6])
    spoil(monkeypatch, lambda values: values[:, ::-1])
    with pytest.raises(ParityError) as caught:
        export_bundle(ExportOptions(str(tiny_weights), tmp_path / "new", pca=folder / "joint.safetensors"))
    assert {check.name for check in caught.value.report.failed} >= {"text_pca: max difference"}
    assert not any("_embeds" in check.name for check in caught.value.report.failed)


def test_reconstruction_as_plain_operators(folder: Path, tmp_path: Path) -> None:
    pca = load_pca(folder / "apart.safetensors")
    text, image = towers_from_checkpoint(tiny_checkpoint())
    ids = token_ids([9, 30, 12], width=32)
    for tower, inputs in ((text, ids), (image, torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0)))):
        with torch.inference_mode():
            embedding, coarse = tower.with_pca(pca, "reconstruct")(inputs)
            assert len(tower(inputs)) == 1 and tower.pca_head is None
        expected = pca.apply(embedding.numpy(), tower.kind, "reconstruct")
        np.testing.assert_allclose(coarse.numpy(), expected, atol=1e-5)
    export_tower(text.with_pca(pca, "reconstruct"), tmp_path / "text.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "text.onnx")
    embedding, coarse = session.run(["text_embeds", "text_pca"], {"input_ids": ids.numpy()})
    np.testing.assert_allclose(coarse, pca.apply(embedding, "text", "reconstruct"), atol=1e-5)


def test_a_bundle_carries_the_head_for_gpus(with_pca: Path, folder: Path) -> None:
    import onnx

    from longclip_rt.bundle.bundle import load_bundle
    from longclip_rt.tensorrt.head import load_head

    bundle = load_bundle(with_pca)
    checked = [check for check in bundle.manifest["parity"]["checks"] if check["runtime"] == "head kernel"]
    assert {check["tower"] for check in checked} == {"text", "image"} and all(check["passed"] for check in checked)
    for arch in ARCHITECTURES:
        for tower in ("text", "image"):
            head = load_head(with_pca, tower, arch)
            assert head is not None and head.k == K and head.pca == load_pca(folder / "joint.safetensors").sha256
            assert all(code.file in bundle.manifest["files"] for code in head.codes)
    for tower in ("text", "image"):
        nodes = onnx.load(with_pca / f"{tower}.fp16.plugin.onnx").graph.node
        assert [node.op_type for node in nodes if node.domain] == ["pca_head"]


@pytest.mark.parametrize("more", [("--fp16",), ("--pca", "joint")])
def test_a_pca_in_the_engine_needs_both_a_pca_and_fp16(more: tuple[str, ...], folder: Path, tiny_weights: Path) -> None:
    from longclip_rt.errors import ExportError

    given = [str(folder / "joint.safetensors") if one == "joint" else one for one in more]
    out = str(folder / "refused")
    result = CliRunner().invoke(export, ["--weights", str(tiny_weights), "--out", out, "--pca-in-engine", *given])
    assert isinstance(result.exception, ExportError) and "Add --fp16 and --pca FILE" in str(result.exception)
