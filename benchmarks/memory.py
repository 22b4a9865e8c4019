"""Peak memory of each part, every one in a process of its own: python benchmarks/memory.py [WORD]

WORD: only parts with that word in their name. What Python and torch take before they do anything is in the first row.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import made
import torch
from bench_step import stepper

from medmap.compiled import Compiled
from medmap.core.memory import keep_freed_memory
from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.inference import answer_subsets
from medmap.phantom import Settings, simulate, write_phantoms

NETWORKS = ("unet:base", "rfnet:faithful")
STEPS = ("unet:base", "unet:small", "pmkl:tiny", "mmformer:tiny", "acn:tiny", "rfnet:tiny", "uhved:tiny")


def _step(which: str, edge: int, plain: bool = False) -> None:
    if not plain:
        keep_freed_memory()
    step = stepper(which, plain=plain, edge=edge)
    for _ in range(2):
        step()


def _answers(which: str, subsets: list[ModalitySet], engine: str = "torch") -> None:
    keep_freed_memory()
    network = made.network(*which.split(":")).eval()
    compiled = Compiled(network, made.PRECISION) if engine == "openvino" else None
    for _ in answer_subsets(network, made.patient(), subsets, precision=made.PRECISION, compiled=compiled):
        pass


def _written() -> None:
    with tempfile.TemporaryDirectory() as place:
        write_phantoms(Path(place), 1, 5, Settings(spacing_mm=1.0, shape=made.BRATS))


def _parts() -> dict[str, Callable[[], object]]:
    parts: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "phantom, 2 mm": lambda: simulate(5, Settings(spacing_mm=2.0)),
        "phantom, 1 mm, written": _written,
        "patient at 1 mm prepared": made.patient,
    }
    for which in STEPS:
        parts[f"step of {which}, 2 crops of 64³"] = lambda which=which: _step(which, 64)
    parts["step of unet:base, 2 crops of 64³, plain"] = lambda: _step("unet:base", 64, plain=True)
    parts["step of unet:base, 2 crops of 96³"] = lambda: _step("unet:base", 96)
    for which in NETWORKS:
        parts[f"15 subsets, {which}"] = lambda which=which: _answers(which, list(GLIOMA_MRI.subsets()))
        for engine in ("torch", "openvino"):
            for count in (1, 4):
                subset = ModalitySet(GLIOMA_MRI.names[-count:])
                parts[f"prediction from {count}, {which}, {engine}"] = (
                    lambda which=which, subset=subset, engine=engine: _answers(which, [subset], engine)
                )
    return parts


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["--only"]:
        torch.manual_seed(0)
        _parts()[words[1]]()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        return
    print("| part | peak, GiB |\n|---|---|")
    for name in _parts():
        if not words or words[0] in name:
            done = subprocess.run([sys.executable, __file__, "--only", name], capture_output=True, text=True)
            peak = done.stdout.split()[-1] if done.returncode == 0 else ""
            print(f"| {name} | {float(peak):.2f} |" if peak else f"| {name} | {done.stderr[-200:]} |", flush=True)


if __name__ == "__main__":
    main()
