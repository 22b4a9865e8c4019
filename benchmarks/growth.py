"""How time and memory grow with the work: python benchmarks/growth.py

Cases, sequences with all their subsets, voxels of a patient, and edge of a training crop. The exponent is the slope of
log time over log size; memory is the most that tensors take at a time, counted, not what the process holds.
"""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import made
import numpy as np
import torch
from bench_step import stepper

from medmap.align import AlignedSegmenter, build_segmenter
from medmap.card import SHIPPED
from medmap.config import AlignConfig, ModelConfig
from medmap.core.case import Prepared
from medmap.core.counted import Counted
from medmap.core.memory import keep_freed_memory
from medmap.core.modality import ModalitySet
from medmap.data.layouts import recognise
from medmap.data.preprocess import prepare_case
from medmap.data.store import Store, write_store
from medmap.evaluate import evaluate_cases
from medmap.inference import answer_subsets
from medmap.models.blocks import placed
from medmap.phantom import Settings, simulate, write_phantoms
from medmap.predict import Predictor

EIGHT = ("t1n", "t1c", "t2w", "t2f", "pd", "adc", "dwi", "t2star")


def main() -> None:
    keep_freed_memory()
    print(f"{torch.get_num_threads()} threads, {made.PRECISION}\n")
    _cases()
    _sequences()
    _voxels()
    _crops()


def _cases() -> None:
    with tempfile.TemporaryDirectory() as place:
        write_phantoms(Path(place) / "data", 4, 0, Settings(spacing_mm=4.0))
        write_store(recognise(Path(place) / "data"), Path(place) / "store", spacing_mm=2.0)
        store, predictor = Store(Path(place) / "store"), Predictor.load(SHIPPED)
        works = {n: lambda n=n: evaluate_cases(predictor, store, store.ids[:n]) for n in (1, 2, 4)}
        _table("cases, all 15 subsets scored", works)


def _sequences() -> None:
    patient = prepare_case(simulate(5, Settings(modalities=EIGHT, spacing_mm=2.0)), made.SCHEME)
    counts, times = [], []
    print("| sequences | subsets | s | GB |\n|---|---|---|---|")
    for count in range(1, 9):
        modalities = ModalitySet(EIGHT[:count])
        network = build_segmenter(ModelConfig(size="tiny"), AlignConfig(anchor="none"), modalities, 4).eval()
        network = placed(network, made.CPU)
        subsets = list(modalities.subsets())
        work = partial(_answered, network, patient, subsets)
        memory, seconds = _counted(work), _seconds(work)
        counts.append((count, len(subsets), sum(map(len, subsets))))
        times.append(seconds)
        print(f"| {count} | {len(subsets)} | {seconds:.2f} | {memory:.2f} |", flush=True)
    design, seconds = np.array(counts, float), np.array(times)
    weights, *_ = np.linalg.lstsq(design / seconds[:, None], np.ones(len(times)), rcond=None)
    worst = np.abs(design @ weights / seconds - 1).max()
    print(
        f"\nT = {weights[0]:.3f} s · sequences + {weights[1]:.3f} s · subsets + {weights[2]:.3f} s · members of all "
        f"subsets, within {100 * worst:.0f} %\n"
    )


def _voxels() -> None:
    network = made.network("unet", "base").eval()
    works, sizes = {}, []
    for spacing_mm in (4.0, 3.0, 2.0, 1.5, 1.0):
        patient = prepare_case(simulate(5, Settings(spacing_mm=spacing_mm)), made.SCHEME)
        subset = ModalitySet(tuple(patient.images))
        (answer,) = answer_subsets(network, patient, [subset], precision=made.PRECISION)
        sizes.append(answer.probabilities[0].size)
        works[sizes[-1]] = partial(_answered, network, patient, [subset])
    _table("voxels of a prediction from four, unet base", works)


def _crops() -> None:
    _table(
        "edge of two training crops, unet small",
        {edge: stepper("unet:small", plain=False, edge=edge) for edge in (32, 48, 64, 80, 96)},
    )


def _table(what: str, works: dict[int, Callable[[], object]]) -> None:
    print(f"| {what} | s | GB |\n|---|---|---|")
    times, memories = [], []
    for size, work in works.items():
        memories.append(_counted(work))
        times.append(_seconds(work))
        print(f"| {size:,} | {times[-1]:.3f} | {memories[-1]:.2f} |", flush=True)
    print(f"\ntime grows with exponent {_slope(works, times):.2f}, memory with {_slope(works, memories):.2f}\n")


def _answered(network: AlignedSegmenter, patient: Prepared, subsets: Sequence[ModalitySet]) -> None:
    """One answer after the other; none is kept."""
    deque(answer_subsets(network, patient, subsets, precision=made.PRECISION), maxlen=0)


def _slope(sizes: Sequence[int], values: Sequence[float]) -> float:
    return float(np.polyfit(np.log(list(sizes)), np.log(values), 1)[0])


def _counted(work: Callable[[], object]) -> float:
    """GB of tensors that live at a time."""
    with Counted() as counted:
        work()
    return counted.most / 1e9


def _seconds(work: Callable[[], object]) -> float:
    """Of one run; counting its memory beforehand has warmed it up."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
