"""The watch on alignment: what latents are like while a network trains, and when too strong an alignment is named.

The alignment loss has an optimum that nobody wants: latents that are all the same. It can also win against the loss
that is trained for. Neither shows in the loss curve; both show here, in what validation encodes and answers anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from medmap.align import AlignedSegmenter
from medmap.core.gaussian import Gaussian
from medmap.core.spread import Moments, chance_gap, modality_gap, spread
from medmap.models.backbone import Encoded

Row = Mapping[str, Any]
Heard = dict[str, dict[str, Moments]]
"""{level: {modality: moments}} of one patient's latents, or of many patients' together."""

COUNTED_VOXELS = 2**16
"""Of one sequence of one patient about so many voxels are counted, on a lattice over all of it: more would cost time at
full resolution, and change no digit that anybody reads."""

SHRUNK = 1 / 2
"""Of the standard deviation at the start: below it, latents shrink. On phantoms (U-Net tiny, x4, 240 steps) it stayed
above 0.75 with α ≤ 1, and fell to 0.38 with α = 10; without alignment it rises."""

FEW, FEWER = 2.5, 1 / 4
"""Effective rank below which latents lie along a line, and the share of its start, for levels that never had more. The
rank falls in sound training too, from noise to features: in medmap's own network, which is not aligned, from 80 of 96
to 9, and to no less than 6.5 at any level. On phantoms (U-Net tiny, x3 and x4) it stayed above 3.2 with α = 1, whose
Dice is that of 0.1, and fell to 2.6, 2.3 and 1.8 in three folds with α = 100."""

RECENT = 5
"""Rows of training whose median is the present: each is of one batch of crops."""

FALLS = 3
"""Validations in a row in which Dice falls: by chance, one sequence of four numbers in twenty-four does."""

LEAST_FALL = 0.05
"""Dice that is lost in these validations together. Where it only scatters, with a standard deviation of 0.01, one run
of 16 validations in a thousand is accused wrongly; with 0.03 in its place one in twenty-six."""

AFTER_COLLAPSE, AFTER_FALL = 10, 3
"""What α is divided by: latents that shrink want another order of magnitude, Dice that falls may want less."""


def watched(network: AlignedSegmenter) -> tuple[str, ...]:
    """The levels that are aligned; the deepest where none is, so that runs with and without alignment compare."""
    return tuple(network.anchors) or tuple(network.backbone.strides)[-1:]


def means(network: AlignedSegmenter, level: str, latents: Tensor, dim: int) -> Tensor:
    """The latents, or their means where a backbone's latents hold means and log-variances along ``dim``."""
    return Gaussian.split(latents, dim).mean if network.is_gaussian(level) else latents


def moments(latent: Float[Tensor, "C x y z"]) -> Moments:
    """Moments of one sequence's latents over its voxels, all or about `COUNTED_VOXELS` of them.

    >>> moments(torch.tensor([1.0, 3.0]).view(1, 2, 1, 1))
    Moments(n=2, mean=array([2.]), scatter=array([[2.]]))
    """
    every = max(1, round((latent[0].numel() / COUNTED_VOXELS) ** (1 / 3)))
    z = latent.detach()[:, ::every, ::every, ::every].flatten(1).float()
    mean = z.mean(dim=1, keepdim=True)
    with torch.autocast(z.device.type, enabled=False):  # its products would be of bfloat16
        scatter = (z - mean) @ (z - mean).T
    return Moments(z.shape[1], mean[:, 0].double().cpu().numpy(), scatter.double().cpu().numpy())


def latent_spread(latents: Float[Tensor, "B M C x y z"], seen: Bool[Tensor, "B M"]) -> dict[str, float]:
    """`medmap.core.spread.spread` of a batch, over the latents that are seen."""
    parts: dict[str, Moments] = {}
    for b, m in seen.nonzero().tolist():
        _join(parts, str(m), moments(latents[b, m]))
    return spread(parts.values())


@contextmanager
def overheard(network: AlignedSegmenter) -> Iterator[Heard]:
    """While this lasts, what the network encodes of one patient is measured as it passes by; see `Latents`.

    A network that encodes jointly does so for every subset, the largest last: that is what remains.
    """
    encode = network.encode
    heard: Heard = {level: {} for level in watched(network)}

    def telling(images: Mapping[str, Tensor], seen: Tensor, kept: Tensor | None = None) -> Encoded:
        encoded = encode(images, seen, kept)
        present = [name for name, there in zip(network.modalities, seen[0].tolist(), strict=True) if there]
        for level, found in heard.items():
            for name in present:
                found[name] = moments(means(network, level, encoded.levels[level][name], dim=1)[0])
        return encoded

    network.encode = telling  # type: ignore[method-assign]  # forward hooks hear forward alone
    try:
        yield heard
    finally:
        del network.encode


