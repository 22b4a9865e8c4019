"""Fits and measures the sequence doctor: python scripts/sequences.py fit; python scripts/sequences.py measure [DATA]

``fit`` writes medmap/data/zones.npz and medmap/data/sequences.json, from the template and from phantoms alone.
``measure`` writes the tables of docs/sequences.md, on other phantoms and on the real cases of DATA where it is given.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations, permutations
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.optimize import minimize

from medmap.core.case import Case
from medmap.data.cases import CaseFiles, read_case
from medmap.data.layouts import recognise
from medmap.data.sequences import (
    FARTHEST,
    INVERTED,
    KINDS,
    NAMES,
    NUMBERS,
    ORDER_NUMBERS,
    likelier,
    numbers,
    order_numbers,
)
from medmap.data.siblings import Finding, coded, findings, odd_values
from medmap.data.views import GREY, MIDDLE, WHITE, View, cut
from medmap.phantom import Settings, simulate
from medmap.phantom.atlas import MAPS, load_atlas
from medmap.phantom.simulate import alone_on_its_core, patient_of

DATA = Path(__file__).resolve().parents[1] / "medmap" / "data"
WORKERS = 2

PHYSICAL = [(seed, 0.0) for seed in range(700000, 700160)]
RANDOMISED = [(seed, 0.5) for seed in range(710000, 710120)]
RIDGE = 0.03
ORDER_RIDGE = 0.03

Numbers = NDArray[np.float64]


# ---- fit ------------------------------------------------------------------------------------------------------


def write_zones() -> None:
    """The template's zones on voxels of 3 mm, and its brain's mean and spread along each axis."""
    atlas = load_atlas(3.0)
    maps = dict(zip(MAPS, atlas.maps[0].numpy(), strict=True))
    brain = maps["depth"] > 0
    white = brain & (ndimage.gaussian_filter(maps["white"], 1) > 0.75) & (maps["depth"] >= 7)
    near = brain & (ndimage.gaussian_filter(maps["ventricle"], 1) > 0.25)
    deep = ndimage.gaussian_filter(maps["deep"], 1) > 0.4
    grey = brain & ~white & ~near & ~deep & (maps["sinus"] <= -3) & (maps["depth"] >= 7)
    middle = brain & (maps["wall"] < 8) & (maps["depth"] > 12)
    zones = (WHITE * (white & ~near) + GREY * grey + MIDDLE * middle).astype(np.uint8)
    start_mm, places = atlas.lattice.start_mm[0].numpy().astype(float), np.argwhere(brain)
    np.savez_compressed(
        DATA / "zones.npz",
        zones=zones,
        start_mm=start_mm,
        step_mm=3.0,
        mean_mm=start_mm + 3 * places.mean(axis=0),
        spread_mm=3 * places.std(axis=0),
    )


def samples(job: tuple[int, float]) -> tuple[list[tuple[str, Numbers]], Numbers | None]:
    """The numbers of one phantom's images, and of its two T1 images, where their contrast is still theirs."""
    seed, randomised = job
    settings = Settings(randomised=randomised)
    case, patient = simulate(seed, settings), patient_of(seed, settings)
    views = {}
    for name, image in case.images.items():
        scan = patient.scans[name]
        if scan.randomness < randomised and not scan.around:
            continue  # any contrast at all: its name means nothing
        if (view := View.of(image, case.affine)) is not None:
            views[name] = view
    rows = [(name, numbers(view)) for name, view in views.items()]
    rows += [(INVERTED + name, numbers(inverted(view))) for name, view in views.items()]
    order = order_numbers(views["t1n"], views["t1c"]) if {"t1n", "t1c"} <= set(views) else None
    return rows, order


def inverted(view: View) -> View:
    """Dark for bright."""
    inside = view.values[view.mask]
    values = np.where(view.mask, inside.max() + inside.min() + 1 - view.values, 0).astype(np.float32)
    return View(values, view.spacing_mm)


