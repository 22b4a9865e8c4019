"""Slices of a study as pictures: they show in any browser, in a printout, and without any script."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.image import imsave
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion

from medmap.report.viewer import Study

PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}
"""The axis that a slice is cut across."""
_OPACITY = 0.4
_ENDS = (("L", "R"), ("P", "A"), ("I", "S"))


@dataclass(frozen=True)
class Slice:
    """A slice without and with the mask, as a radiologist looks at it: the patient's right, or the nose, on the left.

    plain, painted: PNG as data URIs, of ``width`` × ``height`` mm
    sides:          which way left, right and top are, e.g. ``("R", "L", "A")``
    """

    plane: str
    place: str
    plain: str
    painted: str
    width: int
    height: int
    sides: tuple[str, str, str]


def slices_of(study: Study, sequence: str) -> list[Slice]:
    """Axial, coronal and sagittal through the study's focus, over one of its sequences."""
    return [_slice(study, sequence, plane, axis) for plane, axis in PLANES.items()]


def painted(grey: NDArray[np.uint8], codes: NDArray[np.uint8], study: Study) -> NDArray[np.float64]:
    """An image [X Y] with its mask [X Y] over it, as RGB [X Y 3] in 0…1; rims have the full colour of the legend."""
    canvas = np.repeat(grey[..., None] / 255, 3, -1)
    for paint in study.paints:
        inside = codes == paint.code
        share = np.where(inside & ~binary_erosion(inside), 1.0, _OPACITY * inside)[..., None]
        canvas = (1 - share) * canvas + share * np.array(mpl.colors.to_rgb(paint.colour))
    return canvas


def _slice(study: Study, sequence: str, plane: str, axis: int) -> Slice:
    at = study.focus[axis]
    grey, codes = (np.take(volume, at, axis) for volume in (study.images[sequence], study.mask))
    across, up = (other for other in range(3) if other != axis)
    spacing_mm = np.linalg.norm(study.affine[:3, :3], axis=0)
    mm = float((study.affine @ (*study.focus, 1))[axis])
    return Slice(
        plane,
        f"{_ENDS[axis][int(mm >= 0)]} {abs(mm):.0f} mm",
        _png(painted(grey, np.zeros_like(codes), study)),
        _png(painted(grey, codes, study)),
        round(grey.shape[0] * spacing_mm[across]),
        round(grey.shape[1] * spacing_mm[up]),
        (_ENDS[across][1], _ENDS[across][0], _ENDS[up][1]),
    )


def _png(canvas: NDArray[np.float64]) -> str:
    """[X Y 3], first axis towards right or front, second upwards → both mirrored onto the screen's rows and columns."""
    buffer = io.BytesIO()
    rows = canvas[::-1, ::-1].transpose(1, 0, 2)
    imsave(buffer, np.ascontiguousarray(rows), format="png", metadata={"Software": None})
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
