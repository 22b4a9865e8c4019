from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up_scores import (
    BRAIN,
    GLIOMA,
    ID,
    SHAPE,
    card_of,
    prepared_store,
    tumour,
    write_folder,
    write_image,
    write_made_up_run,
)
from scipy import ndimage

from medmap.baseline import (
    THRESHOLDS,
    bright_tumour,
    choose_threshold,
    evaluate_baseline,
    robust_flair,
)
from medmap.core.labels import LabelScheme
from medmap.core.metrics import METRICS, dice
from medmap.core.modality import ModalitySet
from medmap.data.layouts import read_case, recognise
from medmap.data.preprocess import prepare_case
from medmap.data.store import Store
from medmap.errors import CheckpointError, InputError
from medmap.scores import read_scores

IDS = [ID.format(number) for number in range(4)]
NAME = "flair-threshold"


def flair(codes: np.ndarray, brightness: float) -> np.ndarray:
    """Tissue of N(100, 10) inside the brain; the tumour is ``brightness`` standard deviations brighter."""
    image = np.zeros(SHAPE, np.float32)
    image[BRAIN.slices] = np.random.default_rng(0).normal(100, 10, BRAIN.shape)
    return (image + 10 * brightness * (codes > 0)).astype(np.float32)


def data_of(root: Path, codes: dict[str, np.ndarray], brightness: dict[str, float]) -> Store:
    """Patients with a FLAIR only."""
    folder = write_folder(root, codes, dict.fromkeys(codes, ("t2f",)))
    for case, by in brightness.items():
        write_image(root / case / f"{case}-t2f.nii.gz", flair(tumour(), by), np.diag([2.0, 2.0, 2.0, 1.0]))
    return prepared_store(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    root = tmp_path_factory.mktemp("baseline") / "cases"
    brightness = dict(zip(IDS, (2.5, 3.0, 2.5, 3.5), strict=True))
    return data_of(root, dict.fromkeys(IDS, tumour()), brightness)


# ---- the score and the mask ----------------------------------------------------------------------------------------


def test_robust_score_is_worked_by_hand() -> None:
    image = np.zeros((9, 9, 9))
    image[2:7, 2:7, 2:7] = np.arange(1, 126).reshape(5, 5, 5)
    score = robust_flair(image)
    assert score.dtype == np.float32
    assert not score[image == 0].any()
    # 1 … 125: median 63, median of |x − 63| is 31
    plain = np.where(image != 0, (image - 63) / (1.4826 * 31), 0)
    smoothed = ndimage.gaussian_filter(plain, 1.0)
    np.testing.assert_allclose(score[image != 0], smoothed[image != 0], atol=1e-5)


def test_robust_score_does_not_know_the_scanner_s_units() -> None:
    image = flair(tumour(), 3.0)
    other = np.where(image != 0, 7 * image + 40, 0)
    np.testing.assert_allclose(robust_flair(other), robust_flair(image), atol=1e-4)


def test_an_image_of_one_value_has_no_bright_part() -> None:
    score = robust_flair(np.pad(np.full((4, 4, 4), 5.0), 1))
    assert not score.any()
    assert not bright_tumour(score, 0.5).any()


def test_the_largest_component_is_kept_and_crumbs_are_opened_away() -> None:
    score = np.zeros((20, 12, 12), np.float32)
    score[1:4, 2:5, 2:5] = 2  # 27 voxels
    score[8:14, 2:8, 2:8] = 2  # 216 voxels
    score[16, 9, 9] = 9  # a crumb
    found = bright_tumour(score, 1.0)
    expected = np.zeros_like(found)
    expected[8:14, 2:8, 2:8] = True
    faces = ndimage.generate_binary_structure(3, 1)
    np.testing.assert_array_equal(found, ndimage.binary_opening(expected, faces))
    assert not bright_tumour(score, 2.0).any()  # above, not at
    crumbs = np.zeros((9, 9, 9), np.float32)
    crumbs[2, 2, 2] = crumbs[6, 6, 6] = 3
    assert not bright_tumour(crumbs, 1.0).any()


def test_parts_that_touch_by_an_edge_only_are_two() -> None:
    score = np.zeros((16, 16, 9), np.float32)
    score[1:8, 1:8, 1:8] = 2
    score[8:13, 8:13, 1:8] = 2
    found = bright_tumour(score, 1.0)
    assert found[4, 4, 4]
    assert not found[10, 10, 4]


# ---- the threshold -------------------------------------------------------------------------------------------------


def test_the_threshold_is_the_best_on_the_cases_that_are_named(store: Store) -> None:
    chosen = choose_threshold(store, IDS[:2], GLIOMA)
    assert chosen in THRESHOLDS
    means = {}
    for threshold in THRESHOLDS:
        values = []
        for case in IDS[:2]:
            prepared = store.load(case)
            assert prepared.labels is not None
            box = prepared.images["t2f"].box
            mask = bright_tumour(robust_flair(np.asarray(prepared.images["t2f"].values, np.float32)), threshold)
            values.append(dice(mask, prepared.labels.window(box) > 0))
        means[threshold] = np.mean(values)
    assert means[chosen] == max(means.values())
    assert means[chosen] > 0.8
    assert min(means.values()) < means[chosen]


def test_the_lowest_of_equal_thresholds(tmp_path: Path) -> None:
    codes = {IDS[0]: tumour() * 0}
    store = data_of(tmp_path / "c", codes, {IDS[0]: 3.0})
    # nothing is true, so every threshold that finds nothing scores 1
    score = robust_flair(np.asarray(store.load(IDS[0]).images["t2f"].values, np.float32))
    found = [bool(bright_tumour(score, threshold).any()) for threshold in THRESHOLDS]
    assert found[0]
    assert choose_threshold(store, [IDS[0]], GLIOMA) == THRESHOLDS[found.index(False)]


def test_test_labels_have_no_say(store: Store, tmp_path: Path) -> None:
    brightness = dict(zip(IDS, (2.5, 3.0, 2.5, 3.5), strict=True))
    # that nothing is true in three patients would make a threshold the best that finds nothing
    other = data_of(tmp_path / "other", {case: tumour() * (case == IDS[0]) for case in IDS}, brightness)
    assert choose_threshold(other, IDS, GLIOMA) != choose_threshold(store, IDS[:1], GLIOMA)
    said, scores = [], []
    for name, data in (("a", store), ("b", other)):
        run = write_made_up_run(tmp_path / name, data, IDS[1:], IDS[:1])
        out = evaluate_baseline(NAME, run)
        assert out == run / "baseline-flair-threshold"
        said.append(json.loads((out / "summary.json").read_text())["evaluated"])
        scores.append([row.value for row in read_scores(out / "subsets.csv") if row.metric == "dice"])
    assert said[0] == said[1]
    assert said[0] == f"T2-FLAIR threshold chosen on training folds: {choose_threshold(store, IDS[:1], GLIOMA):g}"
    assert min(scores[0]) > 0.8
    assert max(scores[1]) == 0


# ---- tables --------------------------------------------------------------------------------------------------------


def test_folds_are_scored_with_a_threshold_each(store: Store, tmp_path: Path) -> None:
    for fold in range(2):
        test = IDS[2 * fold : 2 * fold + 2]
        write_made_up_run(tmp_path / f"fold{fold}", store, test, [case for case in IDS if case not in test])
    rows = read_scores(evaluate_baseline(NAME, tmp_path) / "subsets.csv")
    assert [(row.case, row.metric) for row in rows] == [(case, metric) for case in IDS for metric in METRICS]
    assert {(row.subset, row.region) for row in rows} == {("t2f", "WT")}
    summary = json.loads((tmp_path / "baseline-flair-threshold" / "summary.json").read_text())
    thresholds = [choose_threshold(store, ids, GLIOMA) for ids in (IDS[2:], IDS[:2])]
    assert summary["evaluated"].endswith(f": {thresholds[0]:g}, {thresholds[1]:g}")
    assert (summary["cases"], summary["runs"], summary["regions"]) == (4, 2, ["WT"])


def test_other_patients_get_the_median_threshold(store: Store, tmp_path: Path) -> None:
    run = write_made_up_run(tmp_path / "run", store, IDS[:1], IDS[1::2])  # of other brightness than the others
    others = data_of(tmp_path / "others", dict.fromkeys(IDS[:2], tumour()), {IDS[0]: 2.5, IDS[1]: 4.0})
    out = evaluate_baseline(NAME, run, data=others, data_name="ward")
    assert out == run / "on-ward" / "baseline-flair-threshold"
    rows = [row for row in read_scores(out / "subsets.csv") if row.metric == "dice"]
    assert [row.case for row in rows] == IDS[:2]
    own = read_scores(evaluate_baseline(NAME, run) / "subsets.csv")
    assert own[0] == read_scores(out / "subsets.csv")[0]


def test_patients_who_chose_the_threshold_are_no_other_patients(store: Store, tmp_path: Path) -> None:
    run = write_made_up_run(tmp_path / "run", store, IDS[:1], IDS[1:])
    with pytest.raises(InputError, match=r"\d of its 4 cases, such as .* are of those that .*run learned from"):
        evaluate_baseline(NAME, run, data=store)
    alone = write_made_up_run(tmp_path / "alone", store, [], IDS)
    with pytest.raises(InputError, match="alone: its division alone has no test part; name patients with --data"):
        evaluate_baseline(NAME, alone)


def test_what_the_floor_refuses(store: Store, tmp_path: Path) -> None:
    run = write_made_up_run(tmp_path / "run", store, IDS[:1], IDS[1:])
    with pytest.raises(InputError, match="baseline 'magic' is not known; expected flair-threshold"):
        evaluate_baseline("magic", run)
    without = prepared_store(write_folder(tmp_path / "t1", {IDS[0]: tumour()}, {IDS[0]: ("t1n", "t2w")}))
    with pytest.raises(InputError, match="case BraTS-GLI-00000-000 has t1n, t2w; expected t2f"):
        evaluate_baseline(NAME, run, data=without)
    with pytest.raises(InputError, match="has no T2-FLAIR or no segmentation"):
        choose_threshold(without, IDS[:1], GLIOMA)
    bare = prepared_store(write_folder(tmp_path / "bare", {IDS[0]: None}))
    with pytest.raises(InputError, match="label scheme none"):
        evaluate_baseline(NAME, run, data=bare)
    other = prepared_store(write_folder(tmp_path / "rc", {IDS[0]: tumour()}), labels="brats2024")
    with pytest.raises(InputError, match="label scheme brats2024"):
        evaluate_baseline(NAME, run, data=other)
    lesions = LabelScheme("ms", ("background", "lesion"), {"lesion": 1}, {"L": ("lesion",)})
    odd = write_made_up_run(tmp_path / "odd", store, IDS[:1], IDS[1:], card_of(ModalitySet(("t2f",)), lesions))
    with pytest.raises(InputError, match=r"finds WT; the labels of .*odd have L"):
        evaluate_baseline(NAME, odd)
    for seed in range(2):
        write_made_up_run(tmp_path / "seeds" / f"seed{seed}", store, IDS[:1], IDS[1:])
    with pytest.raises(CheckpointError, match="both have case BraTS-GLI-00000-000 in their test part"):
        evaluate_baseline(NAME, tmp_path / "seeds")


def test_on_real_patients_a_threshold_of_one_and_a_quarter_finds_three_quarters(real_data: Path) -> None:
    values = []
    for folder in ("ssa-2mm", "brats2021-2mm"):
        for files in recognise(real_data / folder).cases:
            case = read_case(replace(files, images={"t2f": files.images["t2f"]}))
            prepared = prepare_case(case, files.scheme)
            assert prepared.labels is not None
            assert files.scheme is not None
            box = prepared.images["t2f"].box
            mask = bright_tumour(robust_flair(np.asarray(prepared.images["t2f"].values, np.float32)), 1.25)
            values.append(dice(mask, files.scheme.region_mask(prepared.labels.window(box), "WT")))
    assert len(values) == 32
    assert np.mean(values) == pytest.approx(0.76, abs=0.01)
