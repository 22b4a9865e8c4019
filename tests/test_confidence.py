"""How far a mask can be trusted: what is measured of it, what is fitted to it, and what `medmap predict` says."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_calls import answer, works
from made_up_scores import GLIOMA, ID, Shifted, made_up_voxels, prepared_store, scored, tumour, write_folder

from medmap.card import SHIPPED, read_model
from medmap.confidence import (
    CONFIDENCE,
    LEAST_PATIENTS,
    QC_TABLE,
    Confidence,
    broken_promises,
    calibrate,
    confidence_text,
    held_elsewhere,
    read_confidence,
    temperatures,
    write_confidence,
    write_elsewhere,
    write_table,
)
from medmap.core.box import Box
from medmap.core.case import Prediction
from medmap.core.conformal import Fit
from medmap.core.modality import GLIOMA_MRI
from medmap.core.temperature import tempered
from medmap.core.witnesses import FEATURES, Witnesses
from medmap.data.nifti import sha256
from medmap.errors import CheckpointError, InputError
from medmap.evaluate import evaluate_cases
from medmap.predict import Predictor
from medmap.scores import Score, write_scores, write_voxels

ALL = "t1n+t1c+t2w+t2f"
SHAPE = (8, 8, 8)
WHOLE = Box((0, 0, 0), SHAPE)


# ---- what speaks for a mask --------------------------------------------------------------------------------------


def test_agreement_is_the_mean_dice_with_the_masks_of_smaller_subsets(tmp_path: Path) -> None:
    store = prepared_store(write_folder(tmp_path / "cases", {ID.format(0): tumour()}))
    rows = evaluate_cases(Shifted(), store, [ID.format(0)])  # type: ignore[arg-type]
    found = {row.subset: row.value for row in rows if (row.region, row.metric) == ("WT", "agreement")}
    # 8 voxels an edge, a voxel to the right for each sequence that is missing
    assert found[ALL] == pytest.approx((4 * 7 / 8 + 6 * 6 / 8 + 4 * 5 / 8) / 14)
    assert found["t1n+t2f"] == pytest.approx(7 / 8)
    assert found["t1n+t1c+t2f"] == pytest.approx((7 / 8 + 6 / 8) / 2)
    assert len(found) == 11  # of one sequence there is none
    assert {row.value for row in rows if row.metric == "soft_dice"} == {1.0}


def background(inside: dict[tuple[int, int, int], float], box: Box = WHOLE, klass: int = 3) -> np.ndarray[Any, Any]:
    """Probabilities of four classes: background but for what some voxels have of one class."""
    found = np.zeros((4, *box.shape), np.float32)
    for voxel, share in inside.items():
        found[(klass, *voxel)] = share
    found[0] = 1 - found.sum(axis=0)
    return found


def test_soft_dice_by_hand() -> None:
    witnesses = Witnesses(GLIOMA, SHAPE, (10.0, 10.0, 10.0), et_min_ml=0.0)
    witnesses.add("t1c", WHOLE, background({(1, 1, 1): 0.8, (1, 1, 2): 0.6, (1, 1, 3): 0.4}))
    evidence = witnesses.about("t1c")["ET"]
    assert evidence.soft_dice == pytest.approx(2 * 1.4 / (2 + 1.8))
    assert evidence.volume_ml == pytest.approx(2.0)
    assert np.isnan(evidence.agreement)


def test_what_the_box_has_beyond_the_grid_is_in_no_mask() -> None:
    beyond = Box((0, 0, 0), (10, 8, 8))
    witnesses = Witnesses(GLIOMA, SHAPE, (1.0, 1.0, 1.0), et_min_ml=0.0)
    witnesses.add("t1c", beyond, background({(7, 1, 1): 1.0, (8, 1, 1): 1.0, (9, 1, 1): 0.3}, beyond))
    assert witnesses.about("t1c")["WT"].soft_dice == 1
    assert witnesses.about("t1c")["WT"].volume_ml == pytest.approx(0.001)


def test_an_enhancing_tumour_that_is_dropped_has_no_soft_dice_and_both_empty_agree() -> None:
    witnesses = Witnesses(GLIOMA, SHAPE, (1.0, 1.0, 1.0), et_min_ml=0.5)
    witnesses.add("t2f", WHOLE, background({(1, 1, 1): 1.0}))
    witnesses.add("t1c+t2f", WHOLE, background({(2, 2, 2): 1.0}))
    found = witnesses.about("t1c+t2f")
    assert (found["ET"].agreement, found["ET"].soft_dice) == (0, 1)
    assert found["ET-pp"].agreement == 1
    assert np.isnan(found["ET-pp"].soft_dice)
    assert found["ET-pp"].volume_ml == 0
    assert found["TC"].soft_dice == 1  # the core stays


# ---- what held-out patients had ----------------------------------------------------------------------------------


def made_up_rows(patients: int = 14, regions: tuple[str, ...] = ("WT", "TC", "ET", "ET-pp")) -> list[Score]:
    """Dice 0.1 + 0.8 agreement, + 0.05 with t1c, ± noise."""
    generator = np.random.default_rng(0)
    rows: list[Score] = []
    for number in range(patients):
        for subset in GLIOMA_MRI.subsets():
            for region in regions:
                agreement = generator.uniform(0.4, 1)
                value = 0.1 + 0.8 * agreement + 0.05 * ("t1c" in subset) + generator.normal(0, 0.02)
                seen = {"agreement": agreement if len(subset) > 1 else np.nan, "soft_dice": agreement}
                numbers = {"dice": float(np.clip(value, 0, 1)), "truth_ml": 5.0, "predicted_ml": 5.0, **seen}
                rows += scored(f"c{number}", str(subset), region, f"p{number}", **numbers)
    return rows


def test_what_is_fitted_is_what_was_there() -> None:
    found = calibrate(made_up_rows())
    assert list(found) == ["WT", "TC", "ET", "ET-pp"]
    for values in found.values():
        assert (values["patients"], values["masks"]) == (14, 14 * 15)
        assert sum(values["slopes"]) == pytest.approx(0.8, abs=0.05)
        assert set(values["deviations"]) == {str(subset) for subset in GLIOMA_MRI.subsets()}
        left_out = values["left_out"]
        assert 0.7 <= left_out["coverage"]["mean"] <= 0.95
        assert left_out["coverage"]["low"] <= left_out["coverage"]["mean"] <= left_out["coverage"]["high"]
        assert left_out["width"] < 0.1
        assert left_out["mean_error"] < 0.03 < 0.1 < left_out["mean_error_of_the_combinations_mean"]
        assert sum(light["masks"] for light in left_out["lights"].values()) == 14 * 15
        assert left_out["lights"]["green"]["good"] > 0.9 * left_out["lights"]["green"]["masks"] > 0


def test_too_few_patients_and_nothing_is_claimed() -> None:
    assert calibrate(made_up_rows(LEAST_PATIENTS - 1)) == {}
    assert set(calibrate(made_up_rows(LEAST_PATIENTS))) == {"WT", "TC", "ET", "ET-pp"}
    one_patient = [row._replace(patient="p0") for row in made_up_rows()]  # 14 scans of one patient
    assert calibrate(one_patient) == {}


def test_a_combination_that_few_had_is_left_out() -> None:
    rows = [row for row in made_up_rows() if row.subset != "t1n" or row.case < "c5"]
    assert set(calibrate(rows)["WT"]["deviations"]) == {str(s) for s in GLIOMA_MRI.subsets()} - {"t1n"}


def test_undefined_dice_empty_masks_and_tables_of_before_are_left_out() -> None:
    rows = made_up_rows(regions=("WT",))

    def without(metric: str) -> list[Score]:
        gone = (ALL, metric, "c3")
        return [row._replace(value=np.nan) if (row.subset, row.metric, row.case) == gone else row for row in rows]

    assert calibrate(without("dice"))["WT"]["masks"] == 14 * 15 - 1
    assert calibrate(without("soft_dice"))["WT"]["masks"] == 14 * 15 - 1
    assert calibrate([row for row in rows if row.metric not in FEATURES]) == {}


def test_intervals_are_held_against_patients_to_whom_nothing_was_fitted(run: Path) -> None:
    model = read_model(run)
    write_confidence(model, run)
    confidence = read_confidence(model)
    assert confidence is not None
    alike = held_elsewhere(confidence, made_up_rows())
    assert set(alike) == {"WT", "TC", "ET", "ET-pp"}
    assert 0.7 <= alike["TC"]["coverage"]["mean"] <= 1
    assert alike["TC"]["masks"] == 14 * 15
    worse = held_elsewhere(confidence, worse_rows())
    assert worse["TC"]["coverage"]["high"] < 0.4
    assert worse["WT"] == alike["WT"]


def worse_rows() -> list[Score]:
    """The core is far worse than it was where the fit was made."""
    rows = made_up_rows()
    return [row._replace(value=row.value / 2) if row[3:5] == ("TC", "dice") else row for row in rows]


SUBSETS = tuple(str(subset) for subset in GLIOMA_MRI.subsets())
REGIONS = {region: tuple(GLIOMA.members(region)) for region in GLIOMA.regions}


def test_temperatures_are_of_combinations_that_enough_patients_had() -> None:
    often, seldom = made_up_voxels(2.0, kinds=("t1c", "t2f")), made_up_voxels(2.0, LEAST_PATIENTS - 1, ("t2w",))
    found = temperatures([*often, *seldom], REGIONS)
    assert found is not None
    assert set(found["of"]) == {"t1c", "t2f"}
    assert found["patients"] == 14
    assert list(found["of"].values()) == pytest.approx([2.0, 2.0], rel=0.1)
    left_out = found["left_out"]
    assert left_out["loss"][1] < left_out["loss"][0]
    assert left_out["lowered"]["low"] > 0
    for row in left_out["regions"].values():
        assert row["error_where_doubtful"][1] < row["error_where_doubtful"][0]
        assert [len(bins) for bins in row["bins"]] == [3, 3]
    assert json.loads(json.dumps(found)) == found
    assert temperatures(seldom, REGIONS) is None
    assert temperatures([], REGIONS) is None


# ---- about one mask ----------------------------------------------------------------------------------------------


def confidence_of(slope: float = 0.5, deviations: dict[str, float] | None = None) -> Confidence:
    spreads = dict.fromkeys(deviations or {"t1c+t2f": 0.0}, 0.05)
    fitted = Fit(0.8, (0.7, 0.9), (slope, 0.0), deviations or {"t1c+t2f": 0.0}, spreads)
    return Confidence("made-up cases", 12, 0.8, {"WT": (fitted, 2.0)})


def witnesses_of(overlap: int) -> Witnesses:
    """Two masks of four voxels, of which some are common."""
    witnesses = Witnesses(GLIOMA, SHAPE, (10.0, 10.0, 10.0), et_min_ml=0.0)
    witnesses.add("t2f", WHOLE, background({(1, 1, i): 1.0 for i in range(4)}, klass=2))
    witnesses.add("t1c+t2f", WHOLE, background({(1, 1, i + 4 - overlap): 1.0 for i in range(4)}, klass=2))
    return witnesses


def test_a_verdict_by_hand() -> None:
    found = confidence_of().about(witnesses_of(2), "t1c+t2f", clean=True)
    assert (found["patients"], found["level"]) == (12, 0.8)
    middle = 0.8 + 0.5 * (0.5 - 0.7)
    assert found["regions"]["WT"] == {
        "dice": pytest.approx(middle),
        "low": pytest.approx(middle - 0.1),
        "high": pytest.approx(middle + 0.1),
        "light": "amber",
        "agreement": 0.5,
        "soft_dice": 1.0,
        "why": None,
        "failed": {},
    }
    lights = [confidence_of().about(witnesses_of(n), "t1c+t2f", True)["regions"]["WT"]["light"] for n in (0, 2, 4)]
    assert lights == ["red", "amber", "green"]


def test_nothing_is_said_of_an_empty_mask_or_a_combination_that_nobody_measured() -> None:
    regions = confidence_of().about(witnesses_of(2), "t1c+t2f", clean=True)["regions"]
    assert regions["ET"]["light"] is None
    assert "empty" in regions["ET"]["why"]
    other = confidence_of(deviations={"t1c": 0.0}).about(witnesses_of(2), "t1c+t2f", clean=True)["regions"]["WT"]
    assert (other["dice"], other["low"], other["high"], other["light"]) == (None, None, None, None)
    assert f"fewer than {LEAST_PATIENTS} held-out patients" in other["why"]


def test_the_text_says_numbers_or_why_not() -> None:
    lines = confidence_text(confidence_of().about(witnesses_of(2), "t1c+t2f", clean=True))
    assert lines[0] == "this mask, predicted Dice in %, 8 of 10 between the ends (12 patients measured):"
    assert lines[1] == "  WT  amber: 70 [60, 80]; subsets agree to 50"
    assert lines[3].startswith("  ET  nothing can be said: ")


@pytest.mark.parametrize(
    ("intercept", "said"),
    [(0.8962, "red: 69.6 [60, 80]"), (0.89998, "amber: 70 [60, 80]"), (0.99998, "green: 80 [70, 90]")],
)
def test_the_number_that_is_shown_is_the_one_that_was_judged(intercept: float, said: str) -> None:
    """0.6962 is no 70 beside a red light; 0.69998 is told as 0.7, and judged as that."""
    known = confidence_of()
    fitted, reach = known.fits["WT"]
    known = replace(known, fits={"WT": (replace(fitted, intercept=intercept, centre=(0.9, 0.9)), reach)})
    assert f"WT  {said}" in confidence_text(known.about(witnesses_of(2), "t1c+t2f", clean=True))[1]


def test_a_promise_that_is_known_to_fail_is_named_where_a_number_is_given() -> None:
    failed = {"WT": {"9 patients of elsewhere": 0.6}, "TC": {"9 patients of elsewhere": 0.1}}
    found = replace(confidence_of(), failed=failed).about(witnesses_of(2), "t1c+t2f", clean=True)
    told = "of the WT masks of 9 patients of elsewhere, 60 % lay between the ends, not 80 %"
    assert broken_promises(found) == [told]  # of the core nothing is promised
    assert confidence_text(found)[-1] == f"  known to fail: {told}"


def test_the_table_goes_where_nothing_is_said(tmp_path: Path) -> None:
    record = {
        "case": "a",
        "sequences": {"used": ["t1c", "t2f"]},
        "volumes_ml": {"WT": 4.0, "TC": 0.0, "ET": 0.0},
        "confidence": confidence_of().about(witnesses_of(4), "t1c+t2f", clean=True),
    }
    assert write_table(tmp_path / QC_TABLE, [record, {"case": "older"}]) == {"green": 1, "unknown": 2}
    rows = list(csv.DictReader((tmp_path / QC_TABLE).read_text().splitlines()))
    assert [row["region"] for row in rows] == ["WT", "TC", "ET"]
    assert (rows[0]["light"], rows[0]["volume_ml"], rows[0]["sequences"]) == ("green", "4.0", "t1c+t2f")
    assert (rows[1]["light"], rows[1]["dice"]) == ("", "")
    assert write_table(tmp_path / QC_TABLE, [{**record, "confidence": None}]) == {}
    assert not (tmp_path / QC_TABLE).exists()


# ---- end to end --------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A run whose held-out patients are made up."""
    copy = shutil.copytree(tiny_run, tmp_path / "run")
    write_scores(copy, made_up_rows(), GLIOMA_MRI, GLIOMA, "brats", [], {"evaluated": "made-up cases"})
    write_voxels(copy, made_up_voxels(2.0, kinds=SUBSETS, voxels=400))
    return copy


