"""Small made-up data sets, one builder a layout: 8×8×8 voxels, a 4×4×4 brain, every image different."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from zlib import crc32

import nibabel as nib
import numpy as np

FOUR = ("t1n", "t1c", "t2w", "t2f")
OLD = {"t1n": "t1", "t1c": "t1ce", "t2w": "t2", "t2f": "flair"}
AFFINE = np.array([[-1.0, 0, 0, 4], [0, -1, 0, 5], [0, 0, 2, -6], [0, 0, 0, 1]])


def image(seed: str) -> np.ndarray:
    """Float32[8 8 8]: a brain of 4×4×4 voxels, not 0, with a 0 border; another one for another seed."""
    values = np.random.default_rng(crc32(seed.encode())).uniform(1, 100, (4, 4, 4))
    return np.pad(values, 2).astype(np.float32)


def labels(codes: Iterable[int]) -> np.ndarray:
    """UInt8[8 8 8] with one voxel of each code."""
    volume = np.zeros((8, 8, 8), np.uint8)
    for place, code in enumerate(codes):
        volume[2 + place % 4, 2, 2] = code
    return volume


def save(path: Path, volume: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    """Write a volume, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume, affine), path)
    return path


def case_2021(folder: Path, case: str, codes: Iterable[int] | None = (1, 2, 4), has: Iterable[str] = FOUR) -> None:
    """``ID/ID_t1ce.nii.gz``."""
    for name in has:
        save(folder / case / f"{case}_{OLD[name]}.nii.gz", image(case + name))
    if codes is not None:
        save(folder / case / f"{case}_seg.nii.gz", labels(codes))


def case_2023(folder: Path, case: str, codes: Iterable[int] | None = (1, 2, 3), has: Iterable[str] = FOUR) -> None:
    """``ID/ID-t1c.nii.gz``."""
    for name in has:
        save(folder / case / f"{case}-{name}.nii.gz", image(case + name))
    if codes is not None:
        save(folder / case / f"{case}-seg.nii.gz", labels(codes))


def brats2018(root: Path) -> None:
    case_2021(root / "HGG", "Brats18_CBICA_AAB_1")
    case_2021(root / "LGG", "Brats18_TCIA10_109_1", has=("t1n", "t2f"))


def brats2020(root: Path) -> None:
    """With the one segmentation of that year that has an odd name."""
    case_2021(root, "BraTS20_Training_001")
    case_2021(root, "BraTS20_Training_355", codes=None)
    save(root / "BraTS20_Training_355" / "W39_1998.09.19_Segm.nii.gz", labels((1, 2, 4)))


def brats2021(root: Path) -> None:
    case_2021(root, "BraTS2021_00000")
    case_2021(root, "BraTS2021_00002", has=("t1n", "t1c", "t2f"))


def brats2023(root: Path) -> None:
    case_2023(root, "BraTS-GLI-00002-000")
    case_2023(root, "BraTS-GLI-00002-001", has=("t2f",))


def brats2024(root: Path) -> None:
    case_2023(root, "BraTS-GLI-02073-100", codes=(1, 2, 3, 4))
    case_2023(root, "BraTS-GLI-02073-101", codes=(2, 4), has=("t1c", "t2w"))


def msd(root: Path, with_json: bool = True) -> None:
    """4-D files, channels FLAIR, T1w, t1gd, T2w; and a file that macOS leaves behind."""
    for case in ("BRATS_001", "BRATS_002"):
        volumes = [image(case + name) for name in ("t2f", "t1n", "t1c", "t2w")]
        save(root / "imagesTr" / f"{case}.nii.gz", np.stack(volumes, axis=-1))
        save(root / "labelsTr" / f"{case}.nii.gz", labels((1, 2, 3)))
    (root / "imagesTr" / "._BRATS_001.nii.gz").write_bytes(b"not an image")
    save(root / "imagesTs" / "BRATS_485.nii.gz", np.stack([image("a")] * 4, axis=-1))
    if with_json:
        table = {
            "name": "BRATS",
            "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
            "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
        }
        (root / "dataset.json").write_text(json.dumps(table))


def msd_bare(root: Path) -> None:
    msd(root, with_json=False)


REGIONS_JSON = {
    "channel_names": {"0": "T1", "1": "T1Gd", "2": "T2", "3": "FLAIR"},
    "labels": {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": 3},
    "regions_class_order": [1, 2, 3],
    "file_ending": ".nii.gz",
}


def nnunet(root: Path) -> None:
    (root).mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(REGIONS_JSON))
    for case, has in (("patient_1", FOUR), ("patient_2", FOUR[:2])):
        for channel, name in enumerate(FOUR):
            if name in has:
                save(root / "imagesTr" / f"{case}_{channel:04d}.nii.gz", image(case + name))
        save(root / "labelsTr" / f"{case}.nii.gz", labels((1, 2, 3)))


def bids(root: Path) -> None:
    first = root / "sub-01" / "ses-1" / "anat"
    for end, name in (("T1w", "t1n"), ("ce-gadolinium_T1w", "t1c"), ("T2w", "t2w"), ("FLAIR", "t2f")):
        save(first / f"sub-01_ses-1_{end}.nii.gz", image("1" + name))
    save(first / "sub-01_ses-1_acq-lowres_T2w.nii.gz", image("1again"))
    save(root / "sub-02" / "anat" / "sub-02_FLAIR.nii.gz", image("2t2f"))
    masks = root / "derivatives" / "manual"
    save(masks / "sub-01" / "ses-1" / "anat" / "sub-01_ses-1_dseg.nii.gz", labels((1, 2, 4)))
    save(masks / "sub-02" / "anat" / "sub-02_dseg.nii.gz", labels((1, 2, 4)))


def table(root: Path) -> None:
    for name in FOUR:
        save(root / "scans" / f"a {name}.nii", image("a" + name))
    save(root / "scans" / "b.nii.gz", image("b"))
    save(root / "scans" / "seg.nii.gz", labels((1, 2, 4)))
    rows = [
        ["case", "T1", "t1ce", "t2w", "flair", "seg", "patient", "group"],
        ["A", *(f"scans/a {name}.nii" for name in FOUR), "scans/seg.nii.gz", "P1", "HGG"],
        ["B", "", "", "", "scans/b.nii.gz", "", "P1", ""],
    ]
    with open(root / "cases.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def single(root: Path) -> None:
    for name in ("T1", "T2_FLAIR"):
        save(root / f"{name}.nii.gz", image(name))


def phantom(root: Path) -> None:
    case_2023(root, "phantom-0001")
    case_2023(root, "phantom-0002", has=("t1c",))
    cases = [{"id": "phantom-0001"}, {"id": "phantom-0002"}]
    (root / "phantoms.json").write_text(json.dumps({"labels": "brats2023", "seed": 0, "cases": cases}))
