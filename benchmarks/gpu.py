"""Training, evaluation, data and phantoms on a GPU, against the plain way: python benchmarks/gpu.py

Every part by itself, medians after a warm-up, in seconds; the share is of the fastest product of two matrices in bf16
found there. *Plain* is the same network in fp32, contiguous, every sequence encoded for every subset and window (with
TF32 where torch has it unasked). What is tried and not part of medmap is called so: torch.compile and CUDA graphs.
``--device cpu --edge 32 --spacing 4 --quick`` shows on any machine that it runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from math import ceil, prod

import made
import torch
from bench_step import stepper
from torch.utils.flop_counter import FlopCounterMode

from medmap.config import Config, SamplingConfig, TrainConfig
from medmap.core.box import Box
from medmap.core.memory import keep_freed_memory
from medmap.core.modality import GLIOMA_MRI
from medmap.data.dataset import training_batch
from medmap.inference import _Looked, answer_subsets, network_box
from medmap.phantom import Settings, simulate
from medmap.predict import resolve_device, resolve_precision

STEPS = ("unet:base", "unet:large", "mmformer:faithful")
EVALUATED = ("unet:base", "rfnet:faithful", "mmformer:faithful")
QUICK = ("unet:tiny",)
WINDOW = 80
Row = tuple[str, float, str]


def main() -> None:
    asked = _arguments()
    device = resolve_device(asked.device)
    if device.type == "cpu":
        keep_freed_memory()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak, rounds = _product(device, asked.quick), 2 if asked.quick else 7
    print(f"{name}, torch {torch.__version__}; product of two matrices in bf16 {peak / 1e12:.1f} TFLOP/s\n")
    print("| part | s | |\n|---|---|---|", flush=True)
    for part in (_steps, _evaluation, _data):
        for what, seconds, note in part(asked, device, peak, rounds):
            print(f"| {what} | {seconds:.4f} | {note} |", flush=True)


def _steps(asked: argparse.Namespace, device: torch.device, peak: float, rounds: int) -> Iterator[Row]:
    for which in QUICK if asked.quick else STEPS:
        of = f"step of {which}, 2 crops of {asked.edge}³"
        step = stepper(which, plain=False, edge=asked.edge, device=device)
        seconds = _median(step, device, rounds)
        with FlopCounterMode(display=False) as flops:
            step()
        rate = flops.get_total_flops() / seconds
        share = f"{rate / 1e12:.1f} TFLOP/s, {100 * rate / peak:.0f} % of the product"
        yield of, seconds, ", ".join(filter(None, (share, _gb(device))))
        if device.type == "cuda":
            compiled = partial(stepper, which, False, asked.edge, device, partial(torch.compile, dynamic=False))
            yield _tried(f"{of}, compiled", compiled, device, rounds)
        del step
        _emptied(device)
        with made.apart() as run:
            plain = run(_plain_step, which, asked.edge, device, rounds)
        yield f"{of}, plain", plain, f"medmap {plain / seconds:.1f} times as fast"


def _plain_step(which: str, edge: int, device: torch.device, rounds: int) -> float:
    return _median(stepper(which, plain=True, edge=edge, device=device), device, rounds)


def _evaluation(asked: argparse.Namespace, device: torch.device, peak: float, rounds: int) -> Iterator[Row]:
    patient, precision = made.patient(asked.spacing), resolve_precision("auto", device)
    box = Box.union([image.box for image in patient.images.values()])
    windows = prod(max(1, ceil((n - WINDOW) / (WINDOW // 2)) + 1) for n in box.shape)
    for which in QUICK if asked.quick else EVALUATED:
        network = made.network(*which.split(":"), device=device).eval()
        of = f"15 subsets at {asked.spacing:g} mm, {which}"
        every = list(GLIOMA_MRI.subsets())
        evaluate = partial(answer_subsets, network, patient, every, precision=precision)
        seconds = _median(lambda evaluate=evaluate: list(evaluate()), device, rounds)
        yield of, seconds, _gb(device)
        looked = _Looked(network, patient, [()], precision)
        whole = (GLIOMA_MRI, Box.union(network_box(network, patient, name) for name in GLIOMA_MRI))
        latents = looked.encode([whole])
        decode = partial(looked.answer, latents, *whole)
        yield f"{of}: decode one", _median(decode, device, rounds), ""
        if device.type == "cuda":
            yield _tried(f"{of}: decode one, as a CUDA graph", lambda decode=decode: _graphed(decode), device, rounds)
        with made.apart() as run:
            window = run(_plain_window, which, device, rounds)
        loop = window * windows * len(every)
        yield f"{of}, plain: {windows} windows × 15", loop, f"medmap {loop / seconds:.0f} times as fast"
        _emptied(device)


@torch.inference_mode()
def _plain_window(which: str, device: torch.device, rounds: int) -> float:
    network = made.network(*which.split(":"), plain=True, device=device).eval()
    images = torch.randn(1, 4, WINDOW, WINDOW, WINDOW, device=device)
    every = torch.ones(1, 4, dtype=torch.bool, device=device)
    return _median(lambda: network(images, every, every), device, rounds)


def _data(asked: argparse.Namespace, device: torch.device, peak: float, rounds: int) -> Iterator[Row]:
    patients = [made.patient(asked.spacing)] * 2
    config = Config(train=TrainConfig(patch=(asked.edge,) * 3, batch_size=2), sampling=SamplingConfig(subsets="full"))
    for where in dict.fromkeys((torch.device("cpu"), device)):
        batch = partial(training_batch, patients, GLIOMA_MRI, config, device=where)
        draws = iter(range(1000))
        made_here = _median(lambda batch=batch, draws=draws: batch(next(draws)), where, 4 * rounds)
        yield f"a batch of two crops of {asked.edge}³, augmented, {where.type}", made_here, ""
        phantom = partial(simulate, 5, Settings(spacing_mm=max(2.0, asked.spacing)), device=where)
        yield f"a phantom at {max(2.0, asked.spacing):g} mm, {where.type}", _median(phantom, where, rounds), ""


def _tried(what: str, make: Callable[[], Callable[[], object]], device: torch.device, rounds: int) -> Row:
    """What may not work at all, with the seconds until it runs."""
    began = time.perf_counter()
    try:
        work = make()
        work()
        _settled(device)
        ready = time.perf_counter() - began
        return what, _median(work, device, rounds), f"not part of medmap; {ready:.0f} s until it runs"
    except Exception as error:  # whatever the compiler or a graph does not know
        return what, float("nan"), f"not part of medmap; {str(error).strip().splitlines()[0][:100]}"


def _graphed(work: Callable[[], object]) -> Callable[[], object]:
    """The kernels of some work, recorded once and started all together."""
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _product(device: torch.device, quick: bool) -> float:
    """FLOP/s of the fastest of some products of two square matrices."""
    found = []
    for edge in (512,) if quick else (4096, 8192):
        a, b = (torch.randn(edge, edge, device=device, dtype=torch.bfloat16) for _ in range(2))
        found.append(2 * edge**3 / _median(lambda a=a, b=b: a @ b, device, 9))
    return max(found)


def _median(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    for _ in range(2):
        work()
    _settled(device)
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        _settled(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _settled(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gb(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    most = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    return f"{most:.1f} GB"


def _emptied(device: torch.device) -> None:
    """So that the next part's memory is its own."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@cache
def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--edge", type=int, default=128, help="of training crops, voxels")
    parser.add_argument("--spacing", type=float, default=1.0, help="of the patient, mm")
    parser.add_argument("--quick", action="store_true", help="the smallest network and two rounds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
