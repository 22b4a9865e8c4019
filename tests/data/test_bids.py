from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from made_up_calls import answer, fails, works
from made_up_trees import image, labels, save

import medmap
from medmap.core.labels import SCHEMES
from medmap.data.bids import entities, mask_path, refuse_twins, sidecar, write_dataset
from medmap.data.cases import ImageRef
from medmap.data.layouts import recognise
from medmap.errors import InputError


@pytest.fixture
def folder(tiny_phantoms: Path, tmp_path: Path) -> Path:
    """One patient as BIDS has it, with a session, and one with a name that BIDS does not allow."""
    root = tmp_path / "raw"
    for number, name in (("00000", "sub-01/ses-a/anat/sub-01_ses-a_FLAIR"), ("00001", "sub-02/anat/sub-02_FLAIR")):
        target = root / f"{name}.nii.gz"
        target.parent.mkdir(parents=True)
        shutil.copy(tiny_phantoms / f"PHANTOM-{number}-000" / f"PHANTOM-{number}-000-t2f.nii.gz", target)
    return root


def test_masks_have_the_names_and_sidecars_of_a_derivative(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = answer("predict", "-i", folder, "-o", out, "--bids", "--device", "cpu")
    assert sorted(made["done"]) == ["sub-01_ses-a", "sub-02"]
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == [
        "dataset_description.json",
        "dseg.tsv",
        "sub-01/ses-a/anat/sub-01_ses-a_space-orig_dseg.json",
        "sub-01/ses-a/anat/sub-01_ses-a_space-orig_dseg.nii.gz",
        "sub-02/anat/sub-02_space-orig_dseg.json",
        "sub-02/anat/sub-02_space-orig_dseg.nii.gz",
    ]
    mask = nib.load(out / mask_path("sub-02"))
    assert np.allclose(mask.affine, nib.load(folder / "sub-02/anat/sub-02_FLAIR.nii.gz").affine)
    sidecar = json.loads((out / "sub-02/anat/sub-02_space-orig_dseg.json").read_text())
    assert sidecar["Manual"] is False
    assert sidecar["Sources"] == ["bids:raw:sub-02/anat/sub-02_FLAIR.nii.gz"]
    assert sidecar["SpatialReference"] == sidecar["Sources"][0]
    assert sidecar["volumes_ml"] == made["done"]["sub-02"]["volumes_ml"]


def test_the_data_set_is_described(tmp_path: Path) -> None:
    write_dataset(tmp_path / "out", tmp_path / "raw", SCHEMES["brats2021"])
    description = json.loads((tmp_path / "out" / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"][0] == {"Name": "medmap", "Version": medmap.__version__}
    assert description["DatasetLinks"] == {"raw": "../raw"}
    assert {"Name", "BIDSVersion"} <= set(description)
    rows = [line.split("\t") for line in (tmp_path / "out" / "dseg.tsv").read_text().splitlines()]
    assert rows[0] == ["index", "name", "abbreviation", "color"]
    assert [(row[0], row[2]) for row in rows[1:]] == [("1", "NCR"), ("2", "ED"), ("4", "ET")]


def test_a_second_call_makes_nothing_again(folder: Path, tmp_path: Path) -> None:
    words = ("predict", "-i", folder, "-o", tmp_path / "out", "--bids", "--device", "cpu")
    works(*words)
    assert "0 masks, 2 were there already" in works(*words)
    assert works(*words, "--dry-run").endswith("0 to make, 2 there already, 0 cannot be done\n")


def test_a_dry_run_writes_nothing(folder: Path, tmp_path: Path) -> None:
    said = works("predict", "-i", folder, "-o", tmp_path / "out", "--bids", "--dry-run")
    assert f"would make {tmp_path / 'out' / mask_path('sub-02')}" in said
    assert not (tmp_path / "out").exists()


def test_names_lose_what_bids_does_not_allow() -> None:
    assert entities("BraTS2021_00006") == "sub-BraTS202100006"
    assert entities("sub-01_run-2") == "sub-sub01run2"
    with pytest.raises(InputError, match="neither letters nor digits"):
        entities("--")
    with pytest.raises(InputError, match=r"a-1 and a_1: both would be sub-a1"):
        refuse_twins(["a-1", "b", "a_1"])


def test_another_data_set_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "dataset_description.json").write_text('{"Name": "raw"}')
    with pytest.raises(InputError, match="describes another data set"):
        write_dataset(tmp_path, tmp_path / "raw", SCHEMES["msd"])


def test_it_goes_with_masks_of_folders_only(folder: Path, tmp_path: Path) -> None:
    words = ("predict", "-i", folder, "-o", tmp_path / "out", "--bids")
    assert "neither --regions nor --probabilities" in fails(*words, "--regions", code=2)
    image = folder / "sub-02/anat/sub-02_FLAIR.nii.gz"
    said = fails("predict", "--t2f", image, "-o", tmp_path / "x.nii.gz", "--bids", code=2)
    assert "names the masks of a folder of cases" in said


# ---- sources behind links ---------------------------------------------------------------------------------------

FLAIR = "sub-01/anat/sub-01_FLAIR.nii.gz"


@pytest.mark.parametrize("folder", [Path("raw"), Path()])
def test_images_that_git_annex_keeps_are_sources_by_their_names(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = save(tmp_path / folder / ".git/annex/objects/4F/MD5E-s1.nii.gz/MD5E-s1.nii.gz", image("1"))
    link = tmp_path / folder / FLAIR
    link.parent.mkdir(parents=True)
    link.symlink_to(os.path.relpath(kept, link.parent))
    monkeypatch.chdir(tmp_path)
    for root in (folder, tmp_path / folder):
        (case,) = recognise(root).cases
        assert sidecar(case.images.values(), root)["Sources"] == [f"bids:raw:{FLAIR}"]


def test_links_out_of_the_data_set_keep_their_names_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = tmp_path / "raw" / FLAIR
    link.parent.mkdir(parents=True)
    link.symlink_to(save(tmp_path / "archive" / "7.nii.gz", image("1")))
    monkeypatch.chdir(tmp_path)
    assert sidecar([ImageRef(Path("raw") / FLAIR)], Path("raw"))["SpatialReference"] == f"bids:raw:{FLAIR}"


def test_images_outside_of_the_data_set_have_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = (
        save(tmp_path / "raw" / "a.nii.gz", image("a")),
        save(tmp_path / "my archive" / "b.nii", image("b")),
    )
    (tmp_path / "raw" / "cases.csv").write_text("case,t1n,t2f\nA,a.nii.gz,../my archive/b.nii\n")
    monkeypatch.chdir(tmp_path)
    (case,) = recognise(Path("raw/cases.csv")).cases
    sources = sidecar(case.images.values(), Path("raw/cases.csv"))["Sources"]
    assert sources == [f"bids:raw:{inside.name}", outside.as_uri()]
    assert sources[1].endswith("/my%20archive/b.nii")


# ---- which masks are the truth ----------------------------------------------------------------------------------


def beside(mask: Path, **told: object) -> None:
    """Write the JSON of a mask."""
    mask.with_name(mask.name.replace(".nii.gz", ".json")).write_text(json.dumps(told))


def truth(root: Path) -> str | None:
    """From the folder of the only case, where its segmentation lies."""
    (case,) = recognise(root).cases
    return None if case.labels is None else case.labels.relative_to(root).as_posix()


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """One patient, whom nobody has segmented."""
    save(tmp_path / "one" / FLAIR, image("1"))
    return tmp_path / "one"


EXPERT = "derivatives/experts/sub-01/anat/sub-01_space-orig_desc-consensus_dseg.nii.gz"
OURS = f"derivatives/medmap/{mask_path('sub-01').as_posix()}"


def test_masks_by_medmap_do_not_become_the_truth(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expert = "derivatives/experts/sub-02/anat/sub-02_space-orig_desc-consensus_dseg.nii.gz"
    save(folder / expert, labels((1, 2)))
    monkeypatch.chdir(folder)
    before = {case.id: case.labels for case in recognise(folder).cases}
    assert before == {"sub-01_ses-a": None, "sub-02": folder / expert}
    words = ("predict", "-i", ".", "-o", "derivatives/medmap", "--bids", "--device", "cpu")
    works(*words)
    assert len(list(folder.glob("derivatives/medmap/**/*_dseg.nii.gz"))) == 2
    assert {case.id: case.labels for case in recognise(folder).cases} == before
    assert {case.id: case.labels for case in recognise(Path()).cases} == {"sub-01_ses-a": None, "sub-02": Path(expert)}
    (folder / "derivatives/medmap/dataset_description.json").unlink()  # each mask's own JSON says it as well
    assert {case.id: case.labels for case in recognise(folder).cases} == before


@pytest.mark.parametrize(
    ("made", "used"),
    [
        ([{"Name": "medmap", "Version": "0.1"}], None),
        ([{"Name": "fMRIPrep"}, {"Name": "MedMap"}], None),
        ({"Name": "medmap"}, None),
        ([{"Name": "medmapper"}], OURS),
        (["medmap"], OURS),  # not as BIDS has it
        (None, OURS),
    ],
)
def test_a_derivative_is_by_medmap_where_its_description_says_so(made: object, used: str | None, one: Path) -> None:
    save(one / OURS, labels((1,)))
    (one / "derivatives/medmap/dataset_description.json").write_text(json.dumps({"GeneratedBy": made}))
    assert truth(one) == used


def test_the_innermost_data_set_says_whose_a_mask_is(one: Path) -> None:
    nested = f"derivatives/medmap/{EXPERT}"
    write_dataset(one / "derivatives/medmap", one, SCHEMES["msd"])
    save(one / nested, labels((1,)))
    assert truth(one) is None
    (one / "derivatives/medmap/derivatives/experts/dataset_description.json").write_text('{"Name": "by hand"}')
    assert truth(one) == nested


def test_a_mask_by_medmap_that_a_person_corrected_is_that_persons(one: Path) -> None:
    write_dataset(one / "derivatives/medmap", one, SCHEMES["msd"])
    save(one / OURS, labels((1,)))
    versions = {"medmap": medmap.__version__}
    beside(one / OURS, Manual=False, versions=versions)
    assert truth(one) is None
    beside(one / OURS, Manual=True, versions=versions)
    assert truth(one) == OURS


def test_of_several_masks_none_is_chosen_by_its_name(one: Path) -> None:
    tissue = "derivatives/fmriprep/sub-01/anat/sub-01_dseg.nii.gz"
    for mask in (EXPERT, tissue):
        save(one / mask, labels((1,)))
    save(one / "derivatives/fmriprep/sub-03/anat/sub-03_dseg.nii.gz", labels((1,)))  # of nobody whose images are here
    save(one / "derivatives/fmriprep/sub-03/anat/sub-03_desc-aseg_dseg.nii.gz", labels((1,)))
    several = f"case sub-01 has 2 segmentations ({EXPERT}, {tissue}); expected one. Keep the true one, or write"
    for told in ((False, False), (True, True)):
        for mask, drawn in zip((EXPERT, tissue), told, strict=True):
            beside(one / mask, Manual=drawn)
        with pytest.raises(InputError) as raised:
            recognise(one)
        assert several in str(raised.value)
    beside(one / tissue, Manual=False)
    assert truth(one) == EXPERT


def test_a_description_that_cannot_be_read_is_named(one: Path) -> None:
    save(one / EXPERT, labels((1,)))
    (one / "derivatives/experts/dataset_description.json").write_text('{"Name": ')
    with pytest.raises(InputError, match=r"experts/dataset_description.json: not valid JSON"):
        recognise(one)
