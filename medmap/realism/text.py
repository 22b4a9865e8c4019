"""The comparison in words: Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

from medmap.figures.style import number
from medmap.realism.compare import Band, Distance, Realism
from medmap.realism.shapes import ShapeRow
from medmap.realism.telling import Telling


def as_markdown(realism: Realism, shapes: Sequence[ShapeRow] = ()) -> str:
    """The whole comparison as a page."""
    real, simulated = len(realism.real), len(realism.simulated)
    parts = [
        f"# Simulated against real patients\n\n{real} real, {simulated} simulated; voxels of "
        f"{realism.real[0].spacing_mm[0]:g} mm. Both sides are measured by one estimator that sees images and tumour "
        "labels only.",
        f"## Contrast ratios\n\nMedian of a class over the median of white matter. Simulated medians inside the real "
        f"5–95 % band: **{100 * realism.contrast_inside:.0f} %**.\n\n{_bands(realism.contrast)}",
        f"## Texture\n\nSimulated medians inside the real 5–95 % band: **{100 * realism.texture_inside:.0f} %**. "
        f"`shift`: medians apart, in half widths of that band.\n\n{_bands(realism.texture)}",
        "## Histograms\n\nWasserstein-1 distance of intensities z-scored in the brain, from all real patients: "
        f"of simulated patients, of real ones (each left out in turn), of all simulated ones pooled.\n\n"
        f"{_distances(realism.histograms)}",
        f"The same within classes, intensities over the median of white matter:\n\n{_distances(realism.within)}",
        "## Can they be told apart?\n\nRidge logistic regression, cross-validated by patient; 0.5: no, 1: always.\n\n"
        + _tellings(realism),
    ]
    if shapes:
        parts.append(f"## Shapes\n\n{_shapes(shapes)}")
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _range(values: tuple[float, float, float]) -> str:
    digits = 3 if max(map(abs, values)) < 0.1 else 2
    low, middle, high = (number(v, digits) for v in values)
    return f"{middle} ({low} … {high})"


def _bands(bands: Sequence[Band]) -> str:
    words = {True: "yes", False: "**no**", None: "–"}
    rows = [
        [b.name, _range(b.real), _range(b.simulated), words[b.inside], number(b.share), number(b.shift, 1)]
        for b in bands
    ]
    return _table(["", "real, median (5 … 95 %)", "simulated", "median inside", "share inside", "shift"], rows)


def _distances(distances: Sequence[Distance]) -> str:
    rows = [[d.name, number(d.simulated, 3), number(d.real, 3), number(d.pooled, 3)] for d in distances]
    return _table(["", "simulated", "real, left out", "pooled"], rows)


def _tellings(realism: Realism) -> str:
    def row(name: str, t: Telling) -> list[str]:
        clues = ", ".join(f"{clue} {weight:+.2f}" for clue, weight in t.clues[:6])
        return [name, f"{number(t.auc)} ({number(t.low)} … {number(t.high)})", clues]

    rows = [row(name, telling) for name, telling in realism.telling.items()]
    return _table(["from", "AUC (95 %)", "by what (+: larger when simulated)"], rows)


def _shapes(shapes: Sequence[ShapeRow]) -> str:
    def cells(values: Sequence[float], digits: int = 2) -> str:
        return " ".join(number(v, digits) for v in values)

    rows = [[r.name, cells(r.reference), cells(r.found), cells([100 * d for d in r.deviation], 0)] for r in shapes]
    return _table(["", "reference (5 25 50 75 95 %)", "simulated", "deviation, %"], rows)
