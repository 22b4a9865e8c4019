"""HD95 and surface Dice of WT, TC and ET of one patient at 1 mm, against MONAI's; and the lesion-wise rule."""

from __future__ import annotations

import made
import numpy as np
import pytest
import torch
from scipy import ndimage

from medmap.core.box import Box
from medmap.core.lesions import lesion_wise
from medmap.core.metrics import hd95_mm, nsd

SPACING_MM = (1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def masks() -> list[tuple[np.ndarray, np.ndarray]]:
    """(prediction, truth) on the whole grid; the prediction is the truth after a voxel's shift and an opening."""
    patient = made.patient()
    truth = patient.labels.window(Box((0, 0, 0), patient.grid.shape))
    pairs = []
    for region in made.SCHEME.regions:
        true = made.SCHEME.region_mask(truth, region)
        pairs.append((ndimage.binary_opening(np.roll(true, 2, axis=0)), true))
    return pairs


@pytest.mark.parametrize("whose", ["monai", "medmap"])
def bench_surface_distances(benchmark, masks, whose: str) -> None:
    benchmark.group = "HD95 and surface Dice of three regions at 1 mm"
    score = _monai if whose == "monai" else _medmap
    np.testing.assert_allclose(_medmap(masks), _monai(masks), atol=1e-4)
    benchmark.pedantic(lambda: score(masks), rounds=5, warmup_rounds=1)


def bench_lesion_wise(benchmark, masks) -> None:
    benchmark.group = "lesion-wise rule, three regions at 1 mm"
    benchmark.pedantic(lambda: [lesion_wise(*pair, SPACING_MM) for pair in masks], rounds=5, warmup_rounds=1)


def _medmap(masks) -> list[float]:
    return [f(*pair, SPACING_MM) for pair in masks for f in (hd95_mm, nsd)]


def _monai(masks) -> list[float]:
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    found = []
    for pair in masks:
        prediction, truth = (torch.from_numpy(mask[None, None]) for mask in pair)
        found.append(compute_hausdorff_distance(prediction, truth, include_background=True, percentile=95).item())
        found.append(compute_surface_dice(prediction, truth, [1.0], include_background=True).item())
    return found
