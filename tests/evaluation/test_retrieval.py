from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from layout_cases import put_lines

from longclip_rt.bundle.bundle import BUILT_IN
from longclip_rt.cli import main
from longclip_rt.commands.evaluate import evaluate
from longclip_rt.errors import BackendError, InputError
from longclip_rt.evaluation.collection import Collection
from longclip_rt.evaluation.data import DataName
from longclip_rt.evaluation.figures import Figure, difference
from longclip_rt.evaluation.models import ModelSpec, spec_from_text
from longclip_rt.evaluation.published import published_for
from longclip_rt.evaluation.retrieval import BEYOND, UP_TO, retrieve
from longclip_rt.evaluation.retrieval_run import RetrievalReport, evaluate_retrieval
from longclip_rt.evaluation.vectors import Embedded
from longclip_rt.runtime import Embedder

MODEL = BUILT_IN
SPEC = ModelSpec(MODEL, "onnxruntime", "fp32")
EXAMPLES = Path(__file__).parents[2] / "examples"


def planted(images: int = 40, captions: int = 5) -> tuple[Collection, Embedded]:
    rng = np.random.default_rng(0)
    of = np.repeat(np.arange(images), captions)
    image = rng.standard_normal((images, 16)).astype(np.float32)
    text = (image[of] + 2.4 * rng.standard_normal((len(of), 16))).astype(np.float32)
    names = tuple(f"{row}.jpg" for row in range(images))
    collection = Collection(tuple(map(Path, names)), names, tuple(map(str, range(len(of)))), of, ())
    tokens = np.where(np.arange(len(of)) % 2, 200, 50).astype(np.int32)
    return collection, Embedded(image, text, tokens, tokens > 199, {}, {}, 0)


def recall_by_loops(scores: np.ndarray, right: list[set[int]], k: int) -> float:
    """As evaluation scripts count it: one query after the other, any of the right answers among the first k."""
    hits = 0
    for row, answers in zip(scores, right, strict=True):
        hits += bool(answers & set(np.argsort(-row, kind="stable")[:k].tolist()))
    return hits / len(right)


def test_figures_are_those_of_counting_one_by_one() -> None:
    collection, vectors = planted()
    found = retrieve(collection, collection.without({}, {}), vectors).as_json()
    image = vectors.images / np.linalg.norm(vectors.images, axis=1, keepdims=True)
    text = vectors.texts / np.linalg.norm(vectors.texts, axis=1, keepdims=True)
    scores = image @ text.T
    of_image = [set(np.flatnonzero(collection.of == row).tolist()) for row in range(40)]
    for k in (1, 5, 10):
        assert found[f"i2t_r{k}"] == pytest.approx(recall_by_loops(scores, of_image, k))
        assert found[f"t2i_r{k}"] == pytest.approx(recall_by_loops(scores.T, [{int(one)} for one in collection.of], k))
    assert 0.2 < found["t2i_r1"] < found["i2t_r1"] < found["i2t_r10"] < 1
    ranks = [np.argsort(-row).tolist().index(int(one)) + 1 for row, one in zip(scores.T, collection.of, strict=True)]
    assert found["t2i_median_rank"] == np.median(ranks)
    assert (found["images"], found["texts"], found["truncated"]) == (40, 200, 100)
    long = found["by_length"][BEYOND]
    assert (long["images"], long["texts"]) == (40, 100) and found["by_length"][UP_TO]["images"] == 0
    odd = np.arange(200) % 2 == 1
    assert long["t2i_r1"] == pytest.approx(
        recall_by_loops(scores.T[odd], [{int(one)} for one in collection.of[odd]], 1)
    )


def test_what_could_not_be_embedded_leaves_both_sides_and_is_said() -> None:
    collection, vectors = planted(3, 2)
    kept = collection.without({0: "It is damaged."}, {2: "It is odd.", 3: "It is odd.", 0: "It is odd."})
    assert kept.images.tolist() == [2] and kept.texts.tolist() == [4, 5]
    said = [(one.id, one.reason) for one in kept.skipped]
    assert ("0.jpg", "It is damaged.") in said and ("1.jpg", "None of its captions could be embedded.") in said
    found = retrieve(collection, kept, vectors).as_json()
    assert (found["images"], found["texts"], found["i2t_r1"]) == (1, 2, 1.0)


