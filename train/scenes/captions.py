"""Sentences about a procedural scene: short, long, and one by one."""

from __future__ import annotations

import re

import numpy as np

from longclip_rt.train.scenes.words import NUMBERS, PLACES, SETTINGS, with_article
from longclip_rt.train.scenes.world import Scene, Thing

# Words and punctuation marks of a long caption, at least; each is one token of CLIP's vocabulary or more. With start
# and end tokens this makes 102 tokens, so that a twin whose place has fewer words stays above 100.
_FEWEST_WORDS = 100

_SHORT = (
    "{A} {size} {texture} {colour} {kind} {where}.",
    "A picture of {a} {size} {texture} {colour} {kind} {where}.",
    "{A} {texture} {colour} {kind} {where}.",
    "There is {a} {texture} {colour} {kind} {where}.",
)

_MAIN = (
    "The main thing is {a} {size} {texture} {colour} {kind} {place}.",
    "{A} {size} {texture} {colour} {kind} is {place} and takes up the most room.",
    "The picture shows {a} {size} {texture} {colour} {kind} {place}.",
    "We first see {a} {size} {texture} {colour} {kind}, which is {place}.",
    "{Place} is {a} {size} {texture} {colour} {kind}, the largest thing of all.",
)

# Each names kind, colour, texture, size and place once; {relation} is "" or ", above the ball", {aside} "" or
# ", above the ball,".
_OTHER = (
    "There is {a} {size} {texture} {colour} {kind} {place}{relation}.",
    "{Place} there is {a} {size} {texture} {colour} {kind}{relation}.",
    "{Place} we can see {a} {size} {texture} {colour} {kind}{relation}.",
    "{A} {size} {texture} {colour} {kind} is {place}{relation}.",
    "{A} {size} {texture} {colour} {kind} can be found {place}{relation}.",
    "Then comes {a} {size} {texture} {colour} {kind} {place}{relation}.",
    "The {kind} {place}{aside} is {size}, {texture} and {colour}.",
    "There is also {a} {colour} {kind} {place}{relation}, and it is {size} and {texture}.",
    "Look {place} for {a} {size} {kind}, {texture} and {colour}{relation}.",
    "You will also find {a} {size} {texture} {colour} {kind} {place}{relation}.",
)

_SETTING_FIRST = ("The scene is set {where}.", "This is a picture of {what}.", "We look at {what}.")
_SETTING_LAST = ("All of this is set {where}.", "Behind all of this is {what}.", "The background is {what}.")

_COUNT = (
    "There are {number} things in this picture.",
    "In all there are {number} things to see.",
    "The scene has {number} things in it.",
)

_RELATION = ("It is {relation}.", "This one is {relation}.", "You see it {relation}.")
_FORMS = ("none", "clause", "clause", "sentence")


def short_caption(scene: Scene) -> str:
    """One sentence about the main thing: its kind, colour, texture and the setting, often its size."""
    template = _SHORT[scene.manner % len(_SHORT)]
    return _filled(template, scene.things[0], place="", where=SETTINGS[scene.setting].where)


def long_caption(scene: Scene) -> str:
    """100 to 240 tokens that name every thing in the order of importance, with all its attributes and its place."""
    return " ".join(sentence_captions(scene))


def sentence_captions(scene: Scene) -> list[str]:
    """The sentences of the long caption, in order. The first, or the second after the setting, names the main thing.

    Templates are drawn from `scene.manner` in a fixed order, whatever the scene holds: scenes that differ in one word
    have captions that differ in that word.
    """
    plan = _Plan(scene)
    sentences = plan.sentences(complete=False)
    if count_words(" ".join(sentences)) < _FEWEST_WORDS:
        sentences = plan.sentences(complete=True)
    return sentences


def count_words(text: str) -> int:
    """Words and punctuation marks: the number of tokens without start and end, where every word is one token."""
    return len(split_words(text))


def split_words(text: str) -> list[str]:
    """Words and punctuation marks of a caption, in order."""
    return re.findall(r"\w+|[^\w\s]", text)


class _Plan:
    """The drawn choices of one caption, and the sentences they make."""

    def __init__(self, scene: Scene) -> None:
        rng = np.random.default_rng(scene.manner)
        count = len(scene.things)
        self.scene = scene
        self.setting_first = rng.random() < 0.4
        self.details_told = int(rng.integers(3))
        self.first_detail = int(rng.integers(2))
        self.count_told = rng.random() < 0.4
        self.count_second = rng.random() < 0.5
        self.places = PLACES[rng.integers(len(PLACES))]
        self.main = _MAIN[rng.integers(len(_MAIN))]
        self.setting = (_SETTING_FIRST if self.setting_first else _SETTING_LAST)[rng.integers(len(_SETTING_FIRST))]
        self.count = _COUNT[rng.integers(len(_COUNT))]
        # No thing but the eleventh would be told as another was; there are never so many.
        self.templates = [_OTHER[k] for k in rng.permutation(len(_OTHER))]
        self.relation_forms = [_FORMS[k] for k in rng.integers(len(_FORMS), size=count)]
        self.relation_wordings = [_RELATION[k] for k in rng.integers(len(_RELATION), size=count)]

    def sentences(self, complete: bool) -> list[str]:
        """All sentences; when `complete` is set, also those that the draws left out."""
        words = SETTINGS[self.scene.setting]
        details = [words.details[(self.first_detail + k) % 2] for k in range(2 if complete else self.details_told)]
        background = [self.setting.format(where=words.where, what=words.what), *details]
        count = [self.count.format(number=NUMBERS[len(self.scene.things)])] if complete or self.count_told else []
        main = _filled(self.main, self.scene.things[0], self._place(0))
        others = [sentence for k in range(1, len(self.scene.things)) for sentence in self._about(k, complete)]
        things = [main, *count, *others] if self.count_second else [main, *others, *count]
        return background + things if self.setting_first else things + background

    def _about(self, k: int, complete: bool) -> list[str]:
        """One or two sentences about a thing that is not the main one."""
        relation = next((relation for relation in self.scene.relations if relation.subject == k), None)
        form = self.relation_forms[k]
        if relation is None:
            form = "none"
        elif complete and form == "none":
            form = "sentence"
        told = f"{relation.words} the {self.scene.things[relation.reference].kind}" if relation else ""
        inside = f", {told}" if form == "clause" else ""
        sentence = _filled(
            self.templates[k - 1], self.scene.things[k], self._place(k), relation=inside, aside=inside and f"{inside},"
        )
        return [sentence, self.relation_wordings[k].format(relation=told)] if form == "sentence" else [sentence]

    def _place(self, k: int) -> str:
        return self.places[self.scene.things[k].cell]


def _filled(template: str, thing: Thing, place: str, **words: str) -> str:
    """A sentence with the words of one thing; {a} and {A} become the article that fits the next word."""
    values = {
        "kind": thing.kind,
        "colour": thing.colour,
        "texture": thing.texture,
        "size": thing.size,
        "place": place,
        "Place": place[:1].upper() + place[1:],
    }
    match = re.search(r"\{[aA]\} \{(\w+)\}", template)
    article = with_article(values[match[1]]).split(" ")[0] if match else ""
    return template.format(a=article, A=article.capitalize(), **values, **words)
