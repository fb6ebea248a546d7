from __future__ import annotations

import pytest
import torch
from data_case import assert_same, clip_tokenizer, opened

from longclip_rt.errors import TrainingError
from longclip_rt.model.preprocess import ImageTransform
from longclip_rt.train.data.training_data import DataOptions, open_data


def scene_indices(ids: tuple[str, ...]) -> list[tuple[int, bool]]:
    """Number of each scene of a batch, and whether it is the twin."""
    return [(int(name.partition(":")[2].partition("/")[0]), "/twin" in name) for name in ids]


def test_twins_follow_their_scenes_in_the_same_batch() -> None:
    batches = list(opened("scenes:600@0?twins=0.5", 20).batches(0))
    followed, scenes = 0, 0
    for batch in batches:
        rows = scene_indices(batch.ids)
        for (index, is_twin), (before, before_is_twin) in zip(rows, [(-1, True), *rows], strict=False):
            scenes += not is_twin
            if is_twin:
                followed += 1
                assert (before, before_is_twin) == (index, False)
    assert followed + scenes == 600
    assert 0.42 < followed / scenes < 0.58
    # A twin is another picture with other words, and nearly the same.
    row = next(row for row, (_, is_twin) in enumerate(scene_indices(batches[0].ids)) if is_twin)
    assert not torch.equal(batches[0].pixels[row], batches[0].pixels[row - 1])
    assert 0 < (batches[0].long_ids[row] != batches[0].long_ids[row - 1]).sum() < 20


def test_twins_of_one_scene_differ_from_epoch_to_epoch() -> None:
    data = opened("scenes:40@0?twins=1", 40)
    (first,), (second,) = data.batches(0), data.batches(1)
    twins = [{name for name in batch.ids if "/twin" in name} for batch in (first, second)]
    assert len(twins[0]) == len(twins[1]) == 20
    assert twins[0] != twins[1]


def test_scenes_that_validate_are_never_trained_on() -> None:
    data = opened("scenes:60@3?twins=1", 60)
    assert (data.kind, data.rows, data.validation_rows) == ("scenes", 60, 6)
    validation = [batch for batch in data.validation()]
    (training,) = data.batches(0)
    worlds = [{name.partition(":")[0] for name in ids} for ids in (validation[0].ids, training.ids)]
    assert worlds[0].isdisjoint(worlds[1])
    assert not any("/twin" in name for name in validation[0].ids)
    assert_same(list(data.validation()), validation)


def test_scenes_have_short_captions_and_prefixes_for_77_tokens() -> None:
    data = opened("scenes:200@0?captions=prefix", 200, context=77)
    (batch,) = data.batches(0)
    assert data.long_truncated == 0
    rows = zip(batch.long_ids.tolist(), batch.short_ids.tolist(), strict=True)
    same = sum([token for token in long if token] == [token for token in short if token] for long, short in rows)
    assert 70 < same < 130
    lengths = {int(length) for length in (batch.long_ids != 0).sum(1)}
    assert max(lengths) > 50


def test_twins_need_an_even_share() -> None:
    with pytest.raises(TrainingError, match=r"takes 5 rows.*even number"):
        opened("scenes:60@0?twins=0.5", 10, world=2)


def test_scenes_cannot_be_drawn_too_small() -> None:
    with pytest.raises(TrainingError, match=r"8 pixels wide"):
        open_data(DataOptions("scenes:60@0", 6, workers=0), clip_tokenizer(), ImageTransform(8))
