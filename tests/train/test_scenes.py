from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from PIL import Image

from longclip_rt.errors import LongClipError, OutputError
from longclip_rt.model.tokenizer import Tokenizer
from longclip_rt.model.vocabulary import tokenizer_json
from longclip_rt.train import scenes as world
from longclip_rt.train.scenes import Scene, detail_position, long_caption, render, scene, short_caption, twin

WHERE = {
    "field": "green field",
    "night": "night sky",
    "beach": "beach",
    "snow": "snow",
    "wall": "stone wall",
    "floor": "wood floor",
    "sea": "open sea",
    "sunset": "sunset",
}
MANY = [scene(0, index) for index in range(2000)]
SOME = MANY[:200]

Ids = Callable[[str], Sequence[int]]


def ids_of(vocab_size: int) -> Ids:
    rust = tokenizers.Tokenizer.from_str(tokenizer_json(vocab_size=vocab_size))
    rust.no_padding()
    rust.no_truncation()
    return lambda text: rust.encode(text).ids


@pytest.fixture(scope="module")
def whole() -> Ids:
    return ids_of(49408)


@pytest.fixture(scope="module")
def short() -> Ids:
    """The built-in model's vocabulary, with CLIP's first 7,678 merges."""
    return ids_of(8192)


@pytest.fixture(scope="module", params=[49408, 8192])
def ids(request: pytest.FixtureRequest) -> Ids:
    return ids_of(request.param)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+|[^\sa-z]", text.lower())


def pixels(drawn: Scene, size: int = 96) -> np.ndarray:
    return np.asarray(render(drawn, size), dtype=np.int16)


def sentence_about(drawn: Scene, k: int) -> str:
    """The sentence that names a thing first."""
    kind = drawn.things[k].kind
    return next(sentence for sentence in world.sentence_captions(drawn) if kind in words(sentence))


def place_words(cell: tuple[int, int]) -> set[str]:
    row, column = cell
    if cell == (1, 1):
        return {"center"}
    chosen = set() if row == 1 else {"upper", "top"} if row == 0 else {"lower", "bottom"}
    return chosen | (set() if column == 1 else {"left"} if column == 0 else {"right"})


def test_a_scene_is_pinned_for_ever() -> None:
    # Trained models and the study's figures belong to this world: changing it makes them stale.
    drawn = scene(0, 0)
    assert short_caption(drawn) == "A picture of a huge hollow white car on a wood floor."
    assert [thing.kind for thing in drawn.things] == ["car", "ring", "flag", "cup", "flower", "star", "bottle"]
    assert len(set(MANY)) == len(MANY)
    assert scene(1, 0) != scene(0, 0) != scene(0, 1)


def test_another_process_makes_the_same_pictures_and_captions() -> None:
    code = (
        "import hashlib\n"
        "from longclip_rt.train.scenes import *\n"
        "s = scene(3, 17)\n"
        "print(hashlib.sha256(render(s).tobytes()).hexdigest())\n"
        "print(long_caption(s))\n"
        "print(twin(s, 5).caption)\n"
    )
    for drawn in SOME[:20]:
        render(drawn)
    here = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    again = scene(3, 17)
    assert here == [hashlib.sha256(render(again).tobytes()).hexdigest(), long_caption(again), twin(again, 5).caption]


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1)])
def test_negative_numbers_are_refused(seed: int, index: int) -> None:
    with pytest.raises(LongClipError, match="at least 0"):
        scene(seed, index)


def test_scenes_keep_the_rules_of_the_world() -> None:
    for drawn in MANY:
        assert 4 <= len(drawn.things) <= 7
        assert len({thing.cell for thing in drawn.things}) == len(drawn.things)
        assert len({thing.kind for thing in drawn.things}) == len(drawn.things)
        ranks = [world.SIZES.index(thing.size) for thing in drawn.things]
        assert ranks == sorted(ranks)
        assert ranks[0] < ranks[1]


