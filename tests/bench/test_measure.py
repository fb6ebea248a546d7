from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from longclip_rt.bench import measure, setting, worker
from longclip_rt.bench.cases import Case, cases, inputs_for
from longclip_rt.bench.contenders import Contender, opened, same_vectors
from longclip_rt.bench.measure import BenchOptions, interleaved, run_bench
from longclip_rt.bench.worker import Round, Worker
from longclip_rt.bundle.bundle import load_bundle
from longclip_rt.commands.bench import bench
from longclip_rt.errors import BackendError
from longclip_rt.model.tokenizer import pad_tokens
from longclip_rt.opening import Availability

TINY = Path(__file__).parent.parent.parent / "longclip_rt" / "assets" / "tiny"


class FakeChild:
    def __init__(self, name: str, log: list[str], fails_after: int = 99) -> None:
        self.name, self.log, self.left = name, log, fails_after

    def ask(self, method: str, *arguments: Any) -> Round:
        self.left -= 1
        if self.left < 0:
            raise BackendError("out of memory")
        self.log.append(f"{method} {self.name} {arguments[0]}")
        return Round([1.0])


def test_rounds_are_interleaved() -> None:
    log: list[str] = []
    children: Any = {name: FakeChild(name, log) for name in "AB"}
    found = interleaved(children, [("A", "fp32"), ("A", "bf16"), ("B", "fp32")], 2, 0.1)
    assert log == 2 * ["round A fp32", "round A bf16", "round B fp32"]
    assert {way: len(rounds) for way, rounds in found.items()} == {("A", "fp32"): 2, ("A", "bf16"): 2, ("B", "fp32"): 2}


def test_one_that_fails_stops_none_of_the_others() -> None:
    children: Any = {"A": FakeChild("A", [], fails_after=1), "B": FakeChild("B", [])}
    found = interleaved(children, [("A", "fp32"), ("B", "fp32")], 3, 0.1)
    assert list(found) == [("B", "fp32")]
    assert len(found["B", "fp32"]) == 3


def test_cases_stop_at_the_context() -> None:
    found = cases(["text", "image"], [1, 8], [20, 77, 248, 300], 77)
    assert [case.label for case in found] == [
        "1 text of 20 tokens", "8 texts of 20 tokens", "1 text of 77 tokens", "8 texts of 77 tokens",
        "1 image", "8 images",
    ]  # fmt: skip


@pytest.mark.parametrize("tokens", [2, 3, 20, 77])
def test_texts_have_exactly_their_length(tokens: int) -> None:
    bundle = load_bundle(TINY)
    inputs = inputs_for(Case("text", 5, tokens), bundle)
    assert {ids.shape for ids in inputs.arrays} == {(5, tokens)}
    assert all((ids[:, -1] == bundle.tokenizer.eot).all() and (ids > 0).all() for ids in inputs.arrays)
    lengths = {each.length for texts in inputs.raw for each in bundle.tokenizer.encode(list(map(str, texts)))}
    assert lengths == {tokens}


def test_inputs_rotate_and_are_not_zeros() -> None:
    bundle = load_bundle(TINY)
    for case in (Case("text", 3, 20), Case("image", 3)):
        arrays = inputs_for(case, bundle).arrays
        assert len({array.tobytes() for array in arrays}) == len(arrays) > 1
        assert all(array.any() for array in arrays)


