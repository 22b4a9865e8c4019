"""A simulated liver: shapes and vessels against closed forms, laws of a patient, contrast as radiologists name it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medmap.config import parse_config
from medmap.core.labels import SCHEMES
from medmap.core.modality import ModalitySet
from medmap.core.tissues import TISSUES
from medmap.data.dataset import training_batch
from medmap.data.preprocess import prepare_case
from medmap.errors import InputError
from medmap.phantom.abdomen import Abdomen, ellipsoid, smax, smin
from medmap.phantom.liver import LIVER, PHASES, PLACING_MM, PLACING_SHAPE
from medmap.phantom.organ import Body
from medmap.phantom.patient import Patient, draw_patient, stream
from medmap.phantom.scan import FLOWING, signals
from medmap.phantom.simulate import Settings, grid_of, render, simulate
from medmap.phantom.space import Lattice
from medmap.phantom.vessels import Tubes, branching, tube_share

PLAIN = Settings(organ="liver", spacing_mm=4.0)
CLEAN = Settings(organ="liver", spacing_mm=4.0, noise=0.0)
SEEDS = (7, 9, 20, 24)
"""Large, small, necrotic and many lesions; 7 and 9 hypovascular, 20 and 24 hypervascular."""


def body_of(seeds: tuple[int, ...], lattice: Lattice) -> Body:
    streams = [{part: stream(seed, part) for part in LIVER.built} for seed in seeds]
    return LIVER.build([draw_patient(seed, "liver").body for seed in seeds], lattice, streams)


@cache
def body_at_4_mm(seed: int) -> Body:
    return body_of((seed,), grid_of(PLAIN))


def hypervascular(patient: Patient) -> bool:
    return patient.agent_mmol_l["arterial"]["lesion"] > 0.3


# ---- shapes and vessels ------------------------------------------------------------------------------------------


def test_depth_in_a_ball_is_the_radius_less_the_distance() -> None:
    x, y, z = Lattice.centred((21, 21, 21), 1.0).points()[0]
    away = (x**2 + y**2 + z**2).sqrt()
    assert (ellipsoid(x, y, z, (7.0, 7.0, 7.0)) - (7 - away)).abs().max() < 0.01


def test_an_ellipsoid_has_its_half_axes() -> None:
    along = torch.arange(1, 60, dtype=torch.float32)
    zero = torch.zeros_like(along)
    for axis, half in enumerate((10.5, 20.5, 40.5)):
        lines = [along if i == axis else zero for i in range(3)]
        inside = ellipsoid(lines[0], lines[1], lines[2], (10.5, 20.5, 40.5)) > 0
        assert inside.tolist() == (along < half).tolist()
    assert ellipsoid(zero, along, None, (10.5, 20.5, 1.0)).gt(0).sum() == 20


@given(st.floats(-50, 50), st.floats(-50, 50), st.floats(1, 20))
def test_rounded_minimum_and_maximum_differ_from_sharp_ones_by_a_quarter_of_the_width_at_most(
    a: float, b: float, width: float
) -> None:
    one, other = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    low, high = float(smin(one, other, width)), float(smax(one, other, width))
    assert min(a, b) - width / 4 - 1e-9 <= low <= min(a, b) + 1e-9
    assert max(a, b) - 1e-9 <= high <= max(a, b) + width / 4 + 1e-9
    if abs(a - b) >= width:
        assert (low, high) == pytest.approx((min(a, b), max(a, b)))


def test_a_straight_tube_fills_its_volume() -> None:
    tubes = Tubes(np.array([[-20.0, 0.3, 0.2]]), np.array([[20.0, 0.3, 0.2]]), np.array([4.0]))
    volume = float(tube_share(tubes, Lattice.centred((60, 20, 20), 1.0)).sum())
    assert volume == pytest.approx(np.pi * 16 * 40 + 4 / 3 * np.pi * 64, rel=0.02)


def test_a_tube_thinner_than_a_voxel_fills_part_of_it_and_one_outside_nothing() -> None:
    lattice = Lattice.centred((5, 5, 5), 4.0)
    thin = Tubes(np.array([[0.0, 0.0, -20.0]]), np.array([[0.0, 0.0, 20.0]]), np.array([1.0]))
    share = tube_share(thin, lattice)
    assert 0 < float(share[2, 2, 2]) < 0.5
    assert int(share.count_nonzero()) == 5
    assert not tube_share(thin._replace(start_mm=thin.start_mm + 60, end_mm=thin.end_mm + 60), lattice).any()


def test_a_tree_reaches_all_targets_and_cubes_of_radii_add_up() -> None:
    generator = np.random.default_rng(0)
    targets = generator.uniform(-50, 50, (40, 3))
    tree = branching(np.array([[0.0, 0, -90], [0.0, 0, -60]]), targets, 1.5, 99.0, generator)
    for target in targets:
        assert np.linalg.norm(tree.end_mm - target, axis=1).min() < 1e-9
    assert tree.radius_mm[0] == pytest.approx(1.5 * 40 ** (1 / 3))
    for start in np.unique(tree.start_mm[1:], axis=0):
        into = tree.radius_mm[(tree.end_mm == start).all(axis=1)]
        out = tree.radius_mm[(tree.start_mm == start).all(axis=1)]
        ends_here = sum(np.linalg.norm(targets - start, axis=1) < 1e-9)
        assert (into**3).sum() == pytest.approx((out**3).sum() + ends_here * 1.5**3)


def test_no_vessel_is_wider_than_the_widest() -> None:
    generator = np.random.default_rng(1)
    tree = branching(np.zeros((1, 3)), generator.uniform(-50, 50, (40, 3)), 1.5, 3.0, generator)
    assert tree.radius_mm.max() == 3.0


# ---- bodies ------------------------------------------------------------------------------------------------------


def test_livers_have_the_volumes_of_livers() -> None:
    lattice = Lattice.centred(PLACING_SHAPE, PLACING_MM)
    volumes = []
    for seed in range(30):
        depths = Abdomen(draw_patient(seed, "liver").body.trunk, stream(seed, "anatomy")).at(lattice)
        volumes.append(float((depths["liver"] > 0).sum()) * PLACING_MM**3 / 1000)
        spleen_ml = float((depths["spleen"] > 0).sum()) * PLACING_MM**3 / 1000
        assert 40 < spleen_ml < 500
    assert min(volumes) > 900
    assert max(volumes) < 2200
    assert 1200 < np.median(volumes) < 1650
    assert np.std(volumes) > 100


@pytest.mark.parametrize("seed", SEEDS)
def test_lesions_lie_in_the_liver_and_the_liver_in_the_body(seed: int) -> None:
    body = body_at_4_mm(seed)
    assert body.labels.dtype == torch.uint8
    assert set(body.labels.unique().tolist()) == {0, 1, 2}
    assert body.mask[body.labels > 0].all()
    row = {name: body.fractions[0, i] for i, name in enumerate(LIVER.tissues)}
    lesion = body.labels[0] == 2
    ill = row["lesion"] + row["rim"] + row["necrosis"]
    assert ill[lesion].min() > 0.45
    assert ill[~lesion].max() < 0.55
    whole = row["liver"] + ill + row["portal_vein"] + row["hepatic_vein"] + row["fat"]
    assert whole[body.labels[0] > 0].mean() > 0.97
    assert row["liver"][body.labels[0] == 0].mean() < 0.01


@pytest.mark.parametrize("seed", SEEDS)
def test_tissues_fill_the_body_but_for_air_and_bone(seed: int) -> None:
    body = body_at_4_mm(seed)
    total = body.fractions.sum(dim=1)
    assert body.fractions.min() >= 0
    assert total.max() < 1 + 1e-4
    assert not total[~body.mask].any()
    assert total[body.labels > 0].min() > 0.4  # a voxel that shares the dome with the lung
    assert total[body.labels > 0].mean() > 0.98
    assert 0.6 < total[body.mask].mean() < 0.97


@pytest.mark.parametrize("seed", SEEDS)
def test_lesions_have_the_volume_that_was_drawn_unless_the_liver_ends(seed: int) -> None:
    drawn = draw_patient(seed, "liver").body.lesions
    balls_ml = sum(np.pi / 6 * one.diameter_mm**3 * np.prod(one.stretch) / 1000 for one in drawn)
    made_ml = float((body_at_4_mm(seed).labels == 2).sum()) * 0.064
    assert 0.45 * balls_ml < made_ml < 1.6 * balls_ml


def test_every_body_lies_in_the_box_and_in_the_slab() -> None:
    wider = Lattice.centred((88, 68, 58), 4.0)
    mask = body_of((9,), wider).mask[0]
    x, y, z = (mask.any(dim=other) for other in ((1, 2), (0, 2), (0, 1)))
    extent = [4 * int(line.sum()) for line in (x, y, z)]
    assert all(found <= most for found, most in zip(extent, LIVER.extent_mm, strict=True))
    assert extent[0] > 240
    assert extent[2] >= 192


def test_a_part_of_a_lattice_holds_the_same_patient() -> None:
    whole, part = Lattice.centred((80, 60, 50), 4.0), Lattice.centred((40, 30, 24), 4.0)
    both = [body_of((24,), lattice) for lattice in (whole, part)]
    cut = both[0].fractions[:, :, 20:60, 15:45, 13:37]
    assert (cut - both[1].fractions).abs().max() < 1e-3
    assert (both[0].labels[:, 20:60, 15:45, 13:37] != both[1].labels).float().mean() < 1e-3


def test_volumes_do_not_depend_on_the_resolution() -> None:
    fine = body_of((24,), grid_of(Settings(organ="liver", spacing_mm=3.0)))
    for code, tolerance in ((1, 0.01), (2, 0.06)):
        coarse_ml = float((body_at_4_mm(24).labels == code).sum()) * 0.064
        assert float((fine.labels == code).sum()) * 0.027 == pytest.approx(coarse_ml, rel=tolerance)


def test_a_patient_does_not_depend_on_who_else_is_in_the_batch() -> None:
    both = body_of((9, 24), grid_of(PLAIN))
    for row, seed in enumerate((9, 24)):
        for mine, batched in zip(body_at_4_mm(seed), both, strict=True):
            assert torch.equal(mine[0], batched[row])


# ---- numbers that are drawn --------------------------------------------------------------------------------------


def test_lesions_are_one_to_eight_of_5_to_60_mm() -> None:
    drawn = [draw_patient(seed, "liver").body.lesions for seed in range(200)]
    numbers = [len(lesions) for lesions in drawn]
    diameters = [one.diameter_mm for lesions in drawn for one in lesions]
    assert (min(numbers), max(numbers)) == (1, 8)
    assert 5 <= min(diameters) < 8
    assert 50 < max(diameters) <= 60
    assert 12 < np.median(diameters) < 25
    assert {one.dead > 0 for lesions in drawn for one in lesions} == {True, False}
    assert all(one.dead == 0 for lesions in drawn for one in lesions if one.diameter_mm < 12)


def test_the_organ_names_its_tissues_everywhere() -> None:
    assert set(LIVER.tissues.values()) <= set(TISSUES)
    agent = draw_patient(0, "liver").agent_mmol_l
    assert tuple(agent) == PHASES
    for amounts in agent.values():
        assert set(amounts) <= set(LIVER.tissues)
        assert min(amounts.values()) > 0
    assert {LIVER.sequences[name](3.0, np.random.default_rng(0)).phase for name in LIVER.sequences} == {*PHASES, ""}
    assert LIVER.scheme == SCHEMES["liver"]


# ---- contrast ----------------------------------------------------------------------------------------------------


def contrasts(seed: int, modality: str) -> dict[str, float]:
    """Signal of each tissue relative to liver."""
    patient = draw_patient(seed, "liver")
    scan = patient.scans[modality]
    pure = signals(scan, patient.field_t, patient.relaxation, patient.agent_mmol_l, randomised=0.0)
    return {name: value / pure["liver"] for name, value in pure.items()}


def test_hypervascular_lesions_light_up_first_and_then_wash_out() -> None:
    seeds = [seed for seed in range(80) if hypervascular(draw_patient(seed, "liver"))]
    assert 20 < len(seeds) < 55
    arterial, late = ([contrasts(seed, phase)["lesion"] for seed in seeds] for phase in ("arterial", "late"))
    assert min(arterial) > 1.15
    assert np.mean(np.array(late) < 1) > 0.75
    assert np.mean([contrasts(seed, "late")["rim"] > contrasts(seed, "late")["lesion"] for seed in seeds]) > 0.9


def test_hypovascular_lesions_are_dark_in_the_portal_phase() -> None:
    seeds = [seed for seed in range(80) if not hypervascular(draw_patient(seed, "liver"))]
    portal = [contrasts(seed, "portal") for seed in seeds]
    assert max(each["lesion"] for each in portal) < 1
    assert np.median([each["rim"] - each["lesion"] for each in portal]) > 0


def test_vessels_fill_one_after_the_other() -> None:
    """Aorta first, then portal vein, then hepatic veins; spleen before liver; kidney's cortex before its medulla."""
    for seed in range(20):
        arterial, portal = (contrasts(seed, phase) for phase in ("arterial", "portal"))
        assert arterial["artery"] > arterial["spleen"] > 1
        assert arterial["artery"] > arterial["portal_vein"] > arterial["hepatic_vein"]
        assert arterial["kidney"] > arterial["medulla"]
        assert min(portal["portal_vein"], portal["hepatic_vein"]) > 1.1
        assert contrasts(seed, "t1n")["hepatic_vein"] < 1


