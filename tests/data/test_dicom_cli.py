"""`medmap predict` from a DICOM study to a mask and a DICOM SEG, as a user calls it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", reason="DICOM needs pip install 'medmap[dicom]'")
highdicom = pytest.importorskip("highdicom", reason="DICOM needs pip install 'medmap[dicom]'")
pytest.importorskip("dcm2niix", reason="DICOM needs pip install 'medmap[dicom]'")

from made_up_calls import answer, call, fails, works  # noqa: E402
from made_up_dicom import HEADERS, write_enhanced, write_series, write_study  # noqa: E402
from made_up_mask import make_mask  # noqa: E402

import medmap  # noqa: E402
from medmap.cli import console  # noqa: E402
from medmap.core.labels import SCHEMES, LabelScheme  # noqa: E402
from medmap.core.metrics import dice  # noqa: E402

PATIENT = "PHANTOM-00000-000"


@pytest.fixture(autouse=True)
def _plain_manner() -> Iterator[None]:
    yield
    console.begin()


@pytest.fixture(scope="module")
def patient(tiny_phantoms: Path) -> Path:
    return tiny_phantoms / PATIENT


@pytest.fixture(scope="module")
def study(patient: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four series of one phantom. Read only."""
    root = tmp_path_factory.mktemp("dicom") / "study"
    write_study(root, patient)
    return root


def turned(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix = np.eye(4)
    matrix[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, s], [0, -s, c]])
    return matrix


def frames_of(seg: Any, number: int) -> dict[str, np.ndarray]:
    """{SOPInstanceUID of a source image: the segment's pixels on it}, read with pydicom alone."""
    found = {}
    for frame, pixels in zip(seg.PerFrameFunctionalGroupsSequence, seg.pixel_array, strict=True):
        if frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber == number:
            (source,) = frame.DerivationImageSequence[0].SourceImageSequence
            found[source.ReferencedSOPInstanceUID] = pixels
    return found


def check_seg(seg_file: Path, mask_file: Path, series: Path) -> Any:
    """The segments are the mask's regions at the same places in the patient; returns the SEG."""
    mask = nib.load(mask_file)
    codes = np.asarray(mask.dataobj)
    classes = SCHEMES["brats2023"].encode(codes)
    seg = pydicom.dcmread(seg_file)
    sources = {dataset.SOPInstanceUID: dataset for dataset in map(pydicom.dcmread, sorted(series.iterdir()))}
    for number, region in enumerate(SCHEMES["brats2023"].regions, start=1):
        expected = SCHEMES["brats2023"].region_mask(classes, region)
        found = np.zeros_like(expected)
        for uid, pixels in frames_of(seg, number).items():
            image = sources[uid]
            columns, rows = np.meshgrid(np.arange(image.Columns), np.arange(image.Rows))
            along, down = (np.array(image.ImageOrientationPatient[i : i + 3], float) for i in (0, 3))
            dy, dx = map(float, image.PixelSpacing)
            lps = (
                np.array(image.ImagePositionPatient, float)
                + columns[..., None] * dx * along
                + rows[..., None] * dy * down
            )
            index = (lps * [-1, -1, 1] - mask.affine[:3, 3]) @ np.linalg.inv(mask.affine[:3, :3]).T
            assert np.abs(index - np.rint(index)).max() < 1e-2
            i, j, k = np.rint(index).astype(int)[pixels > 0].T
            found[i, j, k] = True
        assert expected.any(), region
        assert np.array_equal(found, expected), region
    return seg


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reverse": True},
        {"turn": turned(25)},
        {"plane": "sagittal", "reverse": True, "turn": turned(-15), "suffix": ""},
    ],
    ids=["axial", "reversed", "oblique", "sagittal-oblique-reversed"],
)
def test_a_study_becomes_a_mask_and_a_seg(patient: Path, options: dict[str, Any], tmp_path: Path) -> None:
    uids = write_study(tmp_path / "study", patient, **options)
    out = tmp_path / "made" / "seg.nii.gz"
    said = works("predict", "-i", tmp_path / "study", "-o", out, "--dicom-seg", "--device", "cpu", "--no-qc")
    assert f"{out}: WT" in said
    seg = check_seg(out.with_name("seg.dcm"), out, tmp_path / "study" / "t1n")
    record = json.loads(out.with_name("seg.medmap.json").read_text())
    assert {name: source["series_uid"] for name, source in record["inputs"].items()} == uids
    assert record["case"] == "study"
    assert "medmap-" not in json.dumps(record)  # no temporary file is named
    # as from NIfTI, but for the rounding of the images to whole numbers
    images = [word for name in HEADERS for word in (f"--{name}", patient / f"{PATIENT}-{name}.nii.gz")]
    works("predict", *images, "-o", tmp_path / "plain.nii.gz", "--device", "cpu", "--no-qc")
    if not options.keys() & {"turn", "plane"}:
        voxels = [nib.as_closest_canonical(nib.load(f)).get_fdata() for f in (out, tmp_path / "plain.nii.gz")]
        assert dice(voxels[0] > 0, voxels[1] > 0) > 0.99
    assert sorted(path.name for path in out.parent.iterdir()) == ["seg.dcm", "seg.medmap.json", "seg.nii.gz"]
    assert seg.SegmentationType == "BINARY"


