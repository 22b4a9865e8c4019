"""What a run leaves behind for others: safetensors and plain text, never a pickle.

    RUN/config.yaml                 every key, resolved
    RUN/model.yaml                  what the weights need to be used: sequences, label scheme, spacing
    RUN/checkpoints/best/           the weights that validated best: model.safetensors, state.json
    RUN/checkpoints/last/           everything to go on from: model, ema, optimizer .safetensors, state.json

A checkpoint is written beside the old one and then takes its place, so that there is always a whole one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from medmap.align import AlignedSegmenter, build_segmenter
from medmap.config import Config, load_config
from medmap.core.labels import LabelScheme
from medmap.core.modality import ModalitySet
from medmap.errors import CheckpointError, InputError

FORMAT = 1
CONFIG, CARD, CHECKPOINTS, STATE = "config.yaml", "model.yaml", "checkpoints", "state.json"


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
    return load_config(run / CONFIG), _read_card(run / CARD)


def _read_card(file: Path) -> ModelCard:
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


def is_finished(run: Path) -> bool:
    """Whether a run has done all its steps; False where there is no run, or it was interrupted."""
    try:
        config, _ = read_run(run)
        state = json.loads((checkpoint_folder(run, "last") / STATE).read_text(encoding="utf-8"))
    except CheckpointError:
        return False
    return bool(state["step"] >= config.train.steps)


def load_network(run: Path, which: str = "best", device: str | torch.device = "cpu") -> AlignedSegmenter:
    """The network of a run in evaluation mode, with the weights of its checkpoint ``best`` or ``last``.

    Raises CheckpointError when there is no such checkpoint or its tensors are not the network's.
    """
    config, card = read_run(run)
    folder = checkpoint_folder(run, which)
    network = build_segmenter(config.model, config.align, card.modalities, len(card.scheme.classes))
    smoothed = folder / "ema.safetensors"
    load_weights(network, smoothed if smoothed.is_file() else folder / "model.safetensors")
    return network.to(device).eval()


def load_weights(network: torch.nn.Module, file: Path) -> None:
    """Fill a network from a file; nothing is loaded half. Raises CheckpointError naming the tensors that differ."""
    tensors = read_tensors(file)
    own = network.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    unlike = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if missing or extra or unlike:
        raise CheckpointError(
            f"{file}: weights of another network: "
            + "; ".join(
                f"{len(names)} tensors {what} (such as {names[0]})"
                for what, names in (
                    ("are missing", missing),
                    ("are not the network's", extra),
                    ("have another shape", unlike),
                )
                if names
            )
            + ". Use the configuration the weights were trained with (model, align, modalities, labels)"
        )
    network.load_state_dict(tensors)


def checkpoint_folder(run: Path, which: str) -> Path:
    """RUN/checkpoints/best or last; the older copy where a write was cut short. Raises CheckpointError if neither."""
    folder = run / CHECKPOINTS / which
    for candidate in (folder, folder.with_suffix(".old")):
        if (candidate / STATE).is_file():
            return candidate
    raise CheckpointError(
        f"{run}: no checkpoint {which!r}; it is written during training: `medmap train --resume {run}`"
    )


@contextmanager
def writing(run: Path) -> Iterator[None]:
    """Turn what the system raises while a run is written into one InputError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{run}: cannot be written ({error}); make room, or choose a folder with -o that may be written to. "
            f"A run that has begun keeps its last checkpoint: `medmap train --resume {run}`"
        ) from error


def save_checkpoint(run: Path, which: str, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
    """Write {file stem: tensors} and a JSON state as one checkpoint, all of it or nothing.

    Raises InputError where the disk is full or may not be written.
    """
    with writing(run):
        _replace(run / CHECKPOINTS / which, tensors, state)


def _replace(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
    fresh, old = folder.with_suffix(".new"), folder.with_suffix(".old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for stem, group in tensors.items():
        save_file(
            {name: tensor.detach().contiguous().cpu() for name, tensor in group.items()}, fresh / f"{stem}.safetensors"
        )
    (fresh / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    for file in fresh.iterdir():  # on the disk before the old one goes, or a power cut could leave neither
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    if folder.exists():  # where it does not, an earlier write was cut short and ``old`` is the only whole one
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises CheckpointError where it is absent or damaged."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as safetensors ({error}); train or copy the run again"
        ) from error


def flatten_optimizer(state: dict[str, Any]) -> dict[str, Tensor]:
    """An optimiser's per-parameter state {index: {name: tensor}} as ``index.name`` tensors."""
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, entries in state["state"].items()
        for name, value in entries.items()
    }


def unflatten_optimizer(tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The inverse of `flatten_optimizer`, with the parameter groups of the present optimiser."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    return {"state": state, "param_groups": groups}


def write_text(file: Path, text: str) -> None:
    """Write a text file in one step: readers see the old one or the new one."""
    fresh = file.with_name(f".{file.name}.new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, file)
