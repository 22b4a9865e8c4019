"""The papers' own settings, driven for two steps on made-up patients who are named and laid out as in BraTS."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medmap.config import load_config
from medmap.data.layouts import recognise
from medmap.data.store import Store, write_store
from medmap.models import BACKBONES
from medmap.predict import Predictor
from medmap.train import fit

CONFIGS = sorted((Path(__file__).parent.parent / "configs" / "paper").glob("*.yaml"))
YEARS = ("2018", "2020")


@pytest.fixture(scope="module")
def stores(made_up_brats: dict[str, Path]) -> dict[str, Store]:
    """{year: one patient of each part of the published list}, prepared from a folder as it is published."""
    found = {}
    for year, folder in made_up_brats.items():
        write_store(recognise(folder), folder.parent / f"store{year}")
        found[year] = Store(folder.parent / f"store{year}")
    return found


def test_there_is_one_for_each_paper_and_year() -> None:
    assert [path.stem for path in CONFIGS] == [f"{m}-brats{y}" for m in ("acn", "mmformer", "pmkl") for y in YEARS]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_papers_settings_train(path: Path, stores: dict[str, Store], tmp_path: Path) -> None:
    """Only what would take days on a CPU is changed: the network's size, the crop and the number of steps."""
    whole = load_config(path)
    assert whole.model.size == "faithful"
    assert whole.align.anchor == "pstar"
    assert whole.model.name in BACKBONES
    small = ["model.size=tiny", "train.steps=2", "train.patch=[32, 32, 32]", "train.batch_size=1"]
    store = stores[path.stem[-4:]]
    run = tmp_path / "run"
    fit(load_config(path, small), store, run, device="cpu")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    last = [row for row in log if row["kind"] == "train"][-1]
    assert last["step"] == 2
    assert f"align/{whole.align.levels[0]}" in last["terms"]
    split = json.loads((run / "splits.json").read_text())
    assert (split["name"], [len(split[part]) for part in ("train", "val", "test")]) == (whole.data.split, [1, 1, 1])
    answers = Predictor.load(run, device="cpu").answers
    prepared = store.load(split["test"][0])
    (answer,) = answers(prepared, [store.modalities])
    assert answer.probabilities.shape[0] == 4
