"""A run folder as far as it is plain text: nothing here imports torch.

RUN/config.yaml                 every key, resolved
RUN/model.yaml                  what the weights need to be used: sequences, label scheme, spacing
RUN/splits.json, env.json       which patients, which machine, data and versions
RUN/log.jsonl, metrics.csv      what happened
RUN/checkpoints/{best,last}/    tensors: `medmap.checkpoint`
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from medmap.config import Config, load_config
from medmap.core.labels import LabelScheme
from medmap.core.modality import ModalitySet
from medmap.errors import CheckpointError, InputError

FORMAT = 1
CONFIG, CARD, CHECKPOINTS, STATE = "config.yaml", "model.yaml", "checkpoints", "state.json"
Row = dict[str, Any]
LOG, TABLE, SPLITS, ENV = "log.jsonl", "metrics.csv", "splits.json", "env.json"


@dataclass(frozen=True)
class ModelCard:
    """What weights need to be used by somebody who has nothing else.

    modalities: the sequences, in mask order; scheme: label classes and regions; spacing_mm: of the common grid, None
    where the network was trained on each data set's own
    """

    modalities: ModalitySet
    scheme: LabelScheme
    spacing_mm: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {
            "format": FORMAT,
            "modalities": list(self.modalities),
            "labels": self.scheme.to_dict(),
            "spacing_mm": self.spacing_mm,
        }


def write_run(run: Path, config: Config, card: ModelCard) -> None:
    """Put the configuration and the card of a run in its folder."""
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / CONFIG, config.to_yaml())
    write_text(run / CARD, yaml.safe_dump(card.to_dict(), sort_keys=False))


def read_run(run: Path) -> tuple[Config, ModelCard]:
    """The configuration and the card of a run. Raises CheckpointError where the folder is not one."""
    for name in (CONFIG, CARD):
        if not (run / name).is_file():
            raise CheckpointError(
                f"{run}: no {name} in it; expected a folder that `medmap train` wrote, or one that holds such folders"
            )
    return load_config(run / CONFIG), read_card(run / CARD)


def read_card(file: Path) -> ModelCard:
    try:
        card = yaml.safe_load(file.read_text(encoding="utf-8"))
        if card["format"] != FORMAT:
            raise CheckpointError(f"{file}: format {card['format']!r}; this version of medmap reads {FORMAT}")
        modalities, scheme = ModalitySet(tuple(card["modalities"])), LabelScheme.from_dict(card["labels"])
        return ModelCard(modalities, scheme, card["spacing_mm"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError, InputError) as error:
        raise CheckpointError(f"{file}: damaged ({' '.join(str(error).split())}); copy the run again") from error


def find_runs(path: Path) -> list[Path]:
    """The run itself, or every run below a folder of folds or seeds, by name.

    Raises CheckpointError where there is none.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; expected a run folder that `medmap train` wrote")
    if (path / CONFIG).is_file():
        return [path]
    runs = sorted(found.parent for found in path.glob("*/**/" + CONFIG) if (found.parent / CARD).is_file())
    if not runs:
        raise CheckpointError(f"{path}: no run in it ({CONFIG} and {CARD}); train one with `medmap train -o {path}`")
    return runs


def memory_gb(runs: Sequence[Path]) -> float:
    """What a process may take that answers with the networks of some runs together."""
    return 1.0 + sum(read_run(run)[0].predict.memory_gb for run in runs)


def is_finished(run: Path) -> bool:
    """Whether a run has done all its steps; False where there is no run, or it was interrupted."""
    done = steps_done(run)
    return done is not None and done[0] >= done[1]


def steps_done(run: Path) -> tuple[int, int] | None:
    """Steps that are done, and steps of the recipe; None where there is no run with a last checkpoint."""
    try:
        config, _ = read_run(run)
        state = json.loads((checkpoint_folder(run, "last") / STATE).read_text(encoding="utf-8"))
    except CheckpointError:
        return None
    return int(state["step"]), config.train.steps


def checkpoint_folder(run: Path, which: str) -> Path:
    """RUN/checkpoints/best or last; the older copy where a write was cut short. Raises CheckpointError if neither."""
    folder = run / CHECKPOINTS / which
    for candidate in (folder, folder.with_suffix(".old")):
        if (candidate / STATE).is_file():
            return candidate
    there = sorted(path.name for path in (run / CHECKPOINTS).glob("[!.]*") if path.suffix == "")
    raise CheckpointError(
        f"{run}: no checkpoint {which!r}, there is {', '.join(there) or 'none'}; it is written during training: "
        f"`medmap train --resume {run}`"
    )


@contextmanager
def writing(run: Path) -> Iterator[None]:
    """Turn what the system raises while a run is written into one InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{run}: cannot be written ({error}); make room, or choose a folder with -o that may be written to. "
            f"A run that has begun keeps its last checkpoint: `medmap train --resume {run}`"
        ) from error


def write_text(file: Path, text: str) -> None:
    """Write a text file in one step: readers see the old one or the new one."""
    fresh = file.with_name(f".{file.name}.new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, file)


class RunLog:
    """log.jsonl, a row a line as it happens, and metrics.csv, the same flattened; on_row gets every row as well."""

    def __init__(self, run: Path, step: int, on_row: Callable[[Row], None]) -> None:
        self.file = run / LOG
        self.csv = run / TABLE
        self.on_row = on_row
        rows = read_log(self.file) if self.file.exists() else []
        # A resumed run repeats the steps after its last checkpoint; their old rows go.
        self.rows = [row for row in rows if row["step"] <= step]
        write_text(self.file, "".join(json.dumps(row) + "\n" for row in self.rows))

    def write(self, row: Row) -> None:
        self.rows.append(row)
        with writing(self.file.parent), self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.on_row(row)

    def table(self) -> None:
        flat = [_flat(row) for row in self.rows]
        names = list(dict.fromkeys(name for row in flat for name in row))
        with self.csv.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, names)
            writer.writeheader()
            writer.writerows(flat)


def read_log(file: Path) -> list[Row]:
    """The rows of a log.jsonl; a last line that was cut short is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _flat(row: Mapping[str, Any], prefix: str = "") -> Row:
    flat: Row = {}
    for name, value in row.items():
        flat |= _flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
