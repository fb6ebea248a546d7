from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from data_case import (
    SIZE,
    assert_same,
    caption,
    clip_tokenizer,
    cut_jpeg,
    numbers_of,
    opened,
    write_pairs,
    write_shards,
)

from longclip_rt.errors import TrainingError
from longclip_rt.model.preprocess import ImageTransform
from longclip_rt.train.data.training_data import Batch, DataOptions, open_data

EOT = 49407


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"), 100)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards", [20, 30, 10, 40])


@pytest.fixture
def source(request: pytest.FixtureRequest) -> str:
    """A parameter that is the name of a fixture, or scenes."""
    name: str = request.param
    return name if name.startswith("scenes:") else str(request.getfixturevalue(name))


SCENES = "scenes:60@3?twins=0.5"
all_sources = pytest.mark.parametrize("source", ["pairs", "shards", SCENES], indirect=True)


def joined(parts: list[Batch]) -> Batch:
    """The shares of all ranks as one batch."""
    widths = [max(part.long_ids.shape[1] for part in parts), max(part.short_ids.shape[1] for part in parts)]
    pad = torch.nn.functional.pad
    return Batch(
        torch.cat([part.pixels for part in parts]),
        torch.cat([pad(part.long_ids, (0, widths[0] - part.long_ids.shape[1])) for part in parts]),
        torch.cat([pad(part.short_ids, (0, widths[1] - part.short_ids.shape[1])) for part in parts]),
        tuple(name for part in parts for name in part.ids),
    )


def test_image_and_captions_of_a_row_stay_together(pairs: Path) -> None:
    for batch in opened(pairs).batches(0):
        numbers = numbers_of(batch)
        assert [int(name.partition(":")[2]) - 1 for name in batch.ids] == numbers
        for row, number in enumerate(numbers):
            long, short = clip_tokenizer().encode([caption(number), f"Picture {number}"])
            assert batch.long_ids[row, : long.length].tolist() == long.ids.tolist()
            assert batch.short_ids[row, : short.length].tolist() == short.ids.tolist()
            assert not batch.long_ids[row, long.length :].any()
            assert not batch.short_ids[row, short.length :].any()


def test_batches_are_float32_pixels_and_int32_ids_padded_to_eights(pairs: Path) -> None:
    batch = next(opened(pairs).batches(0))
    assert (batch.pixels.dtype, batch.pixels.shape) == (torch.float32, (8, 3, SIZE, SIZE))
    assert batch.long_ids.dtype == batch.short_ids.dtype == torch.int32
    assert (batch.long_ids.shape, batch.short_ids.shape) == ((8, 24), (8, 8))
    moved = batch.to("cpu")
    assert_same([moved], [batch])


@all_sources
def test_the_order_does_not_depend_on_the_number_of_workers(source: str) -> None:
    data = [opened(source, workers=workers) for workers in (0, 1, 2)]
    for epoch in (0, 1):  # the second time with the same workers
        first, second, third = (list(one.batches(epoch)) for one in data)
        assert_same(first, second)
        assert_same(first, third)


def test_batches_larger_than_a_chunk_do_not_depend_on_workers_either(pairs: Path) -> None:
    assert_same(list(opened(pairs, 70).batches(0)), list(opened(pairs, 70, workers=2).batches(0)))


@pytest.mark.parametrize("source", ["pairs", SCENES], indirect=True)
def test_ranks_share_the_batches_of_one_process(source: str) -> None:
    whole = list(opened(source).batches(1))
    shares = zip(*(opened(source, rank=rank, world=2).batches(1) for rank in (0, 1)), strict=True)
    assert_same([joined(list(parts)) for parts in shares], whole)


@all_sources
def test_an_epoch_goes_on_in_its_middle(source: str) -> None:
    whole = list(opened(source).batches(1))
    assert_same(list(opened(source).batches(1, start=3)), whole[3:])
    assert_same(list(opened(source, workers=2).batches(1, start=3)), whole[3:])


