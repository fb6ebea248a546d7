from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longclip_rt.errors import BackendError
from longclip_rt.tensorrt.profiles import Memory, Profile, Tensor, bucket_lengths, memory_for, pieces

TEXT = (Profile(0, 32, 1, 256), Profile(1, 77, 1, 8), Profile(2, 77, 4, 256), Profile(3, 248, 2, 64))
IMAGE = (Profile(0, None, 1, 32),)


def cut(profiles: tuple[Profile, ...], rows: int, length: int | None) -> list[tuple[int, int, int, int]]:
    return [(piece.start, piece.stop, piece.profile.index, piece.rows) for piece in pieces(profiles, rows, length)]


def test_the_smallest_bucket_that_holds_a_batch_is_taken() -> None:
    assert cut(TEXT, 5, 1) == [(0, 5, 0, 5)]
    assert cut(TEXT, 5, 32) == [(0, 5, 0, 5)]
    assert cut(TEXT, 5, 33) == [(0, 5, 1, 5)]
    assert cut(TEXT, 9, 77) == [(0, 9, 2, 9)]
    assert cut(TEXT, 5, 78) == [(0, 5, 3, 5)]
    assert bucket_lengths(TEXT) == (32, 77, 248) and bucket_lengths(IMAGE) == ()


def test_larger_batches_are_split_full_pieces_first_and_a_rest_is_filled_up() -> None:
    assert cut(TEXT, 129, 200) == [(0, 64, 3, 64), (64, 128, 3, 64), (128, 129, 3, 2)]
    assert cut(TEXT, 260, 77) == [(0, 256, 2, 256), (256, 260, 1, 4)]
    assert cut(IMAGE, 70, None) == [(0, 32, 0, 32), (32, 64, 0, 32), (64, 70, 0, 6)]


def test_a_shape_outside_every_profile_names_the_profiles() -> None:
    with pytest.raises(BackendError, match=r"2 rows of 249 tokens.*1 to 256 rows of up to 32 tokens; .*engine build"):
        list(pieces(TEXT, 2, 249))
    with pytest.raises(BackendError, match=r"no profile for 3 rows; it has none"):
        list(pieces((), 3, None))
    with pytest.raises(BackendError, match="no profile for 3 rows;"):
        list(pieces(TEXT, 3, None))


@given(
    st.lists(st.tuples(st.integers(1, 248), st.integers(1, 9), st.integers(0, 40)), min_size=1, max_size=6),
    st.integers(1, 300),
    st.integers(1, 248),
)
def test_pieces_hold_every_row_once_within_their_profiles(
    ranges: list[tuple[int, int, int]], rows: int, length: int
) -> None:
    profiles = [Profile(i, bucket, low, low + more) for i, (bucket, low, more) in enumerate(ranges)]
    longest = max(profile.length or 0 for profile in profiles)
    if length > longest:
        return
    found = list(pieces(profiles, rows, length))
    assert [piece.start for piece in found] == [0, *(piece.stop for piece in found[:-1])] and found[-1].stop == rows
    bucket = min(profile.length for profile in profiles if profile.length is not None and profile.length >= length)
    for piece in found:
        assert piece.profile.length == bucket
        assert piece.profile.least <= piece.rows <= piece.profile.most
        assert piece.rows >= piece.stop - piece.start > 0


def test_memory_is_known_beforehand_and_counts_every_profile_and_slot() -> None:
    ids = Tensor("input_ids", (-1, -1), 4, True)
    vectors = Tensor("text_embeds", (-1, 512), 4, False)
    inner = Tensor("head_states", (-1, 512), 2, False, on_host=False)
    profiles = (Profile(0, 32, 1, 4), Profile(1, 248, 1, 4))
    # Per slot: ids 512 and 3,968 bytes, rounded up to 4,096; vectors 8,192 each; states 4,096 each.
    assert memory_for(profiles, (ids, vectors, inner), (1000, 5000), 7, slots=2) == Memory(
        workspace=5000, device=2 * (512 + 4096 + 2 * 8192 + 2 * 4096), pinned=2 * (512 + 4096 + 2 * 8192), weights=7
    )
    assert memory_for(profiles, (ids,), (), 7, slots=1).on_device == 512 + 4096 + 7


def test_shapes_follow_the_batch_and_the_bucket() -> None:
    states = Tensor("last_hidden_state", (-1, -1, 512), 4, False)
    assert states.shape_for(TEXT[1], 3) == (3, 77, 512)
    assert Tensor("pixel_values", (-1, 3, 24, 24), 4, True).shape_for(IMAGE[0], 2) == (2, 3, 24, 24)
    with pytest.raises(BackendError, match=r"pixel_values has the shape \[-1, 3, -1, 24\]"):
        Tensor("pixel_values", (-1, 3, -1, 24), 4, True).shape_for(IMAGE[0], 2)
    with pytest.raises(BackendError, match="may be free"):
        Tensor("text_embeds", (8, 512), 4, False).shape_for(TEXT[0], 2)
