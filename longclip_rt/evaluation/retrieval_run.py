"""`longclip-rt evaluate retrieval`: one data set, one or several models, one report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from longclip_rt.evaluation.cache import opened_entry
from longclip_rt.evaluation.collection import Collection, Kept, Skipped, skipped_as_json
from longclip_rt.evaluation.data import DataName, load_collection
from longclip_rt.evaluation.figures import Difference, differences
from longclip_rt.evaluation.models import Made, ModelSpec, each_model
from longclip_rt.evaluation.published import SECOND_HAND, Published, published_for
from longclip_rt.evaluation.report import csv_text, difference_columns, markdown_table, percent, points
from longclip_rt.evaluation.retrieval import BEYOND, RANKS, UP_TO, Retrieval, retrieve
from longclip_rt.evaluation.vectors import Bars, Embedded, NoBar, embedded
from longclip_rt.model.tokenizer import Tokenizer
from longclip_rt.runtime import Embedder
from longclip_rt.version import __version__

_GROUPS = {None: "all", UP_TO: "up to 77 tokens", BEYOND: "beyond 77 tokens"}
_NAMES = tuple(f"{way}_r{rank}" for way in ("i2t", "t2i") for rank in RANKS)


@dataclass(frozen=True)
class RetrievalReport:
    """What an evaluation found.

    Attributes:
        data: The data set.
        collection: Its images and captions.
        kept: Those that every model could embed; the figures of all models are of these.
        made: The models, the first of which the others are compared with.
        retrievals: What each of them found.
        tokenizer: The first model's.
        computed: Images and texts that were embedded in this run.
    """

    data: DataName
    collection: Collection
    kept: Kept
    made: tuple[Made, ...]
    retrievals: tuple[Retrieval, ...]
    tokenizer: Tokenizer
    computed: int

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Everything that takes no part."""
        return self.collection.skipped + self.kept.skipped

    @cached_property
    def published(self) -> tuple[Published, ...]:
        """What was published on the data set; all of it on the split `test`, where there are several."""
        if self.data.kind in ("karpathy", "docci") and self.data.split != "test":
            return ()
        return published_for(self.data.kind, self.data.file_name, len(self.kept.images))

    @cached_property
    def compared(self) -> list[tuple[Made, dict[str, Difference]]]:
        """Each further model, and how much its figures are above the first one's."""
        base = self.retrievals[0].figures()
        return [
            (made, differences(one.figures(), base))
            for made, one in zip(self.made[1:], self.retrievals[1:], strict=True)
        ]

    def as_json(self) -> dict[str, Any]:
        """The first model's figures, what takes no part, what made it; then the other models and published rows."""
        compared = [
            {"model": made.label, "made_by": made.made_by}
            | one.as_json()
            | {"difference": {name: dataclasses.asdict(value) for name, value in found.items()}}
            for (made, found), one in zip(self.compared, self.retrievals[1:], strict=True)
        ]
        return (
            {"model": self.made[0].label}
            | self.retrievals[0].as_json()
            | {
                "skipped": skipped_as_json(self.skipped),
                "data": self.data.as_json(),
                "made_by": {"tool": f"longclip-rt {__version__}"} | self.made[0].made_by,
                "compared": compared,
                "published": [{"what": SECOND_HAND} | dataclasses.asdict(row) for row in self.published],
            }
        )

    def as_markdown(self) -> str:
        """Tables: all models and published rows, by the captions' length, and differences."""
        found = [one.as_json() for one in self.retrievals]
        ranks = [f"{way} R@{rank}" for way in ("i2t", "t2i") for rank in RANKS]
        rows = [self._cells(made.label, one) for made, one in zip(self.made, found, strict=True)]
        for row in self.published:
            dashes = ["-"] * (len(RANKS) - 1)
            cells = [percent(row.i2t_r1), *dashes, percent(row.t2i_r1), *dashes]
            rows.append([f"{row.model}, {SECOND_HAND}: {row.source}", f"{row.images:,}", "-", *cells, "-", "-"])
        header = ["model", "images", "texts", *ranks, "i2t median", "t2i median"]
        parts = [markdown_table(header, rows)]
        by_length = [
            self._cells(f"{made.label}, {_GROUPS[group]}", one["by_length"][group])
            for made, one in zip(self.made, found, strict=True)
            for group in (UP_TO, BEYOND)
            if one["by_length"][group]["texts"]
        ]
        parts.append(markdown_table(["by length of the caption", *header[1:]], by_length))
        if compared := self.compared:
            differing = [[made.label, *(points(one[name]) for name in _NAMES)] for made, one in compared]
            parts.append(markdown_table([f"points above {self.made[0].label} [95% interval]", *ranks], differing))
        return "\n\n".join(parts) + "\n"

    @staticmethod
    def _cells(label: str, found: dict[str, Any]) -> list[str]:
        medians = [found.get(f"{way}_median_rank") for way in ("i2t", "t2i")]
        return [
            label,
            f"{found['images']:,}",
            f"{found['texts']:,}",
            *(percent(found.get(name)) for name in _NAMES),
            *("-" if value is None else f"{value:g}" for value in medians),
        ]

    def as_csv(self) -> str:
        """A row for each model and length of captions, and for each published figure."""
        compared: list[dict[str, Difference]] = [{}, *(found for _, found in self.compared)]
        rows: list[dict[str, Any]] = []
        for made, one, found in zip(self.made, self.retrievals, compared, strict=True):
            whole = one.as_json()
            for group, words in _GROUPS.items():
                part = whole if group is None else whole["by_length"][group]
                figures = {name: value for name, value in part.items() if not isinstance(value, dict)}
                more = difference_columns(found) if group is None else {}
                rows.append({"model": made.label, "source": "measured", "captions": words} | figures | more)
        for row in self.published:
            figures = {"images": row.images, "i2t_r1": row.i2t_r1, "t2i_r1": row.t2i_r1}
            source = f"{SECOND_HAND}: {row.source}"
            rows.append({"model": row.model, "source": source, "captions": "all"} | figures)
        return csv_text(rows)