def fit() -> None:
    """From phantoms to the coefficients."""
    write_zones()
    with ProcessPoolExecutor(WORKERS, get_context("spawn"), alone_on_its_core, (os.getpid(),)) as pool:
        found = list(pool.map(samples, PHYSICAL + RANDOMISED))
    rows = [row for mine, _ in found for row in mine]
    x, y = np.array([row for _, row in rows]), np.array([KINDS.index(name) for name, _ in rows])
    mean, spread = x.mean(axis=0), x.std(axis=0)
    solution = multinomial(np.clip((x - mean) / spread, -FARTHEST, FARTHEST), y)
    pairs = np.array([order for _, order in found if order is not None])
    unit = np.sqrt((pairs**2).mean(axis=0))
    order = logistic(np.clip(pairs / unit, -FARTHEST, FARTHEST))
    stored = {
        "numbers": list(NUMBERS),
        "kinds": list(KINDS),
        "order_numbers": list(ORDER_NUMBERS),
        **{key: np.round(value, 4).tolist() for key, value in (("mean", mean), ("spread", spread))},
        "weights": np.round(solution[:, :-1], 3).tolist(),
        "bias": np.round(solution[:, -1], 3).tolist(),
        "order": np.round(order, 3).tolist(),
        "order_spread": np.round(unit, 4).tolist(),
    }
    lines = ",\n".join(f' "{key}": {json.dumps(value)}' for key, value in stored.items())
    (DATA / "sequences.json").write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    print(f"fitted to {len(x)} images and {len(pairs)} pairs of {len(found)} phantoms")


def multinomial(x: Numbers, y: NDArray[np.intp]) -> Numbers:
    """Coefficients [K N+1] with the largest likelihood under a ridge; the last column is the bias."""
    count, size = x.shape
    rows = np.arange(count)

    def loss(flat: Numbers) -> tuple[float, Numbers]:
        w = flat.reshape(len(KINDS), size + 1)
        scores = x @ w[:, :-1].T + w[:, -1]
        scores -= np.logaddexp.reduce(scores, axis=1)[:, None]
        error = np.exp(scores)
        error[rows, y] -= 1
        slope = np.c_[error.T @ x / count + RIDGE * w[:, :-1], error.mean(axis=0)]
        return float(-scores[rows, y].mean() + RIDGE / 2 * (w[:, :-1] ** 2).sum()), slope.ravel()

    start = np.zeros(len(KINDS) * (size + 1))
    return minimize(loss, start, jac=True, method="L-BFGS-B").x.reshape(len(KINDS), size + 1)


def logistic(x: Numbers) -> Numbers:
    """Coefficients [N] that make x·w positive."""

    def loss(w: Numbers) -> tuple[float, Numbers]:
        score = x @ w
        slope = -(x * np.exp(-np.logaddexp(0, score))[:, None]).mean(axis=0) + ORDER_RIDGE * w
        return float(np.logaddexp(0, -score).mean() + ORDER_RIDGE / 2 * (w @ w)), slope

    return minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x


# ---- measure --------------------------------------------------------------------------------------------------

Views = dict[str, View]


def tried(views: Views, number: int, labels: Numbers) -> dict[str, bool]:
    """{what was done: whether it was found, or alarmed where nothing was done} of one patient with four sequences.

    labels: the patient's segmentation, as an image with that name would hold it

    Faults that need one image and a partner take these in turn, by the patient's number.
    """
    views = cut(views)
    seen: dict[str, bool] = {"clean": bool(findings(views))}
    for size in range(1, 5):
        for names in combinations(NAMES, size):
            seen |= {f"{key}|{'+'.join(names)}": value for key, value in _renamed(views, names)}
    name, partner = list(permutations(NAMES, 2))[number % 12]
    image, other = views[name], views[partner]
    draw = np.random.default_rng(number)
    for fault, (spoil, kinds) in SPOILED.items():
        made = spoil(image, draw)
        pair = {name: image, partner: made} if kinds == COPIED else {partner: other, name: made}
        found = {finding.kind for finding in findings(pair)}
        seen[fault] = bool(found & kinds)
    first = {"t1n": views["t1c"], "t1c": changed(views["t1c"], lambda v: 1.7 * v + 3)}
    seen["T1c twice, as T1n too, rescaled"] = any(finding.kind == "copy" for finding in findings(first))
    for fault, (values, kind) in ODD.items():
        seen[fault] = kind in {finding.kind for finding in _odd(name, values(image.values))}
    seen["its segmentation for an image"] = "codes" in {finding.kind for finding in _odd(name, labels)}
    seen["odd values, clean"] = any(_odd(key, view.values) for key, view in views.items())
    return seen


def _odd(name: str, values: Numbers) -> list[Finding]:
    """As `medmap.data.faults` looks at the values of an image."""
    codes = coded(name, values)
    return [codes] if codes is not None else list(odd_values(name, values))


