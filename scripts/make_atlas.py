"""Makes medmap/phantom/atlas.npz, tissue maps of a head, from the ICBM 152 template: python scripts/make_atlas.py DIR

DIR holds mni_icbm152_{t1,gm,wm}_tal_nlin_sym_09a_converted.nii.gz, the symmetric 2009a template at 1 mm as nilearn
ships it in nilearn/datasets/data (`pip download --no-deps nilearn`, then unzip the wheel). nilearn is not needed to
run medmap. The template has T1, grey and white matter; fluid, ventricles and deep grey matter are worked out here.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Volume = NDArray[np.float32]

OUT = Path(__file__).parent.parent / "medmap" / "phantom" / "atlas.npz"
LEVELS = 15
"""Probabilities are stored in fifteenths: interpolation between voxels hides the steps, and the file stays small."""

NUCLEI = (
    ((11.0, -18.0, 8.0), (12.0, 17.0, 12.0)),  # thalamus
    ((13.0, 14.0, 7.0), (9.0, 16.0, 15.0)),  # head and body of the caudate
    ((16.0, -4.0, 20.0), (6.0, 20.0, 7.0)),
    ((25.0, 3.0, 0.0), (9.0, 19.0, 13.0)),  # putamen and pallidum
)
"""Ellipsoids (centre, half axes, mm, right side) in which grey matter is deep; everywhere else it is cortex."""

VENTRICLES = (
    (((11.0, 32.0, 3.0), (10.0, 10.0, 16.0), (14.0, -18.0, 20.0), (24.0, -40.0, 12.0), (24.0, -56.0, 6.0)), 10.0),
    (((25.0, -40.0, 6.0), (33.0, -26.0, -10.0), (32.0, -8.0, -20.0)), 7.0),
    (((0.0, 2.0, -8.0), (0.0, -24.0, 4.0)), 7.0),
    (((0.0, -32.0, -6.0), (0.0, -44.0, -30.0)), 8.0),
)
"""Lines (mm, right side) and distances from them within which fluid is ventricle: body and horns, the temporal horn,
the third and the fourth ventricle. Fluid elsewhere is fissure, sulcus or cistern."""


def main(folder: Path) -> None:
    t1, grey, white = (_template(folder, name) for name in ("t1", "gm", "wm"))
    x, y, z = _coordinates(t1.shape)
    brain = t1 > 0
    both = np.maximum(grey + white, 1.0)
    grey, white = grey / both * brain, white / both * brain
    fluid = (1 - grey - white) * brain
    inner = [_distance(np.abs(x), y, z, line) < reach for line, reach in VENTRICLES]
    ventricle = fluid * np.any(inner, axis=0)
    deep_region = np.any([_ellipsoid(np.abs(x), y, z, *nucleus) for nucleus in NUCLEI], axis=0)
    white, grey, ventricle = _without_false_rim(t1, white, grey, ventricle, inner[0] & ~deep_region)
    deep = grey * deep_region
    # x = 0 is the first column: the template is symmetric, so half of it is all of it
    half = np.s_[98:, :, :]
    maps = {"white": white, "cortex": grey - deep, "deep": deep, "ventricle": ventricle, "brain": brain.astype(float)}
    box = _box(brain[half])
    corner = np.array([98, 0, 0]) + [s.start for s in box]
    stored = {name: np.rint(volume[half][box] * LEVELS).astype(np.uint8) for name, volume in maps.items()}
    np.savez_compressed(OUT, levels=LEVELS, corner_mm=corner + np.array([-98.0, -134.0, -72.0]), **stored)
    print(f"{OUT}: {OUT.stat().st_size / 1e6:.2f} MB, {stored['white'].shape} voxels")
    for name, volume in maps.items():
        print(f"{name:10} {volume.sum() / 1000:7.0f} ml")


def _template(folder: Path, name: str) -> Volume:
    image = nib.load(folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz")
    volume: Volume = np.asanyarray(image.dataobj).astype(np.float32) / 255
    return volume


def _coordinates(shape: tuple[int, ...]) -> tuple[Volume, Volume, Volume]:
    """MNI coordinates in mm, shaped to broadcast."""
    x, y, z = (np.arange(n, dtype=np.float32) - o for n, o in zip(shape, (98, 134, 72), strict=True))
    return x[:, None, None], y[None, :, None], z[None, None, :]


def _ellipsoid(
    x: Volume, y: Volume, z: Volume, centre: tuple[float, ...], axes: tuple[float, ...]
) -> NDArray[np.bool_]:
    u, v, w = ((line - c) / a for line, c, a in zip((x, y, z), centre, axes, strict=True))
    inside: NDArray[np.bool_] = u * u + v * v + w * w < 1
    return inside


def _distance(x: Volume, y: Volume, z: Volume, line: tuple[tuple[float, ...], ...]) -> Volume:
    """Distance in mm from a line of straight pieces."""
    nearest = np.full(np.broadcast_shapes(x.shape, y.shape, z.shape), np.inf, np.float32)
    for start, stop in pairwise(np.array(line, np.float32)):
        along = stop - start
        u, v, w = x - start[0], y - start[1], z - start[2]
        t = np.clip((u * along[0] + v * along[1] + w * along[2]) / (along @ along), 0, 1)
        away = (u - t * along[0]) ** 2 + (v - t * along[1]) ** 2 + (w - t * along[2]) ** 2
        nearest = np.minimum(nearest, np.sqrt(away))
    return nearest


def _without_false_rim(
    t1: Volume, white: Volume, grey: Volume, ventricle: Volume, where: NDArray[np.bool_]
) -> tuple[Volume, Volume, Volume]:
    """Half fluid, half white matter looks like grey matter; next to a ventricle it is split by its T1 intensity."""
    rim = ndimage.binary_dilation(ventricle > 0.5, iterations=4) & where & (white + ventricle > 0.05)
    dark, bright = np.percentile(t1[ventricle > 0.9], 50), np.percentile(t1[white > 0.95], 50)
    share = np.clip((bright - t1) / (bright - dark), 0, 1)
    return (
        np.where(rim, white + grey * (1 - share), white),
        np.where(rim, 0, grey),
        np.where(rim, ventricle + grey * share, ventricle),
    )


def _box(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    return ndimage.find_objects(ndimage.binary_dilation(mask, iterations=2).astype(np.uint8))[0]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