def test_everything_occurs_about_equally_often() -> None:
    things = [thing for drawn in MANY for thing in drawn.things]
    for found, expected in (
        (Counter(world.main_kind(drawn) for drawn in MANY), world.KINDS),
        (Counter(thing.kind for thing in things), world.KINDS),
        (Counter(thing.colour for thing in things), world.COLOURS),
        (Counter(thing.texture for thing in things), world.TEXTURES),
        (Counter(thing.cell for thing in things), world.CELLS),
        (Counter(drawn.setting for drawn in MANY), world.SETTINGS),
        (Counter(len(drawn.things) for drawn in MANY), range(4, 8)),
    ):
        assert set(found) == set(expected)
        assert min(found.values()) > 0.6 * max(found.values())


def test_captions_have_the_promised_lengths(ids: Ids) -> None:
    for drawn in MANY:
        assert 100 <= len(ids(long_caption(drawn))) <= 240, long_caption(drawn)
        assert 8 <= len(ids(short_caption(drawn))) <= 20, short_caption(drawn)


def test_words_are_few_tokens(whole: Ids, short: Ids) -> None:
    vocabulary = {word for drawn in MANY for word in words(long_caption(drawn) + " " + short_caption(drawn))}
    vocabulary |= {word for kind in world.KINDS for word in words(world.class_prompt(kind))}
    assert len(vocabulary) < 250
    lengths = {word: len(short(word)) - 2 for word in vocabulary}
    assert max(lengths.values()) <= 2, lengths
    # A twin's position counts words, and is the token's place because of this.
    assert not {word for word in vocabulary if len(whole(word)) != 3}


def test_the_short_caption_is_true() -> None:
    for drawn in MANY:
        text, main = short_caption(drawn), drawn.things[0]
        assert f"{main.texture} {main.colour} {main.kind}" in text
        assert WHERE[drawn.setting] in text
        assert text.count(".") == 1
        assert not {size for size in world.SIZES if size in words(text)} - {main.size}


def test_the_long_caption_names_all_things_in_order_with_all_they_have() -> None:
    for drawn in MANY:
        text = words(long_caption(drawn))
        places = [text.index(thing.kind) for thing in drawn.things]
        assert places == sorted(places)
        assert WHERE[drawn.setting] in long_caption(drawn)
        for k, thing in enumerate(drawn.things):
            # What a relation says, after the thing's own words, is another thing's place.
            sentence = sentence_about(drawn, k)
            told = set(words(re.sub(r",? (to the (left|right) of|above|below) the \w+", "", sentence)))
            assert {thing.kind, thing.colour, thing.texture, thing.size} <= told
            directions = {"upper", "top", "lower", "bottom", "left", "right", "center"} & told
            assert directions <= place_words(thing.cell)
            assert len(directions) == (2 if 1 not in thing.cell else 1)


def test_told_relations_are_true_and_told_often() -> None:
    told = Counter[str]()
    for drawn in MANY:
        cells = {thing.kind: thing.cell for thing in drawn.things}
        subject = ""
        for sentence in world.sentence_captions(drawn):
            match = re.search(r"(to the left of|to the right of|above|below) the (\w+)", sentence)
            reference = match[2] if match else ""
            subject = next((word for word in words(sentence) if word in cells and word != reference), subject)
            if not match:
                continue
            (row, column), (other_row, other_column) = cells[subject], cells[match[2]]
            truth = {
                "to the left of": column < other_column,
                "to the right of": column > other_column,
                "above": row < other_row,
                "below": row > other_row,
            }
            assert truth[match[1]], long_caption(drawn)
            told[match[1]] += 1
    assert min(told.values()) > 800


def test_sentences_make_the_long_caption_and_vary() -> None:
    for drawn in SOME:
        sentences = world.sentence_captions(drawn)
        assert " ".join(sentences) == long_caption(drawn)
        assert all(sentence[0].isupper() and sentence.endswith(".") for sentence in sentences)
    hidden = "|".join((*world.KINDS, *world.COLOURS, *world.TEXTURES, *world.SIZES))
    shapes = {re.sub(hidden, "_", sentence) for drawn in MANY for sentence in world.sentence_captions(drawn)}
    assert len(shapes) > 300


