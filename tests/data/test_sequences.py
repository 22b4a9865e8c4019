"""Images that are not what their names say are found, whole ones are left alone, and every finding has its cure."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medmap.core.case import Case
from medmap.data.cases import read_case
from medmap.data.check import check
from medmap.data.faults import Look
from medmap.data.layouts import recognise
from medmap.data.sequences import KINDS as LOOKS
from medmap.data.sequences import NAMES, guess, kinds, likelier, numbers, order_score
from medmap.data.siblings import KINDS, Finding, coded, findings, odd_values
from medmap.data.views import View
from medmap.errors import InputError
from medmap.inputs import examine, read_inputs
from medmap.phantom import Settings, simulate, write_phantoms

SEEDS = (11, 12, 15)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Phantoms of other seeds than the coefficients were fitted to."""
    return [simulate(seed, Settings(spacing_mm=3.0)) for seed in SEEDS]


@pytest.fixture(scope="module")
def sets(cases: list[Case]) -> list[dict[str, View]]:
    return [views_of(case) for case in cases]


def views_of(case: Case) -> dict[str, View]:
    views = {name: View.of(image, case.affine) for name, image in case.images.items()}
    assert None not in views.values()
    return views  # type: ignore[return-value]


def inside(view: View, change: Callable[[np.ndarray], np.ndarray]) -> View:
    return View(np.where(view.mask, change(view.values), 0).astype(np.float32), view.spacing_mm)


def found(views: dict[str, View]) -> list[tuple[str, str]]:
    return [(finding.kind, finding.name) for finding in findings(views)]


# ---- names ------------------------------------------------------------------------------------------------------


def test_whole_patients_are_left_alone(sets: list[dict[str, View]]) -> None:
    assert [found(views) for views in sets] == [[]] * len(sets)


@pytest.mark.parametrize(("one", "two"), [("t2w", "t2f"), ("t1n", "t1c"), ("t1n", "t2w")])
def test_exchanged_names_are_found_and_both_are_told(sets: list[dict[str, View]], one: str, two: str) -> None:
    for views in sets:
        (finding,) = findings(views | {one: views[two], two: views[one]})
        assert finding.kind == "named"
        assert {one, two} <= set(finding.what.replace(":", "").split())
        assert finding.cure == "look at both, and exchange their names"


def test_one_image_alone_under_a_wrong_name(sets: list[dict[str, View]]) -> None:
    for views in sets:
        (finding,) = findings({"t2w": views["t2f"]})
        assert finding == Finding(
            "named",
            "t2w",
            "t2w looks like t2f (fluid is dark and grey matter brighter than white)",
            "look at it, and name it t2f if it is",
        )


def test_an_inverted_image_does_not_pass_for_what_it_was(sets: list[dict[str, View]]) -> None:
    for views in sets:
        turned = inside(views["t2w"], lambda v: v.max() + 1 - v)
        assert kinds(turned)[LOOKS.index("t2w")] < -2 < kinds(views["t2w"])[LOOKS.index("t2w")]


def test_guesses_name_images_whatever_they_are_called(sets: list[dict[str, View]]) -> None:
    for views in sets:
        answers = guess({f"series {i}": views[name] for i, name in enumerate(("t2f", "t1c", "t2w", "t1n"))})
        assert [best for best, _ in answers.values()] == ["t2f", "t1c", "t2w", "t1n"]
        assert all(0.5 < probability <= 1 for _, probability in answers.values())


def test_names_that_need_not_differ_are_guessed_one_by_one(sets: list[dict[str, View]]) -> None:
    views = {"a": sets[0]["t2f"], "b": sets[0]["t2f"]}
    assert [best for best, _ in guess(views, distinct=False).values()] == ["t2f", "t2f"]
    assert len({best for best, _ in guess(views).values()}) == 2 or guess(views)["a"][1] < 0.6


def test_other_sequences_have_no_name_to_doubt(sets: list[dict[str, View]]) -> None:
    assert found({"dwi": sets[0]["t2f"], "t2w": sets[0]["t2w"]}) == []
    assert likelier({}) == {}


# ---- laws -------------------------------------------------------------------------------------------------------