def test_a_difference_is_told_with_its_interval() -> None:
    rng = np.random.default_rng(1)
    units = np.repeat(np.arange(300), 5)
    base = (rng.random(1500) < 0.5).astype(float)
    better = np.maximum(base, rng.random(1500) < 0.1)
    found = difference(Figure(better, units), Figure(base, units))
    assert found.points == pytest.approx(100 * (better - base).mean())
    # The spread of a mean of independent units: about what the bootstrap must find.
    spread = 100 * (better - base).reshape(300, 5).mean(axis=1).std() / np.sqrt(300)
    assert found.low == pytest.approx(found.points - 1.96 * spread, abs=0.3)
    assert found.high == pytest.approx(found.points + 1.96 * spread, abs=0.3)
    # Captions of one image that stand and fall together say no more than one.
    wide = difference(Figure(np.repeat(better[:300], 5), units), Figure(np.repeat(base[:300], 5), units))
    single = difference(Figure(better[:300], np.arange(300)), Figure(base[:300], np.arange(300)))
    assert wide == single


def run(data: DataName, *specs: ModelSpec, cache: Path) -> RetrievalReport:
    return evaluate_retrieval(data, specs or (SPEC,), cache=cache)


def pairs(folder: Path, *rows: dict[str, Any]) -> DataName:
    folder.mkdir(exist_ok=True)
    good = [
        {
            "image": str(EXAMPLES / "scenes" / f"scene-{n}.png"),
            "caption": (EXAMPLES / f"scenes/scene-{n}.txt").read_text(),
        }
        for n in range(4)
    ]
    return DataName("table", str(put_lines(folder / "pairs.jsonl", good + list(rows))))


def test_embeddings_are_kept_while_bundle_and_data_are_the_same(tmp_path: Path) -> None:
    data = pairs(tmp_path)
    first = run(data, cache=tmp_path / "cache")
    again = run(data, cache=tmp_path / "cache")
    assert (first.computed, again.computed) == (8, 0)
    assert first.as_json() == again.as_json() and first.as_json()["t2i_r1"] == 1.0
    assert run(data, ModelSpec(MODEL, "onnxruntime", "fp16"), cache=tmp_path / "cache").computed == 8
    more = pairs(tmp_path, {"image": str(EXAMPLES / "scenes/scene-4.png"), "caption": "A scene"})
    assert run(more, cache=tmp_path / "cache").computed == 10
    assert evaluate_retrieval(more, [SPEC], cache=tmp_path / "cache", fresh=True).computed == 10


def test_a_run_that_failed_goes_on_with_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Embedder, ids: object) -> None:
        raise BackendError("the machine went down")

    data = pairs(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "encode_tokens", fail)
        with pytest.raises(BackendError, match="went down"):
            run(data, cache=tmp_path / "cache")
    assert run(data, cache=tmp_path / "cache").computed == 4  # the texts; the images were kept


def test_a_changed_picture_is_embedded_anew(tmp_path: Path) -> None:
    mine = tmp_path / "mine.png"
    mine.write_bytes((EXAMPLES / "scenes/scene-4.png").read_bytes())
    data = pairs(tmp_path, {"image": str(mine), "caption": "A scene"})
    assert run(data, cache=tmp_path / "cache").computed == 10
    mine.write_bytes((EXAMPLES / "scenes/scene-5.png").read_bytes())
    assert run(data, cache=tmp_path / "cache").computed == 10


def test_several_models_are_judged_on_the_same_rows(tmp_path: Path) -> None:
    broken = {"image": str(EXAMPLES / "broken/truncated.jpg"), "caption": "A broken picture"}
    data = pairs(tmp_path, broken, {"image": str(tmp_path / "missing.jpg"), "caption": "None"})
    report = run(data, SPEC, ModelSpec(MODEL, "onnxruntime", "fp16"), cache=tmp_path / "cache")
    found = report.as_json()
    assert found["images"] == found["texts"] == found["compared"][0]["images"] == 4
    reasons = [one["reason"] for one in found["skipped"]]
    assert len(reasons) == 2 and "no such file" in reasons[1]
    assert found["compared"][0]["difference"]["t2i_r1"] == {"points": 0.0, "low": 0.0, "high": 0.0}
    tables = report.as_markdown()
    assert "+0.0 [+0.0, +0.0]" in tables and "onnxruntime fp16" in tables and tables.count("\n\n") == 2
    rows = report.as_csv().splitlines()
    assert len(rows) == 1 + 2 * 3 and "t2i_r1_low" in rows[0] and ",beyond 77 tokens," in rows[3]


