"""What images of one patient say about each other: wrong names, copies, mirrored, shifted, too short; and odd values.

Images are compared by where their detail is, whatever its sign: sulci and ventricles have an edge in every sequence.
`findings` gives sentences; KINDS at the foot grades them; docs/sequences.md says how often they are right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from medmap.core.box import Index3
from medmap.data.cases import REGISTER, STRIP
from medmap.data.sequences import NAMES, likelier
from medmap.data.views import Image, View, blurred, cut

COPY, ALIKE = 0.99, 0.95
"""Rank correlation of two images: at most 0.93 between different sequences of 16 patients and 100 phantoms."""

MIRRORED = 1.2
"""So many times better than as it is must a mirrored image fit; at most 0.72 in 16 patients and 30 phantoms."""

SHIFTED_MM = 6.0
"""Farther than registration leaves: at most 4 mm in 16 patients and 30 phantoms."""

SHIFT_GAIN = 1.3
"""So many times better than as it is must a shifted image fit."""

FIT = 0.1
"""What fits worse than this fits nowhere."""

MISSING = 0.08
"""Share of the others' brain that lies beyond the first or the last slice of an image."""

HEAD = 1.4
"""So many times the others' brain is a head."""

FLIPS: dict[str, tuple[int, ...]] = {
    "": (),
    "left and right": (0,),
    "front and back": (1,),
    "top and bottom": (2,),
    "left and right, and front and back": (0, 1),
}
"""Axes that are turned round."""


@dataclass(frozen=True)
class Finding:
    """One thing that was seen. kind: key of KINDS; name: the image, "" where no single one is to blame."""

    kind: str
    name: str
    what: str
    cure: str


class Fit(NamedTuple):
    """How two images lie on each other.

    flip:     key of FLIPS that fits best
    shift_mm: how far the second is moved then
    gain:     how much better that fits than the images as they are
    quality:  correlation of the places of detail, −1 … 1
    alike:    rank correlation of the values then, −1 … 1
    """

    flip: str
    shift_mm: float
    gain: float
    quality: float
    alike: float


def findings(views: Mapping[str, View], apart: frozenset[str] = frozenset()) -> list[Finding]:
    """What is odd about a patient's images.

    views: {sequence: view}, of brains
    apart: those that lie on another grid than the first; their names are looked at, not their places

    >>> from medmap.phantom import Settings, simulate
    >>> case = simulate(3, Settings(spacing_mm=3.0))
    >>> views = {name: View.of(image, case.affine) for name, image in case.images.items()}
    >>> findings(views)
    []
    >>> swapped = views | {"t2w": views["t2f"], "t2f": views["t2w"]}
    >>> [(finding.kind, finding.name) for finding in findings(swapped)]
    [('named', 't2f')]
    """
    together = {name: view for name, view in views.items() if name not in apart}
    shape = next(iter(together.values())).values.shape if together else ()
    together = cut({name: view for name, view in together.items() if view.values.shape == shape}) if together else {}
    traces = {name: Trace(view) for name, view in together.items()}
    fits = {(a, b): fit(traces[a], traces[b]) for a, b in combinations(together, 2)}
    copies = list(_copies(fits))
    misplaced = list(_misplaced(fits))
    known = {name: together.get(name, view) for name, view in views.items() if name in NAMES}
    named = [] if copies or any(finding.kind == "mirrored" for finding in misplaced) else list(_named(known))
    return [*copies, *misplaced, *_partial(together), *named]


def fit(one: Trace, two: Trace) -> Fit:
    """Try all places and FLIPS of the second image; both on one grid.

        c_f(d) = Σ_x e₁(x) e₂(F_f x + d),    e: strength of detail, without its slow part, of mean 0 and norm 1

    First on blocks of 2×2×2 voxels; where the images fit best as they are, that is all.
    """
    peaks = {flip: _peak(one.coarse, two.coarse, axes) for flip, axes in FLIPS.items()}
    flip = max(peaks, key=lambda key: peaks[key][0])
    here = max(float(np.vdot(one.edges, two.edges)), 1e-6)
    value, steps = here, (0, 0, 0)
    if flip or any(peaks[flip][1]):
        value, steps = _peak(one.edges, two.edges, FLIPS[flip])
    shift_mm = float(np.linalg.norm(np.array(steps) * one.view.spacing_mm))
    return Fit(flip, shift_mm, value / here, value, _alike(one.view, two.view, FLIPS[flip], steps))