def test_scale_and_offset_change_nothing(sets: list[dict[str, View]]) -> None:
    for view in sets[0].values():
        np.testing.assert_allclose(numbers(inside(view, lambda v: 0.25 * v + 40)), numbers(view), atol=2e-3)


def test_probabilities_sum_to_one(sets: list[dict[str, View]]) -> None:
    for view in sets[0].values():
        assert np.exp(kinds(view)).sum() == pytest.approx(1)


def test_the_order_of_two_t1_images_changes_its_sign_with_them(sets: list[dict[str, View]]) -> None:
    for views in sets:
        forth, back = order_score(views["t1n"], views["t1c"]), order_score(views["t1c"], views["t1n"])
        assert forth > 0
        assert forth == pytest.approx(-back, abs=1e-4)


def test_orientation_in_the_file_changes_nothing(cases: list[Case]) -> None:
    image, affine = cases[0].images["t2w"], cases[0].affine
    turned = affine @ np.array([[-1, 0, 0, image.shape[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    one, two = View.of(image, affine), View.of(image[::-1], turned)
    assert one is not None
    assert two is not None
    np.testing.assert_array_equal(one.values, two.values)


@pytest.mark.parametrize("size", [4, 120])
def test_what_is_no_brain_is_not_looked_at(size: int) -> None:
    """0.06 ml, and 13.8 litres."""
    assert View.of(np.random.default_rng(0).uniform(1, 2, (size,) * 3), np.diag([2.0, 2.0, 2.0, 1.0])) is None


# ---- copies, places, values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [lambda v: v, lambda v: 0.3 * v + 7, lambda v: v**0.7], ids=["as it is", "rescaled", "gamma"]
)
def test_one_image_twice(sets: list[dict[str, View]], change: Callable[[np.ndarray], np.ndarray]) -> None:
    for views in sets:
        assert found(views | {"t1c": inside(views["t1n"], change)}) == [("copy", "t1c")]


def test_a_copy_that_was_turned_round_is_a_copy(sets: list[dict[str, View]]) -> None:
    views = sets[0]
    flipped = View(views["t1n"].values[::-1].copy(), views["t1n"].spacing_mm)
    (finding,) = findings({"t1n": views["t1n"], "t2w": flipped})
    assert finding.what == "t2w is t1n once more with left and right exchanged (rank correlation 1.000)"


def test_a_noisy_copy_is_alike(sets: list[dict[str, View]]) -> None:
    image = sets[0]["t2w"]
    noise = np.random.default_rng(0).normal(0, 0.05 * np.median(image.values[image.mask]), image.values.shape)
    (finding,) = findings({"t2w": image, "t2f": inside(image, lambda v: v + noise)})
    assert (finding.kind, finding.name, KINDS[finding.kind]) == ("alike", "t2f", "warning")


@pytest.mark.parametrize(
    ("axes", "words"),
    [(0, "left and right"), (1, "front and back"), (2, "top and bottom"), ((0, 1), "left and right,")],
)
def test_mirrored_content_names_the_odd_one_out(
    sets: list[dict[str, View]], axes: int | tuple[int, ...], words: str
) -> None:
    for views in sets:
        turned = View(np.flip(views["t1c"].values, axes).copy(), views["t1c"].spacing_mm)
        (finding,) = [finding for finding in findings(views | {"t1c": turned}) if finding.kind == "mirrored"]
        assert finding.name == "t1c"
        assert finding.what.startswith(f"t1c is mirrored against t1n, t2w, t2f: {words}")


def test_of_two_images_nobody_knows_which_is_mirrored(sets: list[dict[str, View]]) -> None:
    views = sets[0]
    turned = View(views["t2f"].values[::-1].copy(), views["t2f"].spacing_mm)
    (finding,) = findings({"t1c": views["t1c"], "t2f": turned})
    assert finding.what == "t2f and t1c are mirrored against each other: left and right are exchanged"


def test_a_shift_is_measured(sets: list[dict[str, View]]) -> None:
    views = sets[0]
    away = View(np.roll(views["t2f"].values, (4, 0, 0), (0, 1, 2)), views["t2f"].spacing_mm)
    (finding,) = findings(views | {"t2f": away})
    assert (finding.kind, finding.name) == ("shifted", "t2f")
    assert finding.what == "t2f lies 12 mm away from t1n, t1c, t2w on the same grid"


def test_another_grid_is_not_a_shift(sets: list[dict[str, View]]) -> None:
    views = sets[0]
    away = View(np.roll(views["t2f"].values, (4, 0, 0), (0, 1, 2)), views["t2f"].spacing_mm)
    assert findings(views | {"t2f": away}, frozenset({"t2f"})) == []


def test_missing_slices_are_counted(sets: list[dict[str, View]]) -> None:
    view = sets[0]["t2w"]
    top = np.flatnonzero(view.mask.any(axis=(0, 1)))[-1]
    values = view.values.copy()
    values[:, :, top - 15 :] = 0
    kind = [
        finding for finding in findings(sets[0] | {"t2w": View(values, view.spacing_mm)}) if finding.kind == "partial"
    ]
    (finding,) = kind
    assert finding.name == "t2w"
    assert "before the others at the top" in finding.what
    assert 36 <= float(finding.what.split(" mm")[0].split()[-1]) <= 48  # 16 slices of 3 mm less what t2w itself lacked


def test_a_skull_round_one_image_alone(sets: list[dict[str, View]]) -> None:
    from scipy import ndimage

    views = sets[0]
    small = {name: inside(view, lambda v: v) for name, view in views.items()}
    kernel = ndimage.binary_erosion(views["t1n"].mask, iterations=4)
    small = {name: View(view.values * kernel, view.spacing_mm) for name, view in small.items()}
    assert ("skull", "t2w") in found(small | {"t2w": views["t2w"]})


def test_odd_values() -> None:
    values = np.random.default_rng(0).normal(100, 10, (20, 20, 20)).astype(np.float32)
    assert list(odd_values("t2w", values)) == []
    (clip,) = odd_values("t2w", np.minimum(values, 115))
    assert clip.kind == "clipped"
    assert "t2w is cut off at 115: 6." in clip.what  # 6.7 % of a normal distribution lie beyond 1.5 σ
    (normal,) = odd_values("t2w", (values - values.mean()) / values.std())
    assert (normal.kind, KINDS[normal.kind]) == ("normalised", "note")


@pytest.mark.parametrize("voxels", [1, 40, 999, 8000])
def test_few_values_are_codes_in_masks_of_any_size(voxels: int) -> None:
    values = np.zeros((20, 20, 20), np.float32)
    values.flat[:voxels] = np.arange(voxels) % 3 + 1
    codes = coded("t2w", values)
    assert codes is not None
    assert (codes.kind, codes.name, KINDS[codes.kind]) == ("codes", "t2w", "error")
    assert "a segmentation, not an image" in codes.what
    assert (coded("t2w", values * np.float32(0.3)) is None) == (voxels < 1000)  # a few voxels of any image
    assert coded("t2w", np.zeros((2, 2, 2))) is None
    noise = np.random.default_rng(0).normal(100, 10, (20, 20, 20))
    assert coded("t2w", np.round(noise)) is None


def test_every_kind_is_of_a_known_severity() -> None:
    assert set(KINDS.values()) == {"error", "warning", "note"}


# ---- where users meet it ------------------------------------------------------------------------------------------


@pytest.fixture
def exchanged(tmp_path: Path) -> Path:
    """One phantom on disk whose T2w and FLAIR have each other's names."""
    write_phantoms(tmp_path, 1, 11, Settings(spacing_mm=3.0))
    folder = tmp_path / "PHANTOM-00000-000"
    one, two = (folder / f"PHANTOM-00000-000-{name}.nii.gz" for name in ("t2w", "t2f"))
    other = two.read_bytes()
    two.write_bytes(one.read_bytes())
    one.write_bytes(other)
    return tmp_path


def test_deep_checking_tells_and_headers_alone_do_not(exchanged: Path) -> None:
    (fault,) = check(exchanged, deep=True).faults
    assert (fault.kind, fault.severity, fault.case) == ("named", "warning", "PHANTOM-00000-000")
    assert "t2f and t2w look exchanged" in fault.what
    assert check(exchanged).faults == ()


def test_predicting_warns_and_refuses_what_would_mislead(exchanged: Path) -> None:
    (case,) = recognise(exchanged).cases
    inputs = read_inputs({name: case.images[name] for name in ("t2w", "t2f")})
    (warning,) = examine(inputs, brain=True)
    assert "look exchanged" in warning
    assert examine(inputs, brain=False) == []
    path = case.images["t2f"].path
    picture = nib.load(case.images["t2w"].path)
    nib.save(nib.Nifti1Image(2 * np.asarray(picture.dataobj), picture.affine), path)
    with pytest.raises(InputError, match="t2f is t2w once more"):
        examine(inputs, brain=True)


def test_a_segmentation_for_an_image_is_refused(tmp_path: Path) -> None:
    write_phantoms(tmp_path, 1, 11, Settings(spacing_mm=4.0))
    (case,) = recognise(tmp_path).cases
    assert case.labels is not None
    _, *codes = np.unique(np.asarray(nib.load(case.labels).dataobj))
    assert len(codes) > 1
    case.images["t2f"].path.write_bytes(case.labels.read_bytes())
    for brain in (True, False):
        with pytest.raises(InputError, match="t2f holds 3 different values only, 1 … 3: a segmentation, not an image"):
            examine(read_inputs({name: case.images[name] for name in ("t1c", "t2f")}), brain=brain)
    assert [fault.kind for fault in check(tmp_path, deep=True).faults if fault.severity == "error"] == ["codes"]


def test_an_image_with_far_less_volume_than_its_siblings_is_warned_about(tmp_path: Path) -> None:
    write_phantoms(tmp_path, 1, 11, Settings(spacing_mm=4.0))
    (case,) = recognise(tmp_path).cases
    path = case.images["t2f"].path
    picture = nib.load(path)
    values = np.asarray(picture.dataobj).copy()
    values[np.unravel_index(np.flatnonzero(values)[100:], values.shape)] = 0  # 6.4 ml are left
    nib.save(nib.Nifti1Image(values, picture.affine), path)
    (warning,) = examine(read_inputs({name: case.images[name] for name in ("t1c", "t2f")}))
    assert "only 6.4 ml of t2f are not 0, 1" in warning
    assert "ml of the other sequences; look at it" in warning
    (warning,) = examine(read_inputs({"t2f": case.images["t2f"]}))
    assert "only 6.4 ml of t2f are not 0, a brain has 1000 to 2000 ml" in warning


def test_copies_to_the_byte_are_told_once(exchanged: Path) -> None:
    (case,) = recognise(exchanged).cases
    case.images["t2f"].path.write_bytes(case.images["t2w"].path.read_bytes())
    faults = check(exchanged, deep=True).faults
    assert [fault.kind for fault in faults if fault.severity == "error"] == ["duplicate"]


def test_livers_are_not_looked_at_as_brains(exchanged: Path) -> None:
    (case,) = recognise(exchanged).cases
    assert Look.at(replace(case, labels=None), exchanged, (), deep=True, brain=False).faults == []


def test_looking_needs_no_torch() -> None:
    code = "import sys, medmap.data.siblings; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "monai", "matplotlib", "pydantic", "rich"} & set(done.stdout.split()) == set()


# ---- real scans -------------------------------------------------------------------------------------------------


def test_real_patients_are_left_alone_and_exchanged_names_found(real_data: Path) -> None:
    for files in recognise(real_data / "brats2021-2mm").cases[:4]:
        views = views_of(read_case(files, NAMES))
        assert found(views) == []
        for one, two in (("t1n", "t1c"), ("t2w", "t2f")):
            assert found(views | {one: views[two], two: views[one]}) == [("named", min(one, two))]


def test_the_measurement_can_be_repeated() -> None:
    script = Path(__file__).parents[2] / "scripts" / "sequences.py"
    done = subprocess.run([sys.executable, script, "measure", "--count", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| copy, unchanged | 1 of 1 (100 %) |" in done.stdout
    assert "| t1n+t1c+t2w+t2f | 1 of 1 (100 %) |" in done.stdout
