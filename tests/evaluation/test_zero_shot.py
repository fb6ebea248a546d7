from __future__ import annotations

import errno
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from layout_cases import put
from PIL import Image

from longclip_rt.bundle.bundle import BUILT_IN
from longclip_rt.commands.evaluate import evaluate
from longclip_rt.errors import InputError
from longclip_rt.evaluation import zero_shot_run
from longclip_rt.evaluation.cache import opened_entry
from longclip_rt.evaluation.cifar import load_cifar
from longclip_rt.evaluation.classes import Classified, classes_from_name, load_classified
from longclip_rt.evaluation.models import ModelSpec
from longclip_rt.evaluation.prompts import class_names, templates_from_name
from longclip_rt.evaluation.zero_shot_run import class_vectors
from longclip_rt.metrics import zero_shot_accuracy
from longclip_rt.runtime import Embedder

MODEL = BUILT_IN


def loaded(name: str | Path, home: Path, templates: str | None = None, classes: Path | None = None) -> Classified:
    data = classes_from_name(str(name), templates, classes)
    with opened_entry(home, data.kind, data.as_json()) as entry:
        return load_classified(data, entry, 32)


def cifar_images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(count, 3, 32, 32), dtype=np.uint8)


def write_cifar(folder: Path, kind: str, binary: bool) -> np.ndarray:
    """Four test images in the release's own layout; uint8 [4, 3, 32, 32]."""
    images, labels = cifar_images(4), [1, 0, 2, 1]
    names = ["airplane", "aquarium_fish", "bird"]
    rows = images.reshape(4, -1)
    if kind == "cifar10":
        folder = folder / ("cifar-10-batches-bin" if binary else "cifar-10-batches-py")
        test, meta, keys, head = "test_batch", "batches.meta", ("labels", "label_names"), [[n] for n in labels]
    else:
        folder = folder / ("cifar-100-binary" if binary else "cifar-100-python")
        test, meta, keys, head = "test", "meta", ("fine_labels", "fine_label_names"), [[9, n] for n in labels]
    folder.mkdir(parents=True)
    if binary:
        np.hstack([np.array(head, np.uint8), rows]).tofile(folder / f"{test}.bin")
        name = "batches.meta.txt" if kind == "cifar10" else "fine_label_names.txt"
        (folder / name).write_text("\n".join(names) + "\n\n")
    else:
        content = pickle.dumps({keys[0]: labels, "data": rows, "filenames": ["x.png"] * 4}, protocol=2)
        # As numpy called its module when these were written.
        (folder / test).write_bytes(content.replace(b"numpy._core.", b"numpy.core."))
        (folder / meta).write_bytes(pickle.dumps({keys[1]: names}, protocol=2))
    return images


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar_as_it_is_downloaded(kind: str, binary: bool, tmp_path: Path) -> None:
    images = write_cifar(tmp_path, kind, binary)
    found = loaded(tmp_path, tmp_path / "cache", templates="photo")
    (question,) = found.questions
    assert question.classes == ("airplane", "aquarium fish", "bird") and question.labels.tolist() == [1, 0, 2, 1]
    assert question.prompts[1] == ("a photo of a aquarium fish.",)
    for path, expected in zip(found.images, images, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), expected.transpose(1, 2, 0))


class Harmful:
    def __reduce__(self) -> Any:
        return (print, ("code that a pickle brings",))