def _renamed(views: Views, names: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    """Whether wrong names are doubted where only these sequences are given; an image may get an absent one's name."""
    yield "clean names", bool(likelier({name: views[name] for name in names}))
    for one, two in (("t1n", "t1c"), ("t2w", "t2f")):
        changed_names = {name: {one: two, two: one}.get(name, name) for name in names}
        if set(names) & {one, two}:
            yield f"{one}/{two}", bool(likelier({changed_names[name]: views[name] for name in names}))


def changed(view: View, function: Callable[[Numbers], Numbers]) -> View:
    """New values inside the brain; what becomes 0 there is no longer brain."""
    values = np.where(view.mask, function(view.values), 0)
    return View(values.astype(np.float32), view.spacing_mm)


def noisy(share: float) -> Callable[[View, np.random.Generator], View]:
    """White noise, in units of the median."""

    def spoil(view: View, draw: np.random.Generator) -> View:
        sigma = share * float(np.median(view.values[view.mask]))
        return changed(view, lambda v: v + draw.normal(0, sigma, v.shape))

    return spoil


def flipped(*axes: int) -> Callable[[View, np.random.Generator], View]:
    """Content turned round on the same grid."""
    return lambda view, draw: View(np.flip(view.values, axes).copy(), view.spacing_mm)


def moved(mm: float) -> Callable[[View, np.random.Generator], View]:
    """Content moved in a random direction on the same grid; what leaves it is lost."""

    def spoil(view: View, draw: np.random.Generator) -> View:
        way = draw.normal(size=3)
        steps = mm * way / np.linalg.norm(way) / view.spacing_mm
        return View(ndimage.shift(view.values, steps, order=0), view.spacing_mm)

    return spoil


def shortened(mm: float) -> Callable[[View, np.random.Generator], View]:
    """Slices missing at the top or at the bottom."""

    def spoil(view: View, draw: np.random.Generator) -> View:
        slices, there = round(mm / view.spacing_mm[2]), np.flatnonzero(view.mask.any(axis=(0, 1)))
        values = view.values.copy()
        if draw.random() < 0.5:
            values[:, :, : there[0] + slices] = 0
        else:
            values[:, :, there[-1] + 1 - slices :] = 0
        return View(values, view.spacing_mm)

    return spoil


def clipped(values: Numbers) -> Numbers:
    """In 8 bits whose 255 is the 97th percentile."""
    return np.clip(np.ceil(values / np.percentile(values[values != 0], 97) * 255), 0, 255).astype(np.float32)


def normalised(values: Numbers) -> Numbers:
    """z-scores of the brain."""
    inside = values[values != 0]
    return np.where(values != 0, (values - inside.mean()) / inside.std(), 0).astype(np.float32)


def in_four_steps(values: Numbers) -> Numbers:
    """Whole numbers from 0 to 4, as a segmentation has, all over the brain, as none is."""
    return np.ceil(values / values.max() * 4).astype(np.float32)


COPIED = frozenset({"copy", "alike"})
SPOILED: dict[str, tuple[Callable[[View, np.random.Generator], View], frozenset[str]]] = {
    "copy, unchanged": (lambda view, draw: View(view.values.copy(), view.spacing_mm), COPIED),
    "copy, rescaled": (lambda view, draw: changed(view, lambda v: 0.3 * v + 7), COPIED),
    "copy, gamma 0.7": (lambda view, draw: changed(view, lambda v: np.abs(v) ** 0.7), COPIED),
    "copy, left and right exchanged": (flipped(0), COPIED),
    "copy, noise of 2 %": (noisy(0.02), COPIED),
    "copy, noise of 5 %": (noisy(0.05), COPIED),
    "left and right exchanged": (flipped(0), frozenset({"mirrored"})),
    "front and back exchanged": (flipped(1), frozenset({"mirrored"})),
    "top and bottom exchanged": (flipped(2), frozenset({"mirrored"})),
    "shifted by 10 mm": (moved(10), frozenset({"shifted"})),
    "shifted by 20 mm": (moved(20), frozenset({"shifted"})),
    "40 mm of slices missing": (shortened(40), frozenset({"partial"})),
    "dark and bright exchanged": (lambda view, draw: inverted(view), frozenset({"named"})),
}
ODD: dict[str, tuple[Callable[[Numbers], Numbers], str]] = {
    "8 bits, cut off at the 97th percentile": (clipped, "clipped"),
    "z-scored before": (normalised, "normalised"),
    "whole numbers from 0 to 4": (in_four_steps, "codes"),
}


def of_phantom(seed: int) -> dict[str, bool]:
    """One held-out phantom."""
    return _of(simulate(seed, Settings()), seed)


def of_patient(job: tuple[int, CaseFiles]) -> dict[str, bool]:
    """One real patient."""
    number, files = job
    return _of(read_case(files, NAMES), number)


def _of(case: Case, number: int) -> dict[str, bool]:
    """Nothing where an image is not taken for one of a brain."""
    seen = {name: View.of(image, case.affine) for name, image in case.images.items()}
    views = {name: view for name, view in seen.items() if view is not None}
    if len(views) < len(NAMES):
        print(f"{case.id}: only {', '.join(views) or 'nothing'} looks like a brain", file=sys.stderr, flush=True)
        return {}
    assert case.labels is not None
    return tried(views, number, case.labels.astype(np.float32))


def measure(data: Path | None, count: int, last: bool) -> None:
    """Print the tables; the patients that nobody looked at are opened where ``last`` says so."""
    groups: dict[str, list[dict[str, bool]]] = {}
    with ProcessPoolExecutor(WORKERS, get_context("spawn"), alone_on_its_core, (os.getpid(),)) as pool:
        if data is not None:
            cases = [case for part in ("ssa-2mm", "brats2021-2mm") for case in recognise(data / part).cases]
            looked_at = [case for case in cases if "SSA" not in case.id or case.id.split("-")[2] in DEVELOPMENT]
            groups["patients, development"] = list(pool.map(of_patient, enumerate(looked_at)))
            if last:
                unseen = [case for case in cases if case not in looked_at]
                groups["patients, unseen"] = list(pool.map(of_patient, enumerate(unseen)))
        groups["phantoms"] = list(pool.map(of_phantom, range(HELD_OUT, HELD_OUT + count), chunksize=4))
    print("\n\n".join(tables(groups)))


def tables(groups: dict[str, list[dict[str, bool]]]) -> Iterator[str]:
    """Alarms on clean patients and faults found; wrong names by which sequences are given."""
    groups = {name: [row for row in rows if row] for name, rows in groups.items() if any(rows)}
    first = next(iter(groups.values()))[0]
    head = " | ".join(f"{name} ({len(rows)})" for name, rows in groups.items())
    rule = "---|" * len(groups)
    single = [key for key in first if "|" not in key]
    lines = [
        f"| {LABELS.get(key, key)} | " + " | ".join(_share(rows, key) for rows in groups.values()) for key in single
    ]
    yield "\n".join([f"| | {head} |", f"|---|{rule}", *(f"{line} |" for line in lines)])
    for fault in ("clean names", "t1n/t1c", "t2w/t2f"):
        keys = [key for key in first if key.startswith(f"{fault}|")]
        lines = [
            f"| {key.partition('|')[2]} | " + " | ".join(_share(rows, key) for rows in groups.values()) + " |"
            for key in keys
        ]
        yield "\n".join([f"| {LABELS[fault]} | {head} |", f"|---|{rule}", *lines])


def _share(rows: list[dict[str, bool]], key: str) -> str:
    hits = sum(row[key] for row in rows)
    return f"{hits} of {len(rows)} ({100 * hits / len(rows):.0f} %)"


LABELS = {
    "clean": "nothing wrong: alarms",
    "odd values, clean": "nothing wrong with the values: alarms",
    "clean names": "names right: alarms, sequences given",
    "t1n/t1c": "T1n and T1c exchanged: found, images given",
    "t2w/t2f": "T2w and FLAIR exchanged: found, images given",
}
HELD_OUT = 730000
DEVELOPMENT = ("00007", "00010", "00011", "00012", "00026", "00028", "00037", "00041")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser("scripts/sequences.py", description=__doc__)
    parser.add_argument("what", choices=("fit", "measure"))
    parser.add_argument("data", nargs="?", type=Path, help="folder with ssa-2mm and brats2021-2mm")
    parser.add_argument("--count", type=int, default=204, help="phantoms to measure (204)")
    parser.add_argument("--last", action="store_true", help="open the patients that were not looked at before, too")
    given = parser.parse_args()
    if given.what == "fit":
        fit()
    else:
        measure(given.data, given.count, given.last)


if __name__ == "__main__":
    main()