def test_a_seg_says_whose_it_is_and_what_made_it(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "seg.nii.gz"
    made = answer("predict", "-i", study, "-o", out, "--dicom-seg", "--device", "cpu")
    source = pydicom.dcmread(next((study / "t1n").iterdir()))
    seg = highdicom.seg.segread(tmp_path / "seg.dcm")
    for keyword in (
        *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate", "StudyID"),
        *("AccessionNumber", "FrameOfReferenceUID"),
    ):
        assert getattr(seg, keyword) == getattr(source, keyword), keyword
    assert seg.Modality == "SEG"
    assert seg.SeriesInstanceUID not in {pydicom.dcmread(path).SeriesInstanceUID for path in study.rglob("*.dcm")}
    segments = [seg.get_segment_description(number) for number in seg.segment_numbers]
    assert [segment.segment_label for segment in segments] == [
        *("WT whole tumour", "TC tumour core", "ET enhancing tumour")
    ]
    weights = next(iter(made["model"]["weights_sha256"].values()))
    for segment in segments:
        assert segment.algorithm_type.value == "AUTOMATIC"
        (algorithm,) = segment.SegmentationAlgorithmIdentificationSequence
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("medmap", medmap.__version__)
        assert weights in algorithm.AlgorithmParameters
        assert segment.segmented_property_category.scheme_designator == "SCT"
        assert segment.segmented_property_type.value == "108369006"
        assert segment.anatomic_regions[0].value == "12738006"
    # all images that the mask was made of are named, by their series
    named = {
        (series.SeriesInstanceUID, image.ReferencedSOPInstanceUID)
        for series in seg.ReferencedSeriesSequence
        for image in series.ReferencedInstanceSequence
    }
    there = {(d.SeriesInstanceUID, d.SOPInstanceUID) for d in map(pydicom.dcmread, study.rglob("*.dcm"))}
    assert named == there


def test_a_mask_without_tumour_is_a_seg_too(patient: Path, tmp_path: Path) -> None:
    from medmap.data.dicom_convert import convert
    from medmap.data.dicom_read import read_study
    from medmap.data.dicom_seg import write_seg
    from medmap.data.nifti import write_mask

    image = nib.load(patient / f"{PATIENT}-t2f.nii.gz")
    write_series(tmp_path / "s", np.asarray(image.dataobj), image.affine)
    (series,) = read_study(tmp_path / "s").series
    file = convert(series, tmp_path)
    write_mask(tmp_path / "seg.nii.gz", np.zeros(nib.load(file).shape, np.uint8), file)
    write_seg(tmp_path / "seg.dcm", tmp_path / "seg.nii.gz", SCHEMES["brats2023"], series)
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert len(seg.SegmentSequence) == 3
    assert not seg.pixel_array.any()


def test_a_region_left_out_moves_no_other_to_another_organ_or_colour() -> None:
    from medmap.data.dicom_seg import _descriptions

    glioma, liver = SCHEMES["brats2023"], SCHEMES["liver"]
    whole = {each.segment_label: each for each in _descriptions(glioma, list(glioma.regions), "")}
    for segment in _descriptions(glioma, ["TC", "ET"], ""):
        assert segment.anatomic_regions[0].meaning == "Brain"
        colour = whole[segment.segment_label].RecommendedDisplayCIELabValue
        assert segment.RecommendedDisplayCIELabValue == colour
    (lesion,) = _descriptions(liver, ["LESION"], "")
    assert lesion.anatomic_regions[0].meaning == "Liver"
    other = LabelScheme("own", ("background", "cyst"), {"cyst": 1}, {"CYST": ("cyst",)})
    assert not _descriptions(other, ["CYST"], "")[0].anatomic_regions


def test_a_seg_of_one_file_with_many_frames(patient: Path, tmp_path: Path) -> None:
    image = nib.load(patient / f"{PATIENT}-t2f.nii.gz")
    write_enhanced(tmp_path / "s" / "all", np.asarray(image.dataobj), image.affine, HEADERS["t2w"])
    out = tmp_path / "seg.nii.gz"
    works("predict", "-i", tmp_path / "s", "-o", out, "--dicom-seg", "--device", "cpu", "--no-qc")
    seg = highdicom.seg.segread(tmp_path / "seg.dcm")
    source = pydicom.dcmread(tmp_path / "s" / "all")
    pixels = seg.get_pixels_by_source_frame(
        source.SOPInstanceUID,
        range(1, source.NumberOfFrames + 1),
        segment_numbers=[1],
        ignore_spatial_locations=True,
        assert_missing_frames_are_empty=True,
    )[..., 0]
    mask = nib.load(out)
    whole = np.asarray(mask.dataobj) > 0
    assert whole.any()
    assert pixels.sum() == whole.sum()
    for number, frame in enumerate(source.PerFrameFunctionalGroupsSequence):
        if pixels[number].any():
            x, y, z = map(float, frame.PlanePositionSequence[0].ImagePositionPatient)
            level = (np.linalg.inv(mask.affine) @ [-x, -y, z, 1])[2]
            assert whole[:, :, round(level)].sum() == pixels[number].sum()


# ---- the page of a mask --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answered(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study, ann, and a mask of it, out/seg.nii.gz. Read only."""
    root = tmp_path_factory.mktemp("answered")
    shutil.copytree(study, root / "ann")
    works("predict", "-i", root / "ann", "-o", root / "out" / "seg.nii.gz", "--device", "cpu", "--no-qc")
    return root


def test_the_page_of_a_mask_is_made_from_the_series_again(answered: Path, tmp_path: Path) -> None:
    mask, page = tmp_path / "out" / "seg.nii.gz", tmp_path / "out" / "seg.html"
    shutil.copytree(answered / "out", mask.parent)
    record = tmp_path / "out" / "seg.medmap.json"
    record.write_text(record.read_text().replace(str(answered), str(tmp_path)))
    made = json.loads(record.read_text())
    shutil.copytree(answered / "ann", tmp_path / "ann")
    assert answer("report", mask) == {"report": str(page)}  # the record says where the study is
    text = page.read_text(encoding="utf-8")
    for entry in made["inputs"].values():
        assert entry["called"] in text
        assert entry["sha256"] in text
    assert str(tmp_path) not in text
    shutil.make_archive(str(tmp_path / "moved"), "zip", tmp_path / "ann")
    shutil.rmtree(tmp_path / "ann")
    page.unlink()
    said = fails("report", mask)
    assert "seg.nii.gz: the T1n image is series 3 (t1_se_tra) of a DICOM study; name the study" in said
    assert f"medmap report {mask} --input STUDY" in said
    assert not page.exists()
    works("report", mask, "--input", tmp_path / "moved.zip", "--anonymous")
    text = page.read_text(encoding="utf-8")
    assert "t1_se_tra" not in text
    assert made["inputs"]["t1n"]["sha256"] in text


def test_a_study_is_found_again_from_another_folder(
    answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(answered)
    mask = tmp_path / "seg.nii.gz"
    made = answer("predict", "-i", "ann", "-o", mask, "--device", "cpu", "--no-qc")
    assert {entry["study"] for entry in made["inputs"].values()} == {str(answered / "ann")}
    monkeypatch.chdir("/")
    works("report", mask)


def test_a_page_is_refused_another_study(study: Path, answered: Path, patient: Path, tmp_path: Path) -> None:
    words = ("report", answered / "out" / "seg.nii.gz", "-o", tmp_path / "seg.html", "--input")
    write_study(tmp_path / "other", patient)
    uid = pydicom.dcmread(next((study / "t1n").iterdir())).SeriesInstanceUID
    assert f"other: has no series 3 (t1_se_tra) with the UID {uid}" in fails(*words, tmp_path / "other")
    shutil.copytree(study, tmp_path / "edited")
    for file in (tmp_path / "edited" / "t1n").iterdir():
        slice_ = pydicom.dcmread(file)
        slice_.PixelData = (slice_.pixel_array // 2).tobytes()
        slice_.save_as(file)
    said = fails(*words, tmp_path / "edited")
    assert "series 3 (t1_se_tra): is not the T1n image that seg.nii.gz was made from (SHA-256" in said
    assert not (tmp_path / "seg.html").exists()


def test_an_input_of_a_report_is_a_study(patient: Path, study: Path, tiny_run: Path, tmp_path: Path) -> None:
    image = patient / f"{PATIENT}-t2f.nii.gz"
    make_mask(tmp_path / "seg.nii.gz", {"t2f": image}, np.zeros(nib.load(image).shape, np.uint8))
    said = fails("report", tmp_path / "seg.nii.gz", "--input", study)
    assert "was made from files and no DICOM study; leave out --input" in said
    assert "is for the page of a mask; found a run" in fails("report", tiny_run, "--input", study, code=2)


# ---- what is said --------------------------------------------------------------------------------------------------


def test_a_dry_run_shows_the_table_and_writes_nothing(study: Path, tmp_path: Path) -> None:
    said = works("predict", "-i", study, "-o", tmp_path / "seg.nii.gz", "--dry-run")
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert "series description matrix slices guess used as why" in lines
    assert "7 t1_se_tra 40×48 40 t1c, sure t1c called t1; TR 550, TE 9; contrast agent Gadovist" in lines
    assert f"would make {tmp_path / 'seg.nii.gz'} from t1n + t1c + t2w + t2f" in said
    assert list(tmp_path.iterdir()) == []
    plan = answer("predict", "-i", study, "-o", tmp_path / "seg.nii.gz", "--dry-run")
    (images,) = plan["would_make"].values()
    assert images["t2f"] == "series 5 (t2_tirm_tra_dark-fluid)"


def test_check_shows_the_table_of_a_study(study: Path, tmp_path: Path) -> None:
    said = works("check", study)
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert "7 t1_se_tra 40×48 40 t1c, sure t1c called t1; TR 550, TE 9; contrast agent Gadovist" in lines
    assert f"{study}: DICOM study, 4 series, of use are t1n + t1c + t2w + t2f" in said
    assert f"dcm2niix -z y -o FOLDER {study}" in said
    shutil.make_archive(str(tmp_path / "patient"), "zip", study)
    told = answer("check", tmp_path / "patient.zip")
    assert [row["used_as"] for row in told["study"]] == ["t1n", "t2w", "t2f", "t1c"]
    for words in (("prepare", study, "-o", tmp_path / "store"), ("doctor", study)):
        said = fails(*words)
        assert "160 DICOM files and no NIfTI, which is expected here; of one study `medmap check STUDY` shows" in said


def test_check_looks_at_the_voxels_of_a_study(patient: Path, study: Path, tmp_path: Path) -> None:
    assert answer("check", study, "--deep")["warnings"] == []
    assert "--labels brats2021: " in fails("check", study, "--labels", "brats2021")
    odd = shutil.copytree(patient, tmp_path / patient.name)
    shutil.copy(odd / f"{PATIENT}-t1n.nii.gz", odd / f"{PATIENT}-t1c.nii.gz")
    write_study(tmp_path / "odd", odd)
    assert "t1n + t1c + t2w + t2f" in works("check", tmp_path / "odd")
    assert "t1n and t1c are one image under two names" in fails("check", tmp_path / "odd", "--deep")


def test_a_study_is_explained(study: Path, tmp_path: Path) -> None:
    words = ("explain", "-i", study, "-o", tmp_path / "why", "--t1n", "none", "--t2w", "none", "--t1c", 7)
    plan = answer(*words, "--dry-run")
    assert plan["images"] == {"t1c": "series 7 (t1_se_tra)", "t2f": "series 5 (t2_tirm_tra_dark-fluid)"}
    made = answer(*words, "--device", "cpu")
    assert (made["case"], made["inputs"]["t1c"]["called"]) == ("study", "series 7 (t1_se_tra)")
    assert (tmp_path / "why" / "explanation.png").is_file()
    assert "medmap-" not in (tmp_path / "why" / "explanation.json").read_text()
    assert "is the folder of the images" in fails("explain", "-i", study, "-o", study)


def test_a_series_is_named_by_number_or_uid_or_left_out(study: Path, tmp_path: Path) -> None:
    uid = pydicom.dcmread(next((study / "t1c").iterdir())).SeriesInstanceUID
    words = ("predict", "-i", study, "-o", tmp_path / "seg.nii.gz", "--dry-run")
    (images,) = answer(*words, "--t1n", uid, "--t1ce", "3", "--t2f", "none")["would_make"].values()
    assert {name: called.split(" (")[0] for name, called in images.items()} == {
        "t1n": "series 7",
        "t1c": "series 3",
        "t2w": "series 4",
    }
    assert "12: is no series of this study; expected one of 3, 4, 5, 7" in fails(*words, "--t1n", "12")
    assert "is named as t1n and t1c; each sequence has a series of its own" in fails(*words, "--t1n", 3, "--t1c", 3)
    everything = [word for name in HEADERS for word in (f"--{name}", "none")]
    assert "study: no series that the model can use" in fails(*words, *everything)


def test_other_grids_are_refused_by_the_series_names(patient: Path, tmp_path: Path) -> None:
    image = nib.load(patient / f"{PATIENT}-t2f.nii.gz")
    voxels = np.asarray(image.dataobj)
    study = {"StudyInstanceUID": "1.2.3"}
    write_series(tmp_path / "s" / "a", voxels, image.affine, headers={**study, **HEADERS["t2f"]})
    other = np.asarray(nib.load(patient / f"{PATIENT}-t2w.nii.gz").dataobj)
    write_series(tmp_path / "s" / "b", other[:, :-4], image.affine, headers={**study, **HEADERS["t2w"]})
    words = ("predict", "-i", tmp_path / "s", "-o", tmp_path / "seg.nii.gz", "--device", "cpu", "--no-qc")
    said = fails(*words)
    assert "series 5 (t2_tirm_tra_dark-fluid) is 40×48×40 voxels, series 4 (AX T2 TSE) is 40×44×40 voxels" in said
    assert "medmap predict --resample" in said
    assert "dcm2niix -z y -o FOLDER STUDY" in said
    assert not (tmp_path / "seg.nii.gz").exists()
    done = call(*words, "--resample", "--dicom-seg")
    assert done.exit_code == 0, done.output
    assert "t2f was resampled onto the grid of series 4 (AX T2 TSE)" in done.stderr
    check_seg(tmp_path / "seg.dcm", tmp_path / "seg.nii.gz", tmp_path / "s" / "b")


def test_different_frames_of_reference_are_said(patient: Path, tmp_path: Path) -> None:
    image = nib.load(patient / f"{PATIENT}-t2f.nii.gz")
    for number, name in enumerate(("t2f", "t2w")):
        headers = {**HEADERS[name], "FrameOfReferenceUID": f"1.2.{number}"}
        write_series(tmp_path / "s" / name, np.asarray(image.dataobj), image.affine, headers=headers)
    done = call("predict", "-i", tmp_path / "s", "-o", tmp_path / "seg.nii.gz", "--dry-run")
    assert "have 2 frames of reference: right only where they are registered" in done.stderr


def test_missing_slices_leave_a_series_out_and_asking_for_it_fails(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study, tmp_path / "s")
    for number in (12, 13, 14):
        (tmp_path / "s" / "t2f" / f"IM{number:04d}.dcm").unlink()
    words = ("predict", "-i", tmp_path / "s", "-o", tmp_path / "seg.nii.gz", "--dry-run")
    said = works(*words)
    assert "slices are missing: 3 of 40, found 37 (a gap of 16.0 mm where slices are 4.0 mm apart)" in said
    assert "t2f" not in said.splitlines()[-2]
    assert "series 5 (t2_tirm_tra_dark-fluid) cannot be used: slices are missing: 3 of 40" in fails(*words, "--t2f", 5)


def test_a_zip_is_a_study(study: Path, tmp_path: Path) -> None:
    shutil.make_archive(str(tmp_path / "patient"), "zip", study)
    made = answer(
        "predict",
        "-i",
        tmp_path / "patient.zip",
        "-o",
        tmp_path / "seg.nii.gz",
        "--device",
        "cpu",
        "--no-qc",
        "--dicom-seg",
    )
    assert made["case"] == "patient"
    check_seg(tmp_path / "seg.dcm", tmp_path / "seg.nii.gz", study / "t1n")
    (tmp_path / "no.zip").write_bytes(b"no")
    assert "no.zip: cannot be unpacked" in fails("predict", "-i", tmp_path / "no.zip", "-o", tmp_path / "x.nii.gz")
    assert not (tmp_path / "x.nii.gz").exists()


def test_nothing_temporary_stays(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    works("predict", "-i", study, "-o", tmp_path / "seg.nii.gz", "--dry-run")
    fails("predict", "-i", study, "-o", tmp_path / "seg.nii.gz", "--t1n", "99")
    assert list((tmp_path / "tmp").iterdir()) == []


ENDED = """
import sys
from pathlib import Path
import dcm2niix
from medmap.cli.study import opened
dcm2niix.bin = sys.argv[2]
with opened(Path(sys.argv[1]), images=False) as found:
    found.file(found.study.series[0])
"""


def test_nothing_of_the_patient_stays_where_the_process_is_told_to_end(study: Path, tmp_path: Path) -> None:
    shutil.make_archive(str(tmp_path / "patient"), "zip", study)
    (tmp_path / "tmp").mkdir()
    slow = tmp_path / "dcm2niix"
    slow.write_text("#!/bin/sh\necho begun > $TMPDIR/../begun\nexec sleep 60\n")
    slow.chmod(0o755)
    argv = [sys.executable, "-c", ENDED, str(tmp_path / "patient.zip"), str(slow)]
    with subprocess.Popen(argv, env=os.environ | {"TMPDIR": str(tmp_path / "tmp")}) as process:
        end = time.monotonic() + 60
        while not (tmp_path / "begun").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        assert len([path for path in (tmp_path / "tmp").rglob("*") if path.is_file()]) == 200  # unpacked, and a copy
        process.terminate()
        assert process.wait(60) == 143
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_mask_in_the_folder_of_its_study_can_be_made_again(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study, tmp_path / "s")
    words = ("predict", "-i", tmp_path / "s", "-o", tmp_path / "s" / "seg.nii.gz", "--device", "cpu", "--no-qc")
    first = answer(*words, "--regions")
    again = answer(*words, "--regions")
    assert {key: first[key] for key in ("inputs", "volumes_ml")} == {
        key: again[key] for key in ("inputs", "volumes_ml")
    }
    assert f"{tmp_path / 's'}: DICOM study, 4 series" in works("check", tmp_path / "s")


def test_a_failing_dcm2niix_is_said_with_the_series(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dcm2niix

    monkeypatch.setattr(dcm2niix, "bin", shutil.which("false"))
    words = ("predict", "-i", study, "-o", tmp_path / "seg.nii.gz")
    assert "series 3 (t1_se_tra): dcm2niix cannot convert it (exit code 1" in fails(*words)
    monkeypatch.setattr(dcm2niix, "bin", "nowhere/dcm2niix")
    assert "dcm2niix cannot be run" in fails(*words)
    monkeypatch.setattr(dcm2niix, "bin", shutil.which("true"))
    assert "dcm2niix made 0 files of it, one volume is expected" in fails(*words)
    assert list(tmp_path.iterdir()) == []


def test_a_study_in_the_place_of_a_file_is_told_where_it_belongs(study: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "patient"), "zip", study)
    slice_ = next((study / "t2f").iterdir())
    for given, found, whole in (
        (archive, "a .zip file", archive),
        (slice_, "DICOM", slice_.parent),
        (study, "DICOM", study),
    ):
        said = fails("predict", "--t2f", given, "-o", tmp_path / "seg.nii.gz")
        assert f"{given}: found {found}; t2f must be one NIfTI file" in said
        assert f"medmap predict -i {whole} -o MASK" in said
        assert "download" not in said


# ---- options that do not go together -------------------------------------------------------------------------------


def test_a_seg_needs_dicom(tiny_phantoms: Path, patient: Path, tmp_path: Path) -> None:
    for words in (
        ("-i", tiny_phantoms, "-o", tmp_path),
        ("--t2f", patient / f"{PATIENT}-t2f.nii.gz", "-o", "x.nii.gz"),
    ):
        assert "needs the DICOM that the images come from" in fails("predict", *words, "--dicom-seg", code=2)


def test_a_study_is_one_patient(study: Path, tmp_path: Path) -> None:
    words = ("predict", "-i", study, "-o", tmp_path / "seg.nii.gz")
    assert "one patient is one task" in fails(*words, "--ray", code=2)
    assert "names the masks of a folder of cases" in fails(*words, "--bids", code=2)
    assert "is a folder; name the mask itself" in fails("predict", "-i", study, "-o", tmp_path)


def test_a_seg_never_takes_the_place_of_an_image(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study, tmp_path / "s")
    before = (tmp_path / "s" / "t1n" / "IM0001.dcm").read_bytes()
    words = ("predict", "-i", tmp_path / "s", "-o", tmp_path / "s" / "t1n" / "IM0001.nii.gz", "--dicom-seg")
    assert "IM0001.dcm itself; give the mask another name" in fails(*words)
    assert (tmp_path / "s" / "t1n" / "IM0001.dcm").read_bytes() == before


def test_without_the_extra_it_is_named(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medmap.cli.beforehand.find_spec", lambda name: None if name == "highdicom" else name)
    words = ("predict", "-i", study, "-o", tmp_path / "seg.nii.gz", "--dry-run")
    works(*words)
    assert "highdicom not installed; this part needs it: pip install 'medmap[dicom]'" in fails(*words, "--dicom-seg")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    assert "found no file at all" in fails("predict", "-i", tmp_path / "s", "-o", tmp_path / "out")


# ---- real scanners -------------------------------------------------------------------------------------------------


def test_what_real_scanners_sent_is_answered_with_a_reason(real_data: Path, tmp_path: Path) -> None:
    words = ("-o", tmp_path / "seg.nii.gz")
    said = fails("predict", "-i", real_data / "odd" / "dicom-papaya-pd", *words)
    assert "no series that the model can use; found series 2 (FSE PD AXIAL OBL) is pd" in said
    said = fails("predict", "-i", real_data / "odd" / "dicom-ge-epi", *words)
    assert "150 images lie at 15 places, about 10 at each: a series over time" in said
    done = call(
        "predict", "-i", real_data / "odd" / "dicom-papaya-pd", *words, "--t2w", 2, "--dicom-seg", "--device", "cpu"
    )
    assert done.exit_code == 0, done.output
    assert "not skull-stripped: t2w looks like a raw head" in done.stderr
    assert "the series as NIfTI files, to be worked on: dcm2niix" in done.stdout
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert seg.FrameOfReferenceUID == "0.0.0.0.4.8811.2.20010413115754.12432"
