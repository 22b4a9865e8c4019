"""Boxes: no slice is lost at either end, and lattices fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmap.core.box import Box, Boxed, bounding_box

starts = st.tuples(*[st.integers(-20, 20)] * 3)
extents = st.tuples(*[st.integers(1, 9)] * 3)
boxes = st.builds(lambda a, n: Box(a, (a[0] + n[0], a[1] + n[1], a[2] + n[2])), starts, extents)
strides = st.sampled_from([1, 2, 8, 16])


def holds(outer: Box, inner: Box) -> bool:
    return all(a <= b for a, b in zip(outer.start, inner.start, strict=True)) and all(
        a >= b for a, b in zip(outer.stop, inner.stop, strict=True)
    )


def test_both_end_planes_are_inside() -> None:
    volume = np.zeros((6, 7, 8), np.float32)
    volume[1, 2, 3] = volume[4, 5, 7] = -0.5
    assert bounding_box(volume) == Box((1, 2, 3), (5, 6, 8))
    assert bounding_box(volume != 0) == bounding_box(volume)


def test_a_single_voxel_in_the_last_corner() -> None:
    volume = np.zeros((3, 3, 3))
    volume[-1, -1, -1] = 1
    assert bounding_box(volume) == Box((2, 2, 2), (3, 3, 3))


def test_an_empty_volume_has_no_box() -> None:
    assert bounding_box(np.zeros((2, 2, 2))) is None


@given(st.integers(0, 2**32 - 1))
def test_the_box_is_the_one_that_numpy_finds(seed: int) -> None:
    volume = np.random.default_rng(seed).random((5, 6, 4)) > 0.97
    box = bounding_box(volume)
    where = np.argwhere(volume)
    if len(where) == 0:
        assert box is None
    else:
        assert box == Box(tuple(where.min(0).tolist()), tuple((where.max(0) + 1).tolist()))


@given(boxes, strides)
def test_snapping_gives_the_smallest_box_on_the_lattice(box: Box, stride: int) -> None:
    snapped = box.snapped(stride)
    assert holds(snapped, box)
    assert all(v % stride == 0 for v in (*snapped.start, *snapped.stop))
    assert all(a - b < stride for a, b in zip(box.start, snapped.start, strict=True))
    assert all(b - a < stride for a, b in zip(box.stop, snapped.stop, strict=True))
    assert snapped.snapped(stride) == snapped


@given(st.lists(boxes, min_size=1, max_size=4))
def test_a_union_holds_its_members_and_no_more(members: list[Box]) -> None:
    union = Box.union(members)
    assert all(holds(union, box) for box in members)
    assert all(union.start[a] == min(b.start[a] for b in members) for a in range(3))
    assert all(union.stop[a] == max(b.stop[a] for b in members) for a in range(3))


@given(boxes, starts)
def test_shifting_there_and_back(box: Box, by: tuple[int, int, int]) -> None:
    assert box.shifted(by).relative_to(by) == box
    assert box.shifted(by).shape == box.shape


@given(st.integers(0, 2**32 - 1), boxes)
def test_a_window_is_what_the_padded_volume_shows(seed: int, window: Box) -> None:
    rng = np.random.default_rng(seed)
    volume = rng.normal(size=(7, 6, 5)) * (rng.random((7, 6, 5)) > 0.9)
    around = 40  # the windows reach from -20 to 29
    expected = np.pad(volume, around)[window.shifted((around,) * 3).slices]
    assert np.array_equal(Boxed.tight(volume).window(window), expected)


def test_a_window_is_a_copy_of_the_same_type() -> None:
    boxed = Boxed(np.ones((2, 2, 2), np.float16), Box((1, 1, 1), (3, 3, 3)))
    window = boxed.window(boxed.box)
    assert window.dtype == np.float16
    window[:] = 7
    assert (boxed.values == 1).all()


def test_an_empty_volume_is_an_empty_box_and_windows_of_it_are_zero() -> None:
    boxed = Boxed.tight(np.zeros((4, 4, 4), np.uint8))
    assert boxed.values.size == 0
    assert not boxed.window(Box((0, 0, 0), (4, 4, 4))).any()


def test_values_that_do_not_fill_their_box_are_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="2, 2, 2"):
        Boxed(np.zeros((2, 2, 2)), Box((0, 0, 0), (3, 3, 3)))
