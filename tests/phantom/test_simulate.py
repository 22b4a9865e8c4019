"""Laws of a simulated patient, and one golden picture.

After a change that is meant to change the pictures, look at some, then make the golden one anew:

    python tests/phantom/test_simulate.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from medmap.core.case import Case
from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.errors import InputError
from medmap.phantom import Settings, draw_patient, render, simulate
from medmap.phantom import simulate as package_function
from medmap.phantom.patient import Patient
from medmap.phantom.scan import SEQUENCES, acquisition
from medmap.phantom.simulate import Rendered, _coil, _covered, grid_of, patient_of

COARSE = Settings(spacing_mm=4.0)
TWO = replace(COARSE, modalities=ModalitySet(("t2f", "t1c")))
SEEDS = tuple(range(6))
GOLDEN = Path(__file__).parent / "thumbnail.npz"


@pytest.fixture(scope="module")
def patients() -> list[Patient]:
    return [patient_of(seed, COARSE) for seed in SEEDS]


@pytest.fixture(scope="module")
def rendered(patients: list[Patient]) -> Rendered:
    """All patients in one batch, four sequences."""
    return render(patients, COARSE, grid_of(COARSE))


@pytest.fixture(scope="module")
def first() -> Case:
    return simulate(0, COARSE)


# ---- determinism -------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_patient_and_another_another(first: Case) -> None:
    again, other = simulate(0, COARSE), simulate(1, TWO)
    assert package_function is simulate
    for name, image in first.images.items():
        np.testing.assert_array_equal(image, again.images[name])
    np.testing.assert_array_equal(first.labels, again.labels)
    assert (first.images["t2f"] != other.images["t2f"]).any()
    assert (first.labels != other.labels).any()


def test_an_image_does_not_depend_on_which_others_are_made_nor_on_their_order(first: Case) -> None:
    turned = simulate(0, TWO)
    assert list(turned.images) == ["t2f", "t1c"]
    for name, image in turned.images.items():
        np.testing.assert_array_equal(image, first.images[name])
    np.testing.assert_array_equal(turned.labels, first.labels)


def test_noise_that_is_shared_does_not_depend_on_the_others_either() -> None:
    shared = replace(TWO, noise=0.1, noise_correlation=0.7)
    both, one = simulate(2, shared), simulate(2, replace(shared, modalities=ModalitySet(("t1c",))))
    np.testing.assert_array_equal(both.images["t1c"], one.images["t1c"])


def test_a_patient_does_not_depend_on_the_batch(patients: list[Patient], rendered: Rendered) -> None:
    for row in (0, 4):
        alone = render([patients[row]], COARSE, grid_of(COARSE))
        assert (alone.labels[0] != rendered.labels[row]).float().mean() < 1e-4
        assert (alone.mask[0] != rendered.mask[row]).float().mean() < 1e-4
        differ = (alone.images[0] - rendered.images[row]).abs()
        assert (differ > 0).float().mean() < 0.01  # rounding to whole numbers
        assert differ.max() <= 1 + 0.05 * alone.images[0].max()


@pytest.mark.parametrize("seed", [0, 5])
def test_one_patient_is_a_row_of_the_batch(seed: int, rendered: Rendered) -> None:
    case = simulate(seed, COARSE)
    images = np.stack(list(case.images.values()))
    assert (np.abs(images - rendered.images[seed].numpy()) > 1).mean() < 1e-3


# ---- images ------------------------------------------------------------------------------------------------------


def test_images_are_whole_positive_numbers_in_the_mask_and_zero_outside(
    patients: list[Patient], rendered: Rendered
) -> None:
    assert rendered.images.dtype == torch.float32
    assert torch.equal(rendered.images, rendered.images.round())
    assert rendered.images.isfinite().all()
    assert rendered.images.max() <= 32767
    for patient, images, mask in zip(patients, rendered.images, rendered.mask, strict=True):
        assert (images[:, ~mask] == 0).all()
        for name, image in zip(GLIOMA_MRI, images, strict=True):
            missed = (image[mask] == 0).float().mean()
            assert missed < 0.2
            assert (missed > 0) == (patient.scans[name].uncovered_mm != 0)


def test_labels_are_those_of_2023_and_nest(rendered: Rendered) -> None:
    assert rendered.labels.dtype == torch.uint8
    assert set(rendered.labels.unique().tolist()) <= {0, 1, 2, 3}
    assert rendered.mask[rendered.labels > 0].all()
    for labels in rendered.labels:
        assert (labels == 2).any()


@pytest.mark.parametrize("name", sorted(SEQUENCES))
def test_every_sequence_can_be_made(name: str) -> None:
    case = simulate(1, replace(COARSE, modalities=ModalitySet((name,)), shape=(40, 48, 40)))
    image = case.images[name]
    assert list(case.images) == [name]
    assert image[image > 0].std() > 0.04 * image[image > 0].mean()


def test_uncovered_slices_lie_at_the_top_or_the_bottom() -> None:
    mask = torch.zeros(3, 3, 10, dtype=torch.bool)
    mask[1, 1, 2:9] = True
    assert _covered(mask, 6.0, 2.0)[0, 0].tolist() == [True] * 6 + [False] * 4
    assert _covered(mask, -6.0, 2.0)[0, 0].tolist() == [False] * 5 + [True] * 5
    assert _covered(mask, 0.0, 2.0)[0, 0, 2:].all()


@pytest.mark.parametrize("seed", [0, 3])
def test_noise_has_the_spread_asked_for(seed: int) -> None:
    still, noisy = (simulate(seed, replace(COARSE, noise=noise)) for noise in (0.0, 0.03))
    scans = draw_patient(seed).scans
    for name in GLIOMA_MRI:
        before, after = still.images[name], noisy.images[name]
        _, matrices = acquisition(scans[name], before.shape, 4.0)
        kept = np.sqrt(np.prod([(matrix**2).sum(axis=1).mean() for matrix in matrices]))  # by interpolation
        sigma = 0.03 * scans[name].noise * scans[name].gain
        strong = before > max(4 * sigma, 0.4 * scans[name].gain)
        # the coil's gain multiplies, and differs from 1 by its bias
        assert (after - before)[strong].std() == pytest.approx(sigma * kept, rel=0.2), name


def test_noise_of_two_sequences_correlates_as_asked() -> None:
    def residual(rho: float) -> float:
        settings = replace(COARSE, modalities=ModalitySet(("t1n", "t2w")), noise_correlation=rho)
        still, noisy = (simulate(4, replace(settings, noise=noise)) for noise in (0.0, 0.05))
        gain = {name: draw_patient(4).scans[name].gain for name in still.images}
        strong = np.all([still.images[name] > 0.4 * gain[name] for name in gain], axis=0)
        one, other = ((noisy.images[name] - still.images[name])[strong] for name in gain)
        return float(np.corrcoef(one, other)[0, 1])

    # each scan blurs and slices its noise in its own way, which takes some of the correlation
    none, much = residual(0.0), residual(0.9)
    assert none == pytest.approx(0, abs=0.06)
    assert 0.5 < much < 0.95


def test_bias_of_two_sequences_correlates_as_asked_and_by_itself_not_at_all() -> None:
    def coil(rho: float) -> np.ndarray:
        both = [[_coil(seed, name, rho).numpy() for name in ("t1n", "t2w")] for seed in range(300)]
        return np.array(both)  # patients, sequences, coefficients

    spread = coil(0.0).std(axis=(0, 1))
    for rho in (0.0, 0.5, 0.95):
        one, other = np.moveaxis(coil(rho) / spread, 1, 0)
        assert np.corrcoef(one.ravel(), other.ravel())[0, 1] == pytest.approx(rho, abs=0.05)
        assert one.std() == pytest.approx(1, abs=0.05)  # 5700 numbers


def test_a_shared_bias_is_in_the_images() -> None:
    still = replace(COARSE, modalities=ModalitySet(("t1n", "t2w")), noise=0.0)
    alone, shared = (simulate(4, replace(still, bias_correlation=rho)) for rho in (0.0, 1.0))
    for name, image in alone.images.items():
        brain = image > 0
        assert np.abs(shared.images[name][brain] / image[brain] - 1).max() > 0.01
    np.testing.assert_array_equal(alone.labels, shared.labels)


def test_sequences_show_different_things(rendered: Rendered) -> None:
    shown: dict[str, dict[int, list[float]]] = {name: {1: [], 2: [], 3: []} for name in GLIOMA_MRI}
    for images, labels in zip(rendered.images.numpy(), rendered.labels.numpy(), strict=True):
        for name, image in zip(GLIOMA_MRI, images, strict=True):
            brain = image > 0
            z = (image - np.median(image[brain & (labels == 0)])) / image[brain].std()
            for code, values in shown[name].items():
                if (labels == code).sum() > 20:
                    values.append(float(np.median(z[(labels == code) & brain])))
    contrast = {name: {code: np.median(values) for code, values in by.items()} for name, by in shown.items()}
    assert contrast["t2f"][2] > 0.5 < contrast["t2w"][2]  # oedema on FLAIR and T2
    assert contrast["t1c"][3] - contrast["t1c"][2] > 0.5  # the rim takes up contrast agent, oedema does not
    assert contrast["t1c"][3] - contrast["t1c"][1] > 0.5
    assert contrast["t1c"][3] - contrast["t1n"][3] > 0.7  # and native T1 does not know


def test_random_contrast_is_another_picture_of_the_same_patient(first: Case) -> None:
    random = simulate(0, replace(COARSE, randomised=1.0))
    np.testing.assert_array_equal(random.labels, first.labels)
    for name, image in random.images.items():
        assert (image != first.images[name]).mean() > 0.1
    assert (random.images["t2f"] > 0).sum() == (first.images["t2f"] > 0).sum()


def test_random_contrast_is_bent_and_physical_contrast_is_not(first: Case) -> None:
    random, straight = (simulate(0, replace(COARSE, randomised=1.0, gamma=gamma)) for gamma in (1.0, 0.0))
    for name, image in random.images.items():
        exponent = np.exp(patient_of(0, COARSE).scans[name].gamma_score)
        plain = straight.images[name].astype(float)
        inside = plain > 1
        bent = plain.max() * (plain / plain.max()) ** exponent
        assert np.abs(bent - image)[inside].max() <= 0.02 * plain.max()  # both are rounded, and so is the largest
    same = simulate(0, replace(COARSE, gamma=1.0))
    for name, image in same.images.items():
        np.testing.assert_array_equal(image, first.images[name])


def test_operated_patients_have_a_cavity() -> None:
    every, none = replace(TWO, operated=1.0), replace(TWO, operated=0.0)
    assert 4 in simulate(1, every).labels  # type: ignore[operator]
    assert 4 not in simulate(1, none).labels  # type: ignore[operator]
    share = [patient_of(seed, replace(TWO, operated=0.3)).body.tumour.cavity_ml > 0 for seed in range(60)]
    assert 0.1 < np.mean(share) < 0.5


def test_a_finer_grid_shows_the_same_head(first: Case) -> None:
    fine = simulate(0, Settings(ModalitySet(("t2f",)), spacing_mm=2.5))
    ml = [np.count_nonzero(case.labels) * np.prod(case.grid.spacing_mm) / 1000 for case in (fine, first)]
    assert ml[0] == pytest.approx(ml[1], rel=0.05)
    head = [np.count_nonzero(case.images["t2f"]) * np.prod(case.grid.spacing_mm) / 1000 for case in (fine, first)]
    assert head[0] == pytest.approx(head[1], rel=0.03)


def test_shape_name_and_affine_are_those_asked_for() -> None:
    case = simulate(1, replace(COARSE, modalities=ModalitySet(("t1",)), shape=(43, 50, 41)), id="A")
    assert (case.id, list(case.images), case.grid.shape) == ("A", ["t1n"], (43, 50, 41))
    assert case.grid.spacing_mm == (4.0, 4.0, 4.0)
    np.testing.assert_allclose(case.affine[:3, 3], [-84, -98, -80])


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": -0.1}, r"noise: found -0\.1; expected 0 or more"),
        ({"noise": float("nan")}, "noise: found nan"),
        ({"noise": float("inf")}, "noise: found inf"),
        ({"bias_correlation": -0.1}, r"bias_correlation: found -0\.1; expected a correlation from 0 to 1"),
        ({"noise_correlation": 1.2}, r"noise_correlation: found 1\.2; expected a correlation from 0 to 1"),
        ({"gamma": -0.1}, r"gamma: found -0\.1; expected the largest \|log γ\|, from 0 to 2"),
        ({"randomised": -0.5}, r"randomised: found -0\.5; expected a weight from 0 to 1"),
        ({"grown": -1.0}, r"grown: found -1\.0; expected a share of tumours from 0 to 1"),
        ({"operated": 2.0}, r"operated: found 2\.0; expected a share of patients from 0 to 1"),
        ({"spacing_mm": 0.5}, r"spacing: found 0\.5 mm; expected 1 to 4 mm"),
        ({"spacing_mm": 5.0}, r"spacing: found 5\.0 mm"),
        ({"spacing_mm": float("nan")}, "spacing: found nan mm"),
        ({"organ": "spleen"}, "organ 'spleen': not simulated"),
    ],
)
def test_impossible_settings_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings(**arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Settings(ModalitySet(("t1n", "pet"))), "modality pet: no signal equation for it; expected any of t1n"),
        (lambda: Settings(ModalitySet(())), "needs at least one name"),
        (lambda: simulate(-1, COARSE), "seed: found -1"),
        (lambda: replace(COARSE, shape=(32, 96, 80)), "shape: found .* too small for a brain"),
    ],
)
def test_impossible_requests_are_refused_by_name(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


# ---- one golden picture ------------------------------------------------------------------------------------------


def _thumbnail() -> NDArray[np.uint8]:
    """Patient 7, blocks of 8×8×16 mm: four sequences, each up to its 99.5th percentile; last the share of tumour."""
    case = simulate(7, COARSE)
    assert case.labels is not None
    pictures = []
    for volume in (*case.images.values(), (case.labels > 0).astype(np.float32)):
        top = np.percentile(volume[volume > 0], 99.5)
        blocks = np.clip(volume / top, 0, 1).reshape(20, 2, 24, 2, 10, 4).mean(axis=(1, 3, 5))
        pictures.append(np.rint(255 * blocks).astype(np.uint8))
    return np.stack(pictures)


def test_the_golden_picture_is_the_same() -> None:
    with np.load(GOLDEN) as stored:
        expected = stored["thumbnail"].astype(int)
    differ = np.abs(_thumbnail().astype(int) - expected)
    assert expected.shape == (5, 20, 24, 10)
    assert differ.mean() < 0.5
    assert (differ > 12).mean() < 0.002


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, thumbnail=_thumbnail())
