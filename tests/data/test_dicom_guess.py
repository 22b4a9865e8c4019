"""Which sequence a series is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pydicom", reason="DICOM needs pip install 'medmap[dicom]'")

from made_up_dicom import write_series

from medmap.data.dicom import Study
from medmap.data.dicom_guess import Guess, choose, guess, guess_all
from medmap.data.dicom_read import read_study

SHAPE = (9, 11, 12)

NAMES = {
    "t1n": (
        *("AX T1", "t1_mprage_sag_p2_iso", "T1 SE ohne KM", "SAG T1 FLAIR", "T1 SANS GADO", "T1 TSE senza mdc"),
        *(
            "t1 sin contraste",
            "3D T1 TFE pre",
            "T1 W/O CONTRAST",
            "T1_native",
            "T1 non-contrast",
            "BRAVO",
            "T1 平扫",
            "T1 posterior fossa",
        ),
    ),
    "t1c": (
        *("AX T1 POST", "t1_mprage_tra_KM", "T1 SE nach KM", "AX T1 +C", "T1 3D GADO", "Ax T1 C+", "T1 con contraste"),
        *(
            "t1_space_Gd",
            "T1 FSPGR W/CONTRAST",
            "dopo mdc T1",
            "T1 CE MPRAGE",
            "T1 apres injection",
            "T1 增强",
            "T1 CIV",
        ),
    ),
    "t2w": ("AX T2 FSE", "t2_tse_tra_512", "T2W_TSE", "T2 PROPELLER", "t2 space"),
    "t2f": (
        "AX T2 FLAIR",
        "t2_tirm_tra_dark-fluid",
        "3D FLAIR post",
        "t2_spc_da-fl_sag",
        "FLAIR longTR",
        "SAG CUBE FLAIR",
    ),
    "dwi": ("ep2d_diff_3scan_trace", "DWI b1000", "DTI 32 dir"),
    "adc": ("ADC (10^-6 mm²/s)", "ep2d_diff_ADC", "eADC"),
    "swi": ("SWI_Images", "SWAN", "AX T2* GRE", "t2_fl2d_tra_hemo", "VenoBOLD"),
    "pd": ("FSE PD AXIAL OBL", "pd_tse_tra", "Proton Density"),
    "other": ("TOF 3D", "ep2d_perf", "MRS press", "Subtraction", "STIR sag", "Survey", "rCBV", "fMRI rest"),
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in NAMES.items() for text in texts])
def test_names_of_series_are_understood(name: str, text: str) -> None:
    assert guess({"SeriesDescription": text}).name == name


AGENT: dict[tuple[str, str], tuple[str, ...]] = {
    ("t1n", "sure"): (
        *("AX T1 C-", "T1 CE-", "AX T1 -C", "T1_C-_AX", "AX-T1-C-", "T1C-", "T1 (-Gd)", "T1 K-"),
        *("AX T1 C−", "T1 –KM", "T1 C-, SAG", "POSTOP T1 pre", "PRE-OP T1 C-", "POST RT T1 W/O GD"),
        *("T1 AX POSTOP", "POST RT T1", "T1 POST BIOPSY", "3D T1 POSTPROC", "T1 post-op", "PRE-OP T1"),
        *("T1 PRESURGICAL", "T1 postoperativ", "post-chemo T1"),
    ),
    ("t1c", "sure"): (
        *("AX T1 C+", "T1 CE+", "T1 +K", "AX_T1-Gd", "T1-CE-MPRAGE", "T1_C", "T1 +CE", "T1-C"),
        *("PRE-OP T1 +C", "PRE OP STEALTH T1 GAD", "POST OP T1 POST", "T1 KM postop"),
    ),
    ("t1n", "unsure"): (
        *("T1 W&WO GD", "T1 W/WO CONTRAST", "T1 mit und ohne KM", "T1 avec et sans", "T1 +/-C"),
        *("T1 with and without", "T1 WWO", "T1 wo&w gd", "T1 PRE POST", "T1 pre gadovist C+"),
    ),
    ("t1c", "unsure"): ("PRE T1 +C", "GD T1 PRE"),
}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in AGENT.items() for text in texts])
def test_words_about_the_agent(kind: tuple[str, str], text: str) -> None:
    found = guess({"SeriesDescription": text, "RepetitionTime": 550.0, "EchoTime": 9.0})
    assert (found.name, found.sure) == kind


PHYSICS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("t1n", {"ScanningSequence": "SE", "RepetitionTime": 500.0, "EchoTime": 10.0}),
    ("t1n", {"ScanningSequence": ("GR", "IR"), "RepetitionTime": 1900.0, "EchoTime": 2.5, "InversionTime": 900.0}),
    ("t1n", {"ScanningSequence": "GR", "RepetitionTime": 8.0, "EchoTime": 3.2, "FlipAngle": 12.0}),
    ("t1n", {"ScanningSequence": "SE", "RepetitionTime": 2200.0, "EchoTime": 10.0, "InversionTime": 860.0}),
    ("t1c", {"ScanningSequence": "SE", "RepetitionTime": 500.0, "EchoTime": 10.0, "ContrastBolusAgent": "GADAVIST"}),
    ("t1n", {"ScanningSequence": "SE", "RepetitionTime": 500.0, "EchoTime": 10.0, "ContrastBolusAgent": "none"}),
    ("t2w", {"ScanningSequence": "SE", "RepetitionTime": 4000.0, "EchoTime": 100.0, "InversionTime": 0.0}),
    ("t2f", {"ScanningSequence": ("SE", "IR"), "RepetitionTime": 9000.0, "EchoTime": 120.0, "InversionTime": 2500.0}),
    ("t2f", {"ScanningSequence": ("SE", "IR"), "RepetitionTime": 5000.0, "EchoTime": 388.0, "InversionTime": 1800.0}),
    ("pd", {"ScanningSequence": "SE", "RepetitionTime": 2300.0, "EchoTime": 22.0}),
    ("swi", {"ScanningSequence": "GR", "RepetitionTime": 28.0, "EchoTime": 20.0, "FlipAngle": 15.0}),
    ("dwi", {"ScanningSequence": "EP", "DiffusionBValue": 1000.0}),
    ("other", {"ScanningSequence": ("SE", "IR"), "RepetitionTime": 4000.0, "EchoTime": 60.0, "InversionTime": 150.0}),
    ("other", {"ScanningSequence": ("EP", "GR"), "RepetitionTime": 2000.0, "EchoTime": 30.0}),
    ("other", {}),
)


@pytest.mark.parametrize(("name", "headers"), PHYSICS)
def test_times_alone_tell_a_sequence(name: str, headers: dict[str, Any]) -> None:
    found = guess(headers)
    assert (found.name, found.sure) == (name, "likely" if headers else "unsure")


def test_two_witnesses_make_a_guess_sure_and_their_quarrel_makes_it_unsure() -> None:
    flair = {"ScanningSequence": "SE", "RepetitionTime": 9000.0, "EchoTime": 120.0, "InversionTime": 2500.0}
    assert guess({**flair, "SeriesDescription": "FLAIR"}).sure == "sure"
    assert guess({"SeriesDescription": "FLAIR"}).sure == "likely"
    quarrel = guess({**flair, "SeriesDescription": "T1"})
    assert (quarrel.name, quarrel.sure) == ("t1n", "unsure")
    assert quarrel.why == ("called t1", "but TI 2500, TE 120 is as t2f")


def test_tirm_is_flair_or_suppresses_fat_as_its_inversion_time_says() -> None:
    headers = {"SeriesDescription": "t2_tirm_cor", "ScanningSequence": ("SE", "IR"), "EchoTime": 80.0}
    assert guess({**headers, "InversionTime": 2400.0}).name == "t2f"
    assert guess({**headers, "InversionTime": 150.0}).name == "other"


def test_a_protocol_named_after_the_examination_says_nothing_of_contrast() -> None:
    protocol = {"ProtocolName": "BRAIN W/WO CONTRAST"}
    assert guess({**protocol, "SeriesDescription": "AX T1"}).name == "t1n"
    assert guess({**protocol, "SeriesDescription": "AX T1 +C"}).name == "t1c"


@pytest.mark.parametrize(
    ("headers", "slices", "aside"),
    [
        ({"SeriesDescription": "localizer"}, 20, "localiser"),
        ({"ImageType": ("ORIGINAL", "PRIMARY", "LOCALIZER")}, 20, "localiser"),
        ({}, 3, "only 3 slices"),
        ({"ImageType": ("DERIVED", "PRIMARY", "PROJECTION IMAGE")}, 20, "projection"),
        ({"ImageType": ("DERIVED", "SECONDARY", "MPR")}, 20, "derived"),
        ({"BodyPartExamined": "CSPINE"}, 20, "another part of the body"),
        ({"ImageType": ("ORIGINAL", "PRIMARY", "MPR")}, 20, ""),
    ],
)
def test_some_series_are_set_aside(headers: dict[str, Any], slices: int, aside: str) -> None:
    found = guess({"SeriesDescription": "T2", **headers}, slices).aside
    assert aside in found
    assert bool(found) == bool(aside)


def series_of(root: Path, *headers: dict[str, Any], shape: tuple[int, int, int] = SHAPE) -> Study:
    """Series with these headers; ``mm`` is the edge of their voxels."""
    for number, each in enumerate(headers, start=1):
        mm = each.pop("mm", 2.0)
        affine = np.diag([mm, mm, mm, 1.0])
        write_series(root / str(number), np.ones(shape), affine, headers={"SeriesNumber": number, **each})
    return read_study(root)


T1: dict[str, Any] = {"SeriesDescription": "t1", "RepetitionTime": 500.0, "EchoTime": 10.0, "ScanningSequence": "SE"}


def test_t1_without_a_word_is_told_by_the_order(tmp_path: Path) -> None:
    early, agent, late = (
        {**T1, "AcquisitionTime": "100000"},
        {**T1, "AcquisitionTime": "110000", "ContrastBolusAgent": "Dotarem"},
        {**T1, "AcquisitionTime": "120000", "SeriesDescription": "mprage"},
    )
    study = series_of(tmp_path, early, agent, late)
    found = guess_all(study.series)
    assert [each.name for each in found] == ["t1n", "t1c", "t1c"]
    assert found[0].why[-1] == "acquired before contrast agent"
    assert found[2].why[-1] == "acquired after a series with contrast agent"


def test_agent_of_a_perfusion_stays_for_the_t1_after_it(tmp_path: Path) -> None:
    perfusion = {"SeriesDescription": "perf", "AcquisitionTime": "101500", "ContrastBolusAgent": "Gadovist"}
    times = ("100000", "103000")
    study = series_of(tmp_path, perfusion, *({**T1, "AcquisitionTime": time} for time in times))
    assert [(each.name, each.sure) for each in guess_all(study.series)[1:]] == [("t1n", "sure"), ("t1c", "likely")]


def test_the_same_t1_twice_is_before_and_after_but_unsure(tmp_path: Path) -> None:
    twice = series_of(tmp_path / "a", {**T1, "AcquisitionTime": "110000"}, {**T1, "AcquisitionTime": "100000"})
    found = guess_all(twice.series)
    assert [(each.name, each.sure) for each in found] == [("t1c", "unsure"), ("t1n", "unsure")]
    other = {**T1, "AcquisitionTime": "110000", "RepetitionTime": 900.0}
    apart = series_of(tmp_path / "b", {**T1, "AcquisitionTime": "100000"}, other)
    assert [each.name for each in guess_all(apart.series)] == ["t1n", "t1n"]


@pytest.mark.parametrize("names", [("T1 C-", "T1 C+"), ("T1 POSTOP", "T1 POSTOP GD"), ("T1 -Gd", "T1 +Gd")])
def test_a_study_with_both_t1_gives_both(names: tuple[str, str], tmp_path: Path) -> None:
    study = series_of(tmp_path, *({**T1, "SeriesDescription": name} for name in names))
    chosen, _ = choose(study.series, guess_all(study.series), ("t1n", "t1c"))
    assert {name: series.number for name, series in chosen.items()} == {"t1n": 1, "t1c": 2}


def test_of_two_t1_of_one_name_the_header_with_the_agent_is_taken_and_none_is_sure(tmp_path: Path) -> None:
    bare, named = {**T1, "SeriesDescription": "T1 post", "mm": 1.0}, {**T1, "SeriesDescription": "T1 post"}
    study = series_of(tmp_path, bare, {**named, "ContrastBolusAgent": "Gadovist"})
    found = guess_all(study.series)
    assert [(each.name, each.sure) for each in found] == [("t1c", "likely")] * 2
    assert all(each.why[-1] == "of several t1c some headers name an agent" for each in found)
    chosen, notes = choose(study.series, found, ("t1c",))
    assert chosen["t1c"].number == 2
    (note,) = notes
    assert note.endswith("is taken before series 1 (T1 post): its header speaks of the contrast agent as its name does")


def test_of_two_series_the_better_resolved_is_taken_and_said(tmp_path: Path) -> None:
    t2 = {"SeriesDescription": "t2"}
    study = series_of(
        tmp_path, {**t2, "mm": 3.0}, {**t2, "mm": 1.0}, {**t2, "mm": 0.5, "ImageType": ["DERIVED", "PRIMARY"]}
    )
    chosen, notes = choose(study.series, guess_all(study.series), ("t1n", "t2w"))
    assert {name: series.number for name, series in chosen.items()} == {"t2w": 2}
    assert notes == ["t2w: series 2 (t2) is taken before series 1 (t2), series 3 (t2): its voxels are smaller"]


def test_a_derived_series_is_taken_where_there_is_no_other_and_said(tmp_path: Path) -> None:
    study = series_of(tmp_path, {"SeriesDescription": "t2", "ImageType": ["DERIVED", "SECONDARY"]})
    chosen, notes = choose(study.series, guess_all(study.series), ("t2w",))
    assert chosen["t2w"].number == 1
    assert "is unsure (derived, not as it was measured)" in notes[0]


def test_a_projection_is_never_taken(tmp_path: Path) -> None:
    study = series_of(tmp_path, {"SeriesDescription": "t2", "ImageType": ["DERIVED", "PRIMARY", "MIP"]})
    assert choose(study.series, [Guess("t2w", "sure", (), "a projection or map (MIP)")], ("t2w",)) == ({}, [])
