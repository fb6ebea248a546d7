from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from tiny_models import tiny_checkpoint, tiny_tensors, token_ids

from longclip_rt import Embedder
from longclip_rt.bundle.bundle import Bundle, bundles_home, load_bundle
from longclip_rt.commands.export import export as command
from longclip_rt.errors import ExportError, LongClipError, MissingExtraError, OutputError
from longclip_rt.export import exporter, precision
from longclip_rt.export.exporter import ExportOptions, ParityError, export_bundle, stages
from longclip_rt.export.precision import ActivationRecorder, half_tower
from longclip_rt.export.reference import reference_from_towers
from longclip_rt.export.rounding import rounded_model
from longclip_rt.export.structure import structure_checks
from longclip_rt.opening import open_backend
from longclip_rt.parity import gate
from longclip_rt.parity.gate import changed_neighbours, verify_backend
from longclip_rt.parity.limits import Sample
from longclip_rt.weights.checkpoint import towers_from_checkpoint
from longclip_rt.weights.convert import save_converted


def sabotage(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[onnx.ModelProto], None]) -> None:
    """Lets the exporter write what it writes, and then spoils the file of this name."""
    real = exporter.export_tower

    def spoiled(tower: Any, path: Path) -> None:
        real(tower, path)
        if path.name == name:
            model = onnx.load(path)
            change(model)
            onnx.save(model, path)

    monkeypatch.setattr(exporter, "export_tower", spoiled)


