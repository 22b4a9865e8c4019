"""From a patient's files to what a network sees, and back: Case → Prepared → the file's own grid.

The rule over everything here: a prepared sequence is a function of its own file and of nothing else. Its brain, its
mean and standard deviation, its box — none of them knows which other sequences exist, so a sequence that is missing,
or is declared missing later, cannot have left a trace in those that remain.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmap.core.box import Box, Boxed, bounding_box
from medmap.core.case import Case, Grid, Prepared
from medmap.core.labels import LabelScheme
from medmap.core.volume import from_ras, grid_with_spacing, ras_grid, resample, resample_labels, to_ras, zscore
from medmap.errors import InputError


def prepare_case(case: Case, scheme: LabelScheme | None, spacing_mm: float | None = None) -> Prepared:
    """One patient as a network sees it.

    case:       volumes [X Y Z] on one native grid, any orientation
    scheme:     what the codes in ``case.labels`` mean; None leaves the labels out
    spacing_mm: edge of the cubic voxels of the common grid in mm; None keeps the native spacing

    Each sequence: turned to RAS+; its brain is where its own file is not 0 (negative values are brain); resampled
    within that brain; z = (x − mean)/std over it, exactly 0 elsewhere; Float16 on its brain's own box. Labels: codes
    → class indices, on their own box.

    Raises InputError for a sequence that is 0 everywhere, a code that the scheme does not know, a spacing that is not
    positive.

    >>> native = np.diag([-2.0, -2.0, 2.0, 1.0])
    >>> image = np.pad(np.arange(1, 9, dtype=np.float32).reshape(2, 2, 2), 1)
    >>> prepared = prepare_case(Case("a", {"t2f": image}, native), scheme=None)
    >>> prepared.images["t2f"].box, prepared.grid.affine.diagonal().tolist()
    (Box(start=(1, 1, 1), stop=(3, 3, 3)), [2.0, 2.0, 2.0, 1.0])
    """
    turned = ras_grid(case.grid)
    grid = turned if spacing_mm is None else grid_with_spacing(turned, spacing_mm)
    images = {}
    for name, image in case.images.items():
        upright, _ = to_ras(image, case.affine)
        images[name] = _prepared_image(upright, turned, grid, f"case {case.id}: {name}")
    labels = None
    if scheme is not None and case.labels is not None:
        classes = scheme.encode(case.labels, f"case {case.id}: labels")
        labels = Boxed.tight(resample_labels(to_ras(classes, case.affine)[0], turned, grid))
    return Prepared(case.id, grid, case.grid, images, labels)


def restore(values: NDArray[Any], at: Prepared | tuple[Grid, Grid], order: int = 1) -> NDArray[Any]:
    """Bring a result on a prepared case's grid back onto the grid of the patient's files.

    values: [… X Y Z] on the prepared grid
    at:     the prepared case, or (prepared grid, native grid)
    order:  1 for images and for class probabilities [K X Y Z], trilinear; 0 for a map of codes [X Y Z], where each
            voxel takes the code with the largest share of it

    Where preparing only turned the volume, every voxel returns exactly as it is. Of probabilities, take the argmax
    after restoring, not before: see `restore_classes`. Beyond the prepared grid the result is 0.
    """
    grid, native = (at.grid, at.native) if isinstance(at, Prepared) else at
    assert values.shape[-3:] == grid.shape, (values.shape, grid)
    turned = ras_grid(native)
    moved = resample_labels(values, grid, turned) if order == 0 else resample(values, grid, turned, order=1)
    restored = from_ras(moved, native)
    assert restored.shape[-3:] == native.shape, (restored.shape, native)
    return restored


def restore_classes(probabilities: NDArray[Any], at: Prepared | tuple[Grid, Grid]) -> NDArray[np.uint8]:
    """Class probabilities Float[K X Y Z] on the prepared grid → class indices UInt8[X Y Z] on the native grid.

    The argmax of what `restore` gives, computed round the tumour alone: a voxel between voxels whose most probable
    class is 0 has that class too.
    """
    grid, native = (at.grid, at.native) if isinstance(at, Prepared) else at
    turned = ras_grid(native)
    classes = np.zeros(turned.shape, np.uint8)
    found = bounding_box(probabilities.argmax(axis=0))
    box = None if found is None else _reached(found, grid, turned).overlap(Box((0, 0, 0), turned.shape))
    if box is not None:
        affine = turned.affine.copy()
        affine[:3, 3] += turned.affine[:3, :3] @ box.start
        part = Grid(box.shape, affine)
        classes[box.slices] = resample(probabilities, grid, part, order=1).argmax(axis=0)
    restored: NDArray[np.uint8] = from_ras(classes, native)
    return restored


def _reached(box: Box, source: Grid, target: Grid) -> Box:
    """The voxels of a grid whose interpolation looks into a box of another one."""
    turn = np.linalg.inv(target.affine) @ source.affine
    half = 0.5 * np.linalg.norm(np.linalg.inv(turn[:3, :3]), axis=0).max()  # of a target's voxel, in source voxels
    ends = np.add([box.start, box.stop], [[-1 - half], [half]])
    corners = np.array([[ends[i, 0], ends[j, 1], ends[k, 2], 1] for i, j, k in np.ndindex(2, 2, 2)]) @ turn.T
    start, stop = np.floor(corners.min(axis=0)[:3]).astype(int), np.ceil(corners.max(axis=0)[:3]).astype(int) + 1
    return Box((int(start[0]), int(start[1]), int(start[2])), (int(stop[0]), int(stop[1]), int(stop[2])))


def _prepared_image(image: NDArray[np.float32], turned: Grid, grid: Grid, what: str) -> Boxed:
    brain = image != 0
    if not turned.matches(grid):
        # divided by the brain's share of the voxel, or its rim would darken towards the background's 0
        share = resample(brain, turned, grid, order=1)
        brain = share >= 0.5
        image = np.divide(resample(image, turned, grid, order=1), share, out=np.zeros_like(share), where=brain)
    box = bounding_box(brain)
    if box is None:
        raise InputError(
            f"{what} is 0 everywhere{_by_resampling(turned, grid)}; expected an image of a brain. "
            "Remove the file: a sequence that is not there counts as missing"
        )
    return Boxed(zscore(image[box.slices], brain[box.slices]).astype(np.float16), box)


def _by_resampling(turned: Grid, grid: Grid) -> str:
    return "" if turned.matches(grid) else f" at {grid.spacing_mm[0]:g} mm"
