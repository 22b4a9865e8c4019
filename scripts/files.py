"""Measures what is told of single files: python scripts/files.py DATA

Prints the table of docs/sequences.md: real cases of DATA, and phantoms at the 2 mm that these have. One image of each
is spoilt in every way; thresholds were chosen without them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from medmap.core.case import Case
from medmap.data.cases import CaseFiles, ImageRef, read_case
from medmap.data.faults import Look
from medmap.data.layouts import recognise
from medmap.data.nifti import write_volume
from medmap.data.sequences import NAMES
from medmap.phantom import Settings, simulate

FIRST_SEED = 740000
Image, Affine = NDArray[np.float32], NDArray[np.float64]


def scaled(factor: float) -> Callable[[Image, Affine], tuple[Image, Affine]]:
    """Lengths in another unit, which nobody names."""
    return lambda volume, affine: (volume, np.diag([factor, factor, factor, 1.0]) @ affine)


FILES: dict[str, tuple[Callable[[Image, Affine], tuple[Image, Affine]], str]] = {
    "voxels of a fifth of their size": (scaled(0.2), "small"),
    "in metres": (scaled(1e-3), "units"),
    "in microns": (scaled(1e3), "units"),
    "one value in all of the brain": (lambda volume, affine: (np.float32(100) * (volume != 0), affine), "constant"),
    "empty": (lambda volume, affine: (np.zeros_like(volume), affine), "constant"),
}
CLEAN = "nothing wrong with the file: alarms"


def tried(case: Case, number: int) -> dict[str, bool]:
    """{what was done to one of its images: whether it was told}; the images take turns."""
    volume, kinds = case.images[NAMES[number % 4]], {kind for _, kind in FILES.values()} | {"raw"}
    seen = {CLEAN: bool(told(volume, case.affine) & kinds)}
    return seen | {fault: kind in told(*spoil(volume, case.affine)) for fault, (spoil, kind) in FILES.items()}


def told(volume: Image, affine: Affine) -> set[str]:
    """Kinds of the faults of one file."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "image.nii"
        write_volume(path, volume, affine)
        files = CaseFiles("case", "case", "", {"t2f": ImageRef(path)}, None)
        return {fault.kind for fault in Look.at(files, path.parent, (), deep=True).faults}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser("scripts/files.py", description=__doc__)
    parser.add_argument("data", type=Path, help="folder with ssa-2mm and brats2021-2mm")
    parser.add_argument("--count", type=int, default=40, help="phantoms to measure (40)")
    given = parser.parse_args()
    cases = [case for part in ("brats2021-2mm", "ssa-2mm") for case in recognise(given.data / part).cases]
    seeds, two_mm = range(FIRST_SEED, FIRST_SEED + given.count), Settings(spacing_mm=2.0)
    groups = {
        "patients": [tried(read_case(case, NAMES), number) for number, case in enumerate(cases)],
        "phantoms": [tried(simulate(seed, two_mm), seed) for seed in seeds],
    }
    print("| | " + " | ".join(f"{name} ({len(rows)})" for name, rows in groups.items()) + " |")
    print("|---|" + "---|" * len(groups))
    for fault in (CLEAN, *FILES):
        hits = [(sum(row[fault] for row in rows), len(rows)) for rows in groups.values()]
        print(f"| {fault} | " + " | ".join(f"{n} of {of} ({100 * n / of:.0f} %)" for n, of in hits) + " |")


if __name__ == "__main__":
    main()
