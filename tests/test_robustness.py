"""The card of a model: what it says of every subset, of what a lost sequence costs, and of how it came about."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_scores import GLIOMA, scored

from medmap.card import read_model
from medmap.core.modality import GLIOMA_MRI
from medmap.robustness import CARD_JSON, CARD_PICTURE, CARD_TEXT, write_card
from medmap.run import write_text
from medmap.scores import Score, summarise, without_nan

ABOUT = {"evaluated": "made-up cases", "convention": "brats", "store": {}, "runs": 1, "checkpoint": "best"}


def made_up_rows(cases: int = 12) -> list[Score]:
    """Dice 0.5 for each subset, + 0.2 with t2f, + 0.1 with t1c, − 0.01 a case; every third case has no ET."""
    rows: list[Score] = []
    for number in range(cases):
        for subset in GLIOMA_MRI.subsets():
            value = 0.5 + 0.2 * ("t2f" in subset) + 0.1 * ("t1c" in subset) - 0.01 * number
            for region in ("WT", "TC", "ET"):
                there = 0.0 if region == "ET" and number % 3 == 0 else 5.0
                rows += scored(f"c{number}", str(subset), region, f"p{number}", dice=value, truth_ml=there)
    return rows


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    found: dict[str, Any] = without_nan(summarise(made_up_rows(), GLIOMA_MRI, GLIOMA, about=ABOUT))
    return found


@pytest.fixture
def run(tiny_run: Path, summary: dict[str, Any], tmp_path: Path) -> Path:
    copy = shutil.copytree(tiny_run, tmp_path / "run")
    write_text(copy / "summary.json", json.dumps(summary))
    return copy


def test_what_a_sequence_is_worth_and_how_cases_spread(summary: dict[str, Any]) -> None:
    lost = {(row["sequence"], row["region"]): row for row in summary["cost"]}
    for name, worth in {"t1n": 0.0, "t1c": 0.1, "t2w": 0.0, "t2f": 0.2}.items():
        row = lost[name, "WT"]
        assert (row["mean"], row["n"]) == (pytest.approx(worth), 12)
        assert row["low"] == pytest.approx(worth)  # the same in every case
        assert row["high"] == pytest.approx(worth)
    (row,) = (r for r in summary["rows"] if (r["subset"], r["region"], r["metric"]) == ("t2f", "TC", "dice"))
    values = 0.7 - 0.01 * np.arange(12)
    assert (row["p10"], row["p90"]) == pytest.approx(tuple(np.quantile(values, (0.1, 0.9))))


def test_a_pair_that_a_case_does_not_have_is_left_out() -> None:
    rows = scored("a", "t1c", "WT", "a", dice=0.2, truth_ml=1.0) + scored("b", "t1c", "WT", "b", dice=0.4, truth_ml=1.0)
    rows += scored("b", "t1c+t2f", "WT", "b", dice=0.9, truth_ml=1.0)
    lost = {row["sequence"]: row for row in summarise(rows, GLIOMA_MRI, GLIOMA, about=ABOUT)["cost"]}
    assert set(lost) == {"t2f"}  # without t1c nothing was asked
    assert (lost["t2f"]["mean"], lost["t2f"]["n"], lost["t2f"]["undefined"]) == (pytest.approx(0.5), 1, 1)


def test_the_card_says_everything_there_is_to_say(run: Path, summary: dict[str, Any]) -> None:
    card = write_card(read_model(run), run)
    assert json.loads((run / CARD_JSON).read_text()) == card
    assert card["model"]["sequences"] == list(GLIOMA_MRI)
    assert card["model"]["weights_sha256"] == read_model(run).weights_sha256
    assert card["training"][0]["cases"] == len(json.loads((run / "splits.json").read_text())["train"])
    assert card["measured"] == {k: summary[k] for k in ("evaluated", "cases", "patients", "convention", "store")}
    assert len(card["dice"]) == 15 * 3
    text = (run / CARD_TEXT).read_text()
    sentences = " ".join(text.split())
    for subset in GLIOMA_MRI.subsets():
        assert f"\n| {subset} |" in text
    assert "| t2f | 64 [" in text  # 0.5 + 0.2 − 0.01 · 5.5
    assert "\n| t2f | 20 [20, 20] |" in text
    assert "Not a medical device" in sentences
    assert "12 held-out cases of 12 patients" in sentences
    assert "Over those who have it" in text
    assert str(run) not in text
    assert (run / CARD_PICTURE).read_bytes().startswith(b"\x89PNG")


def test_a_card_without_a_picture_where_nothing_can_draw(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medmap.robustness.find_spec", lambda name: None)
    write_card(read_model(run), run)
    assert not (run / CARD_PICTURE).exists()
    assert CARD_PICTURE not in (run / CARD_TEXT).read_text()
