from __future__ import annotations

import pytest
import torch
from data_case import assert_same, clip_tokenizer, opened

from longclip_rt.errors import TrainingError
from longclip_rt.model.preprocess import ImageTransform
from longclip_rt.train import scenes
from longclip_rt.train.data.training_data import DataOptions, open_data
from longclip_rt.train.scenes.rows import SceneRow, scenes_from_name


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


@pytest.mark.parametrize(("options", "rows", "together"), [("twins=0.5", 10, 2), ("alike=8", 12, 8)])
def test_scenes_that_belong_together_stay_together(options: str, rows: int, together: int) -> None:
    with pytest.raises(TrainingError, match=rf"takes {rows // 2} rows.*a multiple of {together}"):
        opened(f"scenes:60@0?{options}", rows, world=2)


def test_rows_that_are_alike_differ_in_the_kind_of_the_main_thing_alone() -> None:
    data = opened("scenes:48@0?captions=short&things=1-2&alike=8", 16)
    (first, *_) = data.batches(0)
    groups = [{name.partition("/")[0] for name in first.ids[start : start + 8]} for start in (0, 8)]
    assert [len(group) for group in groups] == [1, 1] and groups[0] != groups[1]
    for start in (0, 8):
        ids = first.long_ids[start : start + 8].numpy()
        assert ((ids != ids[0]).sum(axis=1)[1:] == 1).all() and len({tuple(row) for row in ids.tolist()}) == 8


def test_prompts_name_a_kind_and_nothing_else() -> None:
    tokenizer = clip_tokenizer()
    data = opened("scenes:60@0?captions=short&things=1&prompts=1", 60)
    (batch,) = data.batches(0)
    prompts = {tuple(tokenizer.encode([scenes.class_prompt(kind)])[0].ids.tolist()) for kind in scenes.KINDS}
    assert {tuple(token for token in row if token) for row in batch.long_ids.tolist()} <= prompts


def test_rows_that_are_alike_by_a_detail_differ_in_that_anywhere() -> None:
    tokenizer, rows = clip_tokenizer(), scenes_from_name("scenes:60@0?alike=5&by=detail").in_order()
    captions = [row.pair(64, tokenizer).long.split() for row in rows if isinstance(row, SceneRow)]
    places = []
    for start in range(0, 60, 5):
        group = captions[start : start + 5]
        differing = [n for n, words in enumerate(zip(*group, strict=True)) if len(set(words)) > 1]
        assert len({words[differing[-1]] for words in group}) == 5
        assert len(differing) <= 3  # "a red" and "an orange"; and a kind is named again by what is beside it
        places.append(differing[0])
    assert max(places) > 40 > min(places)


@pytest.mark.parametrize(
    "options",
    ["by=size", "alike=6&by=detail", "things=0", "things=5-2", "alike=0", "alike=17", "prompts=2", "twins=1&alike=2"],
)
def test_options_that_make_no_sense_are_refused(options: str) -> None:
    with pytest.raises(TrainingError, match=r"not understood"):
        opened(f"scenes:60@0?{options}", 10)


def test_scenes_cannot_be_drawn_too_small() -> None:
    with pytest.raises(TrainingError, match=r"8 pixels wide"):
        open_data(DataOptions("scenes:60@0", 6, workers=0), clip_tokenizer(), ImageTransform(8))
