"""The words and colours of the procedural world: what things are, how they look, where they stand.

Captions are to be learned by a small model whose tokenizer keeps only the first merges of CLIP's vocabulary. So the
words are short and common: all are one token of CLIP's vocabulary, and nearly all one token of the shorter one.
"""

from __future__ import annotations

from dataclasses import dataclass

from longclip_rt.errors import LongClipError

Colour = tuple[int, int, int]

KINDS: tuple[str, ...] = (
    "ball", "box", "star", "heart", "ring", "cross", "moon", "tree", "house", "fish", "cup", "flower",
    "key", "diamond", "drop", "bell", "hat", "boat", "car", "apple", "crown", "flag", "bottle", "chair",
)  # fmt: skip

# Name -> (fill, contrast). The contrast draws stripes, spots and checks: light on dark colours, dark on light ones.
COLOURS: dict[str, tuple[Colour, Colour]] = {
    "red": ((220, 30, 35), (255, 235, 235)),
    "orange": ((255, 135, 0), (255, 243, 222)),
    "yellow": ((255, 225, 20), (120, 85, 0)),
    "green": ((25, 150, 45), (228, 255, 228)),
    "blue": ((25, 70, 225), (225, 235, 255)),
    "purple": ((130, 35, 165), (245, 228, 255)),
    "pink": ((255, 125, 190), (130, 10, 75)),
    "brown": ((120, 66, 25), (250, 228, 205)),
    "black": ((18, 18, 20), (225, 225, 225)),
    "white": ((252, 252, 252), (135, 140, 150)),
}

TEXTURES: tuple[str, ...] = ("solid", "striped", "spotted", "checked", "hollow")

# From the most to the least important. The main thing of a scene is larger than all others.
SIZES: tuple[str, ...] = ("huge", "big", "small")

Cell = tuple[int, int]
CELLS: tuple[Cell, ...] = tuple((row, column) for row in range(3) for column in range(3))

# Two manners of naming the nine cells; a scene keeps to one, so that a moved thing changes no other word.
PLACES: tuple[dict[Cell, str], ...] = (
    {
        (0, 0): "in the upper left corner",
        (0, 1): "at the top edge",
        (0, 2): "in the upper right corner",
        (1, 0): "at the left edge",
        (1, 1): "in the center",
        (1, 2): "at the right edge",
        (2, 0): "in the lower left corner",
        (2, 1): "at the bottom edge",
        (2, 2): "in the lower right corner",
    },
    {
        (0, 0): "in the top left corner",
        (0, 1): "in the middle of the top edge",
        (0, 2): "in the top right corner",
        (1, 0): "in the middle of the left edge",
        (1, 1): "in the very center",
        (1, 2): "in the middle of the right edge",
        (2, 0): "in the bottom left corner",
        (2, 1): "in the middle of the bottom edge",
        (2, 2): "in the bottom right corner",
    },
)

RELATIONS: tuple[str, ...] = ("to the left of", "to the right of", "above", "below")


@dataclass(frozen=True)
class Setting:
    """A background in words.

    Attributes:
        where: "on a green field": ends a sentence about a thing.
        what: "a green field": what can be seen behind the things.
        details: Sentences about the background, true of every scene that has it.
    """

    where: str
    what: str
    details: tuple[str, str]


SETTINGS: dict[str, Setting] = {
    "field": Setting(
        "on a green field",
        "a wide green field",
        ("Short fresh grass covers the ground.", "It is a calm day in the open field."),
    ),
    "night": Setting(
        "in the night sky",
        "a dark night sky",
        ("The air is clear and very dark.", "Tiny lights can be seen far away in the night."),
    ),
    "beach": Setting(
        "on a beach",
        "a warm sand beach",
        ("Fine sand covers the ground.", "Small waves come in from the water at the top."),
    ),
    "snow": Setting(
        "in the snow",
        "a cold field of snow",
        ("Fresh snow covers all of the ground.", "It is a cold and quiet day."),
    ),
    "wall": Setting(
        "in front of a stone wall",
        "an old stone wall",
        ("The wall is made of flat gray stone.", "One row of stone lies on top of the next."),
    ),
    "floor": Setting(
        "on a wood floor",
        "a flat wood floor",
        ("The floor is made of long boards.", "The wood is clean and the light is soft."),
    ),
    "sea": Setting(
        "on the open sea",
        "the deep open sea",
        ("Soft waves move over the water.", "There is no land to be seen, only water."),
    ),
    "sunset": Setting(
        "in front of a sunset",
        "a warm sunset sky",
        ("Soft evening light is all over the sky.", "The day is over and the sun is going down."),
    ),
}

NUMBERS: dict[int, str] = {
    1: "one",
    2: "two",
    3: "three",
    4: "four",
    5: "five",
    6: "six",
    7: "seven",
    8: "eight",
    9: "nine",
}


def class_prompt(kind: str) -> str:
    """The zero-shot prompt of a kind: "a photo of a ball".

    Raises:
        LongClipError: There is no such kind.
    """
    if kind not in KINDS:
        raise LongClipError(f"There is no kind {kind!r} in the scenes; choose one of {', '.join(KINDS)}.")
    return f"a photo of {with_article(kind)}"


def with_article(words: str) -> str:
    """Puts "a" or "an" before words of this vocabulary: "an orange ball"."""
    return f"{'an' if words[0] in 'aeio' else 'a'} {words}"
