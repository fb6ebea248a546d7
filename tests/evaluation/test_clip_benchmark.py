"""clip_benchmark's own command line on a data set of this machine's, against our figures."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
from scenes_task import MODEL, scenes_task

from longclip_rt.evaluation import clip_benchmark


def write_wds(folder: Path, members: list[tuple[str, bytes]], kind: str) -> None:
    """A data set in clip_benchmark's layout."""
    (folder / "test").mkdir(parents=True)
    (folder / "dataset_type.txt").write_text(kind)
    (folder / "test/nshards.txt").write_text("1")
    with tarfile.open(folder / "test/0.tar", "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, task: str, *more: str) -> dict[str, float]:
    output = folder / "found.json"
    arguments = ["clip_benchmark", "eval", "--model_type", "longclip_rt", "--model", str(MODEL), "--no_amp", "--quiet"]
    arguments += ["--pretrained", "onnxruntime,fp32", "--dataset", "wds/scenes", "--dataset_root", str(folder)]
    arguments += ["--task", task, "--num_workers", "0", "--batch_size", "16", "--output", str(output), *more]
    monkeypatch.setattr(sys, "argv", arguments)
    clip_benchmark.main()
    found: dict[str, float] = json.loads(output.read_text())["metrics"]
    return found


@pytest.mark.filterwarnings("ignore:WebDataset")
def test_clip_benchmark_finds_what_we_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    task = scenes_task(tmp_path / "pictures")
    members = []
    for number, (image, captions) in enumerate(zip(task.images, task.captions, strict=True)):
        members += [(f"{number:04}.png", image.read_bytes()), (f"{number:04}.txt", "\n".join(captions).encode())]
    write_wds(tmp_path / "wds", members, "retrieval")
    found = run(monkeypatch, tmp_path / "wds", "zeroshot_retrieval", "--recall_k", "1", "5", "10")
    for k in (1, 5, 10):
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(task.figures[f"t2i_r{k}"], abs=1e-6)
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(task.figures[f"i2t_r{k}"], abs=1e-6)
