from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from made_up_calls import answer, fails, works

import medmap
from medmap.core.labels import SCHEMES
from medmap.data.bids import entities, mask_path, refuse_twins, write_dataset
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
