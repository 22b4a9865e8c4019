"""The instrument is held to made-up heads whose contrasts, noise, borders and shapes are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from numpy.typing import NDArray

from medmap.core.case import Case
from medmap.errors import InputError
from medmap.realism import (
    Realism,
    compare,
    compare_measured,
    compare_shapes,
    find_tissues,
    found_cases,
    measure,
    read_cases,
    shape_statistics,
    sphericity,
    tell_apart,
    tumour_shape,
    upright,
)
from medmap.realism.__main__ import main
from medmap.realism.compare import wasserstein
from medmap.realism.figures import contrast_bands, middle_slice, shape_percentiles, side_by_side, texture_bands
from medmap.realism.measure import Measured, edge_width_mm, spectral_slope
from medmap.realism.text import as_markdown
from medmap.realism.tissues import FLUID, GREY, WHITE

SPACING = 3.0
SIGNALS = {
    # white, grey, fluid, ncr, ed, et
    "t1n": (1.0, 0.8, 0.4, 0.6, 0.85, 0.75),
    "t1c": (1.0, 0.85, 0.45, 0.65, 0.9, 1.5),
    "t2w": (1.0, 1.3, 3.5, 2.6, 1.8, 2.0),
    "t2f": (1.0, 1.2, 0.4, 1.3, 1.9, 1.7),
}


def ball(grid: NDArray[Any], centre: tuple[float, float, float], radius: float) -> NDArray[np.bool_]:
    return ((grid - np.reshape(centre, (3, 1, 1, 1))) ** 2).sum(axis=0) < radius**2


def head(id: str = "a", seed: int = 0, noise: float = 0.02, gain: float = 0.0, signals: Any = SIGNALS) -> Case:
    """A ball of white matter in a shell of grey, a ventricle, and a tumour of nested balls; mm, 0 in the middle."""
    rng, line = np.random.default_rng(seed), np.arange(-24, 25) * SPACING
    grid = np.stack(np.meshgrid(line, line, line, indexing="ij"))
    brain, tumour = ball(grid, (0, 0, 0), 66), (30.0, 0.0, 0.0)
    tissue = np.where(ball(grid, (0, 0, 0), 52), 0, 1)
    tissue[ball(grid, (-20, 0, 0), 14)] = 2
    labels = np.zeros(brain.shape, np.uint8)
    for value, radius in ((2, 18), (3, 13), (1, 9)):
        labels[ball(grid, tumour, radius)] = value
    tissue = np.where(labels > 0, labels + 2, tissue)
    field = np.exp(gain * grid[1] / 66)
    images = {}
    for name, levels in signals.items():
        image = 100 * (np.array(levels)[tissue] + noise * rng.standard_normal(brain.shape)) * field
        images[name] = np.where(brain, image, 0).astype(np.float32)
    return Case(id, images, np.diag([SPACING] * 3 + [1.0]), labels)


@pytest.fixture(scope="module")
def realism() -> Realism:
    """Four heads, and four whose oedema is as dark as white matter on FLAIR."""
    flat = SIGNALS | {"t2f": (1.0, 1.2, 0.4, 1.3, 1.0, 1.7)}
    real = [head(f"r{seed}", seed, noise=0.02 + 0.002 * seed) for seed in range(4)]
    simulated = [head(f"s{seed}", 10 + seed, noise=0.02 + 0.002 * seed, signals=flat) for seed in range(4)]
    return compare(real, simulated)


# ---- tissues and contrasts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [0.0, 0.25])
def test_tissues_are_found_under_noise_and_gain(gain: float) -> None:
    case = head(gain=gain)
    found = find_tissues(case).classes
    line = np.arange(-24, 25) * SPACING
    radius = np.sqrt(sum(axis**2 for axis in np.meshgrid(line, line, line, indexing="ij")))
    truth = np.where(radius < 52, WHITE, GREY)
    truth[ball(np.stack(np.meshgrid(line, line, line, indexing="ij")), (-20, 0, 0), 14)] = FLUID
    for tissue in (WHITE, GREY, FLUID):
        assert (truth[found == tissue] == tissue).mean() > 0.98
        assert (found == tissue).sum() > 200


def test_nothing_is_found_in_the_tumour_at_the_hull_or_outside() -> None:
    case = head()
    found = find_tissues(case)
    assert case.labels is not None
    assert not found.classes[case.labels > 0].any()
    assert not found.classes[case.images["t1n"] == 0].any()
    assert not found.classes[~found.healthy].any()


def test_the_gain_is_recovered() -> None:
    case = head(gain=0.25)
    gain = find_tissues(case).gain["t1n"]
    assert np.log(gain[24, 32, 24] / gain[24, 16, 24]) == pytest.approx(0.25 * 16 * SPACING / 66, rel=0.25)


def test_known_contrasts_are_recovered() -> None:
    contrast = measure(head(noise=0.03)).contrast
    for name, (white, grey, fluid, ncr, ed, et) in SIGNALS.items():
        for key, level in (("GM", grey), ("CSF", fluid), ("NCR", ncr), ("ED", ed), ("ET", et)):
            assert contrast[f"{name} {key}/WM"] == pytest.approx(level / white, rel=0.02), (name, key)


def test_a_scanners_unit_plays_no_part() -> None:
    case = head()
    scaled = Case(case.id, {n: (7 * i).astype(np.float32) for n, i in case.images.items()}, case.affine, case.labels)
    one, two = measure(case).features, measure(scaled).features
    assert list(one) == list(two)
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=2e-3, abs=1e-4, nan_ok=True), name


def test_a_class_that_is_not_there_has_no_contrast() -> None:
    case = head()
    assert case.labels is not None
    none = Case("b", case.images, case.affine, np.where(case.labels == 3, 2, case.labels).astype(np.uint8))
    contrast = measure(none).contrast
    assert np.isnan(contrast["t1c ET/WM"])
    assert np.isfinite(contrast["t1c ED/WM"])


def test_a_sequence_that_is_not_there_is_left_out() -> None:
    case = head()
    two = Case("b", {name: case.images[name] for name in ("t1c", "t2f")}, case.affine, case.labels)
    found = measure(two)
    assert set(found.histogram) == {"t1c", "t2f"}
    assert found.contrast["t2f GM/WM"] == pytest.approx(1.2, rel=0.02)


def test_one_sequence_is_not_enough() -> None:
    case = head()
    with pytest.raises(InputError, match=r"case a: has t2f; tissues are found with one of t1n, t1c"):
        measure(Case("a", {"t2f": case.images["t2f"]}, case.affine, case.labels))


def test_a_head_that_is_all_tumour_is_refused() -> None:
    case = head()
    with pytest.raises(InputError, match="case a: no brain away from the tumour"):
        measure(Case("a", case.images, case.affine, np.full_like(case.labels, 2)))


# ---- texture ----------------------------------------------------------------------------------------------------


def test_noise_is_measured_and_independent_noise_has_no_grain() -> None:
    texture = measure(head(noise=0.05)).texture
    for name in SIGNALS:
        assert texture[f"{name} noise"] == pytest.approx(0.05, rel=0.1)
        assert abs(texture[f"{name} grain"]) < 0.06
    assert texture["t1n gain"] < 0.01
    assert measure(head(noise=0.02, gain=0.2)).texture["t1n gain"] > 0.05


def test_a_sharp_border_is_one_voxel_wide_and_a_smooth_one_wider() -> None:
    line = np.arange(-20, 21) * 2.0
    radius = np.sqrt(sum(axis**2 for axis in np.meshgrid(line, line, line, indexing="ij")))
    mask, everywhere = radius < 20, np.ones(radius.shape, bool)
    sharp = edge_width_mm(np.where(mask, 2.0, 1.0), mask, everywhere, (2.0, 2.0, 2.0))
    ramp = edge_width_mm(1.5 - np.clip((radius - 20) / 8, -0.5, 0.5), mask, everywhere, (2.0, 2.0, 2.0))
    assert sharp == pytest.approx(2.0)
    assert ramp == pytest.approx(8.0, rel=0.25)
    assert np.isnan(edge_width_mm(np.ones(radius.shape), mask, everywhere, (2.0, 2.0, 2.0)))
    assert np.isnan(edge_width_mm(np.ones(radius.shape), mask & False, everywhere, (2.0, 2.0, 2.0)))


def test_white_noise_has_a_flat_spectrum_and_a_power_law_its_slope() -> None:
    noise = np.random.default_rng(0).standard_normal((48, 48, 48))
    assert spectral_slope(noise, (2.0, 2.0, 2.0)) == pytest.approx(0, abs=0.1)
    lines = [np.fft.fftfreq(48, 2.0), np.fft.fftfreq(48, 2.0), np.fft.rfftfreq(48, 2.0)]
    frequency = np.sqrt(sum(axis**2 for axis in np.meshgrid(*lines, indexing="ij")))
    frequency[0, 0, 0] = 1
    smooth = np.fft.irfftn(np.fft.rfftn(noise) / frequency**1.5, noise.shape, axes=(0, 1, 2))
    assert spectral_slope(smooth, (2.0, 2.0, 2.0)) == pytest.approx(-3, abs=0.15)
    assert np.isnan(spectral_slope(np.zeros((8, 8, 8)), (2.0, 2.0, 2.0)))


# ---- two groups -------------------------------------------------------------------------------------------------


def test_what_differs_is_found_and_nothing_else(realism: Realism) -> None:
    bands = {band.name: band for band in realism.contrast}
    odd = bands["t2f ED/WM"]
    assert odd.real[1] == pytest.approx(1.9, rel=0.01)
    assert odd.simulated[1] == pytest.approx(1.0, rel=0.01)
    assert (odd.inside, odd.share, odd.patients) == (False, 0.0, (4, 4))
    assert odd.shift < -10
    within = {d.name: d for d in realism.within}
    assert within["t2f ED"].pooled == pytest.approx(0.9, rel=0.02)
    assert within["t2f ED"].simulated > 20 * within["t2f ED"].real
    assert within["t2w ED"].pooled < 0.01
    assert realism.telling["contrasts"].clues[0][0] == "t2f ED/WM"
    assert len(bands) == 20


def test_a_group_is_like_itself(realism: Realism) -> None:
    same = compare_measured(realism.real, realism.real)
    assert same.contrast_inside == same.texture_inside == 1.0
    assert all(distance.pooled == 0 for distance in (*same.histograms, *same.within))


def test_an_empty_group_is_refused(realism: Realism) -> None:
    with pytest.raises(InputError, match="no simulated patient; at least one of each kind"):
        compare_measured(realism.real, [])


def test_voxels_of_different_size_are_refused(realism: Realism) -> None:
    first = realism.real[0]
    fine = Measured(**{**vars(first), "id": "fine", "spacing_mm": (1.0, 1.0, 1.0)})
    with pytest.raises(InputError, match=r"case fine has voxels of 1×1×1 mm, case r0 of 3×3×3 mm"):
        compare_measured(realism.real, [fine])


@given(shift=st.floats(-5, 5), n=st.integers(1, 30), m=st.integers(1, 30), seed=st.integers(0, 99))
def test_a_shift_is_a_distance(shift: float, n: int, m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=n), rng.normal(size=m)
    assert wasserstein(a, a + shift) == pytest.approx(abs(shift), abs=1e-12)
    assert wasserstein(a, b) == wasserstein(b, a)


# ---- telling apart ----------------------------------------------------------------------------------------------


def test_equal_distributions_cannot_be_told_apart() -> None:
    rng = np.random.default_rng(1)
    found = tell_apart(rng.normal(size=(80, 4)), rng.normal(size=(80, 4)), list("abcd"))
    assert found.auc == pytest.approx(0.5, abs=0.12)
    assert found.low < 0.5 < found.high
    assert found.patients == (80, 80)


def test_the_auc_is_that_of_the_feature() -> None:
    # two normal distributions one standard deviation apart: AUC = Φ(1/√2) = 0.760
    rng = np.random.default_rng(2)
    found = tell_apart(rng.normal(0, 1, (400, 1)), rng.normal(1, 1, (400, 1)), ["a"])
    assert found.auc == pytest.approx(0.760, abs=0.03)
    assert found.low < 0.760 < found.high
    assert found.high - found.low < 0.1


def test_different_distributions_can_and_the_clue_is_named() -> None:
    rng = np.random.default_rng(3)
    real, simulated = rng.normal(size=(2, 20, 3))
    simulated[:, 1] -= 20
    found = tell_apart(real, simulated, ["a", "b", "c"])
    assert (found.auc, found.low, found.high) == (1.0, 1.0, 1.0)
    assert found.clues[0][0] == "b"
    assert found.clues[0][1] < 0


def test_undefined_features_do_not_tell() -> None:
    rng = np.random.default_rng(4)
    real, simulated = rng.normal(size=(2, 60, 2))
    real[:, 1] = np.nan
    simulated[::2, 1] = np.nan
    found = tell_apart(real, simulated, ["a", "b"])
    assert np.isfinite(found.auc)
    assert found.auc < 0.85


def test_rows_of_a_patient_are_held_out_together() -> None:
    # each patient has a value of its own: who had seen its other rows would know its kind
    rng = np.random.default_rng(5)
    own = np.repeat(rng.normal(size=(2, 12, 12)), 10, axis=1)
    patients = np.repeat(np.arange(12), 10).tolist()
    names = list("abcdefghijkl")
    assert tell_apart(own[0], own[1], names, patients, patients).auc < 0.8
    assert tell_apart(own[0], own[1], names).auc > 0.9


def test_one_patient_is_too_few() -> None:
    found = tell_apart(np.zeros((1, 2)), np.ones((5, 2)), ["a", "b"])
    assert np.isnan([found.auc, found.low, found.high]).all()


# ---- shapes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 1.0, 1.5)])
def test_a_ball_has_sphericity_1(spacing: tuple[float, float, float]) -> None:
    lines = [(np.arange(n) - n // 2) * mm for n, mm in zip((40, 70, 50), spacing, strict=True)]
    radius = np.sqrt(sum(axis**2 for axis in np.meshgrid(*lines, indexing="ij")))
    assert sphericity(radius < 17.3, spacing) == pytest.approx(1.0, abs=0.03)


def test_a_rod_is_as_thin_as_its_faces_say() -> None:
    # 1×1×10 voxels: V = 10, faces 42, A = 28
    assert sphericity(np.ones((1, 1, 10), bool), (1, 1, 1)) == pytest.approx(np.pi ** (1 / 3) * 60 ** (2 / 3) / 28)
    assert np.isnan(sphericity(np.zeros((2, 2, 2), bool), (1, 1, 1)))


def test_a_tumour_worked_by_hand() -> None:
    classes = np.zeros((20, 20, 20), np.uint8)
    classes[2:12, 2:12, 2:12] = 2  # 1000 voxels
    classes[4:8, 4:8, 4:8] = 3  # 64 of them
    classes[5:7, 5:7, 5:7] = 1  # 8 of these
    classes[15:17, 15:17, 15:17] = 3  # 8 apart: 0.008 ml at 1 mm, 0.064 ml at 2 mm
    at_1mm, at_2mm = (tumour_shape(classes, (mm, mm, mm)) for mm in (1.0, 2.0))
    assert at_1mm.volume_ml == pytest.approx({"WT": 1.008, "TC": 0.072, "ET": 0.064, "NCR": 0.008, "ED": 0.936})
    assert at_1mm.components == {"WT": 1, "TC": 1, "ET": 1}
    assert at_2mm.components == {"WT": 2, "TC": 2, "ET": 2}
    assert at_1mm.largest_share == pytest.approx({"WT": 1000 / 1008, "TC": 64 / 72, "ET": 56 / 64})
    assert at_2mm.volume_ml["WT"] == pytest.approx(8 * 1.008)
    assert at_2mm.sphericity == at_1mm.sphericity


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), axes=st.permutations([0, 1, 2]), flip=st.sampled_from([1, -1]))
def test_shape_does_not_depend_on_how_a_tumour_is_stored(seed: int, axes: list[int], flip: int) -> None:
    classes = np.random.default_rng(seed).integers(0, 4, (5, 6, 7)).astype(np.uint8)
    spacing = np.array([1.0, 2.0, 3.0])
    turned = np.pad(classes.transpose(axes)[::flip], 3)
    one, two = tumour_shape(classes, spacing.tolist()), tumour_shape(turned, spacing[axes].tolist())
    assert one.components == two.components
    for name in ("volume_ml", "largest_share", "sphericity"):
        assert getattr(two, name) == pytest.approx(getattr(one, name), rel=1e-9)


def test_statistics_of_tumours_with_and_without_regions() -> None:
    whole = np.full((10, 10, 10), 2, np.uint8)  # oedema alone
    core = whole.copy()
    core[:5] = 3
    found = shape_statistics([(whole, (1, 1, 1)), (core, (1, 1, 1)), (np.zeros_like(whole), (1, 1, 1))])
    assert found["n"] == 2  # a label map without tumour is no tumour
    assert found["volume_ml"]["ET"] == pytest.approx([0.025, 0.125, 0.25, 0.375, 0.475])
    assert (found["share_without_ET"], found["share_without_NCR"], found["share_ET_below_0.5ml"]) == (0.5, 1.0, 0.5)
    assert found["TC_over_WT_volume"] == pytest.approx([0.025, 0.125, 0.25, 0.375, 0.475])
    assert found["ET_over_TC_volume"] == [1.0] * 5  # undefined without a core
    assert found["components_above_0.05ml"]["TC"] == pytest.approx([0.05, 0.25, 0.5, 0.75, 0.95])
    assert found["largest_component_share"]["ET"] == [1.0] * 5
    with pytest.raises(InputError, match="no tumour at all"):
        shape_statistics([(np.zeros_like(whole), (1, 1, 1))])


def test_the_comparison_of_shapes_is_relative() -> None:
    reference = {"about": "…", "n": 368, "volume_ml": {"WT": [0.0, 10.0, 20.0, 40.0, 80.0]}, "share_without_ET": 0.08}
    found = {"n": 2, "volume_ml": {"WT": [0.0, 11.0, 20.0, 30.0, 80.0]}, "share_without_ET": 0.1}
    volume, share = compare_shapes(found, reference)
    assert volume.name == "volume_ml WT"
    assert volume.deviation == pytest.approx((0.0, 0.1, 0.0, -0.25, 0.0))
    assert (share.name, share.deviation) == ("share_without_ET", pytest.approx((0.25,)))


# ---- pictures, words, command line ------------------------------------------------------------------------------


def drawn(figure: Figure, path: Path) -> bytes:
    figure.savefig(path, dpi=40)
    return path.read_bytes()


def test_pictures_are_drawn(realism: Realism, tmp_path: Path) -> None:
    statistics = shape_statistics([(head().labels, (3, 3, 3))])
    for figure in (contrast_bands(realism), texture_bands(realism), shape_percentiles(statistics, statistics)):
        assert drawn(figure, tmp_path / "x.png").startswith(b"\x89PNG")
    without_t1c = {name: image for name, image in head("b").images.items() if name != "t1c"}
    cases = [head(), Case("b", without_t1c, head().affine, head().labels)]
    figure = side_by_side(cases, cases[:1], source="whose they are")
    assert drawn(figure, tmp_path / "y.png").startswith(b"\x89PNG")
    assert len(figure.findobj(lambda artist: type(artist).__name__ == "AxesImage")) == 5 + 4 + 5


def test_the_slice_is_the_one_with_most_tumour() -> None:
    case = head()
    assert case.labels is not None
    areas = (case.labels > 0).sum(axis=(0, 1))
    assert areas[middle_slice(case)] == areas.max() > areas[20]
    high = np.roll(case.labels, 7, axis=2)
    assert middle_slice(Case("b", case.images, case.affine, high)) == middle_slice(case) + 7
    areas = (case.images["t1n"] != 0).sum(axis=(0, 1))
    assert areas[middle_slice(Case("c", case.images, case.affine))] == areas.max()


def test_words_say_what_numbers_do(realism: Realism) -> None:
    page = as_markdown(realism, compare_shapes({"share_without_ET": 0.1}, {"share_without_ET": 0.08}))
    assert "4 real, 4 simulated; voxels of 3 mm" in page
    row = next(line for line in page.splitlines() if line.startswith("| t2f ED/WM "))
    assert "| 1.90 (1.90 … 1.90) | 1.00 (1.00 … 1.00) | **no** | 0.00 |" in row
    assert "| share_without_ET | 0.08 | 0.10 | 25 |" in page
    assert json.loads(json.dumps(realism.to_dict()))["patients"] == [4, 4]


def write(case: Case, folder: Path) -> None:
    """In the names of BraTS 2021, stored left to right, with its codes."""
    (folder / case.id).mkdir(parents=True)
    turn = case.affine @ np.diag([-1.0, 1.0, 1.0, 1.0])
    turn[0, 3] = SPACING * (len(case.images["t1n"]) - 1)
    assert case.labels is not None
    codes = np.array([0, 1, 2, 4], np.uint8)[case.labels]
    named = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f"}
    volumes = {word: case.images[name] for word, name in named.items()} | {"seg": codes}
    for word, volume in volumes.items():
        nib.save(nib.Nifti1Image(volume[::-1], turn), folder / case.id / f"{case.id}_{word}.nii.gz")


def test_cases_are_read_through_any_layout(tmp_path: Path) -> None:
    case = head("BraTS2021_00000")
    write(case, tmp_path)
    (read,) = read_cases(found_cases([tmp_path]))
    same = upright(case)
    assert read.labels is not None
    np.testing.assert_array_equal(read.labels, same.labels)
    for name, image in same.images.items():
        np.testing.assert_array_equal(read.images[name], image)
    np.testing.assert_allclose(read.affine, same.affine, atol=1e-5)


def test_only_the_named_cases_are_opened(tmp_path: Path) -> None:
    write(head("BraTS2021_00000"), tmp_path)
    (tmp_path / "BraTS2021_00001").mkdir()
    for word in ("t1", "t1ce", "t2", "flair", "seg"):
        (tmp_path / "BraTS2021_00001" / f"BraTS2021_00001_{word}.nii.gz").write_bytes(b"not an image")
    assert [case.id for case in read_cases(found_cases([tmp_path], ["BraTS2021_00000"]))] == ["BraTS2021_00000"]
    with pytest.raises(InputError, match=r"case BraTS2021_00009: in none of the folders"):
        found_cases([tmp_path], ["BraTS2021_00009"])


def test_a_case_without_truth_is_refused(tmp_path: Path) -> None:
    write(head("BraTS2021_00000"), tmp_path)
    (tmp_path / "BraTS2021_00000" / "BraTS2021_00000_seg.nii.gz").unlink()
    with pytest.raises(InputError, match=r"BraTS2021_00000: expected a segmentation"):
        found_cases([tmp_path])


def test_the_command_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in range(2):
        write(head(f"BraTS2021_{n:05d}", n), tmp_path / "real")
        write(head(f"BraTS2021_{n + 5:05d}", n, noise=0.05), tmp_path / "other")
    reference, ids = tmp_path / "facts.json", tmp_path / "ids.txt"
    reference.write_text(json.dumps({"volume_ml": {"WT": [20.0, 20.0, 20.0, 20.0, 20.0]}}), encoding="utf-8")
    ids.write_text("BraTS2021_00000\nBraTS2021_00001\n", encoding="utf-8")
    words = ["--real", str(tmp_path / "real"), "--ids", str(ids), "--simulated", str(tmp_path / "other")]
    main([*words, "-o", str(tmp_path / "out"), "--reference", str(reference), "--rows", "1", "--tissues"])
    made = {path.name for path in (tmp_path / "out").iterdir()}
    pictures = {"sides", "shapes", "contrasts", "texture", "tissues-real", "tissues-simulated"}
    assert made == {f"{name}.png" for name in pictures} | {"realism.md", "realism.json"}
    numbers = json.loads((tmp_path / "out" / "realism.json").read_text(encoding="utf-8"))
    assert numbers["patients"] == [2, 2]
    (oedema,) = [band for band in numbers["contrast"] if band["name"] == "t2f ED/WM"]
    assert oedema["real"] == pytest.approx([1.9] * 3, rel=0.02)
    assert "AUC from patches" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: --show x: not among the real cases"):
        main([*words, "-o", str(tmp_path / "out"), "--show", "x"])