def test_lesions_and_fluid_are_bright_in_t2_and_lesions_in_diffusion_where_fat_is_dark() -> None:
    t2, dwi = ([contrasts(seed, name) for seed in range(20)] for name in ("t2w", "dwi"))
    assert all(each["fluid"] > each["lesion"] > 1 for each in t2)
    assert all(each["lesion"] > max(1, 2 * each["fat"]) for each in dwi)
    assert np.median([each["fat"] for each in dwi]) < 0.7


def test_blood_flows_out_of_the_slice_between_the_pulses_of_a_spin_echo() -> None:
    for seed in range(20):
        patient = draw_patient(seed, "liver")
        scan = patient.scans["t2w"]
        still = replace(scan, timing=replace(scan.timing, flow_left=1.0))
        moving, resting = (
            signals(each, patient.field_t, patient.relaxation, patient.agent_mmol_l, randomised=0.0)
            for each in (scan, still)
        )
        changed = {name for name in resting if moving[name] != resting[name]}
        assert changed == {name for name, kind in LIVER.tissues.items() if kind == "blood"} <= set(FLOWING)
        for name in changed:
            assert moving[name] == pytest.approx(scan.timing.flow_left * resting[name])


# ---- images ------------------------------------------------------------------------------------------------------


def test_images_are_whole_positive_numbers_in_the_body_and_zero_outside() -> None:
    settings = Settings(ModalitySet(tuple(LIVER.sequences)), organ="liver", spacing_mm=4.0)
    patient = draw_patient(9, "liver")
    images, labels, mask = render([patient], settings, grid_of(settings))
    assert images.shape == (1, 7, *mask.shape[1:])
    assert torch.equal(images, images.round())
    assert not images[:, :, ~mask[0]].any()
    for name, image in zip(settings.names, images[0], strict=True):
        if patient.scans[name].uncovered_mm == 0:
            assert image[mask[0]].min() >= 1
    assert labels.any()