@pytest.fixture
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the gate run on a sixth of its texts: enough to find what the tests spoil, in a sixth of the time."""
    real = gate.parity_texts
    monkeypatch.setattr(gate, "parity_texts", lambda tokenizer: real(tokenizer)[::6])


def drop_causality(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Attention" and attribute.name == "is_causal":
                attribute.i = 0


def reverse_first_product(model: onnx.ModelProto) -> None:
    weights = {name for node in model.graph.node if node.op_type == "MatMul" for name in node.input}
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name in weights)
    values = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values[::-1].copy(), tensor.name))


def freeze_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def test_the_manifest_tells_what_the_bundle_is(tiny_bundle: Path, tiny_weights: Path) -> None:
    manifest = load_bundle(tiny_bundle).manifest
    assert manifest["source"]["weights"] == str(tiny_weights)
    assert manifest["image"]["size"] == 24
    states = ["last_hidden_state", "hidden_states.-2", "hidden_states.-3"]
    assert manifest["outputs"]["text"] == ["text_embeds", "pooler_output", *states]
    assert manifest["outputs"]["image"] == ["image_embeds", "pooler_output", "last_hidden_state"]
    assert manifest["tools"]["torch"] == torch.__version__.partition("+")[0]
    parity = manifest["parity"]
    assert parity["texts"] >= 32 and parity["images"] >= 8
    assert all(check["passed"] for check in parity["checks"])
    runs = {(check["runtime"], check["precision"]) for check in parity["checks"]}
    assert {
        ("graph", "fp16"),
        ("onnxruntime", "fp32"),
        ("onnxruntime", "fp16"),
        ("rounded", "fp16"),
        ("openvino", "fp32"),
    } <= runs
    assert len(parity["activations"]) == 3 + 2  # one a block, text and image
    assert all(0 < entry["largest"] < 65504 and not entry["kept_fp32"] for entry in parity["activations"])


@pytest.mark.parametrize("tower", ["text", "image"])
@pytest.mark.parametrize("half", [False, True])
def test_graphs_keep_the_contract(tiny_bundle: Path, tower: str, half: bool) -> None:
    model = onnx.load(tiny_bundle / f"{tower}{'.fp16' if half else ''}.onnx")
    onnx.checker.check_model(model)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [23]
    (given,) = model.graph.input
    kind = onnx.TensorProto.INT32 if tower == "text" else onnx.TensorProto.FLOAT
    assert (given.name, given.type.tensor_type.elem_type) == (
        {"text": "input_ids", "image": "pixel_values"}[tower],
        kind,
    )
    for output in model.graph.output:
        assert output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    products = {name for node in model.graph.node if node.op_type == "MatMul" for name in node.input}
    types = {tensor.data_type for tensor in model.graph.initializer if tensor.name in products}
    assert types == {onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT}
    # Nothing of the machine that exported it, such as paths in the tracer's notes.
    assert str(Path(torch.__file__).parent).encode() not in model.SerializeToString()


@pytest.mark.usefixtures("few_texts")
def test_two_exports_are_one_and_the_same(tiny_weights: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle, _ = export_bundle(ExportOptions(str(tiny_weights), tmp_path / "one"))
    again, _ = export_bundle(ExportOptions(str(tiny_weights), tmp_path / "two"))
    assert bundle.sha256 == again.sha256
    assert bundle.precisions == ("fp32",)


@pytest.mark.usefixtures("few_texts")
@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("text.onnx", drop_causality, {"tokens after EOT changed", "trimmed equals padded"}),
        ("text.fp16.onnx", drop_causality, {"tokens after EOT changed", "text_embeds: 1 - cosine"}),
        ("image.onnx", reverse_first_product, {"image_embeds: max difference"}),
        ("image.fp16.onnx", reverse_first_product, {"image_embeds: 1 - cosine"}),
    ],
)  # fmt: skip
def test_a_wrong_file_ends_the_export_and_leaves_nothing(
    tiny_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    change: Callable[[onnx.ModelProto], None],
    found: set[str],
) -> None:
    sabotage(monkeypatch, name, change)
    out = tmp_path / "bundles" / "new"
    with pytest.raises(ParityError, match="no bundle was written") as caught:
        export_bundle(ExportOptions(str(tiny_weights), out, fp16="fp16" in name))
    assert {check.name for check in caught.value.report.failed} >= found
    assert list(out.parent.iterdir()) == []


def test_the_structure_of_a_graph_is_counted(tiny_bundle: Path, tmp_path: Path) -> None:
    model = onnx.load(tiny_bundle / "text.fp16.onnx")
    freeze_batch(model)
    attention = next(node for node in model.graph.node if node.op_type == "Attention")
    attention.attribute.remove(next(entry for entry in attention.attribute if entry.name == "softmax_precision"))
    model.graph.node.append(onnx.helper.make_node("ArgMax", ["input_ids"], ["largest"]))
    onnx.save(model, tmp_path / "text.onnx")
    checks = structure_checks(tmp_path / "text.onnx", "text", "fp16", blocks=4, kept_fp32=1)
    assert {check.name: check.value for check in checks} == {
        "blocks without Attention": 1,
        "softmax not in fp32": 1,
        "LayerNorm statistics not in fp32": 0,
        "ArgMax, Softmax, Trilu, TopK": 1,
        "frozen dimensions": 1,
        "fp32 weights of MatMul": 4,
    }


def overflowing_weights(path: Path) -> Path:
    """Weights whose second image block holds activations above 65504 and still gives plain outputs."""
    tensors = tiny_tensors(0)
    tensors["visual.transformer.resblocks.1.mlp.c_fc.weight"] *= 2e5
    tensors["visual.transformer.resblocks.1.mlp.c_fc.bias"] *= 2e5
    tensors["visual.transformer.resblocks.1.mlp.c_proj.weight"] /= 2e5
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("value", [300.0, 3.0])
def test_rounding_makes_infinite_what_fp16_cannot_hold(value: float) -> None:
    """x * x / 64 in fp16: 300 squared is beyond 65504, though the result would not be."""
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    nodes = [
        onnx.helper.make_node("Cast", ["x"], ["h"], to=half),
        onnx.helper.make_node("Mul", ["h", "h"], ["square"]),
        onnx.helper.make_node("Mul", ["square", "scale"], ["small"]),
        onnx.helper.make_node("Cast", ["small"], ["y"], to=single),
    ]
    shapes = [onnx.helper.make_tensor_value_info(name, half, [1]) for name in ("h", "square", "small")]
    ends = [onnx.helper.make_tensor_value_info(name, single, [1]) for name in ("x", "y")]
    scale = onnx.numpy_helper.from_array(np.array([1 / 64], np.float16), "scale")
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], [scale], value_info=shapes)
    model = rounded_model(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10)
    )
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    (result,) = session.run(None, {"x": np.array([value], np.float32)})
    with np.errstate(over="ignore"):
        square = np.float16(value) * np.float16(value)
    np.testing.assert_array_equal(result, [np.float32(square * np.float16(1 / 64))])
    assert np.isinf(result[0]) == (value == 300)


@pytest.mark.usefixtures("few_texts")
def test_the_weights_own_normalisation_reaches_the_embedder(tmp_path: Path) -> None:
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.5, 0.75)
    checkpoint = dataclasses.replace(tiny_checkpoint(), image_mean=mean, image_std=std)
    weights = save_converted(checkpoint, tmp_path / "weights", "huggingface")
    bundle, _ = export_bundle(ExportOptions(str(weights), tmp_path / "bundle"))
    transform = Embedder.from_bundle(bundle.path, "onnxruntime").transform
    np.testing.assert_allclose([transform.mean, transform.std], [mean, std])


@pytest.fixture(scope="module")
def cut_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of a model with the first 8192 entries of CLIP's vocabulary, through the gate in both precisions."""
    folder = tmp_path_factory.mktemp("cut")
    weights = save_converted(tiny_checkpoint(vocab_size=8192), folder / "weights.safetensors", "longclip")
    real = gate.parity_texts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "parity_texts", lambda tokenizer: real(tokenizer)[::6])
        return export_bundle(ExportOptions(str(weights), folder / "bundle", fp16=True))[0]


