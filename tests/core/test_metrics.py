"""Overlap, surfaces, volumes and lesions: hand-worked scenes, MONAI as a second opinion, laws, and a real patient."""

from __future__ import annotations

import math
import warnings
from itertools import permutations, product
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medmap.core.lesions import lesion_scores, lesion_wise, on_1mm_grid
from medmap.core.metrics import (
    CONVENTIONS,
    METRICS,
    dice,
    drop_small,
    hd95_mm,
    nsd,
    score_region,
    volume_error_ml,
)
from medmap.core.surfaces import SurfaceDistances, crop_pair, surface, surface_distances
from medmap.errors import InputError

Mask = NDArray[np.bool_]
ONE_MM = (1.0, 1.0, 1.0)
NAN = math.nan


def scene(shape: tuple[int, int, int], *blocks: tuple[slice, slice, slice]) -> Mask:
    mask = np.zeros(shape, dtype=bool)
    for block in blocks:
        mask[block] = True
    return mask


def cube(x: int, y: int, z: int, size: int) -> tuple[slice, slice, slice]:
    return slice(x, x + size), slice(y, y + size), slice(z, z + size)


@st.composite
def mask_pairs(draw: st.DrawFn, *, empty: bool = True) -> tuple[Mask, Mask]:
    shape = draw(st.tuples(*[st.integers(2, 7)] * 3))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    density = draw(st.sampled_from([0.0, 0.05, 0.3, 0.8] if empty else [0.1, 0.4, 0.8]))
    prediction, truth = generator.random((2, *shape)) < density
    if not empty:
        prediction[0, 0, 0] = truth[-1, -1, -1] = True
    return prediction, truth


spacings = st.tuples(*[st.sampled_from([0.5, 0.9375, 1.0, 1.2, 3.0])] * 3)
seldom = settings(max_examples=40, deadline=None)


# --- hand-worked, anisotropic


def test_two_points_are_apart_by_the_spacing_of_their_axis() -> None:
    prediction, truth = scene((5, 5, 5), cube(1, 1, 1, 1)), scene((5, 5, 5), cube(2, 3, 4, 1))
    assert hd95_mm(prediction, truth, (2.0, 3.0, 0.5)) == pytest.approx(math.sqrt(2**2 + 6**2 + 1.5**2))
    assert hd95_mm(prediction, truth, (0.5, 3.0, 2.0)) == pytest.approx(math.sqrt(0.5**2 + 6**2 + 6**2))


def test_a_slab_moved_by_one_thick_slice() -> None:
    prediction = scene((10, 10, 8), (slice(0, 10), slice(0, 10), slice(2, 4)))
    truth = scene((10, 10, 8), (slice(0, 10), slice(0, 10), slice(3, 5)))
    # Two slices are all surface; one is shared, the other is 5 mm from it: half of the distances are 5 mm, half are 0.
    assert hd95_mm(prediction, truth, (1.0, 1.0, 5.0)) == 5.0
    assert nsd(prediction, truth, (1.0, 1.0, 5.0), tolerance_mm=4.9) == 0.5
    assert nsd(prediction, truth, (1.0, 1.0, 5.0), tolerance_mm=5.0) == 1.0
    assert dice(prediction, truth) == 0.5


def test_the_larger_direction_decides_and_legacy_pools_both() -> None:
    truth = scene((1, 1, 20), (slice(0, 1), slice(0, 1), slice(0, 1)))
    prediction = scene((1, 1, 20), (slice(0, 1), slice(0, 1), slice(0, 20)))
    # Prediction to truth: 0…19 mm, P95 at rank 18.05; truth to prediction: 0. Pooled: 0, 0, 1, …, 19, rank 19 of 0…20.
    assert hd95_mm(prediction, truth, ONE_MM) == pytest.approx(18.05)
    assert hd95_mm(truth, prediction, ONE_MM) == pytest.approx(18.05)
    assert hd95_mm(prediction, truth, ONE_MM, convention="legacy") == pytest.approx(18.0)