def test_what_is_written_is_what_is_read(run: Path) -> None:
    model = read_model(run)
    written = write_confidence(model, run)
    assert written is not None
    assert json.loads((run / CONFIDENCE).read_text()) == written
    found = read_confidence(model)
    assert found is not None
    assert (found.patients, found.measured_on, set(found.fits)) == (14, "made-up cases", {"WT", "TC", "ET", "ET-pp"})
    assert found.temperatures == written["temperature"]["of"]
    assert (set(found.temperatures), dict(found.failed)) == (set(SUBSETS), {})
    changed = {**written, "weights_sha256": {".": "of other weights"}}
    (run / CONFIDENCE).write_text(json.dumps(changed))
    assert read_confidence(model) is None
    (run / CONFIDENCE).write_text(json.dumps({**written, "regions": {"WT": {}}}))
    with pytest.raises(CheckpointError, match=r"cannot be read .*run `medmap evaluate` again"):
        read_confidence(model)


def test_without_voxels_there_is_no_temperature(run: Path) -> None:
    (run / "voxels.npz").unlink()
    written = write_confidence(read_model(run), run)
    assert written is not None
    assert written["temperature"] is None
    found = read_confidence(read_model(run))
    assert found is not None
    assert dict(found.temperatures) == {}


def test_where_the_promise_fails_is_kept_beside_it(run: Path, tmp_path: Path) -> None:
    model = read_model(run)
    with pytest.raises(InputError, match=r"has no confidence\.json of these weights; run `medmap evaluate`"):
        write_elsewhere(model, [run])
    write_confidence(model, run)
    for name, rows in (("on-here", made_up_rows()), ("on-there", worse_rows())):
        write_scores(tmp_path / name, rows, GLIOMA_MRI, GLIOMA, "brats", [], {"evaluated": name})
    write_voxels(tmp_path / "on-there", made_up_voxels(2.0, kinds=SUBSETS, voxels=400))
    told = write_elsewhere(model, [tmp_path / "on-here", tmp_path / "on-there"])
    assert list(told) == ["14 patients of here", "14 patients of there"]
    assert told["14 patients of here"]["temperature"] is None
    before, after = told["14 patients of there"]["temperature"]["loss"]
    assert after < before
    found = read_confidence(model)
    assert found is not None
    assert set(found.failed) == {"TC"}
    assert set(found.failed["TC"]) == {"14 patients of there"}