@pytest.mark.parametrize(("kind", "tolerance"), [("fp32", 1e-5), ("fp16", 5e-3)])
def test_a_cut_vocabulary_goes_through_the_gate_to_the_embedder(
    cut_bundle: Bundle, kind: str, tolerance: float
) -> None:
    checkpoint = tiny_checkpoint(vocab_size=8192)
    assert cut_bundle.architecture == checkpoint.architecture
    texts = ["a red ball", "a turquoise hourglass", "", "two cats <end_of_text> and more", "word " * 300]
    text, _ = towers_from_checkpoint(checkpoint)
    with Embedder.from_bundle(cut_bundle.path, "onnxruntime", kind) as embedder:
        ids = embedder.tokenizer(texts)
        assert ids.max() == embedder.tokenizer.eot == 8191
        expected = text(torch.from_numpy(ids))[0].numpy()
        np.testing.assert_allclose(embedder.embed_texts(texts), expected, atol=tolerance)


def test_the_gate_knows_a_cut_vocabularys_end_token(cut_bundle: Bundle, tmp_path: Path) -> None:
    bundle = load_bundle(shutil.copytree(cut_bundle.path, tmp_path / "copy"))
    towers = towers_from_checkpoint(tiny_checkpoint(vocab_size=8192))
    tokens = [row.numpy() for row in token_ids([9] * 4, width=9, vocab_size=8192)]
    sample = Sample(tokens, torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)).numpy())
    reference, _ = reference_from_towers(*towers, sample)

    def failed() -> set[str]:
        backend = open_backend(bundle, "onnxruntime", "fp32")
        return {check.name for check in verify_backend(backend, sample, reference) if not check.passed}

    assert failed() == set()
    model = onnx.load(bundle.path / "text.onnx")
    drop_causality(model)
    onnx.save(model, bundle.path / "text.onnx")
    assert "tokens after EOT changed" in failed()


@pytest.mark.usefixtures("few_texts")
def test_a_block_that_would_overflow_stays_in_fp32(tmp_path: Path) -> None:
    weights = overflowing_weights(tmp_path / "big.safetensors")
    bundle, report = export_bundle(ExportOptions(str(weights), tmp_path / "bundle", fp16=True))
    kept = [(entry.tower, entry.block, entry.where) for entry in report.activations if entry.keep_fp32]
    assert kept == [("image", 1, "mlp.c_fc")]
    graph = onnx.load(bundle.onnx("image", "fp16")).graph
    types = [tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 2]
    assert types.count(onnx.TensorProto.FLOAT) >= 4 and onnx.TensorProto.FLOAT16 in types


@pytest.mark.usefixtures("few_texts")
def test_without_keeping_it_in_fp32_the_gate_finds_the_overflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "HEADROOM", 0.0)
    weights = overflowing_weights(tmp_path / "big.safetensors")
    with pytest.raises(ParityError) as caught:
        export_bundle(ExportOptions(str(weights), tmp_path / "bundle", fp16=True))
    failed = {(check.runtime, check.precision, check.name) for check in caught.value.report.failed}
    assert ("rounded", "fp16", "image_embeds: NaN or inf") in failed
    assert not any(precision == "fp32" for _, precision, _ in failed)


