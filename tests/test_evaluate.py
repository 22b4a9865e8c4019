from __future__ import annotations

import csv
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_network import made_up_prepared
from made_up_scores import (
    BRAIN,
    GLIOMA,
    ID,
    TUMOUR,
    Shifted,
    answer_of,
    card_of,
    entry_of,
    head,
    prepared_store,
    scored,
    tumour,
    write_folder,
    write_made_up_run,
)

from medmap.core.box import Box, Boxed
from medmap.core.labels import SCHEMES, LabelScheme
from medmap.core.metrics import METRICS
from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.core.stats import bootstrap_interval
from medmap.core.temperature import Voxels
from medmap.data.store import Store
from medmap.errors import CheckpointError, InputError
from medmap.evaluate import VOXELS, evaluate, evaluate_cases, on_common_box, run_store, score_case
from medmap.scores import (
    Score,
    read_scores,
    read_voxels,
    score_classes,
    subset_groups,
    summarise,
    table_text,
    write_scores,
    write_voxels,
)

NAN = float("nan")
TWO = ModalitySet(("t1c", "t2f"))
ABOUT = {"evaluated": "made-up cases", "convention": "brats"}
ONE_MM = (1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Four patients; the second was never given contrast agent nor a FLAIR, the third has no enhancing tumour."""
    cases = {ID.format(0): tumour(), ID.format(1): tumour(), ID.format(2): tumour(enhancing=False)}
    cases[ID.format(3)] = tumour()
    folder = tmp_path_factory.mktemp("evaluate") / "cases"
    return prepared_store(write_folder(folder, cases, {ID.format(1): ("t1n", "t2w")}))


@pytest.fixture
def shifted_runs(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every run answers as `Shifted` does; returns the list of folders that were loaded."""
    loaded: list[Path] = []

    def load(path: Path, **_: object) -> Shifted:
        loaded.append(path)
        return Shifted()

    monkeypatch.setattr("medmap.evaluate.Predictor.load", load)
    return loaded


# ---- one class map against another -------------------------------------------------------------------------------


def classes_with_et(voxels: int, instead_of: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Truth: a cube of 1000 necrotic voxels. Prediction: the same, its first ``voxels`` called enhancing."""
    truth = np.zeros((16, 12, 12), np.uint8)
    truth[2:12, 1:11, 1:11] = instead_of
    predicted = truth.copy()
    predicted[np.unravel_index(np.flatnonzero(truth)[:voxels], truth.shape)] = 3
    return predicted, truth


def test_small_enhancement_that_is_not_there_is_dropped_and_the_core_stays() -> None:
    scores = score_classes(*classes_with_et(100), ONE_MM, GLIOMA)
    assert set(scores) == {(region, metric) for region in ("WT", "TC", "ET", "ET-pp") for metric in METRICS}
    assert (scores["ET", "dice"], scores["ET", "hd95_mm"], scores["ET", "predicted_ml"]) == (0, 373.13, 0.1)
    assert (scores["ET-pp", "dice"], scores["ET-pp", "hd95_mm"], scores["ET-pp", "predicted_ml"]) == (1, 0, 0)
    assert (scores["TC", "dice"], scores["TC", "predicted_ml"], scores["WT", "dice"]) == (1, 1, 1)


@pytest.mark.parametrize(
    ("voxels", "spacing_mm", "et_min_ml", "kept_ml"),
    [
        (499, ONE_MM, 0.5, 0),
        (500, ONE_MM, 0.5, 0.5),
        (100, (2.0, 2.0, 1.0), 0.5, 0),
        (100, (2.0, 2.0, 2.0), 0.5, 0.8),
        (3, ONE_MM, 0.0, 0.003),
    ],
)
def test_small_is_a_matter_of_ml(voxels: int, spacing_mm: Any, et_min_ml: float, kept_ml: float) -> None:
    scores = score_classes(*classes_with_et(voxels), spacing_mm, GLIOMA, et_min_ml=et_min_ml)
    assert scores["ET-pp", "predicted_ml"] == pytest.approx(kept_ml)
    assert scores["ET", "predicted_ml"] == pytest.approx(voxels * np.prod(spacing_mm) / 1000)


def test_enhancement_that_was_dropped_wrongly_counts_as_missed() -> None:
    predicted, _ = classes_with_et(100)
    scores = score_classes(predicted, predicted, ONE_MM, GLIOMA)
    assert (scores["ET", "dice"], scores["ET-pp", "dice"]) == (1, 0)


def test_a_scheme_without_enhancement_has_no_second_column() -> None:
    scheme = LabelScheme("lesion", ("background", "lesion"), {"lesion": 1}, {"L": ("lesion",)})
    truth = classes_with_et(0)[1]
    scores = score_classes(truth, truth, ONE_MM, scheme, convention="nan")
    assert {region for region, _ in scores} == {"L"}
    assert np.isnan(score_classes(truth & 0, truth & 0, ONE_MM, scheme, convention="nan")["L", "dice"])


# ---- cases of a store --------------------------------------------------------------------------------------------


def dice_by_subset(rows: list[Score], case: str, region: str = "WT") -> dict[str, float]:
    return {r.subset: r.value for r in rows if (r.case, r.region, r.metric) == (case, region, "dice")}


def test_every_subset_of_what_a_case_has(store: Store) -> None:
    told: list[tuple[str, int, int]] = []
    ids = (ID.format(0), ID.format(1))
    rows = evaluate_cases(Shifted(), store, ids, on_progress=lambda *words: told.append(words))  # type: ignore[arg-type]
    assert told == [(ids[0], 1, 2), (ids[1], 2, 2)]
    # a cube of 8 voxels an edge, k sequences missing: k voxels to the right
    expected = {str(s): 1 - (4 - len(s)) / 8 for s in GLIOMA_MRI.subsets()}
    assert dice_by_subset(rows, ids[0]) == expected
    assert dice_by_subset(rows, ids[1]) == {"t1n": 5 / 8, "t2w": 5 / 8, "t1n+t2w": 6 / 8}
    assert {row.patient for row in rows} == {"BraTS-GLI-00000", "BraTS-GLI-00001"}
    assert len([row for row in rows if row.metric in METRICS]) == (15 + 3) * 4 * len(METRICS)
    volumes = {r.value for r in rows if (r.region, r.metric) == ("WT", "truth_ml")}
    assert volumes == {512 * 8 / 1000}


def test_a_convention_reaches_the_metrics(store: Store) -> None:
    case = ID.format(2)
    assert dice_by_subset(evaluate_cases(Shifted(step=0), store, [case]), case, "ET") == dict.fromkeys(
        map(str, GLIOMA_MRI.subsets()), 1.0
    )
    undefined = dice_by_subset(evaluate_cases(Shifted(step=0), store, [case], convention="nan"), case, "ET")
    assert np.isnan(list(undefined.values())).all()


def test_truth_beyond_the_brain_of_a_subset_is_missed(tmp_path: Path) -> None:
    half = Box(BRAIN.start, ((TUMOUR.start[0] + TUMOUR.stop[0]) // 2, *BRAIN.stop[1:]))
    folder = write_folder(tmp_path / "c", {ID.format(0): tumour()}, images={"t1n": head(half)})
    rows = evaluate_cases(Shifted(step=0), prepared_store(folder), [ID.format(0)])
    found = dice_by_subset(rows, ID.format(0))
    assert found.pop("t1n") == pytest.approx(2 * 0.5 / 1.5)  # half is found, nothing is invented
    assert set(found.values()) == {1.0}


def test_what_a_network_says_beyond_the_grid_is_in_no_mask_and_not_scored() -> None:
    prepared = made_up_prepared(
        {"t2f": Box((1, 1, 1), (5, 5, 5))}, (6, 6, 6), Boxed(np.ones((2, 2, 2), np.uint8), Box((4, 4, 4), (6, 6, 6)))
    )
    everywhere = answer_of(ModalitySet(("t2f",)), Boxed(np.ones((8, 8, 8), np.uint8), Box((0, 0, 0), (8, 8, 8))))
    predicted, truth = on_common_box(everywhere, prepared)
    np.testing.assert_array_equal(predicted, everywhere.on_grid(prepared.grid.shape).argmax(axis=0))
    assert truth.shape == predicted.shape
    assert truth.sum() == 8


def test_truth_without_a_voxel_and_truth_that_does_not_exist() -> None:
    box = Box((1, 1, 1), (3, 3, 3))
    answer = answer_of(ModalitySet(("t2f",)), Boxed(np.full((2, 2, 2), 2, np.uint8), box))
    nothing = made_up_prepared({"t2f": box}, (6, 6, 6), Boxed.tight(np.zeros((6, 6, 6), np.uint8)))
    predicted, truth = on_common_box(answer, nothing)
    assert ((predicted == 2).sum(), truth.sum()) == (8, 0)
    with pytest.raises(InputError, match="case made-up has no segmentation to be compared with; leave it out"):
        on_common_box(answer, made_up_prepared({"t2f": box}, (6, 6, 6)))


def test_codes_may_differ_but_classes_may_not(tmp_path: Path) -> None:
    codes = tumour()
    codes[codes == 3] = 4
    store = prepared_store(write_folder(tmp_path / "c", {"patient": codes}), labels="brats2021")
    assert store.scheme is not None
    assert store.scheme.codes["et"] == 4
    rows = evaluate_cases(Shifted(step=0), store, ["patient"])
    assert set(dice_by_subset(rows, "patient", "ET").values()) == {1.0}
    after_treatment = Shifted(card_of(scheme=SCHEMES["brats2024"]))
    with pytest.raises(InputError, match=r"label scheme brats2021 \[.*'et'\]; the model knows brats2024 \[.*'rc'\]"):
        evaluate_cases(after_treatment, store, ["patient"])


def test_what_cannot_be_scored_is_refused_before_any_work(store: Store, tmp_path: Path) -> None:
    idle = Shifted()
    idle.answers = None  # type: ignore[assignment]
    every = (ID.format(0), ID.format(1))
    bare = prepared_store(write_folder(tmp_path / "bare", {ID.format(0): None}))
    with pytest.raises(InputError, match="label scheme none; the model knows brats2023"):
        evaluate_cases(idle, bare, bare.ids)
    some = prepared_store(write_folder(tmp_path / "some", {ID.format(0): tumour(), ID.format(7): None}))
    with pytest.raises(InputError, match="case BraTS-GLI-00007-000 has no segmentation"):
        evaluate_cases(idle, some, some.ids)
    idle.card = card_of(TWO)
    with pytest.raises(InputError, match=r"case BraTS-GLI-00001-000 has t1n, t2w; expected t1c or t2f\."):
        evaluate_cases(idle, store, every)
    idle.card = card_of(spacing_mm=1.0)
    with pytest.raises(InputError, match=r"voxels of 2 mm; the model was trained at 1 mm\. .* --spacing 1$"):
        evaluate_cases(idle, store, every)


def test_a_network_of_no_fixed_spacing_takes_any(store: Store) -> None:
    case = ID.format(1)
    assert evaluate_cases(Shifted(card_of(spacing_mm=None)), store, [case]) == evaluate_cases(Shifted(), store, [case])


# ---- means -------------------------------------------------------------------------------------------------------


def small_table() -> list[Score]:
    """Cases a and b are two scans of patient p; c has no TC; d was never given contrast agent."""
    dice = {
        "a": {"t1c": 0.2, "t2f": 0.4, "t1c+t2f": 0.6},
        "b": {"t1c": 0.4, "t2f": 0.6, "t1c+t2f": 0.8},
        "c": {"t1c": 0.9, "t2f": 0.2, "t1c+t2f": 1.0},
        "d": {"t2f": 0.5},
    }
    rows: list[Score] = []
    for case, by_subset in dice.items():
        patient = "p" if case in "ab" else case
        for subset, value in by_subset.items():
            rows += scored(case, subset, "WT", patient, dice=value, truth_ml=9.0)
            rows += scored(case, subset, "TC", patient, dice=value / 2, truth_ml=0.0 if case == "c" else 3.0)
    return rows


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    return summarise(small_table(), TWO, GLIOMA, about=ABOUT)


def test_summary_says_over_whom(summary: dict[str, Any]) -> None:
    assert (summary["cases"], summary["patients"]) == (4, 3)
    assert (summary["modalities"], summary["regions"]) == (["t1c", "t2f"], ["WT", "TC"])
    assert summary["evaluated"] == "made-up cases"
    assert len(summary["rows"]) == 3 * 2 * len(METRICS)
    assert len(summary["groups"]) == 3 * 2 * len(METRICS)


@pytest.mark.parametrize(
    ("subset", "mean", "median", "n"), [("t1c", 0.5, 0.4, 3), ("t2f", 0.425, 0.45, 4), ("t1c+t2f", 0.8, 0.8, 3)]
)
def test_means_of_rows(summary: dict[str, Any], subset: str, mean: float, median: float, n: int) -> None:
    row = entry_of(summary["rows"], subset=subset, region="WT", metric="dice")
    assert row["mean"] == pytest.approx(mean)
    assert row["median"] == pytest.approx(median)
    assert (row["n"], row["undefined"]) == (n, 4 - n)
    assert row["low"] <= mean <= row["high"]


@pytest.mark.parametrize(
    ("group", "mean", "n"),
    [
        ("all subsets", np.mean([0.4, 0.6, 0.7]), 3),  # a case without t1c has no mean over all subsets
        ("with t1c", np.mean([0.4, 0.6, 0.95]), 3),
        ("without t1c", np.mean([0.4, 0.6, 0.2, 0.5]), 4),
    ],
)
def test_means_of_groups(summary: dict[str, Any], group: str, mean: float, n: int) -> None:
    entry = entry_of(summary["groups"], group=group, region="WT", metric="dice")
    assert entry["mean"] == pytest.approx(mean)
    assert (entry["n"], entry["undefined"]) == (n, 4 - n)


def test_two_scans_of_a_patient_are_drawn_together(summary: dict[str, Any]) -> None:
    row = entry_of(summary["rows"], subset="t2f", region="WT", metric="dice")
    interval = bootstrap_interval([0.4, 0.6, 0.2, 0.5], ["p", "p", "c", "d"])
    assert (row["low"], row["high"]) == (interval.low, interval.high)
    apart = bootstrap_interval([0.4, 0.6, 0.2, 0.5])
    assert (row["low"], row["high"]) != (apart.low, apart.high)


def test_who_has_the_region(summary: dict[str, Any]) -> None:
    assert {row["region"] for row in summary["present"]} == {"TC"}  # everybody has WT
    assert {row["metric"] for row in summary["present"]} == {"dice"}
    row = entry_of(summary["present"], subset="t2f")
    assert row["mean"] == pytest.approx(np.mean([0.2, 0.3, 0.25]))
    assert row["n"] == 3
    group = entry_of(summary["present"], group="all subsets")
    assert group["mean"] == pytest.approx(np.mean([0.2, 0.3]))
    assert (group["n"], group["undefined"]) == (2, 2)


def test_post_processed_enhancement_goes_by_the_enhancement_that_is_there() -> None:
    rows = scored("a", "t1c", "ET", dice=0.5, truth_ml=1.0) + scored("b", "t1c", "ET", dice=0.0, truth_ml=0.0)
    rows += scored("a", "t1c", "ET-pp", dice=0.5, truth_ml=1.0) + scored("b", "t1c", "ET-pp", dice=1.0, truth_ml=0.0)
    summary = summarise(rows, ModalitySet(("t1c",)), GLIOMA, about=ABOUT)
    assert entry_of(summary["rows"], region="ET-pp", metric="dice")["mean"] == 0.75
    assert entry_of(summary["present"], region="ET-pp", subset="t1c")["mean"] == 0.5
    assert summary["regions"] == ["ET"]  # ET-pp is a reading of it


def test_undefined_numbers_are_left_out_and_counted() -> None:
    rows = scored("a", "t2f", "WT", dice=NAN, truth_ml=1.0) + scored("b", "t2f", "WT", dice=0.5, truth_ml=1.0)
    row = entry_of(summarise(rows, TWO, GLIOMA, about=ABOUT)["rows"], subset="t2f", region="WT", metric="dice")
    assert (row["mean"], row["median"], row["n"], row["undefined"]) == (0.5, 0.5, 1, 1)
    assert np.isnan([row["low"], row["high"]]).all()  # one patient says nothing about the spread


def test_data_without_contrast_agent_have_one_group() -> None:
    rows = scored("a", "t2f", "WT", dice=0.5, truth_ml=1.0) + scored("b", "t2f", "WT", dice=0.7, truth_ml=1.0)
    summary = summarise(rows, TWO, GLIOMA, about=ABOUT)
    assert {row["group"] for row in summary["groups"]} == {"all subsets"}
    assert subset_groups(["t1c"]) == {"all subsets": ["t1c"]}
    assert subset_groups(["t1c2", "t1n+t1c"])["without t1c"] == ["t1c2"]


@settings(max_examples=5, deadline=None)
@given(st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=1, max_size=5))
def test_mean_over_subsets_is_the_mean_of_the_rows_where_nobody_lacks_one(values: list[tuple[float, ...]]) -> None:
    rows = [
        row
        for case, numbers in enumerate(values)
        for subset, value in zip(("t1c", "t2f", "t1c+t2f"), numbers, strict=True)
        for row in scored(f"c{case}", subset, "WT", dice=value, truth_ml=1.0)
    ]
    summary = summarise(rows, TWO, GLIOMA, about=ABOUT)
    means = [row["mean"] for row in summary["rows"] if row["metric"] == "dice"]
    group = entry_of(summary["groups"], group="all subsets", metric="dice")
    assert group["mean"] == pytest.approx(np.mean(means))
    assert group["median"] == pytest.approx(np.median(np.mean(values, axis=1)))


# ---- files -------------------------------------------------------------------------------------------------------


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_tables_come_back_as_they_were(store: Store, tmp_path: Path) -> None:
    rows = scored('Müller, "A"', "t1c+t2f", "WT", "p,1", dice=1 / 3, hd95_mm=NAN, truth_ml=12.5)
    returned = write_scores(tmp_path / "new" / "deep", rows, TWO, GLIOMA, "nan", [store], {"evaluated": "x"})
    again = read_scores(tmp_path / "new" / "deep" / "subsets.csv")
    assert [row[:-1] for row in again] == [row[:-1] for row in rows]
    np.testing.assert_allclose([row.value for row in again], [row.value for row in rows], rtol=1e-5)
    text = (tmp_path / "new" / "deep" / "summary.json").read_text(encoding="utf-8")
    summary = json.loads(text, parse_constant=no_constant)
    assert summary == returned
    assert entry_of(summary["rows"], subset="t1c+t2f", metric="hd95_mm")["mean"] is None
    assert (summary["convention"], summary["store"]) == ("nan", {store.path.name: store.sha256})
    assert write_scores(None, rows, TWO, GLIOMA, "nan", [store], {"evaluated": "x"}) == returned


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "holds no score"),
        ("case,patient,subset,region,metric,value\n", "holds no score"),
        ("case,patient,subset,region,metric,value\na,a,t1c,WT,dice\n", "no table of scores"),
        ("case,patient,subset,region,metric,value\na,a,t1c,WT,dice,high\n", "could not convert string to float"),
        ("name,value\na,1\n", "no table of scores"),
        ("case,patient,subset,region,metric,value\n" + "a" * (csv.field_size_limit() + 1), "field larger than"),
    ],
)
def test_files_that_are_no_tables(text: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=rf"t\.csv: .*{found}"):
        read_scores(tmp_path / "t.csv")


def test_voxels_are_written_without_a_second_copy_of_all(tmp_path: Path) -> None:
    answers = [Voxels(f"p{i}", "t2f", np.zeros((4, 2000), np.float16), np.zeros(2000, np.uint8)) for i in range(200)]
    size = sum(answer.log_p.nbytes for answer in answers)
    tracemalloc.start()
    write_voxels(tmp_path, answers)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 0.5 * size


def test_two_stores_of_one_name_stay_two(store: Store, tmp_path: Path) -> None:
    """Or `medmap compare` would take runs on differently prepared data for runs on one."""
    codes = {ID.format(9): tumour()}
    others = [prepared_store(write_folder(tmp_path / place / "cases", codes)) for place in ("a", "b")]
    same_name = [store, *others]
    assert {one.path.name for one in same_name} == {"cases-store"}
    rows = scored("c", "t1c", "WT", dice=0.5)
    summary = write_scores(None, rows, GLIOMA_MRI, GLIOMA, "brats", same_name, {})
    assert summary["store"] == {"cases-store": store.sha256, "cases-store (2)": others[0].sha256}


def test_voxels_come_back_as_they_were(store: Store, tmp_path: Path) -> None:
    case = ID.format(1)
    answers = score_case(Shifted(step=0), store, case).voxels  # type: ignore[arg-type]
    assert {answer.kind for answer in answers} == {"t1n", "t2w", "t1n+t2w"}
    assert all(len(answer.truth) == min(VOXELS, np.prod(BRAIN.shape)) for answer in answers)
    assert all(np.array_equal(answer.log_p.argmax(axis=0), answer.truth) for answer in answers)  # it answers the truth
    write_voxels(tmp_path, answers)
    for one, other in zip(read_voxels(tmp_path / "voxels.npz"), answers, strict=True):
        assert one[:2] == other[:2]
        assert np.array_equal(one.log_p, other.log_p)
        assert np.array_equal(one.truth, other.truth)
    with np.load(tmp_path / "voxels.npz", allow_pickle=False) as held:
        assert (held["log_p"].dtype, held["truth"].dtype) == (np.float16, np.uint8)
        assert np.array_equal(held["log_p"], np.concatenate([answer.log_p for answer in answers], axis=1))
    write_voxels(tmp_path, [])
    with pytest.raises(InputError, match=r"voxels\.npz: no voxels .*; run `medmap evaluate` again"):
        read_voxels(tmp_path / "voxels.npz")


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no\.csv: no table of scores .*; expected one of `medmap evaluate`"):
        read_scores(tmp_path / "no.csv")


# ---- a run, folds, other data ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("shifted_runs")
def test_a_run_is_scored_on_its_own_test_part(store: Store, tmp_path: Path) -> None:
    run = write_made_up_run(tmp_path / "run", store, [ID.format(2)], [ID.format(0)])
    assert evaluate(run, which="last") == run
    assert {row.case for row in read_scores(run / "subsets.csv")} == {ID.format(2)}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["evaluated"] == "test part of run"
    assert (summary["runs"], summary["split_sha256"], summary["checkpoint"]) == (1, ["hash of run"], "last")
    assert summary["store"] == {store.path.name: store.sha256}


def test_folds_are_pooled(store: Store, tmp_path: Path, shifted_runs: list[Path]) -> None:
    parts = ([ID.format(0), ID.format(3)], [ID.format(1)], [ID.format(2)])
    for fold, test in enumerate(parts):
        write_made_up_run(tmp_path / "folds" / f"fold{fold}", store, test)
    assert evaluate(tmp_path / "folds") == tmp_path / "folds"
    assert shifted_runs == [tmp_path / "folds" / f"fold{fold}" for fold in range(3)]
    pooled = read_scores(tmp_path / "folds" / "subsets.csv")
    assert [len({row.case for row in read_scores(run / "subsets.csv")}) for run in shifted_runs] == [2, 1, 1]
    assert pooled == [row for run in shifted_runs for row in read_scores(run / "subsets.csv")]
    summary = json.loads((tmp_path / "folds" / "summary.json").read_text())
    assert (summary["cases"], summary["runs"]) == (4, 3)
    each = [answer for run in shifted_runs for answer in read_voxels(run / "voxels.npz")]
    whole = read_voxels(tmp_path / "folds" / "voxels.npz")
    assert [answer[:2] for answer in whole] == [answer[:2] for answer in each]
    assert all(np.array_equal(one.log_p, other.log_p) for one, other in zip(whole, each, strict=True))
    assert summary["evaluated"] == "test parts of 3 runs, pooled"
    assert entry_of(summary["rows"], subset="t1n+t1c+t2w+t2f", region="WT", metric="dice")["n"] == 3


def test_runs_that_cannot_be_pooled_are_refused_before_any_work(
    store: Store, tmp_path: Path, shifted_runs: list[Path]
) -> None:
    for seed in range(2):
        write_made_up_run(tmp_path / "seeds" / f"seed{seed}", store, [ID.format(seed), ID.format(3)])
    with pytest.raises(
        CheckpointError, match=r"seed1 and .*seed0 both have case BraTS-GLI-00003-000 .* medmap compare"
    ):
        evaluate(tmp_path / "seeds")
    write_made_up_run(tmp_path / "mixed" / "a", store, [ID.format(0)])
    write_made_up_run(tmp_path / "mixed" / "b", store, [ID.format(1)], card=card_of(TWO))
    with pytest.raises(CheckpointError, match=r"b and .*a differ in sequences, labels or spacing"):
        evaluate(tmp_path / "mixed")
    with pytest.raises(InputError, match="convention 'kind' is not known"):
        evaluate(tmp_path / "mixed", convention="kind")
    assert not shifted_runs


@pytest.mark.parametrize(("name", "folder"), [("ward 3", "on-ward 3"), (None, "on-cases-store")])
def test_other_data_are_answered_by_all_folds_together(
    store: Store, tmp_path: Path, shifted_runs: list[Path], name: str | None, folder: str
) -> None:
    for fold in range(2):
        write_made_up_run(tmp_path / f"fold{fold}", store, [ID.format(fold)])
    assert evaluate(tmp_path, data=store, name=name) == tmp_path / folder
    assert shifted_runs == [tmp_path]
    assert {row.case for row in read_scores(tmp_path / folder / "subsets.csv")} == set(store.ids)
    summary = json.loads((tmp_path / folder / "summary.json").read_text())
    assert summary["evaluated"] == f"all 4 cases of {folder[3:]}, 2 networks together"
    assert not (tmp_path / "subsets.csv").exists()


def test_a_run_that_tests_nobody_has_no_table(store: Store, tmp_path: Path, shifted_runs: list[Path]) -> None:
    run = write_made_up_run(tmp_path / "run", store, [], [ID.format(0)])
    with pytest.raises(InputError, match="run: its division run has no test part; name patients with --data"):
        evaluate(run)
    assert not shifted_runs
    assert not (run / "subsets.csv").exists()


def test_cases_that_a_run_learned_from_are_no_other_data(
    store: Store, tmp_path: Path, shifted_runs: list[Path]
) -> None:
    run = write_made_up_run(tmp_path / "run", store, [ID.format(0)], [ID.format(3)])
    renamed = Store(shutil.copytree(store.path, tmp_path / "renamed"))
    with pytest.raises(
        InputError, match=r"renamed: \d of its 4 cases, such as .* are of those that .*run learned from"
    ):
        evaluate(run, data=renamed)
    assert not shifted_runs
    (run / "splits.json").unlink()
    (run / "env.json").unlink()  # a model that was given away has neither
    assert evaluate(run, data=renamed) == run / "on-renamed"


def test_data_are_found_where_they_were_or_beside_a_run_that_moved(store: Store, tmp_path: Path) -> None:
    run = write_made_up_run(tmp_path / "a" / "run", store, [ID.format(0)])
    assert run_store(run).path == store.path
    old = Path(shutil.copytree(store.path, tmp_path / "a" / "data"))
    write_made_up_run(run, Store(old), [ID.format(0)])
    moved = Path(shutil.move(tmp_path / "a", tmp_path / "b"))
    assert run_store(moved / "run").path == moved / "data"
    shutil.move(moved / "data", moved / "run" / "data")
    assert run_store(moved / "run").path == moved / "run" / "data"
    shutil.rmtree(moved / "run" / "data")
    with pytest.raises(CheckpointError, match=rf"its data were at {old}, which is not there; name them with --data"):
        run_store(moved / "run")


def test_data_that_changed_are_refused(store: Store, tmp_path: Path) -> None:
    run = write_made_up_run(tmp_path / "run", store, [ID.format(0)])
    other = prepared_store(write_folder(tmp_path / "c", {ID.format(0): tumour()}))
    shutil.move(other.path, tmp_path / "data")
    environment = json.loads((run / "env.json").read_text())
    (run / "env.json").write_text(json.dumps({**environment, "store": str(tmp_path / "data")}))
    with pytest.raises(
        CheckpointError, match=rf"changed since training \(hash {other.sha256[:12]}, then {store.sha256[:12]}"
    ):
        run_store(run)


@pytest.mark.parametrize("name", ["env.json", "splits.json"])
def test_a_run_that_is_not_whole(store: Store, tmp_path: Path, name: str) -> None:
    run = write_made_up_run(tmp_path / "run", store, [ID.format(0)])
    (run / name).write_text("{")
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read .*; copy the run again"):
        evaluate(run)
    (run / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read"):
        evaluate(run)


# ---- the table in words ------------------------------------------------------------------------------------------


def cells_of(text: str, label: str) -> list[str]:
    """Cells of the one line that begins with a label; two spaces part them."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{label}  ")]
    return [cell.strip() for cell in line.removeprefix(label).split("  ") if cell.strip()]


