"""One broken data set a fault: each is found, named, graded and comes with its cure; whole data sets have none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import made_up_trees as trees
import nibabel as nib
import numpy as np
import pytest
from made_up_trees import AFFINE, FOUR, case_2021, case_2023, image, labels, save

from medmap.data.check import CheckReport, Fault, check, render
from medmap.data.faults import SEVERITY

CASE = "BraTS-SSA-00002-000"


def file(root: Path, name: str) -> Path:
    return root / CASE / f"{CASE}-{name}.nii.gz"


def missing(root: Path) -> None:
    file(root, "t1c").unlink()


def no_labels(root: Path) -> None:
    case_2023(root, "BraTS-SSA-00003-000", codes=None)


def grid(root: Path) -> None:
    save(file(root, "t2w"), image("w")[:, :, 1:])


def affine(root: Path) -> None:
    moved = AFFINE.copy()
    moved[1, 3] += 0.25
    save(file(root, "t2f"), image("f"), moved)


def label_grid(root: Path) -> None:
    save(file(root, "seg"), labels((1, 2, 3))[1:])


def nan(root: Path) -> None:
    volume = image("n")
    volume[2, 2, 2:4] = np.nan, np.inf
    save(file(root, "t1n"), volume)


def empty(root: Path) -> None:
    save(file(root, "t1n"), np.zeros((8, 8, 8), np.int16))


def constant(root: Path) -> None:
    save(file(root, "t1n"), np.full((8, 8, 8), 7, np.int16))


def label(root: Path) -> None:
    save(file(root, "seg"), labels((1, 2, 4)))


def fraction(root: Path) -> None:
    save(file(root, "seg"), labels((1, 2, 3)) * np.float32(0.5))


def no_tumour(root: Path) -> None:
    save(file(root, "seg"), labels(()))


def duplicate(root: Path) -> None:
    file(root, "t1c").write_bytes(file(root, "t1n").read_bytes())


def duplicate_voxels(root: Path) -> None:
    save(file(root, "t1c"), image(CASE + "t1n").astype(np.float64))


def other_patient(root: Path) -> None:
    case_2023(root, "BraTS-SSA-00009-000", has=("t2w",))
    target = root / "BraTS-SSA-00009-000" / "BraTS-SSA-00009-000-t2w.nii.gz"
    target.write_bytes(file(root, "t2w").read_bytes())


def same_patient(root: Path) -> None:
    case_2023(root, "BraTS-SSA-00002-001", has=FOUR)
    target = root / "BraTS-SSA-00002-001" / "BraTS-SSA-00002-001-t2w.nii.gz"
    target.write_bytes(file(root, "t2w").read_bytes())


def damaged(root: Path) -> None:
    noise = np.random.default_rng(0).normal(size=(16, 16, 16)).astype(np.float32)
    path = save(file(root, "t2w"), noise)
    path.write_bytes(path.read_bytes()[:-4000])


def text(root: Path) -> None:
    file(root, "t2w").write_text("not an image")


def four_d(root: Path) -> None:
    save(file(root, "t2w"), np.stack([image("w")] * 3, axis=-1))


def raw_noise(root: Path) -> None:
    save(file(root, "t2f"), np.random.default_rng(0).uniform(1, 9, (8, 8, 8)).astype(np.float32))


def raw_size(root: Path) -> None:
    large(root, 9.0)  # 4096 voxels: 3 litres that are not 0


def large(root: Path, edge_mm: float, fold: int = 4) -> None:
    """A case of cubic voxels, so many times as many along each axis."""
    for name in (*FOUR, "seg"):
        volume = labels((1, 2, 3)) if name == "seg" else image(CASE + name)
        save(file(root, name), np.kron(volume, np.ones((fold,) * 3, volume.dtype)), np.diag([*[edge_mm] * 3, 1.0]))


def part_of_a_brain(root: Path) -> None:
    large(root, 1.0, 7)  # 21,952 voxels


def metres(root: Path) -> None:
    save(file(root, "t2w"), image("w"), np.diag([0.001, 0.001, 0.001, 1.0]))


def unit(root: Path) -> None:
    picture = nib.Nifti1Image(image("w"), AFFINE)
    picture.header.set_xyzt_units("micron")
    nib.save(picture, file(root, "t2w"))


def mask(root: Path) -> None:
    save(file(root, "t1n"), (image("n") != 0) * np.float32(40))


def background(root: Path) -> None:
    save(file(root, "t2f"), image("f") - 3)


def orientation(root: Path) -> None:
    for name in (*FOUR, "seg"):
        path = file(root, name)
        volume = np.asanyarray(nib.load(path).dataobj)
        picture = nib.Nifti1Image(volume, None)
        nib.save(picture, path)


def forms(root: Path) -> None:
    path = root / CASE / f"{CASE}-t2w.nii.gz"
    picture = nib.load(path)
    moved = picture.affine.copy()
    moved[1, 3] += 2
    picture.header.set_qform(moved, code=1)
    picture.header.set_sform(picture.affine, code=1)
    nib.save(nib.Nifti1Image(np.asanyarray(picture.dataobj), None, picture.header), path)


def undecided(root: Path) -> None:
    case_2023(root, "hospital-7", codes=(2, 4))


FAULTS: dict[str, tuple[Callable[[Path], None], bool, str, str, str]] = {
    "missing": (missing, False, "missing", "t1c missing", "missing sequences are allowed"),
    "no labels": (no_labels, False, "no-labels", "no segmentation", "nothing to do for prediction"),
    "grid": (grid, False, "grid", f"{CASE}-t2w.nii.gz is 8×8×7 voxels, {CASE}-t1n.nii.gz is 8×8×8", "--resample"),
    "affine": (
        affine,
        False,
        "affine",
        f"{CASE}-t1n.nii.gz and {CASE}-t2f.nii.gz differ by up to 0.25 mm",
        "--resample",
    ),
    "label grid": (label_grid, False, "grid", f"{CASE}-seg.nii.gz is 7×8×8 voxels", "--resample"),
    "nan": (nan, True, "nan", f"{CASE}-t1n.nii.gz: 2 voxels are NaN or infinite", "set them to 0"),
    "empty": (empty, True, "constant", f"{CASE}-t1n.nii.gz: empty, every voxel is 0", "remove the file"),
    "constant": (constant, True, "constant", f"{CASE}-t1n.nii.gz: constant, every voxel is 7", "remove the file"),
    "mask": (mask, True, "constant", "t1n.nii.gz: constant inside the brain, every voxel is 0 or 40", "its own file"),
    "label": (
        label,
        True,
        "label",
        "label 4 (1 voxel) is outside the map brats2023 (1 = ncr, 2 = ed, 3 = et)",
        "--labels",
    ),
    "fraction": (fraction, True, "unreadable", "2 voxels are not whole numbers", "nearest-neighbour"),
    "no tumour": (no_tumour, True, "empty-labels", f"{CASE}-seg.nii.gz: marks nothing", "if there is no tumour"),
    "duplicate": (duplicate, False, "duplicate", "t1n and t1c are one image under two names", "which name is right"),
    "duplicate voxels": (duplicate_voxels, True, "duplicate", "t1n and t1c are one image", "which name is right"),
    "two patients": (
        other_patient,
        False,
        "duplicate",
        "the same image as in BraTS-SSA-00002-000: t2w",
        "remove one of the two",
    ),
    "one patient": (same_patient, False, "same-patient", "the same image as in", "both are patient BraTS-SSA-00002"),
    "cut off": (damaged, False, "unreadable", f"{CASE}-t2w.nii.gz: cut off", "copy or download it again"),
    "text": (text, False, "unreadable", f"{CASE}-t2w.nii.gz: named .gz but", "copy or download it again"),
    "4-D": (four_d, False, "four-d", "4-D (8×8×8×3), a 3-D volume is expected", "split it"),
    "raw, noise": (raw_noise, True, "raw", "not skull-stripped: t2f looks like a raw head", "hd-bet -i IN -o OUT"),
    "raw, size": (raw_size, True, "raw", "t1n, t1c, t2w, t2f look like raw heads", "mri_synthstrip"),
    "metres": (metres, False, "units", "t2w.nii.gz: voxels of 0.001×0.001×0.001 mm, 0.2 to 10 mm", "fslchpixdim"),
    "unit": (unit, False, "units", "t2w.nii.gz: the header counts in microns (voxels of 1×1×2)", "fslchpixdim"),
    "small": (part_of_a_brain, True, "small", "only 22 ml of t1n, t1c, t2w, t2f are not 0", "fslchpixdim FILE X Y Z"),
    "background": (background, True, "background", "the background is -3, 0 is expected", "set the background to 0"),
    "orientation": (orientation, False, "orientation", "neither qform nor sform is set", "export it again"),
    "forms": (forms, False, "forms", "qform and sform disagree by 2 mm; medmap uses the sform", "which is right"),
    "undecided": (
        undecided,
        False,
        "undecided",
        "the label map of 1 segmentation is undecided",
        "--labels brats2023 or",
    ),
}


def found(report: CheckReport, kind: str) -> list[Fault]:
    return [fault for fault in report.faults if fault.kind == kind]


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found_graded_and_cured(name: str, tmp_path: Path) -> None:
    spoil, deep, kind, what, cure = FAULTS[name]
    case_2023(tmp_path, CASE)
    spoil(tmp_path)
    report = check(tmp_path, deep=deep)
    fault = found(report, kind)[0]
    assert what in fault.what
    assert cure in fault.cure
    assert fault.severity == SEVERITY[kind]
    assert {other.kind for other in report.faults if other.severity != "note"} <= {kind}
    assert report.exit_code == int(fault.severity == "error")
    (line,) = [line for line in render(report).splitlines() if fault.what in line][:1]
    assert fault.cure in line


@pytest.mark.parametrize("name", [name for name, (_, deep, *_) in FAULTS.items() if deep])
def test_what_needs_voxels_is_not_claimed_from_headers(name: str, tmp_path: Path) -> None:
    spoil, _, kind, *_ = FAULTS[name]
    case_2023(tmp_path, CASE)
    spoil(tmp_path)
    assert found(check(tmp_path), kind) == []


def test_every_kind_of_fault_has_a_test() -> None:
    assert {kind for _, _, kind, _, _ in FAULTS.values()} == set(SEVERITY)


def test_deep_reading_finds_what_headers_find(tmp_path: Path) -> None:
    case_2023(tmp_path, CASE)
    duplicate(tmp_path)
    affine(tmp_path)
    kinds = {fault.kind for fault in check(tmp_path, deep=True).faults}
    assert kinds == {"duplicate", "affine"}


@pytest.mark.parametrize(
    "build", [trees.brats2021, trees.brats2023, trees.brats2024, trees.msd, trees.nnunet, trees.phantom]
)
@pytest.mark.parametrize("deep", [False, True])
def test_whole_data_sets_have_no_fault(build: Callable[[Path], None], deep: bool, tmp_path: Path) -> None:
    build(tmp_path)
    report = check(tmp_path, deep=deep)
    assert {fault.kind for fault in report.faults} <= {"missing"}
    assert report.exit_code == 0
    assert report.unusable == ()
    assert "Ready: all 2 cases can be used." in render(report)


def test_copies_are_counted_once_each(tmp_path: Path) -> None:
    for number in range(4):
        case_2023(tmp_path, f"BraTS-SSA-{number:05d}-000", has=("t1n", "t2f"))
        for name, seed in (("t1n", "same"), ("t2f", "same too")):
            place = tmp_path / f"BraTS-SSA-{number:05d}-000" / f"BraTS-SSA-{number:05d}-000-{name}.nii.gz"
            save(place, image(seed))
    faults = found(check(tmp_path, deep=True), "duplicate")
    assert [fault.case for fault in faults] == [f"BraTS-SSA-{number:05d}-000" for number in (1, 2, 3)]
    assert {fault.what for fault in faults} == {"the same image as in BraTS-SSA-00000-000: t1n, t2f"}


def test_channels_that_the_4d_file_does_not_hold(tmp_path: Path) -> None:
    trees.msd(tmp_path)
    save(tmp_path / "imagesTr" / "BRATS_001.nii.gz", np.stack([image("a"), image("b")], axis=-1))
    faults = found(check(tmp_path), "four-d")
    assert [fault.what for fault in faults] == [
        "BRATS_001.nii.gz: t1c would be volume 3, the file holds 2",
        "BRATS_001.nii.gz: t2w would be volume 4, the file holds 2",
    ]


def test_a_file_that_a_table_promises_is_not_there(tmp_path: Path) -> None:
    trees.table(tmp_path)
    (tmp_path / "scans" / "b.nii.gz").unlink()
    (fault,) = found(check(tmp_path / "cases.csv", labels="brats2021"), "unreadable")
    assert (fault.case, fault.what, fault.cure) == ("B", "b.nii.gz: no such file", "check the path")


def test_the_text_that_a_stranger_reads(tmp_path: Path) -> None:
    case_2021(tmp_path, "BraTS2021_00000")
    case_2021(tmp_path, "BraTS2021_00002", has=("t1n", "t1c", "t2f"))
    assert (
        render(check(tmp_path, deep=True))
        == f"""{tmp_path}
  layout     BraTS 2018–2021 (ID/ID_t1ce.nii.gz)
  label map  brats2021: 1 = ncr, 2 = ed, 4 = et  (WT = 1+2+4, TC = 1+4, ET = 4)
  evidence   ids of BraTS 2021, file names _t1 _t1ce _t2 _flair (2018–2021)
  found      label 1 in 2, 2 in 2, 4 in 2 of 2 segmentations
  cases      2
  groups     BraTS2021 2

