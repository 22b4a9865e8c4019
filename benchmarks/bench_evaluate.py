"""Fifteen subsets of one patient at 1 mm: each sequence encoded once in one pass, against the usual loop; and single
predictions from one to four sequences, by torch and by OpenVINO, against windows of the same network.

The usual loop is that of the public code of missing-modality networks: for every subset, for every window of 80³
voxels with 50 % overlap, all encoders and the decoder, in fp32. It takes tens of minutes, so one window of one subset
is timed, and the number of windows and subsets is in ``extra_info``: their product with the median is the loop's time.
"""

from __future__ import annotations

from functools import cache
from math import ceil, prod

import made
import pytest
import torch

from medmap.compiled import Compiled
from medmap.core.box import Box
from medmap.core.memory import keep_freed_memory
from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.inference import _Looked, answer_subsets, network_box
from medmap.models import convolution

WINDOW = 80
NETWORKS = ["unet:base", "rfnet:faithful"]
COUNTS = [1, 2, 3, 4]


@pytest.mark.parametrize("which", NETWORKS)
def bench_fifteen_subsets(benchmark, which: str) -> None:
    network, patient = _placed(which), made.patient()
    benchmark.group = f"15 subsets at 1 mm, {which}"
    benchmark.pedantic(lambda: list(_answers(network, patient, GLIOMA_MRI.subsets())), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("which", NETWORKS)
def bench_one_window_of_one_subset(benchmark, which: str) -> None:
    box = Box.union([image.box for image in made.patient().images.values()])
    windows = prod(max(1, ceil((n - WINDOW) / (WINDOW // 2)) + 1) for n in box.shape)
    benchmark.group = f"15 subsets at 1 mm, {which}"
    benchmark.extra_info |= {"windows": windows, "subsets": 15}
    with made.apart() as run:
        benchmark.pedantic(lambda: run(_window, which), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("how", ["torch's loop", "halves"])
@pytest.mark.parametrize("which", ["unet:tiny", "unet:small"])
def bench_small_volume(benchmark, which: str, how: str, monkeypatch) -> None:
    """At 4 mm, in fp32: what a lone volume of few numbers costs as torch takes it, and in halves."""
    network, patient = _placed(which), made.patient(4.0)
    monkeypatch.setattr(convolution, "LOOP_NUMBERS", convolution.LOOP_NUMBERS if how == "halves" else 0)
    benchmark.group = f"15 subsets at 4 mm, {which}"
    subsets = GLIOMA_MRI.subsets()
    benchmark.pedantic(lambda: list(answer_subsets(network, patient, subsets)), rounds=5, warmup_rounds=1)


@cache
def _plain(which: str):
    return made.network(*which.split(":"), plain=True).eval()


def _window(which: str) -> None:
    images, every = torch.randn(1, 4, WINDOW, WINDOW, WINDOW), torch.ones(1, 4, dtype=torch.bool)
    with torch.inference_mode():
        _plain(which)(images, every, every)


@pytest.mark.parametrize("which", NETWORKS)
def bench_encode(benchmark, which: str) -> None:
    """One sequence on its brain box."""
    looked, asked = _looked(which, GLIOMA_MRI.names[-1:])
    benchmark.group = f"parts at 1 mm, {which}"
    benchmark.pedantic(lambda: looked.encode([asked]), rounds=5, warmup_rounds=2)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("which", NETWORKS)
def bench_decode(benchmark, which: str, count: int) -> None:
    """One subset of so many sequences, from latents."""
    looked, asked = _looked(which, GLIOMA_MRI.names[-count:])
    latents = looked.encode([asked])
    benchmark.group = f"parts at 1 mm, {which}"
    benchmark.pedantic(lambda: looked.answer(latents, *asked), rounds=5, warmup_rounds=2)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("engine", ["torch", "openvino"])
@pytest.mark.parametrize("which", NETWORKS)
def bench_prediction(benchmark, which: str, engine: str, count: int) -> None:
    network, patient = _placed(which), made.patient()
    subset = ModalitySet(GLIOMA_MRI.names[-count:])
    compiled = Compiled(network, made.PRECISION) if engine == "openvino" else None
    if compiled is not None:
        benchmark.extra_info["engines agree"] = compiled.agreement(subset.names)
    benchmark.group = f"prediction at 1 mm, {which}"
    benchmark.pedantic(lambda: list(_answers(network, patient, [subset], compiled)), rounds=3, warmup_rounds=2)


def _placed(which: str):
    keep_freed_memory()
    return made.network(*which.split(":")).eval()


def _looked(which: str, names: tuple[str, ...]):
    network, patient = _placed(which), made.patient()
    box = Box.union(network_box(network, patient, name) for name in names)
    return _Looked(network, patient, [()], made.PRECISION), (ModalitySet(names), box)


def _answers(network, patient, subsets, compiled=None):
    return answer_subsets(network, patient, subsets, precision=made.PRECISION, compiled=compiled)