def test_a_solid_cube_has_a_shell_for_a_surface_also_at_the_border_of_the_array() -> None:
    assert surface(np.ones((5, 5, 5), dtype=bool)).sum() == 5**3 - 3**3
    assert surface(scene((9, 9, 9), cube(2, 2, 2, 5))).sum() == 5**3 - 3**3


def test_volumes_are_ml_and_their_error_has_no_sign() -> None:
    small, large = scene((10, 10, 10), cube(0, 0, 0, 5)), np.ones((10, 10, 10), dtype=bool)
    assert volume_error_ml(small, large, (2.0, 1.0, 1.0)) == pytest.approx(1.75)
    assert volume_error_ml(large, small, (2.0, 1.0, 1.0)) == pytest.approx(1.75)
    scores = score_region(small, large, (2.0, 1.0, 1.0))
    assert scores["truth_ml"] == pytest.approx(2.0)
    assert scores["predicted_ml"] == pytest.approx(0.25)


def test_drop_small_keeps_exactly_the_threshold_and_counts_ml_not_voxels() -> None:
    mask = scene((10, 10, 10), (slice(0, 5), slice(0, 10), slice(0, 10)))
    assert drop_small(mask, ONE_MM, 0.5).sum() == 500
    assert drop_small(mask, (0.9999999, 1.0, 1.0), 0.5).sum() == 500
    assert drop_small(mask, (0.99, 1.0, 1.0), 0.5).sum() == 0
    one_less = mask.copy()
    one_less[0, 0, 0] = False
    assert drop_small(one_less, ONE_MM, 0.5).sum() == 0
    assert drop_small(one_less, (2.0, 2.0, 2.0), 0.5).sum() == 499
    assert mask.sum() == 500


# --- MONAI as a second opinion


def monai_hd95_and_nsd(
    prediction: Mask, truth: Mask, spacing_mm: tuple[float, ...], tolerance_mm: float
) -> tuple[float, float]:
    import torch
    from monai import metrics

    p, t = (torch.from_numpy(mask.astype(np.float32))[None, None] for mask in (prediction, truth))
    shared: dict[str, Any] = {"include_background": True, "spacing": list(spacing_mm)}
    with warnings.catch_warnings():
        # MONAI 1.6 calls its own function with an argument that it has deprecated.
        warnings.filterwarnings("ignore", message=".*get_mask_edges:always_return_as_numpy", category=FutureWarning)
        hausdorff = metrics.compute_hausdorff_distance(p, t, percentile=95, **shared)
        surface_dice = metrics.compute_surface_dice(p, t, class_thresholds=[tolerance_mm], **shared)
    return float(hausdorff), float(surface_dice)


@pytest.mark.parametrize("spacing_mm", [ONE_MM, (1.0, 1.5, 4.0), (0.47, 0.47, 3.3)])
@pytest.mark.parametrize("density", [0.002, 0.05, 0.5])
def test_hd95_and_nsd_are_monais(spacing_mm: tuple[float, float, float], density: float) -> None:
    generator = np.random.default_rng(int(1000 * density))
    prediction, truth = generator.random((2, 17, 14, 11)) < density
    # A tolerance that no distance on these grids equals: MONAI compares in single precision.
    expected = monai_hd95_and_nsd(prediction, truth, spacing_mm, 1.01)
    found = hd95_mm(prediction, truth, spacing_mm), nsd(prediction, truth, spacing_mm, 1.01)
    assert found == pytest.approx(expected, rel=1e-6)


def test_dice_is_monais() -> None:
    import torch
    from monai import metrics

    prediction, truth = np.random.default_rng(0).random((2, 9, 8, 7)) < 0.4
    p, t = (torch.from_numpy(mask.astype(np.float32))[None, None] for mask in (prediction, truth))
    assert dice(prediction, truth) == pytest.approx(float(metrics.compute_dice(p, t)), rel=1e-6)


