"""What changes while a network is trained: made, started from another run, kept on the disk, and taken up again."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from medmap.align import AlignedSegmenter, build_segmenter
from medmap.checkpoint import (
    flatten_optimizer,
    load_network,
    load_weights,
    read_tensors,
    save_checkpoint,
    unflatten_optimizer,
)
from medmap.config import Config, TrainConfig
from medmap.errors import CheckpointError
from medmap.models.blocks import placed
from medmap.run import ModelCard, checkpoint_folder, find_runs, read_run


@dataclass
class State:
    """Everything that changes while training; ``waited`` are the seconds that this process waited for batches."""

    network: AlignedSegmenter
    smoothed: AlignedSegmenter
    optimizer: torch.optim.Optimizer
    step: int = 0
    best: float = -math.inf
    seconds: float = 0.0
    waited: float = 0.0


def fresh(config: Config, card: ModelCard, device: torch.device) -> State:
    """Before the first step; what is drawn comes from torch's own generator."""
    network = build_segmenter(config.model, config.align, card.modalities, len(card.scheme.classes))
    network = placed(network, device)
    smoothed = copy.deepcopy(network).requires_grad_(False).eval()
    return State(network, smoothed, optimizer_of(config.train, network))


def optimizer_of(config: TrainConfig, network: nn.Module) -> torch.optim.Optimizer:
    """Weight decay acts on convolutions and matrices, not on biases, normalisations and anchor weights."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, amsgrad=config.amsgrad)


def start_from(init: Path, state: State, config: Config, card: ModelCard) -> None:
    """Take the best weights of another run. Raises CheckpointError where they are another network's."""
    found = find_runs(init)
    if len(found) > 1:
        raise CheckpointError(f"--init {init}: holds {len(found)} runs ({found[0]}, …); name one of them")
    theirs, ours = _makeup(*read_run(found[0])), _makeup(config, card)
    unlike = [f"{what} is {theirs[what]}, wanted here {ours[what]}" for what in ours if theirs[what] != ours[what]]
    if unlike:
        raise CheckpointError(
            f"--init {init}: weights of another network: {'; '.join(unlike)}. Start from a run that has the same, or "
            "train from the beginning without --init"
        )
    weights = load_network(found[0], "best").state_dict()
    if lacking := {n for n in state.network.state_dict().keys() ^ weights.keys() if not n.startswith("anchors.")}:
        raise CheckpointError(f"--init {init}: not both networks have {', '.join(sorted(lacking)[:3])}; align the same")
    for network in (state.network, state.smoothed):
        network.load_state_dict(weights, strict=False)


def _makeup(config: Config, card: ModelCard) -> dict[str, str]:
    """What two runs must have in common for weights to mean the same; anchors may differ."""
    return {
        "model": " ".join([config.model.name, config.model.size, *config.model.students])
        + f", stem {config.model.stem}",
        "set of modalities": " ".join(card.modalities),
        "classes": " ".join(card.scheme.classes),
    }


def save_best(run: Path, state: State, score: float | None) -> None:
    """The moving average, and what it scored in validation."""
    info = {"step": state.step, "validation_mean_dice": score}
    save_checkpoint(run, "best", {"model": state.smoothed.state_dict()}, info)


def save_last(run: Path, state: State) -> None:
    """Everything to go on from; nothing in it says how many processes there were."""
    tensors = {
        "model": state.network.state_dict(),
        "ema": state.smoothed.state_dict(),
        "optimizer": flatten_optimizer(state.optimizer.state_dict()),
    }
    info = {"step": state.step, "best": state.best if math.isfinite(state.best) else None, "seconds": state.seconds}
    save_checkpoint(run, "last", tensors, info)


def restore(run: Path, state: State) -> None:
    """The inverse of `save_last`. Raises CheckpointError where there is no whole checkpoint of this network."""
    folder = checkpoint_folder(run, "last")
    info = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    load_weights(state.network, folder / "model.safetensors")
    load_weights(state.smoothed, folder / "ema.safetensors")
    tensors = read_tensors(folder / "optimizer.safetensors")
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict(unflatten_optimizer(tensors, groups))
    state.step, state.seconds = int(info["step"]), float(info["seconds"])
    state.best = -math.inf if info["best"] is None else float(info["best"])
