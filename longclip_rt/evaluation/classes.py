"""Images with classes, for zero-shot classification: folders, CIFAR, ImageNet and drawn scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longclip_rt.errors import InputError
from longclip_rt.evaluation.cache import Entry
from longclip_rt.evaluation.cifar import RELEASES, cifar_kind, load_cifar
from longclip_rt.evaluation.collection import Skipped
from longclip_rt.evaluation.data import DEFAULT_SCENES
from longclip_rt.evaluation.imagenet import imagenet_folder, load_imagenet
from longclip_rt.evaluation.prompts import PHOTO, class_names, filled, templates_from_name
from longclip_rt.system.files import has_image_suffix
from longclip_rt.train.scenes.rows import PREFIX, Scenes, scenes_from_name

KINDS = ("folder", "imagenet", *RELEASES, "scenes")
"""What a data set's name may begin with; without one, its layout tells."""

IMAGENET_TEMPLATES = "openai-80"


@dataclass(frozen=True)
class ClassesName:
    """A data set, as it was named.

    Attributes:
        kind: One of `KINDS`.
        path: Its folder; of scenes, how many.
        templates: A name of `prompts.NAMES` or a file; None: those of the kind.
        classes: A file of class names; None: the data set's own.
    """

    kind: str
    path: str
    templates: str | None = None
    classes: Path | None = None

    def as_json(self) -> dict[str, Any]:
        """What tells it from others, and stands in a report."""
        return {"kind": self.kind, "path": self.path if self.kind == "scenes" else str(Path(self.path).absolute())}


@dataclass(frozen=True)
class Question:
    """What is asked of each image.

    Attributes:
        name: What the classes are: "class", "kind", "colour".
        classes: C names.
        prompts: Of each class, the texts whose mean stands for it.
        labels: int64 [N], the class of each image.
    """

    name: str
    classes: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Classified:
    """A data set.

    Attributes:
        images: Files of N images.
        names: How the N images are called.
        questions: What is asked, the main question first.
        templates: What the prompts were made with.
        skipped: What takes no part.
    """

    images: tuple[Path, ...]
    names: tuple[str, ...]
    questions: tuple[Question, ...]
    templates: str
    skipped: tuple[Skipped, ...]


def classes_from_name(name: str, templates: str | None, classes: Path | None) -> ClassesName:
    """Reads `KIND:PATH`, or a path whose layout tells the kind.

    Raises:
        InputError: There is no such folder.
    """
    kind, colon, path = name.partition(":")
    if kind == "scenes" and not path:
        colon, path = ":", DEFAULT_SCENES
    if colon and kind in KINDS and path:
        return ClassesName(kind, path, templates, classes)
    folder = Path(name)
    if not folder.is_dir():
        raise InputError(f"{name!r} is no folder. Name one, or KIND:PATH with one of the kinds {', '.join(KINDS)}.")
    found = cifar_kind(folder) or ("imagenet" if imagenet_folder(folder) else "folder")
    return ClassesName(found, name, templates, classes)


def load_classified(data: ClassesName, entry: Entry, image_size: int) -> Classified:
    """Reads a data set.

    Args:
        data: Which one.
        entry: Where pictures that are no files are written.
        image_size: Height and width of drawn scenes in pixels.

    Raises:
        InputError: It cannot be read.
        MissingExtraError: A package is not installed.
    """
    if data.kind == "scenes":
        if data.templates or data.classes:
            raise InputError("Scenes have prompts of their own. Leave --templates and --classes out.")
        return _scenes(scenes_from_name(PREFIX + data.path).for_tests(), entry, image_size)
    if data.kind == "imagenet":
        images, labels, folders, own_names, skipped = load_imagenet(Path(data.path))
    elif data.kind in RELEASES:
        images, labels, own_names = _cifar(data, entry)
        folders, skipped = own_names, ()
    else:
        images, labels, folders, skipped = _folder(Path(data.path))
        own_names = tuple(name.replace("_", " ") for name in folders)
    classes = own_names if data.classes is None else class_names(data.classes, folders)
    if data.kind in RELEASES:
        names = tuple(f"test image {number}" for number in range(len(images)))
    else:
        names = tuple("/".join(path.parts[-2:]) for path in images)
    named = data.templates or (PHOTO if data.kind == "folder" else IMAGENET_TEMPLATES)
    templates = templates_from_name(named)
    prompts = tuple(filled(templates, name) for name in classes)
    without = sorted(set(range(len(classes))) - set(labels.tolist()))
    skipped += tuple(
        Skipped(folders[number], "The class has no images. It stays among the answers.") for number in without
    )
    return Classified(images, names, (Question("class", classes, prompts, labels),), named, skipped)


