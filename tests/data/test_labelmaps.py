"""What a dataset.json and the ids of public collections stand for."""

from __future__ import annotations

import json
from itertools import combinations, permutations
from pathlib import Path

import made_up_trees as trees
import pytest
from made_up_trees import image, labels, save

from medmap.core.labels import SCHEMES
from medmap.data.check import check
from medmap.data.labelmaps import from_json, patient_of
from medmap.data.layouts import recognise
from medmap.data.store import write_store
from medmap.errors import InputError

REGIONS = trees.REGIONS_JSON["labels"]
IGNORES = r"labels of dataset.json, where ignore = 4 stands for voxels that nobody annotated: .*take ignore out of "


def nnunet(root: Path, table: object) -> None:
    """Two cases with the codes 1, 2, 3 and one that has 4 as well."""
    trees.nnunet(root)
    save(root / "imagesTr" / "patient_3_0000.nii.gz", image("patient_3t1n"))
    save(root / "labelsTr" / "patient_3.nii.gz", labels((1, 2, 3, 4)))
    (root / "dataset.json").write_text(json.dumps({**trees.REGIONS_JSON, "labels": table}))


@pytest.mark.parametrize(
    "table",
    [
        {**REGIONS, "ignore": 4},
        {"background": 0, "necrosis": 1, "edema": 2, "enhancing": 3, "ignore": 4},
        {"0": "background", "1": "edema", "2": "necrosis", "3": "enhancing", "4": "Ignore"},
    ],
    ids=["regions", "flat", "msd"],
)
@pytest.mark.parametrize("deep", [False, True])
def test_voxels_that_nobody_annotated_become_no_class(table: dict[str, object], deep: bool, tmp_path: Path) -> None:
    nnunet(tmp_path / "task", table)
    report = check(tmp_path / "task", deep=deep)
    assert report.folder.scheme is None
    assert report.exit_code == 1
    (fault,) = [fault for fault in report.faults if fault.kind == "undecided"]
    assert "where ignore = 4 stands for voxels that nobody annotated" in fault.what
    with pytest.raises(InputError, match=IGNORES):
        write_store(recognise(tmp_path / "task", deep=deep), tmp_path / "store")


def test_ignore_is_in_the_way_only_where_its_map_is_taken(tmp_path: Path) -> None:
    nnunet(tmp_path, {**REGIONS, "ignore": 4})
    assert recognise(tmp_path, labels="msd").scheme == SCHEMES["msd"]
    for path in (tmp_path / "labelsTr").iterdir():
        path.unlink()
    assert check(tmp_path).exit_code == 0


def test_without_ignore_the_cases_that_hold_it_are_named_and_left_out(tmp_path: Path) -> None:
    nnunet(tmp_path / "task", REGIONS)
    report = write_store(recognise(tmp_path / "task"), tmp_path / "store")
    assert list(report.failed) == ["patient_3"]
    assert "found label 4" in report.failed["patient_3"]


@pytest.mark.parametrize("names", list(permutations(["edema", "enhancing", "necrosis"])))
@pytest.mark.parametrize("cavity", [False, True])
def test_parts_in_any_order_have_the_regions_of_the_field(names: tuple[str, ...], cavity: bool) -> None:
    every = [*names, *["resection cavity"] * cavity]
    scheme = from_json({"background": 0, **{name: code for code, name in enumerate(every, 1)}}, "dataset.json").scheme
    known = SCHEMES["brats2024" if cavity else "brats2023"]
    assert scheme is not None
    assert (scheme.classes, scheme.regions) == (known.classes, known.regions)
    assert [scheme.codes[part] for part in ("ed", "et", "ncr")] == [
        every.index(name) + 1 for name in ("edema", "enhancing", "necrosis")
    ]
    for left_out in combinations(known.regions, 1):  # by the names of the known scheme
        assert scheme.without(left_out)[1] == known.without(left_out)[1]


