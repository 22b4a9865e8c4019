from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from made_up_calls import answer, call, fails, train, works

from medmap.cli import console
from medmap.cli.train import _one_each, _Rows
from medmap.core.metrics import METRICS, dice
from medmap.data.store import Store

HEAVY = ("torch", "monai", "lightning_fabric", "matplotlib")
PATIENT = "PHANTOM-00000-000"


@pytest.fixture(autouse=True)
def _plain_manner() -> Iterator[None]:
    yield
    console.begin()


@pytest.fixture
def image(tiny_phantoms: Path) -> Path:
    return tiny_phantoms / PATIENT / f"{PATIENT}-t2f.nii.gz"


# ---- train -------------------------------------------------------------------------------------------------------


def test_set_takes_several_values() -> None:
    assert _one_each(["-c", "x=y", "--set", "a=1", "b.c=2", "-o", "r", "--set", "d=3"]) == [
        *("-c", "x=y", "--set", "a=1", "--set", "b.c=2", "-o", "r", "--set", "d=3")
    ]


def test_rows_of_the_log_are_told_in_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    tell = _Rows(lambda done, total, text: print(f"{done}/{total} {text}"))
    tell({"kind": "train", "step": 1, "steps": 2, "loss": 1.5, "terms": {"dice_ce": 1.5}})
    spread = {"std": 0.4567, "std_min": 0.1, "rank": 12.34}
    latents = {"x3": spread, "x4": {"gap": 0.876, "chance": 0.2, **spread}}
    tell({"kind": "val", "step": 2, "mean": 0.5, "full": 0.6, "missing": 0.49, "cost": 0.11, "latents": latents})
    tell({"kind": "val", "step": 2, "mean": 0.5, "latents": {"x3": spread}, "best": True})
    tell({"kind": "warning", "step": 2, "text": "over-alignment: why; what to do"})
    told = capsys.readouterr()
    assert told.out.splitlines() == [
        "1/2 loss 1.500",
        "step 2: validation Dice 50.0 over all subsets, with all sequences 60.0",
        "  missing sequences cost 11.0; latents x4: gap 0.88, std 0.46, rank 12.3",
        "step 2: validation Dice 50.0 over all subsets  * best so far",
        "  latents x3: std 0.46, rank 12.3",
    ]
    assert told.err == "warning: step 2: over-alignment: why; what to do\n"


def weights(run: Path) -> bytes:
    return (run / "checkpoints" / "last" / "model.safetensors").read_bytes()


def test_train_says_what_it_will_do_and_does_it(tiny_store: Path, tiny_run: Path, tmp_path: Path) -> None:
    plan = works(*train(tiny_store, tmp_path / "run", "--dry-run"))
    assert not (tmp_path / "run").exists()
    split = json.loads((tiny_run / "splits.json").read_text())
    for said in (
        f"hash {Store(tiny_store).sha256}",
        "split     kfold-0-of-3-seed-0: train 2, val 0, test 1",
        f"sha256 {split['sha256']}",
        "model     unet tiny, 733,544 parameters, t1n t1c t2w t2f",
        "loss      dice_ce + 0.1 align/x4   (anchor pstar)",
        "subsets   uniform, drawn per sample",
        "device    cpu, fp32",
    ):
        assert said in plan
    done = call(*train(tiny_store, tmp_path / "run"))
    assert done.exit_code == 0, done.output
    assert plan in done.stdout
    assert "training 2/2" in done.stderr
    assert weights(tmp_path / "run") == weights(tiny_run)
    assert "already holds a run, at step 2 of 2; go on with medmap train --resume" in fails(
        *train(tiny_store, tmp_path / "run")
    )
    assert "is finished, step 2; go further from it with --init" in fails("train", "--resume", tmp_path / "run")


