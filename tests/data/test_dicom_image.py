"""Which sequence a series is where its headers leave that open: its image is asked, if it is of a brain alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("pydicom", reason="DICOM needs pip install 'medmap[dicom]'")
pytest.importorskip("dcm2niix", reason="DICOM needs pip install 'medmap[dicom]'")

from made_up_calls import answer, works
from made_up_dicom import HEADERS, write_series, write_study

from medmap.core.modality import GLIOMA_MRI
from medmap.data.dicom_guess import Guess
from medmap.data.dicom_image import SURE, _mended
from medmap.data.dicom_opened import OpenedStudy, open_study
from medmap.serve.study import guessed

PATIENT = "PHANTOM-00000-000"
SILENT: dict[str, Any] = {
    "SeriesDescription": "",
    "ScanningSequence": "RM",
    "ContrastBolusAgent": "",
    "AcquisitionTime": "",
    "RepetitionTime": None,
    "EchoTime": None,
    "InversionTime": None,
}
"""Headers of which nothing can be read."""
NUMBERS = {str(headers["SeriesNumber"]): name for name, headers in HEADERS.items()}


@pytest.fixture(scope="module")
def patient(tiny_phantoms: Path) -> Path:
    return tiny_phantoms / PATIENT


@pytest.fixture(scope="module")
def silent(patient: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four series whose headers say nothing. Read only."""
    root = tmp_path_factory.mktemp("silent") / "study"
    write_study(root, patient, headers=SILENT)
    return root


def opened_of(tmp_path: Path, patient: Path, background: float = 0.0, **headers: dict[str, Any]) -> OpenedStudy:
    """A study of some images of a phantom, each with headers of its own. background: what lies around the brain"""
    for name, own in headers.items():
        image = nib.load(patient / f"{PATIENT}-{name}.nii.gz")
        voxels = np.asarray(image.dataobj)
        head = np.where(voxels == 0, background * voxels.max(), voxels)
        same = {"StudyInstanceUID": "1.2.3", "SeriesNumber": HEADERS[name]["SeriesNumber"]}
        write_series(tmp_path / "study" / name, head, image.affine, headers={**same, **own})
    (tmp_path / "scratch").mkdir()
    return open_study(tmp_path / "study", tmp_path / "scratch")


def told(opened: OpenedStudy) -> dict[str, tuple[str, str]]:
    """{sequence in truth: guess, how sure}."""
    series = opened.study.series
    return {NUMBERS[s.label]: (g.name, g.sure) for s, g in zip(series, opened.guesses, strict=True)}


def test_without_a_word_in_the_headers_the_image_says_what_it_is(silent: Path, tmp_path: Path) -> None:
    rows = answer("check", silent)["study"]
    assert {row["series"]: row["used_as"] for row in rows} == NUMBERS
    for row in rows:
        assert row["guess"] == row["used_as"]
        assert row["sure"] == "unsure"  # people had better look at what nobody has written down
        assert row["why"].startswith("nothing in the headers tells; from the image: ")
    said = works("check", silent)
    assert "of use are t1n + t1c + t2w + t2f" in said
    found, notes = guessed(open_study(silent, tmp_path), GLIOMA_MRI)  # as the local page has it
    assert found == {"0": "t1n", "1": "t2w", "2": "t2f", "3": "t1c"}
    assert sum("is unsure (nothing in the headers tells; from the image: " in note for note in notes) == 4


def test_the_series_that_is_named_is_used_whatever_its_image_says(silent: Path, tmp_path: Path) -> None:
    words = ("predict", "-i", silent, "-o", tmp_path / "seg.nii.gz", "--dry-run", "--t1c", 4, "--t2w", "none")
    (images,) = answer(*words)["would_make"].values()
    assert images == {"t1c": "series 4", "t1n": "series 3", "t2f": "series 5"}


def test_a_head_is_not_asked_and_the_headers_stay(patient: Path, tmp_path: Path) -> None:
    quarrel = {**HEADERS["t2w"], "SeriesDescription": "t1"}
    opened = opened_of(tmp_path, patient, background=0.1, t2w=quarrel, t2f={**HEADERS["t2f"], **SILENT})
    assert told(opened) == {"t2w": ("t1n", "unsure"), "t2f": ("other", "unsure")}
    for series in opened.study.series:
        assert opened.why(series).endswith("its image is not asked: no skull-stripped brain")


def test_an_image_overrules_words_that_quarrel_with_physics(patient: Path, tmp_path: Path) -> None:
    wrong, right = (
        {**HEADERS["t2w"], "SeriesDescription": "t1"},
        {**HEADERS["t2f"], "InversionTime": 900.0, "EchoTime": 9.0},
    )
    opened = opened_of(tmp_path, patient, t2w=wrong, t2f=right)
    assert told(opened) == {"t2w": ("t2w", "unsure"), "t2f": ("t2f", "likely")}
    assert "called t1; but TR 4500, TE 98 is as t2w; from the image: " in opened.why(opened.study.series[0])


def test_headers_that_agree_are_believed_unseen(patient: Path, tmp_path: Path) -> None:
    opened = opened_of(tmp_path, patient, t2w={**HEADERS["t2f"], "SeriesNumber": 4}, t2f=HEADERS["t2f"])
    assert set(told(opened).values()) == {("t2f", "sure")}
    assert opened.files == {}  # nothing was converted


@pytest.mark.parametrize(("times", "sure"), [(("100000", "110000"), "likely"), (("110000", "100000"), "unsure")])
def test_the_image_says_which_of_two_t1_has_the_agent(
    times: tuple[str, str], sure: str, patient: Path, tmp_path: Path
) -> None:
    twins = {
        name: {**HEADERS["t1n"], "SeriesNumber": HEADERS[name]["SeriesNumber"], "AcquisitionTime": time}
        for name, time in zip(("t1n", "t1c"), times, strict=True)
    }
    assert told(opened_of(tmp_path, patient, **twins)) == {"t1n": ("t1n", sure), "t1c": ("t1c", sure)}


def test_a_series_that_cannot_be_converted_keeps_what_its_headers_say(
    silent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dcm2niix

    monkeypatch.setattr(dcm2niix, "bin", "nowhere/dcm2niix")
    opened = open_study(silent, tmp_path)
    assert {guess.name for guess in opened.guesses} == {"other"}
    assert opened.guesses[0].why[-1] == "its image cannot be read"


def test_what_an_image_does_not_tell_is_not_claimed() -> None:
    words = Guess("t1c", "unsure", ("called t1",))
    assert _mended(words, "t2w", SURE - 0.01, False) == Guess("t1c", "unsure", ("called t1", "its image does not tell"))
    assert _mended(words, "inverted t2w", 0.99, False).name == "t1c"
    assert _mended(words, "t1n", 0.9, compared=False).name == "t1c"  # the agent is hard to see in one image alone
    assert _mended(words, "t1n", 0.9, compared=True).name == "t1n"