Who has what
  t1n   t1c   t2w   t2f   seg    cases
   •     •     •     •     •         1
   •     •     –     •     •         1

Grids
  voxels  mm     stored  type     images
  8×8×8   1×1×2  LPS     float32  7

1 note
  note     BraTS2021_00002: t2w missing; nothing to do: missing sequences are allowed

Ready: all 2 cases can be used.
"""
    )


def test_notes_that_are_alike_are_counted_not_repeated(tmp_path: Path) -> None:
    for number in range(15):
        case_2023(tmp_path, f"BraTS-SSA-{number:05d}-000", has=("t2f",))
    report = check(tmp_path)
    assert len(report.faults) == 15
    text = render(report)
    assert text.count("t1n, t1c, t2w missing; nothing") == 12
    assert "t1n, t1c, t2w missing: 3 more cases (all of them with --json)" in text


def test_json_holds_the_same_as_the_text(tmp_path: Path) -> None:
    trees.bids(tmp_path)
    data = json.loads(json.dumps(check(tmp_path, deep=True).to_dict()))
    assert data["layout"]["family"] == "bids"
    assert data["labels"]["scheme"]["name"] == "brats2021"
    assert data["labels"]["codes_found"] == {"1": 2, "2": 2, "4": 2}
    assert data["who_has_what"] == [{"has": [*FOUR, "seg"], "cases": 1}, {"has": ["t2f", "seg"], "cases": 1}]
    assert data["grids"] == [
        {"shape": [8, 8, 8], "spacing_mm": [1.0, 1.0, 2.0], "stored": "LPS", "dtype": "float32", "images": 5}
    ]
    assert [(fault["case"], fault["kind"]) for fault in data["faults"]] == [("sub-02", "missing")]
    assert data["cases"][1]["images"] == {"t2f": {"file": "sub-02/anat/sub-02_FLAIR.nii.gz", "channel": None}}
    assert (data["exit_code"], data["deep"]) == (0, True)


def test_progress_is_told_case_by_case(tmp_path: Path) -> None:
    trees.brats2021(tmp_path)
    calls: list[tuple[int, int]] = []
    check(tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)]


def test_checking_imports_nothing_heavy() -> None:
    code = "import sys, medmap.data.check; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "monai", "scipy.ndimage", "matplotlib", "pydantic", "rich"} & set(done.stdout.split()) == set()


# ---- real scans -------------------------------------------------------------------------------------------------


def test_real_collections_are_ready(real_data: Path) -> None:
    for name, cases in (("ssa-2mm", 24), ("brats2021-2mm", 8)):
        report = check(real_data / name)
        assert (report.exit_code, report.faults) == (0, ())
        assert report.who_has_what == (((*FOUR, "seg"), cases),)


def test_real_originals_of_three_families(real_data: Path) -> None:
    report = check(real_data / "original")
    assert report.exit_code == 0
    assert [(fault.case, fault.kind) for fault in report.faults] == [("TCGA-FG-6692", "no-labels")]
    assert {case.id: case.scheme and case.scheme.name for case in report.folder.cases} == {
        "BraTS-SSA-00041-000": "brats2023",
        "BraTS2021_00006": "brats2021",
        "TCGA-FG-6692": None,
    }


def test_real_scans_on_four_grids_are_refused_with_the_cure(real_data: Path) -> None:
    report = check(real_data / "odd" / "TCGA-DU-7294-native")
    assert report.exit_code == 1
    assert [fault.kind for fault in report.faults] == ["grid", "grid"]
    assert "--resample" in report.faults[0].cure
    assert "antsRegistrationSyN.sh" in report.faults[0].cure


def test_real_raw_heads_are_recognised(real_data: Path) -> None:
    report = check(real_data / "odd" / "LJUBLJANA-MS-raw-patient01-study1", deep=True)
    (raw,) = found(report, "raw")
    assert raw.what == "not skull-stripped: t1n, t2w, t2f look like raw heads"
    assert [fault.what for fault in found(report, "missing")] == ["t1c missing"]


def test_real_brains_are_not_taken_for_heads(real_data: Path) -> None:
    report = check(real_data / "ssa-2mm" / "BraTS-SSA-00116-000", deep=True)  # the largest brain at hand
    assert report.faults == ()


@pytest.mark.parametrize(("scale", "kinds"), [(0.1, {"small"}), (0.001, {"units"}), (1000.0, {"units"})])
def test_real_brains_in_another_unit(scale: float, kinds: set[str], real_data: Path, tmp_path: Path) -> None:
    """Tenths of a mm, metres and microns, which the header does not name."""
    case = "BraTS2021_00002"
    for path in (real_data / "brats2021-2mm" / case).glob("*_*[12er].nii.gz"):
        picture = nib.load(path)
        affine = np.diag([scale, scale, scale, 1.0]) @ picture.affine
        save(tmp_path / case / path.name, np.asanyarray(picture.dataobj), affine)
    report = check(tmp_path, deep=True)
    assert {fault.kind for fault in report.faults if fault.severity != "note"} == kinds
