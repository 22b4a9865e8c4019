"""What evaluation and prediction cost, and for many patients: python benchmarks/cost.py --spacing 4

Measures the constants of docs/scale.md on one simulated patient with one worker (one core, or a GPU), and computes time
and money for many from them::

    evaluation   T = start + load + cases · (read + s·encode + n·(decode + metrics)) / (workers · efficiency)
    prediction   T = start + load + cases · (files + s·encode + decode + write) / (workers · efficiency)

s: sequences of a patient, n: subsets, 2^s − 1 for all. encode and decode are fitted to the times of several (s, n).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from medmap.card import SHIPPED
from medmap.core.case import Prepared
from medmap.core.memory import keep_freed_memory
from medmap.core.modality import ModalitySet
from medmap.data.layouts import read_case, recognise
from medmap.data.nifti import write_mask
from medmap.data.preprocess import prepare_case
from medmap.data.store import Store, write_store
from medmap.evaluate import on_common_box
from medmap.phantom import Settings, write_phantoms
from medmap.predict import Predictor
from medmap.scale import spread
from medmap.scores import score_classes

ROUNDS = 3
TASKS = 300
Constants = dict[str, float]
Result = TypeVar("Result")


def main() -> None:
    asked = _arguments()
    torch.set_num_threads(1)
    keep_freed_memory()
    found, residual = measured(asked.model, asked.spacing, asked.device)
    found |= cluster_constants()
    subsets = 2**asked.sequences - 1
    evaluation = found["read"] + asked.sequences * found["encode"] + subsets * (found["decode"] + found["metrics"])
    prediction = found["files"] + asked.sequences * found["encode"] + found["decode"] + found["write"]
    print(f"{asked.model}, phantom at {asked.spacing:g} mm, {asked.device}, one worker; medians of {ROUNDS}\n")
    print("| constant | s |\n|---|---|")
    print(*(f"| {name} | {seconds:.4f} |" for name, seconds in found.items()), sep="\n")
    print(f"\nencode and decode explain the times they were fitted to within {100 * residual:.0f} %\n")
    price = asked.core_hour if asked.device == "cpu" else asked.gpu_hour
    for verb, case_s in (("evaluation", evaluation), ("prediction", prediction)):
        total = (
            found["start"] + found["load"] + asked.cases * (case_s + found["task"]) / asked.workers / asked.efficiency
        )
        money = 1000 * case_s / asked.efficiency / 3600 * price
        print(f"{verb}: {case_s:.2f} s a case, {money:.2f} per 1,000 cases at {price:g} an hour and worker;")
        print(f"  {asked.cases:,} cases on {asked.workers} workers: {total / 3600:.2f} h")


def measured(model: Path, spacing_mm: float, device: str) -> tuple[Constants, float]:
    """Seconds of every step of a case, and the largest relative error of the fit."""
    with tempfile.TemporaryDirectory() as place:
        write_phantoms(Path(place) / "data", 1, 0, Settings(spacing_mm=spacing_mm))
        cases = recognise(Path(place) / "data")
        write_store(cases, Path(place) / "store")
        store, files = Store(Path(place) / "store"), cases.cases[0]
        load, predictor = timed(partial(Predictor.load, model, device=device))
        read, patient = timed(lambda: _touched(store.load(store.ids[0])))
        nifti, _ = timed(lambda: prepare_case(read_case(files), None))
        encode, decode, residual = fitted(predictor, patient)
        (answer,) = predictor.answers(patient, [predictor.usable(patient.images)])
        pair, scheme = on_common_box(answer, patient), predictor.card.scheme
        metrics, _ = timed(lambda: score_classes(*pair, patient.grid.spacing_mm, scheme))
        like = next(iter(files.images.values())).path
        mask = np.zeros(read_case(files).grid.shape, np.uint8)
        write, _ = timed(lambda: write_mask(Path(place) / "mask.nii.gz", mask, like))
    names = ("load", "read", "files", "encode", "decode", "metrics", "write")
    return dict(zip(names, (load, read, nifti, encode, decode, metrics, write), strict=True)), residual


def fitted(predictor: Predictor, patient: Prepared) -> tuple[float, float, float]:
    """Seconds to encode a sequence and to decode a subset, by least squares of relative errors."""
    names = predictor.usable(patient.images).names
    designs, times = [], []
    for count in range(1, len(names) + 1):
        chosen = ModalitySet(names[:count])
        for subsets in ([chosen], list(chosen.subsets())):
            seconds, _ = timed(lambda subsets=subsets: list(predictor.answers(patient, subsets)))
            designs.append((count, len(subsets)))
            times.append(seconds)
    design, seconds = np.array(designs, float), np.array(times)
    (encode, decode), *_ = np.linalg.lstsq(design / seconds[:, None], np.ones(len(times)), rcond=None)
    return float(encode), float(decode), float(np.abs(design @ (encode, decode) / seconds - 1).max())


def cluster_constants() -> Constants:
    """Seconds until a Ray of our own has its first result, and those of a task that does nothing."""
    began = time.perf_counter()
    arrivals = [
        time.perf_counter() for _ in spread(partial(partial, abs), range(TASKS), address="local", memory_gb=1e6)
    ]
    return {"start": arrivals[0] - began, "task": (arrivals[-1] - arrivals[0]) / (TASKS - 1)}


def timed(function: Callable[[], Result]) -> tuple[float, Result]:
    """The median of ROUNDS after one that is not counted, and what came of it."""
    result, times = function(), []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - began)
    return statistics.median(times), result


def _touched(patient: Prepared) -> Prepared:
    """The store maps files into memory; what is not touched is not read."""
    for image in patient.images.values():
        image.values.sum(dtype=np.float64)
    return patient


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHIPPED, help="a run; what comes with medmap where not given")
    parser.add_argument("--spacing", type=float, default=2.0, help="of the phantom, mm")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--sequences", type=int, default=4, help="of a patient")
    parser.add_argument("--workers", type=int, default=100, help="cores, or GPUs")
    parser.add_argument("--efficiency", type=float, default=0.9, help="share of their time that workers work")
    parser.add_argument("--core-hour", type=float, default=0.05, help="price of a core for an hour")
    parser.add_argument("--gpu-hour", type=float, default=3.0, help="price of a GPU for an hour")
    return parser.parse_args()


if __name__ == "__main__":
    main()
