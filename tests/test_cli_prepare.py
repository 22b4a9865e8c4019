"""What is prepared, and what is said of the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
from made_up_calls import call, fails

from medmap.data.store import Store

PATIENT = "PHANTOM-00000-000"


def test_prepare_leaves_out_what_check_calls_an_error(tiny_phantoms: Path, tmp_path: Path) -> None:
    data = shutil.copytree(tiny_phantoms, tmp_path / "data")
    first, second = (data / name / name for name in (PATIENT, "PHANTOM-00001-000"))
    shutil.copy(f"{first}-t1n.nii.gz", f"{first}-t1c.nii.gz")
    turned = nib.load(f"{second}-t2w.nii.gz")
    nib.save(nib.Nifti1Image(turned.get_fdata()[::-1], turned.affine), f"{second}-t2w.nii.gz")
    words = ("prepare", data, "-o", tmp_path / "store")
    assert f"left out {PATIENT}: t1n and t1c are one image under two names" in fails(*words, code=3)
    assert Store(tmp_path / "store").ids == ("PHANTOM-00001-000", "PHANTOM-00002-000")
    said = fails(*words, "--deep", code=3)
    assert "left out PHANTOM-00001-000: t2w is mirrored against t1n, t1c, t2f" in said
    assert Store(tmp_path / "store").ids == ("PHANTOM-00002-000",)
    assert json.loads(call("check", data, "--deep", "--json").stdout)["unusable"] == [PATIENT, "PHANTOM-00001-000"]


def test_what_a_folder_holds_twice_is_said_by_whoever_reads_it(
    tiny_phantoms: Path, tiny_run: Path, tmp_path: Path
) -> None:
    anat = tmp_path / "bids" / "sub-01" / "anat"
    anat.mkdir(parents=True)
    for run, patient in (("run-1", PATIENT), ("run-2", "PHANTOM-00001-000")):
        shutil.copy(tiny_phantoms / patient / f"{patient}-t2f.nii.gz", anat / f"sub-01_{run}_FLAIR.nii.gz")
    note = "sub-01: 2 files for t2f; sub-01_run-1_FLAIR.nii.gz is used"
    predicted = ("predict", "--model", tiny_run, "-i", tmp_path / "bids", "-o", tmp_path / "masks", "--device", "cpu")
    prepared = ("prepare", tmp_path / "bids", "-o", tmp_path / "store")
    for words in ((*predicted, "--dry-run"), predicted, (*prepared, "--dry-run"), prepared):
        result = call(*words, "--json")
        assert f"warning: {note}" in " ".join(result.stderr.split())
        assert json.loads(result.stdout)["notes"] == [note]