def test_of_one_patient_there_is_no_interval_and_no_bare_nan(run: Path, tmp_path: Path) -> None:
    model = read_model(run)
    write_confidence(model, run)
    (first, *_) = made_up_rows()
    rows = [row for row in made_up_rows() if row.case == first.case]
    write_scores(tmp_path / "on-one", rows, GLIOMA_MRI, GLIOMA, "brats", [], {"evaluated": "one"})
    write_elsewhere(model, [tmp_path / "on-one"])
    assert "NaN" not in (run / CONFIDENCE).read_text()
    found = read_confidence(model)
    assert found is not None
    assert dict(found.failed) == {}


def test_probabilities_are_tempered_and_the_mask_is_not(run: Path, tiny_phantoms: Path, tmp_path: Path) -> None:
    images = tiny_phantoms / "PHANTOM-00000-000"
    files = [f"--{name}={images / f'{images.name}-{name}.nii.gz'}" for name in ("t1c", "t2f")]
    how = ("--model", run, *files, "--device", "cpu", "--no-qc", "--probabilities", "float32")
    plain = works("predict", *how, "-o", tmp_path / "plain.nii.gz")
    assert "probabilities: as the network gives them; nobody has measured" in plain
    written = write_confidence(read_model(run), run)
    assert written is not None
    temperature = written["temperature"]["of"]["t1c+t2f"]
    assert temperature > 1.5
    said = works("predict", *how, "-o", tmp_path / "seg.nii.gz")
    assert f"probabilities: calibrated, temperature {temperature:.2f}" in said
    assert sha256(tmp_path / "seg.nii.gz") == sha256(tmp_path / "plain.nii.gz")
    for name, expected in (("plain", None), ("seg", temperature)):
        record = json.loads((tmp_path / f"{name}.medmap.json").read_text())
        assert record["probabilities"] == {"type": "float32", "temperature": expected}
    with np.load(tmp_path / "plain-probabilities.npz") as was, np.load(tmp_path / "seg-probabilities.npz") as now:
        classes = [1 - was["WT"], was["TC"] - was["ET"], was["WT"] - was["TC"], was["ET"]]
        q = tempered(np.maximum(classes, 0).astype(np.float32), temperature)
        np.testing.assert_allclose(now["WT"], 1 - q[0], atol=2e-3)
        np.testing.assert_allclose(now["ET"], q[3], atol=2e-3)
        assert np.abs(now["WT"] - was["WT"]).max() > 0.02