def test_a_pickle_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cifar(tmp_path, "cifar10", False)
    (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(pickle.dumps({"labels": Harmful()}))
    with pytest.raises(InputError, match=r"builtins\.print"):
        load_cifar(tmp_path, "cifar10")
    assert capsys.readouterr().out == ""


def test_a_damaged_release_is_told(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar100", True)
    test = tmp_path / "cifar-100-binary/test.bin"
    test.write_bytes(test.read_bytes()[:-1])
    with pytest.raises(InputError, match="not a multiple of 3074"):
        load_cifar(tmp_path, "cifar100")
    with pytest.raises(InputError, match="holds neither cifar-10-batches-py"):
        load_cifar(tmp_path, "cifar10")


def test_folders_are_classes_and_what_takes_no_part_is_said(tmp_path: Path) -> None:
    put(tmp_path / "data", "red_ball/1.png", "red_ball/more/2.png", "tree/3.png")
    (tmp_path / "data/tree/notes.md").touch()
    (tmp_path / "data/nothing").mkdir()
    found = loaded(tmp_path / "data", tmp_path / "cache")
    (question,) = found.questions
    assert question.classes == ("nothing", "red ball", "tree") and question.labels.tolist() == [1, 1, 2]
    assert [(one.id, one.reason.split(".")[0]) for one in found.skipped] == [
        ("tree/notes.md", "It is no picture by its name"),
        ("nothing", "The class has no images"),
    ]
    with pytest.raises(InputError, match="holds 1 folders"):
        loaded(f"folder:{tmp_path / 'data/red_ball'}", tmp_path / "cache")


def test_imagenet_by_folders_and_by_kaggles_table(tmp_path: Path) -> None:
    import open_clip

    put(tmp_path / "a/val", "n01440764/ILSVRC2012_val_00000293.JPEG", "n15075141/x.JPEG", "n99999999/y.JPEG")
    found = loaded(tmp_path / "a", tmp_path / "cache")
    (question,) = found.questions
    assert question.labels.tolist() == [0, 999] and question.classes == tuple(open_clip.IMAGENET_CLASSNAMES)
    assert len(question.prompts[0]) == 80 and question.prompts[0][0] == "a bad photo of a tench."
    assert found.skipped[0].id == "n99999999" and len(found.skipped) == 1 + 998
    put(tmp_path / "b/ILSVRC/Data/CLS-LOC/val", "ILSVRC2012_val_00000001.JPEG")
    rows = "ImageId,PredictionString\nILSVRC2012_val_00000001,n01751748 111 108 431 323 \nx,none\n"
    (tmp_path / "b/LOC_val_solution.csv").write_text(rows)
    kaggle = loaded(tmp_path / "b", tmp_path / "cache", templates="simple-7")
    assert kaggle.questions[0].labels.tolist() == [65] and kaggle.images[0].is_file()
    put(tmp_path / "c/ILSVRC/Data/CLS-LOC/val", "n01751748/ILSVRC2012_val_00000001.JPEG")  # sorted, as many keep it
    (tmp_path / "c/LOC_val_solution.csv").write_text(rows)
    sorted_in = loaded(tmp_path / "c", tmp_path / "cache", templates="photo")
    assert sorted_in.questions[0].labels.tolist() == [65] and sorted_in.images[0].is_file()
    assert kaggle.skipped[0].id == "LOC_val_solution.csv:2" and len(kaggle.questions[0].prompts[0]) == 7


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"labels": [0], "data": [[300] * 3072]}, "is not CIFAR's test file"),
        ({"labels": 3, "data": [[0] * 3072]}, "does not fit"),
        ({"labels": [[0]], "data": [[0] * 3072]}, "does not fit"),
        (b"cnumpy.f2py.__main__\ndtype\n.", "it holds numpy.f2py.__main__.dtype"),  # runs a program when imported
        (b"cnumpy.absent\ndtype\n.", "it holds numpy.absent.dtype"),
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "is not CIFAR's pickle"),
        (b'c_codecs\nencode\n(S"a"\nS"nonsense"\ntR.', "is not CIFAR's pickle"),
    ],
)
def test_odd_pickles_are_told(content: Any, said: str, tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar10", binary=False)
    raw = content if isinstance(content, bytes) else pickle.dumps(content)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(raw)
    with pytest.raises(InputError, match=said):
        load_cifar(tmp_path, "cifar10")


def test_names_and_templates_can_be_given(tmp_path: Path) -> None:
    put(tmp_path / "data", "a/1.png", "b/2.png")
    (tmp_path / "names.txt").write_text("a goat\na bee\n")
    (tmp_path / "templates.txt").write_text("{} in a field\nthis is {}\n")
    found = loaded(tmp_path / "data", tmp_path / "cache", str(tmp_path / "templates.txt"), tmp_path / "names.txt")
    assert found.questions[0].prompts == (
        ("a goat in a field", "this is a goat"),
        ("a bee in a field", "this is a bee"),
    )
    (tmp_path / "by folder.txt").write_text("b\ta bee\na\ta goat\n")
    assert class_names(tmp_path / "by folder.txt", ("a", "b")) == ("a goat", "a bee")
    (tmp_path / "short.txt").write_text("b\ta bee\n")
    for file, said in (("names.txt", "names 2 classes"), ("short.txt", "no name for the class 'a'")):
        with pytest.raises(InputError, match=said):
            class_names(tmp_path / file, ("a", "b", "c"))
    (tmp_path / "wrong.txt").write_text("a photo\n")
    with pytest.raises(InputError, match="once, where the class"):
        templates_from_name(str(tmp_path / "wrong.txt"))
    with pytest.raises(InputError, match="photo, openai-80, simple-7"):
        templates_from_name("openai-81")
    with pytest.raises(InputError, match="is no folder"):
        classes_from_name("absent", None, None)


def test_the_command_agrees_with_the_embedder_and_asks_scenes_twice(tmp_path: Path) -> None:
    arguments = ["zero-shot", "--data", "scenes:24", "--bundle", str(MODEL), "--backend", "onnxruntime"]
    arguments += ["--precision", "fp32", "--compare", "onnxruntime,fp16", "--json", str(tmp_path / "f.json")]
    arguments += ["--csv", str(tmp_path / "f.csv")]
    result = CliRunner().invoke(evaluate, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["images"] == 24 and found["classes"] == 24 and found["questions"]["colour"]["classes"] == 10
    assert found["top1"] == found["questions"]["kind"]["top1"] and 0 <= found["top1"] <= found["top5"] <= 1
    scenes = loaded("scenes:24", tmp_path / "cache")
    data = classes_from_name("scenes:24", None, None)
    with (
        Embedder.from_bundle(MODEL, "onnxruntime", "fp32") as embedder,
        opened_entry(tmp_path / "cache", data.kind, data.as_json()) as entry,
    ):
        scenes = load_classified(data, entry, embedder.image_size)
        images = embedder.embed_images(scenes.images)
        for question in scenes.questions:
            texts = np.stack([embedder.embed_texts(prompts).mean(axis=0) for prompts in question.prompts])
            expected = zero_shot_accuracy(images, texts, question.labels)
            assert found["questions"][question.name]["top1"] == pytest.approx(expected)
    assert found["questions"]["colour"]["top1"] > 0.5
    assert (tmp_path / "f.csv").read_text().count("\n") == 1 + 2 * 2
    assert "points above" in result.stdout


def test_a_broken_picture_is_said_and_not_counted(tmp_path: Path) -> None:
    put(tmp_path / "data", "a/1.png", "b/2.png")
    put(tmp_path / "data", "beside.png")
    (tmp_path / "data/b/3.png").write_bytes(b"no picture")
    arguments = ["zero-shot", "--data", str(tmp_path / "data"), "--bundle", str(MODEL), "--backend", "onnxruntime"]
    result = CliRunner().invoke(evaluate, [*arguments, "--json", str(tmp_path / "f.json")], catch_exceptions=False)
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["images"] == 2 and [one["id"] for one in found["skipped"]] == ["beside.png", "b/3.png"]
    assert "Skipped: 2" in result.stderr and "b/3.png" in result.stderr


def test_a_disk_that_refuses_to_be_read_is_told_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "bad/1.png")

    monkeypatch.setattr(zero_shot_run, "load_classified", refuse)
    put(tmp_path / "data", "a/1.png", "b/2.png")
    data = classes_from_name(str(tmp_path / "data"), None, None)
    with pytest.raises(InputError, match=r"'bad/1\.png' cannot be read: Input/output error"):
        zero_shot_run.evaluate_zero_shot(data, [ModelSpec(MODEL, "onnxruntime", "fp32")], cache=tmp_path / "cache")


def test_a_class_is_the_mean_of_its_normalised_prompts() -> None:
    texts = np.array([[2, 0], [0, 1], [0, 5]], np.float32)
    np.testing.assert_allclose(class_vectors(texts, [2, 1]), [[0.5**0.5, 0.5**0.5], [0, 1]], rtol=1e-6)