class Latents:
    """What was overheard of several patients; each process has some of them, and `joined` makes them one."""

    def __init__(self) -> None:
        self._pooled: dict[str, dict[tuple[int, str], NDArray[np.float64]]] = {}
        self._moments: Heard = {}

    def add(self, patient: int, heard: Heard) -> None:
        """One more patient, by number."""
        for level, found in heard.items():
            for name, own in found.items():
                self._pooled.setdefault(level, {})[patient, name] = own.mean
                _join(self._moments.setdefault(level, {}), name, own)

    def joined(self, other: Latents) -> Latents:
        """Both."""
        both = Latents()
        for one in (self, other):
            for level, pooled in one._pooled.items():
                both._pooled.setdefault(level, {}).update(pooled)
                for name, own in one._moments[level].items():
                    _join(both._moments.setdefault(level, {}), name, own)
        return both

    def measures(self) -> dict[str, dict[str, float]]:
        """{level: gap, chance, std, std_min, rank}, see `medmap.core.spread`.

        The gap is that of latents pooled over each patient's voxels. It and its chance are left out where no sequence
        comes twice, and where nothing varies.
        """
        return {level: self._gap(level) | spread(parts.values()) for level, parts in self._moments.items()}

    def _gap(self, level: str) -> dict[str, float]:
        names = [name for _, name in self._pooled[level]]
        gap, chance = modality_gap(np.array(list(self._pooled[level].values())), names), chance_gap(names)
        return {"gap": gap, "chance": chance} if chance < 1 and np.isfinite(gap) else {}


def _join(parts: dict[str, Moments], name: str, own: Moments) -> None:
    parts[name] = parts[name].joined(own) if name in parts else own


# ---- when to warn ------------------------------------------------------------------------------------------------


def over_alignment(log: Sequence[Row], alpha: float, levels: Sequence[str]) -> list[dict[str, Any]]:
    """Signs of too strong an alignment that a run's log shows now and has not named yet, as rows of the log.

        collapse  at a level, std < `SHRUNK` · std at the start, or rank < `FEW` and < `FEWER` · rank at the start. In
                  training, the median of the last `RECENT` rows is held against the first row; in validation, the last
                  against the first, which may have collapsed already
        fall      Dice with all sequences fell `FALLS` validations in a row, by `LEAST_FALL` or more together, and the
                  alignment loss (mean over levels, and over the rows since the validation before) is lower, too

    log:    rows so far, the last validation's among them
    alpha:  α of the run; levels: those that are aligned. Nothing is said where α = 0 or no level is

    A fall is named once a run, a collapse once a level. The rows: kind ``warning``, step, sign, level (one or more),
    alpha, try (the α to train with instead), text.

    >>> rows = [
    ...     {"kind": "val", "step": step, "latents": {"x4": {"std": std, "rank": 20.0}}}
    ...     for step, std in ((100, 0.4), (200, 0.1))
    ... ]
    >>> [row["text"] for row in over_alignment(rows, alpha=1.0, levels=["x4"])]
    ['over-alignment: latents collapse at x4 (standard deviation 0.1, at first 0.4); try align.alpha=0.1 (now 1)']
    """
    if not alpha:
        return []
    named = {(row["sign"], level) for row in log if row["kind"] == "warning" for level in row["level"].split(", ")}
    collapsed = {level: found for level in levels if ("collapse", level) not in named and (found := _how(log, level))}
    rows = []
    if collapsed:
        what = "latents collapse at " + ", ".join(f"{level} ({how})" for level, how in collapsed.items())
        rows.append(_warning(log, "collapse", collapsed, what, alpha, AFTER_COLLAPSE))
    if levels and ("fall", levels[0]) not in named and (found := _fallen(log)):
        fall = f"from {100 * found[0]:.1f} to {100 * found[1]:.1f} in {FALLS} validations"
        what = f"Dice with all sequences fell {fall}, and so did the alignment loss at {', '.join(levels)}"
        rows.append(_warning(log, "fall", levels, what, alpha, AFTER_FALL))
    return rows


def _warning(
    log: Sequence[Row], sign: str, levels: Iterable[str], what: str, alpha: float, divisor: float
) -> dict[str, Any]:
    less = float(f"{alpha / divisor:.1g}")
    text = f"over-alignment: {what}; try align.alpha={less:g} (now {alpha:g})"
    row = {"kind": "warning", "step": log[-1]["step"], "sign": sign, "level": ", ".join(levels)}
    return {**row, "alpha": alpha, "try": less, "text": text}


def _how(log: Sequence[Row], level: str) -> str:
    """How a level's latents have collapsed; nothing where they have not."""
    for kind, recent in (("train", RECENT), ("val", 1)):
        rows = [row["latents"][level] for row in log if row["kind"] == kind and level in row.get("latents", {})]
        if not rows:
            continue
        std, rank = (float(np.median([row[name] for row in rows[-recent:]])) for name in ("std", "rank"))
        if std < SHRUNK * rows[0]["std"]:
            return f"standard deviation {std:.2g}, at first {rows[0]['std']:.2g}"
        if rank < min(FEW, FEWER * rows[0]["rank"]):
            return f"effective rank {rank:.1f}, at first {rows[0]['rank']:.1f}"
    return ""


def _fallen(log: Sequence[Row]) -> tuple[float, float] | None:
    """Dice with all sequences before its fall and now, where the alignment loss fell with it."""
    full, loss = [], []
    since: list[float] = []
    for row in log:
        if row["kind"] == "train":
            since += [value for name, value in row["terms"].items() if name.startswith("align/")]
        elif row["kind"] == "val" and "full" in row:
            full.append(row["full"])
            loss.append(float(np.mean(since)) if since else np.nan)
            since = []
    last, easier = full[-FALLS - 1 :], loss[-FALLS - 1 :]
    if len(last) <= FALLS or not all(after < before for before, after in pairwise(last)):
        return None
    return (last[0], last[-1]) if last[0] - last[-1] >= LEAST_FALL and easier[-1] < easier[0] else None