def test_predict_says_how_far_each_mask_can_be_trusted(run: Path, tiny_phantoms: Path, tmp_path: Path) -> None:
    write_confidence(read_model(run), run)
    out, plain = tmp_path / "masks", tmp_path / "plain"
    how = ("--model", run, "-i", tiny_phantoms, "--device", "cpu", "--engine", "torch")
    works("predict", *how, "-o", out)
    works("predict", *how, "-o", plain, "--no-qc")
    rows = list(csv.DictReader((out / QC_TABLE).read_text().splitlines()))
    assert len(rows) == 3 * 3
    for mask in sorted(out.glob("*.nii.gz")):
        record = json.loads((out / mask.name.replace(".nii.gz", ".medmap.json")).read_text())
        for region, row in record["confidence"]["regions"].items():
            (line,) = (line for line in rows if (line["case"], line["region"]) == (record["case"], region))
            assert line["light"] == (row["light"] or "")
            assert float(line["volume_ml"]) == record["volumes_ml"][region]
            assert (row["light"] is None) is (row["why"] is not None)
            assert row["low"] is None or 0 <= row["low"] <= row["dice"] <= row["high"] <= 1
        other = json.loads((plain / mask.name.replace(".nii.gz", ".medmap.json")).read_text())
        assert other["confidence"] is None
        assert sha256(mask) == sha256(plain / mask.name)  # it is said of the mask, and does not change it
    assert not (plain / QC_TABLE).exists()
    before = (out / QC_TABLE).read_text()
    works("predict", *how, "-o", out)  # all are there already
    assert sorted((out / QC_TABLE).read_text().splitlines()) == sorted(before.splitlines())