def test_phases_show_what_they_are_made_for() -> None:
    """In the images themselves, without noise: lesions of the two kinds, aorta, and phases that differ."""
    medians = {}
    for seed in (9, 24):
        rendered = render([draw_patient(seed, "liver")], CLEAN, grid_of(CLEAN))
        liver, lesion = (rendered.labels[0] == code for code in (1, 2))
        aorta = body_at_4_mm(seed).fractions[0, list(LIVER.tissues).index("artery")] > 0.95
        for phase, image in zip(PHASES, rendered.images[0], strict=True):
            unit = image[liver].median()
            medians[seed, phase] = (float(image[lesion].median() / unit), float(image[aorta].median() / unit))
    assert medians[24, "arterial"][0] > 1.3
    assert medians[24, "late"][0] < 1.0
    assert medians[9, "portal"][0] < 0.85
    for seed in (9, 24):
        assert medians[seed, "arterial"][1] > 1.8
        assert medians[seed, "arterial"][1] > medians[seed, "late"][1]


def test_the_same_seed_gives_the_same_patient_whatever_is_asked_for() -> None:
    case, again = simulate(24, PLAIN), simulate(24, Settings(ModalitySet(("adc", "portal")), "liver", 4.0))
    assert tuple(case.images) == PHASES
    assert case.grid.shape == (80, 64, 56)
    np.testing.assert_array_equal(case.images["portal"], again.images["portal"])
    assert case.labels is not None
    assert again.labels is not None
    np.testing.assert_array_equal(case.labels, again.labels)
    assert (case.images["portal"] != simulate(20, PLAIN).images["portal"]).mean() > 0.3


def test_a_network_can_be_trained_on_livers() -> None:
    prepared = [prepare_case(simulate(seed, PLAIN), SCHEMES["liver"]) for seed in (9, 24)]
    config = parse_config({"train": {"patch": [16, 16, 16], "batch_size": 2, "foreground": 1.0}})
    phases = ModalitySet(PHASES)
    batch = training_batch(prepared, phases, config, 0, torch.device("cpu"))
    assert batch.images.shape == (2, 3, 16, 16, 16)
    assert torch.isfinite(batch.images).all()
    assert batch.images.std() > 0.1
    assert batch.target.max() <= 2
    assert (batch.target > 0).flatten(1).any(dim=1).all()


def test_what_only_a_head_has_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"modality t2f: no signal equation for it; expected any of t1n, arterial"):
        Settings(ModalitySet(("t2f",)), organ="liver")