def evaluate_retrieval(
    data: DataName,
    specs: Sequence[ModelSpec],
    *,
    cache: Path | None = None,
    fresh: bool = False,
    batch_size: int | None = None,
    bars: Bars = NoBar,
) -> RetrievalReport:
    """Evaluates models on one data set.

    Args:
        data: Which one.
        specs: The models; the others are compared with the first.
        cache: Where embeddings are kept; None: in the user's cache folder.
        fresh: Whether what was kept of this data set is removed first.
        batch_size: Most inputs in a batch; None: each model's own.
        bars: Shows how far it is.

    Raises:
        LongClipError: The data cannot be read, a model not be opened, or nothing could be embedded.
    """
    collections: list[Collection] = []
    tokenizers: list[Tokenizer] = []
    with opened_entry(cache, data.kind, data.as_json(), fresh) as entry:

        def work(embedder: Embedder) -> Embedded:
            if not collections:  # scenes are drawn, and cut to length, for the first model
                collections.append(load_collection(data, entry, embedder, embedder.image_size, bars))
                tokenizers.append(embedder.tokenizer)
            found = collections[0]
            return embedded(entry, embedder, found.images, found.texts, batch_size, bars)

        results = list(each_model(specs, work))
    bad_images = {row: why for _, one in results for row, why in one.bad_images.items()}
    bad_texts = {row: why for _, one in results for row, why in one.bad_texts.items()}
    collection = collections[0]
    kept = collection.without(bad_images, bad_texts)
    if not np.size(kept.images):
        _refuse(kept)
    return RetrievalReport(
        data,
        collection,
        kept,
        tuple(made for made, _ in results),
        tuple(retrieve(collection, kept, one, bars) for _, one in results),
        tokenizers[0],
        sum(one.computed for _, one in results),
    )


def _refuse(kept: Kept) -> None:
    from longclip_rt.errors import InputError

    first = kept.skipped[0]
    raise InputError(
        f"None of the images could be embedded, such as {first.id}: {first.reason} Name the folder of the pictures "
        "with --images."
    )
