from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", reason="DICOM needs pip install 'medmap[dicom]'")
pytest.importorskip("dcm2niix", reason="DICOM needs pip install 'medmap[dicom]'")

from made_up_dicom import HEADERS, write_enhanced, write_series  # noqa: E402
from pydicom.uid import JPEGLSLossless, RLELossless  # noqa: E402

from medmap.cli.app import explain  # noqa: E402
from medmap.data import dicom_convert, dicom_zip  # noqa: E402
from medmap.data.dicom import Study, is_study  # noqa: E402
from medmap.data.dicom_convert import convert, dicom_order  # noqa: E402
from medmap.data.dicom_guess import guess_all  # noqa: E402
from medmap.data.dicom_read import read_study  # noqa: E402
from medmap.data.dicom_zip import unpack  # noqa: E402
from medmap.data.nifti import read_volume  # noqa: E402
from medmap.errors import InputError  # noqa: E402

SHAPE = (9, 11, 12)


@pytest.fixture
def volume() -> np.ndarray:
    """Every voxel has a value of its own, below 4000, so that no turn goes unnoticed."""
    return np.arange(np.prod(SHAPE), dtype=np.float64).reshape(SHAPE)


def oblique(degrees: float = 20.0) -> np.ndarray:
    """A grid of 2 × 2 × 3 mm, turned about x and z."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    matrix = np.eye(4)
    matrix[:3, :3] = turn @ np.diag([2.0, 2.0, 3.0])
    matrix[:3, 3] = (-31.0, 12.5, 40.0)
    return matrix


STRAIGHT = np.diag([2.0, 2.0, 3.0, 1.0])


def only(study: Study) -> Any:
    (series,) = study.series
    return series


def test_without_the_extra_nobody_calls_good_files_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_series(tmp_path / "s", np.ones(SHAPE), STRAIGHT)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImportError) as told:
        read_study(tmp_path / "s")
    assert explain(told.value).endswith("pydicom is not installed; this part needs it: pip install 'medmap[dicom]'")


# ---- voxels and their places ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [STRAIGHT, oblique()], ids=["straight", "oblique"])
@pytest.mark.parametrize("plane", ["axial", "sagittal", "coronal"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_volume_comes_back_voxel_by_voxel_where_it_was(
    volume: np.ndarray, affine: np.ndarray, plane: str, reverse: bool, tmp_path: Path
) -> None:
    write_series(tmp_path / "s", volume, affine, plane=plane, reverse=reverse)
    series = only(read_study(tmp_path / "s"))
    assert series.fault == ""
    back, matrix = read_volume(convert(series, tmp_path))
    # each voxel of the file, looked up by its place in the patient
    places = np.indices(back.shape).reshape(3, -1)
    world = matrix[:3, :3] @ places + matrix[:3, 3:]
    x, y, z = np.linalg.inv(affine)[:3, :3] @ (world - affine[:3, 3:])
    assert max(np.abs(index - np.rint(index)).max() for index in (x, y, z)) < 1e-3
    expected = volume[tuple(np.rint(index).astype(int) for index in (x, y, z))]
    assert np.array_equal(back.ravel(), expected)
    # and the way back to slices, rows and columns of the files
    files = [pydicom.dcmread(frame.path).pixel_array for frame in series.frames]
    assert np.array_equal(dicom_order(series, back, matrix), np.stack(files))
    assert np.allclose(series.affine @ [0, 0, 0, 1], matrix @ corner(back, matrix, series), atol=1e-3)


def corner(back: np.ndarray, matrix: np.ndarray, series: Any) -> np.ndarray:
    """The voxel of the file that is nearest to the first pixel of the first slice."""
    index = np.linalg.inv(matrix) @ series.affine @ [0, 0, 0, 1]
    assert np.abs(index - np.rint(index)).max() < 1e-3
    return np.rint(index)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless], ids=["rle", "jpeg-ls"])
def test_compressed_images_give_the_same_voxels(volume: np.ndarray, syntax: Any, tmp_path: Path) -> None:
    write_series(tmp_path / "plain", volume, STRAIGHT)
    write_series(tmp_path / "packed", volume, STRAIGHT, syntax=syntax)
    plain, packed = (convert(only(read_study(tmp_path / name)), tmp_path / name) for name in ("plain", "packed"))
    assert np.array_equal(read_volume(plain)[0], read_volume(packed)[0])


def test_the_scale_of_the_header_is_applied(volume: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "s", volume, STRAIGHT, slope=0.5)
    back, _ = read_volume(convert(only(read_study(tmp_path / "s")), tmp_path))
    assert back.max() == pytest.approx(volume.max(), abs=0.5)


def test_one_file_of_many_frames_is_a_volume(volume: np.ndarray, tmp_path: Path) -> None:
    write_enhanced(tmp_path / "s" / "all", volume, oblique(), HEADERS["t2w"])
    series = only(read_study(tmp_path / "s"))
    assert (series.shape, series.fault, series.frames[0].index) == ((9, 11, 12), "", 11)  # the last frame lies lowest
    assert guess_all([series])[0].name == "t2w"
    back, matrix = read_volume(convert(series, tmp_path))
    frames = pydicom.dcmread(tmp_path / "s" / "all").pixel_array
    assert np.array_equal(dicom_order(series, back, matrix), frames[::-1])


def test_nothing_stays_behind(volume: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    write_series(tmp_path / "s", volume, STRAIGHT)
    convert(only(read_study(tmp_path / "s")), tmp_path)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_slices_are_shown_to_dcm2niix_in_the_folder_that_the_caller_removes(
    volume: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_series(tmp_path / "s", volume, STRAIGHT)
    shown: list[Path] = []
    monkeypatch.setattr(dicom_convert, "_run", lambda series, given, made: shown.append(given) or "nothing")
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="dcm2niix made 0 files of it"):
        convert(only(read_study(tmp_path / "s")), tmp_path / "mine")
    assert shown[0].is_relative_to(tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []


# ---- what a study holds --------------------------------------------------------------------------------------------


def test_files_need_no_ending_and_folders_no_order(volume: np.ndarray, tmp_path: Path) -> None:
    uid = write_series(tmp_path / "a" / "b", volume, STRAIGHT, suffix="", headers=HEADERS["t1n"])
    half = sorted((tmp_path / "a" / "b").iterdir())[::2]
    (tmp_path / "c").mkdir()
    for path in half:
        path.rename(tmp_path / "c" / path.name)
    (tmp_path / "readme.txt").write_text("not an image")
    assert is_study(tmp_path)
    series = only(read_study(tmp_path))
    assert (series.uid, series.number, series.shape, series.fault) == (uid, 3, SHAPE, "")


def test_a_study_may_be_a_folder_of_links(volume: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "far" / "a", volume, STRAIGHT, headers=HEADERS["t1n"])
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "a").symlink_to(tmp_path / "far" / "a")
    (tmp_path / "near" / "circle").symlink_to(tmp_path / "near")
    assert is_study(tmp_path / "near")
    assert only(read_study(tmp_path / "near")).shape == SHAPE


def test_files_of_old_scanners_begin_without_the_letters(volume: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "s", volume, STRAIGHT)
    for path in (tmp_path / "s").iterdir():
        dataset = pydicom.dcmread(path)
        bare = pydicom.Dataset(dataset)
        bare.save_as(path, implicit_vr=True, little_endian=True)
        assert path.read_bytes()[128:132] != b"DICM"
    assert is_study(tmp_path)
    series = only(read_study(tmp_path))
    assert (series.shape, series.fault) == (SHAPE, "")
    back, matrix = read_volume(convert(series, tmp_path))
    bytes_ = pydicom.dcmread(series.frames[0].path, force=True).PixelData
    assert np.array_equal(dicom_order(series, back, matrix)[0].ravel(), np.frombuffer(bytes_, "<u2"))


def test_reports_in_a_study_are_rows_with_a_reason(volume: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "s", volume, STRAIGHT, headers=HEADERS["t1n"])
    report = pydicom.dcmread(tmp_path / "s" / "IM0001.dcm")
    for keyword in ("Rows", "Columns", "PixelData", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(report, keyword)
    report.SOPInstanceUID, report.SeriesInstanceUID, report.Modality = "1.2.8", "1.2.9", "SR"
    report.save_as(tmp_path / "report.dcm")
    study = read_study(tmp_path)
    assert sorted(series.fault for series in study.series) == ["", "it holds no images (SR)"]
    assert {guess.name for guess in guess_all(study.series)} == {"t1n"}


def test_a_folder_with_nifti_is_no_study(volume: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "dicom", volume, STRAIGHT)
    nib.save(nib.Nifti1Image(volume, STRAIGHT), tmp_path / "a.nii.gz")
    assert not is_study(tmp_path)
    assert not is_study(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("record", ["explanation.json", "a.medmap.json"])
def test_what_medmap_wrote_into_a_study_does_not_count(record: str, volume: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "dicom", volume, STRAIGHT)
    image = nib.Nifti1Image(volume, STRAIGHT)
    (tmp_path / "made").mkdir()
    for name in ("a.nii.gz", "a-WT.nii.gz"):
        nib.save(image, tmp_path / "made" / name)
        assert not is_study(tmp_path)
    (tmp_path / "made" / record).write_text('{"volumes_ml": {"WT": 3.0}}', encoding="utf-8")
    assert is_study(tmp_path)
    nib.save(image, tmp_path / "a-t1n.nii.gz")  # not of that folder
    assert not is_study(tmp_path)


@pytest.mark.parametrize("record", ['{"volumes_ml": {"WT": 3.0}}', "[1]", '{"volumes_ml": 3}', "{", "", None])
def test_an_image_beside_a_mask_of_its_name_counts(record: str | None, volume: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "dicom", volume, STRAIGHT)
    nib.save(nib.Nifti1Image(volume, STRAIGHT), tmp_path / "ann-t1n.nii.gz")
    if record is not None:
        (tmp_path / "ann.medmap.json").write_text(record, encoding="utf-8")
    assert not is_study(tmp_path)


def test_copies_are_left_out_with_a_note(volume: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "s", volume, STRAIGHT)
    for path in list((tmp_path / "s").iterdir()):
        (tmp_path / "s" / f"copy-{path.name}").write_bytes(path.read_bytes())
    study = read_study(tmp_path)
    assert (only(study).fault, only(study).shape[2]) == ("", 12)
    assert study.notes == ("12 files are copies of others (one SOPInstanceUID) and left out",)


def test_echoes_of_one_series_are_volumes_of_their_own(volume: np.ndarray, tmp_path: Path) -> None:
    headers = {"SeriesNumber": 2, "SeriesDescription": "PD/T2", "SeriesInstanceUID": "1.2.9", "RepetitionTime": 3000.0}
    for echo, te in ((1, 15.0), (2, 105.0)):
        write_series(tmp_path / str(echo), volume, STRAIGHT, headers={**headers, "EchoTime": te, "EchoNumbers": echo})
    study = read_study(tmp_path)
    assert [(s.label, s.headers["EchoTime"], s.fault) for s in study.series] == [("2a", 15.0, ""), ("2b", 105.0, "")]
    assert study.find("2B") is study.series[1]
    with pytest.raises(InputError, match="2: is no series of this study; expected one of 2a, 2b"):
        study.find("2")


def test_orientations_of_one_series_are_volumes_of_their_own(volume: np.ndarray, tmp_path: Path) -> None:
    for plane in ("axial", "sagittal", "coronal"):
        write_series(tmp_path / plane, volume, STRAIGHT, plane=plane, headers={"SeriesInstanceUID": "1.2.9"})
    assert sorted(series.shape for series in read_study(tmp_path).series) == [(9, 11, 12), (9, 12, 11), (11, 12, 9)]


def test_two_points_in_time_are_told_apart_and_many_are_one_series_over_time(
    volume: np.ndarray, tmp_path: Path
) -> None:
    for number in range(6):
        headers = {"SeriesInstanceUID": "1.2.9", "SeriesNumber": 8, "TemporalPositionIdentifier": number}
        write_series(tmp_path / f"{number}", volume, STRAIGHT, headers=headers)
        if number == 1:
            assert [(s.label, s.fault) for s in read_study(tmp_path).series] == [("8a", ""), ("8b", "")]
    assert only(read_study(tmp_path)).fault == "72 images lie at 12 places, about 6 at each: a series over time"


def test_missing_slices_are_counted(volume: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "s", volume, STRAIGHT, skip=(4, 5, 8))
    study = read_study(tmp_path)
    assert only(study).fault == ("slices are missing: 3 of 12, found 9 (a gap of 9.0 mm where slices are 3.0 mm apart)")
    with pytest.raises(InputError, match=r"series 0 cannot be used: slices are missing: 3 of 12.*name another series"):
        study.find("0")


def test_a_file_that_was_cut_off_spoils_its_series(volume: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "s", volume, STRAIGHT)
    path = tmp_path / "s" / "IM0005.dcm"
    path.write_bytes(path.read_bytes()[:-150])
    fault = only(read_study(tmp_path)).fault
    assert fault.startswith("IM0005.dcm is cut off")


def test_damaged_headers_are_answered_by_a_fault_or_an_error(volume: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "s", volume, STRAIGHT, headers=HEADERS["t2f"])
    files = sorted((tmp_path / "s").iterdir())
    whole = [path.read_bytes() for path in files]
    generator = np.random.default_rng(0)
    met = set()
    for _ in range(30):
        for path, content in zip(files, whole, strict=True):
            damaged = bytearray(content)
            for place in generator.integers(132, len(content) - 300, size=generator.integers(0, 3)):
                damaged[place] = generator.integers(0, 256)
            path.write_bytes(damaged)
        try:
            study = read_study(tmp_path / "s")
            met |= {bool(series.fault) for series in study.series}
            assert len(guess_all(study.series)) == len(study.series)
        except InputError:
            met.add(None)
    assert met >= {True, None}


def test_signs_that_a_terminal_obeys_are_left_out(volume: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "s", volume, STRAIGHT, headers={"SeriesDescription": "t1\x1b[2J"})
    assert only(read_study(tmp_path)).name == "series 0 (t1[2J)"


def test_broken_files_are_said(volume: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "s", volume, STRAIGHT)
    (tmp_path / "s" / "bad.dcm").write_bytes(bytes(128) + b"DICM" + b"\xff" * 40)
    study = read_study(tmp_path)
    assert only(study).fault == ""
    assert len(study.notes) == 1
    assert study.notes[0].startswith("s/bad.dcm: cannot be read as DICOM")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "bad.dcm").write_bytes(bytes(128) + b"DICM" + b"\xff" * 40)
    with pytest.raises(InputError, match=r"found no image of DICOM; bad\.dcm: cannot be read as DICOM"):
        read_study(tmp_path / "t")


@pytest.mark.parametrize(
    ("headers", "what"),
    [
        ({"PatientID": "P-2"}, "2 patients"),
        ({"PatientName": "B"}, "2 patients"),
        ({"StudyInstanceUID": "9.9"}, "2 studies"),
    ],
)
def test_two_patients_or_studies_are_refused_without_naming_them(
    volume: np.ndarray, headers: dict[str, str], what: str, tmp_path: Path
) -> None:
    write_series(tmp_path / "a", volume, STRAIGHT)
    write_series(tmp_path / "b", volume, STRAIGHT, headers=headers)
    with pytest.raises(InputError, match=rf"holds files of {what} .*a.IM0001\.dcm and 11 more, b.IM0001") as caught:
        read_study(tmp_path)
    assert "P-1" not in str(caught.value)
    assert "Ada" not in str(caught.value)


@pytest.mark.parametrize(
    ("headers", "fault"),
    [({"Modality": "CT"}, "its modality is CT, expected MR"), ({"SamplesPerPixel": 3}, "in colour")],
)
def test_what_is_no_mr_volume_is_a_row_with_a_reason(
    volume: np.ndarray, headers: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    write_series(tmp_path / "s", volume, STRAIGHT)
    for path in (tmp_path / "s").iterdir():
        dataset = pydicom.dcmread(path)
        for keyword, value in headers.items():
            setattr(dataset, keyword, value)
        dataset.save_as(path)
    assert fault in only(read_study(tmp_path)).fault


def test_pictures_without_a_place_are_set_aside(volume: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "s", volume, STRAIGHT)
    for path in (tmp_path / "s").iterdir():
        dataset = pydicom.dcmread(path)
        del dataset.ImagePositionPatient
        dataset.save_as(path)
    assert "does not say where its pixels lie" in only(read_study(tmp_path)).fault


def test_uneven_slices_and_leaning_stacks_are_refused(volume: np.ndarray, tmp_path: Path) -> None:
    for name, shift in (("uneven", (0.0, 0.0, 0.4)), ("leaning", (0.0, 3.0, 0.0))):
        write_series(tmp_path / name, volume, STRAIGHT)
        for i, path in enumerate(sorted((tmp_path / name).iterdir())):
            dataset = pydicom.dcmread(path)
            part = i if name == "leaning" else i % 2
            moved = [float(a) + part * b for a, b in zip(dataset.ImagePositionPatient, shift, strict=True)]
            dataset.ImagePositionPatient = [f"{number:.6f}" for number in moved]
            dataset.save_as(path)
    assert "unevenly, 2.60 to 3.40 mm apart" in only(read_study(tmp_path / "uneven")).fault
    assert "not stacked at right angles" in only(read_study(tmp_path / "leaning")).fault


# ---- zip files -----------------------------------------------------------------------------------------------------


def zipped(file: Path, *members: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file


DICOM = bytes(128) + b"DICM"


def test_a_zip_gives_its_dicom_files_and_nothing_else(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "s.zip", ("a/x", DICOM), ("b/x", DICOM + b"2"), ("run.sh", b"echo"), ("c/.y", DICOM))
    (tmp_path / "out").mkdir()
    unpack(archive, tmp_path / "out")
    assert [p.name for p in sorted((tmp_path / "out").iterdir())] == ["000000-x", "000001-x", "000003-y"]
    assert (tmp_path / "out" / "000001-x").read_bytes() == DICOM + b"2"


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "C:\\x", "..\\x"])
def test_a_zip_that_reaches_out_of_itself_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="names a place outside of itself"):
        unpack(zipped(tmp_path / "s.zip", ("good", DICOM), (name, DICOM)), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_zip_that_grows_without_measure_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    archive = zipped(tmp_path / "s.zip", ("x", DICOM + bytes(3 * 2**20)))
    unpack(archive, tmp_path / "out")  # so little is let pass
    monkeypatch.setattr(dicom_zip, "_FREE_BYTES", 2**20)
    with pytest.raises(InputError, match="unpacks to far more than its size"):
        unpack(archive, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"not a zip", "cannot be unpacked"), (b"", "cannot be unpacked"), (None, "no DICOM among them")],
)
def test_other_zips_are_refused(content: bytes | None, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "s.zip"
    zipped(file, ("a.txt", b"text")) if content is None else file.write_bytes(content)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=reason):
        unpack(file, tmp_path / "out")


@pytest.mark.parametrize("packed", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_broken_members_are_refused_however_they_are_packed(packed: int, tmp_path: Path) -> None:
    content = DICOM + np.random.default_rng(0).bytes(1000)
    file = tmp_path / "s.zip"
    with zipfile.ZipFile(file, "w", packed) as archive:
        archive.writestr("x", content)
    start = 30 + len("x")  # a local header, and the name
    damaged = bytearray(file.read_bytes())
    damaged[start + 9 : start + 400] = b"\xff" * 391  # behind the properties of LZMA
    file.write_bytes(damaged)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"s.zip: (cannot be unpacked|found 1 files and no DICOM)"):
        unpack(file, tmp_path / "out")


def test_lzma_that_asks_for_what_there_is_not_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "s.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x", DICOM)
    damaged = bytearray(file.read_bytes())
    damaged[31 + 4] = 0xFF  # lc, lp and pb
    file.write_bytes(damaged)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"s.zip: cannot be unpacked \(Invalid or unsupported options\)"):
        unpack(file, tmp_path / "out")


@pytest.mark.parametrize("name", [b"\xff\xff", b"\x00a"])
def test_names_that_are_none_are_refused(name: bytes, tmp_path: Path) -> None:
    file = zipped(tmp_path / "s.zip", ("ü", DICOM))
    file.write_bytes(file.read_bytes().replace("ü".encode(), name))
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"s.zip: cannot be unpacked"):
        unpack(file, tmp_path / "out")


# ---- real scanners -------------------------------------------------------------------------------------------------


def test_a_proton_density_series_of_a_scanner(real_data: Path) -> None:
    series = only(read_study(real_data / "odd" / "dicom-papaya-pd"))
    assert (series.shape, series.fault, guess_all([series])[0].name) == ((256, 256, 19), "", "pd")


def test_a_functional_series_of_a_scanner(real_data: Path, tmp_path: Path) -> None:
    series = only(read_study(real_data / "odd" / "dicom-ge-epi"))
    assert series.fault == "150 images lie at 15 places, about 10 at each: a series over time"
    assert guess_all([series])[0].name == "other"
