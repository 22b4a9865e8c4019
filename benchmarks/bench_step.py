"""One training step: plain (fp32, contiguous, the C library's own memory) against medmap's.

Two crops of 64³ with a random subset each, through network, criterion, backward pass and AdamW.
"""

from __future__ import annotations

from functools import cache

import made
import pytest
import torch

from medmap.config import Config, TrainConfig
from medmap.core.memory import keep_freed_memory
from medmap.core.modality import GLIOMA_MRI
from medmap.criterion import Lesson
from medmap.inference import autocast
from medmap.predict import resolve_precision

EDGE = 64


@pytest.mark.parametrize("how", ["plain", "medmap"])
@pytest.mark.parametrize(
    "which",
    ["unet:tiny", "unet:small", "unet:base", "pmkl:tiny", "mmformer:tiny", "acn:tiny", "rfnet:tiny", "uhved:tiny"],
)
def bench_step(benchmark, which: str, how: str) -> None:
    benchmark.group = f"training step, {which}"
    if how == "medmap":
        keep_freed_memory()
        benchmark.pedantic(stepper(which, plain=False), rounds=5, warmup_rounds=2)
        return
    with made.apart() as run:
        benchmark.pedantic(lambda: run(_plain_step, which), rounds=5, warmup_rounds=2)


@cache
def _plain(which: str):
    return stepper(which, plain=True)


def _plain_step(which: str) -> None:
    _plain(which)()


def stepper(which: str, plain: bool, edge: int = EDGE, device: torch.device = made.CPU, through=lambda lesson: lesson):
    """A function that makes one step. through: what the network with its criterion is put through beforehand"""
    torch.manual_seed(0)
    if plain:
        made.written_plainly()
    network = made.network(*which.split(":"), plain=plain, device=device).train()
    network.at_progress(0.6)
    lesson = through(Lesson(network, Config(train=TrainConfig(patch=(edge,) * 3))))
    optimizer = torch.optim.AdamW(network.parameters())
    images = torch.randn(2, 4, edge, edge, edge, device=device)
    target = torch.randint(0, 4, (2, edge, edge, edge), device=device)
    seen = torch.ones(2, len(GLIOMA_MRI), dtype=torch.bool, device=device)
    kept = torch.tensor([[True, False, False, False], [True, True, True, True]], device=device)
    precision = "fp32" if plain else resolve_precision("auto", device)

    def step() -> None:
        with autocast(device, precision):
            loss, *_ = lesson(images, seen, kept, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step
