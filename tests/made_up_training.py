"""Training in seconds, for tests: patients, a recipe of six steps, and what a run has left on the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medmap.checkpoint import read_tensors
from medmap.config import Config, parse_config
from medmap.data.layouts import recognise
from medmap.data.store import Store, write_store
from medmap.phantom import Settings, write_phantoms
from medmap.run import checkpoint_folder, read_log

THREE = ["t1c", "t2w", "t2f"]
Row = dict[str, Any]


@contextmanager
def quick_and_exact() -> Iterator[None]:
    """One thread, whose sums have one order; and nothing here has to survive a power cut."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
    torch.set_num_threads(before)


def patients(root: Path, count: int, seed: int, missing: float = 0.0) -> Store:
    """A store of phantoms."""
    write_phantoms(root / "raw", count, seed, Settings(spacing_mm=4.0), missing=missing)
    write_store(recognise(root / "raw"), root / "store")
    return Store(root / "store")


def config(**changes: Any) -> Config:
    """Six steps of a tiny network, augmented, aligned at two levels; ``section__key=value`` changes a key."""
    tree: dict[str, Any] = {
        "data": {"modalities": THREE, "folds": 3, "val_fraction": 0.2},
        "model": {"size": "tiny"},
        "align": {"anchor": "pstar", "levels": ["x3", "x4"]},
        "train": {
            "steps": 6,
            "patch": [16, 16, 16],
            "precision": "fp32",
            "warmup_steps": 2,
            "validate_every": 3,
            "checkpoint_every": 2,
            "log_every": 1,
            "ema": 0.8,
        },
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            tree.setdefault(section, {})[name] = value
        else:
            tree[section] = value
    return parse_config(tree)


def rows(run: Path, kind: str | None = None) -> list[Row]:
    return [row for row in read_log(run / "log.jsonl") if kind in (None, row["kind"])]


def tensors(run: Path, which: str, stem: str) -> dict[str, Tensor]:
    return read_tensors(checkpoint_folder(run, which) / f"{stem}.safetensors")


def state(run: Path, which: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((checkpoint_folder(run, which) / "state.json").read_text(encoding="utf-8"))
    return content


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Interrupted(Exception):
    """Somebody pressed a key."""


def interrupt_at(kind: str, step: int) -> Callable[[Row], None]:
    def on_row(row: Row) -> None:
        if (row["kind"], row["step"]) == (kind, step):
            raise Interrupted

    return on_row
