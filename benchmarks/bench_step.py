"""One training step: plain (fp32, contiguous, the C library's own memory) against medmap's.

Two crops of 64³ with a random subset each, through network, criterion, backward pass and AdamW.
"""

from __future__ import annotations

import made
import pytest
import torch

from medmap.config import Config, TrainConfig
from medmap.core.modality import GLIOMA_MRI
from medmap.criterion import Lesson
from medmap.inference import autocast

EDGE = 64


@pytest.mark.parametrize("how", ["plain", "medmap"])
@pytest.mark.parametrize(
    "which",
    ["unet:tiny", "unet:small", "unet:base", "pmkl:tiny", "mmformer:tiny", "acn:tiny", "rfnet:tiny", "uhved:tiny"],
)
def bench_step(benchmark, which: str, how: str) -> None:
    step = stepper(which, plain=how == "plain")
    benchmark.group = f"training step, {which}"
    benchmark.pedantic(step, rounds=5, warmup_rounds=2)


def stepper(which: str, *, plain: bool, edge: int = EDGE):
    """A function that makes one step."""
    made.memory(plain)
    network = made.network(*which.split(":"), plain=plain).train()
    network.at_progress(0.6)
    lesson = Lesson(network, Config(train=TrainConfig(patch=(edge,) * 3)))
    optimizer = torch.optim.AdamW(network.parameters())
    images, target = torch.randn(2, 4, edge, edge, edge), torch.randint(0, 4, (2, edge, edge, edge))
    seen = torch.ones(2, len(GLIOMA_MRI), dtype=torch.bool)
    kept = torch.tensor([[True, False, False, False], [True, True, True, True]])

    def step() -> None:
        with autocast(made.CPU, "fp32" if plain else made.PRECISION):
            loss, *_ = lesson(images, seen, kept, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step