def test_what_is_no_part_of_a_glioma_is_a_region_by_itself() -> None:
    scheme = from_json({"edema": 1, "enhancing": 2, "necrosis": 3, "vessel": 4}, "dataset.json").scheme
    assert scheme is not None
    assert scheme.regions == {**SCHEMES["brats2023"].regions, "vessel": ("vessel",)}


@pytest.mark.parametrize("names", [("edema", "enhancing"), ("ncr", "net", "ed", "et")])
def test_without_each_part_once_every_class_is_a_region_by_itself(names: tuple[str, ...]) -> None:
    scheme = from_json({name: code for code, name in enumerate(names, 1)}, "dataset.json").scheme
    assert scheme is not None
    assert scheme.regions == {name: (name,) for name in scheme.classes[1:]}


@pytest.mark.parametrize(
    "labels",
    [
        {"坏死": 1, "水肿": 2, "增强": 3},
        {"некроз": 1, "отёк": 2, "Ödem": 3},
        {"lesion-a": 1, "lesion a": 2, "Lesion_A": 3},
        {"+": 1, "-": 2},
        {"necrosis": 1, "Necrosis": 2},
    ],
)
def test_no_two_codes_become_one_class(labels: dict[str, int]) -> None:
    scheme = from_json(labels, "dataset.json").scheme
    assert scheme is not None
    assert sorted(scheme.codes.values()) == sorted(labels.values())
    assert "" not in scheme.codes
    assert scheme.regions == {name: (name,) for name in scheme.codes}


def test_two_names_for_one_region_stay_two() -> None:
    scheme = from_json({"whole": [1, 2], "whole tumor": [1, 2, 3], "core": [3]}, "dataset.json").scheme
    assert scheme is not None
    assert list(scheme.regions) == ["whole", "whole tumor", "core"]


@pytest.mark.parametrize("build", ["nnunet", "msd"])
@pytest.mark.parametrize("labels", [None, {}, {"background": 0}, "left out"])
def test_a_table_without_labels_decides_nothing(build: str, labels: object, tmp_path: Path) -> None:
    getattr(trees, build)(tmp_path)
    table = json.loads((tmp_path / "dataset.json").read_text()) | {"labels": labels}
    if labels == "left out":
        del table["labels"]
    (tmp_path / "dataset.json").write_text(json.dumps(table))
    for path in [*(tmp_path / "imagesTr").iterdir(), *(tmp_path / "labelsTr").iterdir()]:
        path.rename(path.with_name(path.name.replace("BRATS_", "hospital_")))  # that name is the Decathlon's own
    found = recognise(tmp_path)
    assert found.scheme is None
    assert found.evidence == "dataset.json names no labels"
    assert len(found.undecided) == 2


@pytest.mark.parametrize("labels", [[1, 2], 3, "edema"])
def test_labels_that_are_no_object_are_named(labels: object, tmp_path: Path) -> None:
    trees.nnunet(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps({**trees.REGIONS_JSON, "labels": labels}))
    with pytest.raises(InputError, match=r"dataset.json: labels: found a (list|int|str); expected an object such as"):
        recognise(tmp_path)


@pytest.mark.parametrize(
    ("cases", "patient"),
    [
        (("TCGA-02-0006_1996.08.23", "TCGA-02-0006_2000.01.01", "TCGA-02-0006"), "TCGA-02-0006"),
        (("TCGA-CS-4941_1", "TCGA-CS-4941"), "TCGA-CS-4941"),
        (("UCSF-PDGM-0138", "UCSF-PDGM-0138_FU003d", "UCSF-PDGM-0138_nifti"), "UCSF-PDGM-0138"),
        (("UPENN-GBM-00012_11", "UPENN-GBM-00012_21"), "UPENN-GBM-00012"),
    ],
)
def test_time_points_share_a_patient(cases: tuple[str, ...], patient: str) -> None:
    assert {patient_of(case) for case in cases} == {patient}


def test_other_numbers_are_other_patients() -> None:
    ids = ("TCGA-02-0006", "TCGA-02-0007", "TCGA-06-0006", "UCSF-PDGM-0138", "UCSF-PDGM-0139")
    assert len({patient_of(f"{case}_1") for case in ids}) == len(ids)
