"""A run's tensors: safetensors and JSON, never a pickle.

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
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from medmap.align import AlignedSegmenter, build_segmenter
from medmap.errors import CheckpointError
from medmap.models.blocks import placed
from medmap.run import CHECKPOINTS, STATE, checkpoint_folder, read_run, writing


def load_network(run: Path, which: str = "best", device: str | torch.device = "cpu") -> AlignedSegmenter:
    """The network of a run in evaluation mode, with the weights of its checkpoint ``best`` or ``last``.

    Raises CheckpointError when there is no such checkpoint or its tensors are not the network's.
    """
    folder, network = checkpoint_folder(run, which), untrained_network(run)
    smoothed = folder / "ema.safetensors"
    load_weights(network, smoothed if smoothed.is_file() else folder / "model.safetensors")
    return placed(network, torch.device(device)).eval()


def untrained_network(run: Path) -> AlignedSegmenter:
    """The network as training began with it, made again from the run's seed; draws of the caller are left alone."""
    config, card = read_run(run)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build_segmenter(config.model, config.align, card.modalities, len(card.scheme.classes)).eval()


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


def save_checkpoint(run: Path, which: str, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
    """Write {file stem: tensors} and a JSON state as one checkpoint, all of it or nothing.

    Raises InputError where the disk is full or may not be written.
    """
    with writing(run), _disk_errors():
        _replace(run / CHECKPOINTS / which, tensors, state)


@contextmanager
def _disk_errors() -> Iterator[None]:
    """safetensors has its own word for a full disk."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


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
