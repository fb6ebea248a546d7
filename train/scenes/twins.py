"""Twins of procedural scenes: the same scene but for one attribute of one thing, and where captions tell it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from longclip_rt.errors import LongClipError
from longclip_rt.train.scenes.captions import long_caption, split_words
from longclip_rt.train.scenes.words import CELLS, COLOURS, KINDS, SIZES, TEXTURES
from longclip_rt.train.scenes.world import Scene, Thing, relation_holds, sizes_are_ordered

ATTRIBUTES: tuple[str, ...] = ("colour", "kind", "texture", "size", "cell")

_VALUES: dict[str, tuple[object, ...]] = {
    "colour": tuple(COLOURS),
    "kind": KINDS,
    "texture": TEXTURES,
    "size": SIZES,
    "cell": CELLS,
}


@dataclass(frozen=True)
class Twin:
    """A scene that differs from another in one attribute of one thing.

    Attributes:
        scene: The changed scene.
        caption: Its long caption: the other's, but for the words of the detail, and with as many words.
        which: Number of the changed thing; 0 is the main one.
        detail: The changed attribute, one of `ATTRIBUTES`.
        before, after: The words that differ, in the other's caption and in this one.
        position: Place of the first differing token, the start token counted as 0, where every word is one token, as it
            is in CLIP's vocabulary. For other vocabularies ask `detail_position`.
    """

    scene: Scene
    caption: str
    which: int
    detail: str
    before: str
    after: str
    position: int


def twin(scene: Scene, index: int = 0, which: int | None = None, detail: str | None = None) -> Twin:
    """Changes one attribute of one thing, such that both captions tell it with different words in one place.

    Relations stay true, the main thing stays the largest, no two things are of one kind or in one cell.

    Args:
        scene: The scene to change; it is left as it is.
        index: Chooses among the possible changes; the same number gives the same twin.
        which: Number of the thing to change, 0 for the main one. Later ones stand later in the caption.
        detail: The attribute to change, one of `ATTRIBUTES`.

    Raises:
        LongClipError: The arguments name no thing or attribute, or the scene has no such twin. Colour and texture of
            every thing can be changed in every scene.
    """
    if which is not None and not 0 <= which < len(scene.things):
        raise LongClipError(f"which is {which}; the scene has things 0 to {len(scene.things) - 1}.")
    if detail is not None and detail not in ATTRIBUTES:
        raise LongClipError(f"detail is {detail!r}; expected one of {', '.join(ATTRIBUTES)}.")
    if index < 0:
        raise LongClipError(f"index is {index}; expected at least 0.")
    rng = np.random.default_rng((scene.manner, index))
    places = range(len(scene.things)) if which is None else [which]
    pairs = [(k, name) for k in places for name in (ATTRIBUTES if detail is None else [detail])]
    caption = long_caption(scene)
    for pair in rng.permutation(len(pairs)):
        k, name = pairs[pair]
        for changed in _changes(scene, k, name, rng):
            text = long_caption(changed)
            difference = _difference(caption, text)
            if difference is not None:
                position, before, after = difference
                return Twin(changed, text, k, name, before, after, position)
    raise LongClipError(
        f"The scene has no twin with which={which} and detail={detail!r}; leave one of them open, or ask for another "
        "detail: colour and texture can always be changed."
    )


def with_another_kind(scene: Scene, number: int) -> Scene:
    """The same scene with a main thing of another kind: 0 is its own, and no two numbers below 17 give the same.

    Nothing but the kind, in the picture and in the captions, tells these scenes apart.
    """
    main, *others = scene.things
    free = [kind for kind in KINDS if kind not in {thing.kind for thing in others}]
    kind = free[(free.index(main.kind) + number) % len(free)]
    return dataclasses.replace(scene, things=(dataclasses.replace(main, kind=kind), *others))


def with_another_detail(scene: Scene, number: int) -> Scene:
    """The same scene with one thing of another colour, kind or texture: 0 is its own, no two numbers below 5 are equal.

    Which thing, and which of the three, the scene says. Its caption differs in
    that word alone, wherever it stands.
    """
    rng = np.random.default_rng((scene.manner, 1))
    which, detail = int(rng.integers(len(scene.things))), ("colour", "kind", "texture")[rng.integers(3)]
    thing, taken = scene.things[which], {thing.kind for thing in scene.things}
    own = getattr(thing, detail)
    others = [value for value in _VALUES[detail] if value != own and not (detail == "kind" and value in taken)]
    values = [own, *(others[place] for place in rng.permutation(len(others)))]
    changed: Thing = dataclasses.replace(thing, **{detail: values[number % len(values)]})  # type: ignore[arg-type]
    return dataclasses.replace(scene, things=(*scene.things[:which], changed, *scene.things[which + 1 :]))


def detail_position(caption: str, other: str, tokenizer: Callable[[str], Sequence[int]]) -> int:
    """Place of the first token in which two captions differ.

    Args:
        caption: A caption.
        other: Its twin's.
        tokenizer: Gives a text's ids with the start token first, as `lambda text: tokenizer.encode(text).ids` does.

    Returns:
        The place, the start token counted as 0.

    Raises:
        LongClipError: The captions have the same tokens.
    """
    first, second = list(tokenizer(caption)), list(tokenizer(other))
    for place, (one, two) in enumerate(zip(first, second, strict=False)):
        if one != two:
            return place
    if len(first) == len(second):
        raise LongClipError(f"The captions have the same tokens, so no detail tells them apart: {caption!r}.")
    return min(len(first), len(second))


def _changes(scene: Scene, k: int, name: str, rng: np.random.Generator) -> Iterator[Scene]:
    """Lawful scenes with another value of one attribute, in random order."""
    values = _VALUES[name]
    for choice in rng.permutation(len(values)):
        value = values[choice]
        if value == getattr(scene.things[k], name):
            continue
        thing: Thing = dataclasses.replace(scene.things[k], **{name: value})  # type: ignore[arg-type]
        things = (*scene.things[:k], thing, *scene.things[k + 1 :])
        if is_lawful(dataclasses.replace(scene, things=things)):
            yield dataclasses.replace(scene, things=things)


def is_lawful(scene: Scene) -> bool:
    """Whether a scene keeps the world's rules: different kinds and cells, ordered sizes, true relations."""
    things = scene.things
    different = len({thing.kind for thing in things}) == len({thing.cell for thing in things}) == len(things)
    return (
        different
        and sizes_are_ordered(things)
        and all(relation_holds(relation, things) for relation in scene.relations)
    )


def _difference(caption: str, other: str) -> tuple[int, str, str] | None:
    """Place and words of the only difference of two captions; None when there are several, or lengths differ."""
    first, second = split_words(caption), split_words(other)
    places = [k for k, (one, two) in enumerate(zip(first, second, strict=False)) if one != two]
    # One detail is one word, or two neighbours: "upper left" and "lower right", "an orange" and "a red".
    if len(first) != len(second) or not places or places[-1] - places[0] > 1:
        return None
    stretch = slice(places[0], places[-1] + 1)
    return places[0] + 1, " ".join(first[stretch]), " ".join(second[stretch])