def test_monai_drops_a_missed_tumour_where_we_do_not() -> None:
    truth = scene((6, 6, 6), cube(1, 1, 1, 3))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the prediction of class", category=UserWarning)
        monai_hd95, _ = monai_hd95_and_nsd(truth & False, truth, ONE_MM, 1.0)
    assert not math.isfinite(monai_hd95)
    assert hd95_mm(truth & False, truth, ONE_MM) == 373.13


# --- empty regions, every convention

EMPTY = {
    "brats": {"both": (1.0, 0.0, 1.0), "one": (0.0, 373.13, 0.0)},
    "nan": {"both": (NAN, NAN, NAN), "one": (0.0, NAN, 0.0)},
    "legacy": {"both": (1.0, 0.0, 1.0), "one": (0.0, 373.13, 0.0)},
}


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("case", ["both", "missed", "invented"])
def test_empty_regions_follow_the_named_convention(convention: str, case: str) -> None:
    full = scene((12, 12, 12), cube(3, 3, 3, 5))
    prediction = full if case == "invented" else full & False
    truth = full if case == "missed" else full & False
    expected = EMPTY[convention]["both" if case == "both" else "one"]
    scores = score_region(prediction, truth, ONE_MM, convention=convention)
    assert (scores["dice"], scores["hd95_mm"], scores["nsd"]) == pytest.approx(expected, nan_ok=True)
    alone = (
        dice(prediction, truth, convention=convention),
        hd95_mm(prediction, truth, ONE_MM, convention=convention),
        nsd(prediction, truth, ONE_MM, convention=convention),
    )
    assert alone == pytest.approx(expected, nan_ok=True)
    lesions = (1.0, 0.0, 1.0) if case == "both" else (0.0, 374.0, 0.0)
    assert (scores["lesion_dice"], scores["lesion_hd95_mm"], scores["lesion_f1"]) == lesions
    assert scores["volume_error_ml"] == pytest.approx(0.0 if case == "both" else 0.125)


@pytest.mark.parametrize("convention", ["brats", "legacy"])
def test_missing_a_tumour_is_never_better_than_finding_one_voxel_of_it(convention: str) -> None:
    truth = scene((40, 40, 40), cube(30, 30, 30, 8))
    worst_hit = scene((40, 40, 40), cube(0, 0, 0, 1))
    hit = score_region(worst_hit, truth, ONE_MM, convention=convention)
    missed = score_region(truth & False, truth, ONE_MM, convention=convention)
    for name, metric in METRICS.items():
        if metric.higher_is_better is not None and name != "volume_error_ml":
            assert missed[name] <= hit[name] if metric.higher_is_better else missed[name] >= hit[name], name


def test_every_metric_is_scored_and_described() -> None:
    full = scene((12, 12, 12), cube(3, 3, 3, 5))
    assert list(score_region(full, full, ONE_MM)) == list(METRICS)
    assert all(metric.unit == ("mm" if name.endswith("_mm") else "ml" if name.endswith("_ml") else "")
               for name, metric in METRICS.items())  # fmt: skip


# --- bad input


def test_masks_that_are_not_masks_are_refused() -> None:
    mask = scene((4, 4, 4), cube(0, 0, 0, 2))
    with pytest.raises(InputError, match=r"prediction mask: found uint8 \(4, 4, 4\), expected a boolean 3-D array"):
        dice(mask.astype(np.uint8), mask)
    with pytest.raises(InputError, match=r"truth mask: found bool \(4, 4\)"):
        hd95_mm(mask, mask[0], ONE_MM)
    with pytest.raises(InputError, match=r"prediction is \(4, 4, 3\) voxels, truth is \(4, 4, 4\).*resample"):
        nsd(mask[..., :3], mask, ONE_MM)
    with pytest.raises(InputError, match="expected three lengths in mm above 0"):
        volume_error_ml(mask, mask, (1.0, 0.0, 1.0))
    with pytest.raises(InputError, match="expected three lengths in mm above 0"):
        lesion_wise(mask, mask, (1.0, 1.0))
    with pytest.raises(InputError, match="'monai' is not known; expected one of brats, nan, legacy"):
        dice(mask, mask, convention="monai")
    with pytest.raises(InputError, match="tolerance_mm: found -1"):
        score_region(mask, mask, ONE_MM, tolerance_mm=-1.0)


