"""mteb's own evaluator on a task of this machine's, against our figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from scenes_task import MODEL, ScenesTask, scenes_task


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> ScenesTask:
    return scenes_task(tmp_path_factory.mktemp("scenes"))


def mteb_tasks(scenes: ScenesTask) -> list[Any]:
    import datasets
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    texts = [text for captions in scenes.captions for text in captions]
    of = [number for number, captions in enumerate(scenes.captions) for _ in captions]
    images = datasets.Dataset.from_dict(
        {"id": [f"i{n}" for n in range(len(scenes.images))], "image": [Image.open(path) for path in scenes.images]}
    ).cast_column("image", datasets.Image())
    captions = datasets.Dataset.from_dict({"id": [f"t{n}" for n in range(len(texts))], "text": texts})
    t2i = {f"t{text}": {f"i{image}": 1} for text, image in enumerate(of)}
    i2t: dict[str, dict[str, int]] = {}
    for text, image in enumerate(of):
        i2t.setdefault(f"i{image}", {})[f"t{text}"] = 1

    def made(way: str, queries: Any, corpus: Any, right: Any) -> Any:
        class Scenes(AbsTaskRetrieval):  # type: ignore[misc]
            metadata = TaskMetadata(
                name=f"Scenes{way}",
                description="Drawn scenes",
                reference=None,
                dataset={"path": "made/here", "revision": "1"},
                type="Any2AnyRetrieval",
                category=way,
                modalities=["text", "image"],
                eval_splits=["test"],
                eval_langs=["eng-Latn"],
                main_score="hit_rate_at_1",
                date=None,
                domains=None,
                task_subtypes=None,
                license=None,
                annotations_creators=None,
                dialect=None,
                sample_creation=None,
                bibtex_citation=None,
            )

            def load_data(self, *_: Any, **__: Any) -> None:
                split = {"queries": queries, "corpus": corpus, "relevant_docs": right, "top_ranked": None}
                self.dataset = {"default": {"test": split}}
                self.data_loaded = True

        return Scenes()

    return [made("t2i", captions, images, t2i), made("i2t", images, captions, i2t)]


def test_mteb_finds_what_we_find(task: ScenesTask, tmp_path: Path) -> None:
    import mteb

    from longclip_rt.evaluation.mteb import mteb_model

    model = mteb_model(MODEL, "onnxruntime", "fp32")
    cache = mteb.ResultCache(tmp_path)
    mteb.evaluate(model, mteb_tasks(task), cache=cache, encode_kwargs={"batch_size": 16}, show_progress_bar=False)
    model.embedder.close()
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.rglob("Scenes*.json")}
    for way in ("t2i", "i2t"):
        scores = found[f"Scenes{way}"]["scores"]["test"][0]
        for k in (1, 5, 10):
            assert scores[f"hit_rate_at_{k}"] == pytest.approx(task.figures[f"{way}_r{k}"], abs=1e-4), (way, k)
    (folder,) = {path.parent for path in tmp_path.rglob("Scenes*.json")}
    assert folder.name.endswith("-onnxruntime-fp32")


def test_without_mteb_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from longclip_rt.errors import MissingExtraError

    monkeypatch.delitem(sys.modules, "longclip_rt.evaluation.mteb", raising=False)
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(MissingExtraError, match=r"longclip-rt\[evaluate\]"):
        import longclip_rt.evaluation.mteb  # noqa: F401
