"""The journey: phantoms → prepare → train → evaluate → predict → report, as one call and a second time."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medmap import demo
from medmap.config import Config, parse_config


def short() -> Config:
    recipe = {"steps": 60, "patch": [32, 32, 32], "batch_size": 1, "lr": 0.006, "validate_every": 60, "ema": 0.9}
    return parse_config({**demo.demo_config().model_dump(mode="json"), "train": recipe})


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return []


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> Path:
    out = tmp_path_factory.mktemp("demo")
    report = demo.run(out, 6, spacing_mm=4.0, config=short(), on_line=lines.append)
    assert report == out / "report.html"
    return out


def test_it_ends_with_a_report_and_a_table_of_all_subsets(out: Path, lines: list[str]) -> None:
    text = "\n".join(lines)
    assert "t1n+t1c+t2w+t2f" in text
    assert "without t1c" in text
    assert str(out / "report.html") in text
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    rows = json.loads((out / "summary.json").read_text(encoding="utf-8"))["rows"]
    assert len({row["subset"] for row in rows}) == 15


def test_it_predicts_from_two_sequences_on_the_patients_own_grid(out: Path) -> None:
    mask = nib.load(out / "prediction" / "from-two-sequences.nii.gz")
    record = json.loads((out / "prediction" / "from-two-sequences.medmap.json").read_text(encoding="utf-8"))
    test = json.loads((out / "splits.json").read_text(encoding="utf-8"))["test"]
    image = nib.load(out / "phantoms" / test[0] / f"{test[0]}-t2w.nii.gz")
    assert mask.shape == image.shape
    np.testing.assert_array_equal(mask.affine, image.affine)
    assert set(np.unique(mask.dataobj)) <= {0, 1, 2, 3}
    assert record["expected"]["sequences"] == "t2w+t2f"
    assert set(record["sequences"]["missing"]) == {"t1n", "t1c"}


def test_it_predicts_with_the_model_that_comes_with_medmap_too(out: Path) -> None:
    mask = nib.load(out / "prediction" / "from-two-sequences-shipped.nii.gz")
    record = json.loads((out / "prediction" / "from-two-sequences-shipped.medmap.json").read_text(encoding="utf-8"))
    own = json.loads((out / "prediction" / "from-two-sequences.medmap.json").read_text(encoding="utf-8"))
    assert set(np.unique(mask.dataobj)) <= {0, 1, 2, 3}
    assert record["model"] != own["model"]
    assert record["sequences"] == own["sequences"]


def test_a_second_call_trains_nothing_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = (out / "checkpoints" / "best" / "model.safetensors").read_bytes()
    monkeypatch.setattr(demo, "fit", lambda *args, **kwargs: pytest.fail("trained again"))
    monkeypatch.setattr(demo, "evaluate", lambda run: None)
    monkeypatch.setattr(demo, "write_exhibits", lambda run, store: None)
    demo.run(out, 6, spacing_mm=4.0, config=short(), on_line=lambda line: None)
    assert (out / "checkpoints" / "best" / "model.safetensors").read_bytes() == weights