def _folder(path: Path) -> tuple[tuple[Path, ...], NDArray[np.int64], tuple[str, ...], tuple[Skipped, ...]]:
    """A folder for each class, in sorted order, and the pictures below it."""
    if not path.is_dir():
        raise InputError(f"{str(path)!r} is no folder. Name one that holds a folder of pictures for each class.")
    folders = sorted(one for one in path.iterdir() if one.is_dir() and not one.name.startswith("."))
    if len(folders) < 2:
        raise InputError(
            f"{str(path)!r} holds {len(folders)} folders. Name one that holds a folder of pictures for each of two or "
            "more classes."
        )
    images, labels = [], []
    skipped = [
        Skipped(one.name, "It lies beside the folders of the classes.")
        for one in sorted(path.iterdir())
        if one.is_file() and has_image_suffix(one)
    ]
    for number, folder in enumerate(folders):
        for file in sorted(one for one in folder.rglob("*") if one.is_file() and not one.name.startswith(".")):
            if has_image_suffix(file):
                images.append(file)
                labels.append(number)
            else:
                skipped.append(Skipped(str(file.relative_to(path)), "It is no picture by its name."))
    if not images:
        raise InputError(f"The folders in {str(path)!r} hold no pictures.")
    return tuple(images), np.array(labels, np.int64), tuple(one.name for one in folders), tuple(skipped)


def _cifar(data: ClassesName, entry: Entry) -> tuple[tuple[Path, ...], NDArray[np.int64], tuple[str, ...]]:
    from PIL import Image

    found = load_cifar(Path(data.path), data.kind)
    images = tuple(entry.store(Image.fromarray(pixels)) for pixels in found.images)
    return images, found.labels, found.classes


def _scenes(scenes: Scenes, entry: Entry, image_size: int) -> Classified:
    """Of each scene's main thing, the kind and the colour are asked for."""
    from longclip_rt.train.scenes import COLOURS, KINDS, class_prompt, main_kind, render, scene
    from longclip_rt.train.scenes.words import with_article

    scenes.check_size(image_size)
    drawn = [scene(scenes.seed, index, scenes.things) for index in range(scenes.count)]
    images = tuple(entry.store(render(one, image_size)) for one in drawn)
    colours = tuple(COLOURS)
    of_colours = (
        # A colour needs a noun; the mean over all kinds stands for none of them.
        tuple(f"a photo of {with_article(f'{colour} {kind}')}" for kind in KINDS)
        for colour in colours
    )
    questions = (
        _question("kind", KINDS, ((class_prompt(kind),) for kind in KINDS), [main_kind(one) for one in drawn]),
        _question("colour", colours, of_colours, [one.things[0].colour for one in drawn]),
    )
    names = tuple(f"scene {index}" for index in range(scenes.count))
    return Classified(images, names, questions, "of the scenes", ())


def _question(name: str, classes: Sequence[str], prompts: Any, answers: Sequence[str]) -> Question:
    labels = np.array([classes.index(answer) for answer in answers], np.int64)
    return Question(name, tuple(classes), tuple(prompts), labels)
