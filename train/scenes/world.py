"""What a procedural scene is, and how one is sampled from a seed and an index."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longclip_rt.errors import LongClipError
from longclip_rt.train.scenes.words import CELLS, COLOURS, KINDS, RELATIONS, SETTINGS, SIZES, TEXTURES, Cell

FEWEST, MOST = 4, 7
"""Things of a scene where nothing else is asked for."""
LIMIT = 9
"""Things that a scene can hold: one a cell. The captions of so many just fit into 248 tokens."""


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Attributes:
        kind, colour, texture, size: Words of `scene_words`.
        cell: (row, column) in a grid of 3 x 3; no two things share one.
        flipped: Drawn mirrored. No caption says so.
        shift: (right, down), each in [-1, 1]: how far it leaves the middle of its cell, as a share of the room there.
    """

    kind: str
    colour: str
    texture: str
    size: str
    cell: Cell
    flipped: bool = False
    shift: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Relation:
    """ "things[subject] is `words` things[reference]": the subject is named later than the reference."""

    subject: int
    words: str
    reference: int


@dataclass(frozen=True)
class Scene:
    """A picture in symbols: everything that its drawing and its captions need.

    Attributes:
        setting: Key of `SETTINGS`.
        things: From the most to the least important: the main thing first, then the big, then the small ones.
        relations: True statements, for every thing but the main one at most one.
        offset: (right, down), each in [0, 1): where the background's pattern begins.
        manner: Seeds the choice of sentences, and nothing else. A twin has the same.
    """

    setting: str
    things: tuple[Thing, ...]
    relations: tuple[Relation, ...]
    offset: tuple[float, float]
    manner: int


def scene(seed: int, index: int, things: tuple[int, int] = (FEWEST, MOST)) -> Scene:
    """Scene number `index` of the world `seed`; the same on every machine, whatever was sampled before.

    Args:
        seed: At least 0. Sets that must not share scenes (training, validation) take different seeds.
        index: At least 0.
        things: Fewest and most things in it, from 1 to `LIMIT`. Fewer than the default are for first lessons, with
            short captions; more have captions of 155 to 240 tokens.

    Raises:
        LongClipError: A number is out of range.
    """
    if seed < 0 or index < 0 or not 1 <= things[0] <= things[1] <= LIMIT:
        raise LongClipError(
            f"scene({seed}, {index}, {things}): seed and index must be at least 0, and things from 1 to {LIMIT}."
        )
    rng = np.random.default_rng((seed, index))
    count = int(rng.integers(things[0], things[1] + 1))
    kinds = rng.permutation(len(KINDS))[:count]
    cells = rng.permutation(len(CELLS))[:count]
    sizes = _sample_sizes(rng, count)
    colours = rng.integers(len(COLOURS), size=count)
    textures = rng.integers(len(TEXTURES), size=count)
    flips = rng.random(count) < 0.5
    shifts = np.round(rng.uniform(-1, 1, size=(count, 2)), 2)
    drawn = tuple(
        Thing(
            kind=KINDS[kinds[k]],
            colour=list(COLOURS)[colours[k]],
            texture=TEXTURES[textures[k]],
            size=sizes[k],
            cell=CELLS[cells[k]],
            flipped=bool(flips[k]),
            shift=(float(shifts[k, 0]), float(shifts[k, 1])),
        )
        for k in range(count)
    )
    return Scene(
        setting=list(SETTINGS)[rng.integers(len(SETTINGS))],
        things=drawn,
        relations=_sample_relations(rng, drawn),
        offset=(float(np.round(rng.random(), 3)), float(np.round(rng.random(), 3))),
        manner=int(rng.integers(1 << 31)),
    )


def sizes_are_ordered(things: tuple[Thing, ...]) -> bool:
    """Whether the main thing is larger than all others, and no thing larger than one before it."""
    ranks = [SIZES.index(thing.size) for thing in things]
    return ranks == sorted(ranks) and ranks[0] < min(ranks[1:], default=len(SIZES))


def relation_holds(relation: Relation, things: tuple[Thing, ...]) -> bool:
    """Whether a relation is plainly true: its direction is the main one, or one of the two of a diagonal."""
    return relation.words in _true_words(things[relation.subject].cell, things[relation.reference].cell)


def _true_words(subject: Cell, reference: Cell) -> list[str]:
    down, right = subject[0] - reference[0], subject[1] - reference[1]
    across = abs(right) >= abs(down)
    along = abs(down) >= abs(right)
    truths = (right < 0 and across, right > 0 and across, down < 0 and along, down > 0 and along)
    return [words for words, true in zip(RELATIONS, truths, strict=True) if true]


def _sample_sizes(rng: np.random.Generator, count: int) -> list[str]:
    if rng.random() < 0.25:
        return ["big"] + ["small"] * (count - 1)
    big = int(rng.integers(0, count))
    return ["huge"] + ["big"] * big + ["small"] * (count - 1 - big)


def _sample_relations(rng: np.random.Generator, things: tuple[Thing, ...]) -> tuple[Relation, ...]:
    relations = []
    for subject in range(1, len(things)):
        # Half of the relations are to the main thing, so that the others' kinds are seldom named twice.
        reference = 0 if rng.random() < 0.5 else int(rng.integers(subject))
        words = _true_words(things[subject].cell, things[reference].cell)
        relations.append(Relation(subject, words[rng.integers(len(words))], reference))
    return tuple(relations)
