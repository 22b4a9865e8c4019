"""What one pass costs in accuracy: python benchmarks/windows.py RUN STORE [CASE ...]

The same network answers every subset of each patient once in one pass and once in windows of its training patch; Dice
against the truth, paired by patient and subset, with the 95 % interval of a bootstrap over patients.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from medmap.core.memory import keep_freed_memory
from medmap.core.metrics import dice
from medmap.data.store import Store
from medmap.evaluate import on_common_box
from medmap.inference import Windows, answer_subsets
from medmap.predict import Predictor, answerable
from medmap.run import find_runs, read_run


def main() -> None:
    keep_freed_memory()
    run, store, *cases = sys.argv[1:]
    predictor, data = Predictor.load(Path(run)), Store(Path(store))
    patch = read_run(find_runs(Path(run))[0])[0].train.patch
    scheme, found = predictor.card.scheme, []
    for case in cases or data.ids:
        patient, rows = data.load(case), []
        subsets = answerable(predictor.networks, patient.images)
        ways = [
            answer_subsets(predictor.networks[0], patient, subsets, precision=predictor.precision, windows=windows)
            for windows in (None, Windows(0.0, patch))
        ]
        for answers in zip(*ways, strict=True):
            pairs = [on_common_box(answer, patient) for answer in answers]
            rows.append([[dice(*(scheme.region_mask(m, r) for m in pair)) for r in scheme.regions] for pair in pairs])
        found.append(np.mean(rows, axis=0))
    whole, windowed = 100 * np.array(found).transpose(1, 0, 2)
    drawn = np.random.default_rng(0).integers(0, len(found), (10_000, len(found)))
    print(f"{len(found)} patients, mean of {len(subsets)} subsets; windows of {'×'.join(map(str, patch))}\n")
    print("| region | one pass | windows | difference, points |\n|---|---|---|---|")
    for index, region in enumerate(scheme.regions):
        one, other = whole[:, index], windowed[:, index]
        low, high = np.percentile((one - other)[drawn].mean(axis=1), (2.5, 97.5))
        difference = f"{(one - other).mean():+.2f} [{low:+.2f}, {high:+.2f}]"
        print(f"| {region} | {one.mean():.2f} | {other.mean():.2f} | {difference} |")


if __name__ == "__main__":
    main()