def test_nothing_is_said_of_a_region_that_the_patients_own_grid_has_no_voxel_of(
    run: Path, tiny_phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was looked at on the model's grid, where it may be just above what is dropped."""
    write_confidence(read_model(run), run)
    images = tiny_phantoms / "PHANTOM-00000-000"
    how = ("--model", run, f"--t2f={images / f'{images.name}-t2f.nii.gz'}", "--device", "cpu")
    finish = Predictor.finish

    def emptied(self: Predictor, *args: Any, **named: Any) -> Prediction:
        made = finish(self, *args, **named)
        return replace(made, classes=np.zeros_like(made.classes))

    assert answer("predict", *how, "-o", tmp_path / "a.nii.gz")["confidence"]["regions"]["WT"]["dice"] is not None
    monkeypatch.setattr(Predictor, "finish", emptied)
    record = answer("predict", *how, "-o", tmp_path / "b.nii.gz")
    for region, row in record["confidence"]["regions"].items():
        assert record["volumes_ml"][region] == 0
        assert (row["dice"], row["light"], row["why"]) == (None, None, "the mask is empty, so it has no soft Dice")


def test_evaluation_and_prediction_measure_a_mask_alike(
    tiny_run: Path, tiny_phantoms: Path, run: Path, tmp_path: Path
) -> None:
    """What a fit was made from is what it is asked with."""
    scored_run = shutil.copytree(tiny_run, tmp_path / "scored")
    said = works("evaluate", scored_run, "--device", "cpu")
    assert f"fewer than {LEAST_PATIENTS} patients" in said
    assert not (scored_run / CONFIDENCE).exists()
    table = list(csv.DictReader((scored_run / "subsets.csv").read_text().splitlines()))
    (case,) = {row["case"] for row in table}
    write_confidence(read_model(run), run)
    files = [f"--{name}={tiny_phantoms / case / f'{case}-{name}.nii.gz'}" for name in GLIOMA_MRI]
    record = answer("predict", "--model", run, *files, "-o", tmp_path / "a.nii.gz", "--device", "cpu", "--raw")
    for region, row in record["confidence"]["regions"].items():
        for name in FEATURES:
            there = [r["value"] for r in table if (r["subset"], r["region"], r["metric"]) == (ALL, region, name)]
            assert ([] if row[name] is None else [row[name]]) == pytest.approx([float(v) for v in there], abs=2e-4)


def test_the_model_that_comes_with_medmap_was_measured_on_enough_patients() -> None:
    found = read_confidence(read_model(SHIPPED))
    assert found is not None
    assert found.patients >= LEAST_PATIENTS
    assert set(found.fits) == {"WT", "TC", "ET", "ET-pp"}
    for fitted, reach in found.fits.values():
        assert set(fitted.spreads) == {str(subset) for subset in GLIOMA_MRI.subsets()}
        assert 0 < reach < np.inf
        assert min(fitted.slopes) >= 0
    assert set(found.temperatures) == set(SUBSETS)
    kept = json.loads((SHIPPED / CONFIDENCE).read_text())
    others = [told["regions"].items() for told in kept["elsewhere"].values()]
    assert len(others) == 2
    assert set(found.failed) == {r for told in others for r, v in told if v["coverage"]["high"] < kept["level"]}
    for values in kept["regions"].values():
        assert values["left_out"]["coverage"]["high"] >= kept["level"]
        assert values["left_out"]["mean_error"] < values["left_out"]["mean_error_of_the_combinations_mean"]
    for part in (kept["temperature"]["left_out"], *(told["temperature"] for told in kept["elsewhere"].values())):
        assert part["loss"][1] < part["loss"][0]
    for values in kept["temperature"]["left_out"]["regions"].values():
        assert values["error_where_doubtful"][1] < values["error_where_doubtful"][0]
