"""Clouds of points: what each number says where the answer is known, and what it cannot say."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medmap.core.clouds import Clouds, _renamed, between_kl, likeness, mmd, planar, probe, retrieval
from medmap.core.gaussian import Gaussian, kl
from medmap.errors import InputError

pytest.importorskip("sklearn", reason="numbers on latents need the extra study")

NAMES = ("t1n", "t1c", "t2w", "t2f")


def clouds(values: dict[str, NDArray[np.float64]], cases: list[str] | None = None, patients: Any = None) -> Clouds:
    """[n F] points a sequence, row i of case i."""
    count = len(next(iter(values.values())))
    ids = [f"c{i}" for i in range(count)] if cases is None else cases
    owners = ids if patients is None else patients
    modality = tuple(name for name in values for _ in range(count))
    return Clouds(np.concatenate(list(values.values())), modality, (*ids,) * len(values), (*owners,) * len(values))


def drawn(rng: np.random.Generator, count: int = 20, gap: float = 0.0, brain: float = 0.0, size: int = 6) -> Clouds:
    """Each point: the sequence's offset × gap + the patient's own × brain + noise of variance 1."""
    person = rng.normal(size=(count, size))
    return clouds({n: gap * rng.normal(size=size) + brain * person + rng.normal(size=(count, size)) for n in NAMES})


# ---- one place? -------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000))
def test_divergence_between_two_sequences_is_the_mean_of_both_directions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    (m, n), (v, w) = rng.normal(size=(2, 5)), rng.uniform(0.2, 3, (2, 5))
    a, b = (Gaussian(torch.tensor(x), torch.tensor(np.log(y))) for x, y in ((m, v), (n, w)))
    by_hand = 0.5 * float((kl(a, b) + kl(b, a)).mean())
    assert between_kl({"a": (m, v), "b": (n, w)}) == pytest.approx({"mean": by_hand, "largest": by_hand})


def test_divergence_names_the_worst_pair_and_survives_a_dead_channel() -> None:
    one = (np.zeros(2), np.ones(2))
    found = between_kl({"a": one, "b": one, "c": (np.full(2, 2.0), np.ones(2))})
    assert found == {"mean": pytest.approx(4 / 3), "largest": 2.0}
    assert between_kl({"a": (np.zeros(2), np.zeros(2)), "b": (np.zeros(2), np.zeros(2))})["mean"] == 0
    dead = between_kl({"a": (np.zeros(2), np.array([1.0, 0.0])), "b": one})
    assert 1e4 < dead["mean"] < np.inf
    assert np.isnan(between_kl({"a": one})["mean"])


def test_discrepancy_is_unbiased_and_knows_its_chance_level() -> None:
    rng = np.random.default_rng(0)
    same = [mmd(drawn(rng)) for _ in range(60)]
    values = np.array([found["mean"] for found in same])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(60)
    beyond = np.mean([found["mean"] > found["chance95"] for found in same])
    assert 0 <= beyond <= 0.15  # 5 % expected of 60
    apart = mmd(drawn(rng, gap=3.0))
    assert apart["mean"] > 5 * apart["chance95"] > 0


def test_pairs_that_share_a_sequence_are_not_taken_for_independent() -> None:
    """Four sequences, of which no two differ: the mean over six pairs is beyond chance in 5 %, not in 14 %."""
    rng = np.random.default_rng(3)
    found = [mmd(drawn(rng, count=12, brain=1.0), seed) for seed in range(120)]
    assert np.mean([one["mean"] > one["chance95"] for one in found]) < 0.11


def test_renaming_keeps_to_a_patient_and_to_what_a_scan_has() -> None:
    some = clouds({n: np.zeros((3, 1)) for n in NAMES}, ["a", "b", "c"], ["p", "p", "q"])
    rows, patients = some.rows()
    rows[2, 1] = -1
    for seed in range(20):
        new = _renamed(rows, patients, np.random.default_rng(seed))
        assert [sorted(row) for row in new.tolist()] == [sorted(row) for row in rows.tolist()]
        assert (new < 0).tolist() == (rows < 0).tolist()
        assert (new[0] - rows[0, 0]).tolist() == (new[1] - rows[1, 0]).tolist()  # both scans of p alike


def test_that_both_show_one_brain_does_not_count_as_likeness() -> None:
    rng = np.random.default_rng(1)
    alone = np.array([mmd(drawn(rng, brain=3.0))["mean"] for _ in range(40)])
    assert abs(alone.mean()) < 3 * alone.std() / np.sqrt(40)


def test_two_points_each_by_hand() -> None:
    pair = clouds({"a": np.array([[0.0], [1.0]]), "b": np.array([[1.0], [0.0]])})
    k = np.exp(-0.5)  # of the six distances four are 1 and two are 0
    assert mmd(pair)["mean"] == pytest.approx(k + k - 1 - 1)


def test_a_probe_tells_what_can_be_told_and_no_more() -> None:
    rng = np.random.default_rng(2)
    assert probe(drawn(rng, gap=5.0))["accuracy"] == 1
    blind = probe(drawn(rng, count=60, brain=2.0))
    assert blind["chance"] == 0.25
    assert blind["low"] < 0.27
    assert blind["accuracy"] < 0.35


def test_a_probe_does_not_learn_patients_by_heart() -> None:
    """Ten scans of each of 6 patients, who have one sequence each that is theirs alone: only unseen patients count."""
    rng = np.random.default_rng(3)
    person = np.repeat(rng.normal(size=(6, 40)), 10, axis=0) + 0.01 * rng.normal(size=(60, 40))
    ids, owners = tuple(f"c{i}" for i in range(60)), tuple(f"p{i // 10}" for i in range(60))
    known = Clouds(person, tuple(("a", "b")[(i // 10) % 2] for i in range(60)), ids, owners)
    assert probe(known)["accuracy"] < 0.9


def test_a_small_gap_can_be_told_as_well_as_a_large_one() -> None:
    """On a map the sequences of a patient lie on each other; one cut in the space tells them all the same."""
    rng = np.random.default_rng(4)
    base = rng.normal(size=(30, 40)) * np.r_[10 * np.ones(39), 0.01]
    shifted = clouds({name: base + np.r_[np.zeros(39), float(j)] + 0.1 for j, name in enumerate(NAMES)})
    assert probe(shifted)["accuracy"] > 0.95
    flat = np.array(planar(shifted.points)["tsne"])
    apart = ((flat[:, None] - flat) ** 2).sum(axis=2) + np.diag(np.full(120, np.inf))
    assert np.mean([shifted.case[i] == shifted.case[int(j)] for i, j in enumerate(apart.argmin(axis=1))]) > 0.95


# ---- still pairs? -----------------------------------------------------------------------------------------------


def test_pairs_are_found_behind_a_gap() -> None:
    near = drawn(np.random.default_rng(5), gap=20.0, brain=5.0)
    found, cosines = retrieval(near), likeness(near)
    assert found["accuracy"] > 0.95
    assert found["chance"] == pytest.approx(1 / 20)
    assert cosines["matched"] < cosines["shuffled"]  # the gap is what is seen first
    assert cosines["centred_matched"] > 0.8
    assert abs(cosines["centred_shuffled"]) < 0.1


def test_without_pairing_all_is_chance_although_the_distributions_are_equal() -> None:
    rng = np.random.default_rng(6)
    apart = clouds({name: rng.normal(size=(40, 6)) for name in NAMES})
    assert retrieval(apart)["low"] < 1 / 40 + 0.02
    assert abs(likeness(apart)["centred_matched"]) < 0.05
    assert mmd(apart)["mean"] < 0.01


def test_without_a_gap_a_patient_lies_nearer_to_himself_than_to_his_sequence() -> None:
    cosines = likeness(drawn(np.random.default_rng(7), brain=3.0))
    assert cosines["matched"] > 0.8 > 0.1 > cosines["shuffled"]


def test_two_scans_of_a_patient_are_neither_others_nor_a_miss() -> None:
    rng = np.random.default_rng(8)
    person = np.repeat(rng.normal(size=(10, 5)), 2, axis=0)
    cases, patients = [f"p{i // 2}-{i % 2}" for i in range(20)], [f"p{i // 2}" for i in range(20)]
    twice = clouds({n: person + 0.01 * rng.normal(size=(20, 5)) for n in NAMES}, cases, patients)
    assert retrieval(twice)["accuracy"] == 1
    assert retrieval(twice)["chance"] == pytest.approx(0.1)
    assert likeness(twice)["shuffled"] < 0.1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(-3, 3), st.floats(0.1, 10))
def test_no_number_knows_origin_scale_or_rotation(seed: int, shift: float, scale: float) -> None:
    rng = np.random.default_rng(seed)
    one = drawn(rng, count=8, gap=1.0, brain=1.0)
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    other = Clouds(scale * one.points @ turn + shift, one.modality, one.case, one.patient)
    for what in (likeness, retrieval, mmd):
        assert what(other) == pytest.approx(what(one), abs=1e-7)


def test_patients_who_lack_sequences_take_part_with_what_they_have() -> None:
    whole = drawn(np.random.default_rng(9), gap=2.0, brain=4.0)
    kept = [i for i in range(80) if not (whole.modality[i] == "t1c" and whole.case[i] in ("c0", "c1", "c2"))]
    some = Clouds(whole.points[kept], *(tuple(x[i] for i in kept) for x in (whole.modality, whole.case, whole.patient)))
    assert retrieval(some)["accuracy"] > 0.9
    assert probe(some)["chance"] == pytest.approx(20 / 77)
    assert all(np.isfinite(value) for value in (*mmd(some).values(), *likeness(some).values()))
    samples, patients = some.paired(NAMES)
    assert [len(x) for x in samples] == [17] * 4
    assert patients == [f"c{i}" for i in range(3, 20)]


def test_a_collapse_and_a_single_sequence_are_undefined_and_no_error() -> None:
    flat = clouds({name: np.ones((6, 3)) for name in NAMES})
    assert np.isnan(list(likeness(flat).values())).all()
    assert np.isnan(retrieval(flat)["accuracy"])
    assert mmd(flat)["mean"] == 0
    assert probe(flat)["accuracy"] <= 0.5
    assert planar(flat.points)["tsne"] is None
    alone = clouds({"t1c": np.random.default_rng(0).normal(size=(6, 3))})
    assert np.isnan(probe(alone)["accuracy"])
    assert np.isnan(mmd(alone)["mean"])
    assert np.isnan(retrieval(alone)["accuracy"])


# ---- maps -------------------------------------------------------------------------------------------------------


def test_maps_keep_clusters_and_repeat_themselves() -> None:
    points = drawn(np.random.default_rng(10), gap=20.0)
    found = planar(points.points)
    assert found == planar(points.points)
    assert found["perplexity"] == pytest.approx(79 / 3)
    for name in ("pca", "tsne"):
        flat = np.array(found[name])
        middles = np.array([flat[np.array(points.modality) == m].mean(axis=0) for m in NAMES])
        nearest = np.argmin(((flat[:, None] - middles) ** 2).sum(axis=2), axis=1)
        assert [NAMES[j] for j in nearest] == list(points.modality)
    assert planar(points.points[:3])["tsne"] is None


# ---- wrong input ------------------------------------------------------------------------------------------------


def test_what_is_no_cloud_is_refused() -> None:
    for points in (np.zeros((3, 2)), np.full((2, 2), np.nan), np.zeros(2)):
        with pytest.raises(InputError, match="expected finite points N × F and N names of each"):
            Clouds(points, ("a", "b"), ("c", "c"), ("c", "c"))
    with pytest.raises(InputError, match="two points of one modality of a case"):
        Clouds(np.zeros((2, 2)), ("a", "a"), ("c", "c"), ("c", "c"))


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    points = drawn(np.random.default_rng(0), count=4)
    for what in (lambda: probe(points), lambda: planar(points.points)):
        with pytest.raises(InputError, match=r"pip install 'medmap\[study\]'"):
            what()
