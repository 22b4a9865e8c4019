"""A folder of phantoms: layouts, manifest, resuming, several processes, refusals."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medmap.core.labels import SCHEMES, scheme_named
from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.data.check import check
from medmap.data.layouts import read_case, recognise
from medmap.errors import InputError
from medmap.phantom import Settings, simulate, write_phantoms
from medmap.phantom import write as module
from medmap.phantom.simulate import patient_of
from medmap.phantom.write import LAYOUTS, layout_for, plan_phantoms

TWO = Settings(ModalitySet(("t1c", "t2f")), spacing_mm=4.0)
ONE = Settings(ModalitySet(("t2f",)), spacing_mm=4.0)
NAMES = ("PHANTOM-00000-000", "PHANTOM-00001-000")


def _hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _manifest(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((folder / "phantoms.json").read_text(encoding="utf-8"))
    return told


def _faultless(folder: Path, deep: bool = False) -> None:
    report = check(folder, deep=deep)
    assert [fault for fault in report.faults if fault.kind != "missing"] == []
    assert report.folder.notes == ()
    assert report.folder.family == "phantom"
    assert report.exit_code == 0


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantoms") / "new" / "folder"
    assert write_phantoms(out, 2, 5, TWO) == list(NAMES)
    return out


# ---- what is written ---------------------------------------------------------------------------------------------


def test_the_usual_layout_is_that_of_brats_2023(written: Path) -> None:
    assert sorted(_hashes(written)) == [
        *(f"{name}/{name}-{what}.nii.gz" for name in NAMES for what in ("seg", "t1c", "t2f")),
        "phantoms.json",
    ]
    _faultless(written, deep=True)


def test_files_hold_the_simulated_voxels_and_the_manifest_says_how(written: Path) -> None:
    manifest = _manifest(written)
    settings = {
        "spacing_mm": 4.0,
        "noise": TWO.noise,
        "noise_correlation": 0.0,
        "bias_correlation": 0.0,
        "randomised": 0.0,
    }
    expected = {
        "format": 4,
        "shape": [40, 48, 40],
        "layout": "brats2023",
        "labels": "brats2023",
        "seed": 5,
        "missing": 0.0,
        "organ": "brain",
    }
    expected |= settings | {"gamma": 0.3, "operated": 0.0, "grown": 1.0} | {"modalities": ["t1c", "t2f"]}
    assert {key: value for key, value in manifest.items() if key != "cases"} == expected
    for name, entry in zip(NAMES, manifest["cases"], strict=True):
        assert (entry["id"], entry["sequences"]) == (name, ["t1c", "t2f"])
        # every number that was drawn, as JSON tells it
        drawn = json.loads(json.dumps(patient_of(entry["seed"], TWO).to_dict()))
        assert {key: entry[key] for key in drawn} == drawn
        case = simulate(entry["seed"], TWO)
        for what, volume in {**case.images, "seg": case.labels}.items():
            image = nib.load(written / name / f"{name}-{what}.nii.gz")
            np.testing.assert_array_equal(np.asanyarray(image.dataobj), volume)
            np.testing.assert_allclose(image.affine, case.affine)
            assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == (1, 1)
            assert image.get_data_dtype() == (np.uint8 if what == "seg" else np.int16)


def test_several_processes_write_the_same_bytes(written: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    write_phantoms(tmp_path, 2, 5, TWO, workers=2, on_progress=lambda *step: seen.append(step))
    assert _hashes(tmp_path) == _hashes(written)
    assert seen == [(1, 2, NAMES[0]), (2, 2, NAMES[1])]


def test_the_layout_of_brats_2021_has_its_names_and_codes(written: Path, tmp_path: Path) -> None:
    four = replace(TWO, modalities=None)
    write_phantoms(tmp_path, 1, 5, four, layout="brats2021")
    name = NAMES[0]
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
        f"{name}_{what}.nii.gz" for what in ("flair", "seg", "t1", "t1ce", "t2")
    ]
    _faultless(tmp_path, deep=True)
    folder = recognise(tmp_path)
    assert folder.scheme == SCHEMES["brats2021"]
    assert folder.modalities == GLIOMA_MRI.names
    one, other = read_case(folder.cases[0]), read_case(recognise(written).cases[0])
    assert set(np.unique(one.labels)) <= {0, 1, 2, 4}
    classes = [scheme_named(scheme).encode(case.labels) for scheme, case in (("brats2021", one), ("brats2023", other))]
    np.testing.assert_array_equal(*classes)
    for modality in ("t1c", "t2f"):
        np.testing.assert_array_equal(one.images[modality], other.images[modality])


def test_operated_patients_and_sequences_of_ones_own_are_read_again(tmp_path: Path) -> None:
    names = ("t2f", "adc", "t2star")
    settings = Settings(ModalitySet(names), spacing_mm=4.0, operated=1.0)
    write_phantoms(tmp_path, 1, 1, settings)
    _faultless(tmp_path, deep=True)
    folder = recognise(tmp_path)
    assert folder.scheme == SCHEMES["brats2024"]
    assert set(folder.modalities) == set(names)
    case = read_case(folder.cases[0])
    assert 4 in case.labels  # type: ignore[operator]
    assert set(case.images) == set(names)


def test_a_liver_is_read_again(tmp_path: Path) -> None:
    settings = Settings(organ="liver", spacing_mm=4.0)
    write_phantoms(tmp_path, 1, 1, settings)
    _faultless(tmp_path, deep=True)
    folder = recognise(tmp_path)
    assert folder.scheme == SCHEMES["liver"]
    assert set(folder.modalities) == set(settings.names)


@pytest.mark.parametrize("missing", [0.5, 1.0])
def test_missing_sequences_are_really_missing_and_one_stays(tmp_path: Path, missing: float) -> None:
    write_phantoms(tmp_path, 3, 2, replace(TWO, modalities=None), missing=missing)
    counts = []
    for entry in _manifest(tmp_path)["cases"]:
        files = {path.name for path in (tmp_path / entry["id"]).iterdir()}
        assert files == {f"{entry['id']}-{what}.nii.gz" for what in (*entry["sequences"], "seg")}
        counts.append(len(entry["sequences"]))
    assert min(counts) >= 1
    assert sum(counts) < 12
    assert missing < 1 or counts == [1] * 3
    _faultless(tmp_path)


def test_each_sequence_is_lost_as_often_as_asked() -> None:
    there = [module._sequences(0, index, GLIOMA_MRI, 0.3) for index in range(2000)]
    for name in GLIOMA_MRI:
        # one always stays, which saves 0.3⁴ / 4 of each; the standard error is 0.01
        assert np.mean([name not in names for names in there]) == pytest.approx(0.3 - 0.3**4 / 4, abs=0.035)


# ---- going on ----------------------------------------------------------------------------------------------------


def test_an_interrupted_run_continues_and_changes_nothing(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "again"
    save = module._write_volume

    def stops(path: Path, *rest: Any) -> None:
        if "00001" in path.name and "seg" in path.name:
            raise KeyboardInterrupt
        save(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_volume", stops)
        with pytest.raises(KeyboardInterrupt):
            write_phantoms(out, 2, 5, TWO)
    assert not (out / NAMES[1]).exists()
    first = out / NAMES[0] / f"{NAMES[0]}-seg.nii.gz"
    kept = first.stat().st_mtime_ns

    seen: list[tuple[int, int, str]] = []
    write_phantoms(out, 2, 5, TWO, on_progress=lambda *step: seen.append(step))
    assert _hashes(out) == _hashes(written)
    assert first.stat().st_mtime_ns == kept
    assert seen == [(2, 2, NAMES[1])]


def test_a_lost_file_is_made_again_and_more_patients_change_none(written: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(written, out)
    (out / NAMES[0] / f"{NAMES[0]}-t2f.nii.gz").unlink()
    write_phantoms(out, 3, 5, TWO)
    before, after = _hashes(written), _hashes(out)
    assert all(after[path] == before[path] for path in before if path != "phantoms.json")
    # fewer than there are: nothing is forgotten
    write_phantoms(out, 1, 5, TWO)
    assert len(_manifest(out)["cases"]) == 3


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count: found 0 patients"),
        ({"seed": -3}, "seed: found -3"),
        ({"missing": 1.5}, r"missing: found 1\.5"),
        ({"missing": float("nan")}, "missing: found nan"),
        ({"layout": "brats1999"}, "layout 'brats1999': not known; expected one of brats2023, brats2021"),
        (
            {"layout": "brats2021", "settings": Settings(ModalitySet(("t1n", "adc", "pd")))},
            "layout brats2021: has no name for adc, pd; expected any of t1n, t1c, t2w, t2f",
        ),
        ({"layout": "brats2021", "settings": Settings(operated=0.5)}, "layout brats2021: has no label for rc"),
        (
            {"layout": "brats2021", "settings": Settings(ModalitySet(("t1n",)), organ="liver")},
            "layout brats2021: has no label for liver, lesion; expected a brain",
        ),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_written(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match=message):
        write_phantoms(out, **{"count": 1, "seed": 0, "settings": ONE, **arguments})
    assert not out.exists()


def test_every_layout_has_a_scheme_and_a_name_for_all_usual_sequences() -> None:
    for name in LAYOUTS:
        layout = layout_for(name, Settings())
        assert layout.scheme in SCHEMES
        files = {layout.file_name("A", what) for what in (*GLIOMA_MRI, "seg")}
        assert len(files) == 5
    assert layout_for("brats2023", Settings(operated=0.1)).scheme == "brats2024"


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/out: cannot be written .*choose a folder you may write to"):
        write_phantoms(tmp_path / "file" / "out", 1, 0, ONE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda out: write_phantoms(out, 2, 6, TWO), "made with seed = 5, asked for 6"),
        (
            lambda out: write_phantoms(out, 2, 5, replace(TWO, spacing_mm=2.0)),
            r"made with spacing_mm = 4\.0, asked for 2\.0",
        ),
        (lambda out: write_phantoms(out, 2, 5, ONE), r"made with modalities = \['t1c', 't2f'\], asked for \['t2f'\]"),
        (lambda out: write_phantoms(out, 2, 5, TWO, layout="brats2021"), "made with layout = 'brats2023'"),
        (lambda out: write_phantoms(out, 2, 5, TWO, missing=0.5), r"made with missing = 0\.0, asked for 0\.5"),
    ],
)
def test_other_settings_do_not_mix_with_what_is_there(
    written: Path, call: Callable[[Path], object], message: str
) -> None:
    before = _hashes(written)
    with pytest.raises(InputError, match=message):
        call(written)
    assert _hashes(written) == before


def test_phantoms_of_unknown_making_are_refused(tmp_path: Path) -> None:
    (tmp_path / NAMES[0]).mkdir()
    with pytest.raises(InputError, match=r"no phantoms\.json to tell how they were made; use a new folder"):
        write_phantoms(tmp_path, 1, 0, ONE)
    (tmp_path / "phantoms.json").write_text('{"cases": 3}')
    with pytest.raises(InputError, match="not a readable manifest of phantoms"):
        write_phantoms(tmp_path, 1, 0, ONE)


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").write_text("")
    plan_phantoms(tmp_path, 1, 0, ONE)
    (tmp_path / "BraTS-GLI-00002-000").mkdir()
    for ask in (write_phantoms, plan_phantoms):
        with pytest.raises(InputError, match=r"found BraTS-GLI-00002-000, and no phantoms\.json; expected nothing"):
            ask(tmp_path, 1, 0, ONE)
    assert not (tmp_path / "phantoms.json").exists()


def test_a_plan_writes_nothing_and_knows_what_is_there(written: Path, tmp_path: Path) -> None:
    before = _hashes(written)
    assert [id for id, *_ in plan_phantoms(written, 3, 5, TWO).todo] == ["PHANTOM-00002-000"]
    assert _hashes(written) == before
    assert len(plan_phantoms(tmp_path / "new" / "folder", 3, 5, TWO).todo) == 3
    assert not (tmp_path / "new").exists()


def test_a_disk_without_room_is_noticed_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = shutil._ntuple_diskusage(100, 90, 10**6)  # type: ignore[attr-defined]
    monkeypatch.setattr("shutil.disk_usage", lambda _: room)
    with pytest.raises(InputError, match=r"1000 patients need about 1\.\d GB, 0\.0 GB are free; make room, ask for"):
        write_phantoms(tmp_path, 1000, 0, Settings())
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_becomes_full_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_volume", full)
    with pytest.raises(InputError, match=r"No space left on device.*0 of 1 patients are whole.*run again"):
        write_phantoms(tmp_path, 1, 0, ONE)
