"""One training step: plain (fp32, contiguous, the C library's own memory) against medmap's.

Two crops of 64³ with a random subset each, through network, criterion, backward pass and AdamW.
"""

from __future__ import annotations

import made
import pytest
import torch

from medmap.config import Config, TrainConfig
from medmap.core.modality import GLIOMA_MRI
from medmap.criterion import DiceCE, total_loss
from medmap.inference import autocast

EDGE = 64
CONFIG = Config(train=TrainConfig(patch=(EDGE,) * 3))


@pytest.mark.parametrize("how", ["plain", "medmap"])
@pytest.mark.parametrize(
    "which",
    ["unet:tiny", "unet:small", "unet:base", "pmkl:tiny", "mmformer:tiny", "acn:tiny", "rfnet:tiny", "uhved:tiny"],
)
def bench_step(benchmark, which: str, how: str) -> None:
    plain = how == "plain"
    made.memory(plain)
    name, size = which.split(":")
    network = made.network(name, size, plain=plain).train()
    network.at_progress(0.6)
    optimizer, criterion = torch.optim.AdamW(network.parameters()), DiceCE()
    images, target = torch.randn(2, 4, EDGE, EDGE, EDGE), torch.randint(0, 4, (2, EDGE, EDGE, EDGE))
    seen = torch.ones(2, len(GLIOMA_MRI), dtype=torch.bool)
    kept = torch.tensor([[True, False, False, False], [True, True, True, True]])

    def step() -> None:
        with autocast(made.CPU, "fp32" if plain else made.PRECISION):
            output = network(images, seen, kept)
            loss, _ = total_loss(output, target, criterion, CONFIG)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    benchmark.group = f"training step, {which}"
    benchmark.extra_info["parameters"] = sum(p.numel() for p in network.parameters())
    benchmark.pedantic(step, rounds=5, warmup_rounds=2)
