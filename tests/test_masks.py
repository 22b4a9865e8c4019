from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from made_up_scores import GLIOMA, ID, SHAPE, Shifted, entry_of, prepared_store, tumour, write_folder
from numpy.typing import NDArray

from medmap.core.labels import SCHEMES
from medmap.core.metrics import METRICS
from medmap.core.volume import from_ras
from medmap.data.nifti import read_labels, write_mask, write_volume
from medmap.data.store import Store
from medmap.errors import InputError
from medmap.evaluate import evaluate_cases
from medmap.masks import score_folders
from medmap.scores import read_scores

IDS = [ID.format(number) for number in range(3)]
LPS = np.array([[-2.0, 0, 0, 30], [0, -2.0, 0, 20], [0, 0, 2.0, -5], [0, 0, 0, 1]])
ELSEWHERE = np.array([[1, 0, 0, 0.01], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ LPS


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three patients as BraTS 2023 stores them, in LPS; the last has no enhancing tumour."""
    cases = {case: tumour(enhancing=case != IDS[2]) for case in IDS}
    return write_folder(tmp_path_factory.mktemp("masks") / "truth", cases, affine=LPS)


@pytest.fixture(scope="module")
def store(truth: Path) -> Store:
    return prepared_store(truth)


@pytest.fixture(scope="module")
def moved(truth: Path) -> dict[str, NDArray[np.uint8]]:
    """Codes of every case, one voxel further along the file's first axis, with less enhancement than is believed."""
    codes = {case: np.roll(read_labels(segmentation(truth, case))[0], 1, axis=0) for case in IDS}
    codes[IDS[2]][10:13, 8:11, 10:12] = 3
    return codes


def segmentation(root: Path, case: str) -> Path:
    return root / case / f"{case}-seg.nii.gz"


def write_masks(
    out: Path, truth: Path, codes: dict[str, NDArray[np.uint8]], name: Callable[[str], str] = "{}.nii.gz".format
) -> Path:
    out.mkdir()
    for case, mask in codes.items():
        (out / name(case)).parent.mkdir(exist_ok=True)
        write_mask(out / name(case), mask, segmentation(truth, case))
    return out


def means(summary: dict[str, object], metric: str = "dice") -> dict[str, float]:
    rows = summary["rows"]
    assert isinstance(rows, list)
    return {row["region"]: row["mean"] for row in rows if row["metric"] == metric}


def test_masks_on_disk_score_as_they_did_in_memory(truth: Path, store: Store, tmp_path: Path) -> None:
    predictor = Shifted(step=1)
    out = tmp_path / "masks"
    out.mkdir()
    subset = predictor.card.modalities.parse("t1n+t2f")
    for case in IDS:
        prepared = store.load(case)
        (answer,) = predictor.answers(prepared, [subset])
        upright = answer.on_grid(prepared.grid.shape).argmax(axis=0)
        stored = from_ras(GLIOMA.decode(upright), prepared.native)
        write_mask(out / f"{case}.nii.gz", stored, segmentation(truth, case))
    score_folders(out, truth, out=tmp_path / "scores")
    rows = read_scores(tmp_path / "scores" / "subsets.csv")
    on_disk = {(r.case, r.patient, r.region, r.metric): r.value for r in rows}
    rows = [row for row in evaluate_cases(predictor, store, IDS) if row.subset == str(subset)]
    in_memory = {(r.case, r.patient, r.region, r.metric): r.value for r in rows if r.metric in METRICS}
    assert len(on_disk) == 3 * 4 * len(METRICS)
    assert on_disk.keys() == in_memory.keys()
    for key, value in in_memory.items():
        assert on_disk[key] == pytest.approx(value, rel=1e-5), key
    assert on_disk[IDS[0], "BraTS-GLI-00000", "WT", "dice"] == 6 / 8


@pytest.mark.parametrize(
    "name",
    ["{}.nii.gz", "{}-seg.nii.gz", "{}_seg.nii.gz", "{}.nii", "{0}/{0}-seg.nii.gz"],
)
def test_names_of_masks(truth: Path, moved: dict[str, NDArray[np.uint8]], tmp_path: Path, name: str) -> None:
    out = write_masks(tmp_path / "masks", truth, moved, name.format)
    if "seg" in name:  # images beside the masks are none
        shutil.copy(truth / IDS[0] / f"{IDS[0]}-t1n.nii.gz", out)
    told: list[tuple[str, int, int]] = []
    summary = score_folders(out, truth, on_progress=lambda *words: told.append(words))  # type: ignore[arg-type]
    assert told == [(case, number, 3) for number, case in enumerate(IDS, start=1)]
    found = means(summary)
    assert found["WT"] == pytest.approx(7 / 8)
    assert found["ET"] == pytest.approx((7 / 8 + 7 / 8 + 0) / 3)
    assert found["ET-pp"] == pytest.approx((7 / 8 + 7 / 8 + 1) / 3)  # 18 voxels of 8 mm³ are no enhancement
    assert summary["evaluated"] == "masks of masks against truth"
    assert summary["modalities"] == ["given"]
    assert entry_of(summary["present"], region="ET", subset="given")["n"] == 2


def test_the_smallest_enhancement_to_believe_can_be_named(
    truth: Path, moved: dict[str, NDArray[np.uint8]], tmp_path: Path
) -> None:
    out = write_masks(tmp_path / "masks", truth, moved)
    found = means(score_folders(out, truth, et_min_ml=0.1, convention="nan"))
    assert found["ET-pp"] == found["ET"] == pytest.approx((7 / 8 + 7 / 8 + 0) / 3)


def test_truth_may_be_a_folder_of_masks(truth: Path, moved: dict[str, NDArray[np.uint8]], tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for case in IDS:
        shutil.copy(segmentation(truth, case), alone / f"{case}.nii.gz")
    masks = write_masks(tmp_path / "masks", truth, moved)
    assert means(score_folders(masks, alone, "brats2023")) == means(score_folders(masks, truth))
    with pytest.raises(InputError, match=r"alone: found 3 NIfTI files .* needs the meaning of its codes: --labels"):
        score_folders(masks, alone)
    with pytest.raises(InputError, match="label scheme 'tumours' is not known"):
        score_folders(masks, alone, "tumours")


def test_codes_of_masks_and_truth_may_differ(truth: Path, moved: dict[str, NDArray[np.uint8]], tmp_path: Path) -> None:
    older = {case: SCHEMES["brats2021"].decode(GLIOMA.encode(codes)) for case, codes in moved.items()}
    new, old = write_masks(tmp_path / "new", truth, moved), write_masks(tmp_path / "old", truth, older)
    expected = score_folders(new, truth)
    assert score_folders(old, truth, prediction_labels="brats2021")["rows"] == expected["rows"]
    with pytest.raises(InputError, match=r"00000-000\.nii\.gz: found label 4; scheme brats2023 knows"):
        score_folders(old, truth)
    with pytest.raises(InputError, match="label schemes brats2024 and brats2023 mean other classes"):
        score_folders(new, truth, prediction_labels="brats2024")


def test_codes_are_those_that_medmap_wrote_beside_a_mask(
    truth: Path, moved: dict[str, NDArray[np.uint8]], tmp_path: Path
) -> None:
    expected = score_folders(write_masks(tmp_path / "new", truth, moved), truth)
    msd, ours = SCHEMES["msd"], SCHEMES["brats2023"]
    old = write_masks(tmp_path / "old", truth, {c: msd.decode(ours.encode(mask, c)) for c, mask in moved.items()})
    for case in IDS:
        (old / f"{case}.medmap.json").write_text(json.dumps({"labels": {"scheme": "msd"}}))
    assert score_folders(old, truth)["rows"] == expected["rows"]
    (old / f"{IDS[0]}.medmap.json").write_text(json.dumps({"labels": {"scheme": "brats2023"}}))
    with pytest.raises(InputError, match=r"masks follow different label maps: brats2023 .*, msd .* --pred-labels"):
        score_folders(old, truth)


def test_names_that_medmap_wrote_encoded_are_read_so(tmp_path: Path) -> None:
    case = "Müller+1"
    labels = np.zeros(SHAPE, np.uint8)
    labels[4:8, 4:8, 4:8] = 2
    for folder, name in (("truth", case), ("masks", "M%C3%BCller%2B1")):
        (tmp_path / folder).mkdir()
        write_volume(tmp_path / folder / f"{name}.nii.gz", labels, LPS)
    found = score_folders(tmp_path / "masks", tmp_path / "truth", "brats2023")
    assert entry_of(found["rows"], subset="given", region="WT", metric="dice")["mean"] == 1


def test_a_case_without_a_mask_is_refused(truth: Path, moved: dict[str, NDArray[np.uint8]], tmp_path: Path) -> None:
    out = write_masks(tmp_path / "masks", truth, moved)
    (out / f"{IDS[1]}.nii.gz").rename(out / "other.nii.gz")
    with pytest.raises(InputError, match=r"no mask for 1 of 3 cases \(BraTS-GLI-00001-000\); expected ID\.nii\.gz"):
        score_folders(out, truth)


def test_a_mask_without_a_case_is_not_asked_for(
    truth: Path, moved: dict[str, NDArray[np.uint8]], tmp_path: Path
) -> None:
    out = write_masks(tmp_path / "masks", truth, moved)
    shutil.copy(out / f"{IDS[1]}.nii.gz", out / "other.nii.gz")
    assert score_folders(out, truth)["cases"] == 3


@pytest.mark.parametrize(
    ("shape", "affine"),
    [
        (SHAPE, ELSEWHERE),
        ((24, 20, 17), LPS),
        (SHAPE, np.diag([2, 2, 2, 1.0])),
    ],
)
def test_unequal_grids_are_refused_with_both_names(
    truth: Path, moved: dict[str, NDArray[np.uint8]], tmp_path: Path, shape: tuple[int, int, int], affine: np.ndarray
) -> None:
    out = write_masks(tmp_path / "masks", truth, moved)
    write_volume(out / f"{IDS[0]}.nii.gz", np.zeros(shape, np.uint8), affine)
    with pytest.raises(InputError, match=rf"{IDS[0]}\.nii\.gz \(.*\) and .*{IDS[0]}-seg\.nii\.gz \(.* not on one grid"):
        score_folders(out, truth)


def test_folders_that_hold_nothing_to_score(truth: Path, moved: dict[str, NDArray[np.uint8]], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such folder; expected one that holds a mask a case"):
        score_folders(tmp_path / "nowhere", truth)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no NIfTI file in it"):
        score_folders(tmp_path / "empty", truth)
    out = write_masks(tmp_path / "masks", truth, moved)
    shutil.copy(out / f"{IDS[0]}.nii.gz", out / f"{IDS[0]}-seg.nii.gz")
    shutil.copy(out / f"{IDS[0]}.nii.gz", out / f"{IDS[0]}_seg.nii.gz")
    with pytest.raises(InputError, match=f"are both masks of {IDS[0]}; keep one"):
        score_folders(out, truth)
    (out / f"{IDS[0]}-seg.nii.gz").unlink()
    (out / f"{IDS[0]}_seg.nii.gz").unlink()
    bare = write_folder(tmp_path / "bare", {IDS[0]: None})
    with pytest.raises(InputError, match="bare: no segmentation in it; name a folder of masks"):
        score_folders(out, bare)
    undecided = write_folder(tmp_path / "undecided", {"somebody": tumour()})
    with pytest.raises(InputError, match="which label map the codes follow is undecided; name it with --labels"):
        score_folders(out, undecided)


def test_the_table_is_written_where_it_is_asked_for(
    truth: Path, moved: dict[str, NDArray[np.uint8]], tmp_path: Path
) -> None:
    masks = write_masks(tmp_path / "masks", truth, moved)
    summary = score_folders(masks, truth, out=tmp_path / "deep" / "scores")
    assert json.loads((tmp_path / "deep" / "scores" / "summary.json").read_text()) == summary
    assert not list(masks.glob("*.csv"))