# --- laws


def all_scores(prediction: Mask, truth: Mask, spacing_mm: tuple[float, float, float]) -> list[float]:
    return list(score_region(prediction, truth, spacing_mm).values())


@seldom
@given(mask_pairs(), spacings)
def test_overlap_and_surfaces_are_symmetric_and_bounded(pair: tuple[Mask, Mask], spacing_mm: Any) -> None:
    prediction, truth = pair
    there, back = (score_region(*masks, spacing_mm) for masks in ((prediction, truth), (truth, prediction)))
    for name in ("dice", "hd95_mm", "nsd", "volume_error_ml"):
        assert there[name] == pytest.approx(back[name])
    for name in ("dice", "nsd", "lesion_dice", "lesion_f1"):
        assert 0.0 <= there[name] <= 1.0
    diagonal_mm = math.hypot(*(n * mm for n, mm in zip(truth.shape, spacing_mm, strict=True)))
    assert there["hd95_mm"] <= diagonal_mm or there["hd95_mm"] == 373.13


@seldom
@given(mask_pairs())
def test_a_mask_agrees_perfectly_with_itself(pair: tuple[Mask, Mask]) -> None:
    scores = score_region(pair[0], pair[0], (1.0, 0.9, 3.0))
    assert (scores["dice"], scores["hd95_mm"], scores["nsd"], scores["volume_error_ml"]) == (1.0, 0.0, 1.0, 0.0)
    assert (scores["lesion_dice"], scores["lesion_hd95_mm"], scores["lesion_f1"]) == (1.0, 0.0, 1.0)


@seldom
@given(mask_pairs(), st.tuples(*[st.sampled_from([1.0, 2.0, 3.0])] * 3), st.sampled_from([*permutations(range(3))]))
def test_how_a_file_stores_its_axes_changes_nothing(pair: tuple[Mask, Mask], spacing_mm: Any, order: Any) -> None:
    turned = [np.flip(mask.transpose(order), axis=(0, 2)) for mask in pair]
    expected = all_scores(*pair, spacing_mm)
    assert all_scores(*turned, tuple(spacing_mm[axis] for axis in order)) == pytest.approx(expected)


@seldom
@given(mask_pairs(), spacings, st.tuples(*[st.tuples(st.integers(0, 4), st.integers(0, 4))] * 3))
def test_empty_space_round_the_masks_changes_nothing(pair: tuple[Mask, Mask], spacing_mm: Any, margin: Any) -> None:
    padded = [np.pad(mask, margin) for mask in pair]
    assert all_scores(*padded, spacing_mm) == all_scores(*pair, spacing_mm)


@seldom
@given(mask_pairs(empty=False), spacings)
def test_distances_are_those_of_comparing_all_with_all(pair: tuple[Mask, Mask], spacing_mm: Any) -> None:
    points = [np.argwhere(surface(mask)) * np.array(spacing_mm) for mask in pair]
    table = np.linalg.norm(points[0][:, None] - points[1][None], axis=2)
    found = surface_distances(crop_pair(*pair, spacing_mm))
    assert np.sort(found.prediction_to_truth) == pytest.approx(np.sort(table.min(axis=1)))
    assert np.sort(found.truth_to_prediction) == pytest.approx(np.sort(table.min(axis=0)))


@seldom
@given(mask_pairs(empty=False), st.floats(0.1, 10.0))
def test_lengths_scale_with_the_spacing(pair: tuple[Mask, Mask], factor: float) -> None:
    larger = (factor, 2 * factor, 3 * factor)
    assert hd95_mm(*pair, larger) == pytest.approx(factor * hd95_mm(*pair, (1.0, 2.0, 3.0)))