def test_published_rows_stand_beside_and_are_marked(tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    (tmp_path / "caption").mkdir()
    for number in range(2):
        (tmp_path / f"image/{number}.png").write_bytes((EXAMPLES / f"scenes/scene-{number}.png").read_bytes())
        (tmp_path / f"caption/{number}.txt").write_text(f"scene {number}")
    report = run(DataName("urban1k", str(tmp_path)), cache=tmp_path / "cache")
    row = report.as_json()["published"][0]
    assert row["what"] == "published (second-hand)" and row["images"] == 1000 and row["i2t_r1"] == 0.791
    assert "| Long-CLIP B/16, published (second-hand): LLM2CLIP, arXiv 2411.04997" in report.as_markdown()
    assert "published (second-hand): LLM2CLIP" in report.as_csv()


def test_flickr30k_is_published_on_all_of_it_and_on_a_thousand(tmp_path: Path) -> None:
    assert {row.images for row in published_for("karpathy", "dataset_flickr30k.json", 1000)} == {1000}
    assert {row.images for row in published_for("flickr", "x.token", 31014)} == {31783}
    assert {row.kind for row in published_for("karpathy", "dataset_coco.json", 5000)} == {"coco"}
    collection, _ = planted()
    nothing: Any = None
    for split, known in (("test", True), ("train", False)):
        data = DataName("docci", "x", split=split)
        kept = collection.without({}, {})
        assert bool(RetrievalReport(data, collection, kept, (), (), nothing, 0).published) == known
    assert published_for("table", "x", 5) == published_for("karpathy", "dataset_flickr8k.json", 1000) == ()
    (tmp_path / "dataset_flickr30k.json").touch()
    assert DataName("karpathy", str(tmp_path)).file_name == "dataset_flickr30k.json"


def test_what_a_model_is_called() -> None:
    here = Path("here")
    assert spec_from_text("torch", here) == ModelSpec(here, "torch")
    assert spec_from_text("onnxruntime, fp16", here) == ModelSpec(here, "onnxruntime", "fp16")
    assert spec_from_text("other,fp16", here) == ModelSpec(Path("other"), "auto", "fp16")
    assert spec_from_text("bundle=torch,backend=openvino,precision=bf16", here) == ModelSpec(
        Path("torch"), "openvino", "bf16"
    )
    for wrong in ("", "a,b", "torch,openvino", "bundle="):
        with pytest.raises(InputError, match="is not understood"):
            spec_from_text(wrong, here)


def test_one_model_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="named twice"):
        run(pairs(tmp_path), SPEC, SPEC, cache=tmp_path / "cache")


def test_where_no_picture_is_there_the_option_is_named(tmp_path: Path) -> None:
    path = put_lines(tmp_path / "x.jsonl", [{"image": "absent.jpg", "caption": "x"}])
    with pytest.raises(InputError, match="--images"):
        run(DataName("table", str(path)), cache=tmp_path / "cache")


def test_the_command(tmp_path: Path) -> None:
    arguments = ["retrieval", "--data", "scenes:6", "--bundle", str(MODEL), "--backend", "onnxruntime"]
    arguments += ["--precision", "fp32", "--baseline", "torch", "--json", str(tmp_path / "found.json")]
    arguments += ["--csv", str(tmp_path / "found.csv"), "--markdown", str(tmp_path / "found.md")]
    result = CliRunner().invoke(evaluate, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads((tmp_path / "found.json").read_text())
    names = {f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)}
    assert names | {"images", "texts", "skipped", "made_by"} <= found.keys()
    assert all(0 <= found[name] <= 1 for name in names) and found["images"] == found["texts"] == 6
    assert found["made_by"]["backend"] == "torch" and found["compared"][0]["made_by"]["backend"] == "onnxruntime"
    assert (tmp_path / "found.md").read_text() == result.stdout
    again = CliRunner().invoke(evaluate, arguments, catch_exceptions=False)
    assert "All embeddings were kept" in again.stderr


def test_a_slip_in_a_name_replaces_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "retrieval", "--data", "scenes:3", "--json", str(tmp_path / "pairs.jsonl")])
    assert caught.value.code == 2 and "should end with .json" in capsys.readouterr().err