class FakeContender(Contender):
    details, whole = "fake", "all is one"

    def __init__(self, concurrency: int, dim: int = 4) -> None:
        self.concurrency, self.seen, self.dim = concurrency, [], dim  # type: ignore[var-annotated]

    def length(self, tokens: int) -> int:
        return 32 if tokens <= 32 else 248

    def images(self, crops: Any) -> Any:
        return crops

    def run(self, tower: str, inputs: Any) -> Any:
        self.seen.append(inputs)
        return np.ones((len(inputs), self.dim), np.float32)


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("case", [Case("text", 2, 20), Case("image", 2)])
def test_a_turn_measures_calls_stages_and_rate(concurrency: int, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    contender = FakeContender(concurrency)
    monkeypatch.setattr(worker, "opened", lambda bundle, name, precision, on_gpu: contender)
    found = Worker(str(TINY), "fake", on_gpu=False)
    assert found.open("fp32") == {"details": "fake", "not apart": "all is one"}
    ready = found.prepare(case, "fp32")
    assert ready["tokens"] == (32 if case.tower == "text" else None)
    contender.seen.clear()
    measured = found.round("fp32", 1e-6)
    assert len(measured.calls) == 2
    assert set(measured.stages) == {"encoder", "end to end", "tokenize" if case.tower == "text" else "decode"}
    assert measured.per_second > 0
    assert len({array.tobytes() for array in contender.seen[:2]}) == 2
    assert all(np.shape(array)[0] == 2 for array in contender.seen)


def test_vectors_that_are_no_numbers_are_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    contender = FakeContender(1)
    monkeypatch.setattr(contender, "run", lambda tower, inputs: np.full((1, 4), np.nan))
    monkeypatch.setattr(worker, "opened", lambda *given: contender)
    found = Worker(str(TINY), "fake", on_gpu=False)
    found.open("fp32")
    with pytest.raises(BackendError, match="not finite"):
        found.prepare(Case("text", 1, 20), "fp32")


def test_the_least_cosine_of_two_batches() -> None:
    assert same_vectors(np.eye(2), np.array([[2.0, 0], [1, 1]])) == pytest.approx(0.5**0.5)


@pytest.mark.parametrize("name", ["open_clip", "transformers", "plain-onnxruntime"])
def test_references_give_the_same_vectors(name: str) -> None:
    bundle = load_bundle(TINY)
    ours, theirs = (opened(bundle, each, "fp32", on_gpu=False) for each in ("onnxruntime", name))
    for case in (Case("text", 2, 20), Case("image", 2)):
        (array, *_) = inputs_for(case, bundle).arrays
        first, second = (
            each.run(case.tower, each.images(array) if array.ndim == 4 else pad_tokens(list(array), each.length(20)))
            for each in (ours, theirs)
        )
        assert same_vectors(first, second) == pytest.approx(1, abs=1e-5)
    assert theirs.parts("image", theirs.images(array))["encoder"] > 0


def test_references_run_in_fp32_and_in_what_is_measured() -> None:
    ways, on_gpu = setting.ways_of(load_bundle(TINY), ["onnxruntime"], ["fp16"], ["open_clip"])
    assert (ways, on_gpu) == ({"onnxruntime": ["fp16"], "open_clip": ["fp32", "fp16"]}, False)
    assert setting.ways_of(load_bundle(TINY), ["onnxruntime"], ["auto", "fp32"], None)[0] == {"onnxruntime": ["fp32"]}
    with pytest.raises(BackendError, match="cannot be used"):
        setting.ways_of(load_bundle(TINY), ["tensorrt"], ["auto"], None)
    with pytest.raises(BackendError, match="each name a model"), setting.model(TINY, "random:ViT-B-16", False, print):
        pass


def test_all_are_the_usable_ones_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = load_bundle(TINY)
    usable = {"torch", "openvino", "onnxruntime"}
    monkeypatch.setattr(setting, "availability", lambda name: Availability(name, name in usable, ("fp32",)))
    ways, on_gpu = setting.ways_of(bundle, ["all"], ["auto"], None)
    assert (set(ways), on_gpu) == (usable, False)
    assert list(setting.ways_of(bundle, ["auto"], ["auto"], None)[0]) == ["openvino"]
    monkeypatch.setattr(setting, "runs_on_gpu", lambda name: name == "torch")
    for names in (["all"], ["auto"]):
        assert setting.ways_of(bundle, names, ["fp16"], ["open_clip"]) == (
            {"torch": ["fp16"], "open_clip": ["fp32", "fp16"]}, True
        )  # fmt: skip
    with pytest.raises(BackendError, match="not measured together"):
        setting.ways_of(bundle, ["torch", "openvino"], ["auto"], None)


def test_nothing_to_measure_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_rates", lambda *given: {})
    options = BenchOptions({"onnxruntime": ["bf16"]}, [Case("text", 1, 20)], on_gpu=False)
    with pytest.raises(BackendError, match="No backend can be measured"):
        run_bench(load_bundle(TINY), options)


def test_the_command_writes_what_it_measured(tmp_path: Path) -> None:
    json_path, csv_path, plot_path = (tmp_path / f"bench.{suffix}" for suffix in ("json", "csv", "png"))
    given = ["--bundle", TINY, "--backend", "onnxruntime", "--precision", "fp32", "--against", "plain-onnxruntime",
             "--tower", "text", "--batch", "1", "--tokens", "20", "--rounds", "2", "--seconds", "0.01",
             "--json", json_path, "--csv", csv_path, "--plot", plot_path]  # fmt: skip
    run = CliRunner().invoke(bench, list(map(str, given)))
    assert run.exit_code == 0, run.output
    found = json.loads(json_path.read_text())
    (case,) = found["cases"]
    ours, theirs = case["rows"]
    assert (ours["way"], ours["tokens"], theirs["way"], theirs["tokens"]) == (
        "onnxruntime",
        24,
        "plain-onnxruntime",
        248,
    )
    assert len(ours["medians_ms"]) == len(theirs["medians_ms"]) == 2
    assert case["agreement"] == pytest.approx(1, abs=1e-5)
    ratio = ours["ratios"]["plain-onnxruntime fp32"]["latency"]
    assert ratio == pytest.approx(np.median(np.divide(theirs["medians_ms"], ours["medians_ms"])))
    assert ours["reached"] == pytest.approx(ours["bound"]["ms"] / ours["stages_ms"]["encoder"])
    assert found["bundle"]["sha256"] == load_bundle(TINY).sha256
    assert [line.split(",")[3] for line in csv_path.read_text().splitlines()[-2:]] == [
        "onnxruntime",
        "plain-onnxruntime",
    ]
    assert plot_path.stat().st_size > 10_000
    assert "x as fast as plain-onnxruntime fp32" in run.output
