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

KEYS = ["model.size=tiny", "train.patch=[32,32,32]", "train.steps=600"]
TINY = load_config(None, KEYS)


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


def test_every_part_is_told(tiny_phantoms: Path) -> None:
    heard: list[tuple[int, int]] = []
    rehearse(tiny_phantoms, TINY, device="cpu", told=lambda done, total, text: heard.append((done, total)))
    assert heard == [(done, 4) for done in range(5)]


def test_memory_grows_with_the_batch_and_windows_bound_it(tiny_phantoms: Path) -> None:
    """What is kept for the way back is that of every sample; a window takes less than a pass."""
    usual = rehearse(tiny_phantoms, TINY, device="cpu")
    twice = rehearse(tiny_phantoms, load_config(None, [*KEYS, "train.batch_size=4"]), device="cpu")
    assert usual.train_gb is not None
    assert twice.train_gb is not None
    weights_gb = 5 * 4 * 0.7e6 / 1e9
    assert twice.train_gb - weights_gb == pytest.approx(2 * (usual.train_gb - weights_gb), rel=0.1)
    narrow = rehearse(tiny_phantoms, load_config(None, [*KEYS, "predict.memory_gb=0.01"]), device="cpu")
    assert 0 < narrow.predict_gb < usual.predict_gb < TINY.predict.memory_gb


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
    said = Rehearsal(3, "unet base", 0.5, 0.4, 90.0, 3.0, 2.0, 2.34, 1.5)
    monkeypatch.setattr("medmap.rehearsal.rehearse", lambda data, **options: said)
    assert answer("doctor", tiny_phantoms)["data"] == said.to_dict()
    text = call("doctor", tiny_phantoms).stdout
    assert (
        "3 cases: prepare 24 s and 0.5 GB, train 90 min with 2.3 GB of memory (unet base, one fold), evaluate 3 min, "
        "predict 2 min with 1.5 GB; measured on a part of one of them"
    ) in text
    small = Rehearsal(1, "unet base", 0.5, 0.001, 90.0, 3.0, 2.0, 2.34, 1.5)
    monkeypatch.setattr("medmap.rehearsal.rehearse", lambda data, **options: small)
    assert " 1 case: prepare < 1 s and 0.5 GB" in call("doctor", tiny_phantoms).stdout
    monkeypatch.setattr(
        "medmap.rehearsal.rehearse",
        lambda data, **options: Rehearsal(3, "unet base", 1e6, 0.4, None, 3.0, 2.0, None, 1.5),
    )
    large = call("doctor", tiny_phantoms)
    assert large.exit_code == 1
    assert "Not ready: the prepared data do not fit on this disk" in large.stdout
    assert "no segmentation to train on" in large.stdout
    assert "no such file or folder" in fails("doctor", tiny_phantoms / "nowhere")
