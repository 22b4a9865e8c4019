"""What `medmap predict` may write, and what stands in its way."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import yaml
from made_up_calls import call, fails, works

PATIENT = "PHANTOM-00000-000"


@pytest.fixture
def image(tiny_phantoms: Path) -> Path:
    return tiny_phantoms / PATIENT / f"{PATIENT}-t2f.nii.gz"


def told(code: int, *words: object) -> str:
    """What a call says on stderr."""
    result = call(*words)
    assert result.exit_code == code, result.output
    return " ".join(result.stderr.split())


def test_a_mask_that_is_no_longer_whole_or_nobodys_stops_its_case_alone(
    tiny_run: Path, tiny_phantoms: Path, tmp_path: Path
) -> None:
    out = tmp_path / "masks"
    words = ("predict", "--model", tiny_run, "-i", tiny_phantoms, "-o", out)
    works(*words)
    cut = out / f"{PATIENT}.nii.gz"
    cut.write_bytes(cut.read_bytes()[:100])
    (out / "PHANTOM-00001-000.medmap.json").unlink()
    said = told(3, *words)
    assert f"left out {PATIENT}: {cut}: is there, but was not made" in said
    assert "left out PHANTOM-00001-000: " in said
    assert "PHANTOM-00002-000" not in said
    shutil.rmtree(out)
    out.mkdir()
    region = out / f"{PATIENT}-WT.nii.gz"
    region.write_bytes(b"somebody's")
    assert f"left out {PATIENT}: {region}: is there" in told(3, *words, "--regions")
    assert region.read_bytes() == b"somebody's"


def test_masks_without_lights_do_not_count_where_lights_are_wanted(tiny_phantoms: Path, tmp_path: Path) -> None:
    """The model that comes with medmap knows how far its masks can be trusted."""
    shutil.copytree(tiny_phantoms / PATIENT, tmp_path / "data" / PATIENT)
    words = ("predict", "-i", tmp_path / "data", "-o", tmp_path / "masks", "--device", "cpu")
    works(*words, "--no-qc")
    assert "1 were there already" in works(*words, "--no-qc")
    assert "was not made by this model from these images with these options" in told(1, *words)
    works(*words, "--overwrite")
    assert "1 were there already" in works(*words)
    assert (tmp_path / "masks" / "qc.csv").is_file()


def test_masks_made_with_other_settings_do_not_count(tiny_run: Path, tiny_phantoms: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_phantoms / PATIENT, tmp_path / "data" / PATIENT)
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    words = ("predict", "--model", run, "-i", tmp_path / "data", "-o", tmp_path / "masks", "--device", "cpu")
    works(*words, "--probabilities", "float16")
    assert "1 were there already" in works(*words, "--probabilities", "float16")
    assert "1 were there already" in works(*words)
    assert "with these options" in told(1, *words, "--probabilities", "float32")
    for key, value in (("et_min_ml", 50.0), ("mirror", [0])):
        config = yaml.safe_load((tiny_run / "config.yaml").read_text())
        config["predict"][key] = value
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        assert "with these options" in told(1, *words)


def test_one_patients_mask_takes_the_place_of_its_own_kind_only(tiny_run: Path, image: Path, tmp_path: Path) -> None:
    mask, region = tmp_path / "p.nii.gz", tmp_path / "p-WT.nii.gz"
    words = ("predict", "--model", tiny_run, "--device", "cpu", "--t2f")
    given = Path(shutil.copy(image, region))
    assert f"{region}: is the input {given} itself" in fails(*words, given, "-o", mask, "--regions", "--overwrite")
    assert f"{region}: is there, and was not made by medmap" in fails(*words, image, "-o", mask, "--regions")
    region.unlink()
    mask.write_bytes(image.read_bytes())  # the truth, say
    said = fails(*words, image, "-o", mask)
    assert f"{mask}: is there, and was not made by medmap as it is now; move it, name another place with -o" in said
    assert fails(*words, image, "-o", mask, "--dry-run") == said
    assert mask.read_bytes() == image.read_bytes()
    works(*words, image, "-o", mask, "--overwrite")
    made = mask.read_bytes()
    works(*words, image, "-o", mask, "--regions")
    mask.write_bytes(image.read_bytes())  # corrected by hand, say
    assert "was not made by medmap as it is now" in fails(*words, image, "-o", mask)
    works(*words, image, "-o", mask, "--overwrite")
    assert mask.read_bytes() == made


def test_a_true_mask_among_the_cases_is_never_replaced(tiny_run: Path, tiny_phantoms: Path, tmp_path: Path) -> None:
    truth = tmp_path / "truth" / f"{PATIENT}.nii.gz"
    truth.parent.mkdir()
    shutil.copy(tiny_phantoms / PATIENT / f"{PATIENT}-seg.nii.gz", truth)
    table = tmp_path / "cases.csv"
    table.write_text(f"case,t2f,seg\n{PATIENT},{tiny_phantoms / PATIENT / PATIENT}-t2f.nii.gz,{truth}\n")
    words = ("predict", "--model", tiny_run, "-i", table, "-o", truth.parent, "--overwrite")
    assert f"{truth}: is the input {truth} itself" in fails(*words)


def test_a_name_that_is_not_utf8_is_refused_before_the_work(tiny_run: Path, image: Path, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/M\xfcller_t2.nii.gz"))
    shutil.copy(image, odd)
    words = ("predict", "--model", tiny_run, "--device", "cpu", "--t2w")
    cure = "M\\xfcller_t2.nii.gz: the name is not in UTF-8"
    for given, out in ((odd, tmp_path / "seg.nii.gz"), (image, odd)):
        assert cure in fails(*words, given, "-o", out)
    assert cure in fails("prepare", tmp_path, "-o", tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == [odd.name]


def test_a_dry_run_refuses_what_the_run_refuses(tiny_run: Path, image: Path, tmp_path: Path) -> None:
    words = ("predict", "--model", tiny_run, "-o", tmp_path / "seg.nii.gz", "--dry-run", "--t2f")
    works(*words, image)
    assert "'cuda:99' is not to be had here" in fails(*words, image, "--device", "cuda:99")
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(image.read_bytes()[:3000])
    assert f"{cut}: cut off: fewer bytes than its header promises; copy" in fails(*words, cut)