def test_articles_fit() -> None:
    for drawn in MANY:
        text = (long_caption(drawn) + " " + short_caption(drawn)).lower()
        for article, word in re.findall(r"\b(an?) (\w+)", text):
            assert article == ("an" if word[0] in "aeiou" else "a"), word
        assert "  " not in text
        assert not re.search(r"[{}]|,[,.]|\s[,.]", text)
    assert world.class_prompt("apple") == "a photo of an apple"
    assert world.class_prompt("ball") == "a photo of a ball"
    with pytest.raises(LongClipError, match="choose one of"):
        world.class_prompt("zebra")


@pytest.mark.parametrize("size", [96, 224])
def test_pictures_have_the_asked_size(size: int) -> None:
    image = render(scene(0, 1), size)
    assert image.size == (size, size)
    assert image.mode == "RGB"
    with pytest.raises(LongClipError, match="32 or more"):
        render(scene(0, 1), 16)


def test_no_thing_hides_another() -> None:
    for drawn in SOME:
        picture = pixels(drawn)
        changed = np.zeros((96, 96), int)
        for k in range(1, len(drawn.things)):
            without = dataclasses.replace(drawn, things=drawn.things[:k] + drawn.things[k + 1 :])
            mine = (pixels(without) != picture).any(-1)
            assert mine.sum() > 100
            changed += mine
        assert changed.max() == 1
        alone = dataclasses.replace(drawn, things=drawn.things[:1])
        assert (pixels(alone) != picture).any(-1).sum() == (changed > 0).sum()


def test_things_have_their_colours_and_sizes() -> None:
    for colour, size in itertools.product(world.COLOURS, world.SIZES):
        main = dataclasses.replace(SOME[0].things[0], kind="ball", colour=colour, texture="solid", size=size)
        picture = pixels(dataclasses.replace(SOME[0], things=(main,)))
        fill = np.array(world.COLOURS[colour][0])
        # Lit from above: up to an eighth lighter at its top, and a sixth darker at its bottom.
        same = ((picture > 0.83 * fill - 3) & (picture < 1.13 * fill + 3)).all(-1).sum()
        # A disc of 96 x 0.43, 0.285 or 0.2 pixels, less its outline and halo.
        assert {"huge": 900, "big": 350, "small": 120}[size] < same < {"huge": 1300, "big": 560, "small": 280}[size]


def test_all_kinds_colours_and_textures_can_be_told_apart() -> None:
    first = SOME[0].things[0]
    for size in ("huge", "small"):
        for name, values in (("kind", world.KINDS), ("colour", world.COLOURS), ("texture", world.TEXTURES)):
            start = dataclasses.replace(first, size=size, kind="cup", colour="blue", texture="striped")
            drawn = [
                pixels(dataclasses.replace(SOME[0], things=(dataclasses.replace(start, **{name: value}),)))
                for value in values
            ]
            for one, two in itertools.combinations(drawn, 2):
                assert (np.abs(one - two).max(-1) > 50).sum() >= 25
    for kind in world.KINDS:
        solid, hollow = (
            pixels(dataclasses.replace(SOME[0], things=(dataclasses.replace(first, kind=kind, size="small", **look),)))
            for look in ({"texture": "solid", "colour": "red"}, {"texture": "hollow", "colour": "red"})
        )
        assert (np.abs(solid - hollow).max(-1) > 50).sum() >= 20, kind


def differing_fields(one: Scene, two: Scene) -> list[tuple[int, str]]:
    assert dataclasses.replace(two, things=one.things) == one
    return [
        (k, field.name)
        for k, (mine, other) in enumerate(zip(one.things, two.things, strict=True))
        for field in dataclasses.fields(mine)
        if getattr(mine, field.name) != getattr(other, field.name)
    ]


def test_a_twin_differs_in_one_detail_of_symbols_words_and_pixels(whole: Ids) -> None:
    details = Counter[str]()
    for drawn in MANY[:250]:
        for index in range(2):
            other = twin(drawn, index)
            details[other.detail] += 1
            assert differing_fields(drawn, other.scene) == [(other.which, other.detail)]
            assert other.caption == long_caption(other.scene)
            mine, theirs = words(long_caption(drawn)), words(other.caption)
            places = [k for k, (one, two) in enumerate(zip(mine, theirs, strict=True)) if one != two]
            assert places == list(range(places[0], places[-1] + 1))
            assert len(places) <= 2
            assert " ".join(mine[k] for k in places) == other.before.lower()
            assert " ".join(theirs[k] for k in places) == other.after.lower()
            assert other.position == places[0] + 1
            assert detail_position(long_caption(drawn), other.caption, whole) == other.position
            assert (np.abs(pixels(drawn) - pixels(other.scene)).max(-1) > 40).sum() >= 12, other
    assert set(details) == set(world.ATTRIBUTES)
    assert min(details.values()) > 20, details


