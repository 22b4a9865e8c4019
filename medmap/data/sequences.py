"""Which sequence an image is, from the image alone and from its siblings: t1n, t1c, t2w or t2f.

Eleven numbers that a reader of films would name (is fluid dark or bright, which of white and grey matter is brighter,
are there bright spots) go into a multinomial logistic regression; where both T1 images are there, which of the two has
the bright spots decides. ``sequences.json`` holds the coefficients: scripts/sequences.py fits them to phantoms, and to
phantoms only. What it is worth is in docs/sequences.md.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from itertools import combinations, permutations
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medmap.core.modality import GLIOMA_MRI
from medmap.data.views import GREY, MIDDLE, WHITE, View

Numbers = NDArray[np.float64]
Key = TypeVar("Key", bound=Hashable)

NAMES = GLIOMA_MRI.names
INVERTED = "inverted "
KINDS = (*NAMES, *(INVERTED + name for name in NAMES))
"""What an image may be: a sequence, or one whose contrast has been turned round."""

FARTHEST = 3.0
"""Numbers are in standard deviations of phantoms; beyond this they count no more."""

INVERTED_PRIOR = 0.2
"""How much rarer an image with its contrast turned round is taken to be; in truth far rarer, but nobody has counted."""


def guess(images: Mapping[Key, View], distinct: bool = True) -> dict[Key, tuple[str, float]]:
    """What each image most probably is, and how probable that is.

        P(k₁ … kₙ) ∝ Π P(kᵢ | image i) · P(order of the two T1 images), over all ways to name n images

    images:   {any key: view}; skull-stripped brains, see `View.of`
    distinct: no sequence occurs twice; else every image stands alone

    The answers are names of `KINDS`; the probability is the sum over all ways in which that image has that name.

    >>> from medmap.phantom import Settings, simulate
    >>> case = simulate(11, Settings(spacing_mm=3.0))
    >>> views = {key: View.of(case.images[name], case.affine) for key, name in (("a", "t2w"), ("b", "t2f"))}
    >>> {key: best for key, (best, _) in guess(views).items()}
    {'a': 't2w', 'b': 't2f'}
    """
    if not distinct or len(images) > len(NAMES):
        return {key: answer for one in images for key, answer in guess({one: images[one]}).items()}
    ways, chances = _weighed(images)
    answers = {}
    for place, key in enumerate(images):
        share = {kind: float(chances[[way[place] == kind for way in ways]].sum()) for kind in KINDS}
        best = max(share, key=lambda kind: share[kind])
        answers[key] = (best, share[best])
    return answers


def likelier(images: Mapping[str, View]) -> dict[str, str]:
    """{name: what it looks like} of the images that look unlike their names; images are keyed by names of `NAMES`.

    Names are doubted where others are more probable by a factor that hardly any whole set reaches, see LIMITS.
    """
    if not images:
        return {}
    ways, chances = _weighed(images)
    scores = np.log(np.maximum(chances, 1e-300)).tolist()
    changes = [{name: kind for name, kind in zip(images, way, strict=True) if name != kind} for way in ways]
    doubts = [_doubt(change, images) for change in changes]
    given = scores[doubts.index("")]
    same_kind = max(score for score, doubt in zip(scores, doubts, strict=True) if doubt in ("", "agent"))
    base = {"kind": same_kind, "order": given, "agent": given}
    for score, doubt, change in sorted(zip(scores, doubts, changes, strict=True), key=lambda one: -one[0]):
        if doubt and score - base[doubt] >= LIMITS[doubt]:
            return change
    return {}


def _doubt(change: Mapping[str, str], images: Mapping[str, View]) -> str:
    """Which key of LIMITS a change of names falls under; "" where nothing changes."""
    if not change:
        return ""
    if not {*change, *change.values()} <= {"t1n", "t1c"}:
        return "kind"
    both = {"t1n", "t1c"} <= set(images) and images["t1n"].values.shape == images["t1c"].values.shape
    return "order" if both else "agent"


def _weighed(images: Mapping[Any, View]) -> tuple[list[tuple[str, ...]], Numbers]:
    """All ways to name the images without naming two alike, and how probable each is."""
    single = [dict(zip(KINDS, kinds(view), strict=True)) for view in images.values()]
    views = list(images.values())
    order: dict[tuple[int, int], float] = {}
    for one, two in combinations(range(len(views)), 2):
        if views[one].values.shape == views[two].values.shape:
            score = order_score(views[one], views[two])
            order[one, two], order[two, one] = (-float(np.logaddexp(0, -s)) for s in (score, -score))
    ways = list(_ways(len(views)))
    scores = np.array([_score(way, single, order) for way in ways])
    chances = np.exp(scores - scores.max())
    return ways, chances / chances.sum()


def _ways(count: int) -> Iterator[tuple[str, ...]]:
    """All ways to name so many images, at most one of them inverted."""
    for names in permutations(NAMES, count):
        yield names
        for place in range(count):
            yield tuple(INVERTED + name if at == place else name for at, name in enumerate(names))


def _score(way: Sequence[str], single: list[dict[str, float]], order: Mapping[tuple[int, int], float]) -> float:
    """Log-probability of one way, up to a constant; where both T1 images are there, their order decides alone."""
    pair = (way.index("t1n"), way.index("t1c")) if {"t1n", "t1c"} <= set(way) else (-1, -1)
    total = order.get(pair, 0.0)
    for place, kind in enumerate(way):
        if pair in order and place in pair:
            total += float(np.logaddexp(single[place]["t1n"], single[place]["t1c"]))
        else:
            total += single[place][kind]
        if kind.startswith(INVERTED):
            total += float(np.log(INVERTED_PRIOR))
    return total


# ---- one image ------------------------------------------------------------------------------------------------


def kinds(view: View) -> Numbers:
    """Log-probability of each of `KINDS`, from the image alone."""
    model = _model()
    scores = model.weights @ _standard(numbers(view), model.mean, model.spread) + model.bias
    return scores - np.logaddexp.reduce(scores)


@lru_cache(maxsize=8)
def numbers(view: View) -> Numbers:
    """The eleven numbers of an image, named in `NUMBERS`."""
    level = np.arcsinh(view.level)
    inside, fine = level[view.inner], view.detail[view.inner]
    low1, low5, high95, high99, high999 = np.percentile(fine, (1, 5, 95, 99, 99.9))
    unit = max((high95 - low5) / 3.3, 1e-6)
    white, grey, middle = (view.zone(bit) & view.mask for bit in (WHITE, GREY, MIDDLE))
    middle &= view.inner
    steps = [2.0 / mm for mm in view.spacing_mm]
    calm = np.arcsinh(ndimage.gaussian_filter(view.level, steps))
    dark, bright = _percentiles(calm[middle], (1, 97))
    (spots,) = _percentiles(view.detail[middle] / unit, (98,))
    return np.array(
        [
            _log_ratio(high99, -low1),
            _log_ratio(high95, -low5),
            _log_ratio(high999, -low1),
            _log_ratio(high999, high95),
            _median(level[white]) - _median(level[grey]),
            (_median(view.detail[white]) - _median(view.detail[grey])) / unit,
            np.percentile(inside, 95),
            np.percentile(inside, 99.9),
            dark,
            bright,
            np.arcsinh(spots),
        ]
    )


def _percentiles(values: NDArray[Any], which: Sequence[float]) -> list[float]:
    return [float(v) for v in np.percentile(values, which)] if values.size else [0.0] * len(which)


def _median(values: NDArray[Any]) -> float:
    return float(np.median(values)) if values.size else 0.0


def _log_ratio(one: float, two: float) -> float:
    return float(np.log(max(one, 1e-3) / max(two, 1e-3)))


# ---- two T1 images --------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def order_score(one: View, two: View) -> float:
    """Log-odds that of two T1 images on one grid the second has the contrast agent; −order_score(two, one)."""
    model = _model()
    return float(model.order @ _standard(order_numbers(one, two), np.zeros(len(ORDER_NUMBERS)), model.order_spread))


def order_numbers(one: View, two: View) -> Numbers:
    """How lopsided the difference of two T1 images is; every number changes its sign when the two change places."""
    both = one.inner & two.inner
    if np.count_nonzero(both) < 1000:
        return np.zeros(len(ORDER_NUMBERS))
    fine = _lopsided((two.detail - one.detail)[both], ((0.1, 99.9), (1, 99)))
    calm = ndimage.gaussian_filter(np.where(both, two.level - one.level, np.float32(0)), 1.0)[both]
    coarse = _lopsided(calm - np.median(calm), ((0.1, 99.9), (1, 99), (5, 95)))
    own = (numbers(two) - numbers(one))[[NUMBERS.index(name) for name in OWN]]
    return np.array([*fine, *coarse, *own])


def _lopsided(values: NDArray[Any], pairs: Sequence[tuple[float, float]]) -> list[float]:
    low, high = np.percentile(values, (5, 95))
    unit = max((high - low) / 3.3, 1e-6)
    return [float(np.percentile(values, b) + np.percentile(values, a)) / unit for a, b in pairs]


# ---- coefficients ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """Fitted to phantoms: weights [K N] and bias [K] of `NUMBERS`, order [N'] of `ORDER_NUMBERS`; their units."""

    mean: Numbers
    spread: Numbers
    weights: Numbers
    bias: Numbers
    order: Numbers
    order_spread: Numbers


def _standard(values: Numbers, mean: Numbers, spread: Numbers) -> Numbers:
    return np.clip((values - mean) / spread, -FARTHEST, FARTHEST)


@lru_cache(maxsize=1)
def _model() -> Model:
    stored = json.loads((files("medmap.data") / "sequences.json").read_text(encoding="utf-8"))
    same = (stored["numbers"], stored["order_numbers"]) == (list(NUMBERS), list(ORDER_NUMBERS))
    assert same, "sequences.json is of other numbers; run scripts/sequences.py fit"
    return Model(*(np.array(stored[key]) for key in Model.__dataclass_fields__))


LIMITS = {"kind": 2.0, "order": 1.0, "agent": 5.0}
"""How much more probable, as a logarithm, other names must be: another kind of image; the two T1 images exchanged; one
T1 image alone with or without contrast agent, which is hard to see."""

NUMBERS = (
    "bright over dark detail, 1 %",
    "bright over dark detail, 5 %",
    "brightest over dark detail, 0.1 %",
    "brightest over bright detail",
    "white over grey matter",
    "white over grey matter, detail",
    "bright, 5 %",
    "brightest, 0.1 %",
    "darkest round the ventricles",
    "brightest round the ventricles",
    "bright detail round the ventricles",
)
OWN = ("brightest over dark detail, 0.1 %", "brightest over bright detail", "brightest, 0.1 %")
ORDER_NUMBERS = ("detail 0.1 %", "detail 1 %", "coarse 0.1 %", "coarse 1 %", "coarse 5 %", *OWN)
