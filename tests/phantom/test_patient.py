"""Numbers of a patient: the same for a seed, each part for itself, all of them plain."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from medmap.errors import InputError
from medmap.phantom import patient as module
from medmap.phantom.brain import BRAIN
from medmap.phantom.patient import SHARE_OF_1_5_T, draw_patient, organ_named, stream


def test_the_same_seed_draws_the_same_patient_and_another_another() -> None:
    assert draw_patient(11) == draw_patient(11) != draw_patient(12)


def test_streams_are_each_for_itself() -> None:
    first = {(seed, part): stream(seed, part).random() for seed in range(3) for part in ("head", "tumour", "noise")}
    assert len(set(first.values())) == 9
    assert first == {key: stream(*key).random() for key in first}


def test_everything_that_was_drawn_is_plain_and_named() -> None:
    patient = draw_patient(3, operated=True)
    told = json.loads(json.dumps(patient.to_dict()))
    assert told["seed"] == 3
    assert told["body"]["tumour"]["cavity_ml"] == patient.body.tumour.cavity_ml > 0
    assert set(told["scans"]) == set(BRAIN.sequences)
    assert set(told["relaxation"]) == set(BRAIN.tissues)
    assert told["scans"]["t1c"]["timing"]["phase"] == "late"
    assert told["agent_mmol_l"]["late"]["enhancing"] > 0


def test_a_scan_does_not_depend_on_which_other_sequences_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    full = draw_patient(5)
    fewer = {name: BRAIN.sequences[name] for name in ("t2f", "t1n")}
    monkeypatch.setitem(module.ORGANS, "brain", replace(BRAIN, sequences=fewer))
    short = draw_patient(5)
    assert dict(short.scans) == {name: full.scans[name] for name in fewer}
    assert (short.body, short.relaxation, short.field_t) == (full.body, full.relaxation, full.field_t)


def test_surgery_changes_the_tumour_alone() -> None:
    before, after = draw_patient(6), draw_patient(6, operated=True)
    assert (before.body.head, before.scans, before.relaxation) == (after.body.head, after.scans, after.relaxation)
    assert before.body.tumour.cavity_ml == 0 < after.body.tumour.cavity_ml
    assert before.body.tumour.wt_ml == after.body.tumour.wt_ml


def test_fields_are_drawn_as_often_as_said() -> None:
    fields = [1.5 if stream(seed, "field").random() < SHARE_OF_1_5_T else 3.0 for seed in range(60)]
    assert [draw_patient(seed).field_t for seed in range(10)] == fields[:10]
    assert 0.2 < np.mean([field == 1.5 for field in fields]) < 0.6


def test_a_tumours_compartments_vary_together() -> None:
    logs = [
        {name: np.log(row["t2_s"]) for name, row in module._draw_relaxation(BRAIN, 3.0, stream(seed, "r")).items()}
        for seed in range(300)
    ]

    def correlation(one: str, other: str) -> float:
        return float(np.corrcoef([row[one] for row in logs], [row[other] for row in logs])[0, 1])

    assert correlation("solid", "necrosis") == pytest.approx(0.5, abs=0.15)  # half of the variance is shared
    assert correlation("white", "solid") == pytest.approx(0, abs=0.2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_patient(-1), "seed: found -1"),
        (lambda: draw_patient(0, "spleen"), r"organ 'spleen': not simulated; expected one of .*brain"),
        (lambda: organ_named(""), "organ '': not simulated"),
    ],
)
def test_impossible_requests_are_refused_by_name(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()  # type: ignore[operator]
