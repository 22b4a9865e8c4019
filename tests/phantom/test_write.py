"""A folder of phantoms: layout, manifest, resuming, refusals."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.errors import InputError
from medmap.phantom import simulate, write_phantoms
from medmap.phantom import write as module

COARSE = {"spacing_mm": 4.0, "modalities": ModalitySet(("t1c", "t2f"))}


def _hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantoms") / "new" / "folder"
    assert write_phantoms(out, 2, 5, **COARSE) == ["PHANTOM-00000-000", "PHANTOM-00001-000"]
    return out


def test_the_layout_is_that_of_brats_2023(written: Path) -> None:
    assert sorted(_hashes(written)) == [
        "PHANTOM-00000-000/PHANTOM-00000-000-seg.nii.gz",
        "PHANTOM-00000-000/PHANTOM-00000-000-t1c.nii.gz",
        "PHANTOM-00000-000/PHANTOM-00000-000-t2f.nii.gz",
        "PHANTOM-00001-000/PHANTOM-00001-000-seg.nii.gz",
        "PHANTOM-00001-000/PHANTOM-00001-000-t1c.nii.gz",
        "PHANTOM-00001-000/PHANTOM-00001-000-t2f.nii.gz",
        "phantoms.json",
    ]


def test_files_hold_the_simulated_voxels_and_the_manifest_says_how(written: Path) -> None:
    manifest = json.loads((written / "phantoms.json").read_text())
    assert manifest["format"] == 1
    assert manifest["labels"] == "brats2023"
    assert (manifest["seed"], manifest["spacing_mm"], manifest["modalities"]) == (5, 4.0, ["t1c", "t2f"])
    for entry in manifest["cases"]:
        case = simulate(entry["seed"], **COARSE)
        for what, volume in {**case.images, "seg": case.labels}.items():
            image = nib.load(written / entry["id"] / f"{entry['id']}-{what}.nii.gz")
            np.testing.assert_array_equal(np.asanyarray(image.dataobj), volume)
            np.testing.assert_allclose(image.affine, case.affine)
            assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == (1, 1)
        assert entry["tumour"]["wt_ml"] > 0
        assert set(entry["scans"]) == {"t1n", "t1c", "t2w", "t2f"}


def test_an_interrupted_run_continues_and_changes_nothing(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "again"
    save = module._write_volume

    def stops(path: Path, *rest: object) -> None:
        if "00001" in path.name and "seg" in path.name:
            raise KeyboardInterrupt
        save(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_volume", stops)
        with pytest.raises(KeyboardInterrupt):
            write_phantoms(out, 2, 5, **COARSE)
    assert not (out / "PHANTOM-00001-000").exists()
    first = out / "PHANTOM-00000-000" / "PHANTOM-00000-000-seg.nii.gz"
    kept = first.stat().st_mtime_ns

    seen: list[tuple[int, int, str]] = []
    write_phantoms(out, 2, 5, on_progress=lambda *step: seen.append(step), **COARSE)
    assert _hashes(out) == _hashes(written)
    assert first.stat().st_mtime_ns == kept
    assert seen == [(1, 2, "PHANTOM-00000-000"), (2, 2, "PHANTOM-00001-000")]


def test_a_lost_file_is_made_again_and_more_patients_change_none(written: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(written, out)
    (out / "PHANTOM-00000-000" / "PHANTOM-00000-000-t2f.nii.gz").unlink()
    write_phantoms(out, 3, 5, **COARSE)
    before, after = _hashes(written), _hashes(out)
    assert all(after[path] == before[path] for path in before if path != "phantoms.json")
    # fewer than there are: nothing is forgotten
    write_phantoms(out, 1, 5, **COARSE)
    assert len(json.loads((out / "phantoms.json").read_text())["cases"]) == 3


@pytest.mark.parametrize("missing", [0.6, 1.0])
def test_missing_sequences_are_really_missing_and_one_stays(tmp_path: Path, missing: float) -> None:
    write_phantoms(tmp_path, 4, 2, missing=missing, spacing_mm=4.0)
    counts = []
    for entry in json.loads((tmp_path / "phantoms.json").read_text())["cases"]:
        files = {path.name for path in (tmp_path / entry["id"]).iterdir()}
        assert files == {f"{entry['id']}-{what}.nii.gz" for what in (*entry["sequences"], "seg")}
        counts.append(len(entry["sequences"]))
    assert min(counts) >= 1
    assert sum(counts) < 16
    assert missing < 1 or counts == [1] * 4


def test_each_sequence_is_lost_as_often_as_asked() -> None:
    there = [module._sequences(0, index, GLIOMA_MRI, 0.3) for index in range(2000)]
    for name in GLIOMA_MRI:
        # one always stays, which saves 0.3⁴ / 4 of each; the standard error is 0.01
        assert np.mean([name not in names for names in there]) == pytest.approx(0.3 - 0.3**4 / 4, abs=0.035)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count: found 0 patients"),
        ({"seed": -3}, "seed: found -3"),
        ({"missing": 1.5}, "missing: found 1.5"),
        ({"noise": -1.0}, "noise: found -1.0"),
        ({"spacing_mm": 9.0}, "spacing: found 9.0 mm"),
        ({"modalities": ModalitySet(("dwi",))}, "modality dwi"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_written(
    tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match=message):
        write_phantoms(out, **{"count": 1, "seed": 0, **arguments})  # type: ignore[arg-type]
    assert not out.exists()


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_phantoms(tmp_path / "file" / "out", 1, 0)


def test_other_settings_do_not_mix_with_what_is_there(written: Path) -> None:
    before = _hashes(written)
    with pytest.raises(InputError, match="made with seed = 5, asked for 6"):
        write_phantoms(written, 2, 6, **COARSE)
    with pytest.raises(InputError, match=r"made with spacing_mm = 4\.0, asked for 2\.0"):
        write_phantoms(written, 2, 5, modalities=COARSE["modalities"])  # type: ignore[arg-type]
    assert _hashes(written) == before


def test_phantoms_of_unknown_making_are_refused(tmp_path: Path) -> None:
    (tmp_path / "PHANTOM-00000-000").mkdir()
    with pytest.raises(InputError, match=r"no phantoms.json"):
        write_phantoms(tmp_path, 1, 0)
    (tmp_path / "phantoms.json").write_text('{"cases": 3}')
    with pytest.raises(InputError, match="not a readable manifest"):
        write_phantoms(tmp_path, 1, 0)


def test_a_full_disk_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_volume", full)
    with pytest.raises(InputError, match=r"No space left on device.*0 of 1 patients are whole.*run again"):
        write_phantoms(tmp_path, 1, 0, **COARSE)