def test_what_is_skipped_is_not_opened(tmp_path: Path) -> None:
    data = opened(write_pairs(tmp_path, 60))
    whole = list(data.batches(0))
    for number in (number for batch in whole[:4] for number in numbers_of(batch)):
        (tmp_path / f"images/{number}.png").unlink()
    assert_same(list(data.batches(0, start=4)), whole[4:])
    assert data.bad.count == 0


def test_a_pass_that_was_left_does_not_disturb_the_next(pairs: Path) -> None:
    whole = list(opened(pairs).batches(1))
    data = opened(pairs, workers=2)
    next(data.batches(0))
    list(data.validation())
    assert_same(list(data.batches(1)), whole)


@all_sources
def test_epochs_and_seeds_differ_in_order(source: str) -> None:
    data = opened(source)
    orders = [[batch.ids for batch in data.batches(epoch)] for epoch in (0, 1)]
    orders.append([batch.ids for batch in opened(source, seed=1).batches(0)])
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_an_epoch_holds_each_row_once_and_no_validation_row(pairs: Path) -> None:
    data = opened(pairs, 9)
    assert (data.kind, data.rows, data.validation_rows, data.steps_per_epoch) == ("jsonl", 90, 10, 10)
    numbers = [number for batch in data.batches(0) for number in numbers_of(batch)]
    assert sorted(numbers) == list(range(10, 100))
    assert [number for batch in data.validation() for number in numbers_of(batch)] == list(range(10))
    assert data.drawn == 90


def test_validation_rows_may_be_fewer_or_named(pairs: Path, tmp_path: Path) -> None:
    assert opened(pairs, val_rows=4).validation_rows == 4
    others = write_pairs(tmp_path / "others", 12)
    data = opened(pairs, val=str(others))
    assert (data.rows, data.validation_rows) == (100, 12)
    assert [number for batch in data.validation() for number in numbers_of(batch)] == list(range(12))


def test_without_validation_rows_validation_is_empty(pairs: Path) -> None:
    assert list(opened(pairs, val_rows=0).validation()) == []


def test_no_random_number_of_the_callers_is_used(pairs: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    data = opened(pairs, workers=1)
    list(data.batches(0))
    list(data.validation())
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)


def write_damaged_pairs(folder: Path, count: int = 60) -> Path:
    """Pairs of which row 20 has a cut image, row 30 none, and row 40 no caption."""
    path = write_pairs(folder, count, row_40={"caption": "  \n"})
    (folder / "images/20.png").write_bytes(cut_jpeg())
    (folder / "images/30.png").unlink()
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_give_their_places_to_others(tmp_path: Path, workers: int) -> None:
    path = write_damaged_pairs(tmp_path)
    data = opened(path, 6, workers=workers)
    batches = list(data.batches(0))
    assert data.rows == 54  # 60 without 5 validation rows and the one without a caption
    assert len(batches) == data.steps_per_epoch == 9
    assert {row.id for batch in batches for row in batch.bad} == {"pairs.jsonl:21", "pairs.jsonl:31"}
    for batch in batches:
        numbers = numbers_of(batch)
        assert len(set(numbers)) == 6
        assert not {20, 30, 40} & set(numbers)
        assert [int(name.partition(":")[2]) - 1 for name in batch.ids] == numbers
        assert (batch.long_ids == EOT).sum() == (batch.short_ids == EOT).sum() == 6
    list(data.batches(1))
    reasons = {row.id: row.reason for row in data.bad}
    assert reasons.keys() == {"pairs.jsonl:21", "pairs.jsonl:31", "pairs.jsonl:41"}
    assert "truncated or damaged" in reasons["pairs.jsonl:21"]
    assert "does not exist" in reasons["pairs.jsonl:31"]
    assert "caption is empty" in reasons["pairs.jsonl:41"]
    assert data.bad.count == 3


