"""Laws of a simulated patient."""

from __future__ import annotations

import numpy as np
import pytest

from medmap.core.case import Case
from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.errors import InputError
from medmap.phantom import draw_patient, simulate
from medmap.phantom.anatomy import build_anatomy, centred_grid
from medmap.phantom.patient import stream


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [simulate(seed, spacing_mm=4.0) for seed in range(20)]


def test_the_same_seed_gives_the_same_patient_and_another_another(cases: list[Case]) -> None:
    again = simulate(0, spacing_mm=4.0)
    for name, image in cases[0].images.items():
        np.testing.assert_array_equal(image, again.images[name])
        assert (image != cases[1].images[name]).any()
    np.testing.assert_array_equal(cases[0].labels, again.labels)


def test_an_image_does_not_depend_on_which_others_are_made(cases: list[Case]) -> None:
    turned = simulate(0, spacing_mm=4.0, modalities=ModalitySet(("t2f", "t1n")))
    assert list(turned.images) == ["t2f", "t1n"]
    for name, image in turned.images.items():
        np.testing.assert_array_equal(image, cases[0].images[name])


def test_images_are_whole_positive_numbers_in_the_brain_and_zero_outside(cases: list[Case]) -> None:
    for seed, case in enumerate(cases):
        patient = draw_patient(seed)
        brain = build_anatomy(patient.head, case.grid, stream(seed, "anatomy")).brain
        assert tuple(case.images) == GLIOMA_MRI.names
        assert case.labels is not None
        assert brain[case.labels > 0].all()
        for name, image in case.images.items():
            assert image.dtype == np.float32
            assert np.isfinite(image).all()
            assert (image == np.rint(image)).all()
            assert image.min() == 0
            assert not image[~brain].any()
            if patient.scans[name].uncovered_mm == 0:
                assert (image[brain] >= 1).all()
            else:
                assert 0 < (image[brain] == 0).mean() < 0.2


def test_some_sequences_miss_slices_so_brain_boxes_differ(cases: list[Case]) -> None:
    def differs(case: Case) -> bool:
        return len({int((image != 0).sum()) for image in case.images.values()}) > 1

    assert 0 < sum(map(differs, cases)) < len(cases)


def test_noise_has_the_spread_asked_for() -> None:
    for seed in (0, 3):
        scans = draw_patient(seed).scans
        still, noisy = (simulate(seed, noise=noise, spacing_mm=3.0) for noise in (0.0, 0.05))
        for name in GLIOMA_MRI:
            before, after = still.images[name], noisy.images[name]
            gain = scans[name].gain
            strong = before > 0.6 * gain  # far above the noise, where its spread is σ times the coil's gain
            spread = (after - before)[strong].std() / gain
            # the coil's gain varies, by a factor whose mean square is e^(2 bias²) if it were log-normal
            assert spread == pytest.approx(0.05, rel=0.25), name


def test_sequences_show_different_things(cases: list[Case]) -> None:
    shown: dict[str, dict[int, list[float]]] = {name: {1: [], 2: [], 3: []} for name in GLIOMA_MRI}
    for case in cases:
        assert case.labels is not None
        for name, image in case.images.items():
            brain = image > 0
            z = (image - np.median(image[brain & (case.labels == 0)])) / image[brain].std()
            for code, values in shown[name].items():
                if (case.labels == code).sum() > 20:
                    values.append(float(np.median(z[(case.labels == code) & brain])))
    contrast = {name: {code: np.median(values) for code, values in by.items()} for name, by in shown.items()}
    assert contrast["t2f"][2] > 0.8 < contrast["t2w"][1]  # oedema on FLAIR, fluid on T2
    assert contrast["t1c"][3] - contrast["t1c"][2] > 0.5  # the rim takes up contrast agent, oedema does not
    assert contrast["t1c"][3] - contrast["t1c"][1] > 1.0
    assert contrast["t1n"][3] < 0.3  # and native T1 does not know
    flair, agent = (abs(contrast[name][3] - contrast[name][1]) for name in ("t2f", "t1c"))
    assert flair < 0.6 * agent  # FLAIR tells rim from core worse than contrast agent does


def test_volumes_on_the_grid_lie_in_broad_bands(cases: list[Case]) -> None:
    whole = np.array([(case.labels > 0).sum() for case in cases if case.labels is not None]) * 0.064
    core = np.array([np.isin(case.labels, (1, 3)).sum() for case in cases]) * 0.064
    assert whole.min() > 4
    assert whole.max() < 250
    assert 45 < np.median(whole) < 150
    assert 0.2 < np.median(core / whole) < 0.6


def test_a_fine_grid_shows_the_same_head(cases: list[Case]) -> None:
    fine = simulate(0, spacing_mm=2.0)
    brain_ml = [
        np.count_nonzero(case.images["t2f"]) * np.prod(case.grid.spacing_mm) / 1000 for case in (fine, cases[0])
    ]
    assert brain_ml[0] == pytest.approx(brain_ml[1], rel=0.03)


def test_shape_and_affine_are_those_asked_for() -> None:
    case = simulate(1, spacing_mm=4.0, shape=(43, 50, 41), modalities=ModalitySet(("t1",)), id="A")
    assert case.id == "A"
    assert case.grid.matches(centred_grid((43, 50, 41), 4.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": -0.1}, "noise: found -0.1"),
        ({"noise": float("nan")}, "noise: found nan"),
        ({"spacing_mm": 0.5}, "spacing: found 0.5 mm; expected 1 to 4 mm"),
        ({"spacing_mm": 5.0}, "spacing: found 5.0 mm"),
        ({"modalities": ModalitySet(("t1n", "adc"))}, "modality adc: no signal equation"),
        ({"shape": (32, 96, 80)}, "too small for a head"),
        ({"seed": -1}, "seed: found -1"),
    ],
)
def test_impossible_requests_are_refused_by_name(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        simulate(**{"seed": 0, **arguments})  # type: ignore[arg-type]
