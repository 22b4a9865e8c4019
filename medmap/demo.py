"""The whole way in a few minutes, without any data: phantoms → store → P* training → 15 subsets → one patient → report.

Every step is the public function behind the command of the same name; each line says which command that is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from medmap.card import read_model
from medmap.config import Config, load_config
from medmap.core.labels import SCHEMES
from medmap.data.layouts import CaseFiles, DataFolder, recognise
from medmap.data.store import Store, write_store
from medmap.evaluate import evaluate
from medmap.exhibits import write_exhibits
from medmap.phantom import Settings, write_phantoms
from medmap.predict import Predictor
from medmap.report import write_report
from medmap.robustness import CARD_TEXT, write_card
from medmap.run import CARD, SPLITS, is_finished
from medmap.scores import SUMMARY, table_text
from medmap.segment import segment_case
from medmap.train import Row, fit

SEED = 0
SPACING_MM = 3.0
PATIENTS = 30
GIVEN = ("t2w", "t2f")


def demo_config() -> Config:
    """A tiny U-Net with the learned mixture P*_mix on its deepest latents."""
    return load_config(
        None,
        [
            "name=demo",
            "model=unet",
            "model.size=tiny",
            "align.anchor=pstar",
            "align.levels=[x4]",
            "data.folds=3",
            "data.val_fraction=0.2",
            "train.steps=400",
            "train.batch_size=2",
            "train.patch=[48, 48, 48]",
            "train.lr=4e-3",
            "train.ema=0.98",
            "train.validate_every=200",
            "train.checkpoint_every=200",
        ],
    )


def run(
    out: Path,
    patients: int = PATIENTS,
    *,
    spacing_mm: float = SPACING_MM,
    config: Config | None = None,
    on_line: Callable[[str], None] = print,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Path:
    """Do it all in a folder; returns the report's path.

    out: new or empty, or of an earlier demo: phantoms and store that are whole are kept, a finished training is not
    repeated; on_row: gets the rows of the training log, for a progress bar
    """
    config = demo_config() if config is None else config
    began = time.perf_counter()

    def say(text: str) -> None:
        on_line(f"[{time.perf_counter() - began:5.0f} s] {text}")

    say(f"medmap simulate: {patients} phantoms, four sequences, {spacing_mm:g} mm")
    write_phantoms(out / "phantoms", patients, SEED, Settings(spacing_mm=spacing_mm))
    say("medmap prepare: each sequence on its own brain box, z-scored inside its own brain")
    folder = recognise(out / "phantoms")
    write_store(folder, out / "store")
    store = Store(out / "store")
    say(f"medmap train: {config.model.name} {config.model.size}, {config.align.anchor}, {config.train.steps} steps")
    if not is_finished(out):
        fit(config, store, out, resume=(out / CARD).exists(), on_row=on_row)
    say("medmap evaluate: every subset of the four sequences, on phantoms that training never saw")
    evaluate(out)
    write_card(read_model(out), out)
    write_exhibits(out, store)
    say(f"medmap predict: one of them from {' + '.join(GIVEN)}")
    mask = out / "prediction" / "from-two-sequences.nii.gz"
    given = _with_two_sequences(folder, out)
    segment_case(Predictor.load(out), given, mask, scheme=SCHEMES["brats2023"], model=read_model(out))
    say("medmap predict without --model: the same with what comes with medmap, trained on other phantoms")
    shipped = mask.with_name("from-two-sequences-shipped.nii.gz")
    segment_case(Predictor.load(), given, shipped, scheme=SCHEMES["brats2023"], model=read_model())
    say("medmap report")
    report = write_report(out)
    on_line("")
    on_line(table_text(json.loads((out / SUMMARY).read_text(encoding="utf-8"))))
    on_line("")
    on_line(f"masks   {mask}")
    on_line(f"        {shipped}")
    on_line(f"card    {out / CARD_TEXT}")
    on_line(f"report  {report}")
    return report


def _with_two_sequences(folder: DataFolder, run: Path) -> CaseFiles:
    """The first test case, as if only two of its sequences had been acquired."""
    test = json.loads((run / SPLITS).read_text(encoding="utf-8"))["test"]
    case = next(files for files in folder.cases if files.id == test[0])
    return replace(case, images={name: image for name, image in case.images.items() if name in GIVEN}, labels=None)
