from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from longclip_rt.bench.cost import Cost, graph_cost
from longclip_rt.bench.roofline import CARDS, fastest, tables, tower_cost
from longclip_rt.bundle.bundle import load_bundle
from longclip_rt.errors import BackendError

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "longclip_rt" / "assets" / "tiny"


@pytest.mark.parametrize(
    ("tower", "rows", "tokens"), [("text", 1, 3), ("text", 7, 200), ("image", 1, None), ("image", 5, None)]
)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_graph_costs_what_the_formula_says(tower: str, rows: int, tokens: int | None, precision: str) -> None:
    bundle = load_bundle(TINY)
    counted = graph_cost(bundle.onnx(tower, precision), rows, tokens)
    assert counted == tower_cost(bundle.architecture, tower, rows, tokens)


def saved(path: Path, nodes: list[Any], shapes: dict[str, list[Any]], weights: dict[str, list[int]]) -> Path:
    first = next(iter(shapes))
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [helper.make_tensor(name, TensorProto.FLOAT, dims, [0.0] * _product(dims)) for name, dims in weights.items()],
    )
    assert first == graph.input[0].name
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)
    return path


def _product(sizes: list[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def test_products_counted_by_hand(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["out"])]
    path = saved(tmp_path / "a.onnx", nodes, {"x": ["batch", "length", 8]}, {"w": [8, 16], "v": [16, 2]})
    # 3 rows of 5 tokens: 15 x 8 x 16 and 15 x 16 x 2 multiplications; 30 numbers come out of 120.
    assert graph_cost(path, 3, 5) == Cost(2 * 15 * (8 * 16 + 16 * 2), 8 * 16 + 16 * 2, 120 + 30)


def test_a_convolution_and_attention_counted_by_hand(tmp_path: Path) -> None:
    conv = [helper.make_node("Conv", ["x", "w"], ["out"], strides=[4, 4])]
    path = saved(tmp_path / "conv.onnx", conv, {"x": ["batch", 3, 8, 8]}, {"w": [10, 3, 4, 4]})
    assert graph_cost(path, 2).flops == 2 * (2 * 10 * 2 * 2) * (3 * 4 * 4)
    attention = [helper.make_node("Attention", ["q", "k", "v"], ["out"])]
    path = saved(
        tmp_path / "attention.onnx", attention, {"q": ["b", 2, 5, 8], "k": [3, 2, 7, 8], "v": [3, 2, 7, 4]}, {}
    )
    assert graph_cost(path, 3).flops == 2 * 3 * 2 * 5 * 7 * 8 + 2 * 3 * 2 * 5 * 7 * 4


def test_an_unknown_shape_is_an_error(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "y"], ["out"])]
    path = saved(tmp_path / "a.onnx", nodes, {"x": ["batch", 4, 8], "y": ["batch", 8, "unknown"]}, {})
    with pytest.raises(BackendError, match="shape of out is not known"):
        graph_cost(path, 3)


def test_bytes_are_of_the_precision() -> None:
    assert Cost(0, 100, 7).bytes("fp32") == 428
    assert Cost(0, 100, 7).bytes("bf16") == Cost(0, 100, 7).bytes("fp16") == 228


def test_a_card_is_never_faster_than_its_products() -> None:
    architecture = load_bundle(TINY).architecture
    flops = tower_cost(architecture, "image", 64).flops / 64
    assert all(fastest(architecture, card, "image") * flops <= 1e12 * card.tflops * 1.0001 for card in CARDS)
    assert len(list(tables(architecture))) == (2 + 4) + 2 * (1 + 2 + len(CARDS))


def test_the_page_holds_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    monkeypatch.delitem(sys.modules, "make_roofline", raising=False)
    import make_roofline

    assert make_roofline.computed() in make_roofline.PAGE.read_text(encoding="utf-8"), "run: make docs"
