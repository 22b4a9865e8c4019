"""How near to what the machine can do: python benchmarks/floor.py

Two floors of a part's time: its products and sums, counted by torch, at the speed of the fastest convolution found
here; and the bytes that its operations read and write, each operation for itself, at the speed of a copy. The share is
the larger floor over the measured time. Medians of one run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import made
import torch
from bench_evaluate import NETWORKS, _looked
from bench_step import stepper
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from medmap.core.memory import keep_freed_memory
from medmap.core.modality import GLIOMA_MRI
from medmap.inference import autocast

ROUNDS = 5
STEPS = ("unet:base", "unet:small", "pmkl:tiny", "mmformer:tiny", "acn:tiny", "rfnet:tiny", "uhved:tiny")
SHAPES = ((16, 96), (32, 64), (64, 48), (128, 32), (256, 24))  # channels, edge


class _Traffic(TorchDispatchMode):
    """Bytes that operations read and write; a view moves none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = {x.untyped_storage()._cdata for x in given}
        made_here = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        moved = [x for x in made_here if x.untyped_storage()._cdata not in there or operation._schema.is_mutable]
        if moved:
            self.bytes += sum(x.numel() * x.element_size() for x in (*moved, *given))
        return out


def main() -> None:
    keep_freed_memory()
    peak, bandwidth = _convolution(), _copy()
    print(
        f"{torch.get_num_threads()} threads, {made.PRECISION}: convolution {peak / 1e9:.0f} GFLOP/s at best, ", end=""
    )
    print(f"copy {bandwidth / 1e9:.1f} GB/s\n")
    print("| part | GFLOP | GB | by FLOPs, s | by bytes, s | measured, s | share |\n|---|---|---|---|---|---|---|")
    for name, work in _parts():
        seconds = _median(work)
        with FlopCounterMode(display=False) as flops:
            work()
        with _Traffic() as traffic:
            work()
        total = flops.get_total_flops()
        floors = total / peak, traffic.bytes / bandwidth
        numbers = f"{total / 1e9:.0f} | {traffic.bytes / 1e9:.1f} | {floors[0]:.3f} | {floors[1]:.3f} | {seconds:.3f}"
        print(f"| {name} | {numbers} | {100 * max(floors) / seconds:.0f} % |", flush=True)


def _parts():
    for which in NETWORKS:
        for count in (1, 4):
            looked, asked = _looked(which, GLIOMA_MRI.names[-count:])
            latents = looked.encode([asked])
            if count == 1:
                yield f"encode one sequence at 1 mm, {which}", lambda looked=looked, asked=asked: looked.encode([asked])
            yield (
                f"decode a subset of {count}, {which}",
                lambda looked=looked, asked=asked, latents=latents: looked.answer(latents, *asked),
            )
    for which in STEPS:
        yield f"training step, {which}", stepper(which, plain=False)


def _convolution() -> float:
    """FLOP/s of the fastest of some convolutions of 3³."""
    found = []
    with torch.inference_mode(), autocast(made.CPU, made.PRECISION):
        for channels, edge in SHAPES:
            dtype = torch.bfloat16 if made.PRECISION == "bf16" else torch.float32
            x = torch.randn(1, channels, edge, edge, edge, dtype=dtype).to(memory_format=torch.channels_last_3d)
            w = torch.randn(channels, channels, 3, 3, 3, dtype=dtype).to(memory_format=torch.channels_last_3d)
            seconds = _median(lambda x=x, w=w: functional.conv3d(x, w, padding=1))
            found.append(2 * 27 * channels**2 * edge**3 / seconds)
    return max(found)


def _copy() -> float:
    """Bytes per second that a copy reads and writes."""
    source, target = torch.ones(2**27), torch.empty(2**27)
    return 2 * source.numel() * 4 / _median(lambda: target.copy_(source))


def _median(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


if __name__ == "__main__":
    main()
