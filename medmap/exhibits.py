"""What a report shows besides numbers: latents before and after training, and a few patients with their masks.

latents.npz   before[N C], after[N C] mean latents over the brain, modality[N], case[N], level[]
examples.npz  images[E M X Y] axial slices, truth[E X Y], predictions[E S X Y], subsets[S] (the first is full), …
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medmap.align import AlignedSegmenter
from medmap.checkpoint import load_network, untrained_network
from medmap.core.box import Box
from medmap.core.case import Prepared
from medmap.core.metrics import dice
from medmap.core.modality import ModalitySet
from medmap.core.witnesses import CLEANED
from medmap.data.store import Store
from medmap.evaluate import class_map, on_common_box, read_splits
from medmap.inference import encode_alone
from medmap.predict import Predictor
from medmap.run import read_run
from medmap.scores import TABLE, read_scores

LATENTS, EXAMPLES = "latents.npz", "examples.npz"


def write_exhibits(run: Path, store: Store, *, count: int = 3, which: str = "best", device: str = "auto") -> None:
    """Make latents.npz and examples.npz of an evaluated run, from its test cases."""
    predictor = Predictor.load(run, which=which, device=device)
    (split,) = read_splits([run])
    cases = [store.load(case) for case in split["test"]]
    _save(run / LATENTS, pooled_latents(run, cases, which))
    _save(run / EXAMPLES, example_slices(predictor, run, cases, count))


def pooled_latents(run: Path, cases: list[Prepared], which: str = "best") -> dict[str, NDArray[Any]]:
    """Mean latent over a sequence's box, per case and sequence, with the weights of before and after training.

    The level is the first aligned one of the backbone, else the deepest. The weights of before training are made again
    from the run's seed.
    """
    config, card = read_run(run)
    before, after = untrained_network(run), load_network(run, which)
    level = next(
        (name for name in config.align.levels if name in after.backbone.strides), list(after.backbone.strides)[-1]
    )
    pairs = [(case, name) for case in cases for name in card.modalities if name in case.images]
    return {
        "before": np.array([_pooled(before, case, name, level) for case, name in pairs]),
        "after": np.array([_pooled(after, case, name, level) for case, name in pairs]),
        "modality": np.array([name for _, name in pairs]),
        "case": np.array([case.id for case, _ in pairs]),
        "level": np.array(level),
    }


def example_slices(predictor: Predictor, run: Path, cases: list[Prepared], count: int) -> dict[str, NDArray[Any]]:
    """The best, the median and the worst case by mean Dice over subsets, cut where the whole tumour is largest.

    Subsets: everything, then for each smaller size the subset with the lowest mean Dice: what a missing sequence costs
    at worst.
    """
    scheme = predictor.card.scheme
    complete = [case for case in cases if set(predictor.card.modalities) <= set(case.images)]
    complete = [case for case in complete if case.labels is not None and case.labels.values.size]
    if not complete:
        return {}
    chosen = _spread(run, complete, count)
    subsets = _worst_of_each_size(run, predictor.card.modalities)
    box = Box.union(Box.union(i.box for i in case.images.values()) for case in chosen)
    images, truths, predictions, scores = [], [], [], []
    for case in chosen:
        assert case.labels is not None
        truth = case.labels.window(box)
        z = int((truth > 0).sum(axis=(0, 1)).argmax())
        images.append([case.images[name].window(box)[:, :, z] for name in predictor.card.modalities])
        truths.append(truth[:, :, z])
        masks, dices = [], []
        for answer in predictor.answers(case, subsets):
            predicted, true = on_common_box(answer, case)
            masks.append(class_map(answer).window(box)[:, :, z])
            dices.append([dice(scheme.region_mask(predicted, r), scheme.region_mask(true, r)) for r in scheme.regions])
        predictions.append(masks)
        scores.append(dices)
    return {
        "images": np.array(images, np.float32),
        "modalities": np.array(list(predictor.card.modalities)),
        "cases": np.array([case.id for case in chosen]),
        "truth": np.array(truths, np.uint8),
        "subsets": np.array([str(subset) for subset in subsets]),
        "predictions": np.array(predictions, np.uint8),
        "spacing_mm": np.array(chosen[0].grid.spacing_mm[:2]),
        "dice": np.array(scores, np.float64),
    }


def _pooled(network: AlignedSegmenter, case: Prepared, name: str, level: str) -> NDArray[np.float32]:
    with torch.inference_mode():
        latent = encode_alone(network, case, name).levels[level]
    pooled: NDArray[np.float32] = latent.float().mean(dim=(0, 2, 3, 4)).numpy()
    return pooled


def _mean_dice(run: Path, key: str) -> dict[str, float]:
    """{case or subset: mean Dice over regions} of an evaluated run."""
    found: dict[str, list[float]] = {}
    for row in read_scores(run / TABLE):
        if row.metric == "dice" and not row.region.endswith(CLEANED) and np.isfinite(row.value):
            found.setdefault(getattr(row, key), []).append(row.value)
    return {name: float(np.mean(values)) for name, values in found.items()}


def _spread(run: Path, cases: list[Prepared], count: int) -> list[Prepared]:
    """Cases at even distances in the order of their Dice, the best first."""
    scores = _mean_dice(run, "case")
    order = sorted(cases, key=lambda case: -scores[case.id])
    picks = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    return [order[i] for i in picks]


def _worst_of_each_size(run: Path, modalities: ModalitySet) -> list[ModalitySet]:
    scores = _mean_dice(run, "subset")
    worst = []
    for size in range(len(modalities), 0, -1):
        of_size = [s for s in modalities.subsets() if len(s) == size and str(s) in scores]
        worst += [min(of_size, key=lambda s: scores[str(s)])] if of_size else []
    return worst


def _save(file: Path, arrays: dict[str, NDArray[Any]]) -> None:
    if arrays:
        np.savez_compressed(file, **arrays)
