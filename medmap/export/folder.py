"""A run as a folder that may be given away: weights, what they need to be used, and nothing of where they came from."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from medmap.card import CARD_JSON, CARD_PICTURE, CARD_TEXT, ModelFolder
from medmap.confidence import CONFIDENCE, read_confidence
from medmap.errors import CheckpointError
from medmap.export.package import (
    LICENCE,
    Package,
    licence_text,
    members,
    packed,
    public_config,
    public_summary,
    readme,
    whole,
)
from medmap.run import CARD, CHECKPOINTS, CONFIG, STATE, checkpoint_folder, read_run, write_text
from medmap.scores import SUMMARY

WEIGHTS, ABOUT = "model.safetensors", "README.md"


def export_folder(model: ModelFolder, out: Path, licence: str | None = None) -> Package:
    """Write a model folder for `medmap predict --model`: what a run needs to answer, and no more.

    Not among it: optimiser, log, patients' names, places and name of the machine. Several folds stay one folder each,
    and answer together as they did. Whichever checkpoint it was, in the folder it is ``best``.

    Raises InputError where ``out`` exists or cannot be written, CheckpointError for damaged weights.
    """
    text = licence_text(model, licence)
    with whole(out) as fresh:
        for name, run in members(model).items():
            _write_member(fresh / name, run, model.which)
        if (summary := public_summary(model)) is not None:
            write_text(fresh / SUMMARY, json.dumps({**summary, "checkpoint": "best"}))
            _copy_card(model.path, fresh)
        if read_confidence(model) is not None:
            _copy_without_names(model.path / CONFIDENCE, fresh)
        use = "```sh\nmedmap predict --model THIS_FOLDER --t2f flair.nii.gz -o seg.nii.gz\n```"
        write_text(fresh / ABOUT, readme(model, "A model of medmap", use, text))
        write_text(fresh / LICENCE, text)
    return packed(out)


def _copy_card(path: Path, fresh: Path) -> None:
    """The robustness card of these weights."""
    if (path / CARD_JSON).is_file():
        _copy_without_names(path / CARD_JSON, fresh)
        for name in (CARD_TEXT, CARD_PICTURE):
            if (path / name).is_file():
                (fresh / name).write_bytes((path / name).read_bytes())


def _copy_without_names(file: Path, fresh: Path) -> None:
    """What was measured of these weights, whose files keep their bytes and hashes here, without the names of stores."""
    told = json.loads(file.read_text(encoding="utf-8"))
    stores = told["measured"]["store"]
    if isinstance(stores, dict):  # an exported folder has a list already
        told["measured"]["store"] = list(stores.values())
    write_text(fresh / file.name, json.dumps(told, indent=1, ensure_ascii=False) + "\n")


def _write_member(folder: Path, run: Path, which: str) -> None:
    from medmap.checkpoint import read_tensors

    best, source = folder / CHECKPOINTS / "best", checkpoint_folder(run, which)
    best.mkdir(parents=True)
    smoothed = source / "ema.safetensors"
    weights = smoothed if smoothed.is_file() else source / WEIGHTS
    read_tensors(weights)  # whole?
    (best / WEIGHTS).write_bytes(weights.read_bytes())
    write_text(best / STATE, json.dumps({"step": _step(source)}, indent=1))
    write_text(folder / CONFIG, public_config(run).to_yaml())
    _, card = read_run(run)
    write_text(folder / CARD, yaml.safe_dump(card.to_dict(), sort_keys=False))


def _step(checkpoint: Path) -> int:
    try:
        return int(json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / STATE}: damaged ({error}); copy the run again") from error