@pytest.mark.usefixtures("few_texts")
@pytest.mark.parametrize(("factor", "what"), [(1e30, "text"), (0, "image")])
def test_weights_that_give_no_vectors_are_told_from_an_export_that_went_wrong(
    factor: float, what: str, tmp_path: Path
) -> None:
    tensors = tiny_tensors()
    if factor:
        tensors = {name: tensor * (factor if tensor.ndim > 1 else 1) for name, tensor in tensors.items()}
    else:
        tensors["visual.ln_post.weight"] *= 1e-30  # not all zeros, which is refused earlier
        tensors["visual.ln_post.bias"] *= 0
    save_file(tensors, tmp_path / "broken.safetensors")
    with pytest.raises(ExportError, match=rf"{what}s of the sample no vector: .*The weights are broken"):
        export_bundle(ExportOptions(str(tmp_path / "broken.safetensors"), tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()


def test_activations_are_the_largest_of_the_block() -> None:
    text, _ = towers_from_checkpoint(tiny_checkpoint())
    recorder = ActivationRecorder(text)
    ids = token_ids([12, 30], width=32)
    with recorder.record(), torch.no_grad():
        text(ids)
        states = text.with_outputs(["hidden_states.-4", "hidden_states.-3"])(ids)
    first = recorder.activations()[0]
    assert first.largest >= max(float(state.abs().max()) for state in states)
    noted = [entry.largest for entry in recorder.activations()]
    text(token_ids([40], seed=9))  # outside record(): not noted
    assert [entry.largest for entry in recorder.activations()] == noted
    # One entry of a query that is far larger than the rest is found where it is.
    text.blocks[1].block.attn.in_proj_bias[0] = 1000.0
    with recorder.record(), torch.no_grad():
        text(ids)
    assert recorder.activations()[1].largest >= 1000
    assert "queries" in recorder.activations()[1].where or "logits" in recorder.activations()[1].where


def test_an_activation_that_is_not_finite_counts_as_overflow() -> None:
    text, _ = towers_from_checkpoint(tiny_checkpoint())
    text.token_embedding.weight[300] = float("nan")
    recorder = ActivationRecorder(text)
    with recorder.record(), torch.no_grad():
        text(torch.tensor([[49406, 300, 49407]]))
        text(torch.tensor([[49406, 301, 49407]]))
    assert all(entry.keep_fp32 for entry in recorder.activations())


def test_half_towers_leave_the_original_alone() -> None:
    text, _ = towers_from_checkpoint(tiny_checkpoint())
    half = half_tower(text, keep_fp32=[1])
    assert [block.dtype for block in half.blocks] == [torch.float16, torch.float32, torch.float16]
    assert {parameter.dtype for parameter in text.parameters()} == {torch.float32}


def test_swapped_neighbours_count_unless_they_were_tied() -> None:
    expected = np.array([[1, 0, 0], [0.9, 0.435889894, 0], [0.89, 0, 0.455960525], [0, 0, 1]], np.float32)
    assert changed_neighbours(expected, expected) == 0
    moved = expected.copy()
    moved[0] = [0.6, -0.8, 0]  # far from where it was, but its own neighbour's error excuses nothing for row 3
    moved[3] = [0, 1, 0]
    assert changed_neighbours(moved, expected) <= 4
    nudged = expected + np.float32(1e-4)
    assert changed_neighbours(nudged, expected) == 0
    broken = expected.copy()
    broken[1, 1] = np.nan
    assert changed_neighbours(broken, expected) == 4


def test_an_existing_target_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists already"):
        export_bundle(ExportOptions(str(tmp_path / "no-such-weights.pt"), tmp_path))


def test_unknown_outputs_are_named(tiny_weights: Path, tmp_path: Path) -> None:
    with pytest.raises(LongClipError, match="no output named 'pooled'"):
        export_bundle(ExportOptions(str(tiny_weights), tmp_path / "new", outputs=("pooled",)))
    with pytest.raises(ExportError, match="no 'audio' tower"):
        export_bundle(ExportOptions(str(tiny_weights), tmp_path / "new", outputs=("audio:pooler_output",)))


@pytest.mark.parametrize(("module", "extra"), [("torch", "export"), ("open_clip", "export"), ("onnxruntime", "cpu")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, module: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"longclip-rt\[{extra}\]"):
        export_bundle(ExportOptions("random:ViT-B-16"))


@pytest.mark.usefixtures("few_texts")
def test_the_command_names_the_bundle_and_shows_the_table(tiny_weights: Path) -> None:
    result = CliRunner().invoke(command, ["--weights", str(tiny_weights), "--fp16"])
    assert result.exit_code == 0, result.output
    bundle = load_bundle(result.stdout.strip())
    assert bundle.path.parent == bundles_home() and bundle.precisions == ("fp32", "fp16")
    assert "Parity with the torch towers on" in result.stderr and "kept in fp32: none" in result.stderr
    second = CliRunner().invoke(command, ["--weights", str(tiny_weights)])
    assert Path(second.stdout.strip()).name == bundle.path.name + "-2"


@pytest.mark.usefixtures("few_texts")
def test_the_command_fails_with_a_table_and_no_bundle(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from longclip_rt.cli import main

    sabotage(monkeypatch, "text.onnx", drop_causality)
    with pytest.raises(SystemExit) as caught:
        main(["export", "--weights", str(tiny_weights), "--out", str(tmp_path / "new")])
    assert caught.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "FAILED: onnxruntime fp32 text: tokens after EOT changed" in captured.err
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("few_texts")
def test_progress_names_as_many_stages_as_it_promised(tiny_weights: Path, tmp_path: Path) -> None:
    options = ExportOptions(str(tiny_weights), tmp_path / "new")
    seen: list[str] = []
    export_bundle(options, seen.append)
    assert len(seen) == stages(options)


def test_a_report_with_nan_is_still_json() -> None:
    check = exporter.Check("onnxruntime", "fp16", "text", "parity", float("nan"), 1.0)
    assert not check.passed
    assert json.loads(json.dumps(check.to_dict(), allow_nan=False))["value"] == "nan"