def test_what_stands_in_for_bad_rows_is_the_same_everywhere(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, 60)
    for number in (20, 30, 40, 41, 42):
        (tmp_path / f"images/{number}.png").unlink()
    whole = list(opened(path, max_bad=0.2).batches(0))
    assert_same(list(opened(path, workers=2, max_bad=0.2).batches(0)), whole)
    assert_same(list(opened(path, max_bad=0.2).batches(0, start=2)), whole[2:])
    shares = zip(*(opened(path, rank=rank, world=2, max_bad=0.2).batches(0) for rank in (0, 1)), strict=True)
    assert_same([joined(list(parts)) for parts in shares], whole)
    for batch in whole:
        assert len(set(batch.ids)) == len(batch.ids)


def test_where_every_row_is_in_the_batch_one_comes_twice(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, 20)
    (tmp_path / "images/7.png").unlink()
    (batch,) = opened(path, 18, max_bad=0.1).batches(0)
    assert len(set(numbers_of(batch))) == 17
    assert len(batch.pixels) == 18


@pytest.mark.parametrize("seed", range(8))
def test_two_bad_rows_of_a_batch_give_their_places_to_different_ones(tmp_path: Path, seed: int) -> None:
    path = write_pairs(tmp_path, 13)  # 12 without the one that validates, so that only two are not in the batch
    for number in (3, 4):
        (tmp_path / f"images/{number}.png").unlink()
    (batch,) = opened(path, 10, max_bad=0.5, seed=seed).batches(0)
    assert len(set(numbers_of(batch))) == 10


def test_bad_validation_rows_are_left_out(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, 200)
    (tmp_path / "images/3.png").unlink()
    data = opened(path)
    assert [number for batch in data.validation() for number in numbers_of(batch)] == [0, 1, 2, *range(4, 20)]
    assert [row.id for row in data.bad] == ["pairs.jsonl:4"]


def test_the_list_of_bad_rows_is_written(tmp_path: Path) -> None:
    data = opened(write_damaged_pairs(tmp_path), 6)
    list(data.batches(0))
    data.bad.save(tmp_path / "bad_rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "bad_rows.jsonl").read_text().splitlines()]
    assert rows == [{"id": row.id, "reason": row.reason} for row in data.bad]
    assert len(rows) == 3


def test_when_no_image_is_found_the_epoch_stops_early(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, 250)
    data = opened(path, images=tmp_path / "elsewhere")
    with pytest.raises(TrainingError, match=r"--images") as caught:
        list(data.batches(0))
    assert data.bad.count < 130
    assert str(caught.value).count("does not exist") == 3
    with pytest.raises(TrainingError, match=r"of the validation rows cannot be used"):
        list(data.validation())


def test_an_epoch_with_too_many_bad_rows_stops_at_its_end(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, 60)
    for number in range(20, 30):
        (tmp_path / f"images/{number}.png").unlink()
    batches = opened(path).batches(0)
    assert len(next(batches).ids) == 8
    with pytest.raises(
        TrainingError, match=r"\d+ of \d+ rows of this epoch cannot be used, and at most 5\.0% may be bad"
    ):
        list(batches)
    assert len(list(opened(path, max_bad=0.3).batches(0))) == 6


def test_a_table_with_too_many_broken_rows_stops_at_once(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, 20, **{f"row_{number}": {"caption": None} for number in (3, 5)})
    with pytest.raises(TrainingError, match=r"2 of 20 rows of .*pairs\.jsonl:4: It has no caption\. pairs\.jsonl:6"):
        opened(path)
    assert opened(path, max_bad=0.1).rows == 17


def test_longer_texts_are_cut_and_counted(tmp_path: Path) -> None:
    long = "A word after another. " * 60
    path = write_pairs(tmp_path, 20, row_5={"caption": long}, row_6={"caption": "short", "short_caption": long})
    data = opened(path, 9, context=77)
    batches = list(data.batches(0))
    assert (data.drawn, data.long_truncated, data.short_truncated) == (18, 1, 1)
    widest = max(batches, key=lambda batch: batch.long_ids.shape[1])
    assert widest.long_ids.shape[1] == 77  # 80, the next multiple of 8, has no positions
    assert (widest.long_ids[:, 76] == EOT).sum() == 1


@dataclass(frozen=True)
class DeadlyTransform(ImageTransform):
    """Ends the process that uses it, as the system does when memory runs out."""

    def crop(self, source: Any) -> npt.NDArray[np.uint8]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_worker_that_dies_is_told_in_a_sentence(pairs: Path) -> None:
    options = DataOptions(str(pairs), 8, workers=1)
    data = open_data(options, clip_tokenizer(), DeadlyTransform(SIZE))
    with pytest.raises(TrainingError, match=r"was killed: .*--workers"):
        next(data.batches(0))


def test_too_few_rows_for_a_batch_are_refused(pairs: Path) -> None:
    with pytest.raises(TrainingError, match=r"90 rows to train on, besides 10 .* one batch of 91\. Lower --batch-size"):
        opened(pairs, 91)


def test_a_batch_that_ranks_cannot_share_is_refused(pairs: Path) -> None:
    with pytest.raises(TrainingError, match=r"8 cannot be shared by 3"):
        opened(pairs, world=3)


@pytest.mark.parametrize("change", [{"workers": -1}, {"batch_size": 0}, {"seed": -1}, {"max_bad": 1.5}])
def test_options_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=next(iter(change))):
        DataOptions(**{"data": "pairs.jsonl", "batch_size": 8, **change})


