"""Procedural scenes as training data: `scenes:200000@0?twins=0.5&captions=prefix`."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from longclip_rt.errors import TrainingError
from longclip_rt.model.tokenizer import Tokenizer
from longclip_rt.train.data.feeds import OrderedFeed, Share, shuffled
from longclip_rt.train.data.rows import Pair, Row
from longclip_rt.train.scenes.words import TEXTURES
from longclip_rt.train.scenes.world import FEWEST, MOST

if TYPE_CHECKING:
    from longclip_rt.train.scenes import Scene

PREFIX = "scenes:"
_NAME = re.compile(r"scenes:(\d+)(?:@(\d+))?(?:\?(.*))?")
_EXPECTED = (
    "Scenes are named by count and seed, like scenes:200000@0, and may have options: "
    "scenes:200000@0?twins=0.5&captions=prefix, where twins and prompts are shares from 0 to 1, captions are long, "
    "prefix or short, things are a number from 1 to 9 or two such as 1-3, alike is a number from 1 to 16, and by is "
    "kind or detail"
)

# Seeds that users may name lie below; the validation rows of a seed lie above, so that no run trains on them.
_SEEDS = 1 << 31
# CLIP's 77 tokens without start and end.
_CLIP_TOKENS = 75
_MOST_SENTENCES = 3

Captions = Literal["long", "prefix", "short"]
By = Literal["kind", "detail"]


@dataclass(frozen=True, slots=True)
class SceneRow:
    """A scene, or its twin.

    Attributes:
        seed: The scene's world.
        index: Its number there.
        twin: Which of its twins is meant; None: the scene itself.
        sentences: Sentences of the long caption that are the row's caption, as many of them as fit into CLIP's 77
            tokens; 0: the short caption; None: all of it.
        things: Fewest and most things of the scene.
        kind: Which other kind the main thing has, or which other detail some thing; 0: its own.
        detail: Whether it is any thing's detail.
        prompt: Whether the short caption names the main thing's kind and nothing else.
    """

    seed: int
    index: int
    twin: int | None = None
    sentences: int | None = None
    things: tuple[int, int] = (FEWEST, MOST)
    kind: int = 0
    detail: bool = False
    prompt: bool = False

    @property
    def id(self) -> str:
        """How messages call it."""
        suffix = "" if self.twin is None else f"/twin{self.twin}"
        return f"scenes@{self.seed}:{self.index}{suffix}" + (f"/kind{self.kind}" if self.kind else "")

    def pair(self, size: int, tokenizer: Tokenizer) -> Pair:
        """Draws the scene."""
        from longclip_rt.train import scenes

        another = scenes.with_another_detail if self.detail else scenes.with_another_kind
        scene = another(scenes.scene(self.seed, self.index, self.things), self.kind)
        if self.twin is not None:
            scene = scenes.twin(scene, self.twin).scene
        short = scenes.class_prompt(scenes.main_kind(scene)) if self.prompt else scenes.short_caption(scene)
        return Pair(scenes.render(scene, size), self._caption(scene, short, tokenizer), short)

    def _caption(self, scene: Scene, short: str, tokenizer: Tokenizer) -> str:
        from longclip_rt.train import scenes

        if self.sentences is None:
            return scenes.long_caption(scene)
        sentences = scenes.sentence_captions(scene)[: self.sentences]
        while len(sentences) > 1 and tokenizer.encode([" ".join(sentences)])[0].length > _CLIP_TOKENS + 2:
            sentences.pop()
        return " ".join(sentences) or short


@dataclass(frozen=True)
class Scenes:
    """A range of scenes.

    Attributes:
        count: Rows of an epoch.
        seed: The world that they are taken from.
        twins: Share of the scenes that are followed by a twin. A twin takes the place of another scene, so that the
            epoch has `count` rows and a scene that is left out of one epoch comes in others.
        captions: `long`; `short`; or `prefix` for CLIP's 77 tokens: half of the rows have the short caption, the
            others the first one to three sentences.
        things: Fewest and most things of a scene.
        alike: Rows that follow each other and differ in nothing but the kind of the main thing: what cannot be told
            by colour, texture, place or background. They take the places of other scenes, as twins do.
        by: `kind`; or `detail`, where they differ in the colour, kind or texture of any one thing.
        prompts: Share of the rows whose short caption is "a photo of a ball".
    """

    count: int
    seed: int
    twins: float = 0.0
    captions: Captions = "long"
    things: tuple[int, int] = (FEWEST, MOST)
    alike: int = 1
    by: By = "kind"
    prompts: float = 0.0
    kind: str = "scenes"

    def in_order(self) -> Iterator[Row]:
        """All rows by their numbers, the same at every call."""
        order = _Epoch(self, np.arange(self.count), 0, 0)
        return map(order.row, range(self.count))

    def feed(self, seed: int, epoch: int, share: Share) -> OrderedFeed:
        """A process's share of an epoch.

        Raises:
            TrainingError: Twins would be parted from their scenes.
        """
        together = self.alike if self.alike > 1 else 2 if self.twins else 1
        if share.rows % together:
            raise TrainingError(
                f"Each process takes {share.rows} rows of a batch; with twins or alike it must be a multiple of "
                f"{together}, so that a scene and its likes stay together. Choose another batch size."
            )
        return OrderedFeed(_Epoch(self, shuffled(self.count, seed, epoch), seed, epoch), share)

    def check_size(self, size: int) -> None:
        """Says at once when scenes cannot be drawn for a model.

        Raises:
            TrainingError: Its images are too small.
        """
        from longclip_rt.train.scenes.drawing import SMALLEST_IMAGE

        if size < SMALLEST_IMAGE:
            raise TrainingError(
                f"The model's images are {size} pixels wide, and scenes need at least {SMALLEST_IMAGE}. Choose another "
                "model."
            )

    def held_out(self, count: int) -> Scenes:
        """Scenes to validate on, none of which any training run sees; without twins, whose short captions are equal."""
        return replace(self, count=count, seed=self.seed + _SEEDS, twins=0.0, alike=1, prompts=0.0)

    def for_tests(self) -> Scenes:
        """As many scenes that no run trains or validates on, whatever seed it names; without twins too."""
        return replace(self.held_out(self.count), seed=self.seed + 2 * _SEEDS)


@dataclass(frozen=True)
class _Epoch:
    """An epoch's order. Positions 2i and 2i + 1 are a scene and its twin, or two scenes."""

    scenes: Scenes
    indices: npt.NDArray[np.int64]
    seed: int
    epoch: int

    def __len__(self) -> int:
        return len(self.indices)

    def row(self, position: int) -> Row:
        twin = None
        if position % 2 and self.scenes.twins:
            # A share f of pairs with a twin gives f scenes with and 2 (1 - f) without one. So the share of scenes is
            # t = f / (2 - f), and f = 2t / (1 + t).
            share = 2 * self.scenes.twins / (1 + self.scenes.twins)
            chance, choice = self._draws(0, position)
            if chance < share:
                position, twin = position - 1, int(choice * 1000)
        kind = position % self.scenes.alike
        index = int(self.indices[position - kind])
        sentences = None
        if self.scenes.captions == "short":
            sentences = 0
        elif self.scenes.captions == "prefix":
            chance, choice = self._draws(1, index)
            sentences = 0 if chance < 0.5 else 1 + int(choice * _MOST_SENTENCES)
        prompt = bool(self.scenes.prompts) and self._draws(2, index)[0] < self.scenes.prompts
        detail = self.scenes.by == "detail"
        return SceneRow(self.scenes.seed, index, twin, sentences, self.scenes.things, kind, detail, prompt)

    def _draws(self, purpose: int, number: int) -> tuple[float, float]:
        """Two numbers in [0, 1) that depend on nothing but the epoch and the arguments."""
        bits = np.random.PCG64(np.random.SeedSequence((self.seed, self.epoch, purpose, number))).random_raw(2)
        return float(bits[0]) / 2**64, float(bits[1]) / 2**64