def test_an_interrupted_training_says_how_to_go_on_and_ends_the_same(
    tiny_store: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medmap.data.dataset import training_batch

    def interrupted(cases: Any, modalities: Any, config: Any, step: int, *others: Any) -> Any:
        if step == stop:
            raise KeyboardInterrupt
        return training_batch(cases, modalities, config, step, *others)

    run = tmp_path / "run"
    words = train(tiny_store, run, "--set", "train.checkpoint_every=1")
    with monkeypatch.context() as patch:
        patch.setattr("medmap.train.training_batch", interrupted)
        stop = 0
        assert f"last checkpoint of {run} is of step 0: medmap train --resume {run}" in fails(*words, code=130)
        shutil.rmtree(run / "checkpoints")
        assert "was stopped before its first checkpoint" in fails("train", "--resume", run)
        stop = 1
        assert f"last checkpoint of {run} is of step 1: medmap train --resume {run}" in fails(*words, code=130)
    other = tmp_path / "other"
    works("simulate", "-o", tmp_path / "p", "-n", 3, "--spacing", 4, "--seed", 1)
    works("prepare", tmp_path / "p", "-o", other)
    assert "holds other data" in fails("train", "--resume", run, "-d", other)
    assert "goes on from step 1" in works("train", "--resume", run, "--device", "cpu")
    assert weights(run) == weights(tiny_run)


@pytest.fixture(scope="module")
def folds(tiny_phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three folds of a network for one sequence, trained from a data folder in one command."""
    out = tmp_path_factory.mktemp("cli") / "folds"
    said = works(*train(tiny_phantoms, out, "--fold", "all", "--set", "data.modalities=[t2f]"))
    assert said.count("device    cpu") == 3
    return out


def test_all_folds_in_one_command(folds: Path, tiny_phantoms: Path, tmp_path: Path) -> None:
    tested = [json.loads((folds / f"fold{k}" / "splits.json").read_text())["test"] for k in range(3)]
    assert sorted(case for part in tested for case in part) == list(Store(folds / "store").ids)
    before = [weights(folds / f"fold{k}") for k in range(3)]
    shutil.rmtree(folds / "fold1")
    again = train(tiny_phantoms, folds, "--fold", "all", "--set", "data.modalities=[t2f]")
    assert works(*again).count("finished at step 2: left as it is") == 2
    assert [weights(folds / f"fold{k}") for k in range(3)] == before
    assert "was trained with train.lr 0.001, now 0.002" in fails(*again, "--set", "train.lr=2e-3")
    works("simulate", "-o", tmp_path / "p", "-n", 3, "--spacing", 4, "--seed", 1, "--modalities", "t2f")
    works("prepare", tmp_path / "p", "-o", tmp_path / "s")
    assert "holds other data" in fails(*train(tmp_path / "s", folds, "--fold", "all", "--set", "data.modalities=[t2f]"))
    assert "resume one, or give the whole command with --fold all" in fails("train", "--resume", folds)


def test_what_cannot_be_trained(tiny_store: Path, tiny_run: Path, folds: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    assert "unknown key train.stepz; did you mean train.steps?" in fails(*train(tiny_store, new, "train.stepz=3"))
    assert "modality adc is not one of t1n" in fails(*train(tiny_store, new, "data.modalities=[adc]"))
    assert "fold 3 of 3 folds" in fails(*train(tiny_store, new, "--fold", 3))
    assert "folds belong to data.split=kfold" in fails(*train(tiny_store, new, "data.split=brats2020", "--fold", 1))
    assert "did you mean brats2021?" in fails(*train(tiny_store, new, "data.split=brats2022"))
    assert "train.patch: [20, 32, 32] does not suit" in fails(
        *train(tiny_store, new, "train.patch=[20,32,32]", "--dry-run")
    )
    assert "no such file or folder" in fails(*train(tmp_path / "nowhere", new))
    assert "prepare it with --spacing 2" in fails(*train(tiny_store, new, "--spacing", 2))
    assert "holds 3 runs" in fails(*train(tiny_store, new, "--init", folds))
    assert "no run in it (config.yaml and model.yaml)" in fails(*train(tiny_store, new, "--init", tmp_path))
    (tmp_path / "bad.yaml").write_text("train: [")
    assert "not valid YAML" in fails("train", "-c", tmp_path / "bad.yaml", "-d", tiny_store, "-o", new)
    assert "'abacus' is not to be had here" in fails("train", "-d", tiny_store, "-o", new, "--device", "abacus")
    assert not new.exists()


def test_training_starts_from_another_run(tiny_store: Path, tiny_run: Path, tmp_path: Path) -> None:
    done = answer(*train(tiny_store, tmp_path / "new", "--init", tiny_run))
    assert (done["runs"][0]["step"], done["runs"][0]["split"]["test"]) == (2, 1)
    assert weights(tmp_path / "new") != weights(tiny_run)


def test_a_raw_folder_is_not_prepared_by_a_dry_run(tiny_phantoms: Path, tmp_path: Path) -> None:
    assert answer(*train(tiny_phantoms, tmp_path / "new", "--dry-run"))["cases"] == 3
    assert not (tmp_path / "new").exists()


# ---- evaluate, compare, report -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick_scores() -> Iterator[None]:
    """Distances between the crumbs of a network of two steps take half a minute; metrics have their own tests."""

    def overlap(mask: Any, truth: Any, spacing_mm: Any, convention: str) -> dict[str, float]:
        return {**dict.fromkeys(METRICS, dice(mask, truth, convention=convention)), "truth_ml": float(truth.sum())}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medmap.scores.score_region", overlap)
        yield


@pytest.fixture(scope="module")
def evaluated(folds: Path, quick_scores: None) -> Path:
    text = works("evaluate", folds, "--device", "cpu")
    assert "3 cases of 3 patients; test parts of 3 runs, pooled" in text
    return folds


def test_evaluation_leaves_tables_and_a_page(evaluated: Path) -> None:
    assert {row["subset"] for row in json.loads((evaluated / "summary.json").read_text())["rows"]} == {"t2f"}
    assert works("report", evaluated / "fold0") == f"{evaluated / 'fold0' / 'report.html'}\n"
    assert answer("report", evaluated, "-o", evaluated / "page.html") == {"report": str(evaluated / "page.html")}
    assert "<html" in (evaluated / "page.html").read_text()


def test_a_floor_and_a_comparison(evaluated: Path, tmp_path: Path) -> None:
    floor = answer("evaluate", evaluated, "--baseline", "flair-threshold")
    assert floor["folder"] == str(evaluated / "baseline-flair-threshold")
    assert floor["cases"] == 3
    assert "baseline 'magic' is not known" in fails("evaluate", evaluated, "--baseline", "magic")
    twin = shutil.copytree(evaluated, tmp_path / "twin")
    text = works("compare", evaluated, twin)
    assert "one run each: not evidence" in text
    assert all(line["difference"]["mean"] == 0 for line in answer("compare", evaluated, twin)["lines"])
    assert answer("compare", evaluated, twin, "--metric", "nsd")["metric"] == "nsd"
    assert "not scored on the same" in fails("compare", evaluated, evaluated / "fold0")


def test_other_patients_answered_by_the_folds_together(evaluated: Path, tmp_path: Path) -> None:
    works("simulate", "-o", tmp_path / "others", "-n", 1, "--spacing", 4, "--seed", 5)
    found = answer("evaluate", evaluated, "--data", tmp_path / "others", "--device", "cpu")
    assert found["folder"] == str(evaluated / "on-others")
    assert found["evaluated"] == "all 1 cases of others, 3 networks together"
    works("prepare", tmp_path / "others", "-o", tmp_path / "coarse", "--spacing", 6)
    said = fails("evaluate", evaluated, "--data", tmp_path / "coarse")
    assert "coarse: is prepared at 6 mm, 4 mm is needed; name the folder of cases itself" in said


def test_what_cannot_be_evaluated(tiny_run: Path, tmp_path: Path) -> None:
    assert "convention 'full' is not known; expected one of brats" in fails("evaluate", tiny_run, "--empty", "full")
    assert "metric 'iou' is not known; expected one of dice" in fails("evaluate", tiny_run, "--metric", "iou")
    assert "nowhere does not exist; expected a run folder" in fails("evaluate", tmp_path / "nowhere")
    assert "nowhere: no such file or folder" in fails("compare", tmp_path / "nowhere", tiny_run)
    assert "nowhere: no such file or folder" in fails("report", tmp_path / "nowhere")


def test_anybodys_masks(tiny_phantoms: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for seg in tiny_phantoms.glob("*/*-seg.nii.gz"):
        shutil.copy(seg, masks / seg.name.replace("-seg", ""))
    found = answer("evaluate", "--pred", masks, "--truth", tiny_phantoms, "-o", tmp_path / "table")
    dice = [row["mean"] for row in found["rows"] if row["metric"] == "dice"]
    assert dice == [1.0] * 4
    assert (tmp_path / "table" / "subsets.csv").is_file()
    next(masks.iterdir()).unlink()
    assert "no mask for 1 of 3 cases" in fails("evaluate", "--pred", masks, "--truth", tiny_phantoms)


# ---- predict -----------------------------------------------------------------------------------------------------


def test_files_by_name_in_any_order(tiny_run: Path, tiny_phantoms: Path, tmp_path: Path) -> None:
    folder = tiny_phantoms / PATIENT
    t2w, t2f = folder / f"{PATIENT}-t2w.nii.gz", folder / f"{PATIENT}-t2f.nii.gz"
    made = []
    for number, words in enumerate(
        [
            ("--t2w", t2w, "--t2f", t2f),
            ("--flair", t2f, "--t2", t2w),
            ("--image", f"T2={t2w}", "--image", f"flair={t2f}"),
        ]
    ):
        out = tmp_path / f"{number}.nii.gz"
        said = works("predict", "--model", tiny_run, *words, "-o", out, "--device", "cpu")
        assert "from t2w + t2f (t1n, t1c missing)" in said
        assert "expect: unknown, nobody has evaluated this model" in said
        made.append(out.read_bytes())
    assert made[0] == made[1] == made[2]
    record = answer("predict", "--model", tiny_run, "--t2f", t2f, "--image", f"adc={t2w}", "-o", tmp_path / "a.nii.gz")
    assert record["sequences"] == {"used": ["t2f"], "missing": ["t1n", "t1c", "t2w"], "ignored": ["adc"]}


def test_the_first_one_named_gives_the_grid(tiny_run: Path, image: Path, tmp_path: Path) -> None:
    volume = nib.load(image)
    affine = volume.affine.copy()
    affine[:3, 3] += 2
    shifted = nib.Nifti1Image(np.roll(np.asanyarray(volume.dataobj), 1), affine)
    nib.save(shifted, tmp_path / "t1n.nii.gz")
    for order in (
        ("--t2f", image, "--t1n", tmp_path / "t1n.nii.gz"),
        ("--t1n", tmp_path / "t1n.nii.gz", "--t2f", image),
    ):
        words = ("predict", "--model", tiny_run, *order, "-o", tmp_path / "seg.nii.gz")
        assert "differ by up to 2 mm" in fails(*words)
        result = call(*words, "--resample")
        assert "was resampled onto the grid of" in result.stderr
        np.testing.assert_array_equal(nib.load(tmp_path / "seg.nii.gz").affine, nib.load(order[1]).affine)


def test_a_folder_with_one_model_load(
    tiny_run: Path, tiny_phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medmap.predict import Predictor

    loads = []
    whole = Predictor.load.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(Predictor, "load", classmethod(lambda cls, *a, **k: loads.append(1) or whole(cls, *a, **k)))
    data, out = shutil.copytree(tiny_phantoms, tmp_path / "data"), tmp_path / "masks"
    words = ("predict", "--model", tiny_run, "-i", data, "-o", out)
    assert "3 to make, 0 there already, 0 cannot be done" in works(*words, "--dry-run")
    assert not out.exists()
    assert f"{out}: 3 masks" in works(*words)
    assert len(loads) == 1
    first = (out / f"{PATIENT}.nii.gz").read_bytes()
    (out / "PHANTOM-00001-000.nii.gz").unlink()
    again = answer(*words)
    assert (list(again["done"]), again["skipped"]) == (["PHANTOM-00001-000"], [PATIENT, "PHANTOM-00002-000"])
    assert works(*words).splitlines()[-1] == f"{out}: 0 masks, 3 were there already"
    assert len(loads) == 2
    for other in (
        ("--labels", "msd"),
        ("--raw",),
        ("--regions",),
        ("--probabilities", "float16"),
        ("--abstain", "0.01"),
    ):
        said = told(3, *words, *other)
        assert said.count("was not made by this model from these images with these options") == 3, other
    image = data / PATIENT / f"{PATIENT}-t1c.nii.gz"
    again = nib.load(image)
    nib.save(nib.Nifti1Image(again.get_fdata() * 1.5, again.affine), image)  # registered anew, say
    assert f"left out {PATIENT}: {out / PATIENT}.nii.gz: is there, but was not made" in told(1, *words)
    image.unlink()
    assert "was not made by this model from these images" in told(1, *words)
    assert f"{out}: 3 masks" in works(*words, "--overwrite")
    assert (out / f"{PATIENT}.nii.gz").read_bytes() != first


def told(failed: int, *words: object) -> str:
    """What a call on three patients of whom some fail says on stderr."""
    result = call(*words)
    assert result.exit_code == (1 if failed == 3 else 3), result.output
    assert result.stdout.splitlines()[-1].endswith(f"{failed} case{'s' * (failed > 1)} failed")
    return " ".join(result.stderr.split())


def test_a_case_that_fails_is_named_and_the_others_go_on(tiny_run: Path, tiny_phantoms: Path, tmp_path: Path) -> None:
    data = shutil.copytree(tiny_phantoms, tmp_path / "data")
    early, late = data / PATIENT, data / "PHANTOM-00001-000"
    (early / f"{PATIENT}-t1c.nii.gz").write_bytes(b"nothing")
    broken = late / "PHANTOM-00001-000-t2f.nii.gz"
    broken.write_bytes(gzip.compress(gzip.decompress(broken.read_bytes())[:5000]))
    words = ("predict", "--model", tiny_run, "-i", data, "-o", tmp_path / "masks")
    result = call(*words)
    assert result.exit_code == 3
    assert f"warning: left out {PATIENT}: " in result.stderr
    assert "warning: left out PHANTOM-00001-000: " in result.stderr
    assert result.stdout.splitlines()[-1] == f"{tmp_path / 'masks'}: 1 mask; 2 cases failed"
    assert sorted(p.name for p in (tmp_path / "masks").glob("*.nii.gz")) == ["PHANTOM-00002-000.nii.gz"]
    shutil.rmtree(data / "PHANTOM-00002-000")
    shutil.rmtree(tmp_path / "masks")
    assert call(*words).exit_code == 1


def test_what_cannot_be_predicted(tiny_run: Path, tiny_phantoms: Path, image: Path, tmp_path: Path) -> None:
    def refused(*words: object, out: object = tmp_path / "seg.nii.gz") -> str:
        return fails("predict", "--model", tiny_run, *words, "-o", out)

    assert "nowhere: no such file or folder; expected the image t2f" in refused("--t2f", tmp_path / "nowhere")
    assert "no sequence in common: the input has adc" in refused("--image", f"adc={image}")
    assert "t2f is named twice" in refused("--t2f", image, "--flair", image)
    assert "adc is named twice" in refused("--image", f"adc={image}", "--image", f"adc={image}")
    assert "masks are written as .nii.gz" in refused("--t2f", image, out=tmp_path / "seg.mha")
    assert "is a folder; name the mask itself" in refused("--t2f", image, out=tmp_path)
    assert "the model knows ncr, ed, et. Choose --labels brats2021" in refused("--t2f", image, "--labels", "brats2024")
    assert "with -i FOLDER the masks go into a folder" in refused("-i", tiny_phantoms)
    assert "give the masks a folder of their own" in refused("-i", tiny_phantoms, out=tiny_phantoms)
    assert "'abacus' is not to be had here" in refused("--t2f", image, "--device", "abacus")
    own = shutil.copy(image, tmp_path / "own.nii.gz")
    assert "is the input" in refused("--t2f", own, out=own)
    missing = fails("predict", "--model", tmp_path / "no", "--t2f", image, "-o", tmp_path / "seg.nii.gz")
    assert "no does not exist; expected a run folder" in missing


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("model=mmfomer", "did you mean mmformer"),
        ("align={anchor: pstar, levels: [xx1]}", "unet base has no level 'xx1'; did you mean x1"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_network_that_there_is_not_is_refused_before_anything_is_prepared(
    tiny_phantoms: Path, tmp_path: Path, key: str, told: str, more: list[str]
) -> None:
    text = fails("train", "-d", tiny_phantoms, "-o", tmp_path / "run", "--set", key, *more)
    assert told in text
    assert not (tmp_path / "run").exists()