@given(st.lists(st.floats(0, 50), min_size=1), st.lists(st.floats(0, 50), min_size=1), st.floats(0, 50))
def test_more_tolerance_never_lowers_the_share_within_it(one: Any, other: Any, tolerance_mm: float) -> None:
    distances = SurfaceDistances(np.array(one), np.array(other))
    assert distances.fraction_within(tolerance_mm) <= distances.fraction_within(tolerance_mm + 1.0)
    assert distances.percentile_mm(95.0, pooled=True) <= distances.percentile_mm(100.0)


# --- lesions, hand-worked

GRID = (60, 24, 24)
TWO_LESIONS = scene(GRID, cube(2, 2, 2, 6), cube(40, 2, 2, 6))


def test_each_lesion_counts_once_whatever_its_size() -> None:
    truth = scene(GRID, cube(2, 2, 2, 20), cube(40, 2, 2, 4))
    prediction = scene(GRID, cube(2, 2, 2, 20))
    scores = lesion_wise(prediction, truth)
    assert (scores.dice, scores.hd95_mm) == (0.5, 187.0)
    assert (scores.true_positives, scores.false_positives, scores.false_negatives) == (1, 0, 1)
    assert scores.f1 == pytest.approx(2 / 3)
    assert dice(prediction, truth) > 0.99


def test_a_false_positive_counts_whatever_its_size() -> None:
    speck = scene(GRID, cube(20, 20, 20, 1))
    scores = lesion_wise(TWO_LESIONS | speck, TWO_LESIONS)
    assert scores.dice == pytest.approx(2 / 3)
    assert scores.hd95_mm == pytest.approx(374 / 3)
    assert scores.f1 == pytest.approx(4 / 5)
    assert (scores.true_positives, scores.false_positives, scores.false_negatives) == (2, 1, 0)


@pytest.mark.parametrize(("gap", "lesions"), [(6, 1), (7, 2)])
def test_components_are_one_lesion_when_their_dilations_touch(gap: int, lesions: int) -> None:
    # Three steps each: gaps of up to 6 voxels close, for 3 + 3 dilated voxels then lie side by side.
    truth = scene(GRID, cube(2, 2, 2, 6), cube(8 + gap, 2, 2, 6))
    prediction = scene(GRID, cube(2, 2, 2, 6))
    scores = lesion_wise(prediction, truth)
    assert scores.counted == lesions
    assert scores.dice == pytest.approx(2 / 3 if lesions == 1 else 1 / 2)
    assert scores.false_negatives == lesions - 1


def test_dilation_follows_edges_but_not_corners() -> None:
    # The 18-neighbourhood reaches (3, 3, 0) in three steps, but of the diagonal only (2, 2, 2).
    edge, corner = np.zeros((2, 20, 20, 20), dtype=bool)
    for mask in (edge, corner):
        mask[cube(0, 0, 0, 4)] = True
    edge[cube(10, 10, 0, 4)] = True
    corner[cube(9, 9, 9, 4)] = True
    assert lesion_wise(edge, edge).counted == 1
    assert lesion_wise(corner, corner).counted == 2


def test_lesions_up_to_50_mm3_are_not_scored_and_their_prediction_is_no_false_positive() -> None:
    fifty = scene(GRID, (slice(40, 45), slice(2, 7), slice(2, 4)))
    fifty_one = fifty | scene(GRID, cube(45, 2, 2, 1))
    big = scene(GRID, cube(2, 2, 2, 6))
    assert (fifty.sum(), fifty_one.sum()) == (50, 51)
    for prediction in (big, big | fifty):
        scores = lesion_wise(prediction, big | fifty)
        assert (scores.dice, scores.hd95_mm, scores.f1) == (1.0, 0.0, 1.0)
        assert (scores.counted, scores.ignored, scores.false_positives, scores.false_negatives) == (1, 1, 0, 0)
    missed = lesion_wise(big, big | fifty_one)
    assert (missed.dice, missed.counted, missed.ignored, missed.false_negatives) == (0.5, 2, 0, 1)


