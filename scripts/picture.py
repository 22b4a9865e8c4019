"""Draws docs/demo.png from a finished demo: python scripts/picture.py runs/demo docs/demo.png

One phantom that training never saw: its four sequences, the truth, and the answers from all four and from two.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from medmap.core.box import Box
from medmap.core.metrics import dice
from medmap.data.store import Store
from medmap.figures.style import REGION_HUES, label
from medmap.predict import Predictor
from medmap.scores import read_scores

GIVEN = "t2w+t2f"
ZOOM = 3  # from 3 mm voxels to a slice that is pleasant to look at


def draw(run: Path, out: Path) -> None:
    """Make the picture."""
    predictor, store = Predictor.load(run), Store(run / "store")
    scheme, modalities = predictor.card.scheme, predictor.card.modalities
    case = store.load(_median_case(run))
    assert case.labels is not None
    box = Box.union(image.box for image in case.images.values())
    truth = case.labels.window(box)
    z = int((truth > 0).sum(axis=(0, 1)).argmax())
    images = {name: case.images[name].window(box)[:, :, z].astype(np.float32) for name in modalities}
    panels = [(label(name), images[name], np.zeros_like(truth[:, :, z]), "") for name in modalities]
    panels.append(("truth", images["t2f"], truth[:, :, z], ""))
    for answer in predictor.answers(case, [modalities, modalities.parse(GIVEN)]):
        found = answer.on_grid(case.grid.shape).argmax(axis=0)[box.slices]
        scores = [dice(scheme.region_mask(found, r), scheme.region_mask(truth, r)) for r in scheme.regions]
        words = "  ".join(f"{r} {100 * s:.0f}" for r, s in zip(scheme.regions, scores, strict=True))
        title = "from all four" if answer.subset == modalities else f"from {label(GIVEN)}"
        panels.append((title, images["t2f"], found[:, :, z].astype(np.uint8), words))
    figure = Figure(figsize=(14, 2.9), dpi=110, layout="constrained")
    for ax, (title, image, classes, words) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        regions = [(scheme.region_mask(classes, r), hue) for r, hue in zip(scheme.regions, REGION_HUES, strict=False)]
        ax.imshow(_painted(image, regions), origin="lower", interpolation="bilinear")
        ax.set_title(title, size=12)
        ax.set_xlabel(words, size=9)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    keys = [Patch(facecolor=hue, label=r) for r, hue in zip(scheme.regions, REGION_HUES, strict=False)]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False)
    figure.savefig(out, bbox_inches="tight")


def _median_case(run: Path) -> str:
    """The test case whose mean Dice over subsets and regions is the median: neither the best nor the worst."""
    test = json.loads((run / "splits.json").read_text(encoding="utf-8"))["test"]
    rows = [row for row in read_scores(run / "subsets.csv") if row.metric == "dice"]
    return sorted(test, key=lambda case: np.mean([row.value for row in rows if row.case == case]))[len(test) // 2]


def _painted(image: NDArray[np.float32], regions: list[tuple[NDArray[np.bool_], str]]) -> NDArray[np.float64]:
    """A slice with its regions, as radiologists look at it: the patient's right is on the left."""
    inside = image[image != 0]
    low, high = np.percentile(inside, (1, 99.8))
    grey = np.where(image == 0, 0.0, np.clip((image - low) / (high - low), 0, 1))
    canvas = np.repeat(grey[..., None], 3, axis=-1).astype(np.float64)
    for mask, hue in regions:
        canvas[mask] = 0.45 * grey[mask, None] + 0.55 * np.array(to_rgb(hue))
    return np.kron(canvas[::-1].transpose(1, 0, 2), np.ones((ZOOM, ZOOM, 1)))


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
