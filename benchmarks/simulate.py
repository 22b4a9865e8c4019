"""How fast patients are simulated here: python benchmarks/simulate.py

Patients at 2 mm as training takes them, from one process per core; and one patient at 1 mm on the grid of BraTS,
written to disk. Medians over rounds of one run; on a machine that does something else as well they mean little.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from medmap.config import load_config
from medmap.core.memory import keep_freed_memory
from medmap.phantom import Settings, write_phantoms
from medmap.stream import PhantomStream

ROUNDS = 5
PATIENTS = 16


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    cores = os.cpu_count() or 1
    print(f"{cores} cores, torch {torch.__version__}")
    seconds = _streamed(cores)
    print(f"2 mm, four sequences, {cores} processes: {PATIENTS / seconds:.1f} patients/s (median of {ROUNDS} rounds)")
    seconds = _written()
    print(f"1 mm, four sequences, 240×240×155, written: {seconds:.1f} s a patient (median of {ROUNDS}, one process)")


def _streamed(workers: int) -> float:
    """Seconds for PATIENTS of a stream, once its processes run."""
    steps = (ROUNDS + 1) * PATIENTS
    chosen = {
        "data.source": "phantom",
        "phantom.val": 1,
        "phantom.workers": workers,
        "train.batch_size": 1,
        "train.steps": steps,
    }
    stream = PhantomStream(load_config(None, [f"{key}={value}" for key, value in chosen.items()]))
    times = []
    for first in range(0, steps, PATIENTS):
        began = time.perf_counter()
        for i in range(first, first + PATIENTS):
            stream.expect(stream.ids[i : i + 12])
            stream.load(stream.ids[i])
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _written() -> float:
    settings = Settings(spacing_mm=1.0, shape=(240, 240, 155))
    times = []
    for seed in range(ROUNDS + 1):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            write_phantoms(Path(folder), 1, seed, settings)
            times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