def test_a_patient_with_only_ignored_lesions_scores_by_false_positives_alone() -> None:
    tiny, far = scene(GRID, cube(2, 2, 2, 3)), scene(GRID, cube(40, 2, 2, 3))
    assert lesion_wise(tiny & False, tiny).dice == 1.0
    scores = lesion_wise(far, tiny)
    assert (scores.dice, scores.hd95_mm, scores.f1) == (0.0, 374.0, 0.0)
    assert (scores.counted, scores.ignored, scores.false_positives) == (0, 1, 1)


def test_a_component_beside_a_lesion_meets_its_dilation_without_overlap() -> None:
    truth = scene(GRID, cube(2, 2, 2, 6))
    beside = lesion_wise(scene(GRID, cube(10, 2, 2, 6)), truth)
    assert (beside.dice, beside.true_positives, beside.false_positives) == (0.0, 1, 0)
    assert beside.hd95_mm == pytest.approx(8.0)
    apart = lesion_wise(scene(GRID, cube(11, 2, 2, 6)), truth)
    assert (apart.hd95_mm, apart.true_positives, apart.false_positives, apart.false_negatives) == (374.0, 0, 1, 1)


def test_one_component_may_serve_two_lesions() -> None:
    bridge = TWO_LESIONS | scene(GRID, (slice(8, 40), slice(4, 5), slice(4, 5)))
    scores = lesion_wise(bridge, TWO_LESIONS)
    # Each cube of 216 voxels is compared with all 464 predicted ones.
    assert scores.dice == pytest.approx(2 * 216 / (216 + 464))
    assert (scores.true_positives, scores.false_positives, scores.false_negatives) == (2, 0, 0)
    assert scores.hd95_mm > 30


def test_predicted_components_join_over_corners() -> None:
    truth = scene(GRID, cube(2, 2, 2, 6))
    chain = truth | scene(GRID, *(cube(8 + i, 8 + i, 8 + i, 1) for i in range(12)))
    assert lesion_wise(chain, truth).false_positives == 0


def test_a_lesions_hd95_is_the_regions_when_there_is_one_lesion() -> None:
    truth, prediction = scene(GRID, cube(2, 2, 2, 9)), scene(GRID, cube(3, 4, 2, 8))
    assert lesion_wise(prediction, truth).hd95_mm == pytest.approx(hd95_mm(prediction, truth, ONE_MM))
    assert lesion_wise(prediction, truth).dice == pytest.approx(dice(prediction, truth))


@pytest.mark.parametrize("spacing_mm", [(2.0, 2.0, 2.0), (1.0, 2.0, 5.0)])
def test_the_rule_is_that_of_1_mm_on_every_grid(spacing_mm: tuple[float, float, float]) -> None:
    truth = scene((30, 12, 12), cube(1, 1, 1, 3), cube(20, 1, 1, 2), cube(8, 8, 8, 1))
    prediction = scene((30, 12, 12), cube(1, 2, 1, 3), cube(15, 9, 9, 1))
    fine = [np.kron(mask, np.ones([int(mm) for mm in spacing_mm])).astype(bool) for mask in (prediction, truth)]
    assert lesion_wise(prediction, truth, spacing_mm) == lesion_wise(*fine, ONE_MM)
    assert lesion_wise(prediction, truth, spacing_mm) != lesion_wise(prediction, truth, ONE_MM)


def test_half_millimetres_and_odd_lengths_keep_their_extent() -> None:
    truth = scene((40, 30, 20), (slice(4, 24), slice(3, 13), slice(2, 12)))
    assert on_1mm_grid(crop_pair(truth, truth, (0.5, 0.7, 1.3))).truth.shape == (10, 7, 13)
    assert on_1mm_grid(crop_pair(truth, truth, (0.9999, 1.0, 1.0001))).truth.shape == (20, 10, 10)
    assert lesion_wise(truth, truth, (0.5, 0.7, 1.3)).counted == 1


