"""Which file is which sequence of whom, and which label map: every layout, and what must not be guessed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import made_up_trees as trees
import numpy as np
import pytest
from made_up_trees import FOUR, case_2021, case_2023, image, labels, save

from medmap.core.labels import SCHEMES
from medmap.data.folders import files_below
from medmap.data.layouts import FAMILIES, LAYOUTS, read_case, recognise
from medmap.errors import InputError


def test_names_that_are_not_utf8_are_refused_at_once(tmp_path: Path) -> None:
    for name in ("t2w", "flair"):
        save(Path(os.fsdecode(os.fsencode(tmp_path) + b"/M\xfcller_" + name.encode() + b".nii.gz")), image(name))
    with pytest.raises(InputError, match=r"M\\xfcller_\S+: the name is not in UTF-8.*convmv -f latin1 -t utf8"):
        recognise(tmp_path)


@dataclass(frozen=True)
class Expected:
    """What a made-up tree must be recognised as."""

    build: Callable[[Path], None]
    layout: str
    family: str
    scheme: str | None
    who: dict[str, tuple[str, ...]]
    patients: int = 2


EXPECTED = {
    "brats2018": Expected(
        trees.brats2018,
        "brats",
        "brats2021",
        "brats2021",
        {"Brats18_CBICA_AAB_1": (*FOUR, "seg"), "Brats18_TCIA10_109_1": ("t1n", "t2f", "seg")},
    ),
    "brats2020": Expected(
        trees.brats2020,
        "brats",
        "brats2021",
        "brats2021",
        {"BraTS20_Training_001": (*FOUR, "seg"), "BraTS20_Training_355": (*FOUR, "seg")},
    ),
    "brats2021": Expected(
        trees.brats2021,
        "brats",
        "brats2021",
        "brats2021",
        {"BraTS2021_00000": (*FOUR, "seg"), "BraTS2021_00002": ("t1n", "t1c", "t2f", "seg")},
    ),
    "brats2023": Expected(
        trees.brats2023,
        "brats",
        "brats2023",
        "brats2023",
        {"BraTS-GLI-00002-000": (*FOUR, "seg"), "BraTS-GLI-00002-001": ("t2f", "seg")},
        patients=1,
    ),
    "brats2024": Expected(
        trees.brats2024,
        "brats",
        "brats2024",
        "brats2024",
        {"BraTS-GLI-02073-100": (*FOUR, "seg"), "BraTS-GLI-02073-101": ("t1c", "t2w", "seg")},
        patients=1,
    ),
    "msd": Expected(trees.msd, "msd", "msd", "msd", {"BRATS_001": (*FOUR, "seg"), "BRATS_002": (*FOUR, "seg")}),
    "msd without json": Expected(
        trees.msd_bare, "msd", "msd", "msd", {"BRATS_001": (*FOUR, "seg"), "BRATS_002": (*FOUR, "seg")}
    ),
    "nnunet": Expected(
        trees.nnunet, "nnunet", "nnunet", "msd", {"patient_1": (*FOUR, "seg"), "patient_2": ("t1n", "t1c", "seg")}
    ),
    "bids": Expected(trees.bids, "bids", "bids", None, {"sub-01_ses-1": (*FOUR, "seg"), "sub-02": ("t2f", "seg")}),
    "csv": Expected(trees.table, "csv", "csv", None, {"A": (*FOUR, "seg"), "B": ("t2f",)}, patients=1),
    "single": Expected(trees.single, "brats", "plain", None, {"case": ("t1n", "t2f")}, patients=1),
    "phantom": Expected(
        trees.phantom,
        "phantom",
        "phantom",
        "brats2023",
        {"phantom-0001": (*FOUR, "seg"), "phantom-0002": ("t1c", "seg")},
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_contract_of_every_layout(name: str, tmp_path: Path) -> None:
    want = EXPECTED[name]
    want.build(tmp_path / "case")
    found = recognise(tmp_path / "case")
    assert found.family == want.family
    assert {case.id: tuple(case.files) for case in found.cases} == want.who
    assert (found.scheme and found.scheme.name) == want.scheme
    assert found.evidence
    assert len({case.patient for case in found.cases}) == want.patients
    assert found.family in FAMILIES
    asked = [layout for layout, read in LAYOUTS.items() if read(tmp_path / "case").cases]
    assert asked[0] == want.layout


@pytest.mark.parametrize("name", EXPECTED)
def test_every_case_of_every_layout_reads_on_one_grid(name: str, tmp_path: Path) -> None:
    EXPECTED[name].build(tmp_path / "case")
    for files in recognise(tmp_path / "case").cases:
        case = read_case(files)
        assert tuple(case.images) == tuple(files.images)
        assert case.grid.shape == (8, 8, 8)
        np.testing.assert_allclose(case.affine, trees.AFFINE, atol=1e-6)
        assert (case.labels is None) == (files.labels is None)


def test_every_layout_has_a_test() -> None:
    assert {want.layout for want in EXPECTED.values()} == set(LAYOUTS)


def test_volumes_of_a_4d_file_go_to_the_sequences_that_its_table_names(tmp_path: Path) -> None:
    trees.msd(tmp_path)
    case = read_case(recognise(tmp_path).cases[0])
    for name in FOUR:
        np.testing.assert_array_equal(case.images[name], image("BRATS_001" + name))


def test_nnunet_channels_go_by_name_not_by_number(tmp_path: Path) -> None:
    trees.nnunet(tmp_path)
    text = (tmp_path / "dataset.json").read_text().replace('"0": "T1", "1": "T1Gd"', '"1": "T1", "0": "T1Gd"')
    (tmp_path / "dataset.json").write_text(text)
    case = read_case(recognise(tmp_path).cases[0])
    np.testing.assert_array_equal(case.images["t1c"], image("patient_1t1n"))


def test_groups_and_patients(tmp_path: Path) -> None:
    trees.brats2018(tmp_path / "2018")
    assert [case.group for case in recognise(tmp_path / "2018").cases] == ["HGG", "LGG"]
    for case in ("BraTS-SSA-00115-000", "BraTS-SSA-00121-000", "BraTS-SSA-00011-000"):
        case_2023(tmp_path / "ssa", case)
    found = {case.id: (case.patient, case.group) for case in recognise(tmp_path / "ssa").cases}
    assert found["BraTS-SSA-00115-000"] == found["BraTS-SSA-00121-000"] == ("BraTS-SSA-00115", "BraTS-SSA")
    assert found["BraTS-SSA-00011-000"] == ("BraTS-SSA-00011", "BraTS-SSA")
    trees.bids(tmp_path / "bids")
    assert [case.patient for case in recognise(tmp_path / "bids").cases] == ["sub-01", "sub-02"]
    trees.table(tmp_path / "csv")
    assert [case.group for case in recognise(tmp_path / "csv" / "cases.csv").cases] == ["HGG", ""]


def test_notes_say_what_was_chosen_and_left_out(tmp_path: Path) -> None:
    trees.bids(tmp_path / "bids")
    (note,) = recognise(tmp_path / "bids").notes
    assert note == "sub-01_ses-1: 2 files for t2w; sub-01_ses-1_T2w.nii.gz is used"
    trees.msd(tmp_path / "msd")
    assert recognise(tmp_path / "msd").notes[0].startswith("imagesTs: 1 files without labels left out")
    trees.brats2021(tmp_path / "brats")
    save(tmp_path / "brats" / "BraTS2021_00000" / "BraTS2021_00000_mean.nii.gz", image("x"))
    assert "left out BraTS2021_00000_mean.nii.gz" in recognise(tmp_path / "brats").notes[0]


def test_several_cases_in_one_folder(tmp_path: Path) -> None:
    for case in ("BraTS2021_00003", "BraTS2021_00004"):
        for end in ("t1", "flair", "seg"):
            save(tmp_path / f"{case}_{end}.nii.gz", image(case + end) if end != "seg" else labels((4,)))
    found = recognise(tmp_path)
    assert [(case.id, tuple(case.files)) for case in found.cases] == [
        ("BraTS2021_00003", ("t1n", "t2f", "seg")),
        ("BraTS2021_00004", ("t1n", "t2f", "seg")),
    ]


LOOSE = "W39_1998.09.19_Segm.nii.gz"


def test_a_segmentation_that_is_taken_by_a_loose_name_is_noted(tmp_path: Path) -> None:
    case_2021(tmp_path, "hospital_7", codes=None)
    save(tmp_path / "hospital_7" / LOOSE, labels((4,)))
    found = recognise(tmp_path)
    assert found.cases[0].labels == tmp_path / "hospital_7" / LOOSE
    assert found.notes == (f"hospital_7: {LOOSE} is taken for the segmentation, as its name says seg",)


def predicted(path: Path, **more: object) -> None:
    """A mask and one of its regions, with the record that `medmap predict` leaves beside them."""
    for name in (path.name, path.name.replace(".nii.gz", "-WT.nii.gz")):
        save(path.with_name(name), labels((1, 2, 4)))
    record = path.with_name(path.name.replace(".nii.gz", ".medmap.json"))
    record.write_text(json.dumps({"volumes_ml": {"WT": 3.0}, **more}))


OWN = {
    "2021": (lambda root: case_2021(root, "A", codes=None), "A/A_seg.nii.gz"),
    "2023": (lambda root: case_2023(root, "A", codes=None), "A/A-seg.nii.gz"),
    "loose": (lambda root: case_2021(root, "A", codes=None), "A/seg.nii.gz"),
    "nnunet": (trees.nnunet, "labelsTr/patient_1.nii.gz"),
    "msd": (trees.msd, "labelsTr/BRATS_001.nii.gz"),
    "csv": (trees.table, "scans/seg.nii.gz"),
    "bids": (trees.bids, "derivatives/manual/sub-01/ses-1/anat/sub-01_ses-1_dseg.nii.gz"),
    "phantom": (trees.phantom, "phantom-0001/phantom-0001-seg.nii.gz"),
}


@pytest.mark.parametrize("layout", OWN)
def test_masks_by_medmap_are_no_truth_in_any_layout(layout: str, tmp_path: Path) -> None:
    build, mask = OWN[layout]
    build(tmp_path)
    predicted(tmp_path / mask)
    found = recognise(tmp_path)
    assert found.cases[0].labels is None
    assert any("medmap made it, so it is no truth" in note for note in found.notes)
    predicted(tmp_path / mask, Manual=True)
    assert recognise(tmp_path).cases[0].labels == tmp_path / mask


def test_a_mask_by_medmap_does_not_hide_the_truth_beside_it(tmp_path: Path) -> None:
    case_2021(tmp_path, "A")
    predicted(tmp_path / "A" / "A_labels.nii.gz")  # comes before A_seg in the alphabet
    assert recognise(tmp_path).cases[0].labels == tmp_path / "A" / "A_seg.nii.gz"


def test_linked_folders_are_followed_and_circles_end(tmp_path: Path) -> None:
    for name, build in {"bids": trees.bids, "brats": trees.brats2021}.items():
        build(tmp_path / "far" / name)
        (tmp_path / name).mkdir()
        for folder in (tmp_path / "far" / name).iterdir():
            (tmp_path / name / folder.name).symlink_to(folder)
        (tmp_path / name / "circle").symlink_to(tmp_path / name)
        near, far = recognise(tmp_path / name), recognise(tmp_path / "far" / name)
        assert [(case.id, tuple(case.files)) for case in near.cases] == [
            (case.id, tuple(case.files)) for case in far.cases
        ]
    assert not [path for path in files_below(tmp_path / "bids") if "circle" in path.parts]


def test_patients_beside_phantoms_are_no_phantoms(tmp_path: Path) -> None:
    trees.phantom(tmp_path)
    case_2023(tmp_path, "BraTS-GLI-02073-100")
    case_2023(tmp_path, "hospital-7")
    found = {case.id: (case.family, case.scheme and case.scheme.name) for case in recognise(tmp_path).cases}
    assert found.pop("BraTS-GLI-02073-100") == ("brats2024", "brats2024")
    assert found.pop("hospital-7") == ("brats2023+", None)
    assert set(found.values()) == {("phantom", "brats2023")}


@pytest.mark.parametrize(
    "table", [{"cases": [{"id": "phantom-0001"}], "modalities": 5}, {}, {"cases": 3}, {"cases": [1]}, {"cases": [{}]}]
)
def test_a_manifest_of_phantoms_that_is_none_is_named(table: dict[str, object], tmp_path: Path) -> None:
    trees.phantom(tmp_path)
    (tmp_path / "phantoms.json").write_text(json.dumps(table))
    with pytest.raises(InputError, match=r"phantoms.json: found no list of cases with ids, or of mod.*; simulate"):
        recognise(tmp_path)


# ---- label maps -------------------------------------------------------------------------------------------------


def scheme_of(root: Path, **options: object) -> str | None:
    found = recognise(root, **options)  # type: ignore[arg-type]
    return found.scheme and found.scheme.name


@pytest.mark.parametrize(
    ("case", "codes", "quick", "deep"),
    [
        ("BraTS-GLI-00123", (1, 2, 3, 4), None, "brats2024"),  # no time point, 4 occurs: after treatment
        ("BraTS-GLI-00123", (1, 2, 4), None, "brats2024"),  # ids GLI never had the codes of 2021
        ("BraTS-GLI-00123", (1, 2, 3), None, "brats2023"),  # means the same in both years
        ("hospital-7", (1, 2, 3), None, "brats2023"),
        ("hospital-7", (1, 2, 3, 4), None, "brats2024"),
        ("hospital-7", (1, 2, 4), None, "brats2021"),
        ("hospital-7", (2, 4), None, None),  # a resection cavity, or a tumour that enhances all through
        ("hospital-7", (7,), None, None),
        ("hospital-7", (), None, None),
        ("BraTS2021_00000-mni182", (1, 2, 4), None, "brats2021"),  # id and names contradict each other
        ("BraTS2021_00000-mni182", (1, 2, 3), None, "brats2023"),
        ("BraTS-PED-00001-000", (1, 2, 3), None, None),  # its codes are not known here
        ("BraTS-SSA-00002-000", (1, 2, 4), "brats2023", "brats2023"),  # values never overrule names
        ("BraTS-MEN-00004-000", (1, 2, 3), "brats2023", "brats2023"),
    ],
)
def test_ids_decide_and_voxels_settle_only_what_they_can(
    case: str, codes: tuple[int, ...], quick: str | None, deep: str | None, tmp_path: Path
) -> None:
    case_2023(tmp_path, case, codes)
    assert scheme_of(tmp_path) == quick
    assert scheme_of(tmp_path, deep=True) == deep
    assert recognise(tmp_path).undecided == (() if quick else (case,))


def test_names_of_2021_decide_for_an_id_of_ones_own(tmp_path: Path) -> None:
    case_2021(tmp_path, "hospital_7")
    assert scheme_of(tmp_path) == "brats2021"


def test_names_that_anybody_gives_are_of_no_year(tmp_path: Path) -> None:
    case_2021(tmp_path, "p7", has=("t2f", "t2w"))
    found = recognise(tmp_path)
    assert (found.family, found.scheme, found.undecided) == ("plain", None, ("p7",))
    case_2021(tmp_path, "p8")  # one t1ce says for the whole data set how its names are meant
    found = recognise(tmp_path)
    assert (found.family, found.scheme, found.undecided) == ("brats2021", SCHEMES["brats2021"], ())


@pytest.mark.parametrize("case", ["BraTS2021_00002", "BraTS20_Training_001", "Brats18_CBICA_AAB_1"])
def test_an_id_of_2018_to_2021_needs_no_t1ce(case: str, tmp_path: Path) -> None:
    case_2021(tmp_path, case, has=("t1n", "t2f"))
    found = recognise(tmp_path)
    assert (found.family, found.scheme) == ("brats2021", SCHEMES["brats2021"])


def test_names_of_2021_with_an_id_of_2024_are_a_contradiction(tmp_path: Path) -> None:
    case_2021(tmp_path, "BraTS-GLI-02073-100", codes=(1, 2, 4))
    found = recognise(tmp_path, deep=True)
    assert found.scheme is None
    assert "contradict" in found.evidence


def test_voxels_of_all_cases_are_taken_together(tmp_path: Path) -> None:
    case_2023(tmp_path, "hospital-1", (1, 2, 4))
    case_2023(tmp_path, "hospital-2", (1, 2, 3))
    found = recognise(tmp_path, deep=True)
    assert found.scheme == SCHEMES["brats2024"]
    assert found.evidence.endswith("voxels hold 1, 2, 3, 4 in 2 segmentations, which rules out brats2023 and brats2021")


def test_plain_names_with_1_2_3_stay_undecided(tmp_path: Path) -> None:
    trees.table(tmp_path)
    save(tmp_path / "scans" / "seg.nii.gz", labels((1, 2, 3)))
    found = recognise(tmp_path, deep=True)
    assert found.scheme is None  # 1 is necrosis in BraTS 2023 and oedema in the decathlon
    assert found.evidence.endswith("which could be brats2023 or brats2024 or msd")


def test_labels_overrides_everything(tmp_path: Path) -> None:
    trees.brats2023(tmp_path)
    found = recognise(tmp_path, labels="msd")
    assert found.scheme == SCHEMES["msd"]
    assert found.evidence == "asked for with --labels"
    assert all(case.scheme == SCHEMES["msd"] for case in found.cases)
    with pytest.raises(InputError, match=r"label scheme 'brats1066' is not known; expected one of brats2021"):
        recognise(tmp_path, labels="brats1066")


def test_mixed_families_keep_a_map_each(tmp_path: Path) -> None:
    trees.brats2021(tmp_path / "a")
    trees.brats2023(tmp_path / "b")
    case_2023(tmp_path / "c", "TCGA-FG-6692", codes=None)
    found = recognise(tmp_path)
    assert found.family == "mixed"
    assert found.scheme is None
    assert found.undecided == ()
    assert {case.scheme.name for case in found.cases if case.scheme} == {"brats2021", "brats2023"}


@pytest.mark.parametrize(
    ("table", "codes", "regions"),
    [
        (
            {"background": 0, "prostate": 1, "lesion": 2},
            {"prostate": 1, "lesion": 2},
            {"prostate": (1,), "lesion": (2,)},
        ),
        ({"background": 0, "whole": [1, 5], "hot spot": [5]}, {"label1": 1, "label5": 5}, {"hot spot": (2,)}),
        (
            {"0": "background", "1": "necrosis", "2": "edema", "3": "non-enhancing tumor", "4": "enhancing tumour"},
            {"necrosis": 1, "edema": 2, "non_enhancing_tumor": 3, "enhancing_tumor": 4},
            {"necrosis": (1,)},
        ),
    ],
)
def test_labels_of_a_json(
    table: dict[str, object], codes: dict[str, int], regions: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    trees.nnunet(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps({**trees.REGIONS_JSON, "labels": table}))
    scheme = recognise(tmp_path).scheme
    assert scheme is not None
    assert dict(scheme.codes) == codes
    assert {name: scheme.members(name) for name in regions} == regions


# ---- bad input --------------------------------------------------------------------------------------------------


def test_paths_that_hold_no_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such folder; check the path"):
        recognise(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"found no file at all; expected a folder of cases"):
        recognise(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match=r"notes.txt: is one file; expected a folder of cases, or a CSV table"):
        recognise(tmp_path / "notes.txt")
    with pytest.raises(InputError, match=r"found 1 files, none of them NIfTI"):
        recognise(tmp_path)
    save(tmp_path / "brain.nii.gz", image("x"))
    with pytest.raises(InputError, match=r"found 1 NIfTI files \(brain.nii.gz\), but no names .* CSV table"):
        recognise(tmp_path)


def test_dicom_is_named_with_its_cure(tmp_path: Path) -> None:
    (tmp_path / "I0001").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 20)
    (tmp_path / "b.dcm").write_bytes(b"")
    with pytest.raises(InputError, match=r"found 2 DICOM files.* `medmap check STUDY` .* dcm2niix -z y -o OUT"):
        recognise(tmp_path)


def test_one_id_in_two_folders(tmp_path: Path) -> None:
    trees.brats2021(tmp_path / "a")
    trees.brats2021(tmp_path / "b")
    with pytest.raises(InputError, match=r"case BraTS2021_00000 is found twice, in .*a/BraTS2021_00000 and .*b/BraTS"):
        recognise(tmp_path)


def test_tables_that_are_wrong(tmp_path: Path) -> None:
    table = tmp_path / "cases.csv"
    table.write_text("name,file\nA,x.nii.gz\n")
    with pytest.raises(InputError, match=r"found the columns name, file; expected case,t1n"):
        recognise(table)
    table.write_text("case,t1n\n,x.nii.gz\n")
    with pytest.raises(InputError, match=r"line 2: the cell `case` is empty"):
        recognise(table)
    table.write_text("case,t1n\nA,\n")
    with pytest.raises(InputError, match=r"holds no case with an image"):
        recognise(table)
    trees.nnunet(tmp_path / "task")
    (tmp_path / "task" / "dataset.json").write_text("{")
    with pytest.raises(InputError, match=r"dataset.json: not valid JSON"):
        recognise(tmp_path / "task")
    (tmp_path / "task" / "dataset.json").write_text('{"channel_names": {"0": "T1"}, "labels": {}}')
    with pytest.raises(InputError, match=r"names no channel 1, but there are files …_0001"):
        recognise(tmp_path / "task")
    (tmp_path / "task" / "dataset.json").write_text('{"channel_names": {"0": "T1", "1": "t1w"}, "labels": {}}')
    with pytest.raises(InputError, match=r"two channels are called t1n"):
        recognise(tmp_path / "task")


def test_reading_names_the_two_files_that_disagree(tmp_path: Path) -> None:
    case_2023(tmp_path, "A")
    moved = trees.AFFINE.copy()
    moved[0, 3] += 0.01
    save(tmp_path / "A" / "A-t2f.nii.gz", image("At2f"), moved)
    (files,) = recognise(tmp_path).cases
    with pytest.raises(
        InputError, match=r"case A: the affines of A-t1n.nii.gz and A-t2f.nii.gz differ by up to 0.01 mm"
    ):
        read_case(files)
    assert tuple(read_case(files, modalities=("t1", "t1ce", "adc")).images) == ("t1n", "t1c")
    with pytest.raises(InputError, match=r"case A: has t1n, t1c, t2w, t2f, none of adc"):
        read_case(files, modalities=["adc"])
    moved[0, 3] = trees.AFFINE[0, 3] + 0.0005  # below the tolerance of 1e-3 mm
    save(tmp_path / "A" / "A-t2f.nii.gz", image("At2f"), moved)
    assert len(read_case(files).images) == 4
    save(tmp_path / "A" / "A-t2f.nii.gz", image("At2f")[:, :, 1:])
    with pytest.raises(InputError, match=r"A-t2f.nii.gz is 8×8×7 voxels, A-t1n.nii.gz is 8×8×8 voxels; .*--resample"):
        read_case(files)
    save(tmp_path / "A" / "A-t2f.nii.gz", np.stack([image("At2f")] * 2, -1))
    with pytest.raises(InputError, match=r"found a 4-D file of shape \(8, 8, 8, 2\); a 3-D volume is expected"):
        read_case(files)


# ---- real scans -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "cases", "patients"), [("ssa-2mm", 24, 23), ("brats2021-2mm", 8, 8)])
def test_real_collections(name: str, cases: int, patients: int, real_data: Path) -> None:
    found = recognise(real_data / name)
    assert (len(found.cases), len({case.patient for case in found.cases})) == (cases, patients)
    assert found.scheme == SCHEMES["brats2023" if name == "ssa-2mm" else "brats2021"]
    assert all(tuple(case.files) == (*FOUR, "seg") for case in found.cases)
    values = set(np.unique(read_case(found.cases[0]).labels).tolist())
    assert values == {0, *(found.scheme.codes.values() if found.scheme else ())}


def test_real_folder_whose_id_and_names_contradict(real_data: Path) -> None:
    root = real_data / "odd" / "BraTS2021_00000-mni182"
    assert recognise(root).scheme is None
    found = recognise(root, deep=True)
    assert found.scheme == SCHEMES["brats2023"]
    assert "rules out brats2021" in found.evidence
