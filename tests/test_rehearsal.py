"""How long a data set would take here: measured on one case, and multiplied."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from made_up_calls import answer, call, fails

from medmap.config import load_config
from medmap.data.layouts import recognise
from medmap.data.store import Store, write_store
from medmap.errors import InputError
from medmap.rehearsal import Rehearsal, rehearse

TINY = load_config(None, ["model.size=tiny", "train.patch=[32,32,32]", "train.steps=600"])


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder that can be looked at."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_one_case_is_measured_and_nothing_stays(tiny_phantoms: Path, scratch: Path, tmp_path: Path) -> None:
    found = rehearse(tiny_phantoms, TINY, device="cpu")
    assert (found.cases, found.network) == (3, "unet tiny")
    assert found.train_minutes is not None
    assert 0 < found.predict_minutes < found.evaluate_minutes
    assert found.train_minutes > 600 * 1e-3 / 60
    assert not list(scratch.glob("medmap-*"))
    write_store(recognise(tiny_phantoms), tmp_path / "store")
    whole = sum(file.stat().st_size for file in (tmp_path / "store").rglob("*") if file.is_file())
    assert found.store_gb == pytest.approx(whole / 1e9, rel=0.3)
    assert len(Store(tmp_path / "store").ids) == 3


def test_coarser_data_take_less(tiny_phantoms: Path) -> None:
    fine, coarse = (rehearse(tiny_phantoms, TINY, spacing_mm=mm, device="cpu") for mm in (None, 8.0))
    assert coarse.store_gb < fine.store_gb / 3


def test_without_a_segmentation_there_is_no_training(tiny_phantoms: Path, tmp_path: Path, scratch: Path) -> None:
    data = shutil.copytree(tiny_phantoms, tmp_path / "data")
    for mask in data.glob("*/*-seg.nii.gz"):
        mask.unlink()
    found = rehearse(data, TINY, device="cpu")
    assert found.train_minutes is None
    for image in data.glob("*/*-t1c.nii.gz"):
        image.write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be prepared"):
        rehearse(data, TINY, device="cpu")
    assert not list(scratch.glob("medmap-*"))


def test_doctor_says_it_and_whether_there_is_room(tiny_phantoms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = Rehearsal(3, "unet base", 0.5, 0.4, 90.0, 3.0, 2.0)
    monkeypatch.setattr("medmap.rehearsal.rehearse", lambda data, **options: said)
    assert answer("doctor", tiny_phantoms)["data"] == said.to_dict()
    text = call("doctor", tiny_phantoms).stdout
    assert (
        "3 cases: prepare 24 s and 0.5 GB, train 90 min (unet base, one fold), evaluate 3 min, predict 2 min; measured "
        "on one of them"
    ) in text
    monkeypatch.setattr(
        "medmap.rehearsal.rehearse", lambda data, **options: Rehearsal(3, "unet base", 1e6, 0.4, None, 3.0, 2.0)
    )
    large = call("doctor", tiny_phantoms)
    assert large.exit_code == 1
    assert "Not ready: the prepared data do not fit on this disk" in large.stdout
    assert "no segmentation to train on" in large.stdout
    assert "no such file or folder" in fails("doctor", tiny_phantoms / "nowhere")