@dataclass(frozen=True, eq=False)
class Trace:
    """Where a view has detail, whatever its sign."""

    view: View

    @cached_property
    def edges(self) -> Image:
        """Of mean 0 and norm 1 over the brain without its rim."""
        view = self.view
        low, high = np.percentile(view.detail[view.inner], (5, 95))
        strength = np.minimum(np.abs(view.detail) * np.float32(3.3 / max(high - low, 1e-6)), 4) * view.inner
        strength = np.clip(strength - blurred(strength, view.inner, 10.0, view.spacing_mm), -2, 2)
        return _unit(np.where(view.inner, strength - strength[view.inner].mean(), 0))

    @cached_property
    def coarse(self) -> Image:
        """The same on blocks of 2×2×2 voxels."""
        padded = np.pad(self.edges, [(0, n % 2) for n in self.edges.shape])
        x, y, z = (n // 2 for n in padded.shape)
        return _unit(padded.reshape(x, 2, y, 2, z, 2).sum(axis=(1, 3, 5)))


def _unit(image: NDArray[Any]) -> Image:
    return (image / max(float(np.linalg.norm(image)), 1e-6)).astype(np.float32)


def _peak(one: Image, two: Image, axes: tuple[int, ...]) -> tuple[float, Index3]:
    """The largest overlap with the second image, flipped and moved, and the voxels it is moved by."""
    size = [fft.next_fast_len(n + 8, real=True) for n in one.shape]
    overlap = fft.irfftn(fft.rfftn(one, size) * np.conj(fft.rfftn(np.flip(two, axes), size)), size)
    at = np.unravel_index(int(overlap.argmax()), overlap.shape)
    x, y, z = (int(i) if i < n / 2 else int(i) - n for i, n in zip(at, size, strict=True))
    return float(overlap[at]), (x, y, z)


def _alike(one: View, two: View, axes: tuple[int, ...], steps: Index3) -> float:
    """Spearman's correlation over every fifth voxel that is inside both brains."""
    values, inner = (np.roll(np.flip(part, axes), steps, (0, 1, 2)) for part in (two.values, two.inner))
    both = one.inner & inner
    if np.count_nonzero(both) < 1000:
        return 0.0
    ranks = [image[both][::5].argsort(kind="stable").argsort(kind="stable") for image in (one.values, values)]
    return float(np.corrcoef(*ranks)[0, 1])


# ---- sentences ------------------------------------------------------------------------------------------------


def _copies(fits: Mapping[tuple[str, str], Fit]) -> Iterator[Finding]:
    for (one, two), found in fits.items():
        if abs(found.alike) < ALIKE:
            continue
        how = [f"{found.flip} exchanged"] if found.flip else []
        how += ["its contrast turned round"] if found.alike < 0 else []
        words = f" with {', '.join(how)}" if how else ", up to scale and noise"
        kind = "copy" if abs(found.alike) >= COPY else "alike"
        what = f"{two} is {one} once more{words} (rank correlation {found.alike:.3f})"
        yield Finding(kind, two, what, "find out which name is right and remove the other: it may be missing")


def _misplaced(fits: Mapping[tuple[str, str], Fit]) -> Iterator[Finding]:
    """Mirrored and shifted images; the odd one out is named where three or more images tell which it is."""
    good = {pair: found for pair, found in fits.items() if found.quality >= FIT and abs(found.alike) < ALIKE}
    mirrored = {pair: found for pair, found in good.items() if found.flip and found.gain >= MIRRORED}
    for name, others, found in _blamed(mirrored, fits):
        who = f"{name} and {others[0]} are mirrored against each other"
        if len(others) > 1:
            who = f"{name} is mirrored against {', '.join(others)}"
        cure = "export it again from its source, or turn it back"
        yield Finding("mirrored", name, f"{who}: {found.flip} are exchanged", cure)
    shifted = {
        pair: found
        for pair, found in good.items()
        if not found.flip and found.shift_mm >= SHIFTED_MM and found.gain >= SHIFT_GAIN
    }
    for name, others, found in _blamed(shifted, fits):
        what = f"{name} lies {found.shift_mm:.0f} mm away from {', '.join(others)} on the same grid"
        yield Finding("shifted", name, what, f"register the images to each other first: {REGISTER}")


def _blamed(
    odd: Mapping[tuple[str, str], Fit], fits: Mapping[tuple[str, str], Fit]
) -> Iterator[tuple[str, list[str], Fit]]:
    """Images at odds with most of the others, and with whom; then pairs of which nobody knows which one it is."""
    against: dict[str, list[str]] = {}
    for one, two in odd:
        against.setdefault(one, []).append(two)
        against.setdefault(two, []).append(one)
    count = Counter(name for pair in fits for name in pair)
    alone = [name for name, others in against.items() if len(others) > 1 and len(others) > count[name] / 2]
    for name in alone:
        yield name, against[name], next(found for pair, found in odd.items() if name in pair)
    for (one, two), found in odd.items():
        if one not in alone and two not in alone:
            yield two, [one], found


def _partial(views: Mapping[str, View]) -> Iterator[Finding]:
    for name, view in views.items():
        others = [other.mask for key, other in views.items() if key != name]
        if not others:
            return
        brain = np.sum(others, axis=0) * 2 >= len(others) + (len(others) > 1)
        ratio = view.volume_ml / max(float(np.count_nonzero(brain) * np.prod(view.spacing_mm) / 1000), 1e-6)
        share, missing_mm, end = max((_beyond(brain, view, axis) for axis in range(3)), key=lambda one: one[0])
        if share >= MISSING:
            what = f"{name} ends {missing_mm:.0f} mm before the others {end}: it lacks {100 * share:.0f} % of the brain"
            yield Finding("partial", name, what, "leave it out, or mind that it says nothing about what it lacks")
        elif ratio >= HEAD and len(others) > 1:
            what = f"{name} is {ratio:.1f} times as large as the others: it still has its skull"
            yield Finding("skull", name, what, STRIP)


def _beyond(brain: NDArray[np.bool_], view: View, axis: int) -> tuple[float, float, str]:
    """Share of the brain, and mm, in slices that the image lacks at both ends of an axis; which end is worse."""
    others = tuple(a for a in range(3) if a != axis)
    whole, there = brain.sum(axis=others), (brain & view.mask).sum(axis=others)
    covered = np.flatnonzero((there > 0.1 * whole) & (whole > 0))
    if covered.size == 0:
        return 0.0, 0.0, ""
    ends = [slice(0, covered[0]), slice(covered[-1] + 1, None)]
    shares = [float(whole[end].sum() / whole.sum()) for end in ends]
    slices = [int(np.count_nonzero(whole[end])) for end in ends]
    worse = int(shares[1] > shares[0])
    return sum(shares), slices[worse] * view.spacing_mm[axis], ENDS[axis][worse]


def _named(views: Mapping[str, View]) -> Iterator[Finding]:
    better = likelier(views)
    for name, kind in better.items():
        seen = f"{name} looks like {kind} ({SEEN[kind]})" if kind in SEEN else ""
        if not seen:
            what, cure = f"{name} looks as if dark and bright were exchanged", "look at it, and export it again"
        elif better.get(kind) != name:
            what, cure = seen, f"look at it, and name it {kind} if it is"
        elif name < kind:
            what = f"{name} and {kind} look exchanged: {seen}, {kind} like {name} ({SEEN[name]})"
            cure = "look at both, and exchange their names"
        else:
            continue
        yield Finding("named", name, what, cure)


def coded(name: str, volume: NDArray[Any]) -> Finding | None:
    """Whether an image, 0 outside, is a segmentation: few values, and where these are few voxels whole numbers.

    >>> coded("t2w", np.arange(4000).reshape(10, 20, 20) % 5).kind
    'codes'
    """
    inside = volume[volume != 0]
    few = np.unique(inside[:: max(1, inside.size // 20000)])
    if not 0 < few.size <= FEW_VALUES or (inside.size < 1000 and (few != np.rint(few)).any()):
        return None
    what = f"{name} holds {few.size} different values only, {few[0]:g} … {few[-1]:g}: a segmentation, not an image"
    return Finding("codes", name, what, "name the image's own file")


def odd_values(name: str, volume: NDArray[np.float32]) -> Iterator[Finding]:
    """What is odd about the values of one image of a brain as stored, 0 outside; `coded` comes before."""
    inside = volume[volume != 0]
    if inside.size < 1000:
        return
    top = float(np.count_nonzero(inside == inside.max()) / inside.size)
    if top >= CLIPPED:
        what = f"{name} is cut off at {inside.max():g}: {100 * top:.1f} % of the brain have exactly this value"
        yield Finding("clipped", name, what, "export it again without clipping or windowing")
    mean, spread = float(inside.mean(dtype=np.float64)), float(inside.std(dtype=np.float64))
    if abs(mean) < 0.05 and abs(spread - 1) < 0.05:
        what = f"{name} is normalised already: mean {mean:.2f}, standard deviation {spread:.2f}"
        yield Finding("normalised", name, what, "nothing: that changes no result; keep the original all the same")


FEW_VALUES = 12
CLIPPED = 0.005
ENDS = (("on the left", "on the right"), ("at the back", "at the front"), ("at the bottom", "at the top"))

SEEN: dict[str, str] = {
    "t1n": "white matter is brighter than grey, fluid is dark, no bright spots",
    "t1c": "white matter is brighter than grey, with bright spots of contrast agent",
    "t2w": "fluid is brighter than the brain",
    "t2f": "fluid is dark and grey matter brighter than white",
}

KINDS: dict[str, str] = {
    "copy": "error",
    "mirrored": "error",
    "codes": "error",
    "named": "warning",
    "alike": "warning",
    "shifted": "warning",
    "partial": "warning",
    "skull": "warning",
    "clipped": "warning",
    "normalised": "note",
}
"""Severity of every kind of finding."""
