"""A patient in a page: 8-bit images and a mask, cut to what is there, as NIfTI files that NiiVue shows.

`show` makes a `Study`; `viewer.html.j2` with `inlined` gives the page's part, `scripts` what makes it alive. A page
that holds them asks no network for anything.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import nibabel as nib
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from medmap.core.box import Box, Index3, bounding_box
from medmap.core.labels import LabelScheme
from medmap.core.volume import to_ras
from medmap.figures.style import REGION_HUES, label
from medmap.report.html import part

CLASS_NAMES = {
    "ncr": "necrosis and tumour without enhancement",
    "ed": "oedema and infiltrated tissue",
    "et": "enhancing tumour",
    "rc": "resection cavity",
}
RANKED = ("t2f", "t1c", "t2w", "t1n")
"""Which sequence is shown first: the one that shows most of a glioma."""
_NO_REGION = "#999999"
_MARGIN_VOXELS = 2


@dataclass(frozen=True)
class Paint:
    """One code of the mask: what it means, and its colour (#rrggbb)."""

    code: int
    name: str
    colour: str


@dataclass(frozen=True)
class Study:
    """One patient on one grid, as a page shows it.

    images: {sequence: UInt8[X Y Z]}, the one to show first at the head; 0 outside the brain
    mask:   UInt8[X Y Z], the file's own codes
    affine: 4×4 voxel → mm; the axes point right, front and up as nearly as they can
    paints: one a code
    focus:  the voxel at which a look begins
    """

    images: Mapping[str, NDArray[np.uint8]]
    mask: NDArray[np.uint8]
    affine: NDArray[np.float64]
    paints: tuple[Paint, ...]
    focus: Index3


def show(
    images: Mapping[str, NDArray[np.float32]],
    mask: NDArray[np.uint8],
    affine: NDArray[np.float64],
    scheme: LabelScheme,
) -> Study:
    """A patient's volumes as a page shows them: turned to RAS+, cut to the box of all brains and of the mask, 8 bit.

    images: {sequence: Float32[X Y Z]} on the grid of the mask, in any orientation
    mask:   UInt8[X Y Z], codes of ``scheme``
    affine: 4×4 voxel → mm

        u = 0 where v = 0, else 1 + 254 · clip((v − low) / (high − low), 0, 1), rounded

    v: a voxel; low, high: the 0.5 and 99.5 percentiles of the image's voxels that are not 0.

    >>> from medmap.core.labels import SCHEMES
    >>> image = np.zeros((9, 9, 9), np.float32)
    >>> image[4:6, 4, 4] = 10, 20
    >>> study = show({"t2f": image}, (image > 10).astype(np.uint8), np.eye(4), SCHEMES["brats2023"])
    >>> study.images["t2f"].shape, study.affine[:3, 3].tolist(), int(study.images["t2f"].max())
    ((6, 5, 5), [2.0, 2.0, 2.0], 255)
    """
    turned = {name: to_ras(image, affine)[0] for name, image in images.items()}
    codes, turned_affine = to_ras(mask, affine)
    occupied = np.logical_or.reduce([codes != 0, *(image != 0 for image in turned.values())])
    x, y, z = codes.shape
    box = _roomy(bounding_box(occupied) or Box((0, 0, 0), (x, y, z))).within((x, y, z))
    shift = turned_affine.copy()
    shift[:3, 3] += turned_affine[:3, :3] @ np.array(box.start)
    cut = np.ascontiguousarray(codes[box.slices])
    return Study(
        {name: _grey(turned[name][box.slices]) for name in ranked(turned)}, cut, shift, paints_of(scheme), _focus(cut)
    )


def with_mask(study: Study, mask: NDArray[Any], affine: NDArray[np.float64]) -> Study | None:
    """The study with another mask on the same voxels, so that its images need not be sent again; None where the mask
    lies on other voxels, or reaches beyond what the study shows.

    mask: integers 0…255 [X Y Z] with its affine, as `show` takes them

    >>> from medmap.core.labels import SCHEMES
    >>> image = np.zeros((9, 9, 9), np.float32)
    >>> image[4, 4, 4] = 1
    >>> study = show({"t2f": image}, (image > 0).astype(np.uint8), np.eye(4), SCHEMES["brats2023"])
    >>> int(with_mask(study, 2 * (image > 0), np.eye(4)).mask.sum()), with_mask(study, image + 1, np.eye(4))
    (2, None)
    """
    codes, turned = to_ras(mask, affine)
    start = np.linalg.solve(turned[:3, :3], study.affine[:3, 3] - turned[:3, 3])
    x, y, z = np.rint(start).astype(int).tolist()
    box = Box((0, 0, 0), study.mask.shape).shifted((x, y, z))
    alike = np.allclose(turned[:3, :3], study.affine[:3, :3], atol=1e-3) and np.allclose(start, box.start, atol=1e-2)
    if not alike or box.within(codes.shape) != box:
        return None
    cut = np.ascontiguousarray(codes[box.slices], np.uint8)
    return replace(study, mask=cut) if np.count_nonzero(cut) == np.count_nonzero(codes) else None


def ranked(names: Mapping[str, Any]) -> list[str]:
    """Sequences, the one that shows most of a glioma first.

    >>> ranked({"t1n": 0, "adc": 0, "t2f": 0})
    ['t2f', 't1n', 'adc']
    """
    return sorted(names, key=lambda name: RANKED.index(name) if name in RANKED else len(RANKED))


def paints_of(scheme: LabelScheme) -> tuple[Paint, ...]:
    """A colour for every code: that of the innermost region it belongs to.

    >>> from medmap.core.labels import SCHEMES
    >>> [(p.code, p.colour) for p in paints_of(SCHEMES["brats2021"])]
    [(1, '#D55E00'), (2, '#56B4E9'), (4, '#F0E442')]
    """
    hues = {
        name: REGION_HUES[number % len(REGION_HUES)]
        for number, members in enumerate(scheme.regions.values())
        for name in members
    }
    return tuple(
        Paint(code, CLASS_NAMES.get(name, name), hues.get(name, _NO_REGION)) for name, code in scheme.codes.items()
    )


def inlined(study: Study) -> dict[str, Any]:
    """What `viewer.html.j2` and `viewer.js` want to know of a study, in plain types; volumes as base64 of .nii.gz."""
    return {
        "images": [
            {"name": name, "label": label(name), "nifti": _nifti(image, study.affine)}
            for name, image in study.images.items()
        ],
        "mask": inlined_mask(study),
        "paints": [{"code": p.code, "name": p.name, "colour": p.colour} for p in study.paints],
        "shape": list(study.mask.shape),
        "focus": list(study.focus),
    }


def inlined_mask(study: Study) -> str:
    """The mask alone as base64 of .nii.gz, for `showMask` of a viewer that has the study's images."""
    return _nifti(study.mask, study.affine, "label")


def scripts() -> Markup:
    """NiiVue with its licences, and what connects it with the controls: once a page, after the viewers.

    The licences ask to go with every copy, and a page is one.
    """
    said = Markup("/*\n{}\n{}*/\n").format(part("vendor/LICENSE"), part("vendor/NOTICE"))
    return said + part("vendor/niivue-0.69.0.js") + Markup("\n</script>\n<script>\n") + part("viewer.js")


def _roomy(box: Box) -> Box:
    by = (_MARGIN_VOXELS,) * 3
    return Box(box.shifted((-by[0], -by[1], -by[2])).start, box.shifted(by).stop)


def _grey(volume: NDArray[np.float32]) -> NDArray[np.uint8]:
    brain = volume != 0
    low, high = np.percentile(volume[brain], (0.5, 99.5)) if brain.any() else (0.0, 0.0)
    grey = 1 + 254 * np.clip((volume - low) / max(float(high - low), 1e-12), 0, 1)
    return np.where(brain, np.rint(grey), 0).astype(np.uint8)


def _focus(mask: NDArray[np.uint8]) -> Index3:
    """A voxel of the mask in the axial slice, and there the row, that hold most of it; the middle of an empty one."""
    inside = mask != 0
    if not inside.any():
        x, y, z = (n // 2 for n in mask.shape)
        return x, y, z
    z = int(inside.sum((0, 1)).argmax())
    y = int(inside[:, :, z].sum(0).argmax())
    row = np.flatnonzero(inside[:, y, z])
    return int(row[len(row) // 2]), y, z


def _nifti(volume: NDArray[np.uint8], affine: NDArray[np.float64], intent: str = "none") -> str:
    image = nib.Nifti1Image(volume, affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    image.header.set_xyzt_units("mm")
    image.header.set_intent(intent)  # NiiVue draws rims of labels only
    return base64.b64encode(gzip.compress(image.to_bytes(), mtime=0)).decode("ascii")