def test_the_1_mm_grid_is_centred_on_the_box_so_that_a_flip_changes_nothing() -> None:
    # Five voxels of 0.85 mm are 4.25 mm: four voxels of 1 mm whose centres lie in the first, second, fourth and fifth.
    for at, expected in ((0, "1000"), (1, "0100"), (2, "0000"), (3, "0010"), (4, "0001")):
        prediction, truth = np.zeros((5, 1, 1), dtype=bool), np.ones((5, 1, 1), dtype=bool)
        prediction[at] = True
        found = on_1mm_grid(crop_pair(prediction, truth, (0.85, 1.0, 1.0))).prediction
        assert "".join(str(int(v)) for v in found.ravel()) == expected


@pytest.mark.parametrize("mm", [0.5, 0.9, 1.2, 1.5, 2.0])
def test_what_the_lesions_are_does_not_depend_on_what_was_predicted(mm: float) -> None:
    """The larger one is scored or is not, and has so many voxels of 1 mm, wherever a prediction begins and ends."""
    size = round(4 / mm)
    truth = scene((40, 40, 40), cube(15, 15, 15, size), cube(25, 25, 25, size + 2))
    found, flipped = set(), set()
    for before, after in product(range(4), repeat=2):
        prediction = truth | scene((40, 40, 40), (slice(15 - before, 15), slice(15, 16), slice(15, 16)))
        prediction[28 + size, 20, 20 : 20 + after] = True
        pair = crop_pair(prediction, truth, (mm, mm, mm))
        scores = lesion_scores(pair)
        found.add((int(on_1mm_grid(pair).truth.sum()), scores.counted, scores.ignored))
        flip = lesion_wise(prediction[::-1, ::-1], truth[::-1, ::-1], (mm, mm, mm))
        flipped.add((scores.counted, scores.ignored) == (flip.counted, flip.ignored))
    assert len(found) == 1
    assert flipped == {True}


# --- a real patient


def test_a_real_patient_scores_the_same_on_any_grid(real_data: Path) -> None:
    """A scan as stored on 182×218×182 LAS, and flipped and padded to 240×240×187; a shifted, cut copy as prediction."""
    image = nibabel.load(real_data / "odd/BraTS2021_00000-mni182/BraTS2021_00000-mni182-seg.nii.gz")
    labels = np.asarray(image.dataobj).astype(np.uint8)
    for codes in ((1, 2, 3), (1, 3), (3,)):
        truth = np.isin(labels, codes)
        prediction = np.roll(truth, (2, -1, 3), axis=(0, 1, 2)) & (np.arange(truth.shape[1]) % 37 > 1)[:, None]
        there = score_region(prediction, truth, image.header.get_zooms())
        moved = [np.pad(np.flip(mask, (0, 1)), ((29, 29), (11, 11), (0, 5))) for mask in (prediction, truth)]
        assert score_region(*moved, ONE_MM) == pytest.approx(there)
        assert 0.3 < there["dice"] < 0.95
        pair = crop_pair(prediction, truth, ONE_MM)
        monai = monai_hd95_and_nsd(pair.prediction, pair.truth, ONE_MM, 1.01)
        assert (there["hd95_mm"], there["nsd"]) == pytest.approx(monai)


def test_two_raters_of_one_patient_agree_on_the_tumour_but_not_on_its_enhancement(real_data: Path) -> None:
    first, second = (
        np.asarray(nibabel.load(real_data / f"ssa-2mm/{case}/{case}-seg.nii.gz").dataobj)
        for case in ("BraTS-SSA-00115-000", "BraTS-SSA-00121-000")
    )
    assert dice(first > 0, second > 0) == pytest.approx(0.87, abs=0.01)
    assert dice(first == 3, second == 3) == pytest.approx(0.48, abs=0.01)