def test_shards_are_streamed_whole(shards: Path) -> None:
    data = opened(shards, 9)
    assert (data.kind, data.rows, data.validation_rows, data.steps_per_epoch) == ("webdataset", 90, 10, 10)
    assert [number for batch in data.validation() for number in numbers_of(batch)] == list(range(10))
    numbers = []
    for batch in data.batches(0):
        assert [int(name.partition("/")[2]) for name in batch.ids] == numbers_of(batch)
        numbers += numbers_of(batch)
    # Four rows are put aside to stand in for bad ones, so that as many others come a second time.
    assert set(numbers) <= set(range(10, 100))
    assert len(set(numbers)) >= 86
    assert any(abs(one - other) > 15 for one, other in pairwise(numbers[:9]))


def test_ranks_read_shards_of_their_own(shards: Path) -> None:
    seen = [set(), set()]
    for rank in (0, 1):
        for batch in opened(shards, 8, rank=rank, world=2).batches(0):
            assert len(batch.ids) == 4
            seen[rank] |= {name.partition("/")[0] for name in batch.ids}
    assert seen[0].isdisjoint(seen[1])
    assert len(seen[0] | seen[1]) == 4


def test_a_rank_whose_shards_end_early_reads_them_again(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", [2, 58])
    for rank in (0, 1):
        assert [len(batch.ids) for batch in opened(tmp_path / "s", 6, val_rows=0, rank=rank, world=2).batches(0)] == [
            3
        ] * 10


def test_fewer_shards_than_ranks_are_refused(shards: Path) -> None:
    with pytest.raises(TrainingError, match=r"4 shards to train on for 5 processes"):
        opened(shards, 5, world=5)


def test_bad_rows_of_shards_give_their_places_to_others(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", [30, 30])
    content = (folder / "001.tar").read_bytes()
    (folder / "001.tar").write_bytes(content[: len(content) * 2 // 3])
    data = opened(folder, 5, max_bad=0.3)
    for epoch in (0, 1):
        assert all(len(set(batch.ids)) == 5 for batch in data.batches(epoch))
    reasons = {row.id: row.reason for row in data.bad}
    assert "The shard is damaged" in reasons["001.tar"]
    assert_same(list(opened(folder, 5, max_bad=0.3, workers=2).batches(1)), list(data.batches(1)))