def test_the_table_holds_the_numbers(summary: dict[str, Any]) -> None:
    text = table_text(summary)
    head, *_ = text.splitlines()
    assert head.split() == ["WT", "TC"]
    for subset in ("t1c", "t2f", "t1c+t2f"):
        for cell, region in zip(cells_of(text, subset), ("WT", "TC"), strict=True):
            row = entry_of(summary["rows"], subset=subset, region=region, metric="dice")
            said = f"{100 * row['mean']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
            assert cell == said + (" n=3" if row["n"] == 3 else "")
    assert cells_of(text, "without t1c")[0].startswith("42.5 [")
    assert text.splitlines()[-1] == (
        "dice in %, mean [95 % interval over patients]; 4 cases of 3 patients; made-up cases; empty regions: brats"
    )


def test_the_line_of_those_who_have_it_repeats_what_everybody_has(summary: dict[str, Any]) -> None:
    lines = table_text(summary).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("all subsets"))
    whole, having = lines[at], lines[at + 1]
    assert having.startswith("  who have the region ")
    assert having.split()[4:8] == whole.split()[2:6]  # WT, with its n
    assert having.split()[8] == "25.0"  # TC over a and b
    assert having.endswith("n=2")


def test_columns_never_touch_and_align() -> None:
    rows = [
        row
        for case in "ab"
        for region in ("WT", "TC", "ET")
        for row in scored(case, "t2f", region, dice=1.0, hd95_mm=373.13, truth_ml=1.0)
    ]
    summary = summarise(rows, TWO, GLIOMA, about=ABOUT)
    dice, hd95 = table_text(summary), table_text(summary, "hd95_mm")
    assert cells_of(dice, "t2f") == ["100.0 [100.0, 100.0]"] * 3
    assert cells_of(hd95, "t2f") == ["373.1 [373.1, 373.1]"] * 3  # mm are no percent
    assert hd95.splitlines()[-1].startswith("hd95_mm, mean")
    assert len({len(line) for line in dice.splitlines()[:2]}) == 1


def test_a_metric_other_than_dice_has_no_line_of_dice(summary: dict[str, Any]) -> None:
    text = table_text(summary, "truth_ml")
    assert "who have the region" not in text
    assert cells_of(text, "t2f") == ["9.0 [9.0, 9.0]", "2.2 [0.0, 3.0]"]


def test_what_nobody_has_is_a_dash(store: Store) -> None:
    rows = scored("a", "t2f", "WT", dice=0.5, truth_ml=1.0) + scored("a", "t2f", "ET", dice=1.0, truth_ml=0.0)
    text = table_text(write_scores(None, rows, TWO, GLIOMA, "brats", [store], {"evaluated": "x"}))
    assert cells_of(text, "t2f") == ["50.0 [–, –]", "100.0 [–, –]"]
    assert cells_of(text, "  who have the region") == ["50.0 [–, –]", "–"]