def scenes_from_name(name: str) -> Scenes:
    """Reads what `--data scenes:...` asks for.

    Raises:
        TrainingError: It is not understood.
    """
    match = _NAME.fullmatch(name)
    options = dict(urllib.parse.parse_qsl(match[3] or "", keep_blank_values=True)) if match else {}
    known = {"twins", "captions", "things", "alike", "by", "prompts"}
    if match is None or not options.keys() <= known:
        raise TrainingError(f"{name!r} is not understood. {_EXPECTED}.")
    count, seed = int(match[1]), int(match[2] or 0)
    captions = options.get("captions", "long")
    things = re.fullmatch(r"([1-9])(?:-([1-9]))?", options.get("things", f"{FEWEST}-{MOST}"))
    try:
        twins, prompts = (float(options.get(option, "0")) for option in ("twins", "prompts"))
        alike = int(options.get("alike", "1"))
    except ValueError:
        alike = 0
    fewest, most = (int(things[1]), int(things[2] or things[1])) if things else (1, 0)
    if alike not in range(1, 17) or not (0 <= twins <= 1 and 0 <= prompts <= 1) or fewest > most:
        raise TrainingError(f"{name!r} has an option that is not understood. {_EXPECTED}.")
    by = options.get("by", "kind")
    if captions not in get_args(Captions) or (twins and alike > 1) or by not in get_args(By):
        raise TrainingError(f"{name!r} has an option that is not understood, or both twins and alike. {_EXPECTED}.")
    if by == "detail" and alike > len(TEXTURES):
        raise TrainingError(f"{name!r} is not understood: alike by a detail are at most {len(TEXTURES)}. {_EXPECTED}.")
    if not count or seed >= _SEEDS:
        raise TrainingError(f"{name!r}: the count must be at least 1 and the seed below {_SEEDS}. {_EXPECTED}.")
    return Scenes(
        count,
        seed,
        twins,
        cast("Captions", captions),
        (fewest, most),
        alike,
        cast("By", by),
        prompts,
    )
