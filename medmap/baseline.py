"""Floors: methods without learning. A network that does not exceed them is broken.

``flair-threshold``: whole tumour = what is bright on T2-FLAIR.

    r = (x − median) / (1.4826 · MAD) inside the brain, then smoothed by a Gaussian of one voxel
    WT = largest component of the opening of {r > t}

t is the one that gives the highest mean Dice on the training and validation parts; the test part is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medmap.core.box import Box, Boxed
from medmap.core.case import Prepared
from medmap.core.labels import LabelScheme
from medmap.core.metrics import dice, score_region
from medmap.core.modality import ModalitySet
from medmap.data.store import Store
from medmap.errors import InputError
from medmap.evaluate import check_scorable, read_splits, refuse_taught, refuse_untested, run_store
from medmap.run import find_runs, read_run
from medmap.scores import Score, write_scores

FLAIR, REGION = "t2f", "WT"
THRESHOLDS = tuple(float(t) for t in np.arange(0.5, 3.01, 0.125))
_FACES = ndimage.generate_binary_structure(3, 1)


def robust_flair(image: NDArray[Any]) -> NDArray[np.float32]:
    """r of the head of this file, Float32[x y z]; 0 outside the brain.

    image: a T2-FLAIR volume, background exactly 0
    """
    brain = image != 0
    values = image[brain].astype(np.float32)
    centre = np.median(values)
    spread = 1.4826 * np.median(np.abs(values - centre))
    if spread == 0:
        return np.zeros(image.shape, np.float32)
    score = np.where(brain, (image.astype(np.float32) - centre) / spread, 0)
    return np.where(brain, ndimage.gaussian_filter(score, 1.0), 0).astype(np.float32)


def bright_tumour(score: NDArray[np.float32], threshold: float) -> NDArray[np.bool_]:
    """Largest component (faces touch) of the opened set of voxels above a threshold."""
    opened = ndimage.binary_opening(score > threshold, _FACES)
    components, count = ndimage.label(opened, _FACES)
    if count == 0:
        return opened
    sizes = np.bincount(components.ravel())[1:]
    return components == int(sizes.argmax()) + 1


def choose_threshold(store: Store, ids: Sequence[str], scheme: LabelScheme) -> float:
    """The threshold with the highest mean Dice of WT over some cases; the lowest such where several tie."""
    totals = np.zeros(len(THRESHOLDS))
    for case in ids:
        score, truth = _score_and_truth(store.load(case), scheme)
        totals += [dice(bright_tumour(score, threshold), truth) for threshold in THRESHOLDS]
    return THRESHOLDS[int(totals.argmax())]


def evaluate_baseline(
    name: str, path: Path, *, data: Store | None = None, data_name: str | None = None, convention: str = "brats"
) -> Path:
    """Score a floor on the same cases as a run or a folder of folds; returns the folder with its table.

    For every run the threshold comes from its training and validation parts. With ``data``, other patients, it is the
    median of these thresholds. Written into PATH/baseline-NAME, or PATH/on-DATA/baseline-NAME.

    Raises InputError for an unknown floor, cases without T2-FLAIR, and labels without a whole tumour, besides what
    `medmap.evaluate.evaluate` raises: its refusals of cases that a run learned from hold for thresholds as well.
    """
    if name != "flair-threshold":
        raise InputError(f"baseline {name!r} is not known; expected flair-threshold")
    runs = find_runs(path)
    scheme, flair = read_run(runs[0])[1].scheme, ModalitySet((FLAIR,))
    if REGION not in scheme.regions:
        raise InputError(f"baseline {name} finds {REGION}; the labels of {runs[0]} have {', '.join(scheme.regions)}")
    splits, stores = read_splits(runs), [run_store(run) for run in runs]
    learnt = [[*split["train"], *split["val"]] for split in splits]
    asked = [(store, split["test"]) for store, split in zip(stores, splits, strict=True)]
    if data is not None:
        asked = [(data, data.ids)]
    for store, ids in [*zip(stores, learnt, strict=True), *asked]:
        check_scorable(store, ids, scheme, flair)
    if data is None:
        refuse_untested(runs, splits)
    else:
        refuse_taught(runs, data)
    thresholds = [choose_threshold(store, ids, scheme) for store, ids in zip(stores, learnt, strict=True)]
    used = thresholds if data is None else [float(np.median(thresholds))]
    rows = []
    for (store, ids), threshold in zip(asked, used, strict=True):
        rows += _score(store, ids, threshold, scheme, convention)
    about = {"evaluated": f"T2-FLAIR threshold chosen on training folds: {', '.join(f'{t:g}' for t in thresholds)}"}
    about["runs"] = len(runs)
    out = path if data is None else path / f"on-{data_name or data.path.name}"
    write_scores(out / f"baseline-{name}", rows, flair, scheme, convention, [store for store, _ in asked], about)
    return out / f"baseline-{name}"


def _score(store: Store, ids: Sequence[str], threshold: float, scheme: LabelScheme, convention: str) -> list[Score]:
    rows = []
    for case in ids:
        prepared = store.load(case)
        score, truth = _score_and_truth(prepared, scheme)
        found = score_region(bright_tumour(score, threshold), truth, prepared.grid.spacing_mm, convention)
        rows += [Score(case, store.patient(case), FLAIR, REGION, metric, value) for metric, value in found.items()]
    return rows


def _score_and_truth(prepared: Prepared, scheme: LabelScheme) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    if FLAIR not in prepared.images or prepared.labels is None:
        raise InputError(f"case {prepared.id} has no T2-FLAIR or no segmentation: the threshold needs both")
    image, labels = prepared.images[FLAIR], prepared.labels
    box = Box.union([image.box, labels.box])
    score = Boxed(robust_flair(np.asarray(image.values, np.float32)), image.box).window(box)
    return score, scheme.region_mask(labels.window(box), REGION)