def test_a_twin_is_a_scene_of_the_world_with_true_captions() -> None:
    for drawn in MANY[:250]:
        other = twin(drawn, 3).scene
        assert len({thing.kind for thing in other.things}) == len({thing.cell for thing in other.things})
        cells = [thing.cell for thing in other.things]
        for relation in other.relations:
            (row, column), (other_row, other_column) = cells[relation.subject], cells[relation.reference]
            truth = (column < other_column, column > other_column, row < other_row, row > other_row)
            assert truth[("to the left of", "to the right of", "above", "below").index(relation.words)]
        ranks = [world.SIZES.index(thing.size) for thing in other.things]
        assert ranks == sorted(ranks)
        assert ranks[0] < ranks[1]


def test_twins_can_be_chosen_by_thing_and_detail() -> None:
    positions = []
    for drawn in SOME:
        for k in range(len(drawn.things)):
            for detail in ("colour", "texture"):
                other = twin(drawn, index=k, which=k, detail=detail)
                assert (other.which, other.detail) == (k, detail)
                positions.append(other.position)
        by_thing = [twin(drawn, which=k, detail="colour").position for k in range(len(drawn.things))]
        assert by_thing == sorted(by_thing)
    assert min(positions) < 10
    assert max(positions) > 120
    assert twin(SOME[0], 1) == twin(SOME[0], 1)
    assert len({twin(SOME[0], index).scene for index in range(50)}) > 20


def test_impossible_twins_are_refused_with_the_way_out() -> None:
    drawn = next(drawn for drawn in MANY if drawn.things[0].size == "huge" and drawn.things[1].size == "big")
    with pytest.raises(LongClipError, match="things 0 to"):
        twin(drawn, which=7)
    with pytest.raises(LongClipError, match="one of colour, kind"):
        twin(drawn, detail="weight")
    with pytest.raises(LongClipError, match="at least 0"):
        twin(drawn, index=-1)
    with pytest.raises(LongClipError, match="colour and texture can always"):
        twin(drawn, which=0, detail="size")


def test_detail_position_counts_tokens(ids: Ids) -> None:
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(tokenizer_json()))
    assert detail_position("a red ball", "a blue ball", lambda text: tokenizer.encode([text])[0].ids.tolist()) == 2
    assert detail_position("a red ball", "a blue ball", ids) == 2
    with pytest.raises(LongClipError, match="same tokens"):
        detail_position("a ball", "a ball", ids)


def test_contact_sheet_holds_all_scenes() -> None:
    sheet = np.asarray(world.contact_sheet(SOME[:5], size=48, columns=3))
    assert sheet.shape == (2 * 50 + 2, 3 * 50 + 2, 3)
    np.testing.assert_array_equal(sheet[52:100, 52:100], np.asarray(render(SOME[4], 48)))
    with pytest.raises(LongClipError, match="one or more"):
        world.contact_sheet([])


def test_written_scenes_can_be_read(tmp_path: Path) -> None:
    file = world.write_scenes(tmp_path / "new" / "scenes", 3, seed=5, size=64)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 3
    for index, row in enumerate(rows):
        drawn = scene(5, index)
        assert row["caption"] == long_caption(drawn)
        assert row["short_caption"] == short_caption(drawn)
        with Image.open(file.parent / row["image"]) as image:
            np.testing.assert_array_equal(np.asarray(image), np.asarray(render(drawn, 64)))
    with pytest.raises(OutputError, match="exists already"):
        world.write_scenes(file.parent, 3)
    with pytest.raises(LongClipError, match="at least 1"):
        world.write_scenes(tmp_path / "none", 0)
