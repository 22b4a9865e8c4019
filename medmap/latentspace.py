"""What alignment did to the latents of a run, in numbers: every level, with the weights of before and after training.

    latent_numbers(run, cases) → {"levels": {level: {"before": {…}, "after": {…}}}, …}        plain types, for JSON

A patient's latents of one sequence become one point of 8 C numbers: the means over the brain in the eight octants of
the patient's box. Not one mean: alignment compares latents place by place, and a mean over the head no longer knows
where a tumour is. Not a finer grid: heads are not registered to each other, and tens of patients would be lost in
thousands of numbers. Cells of the latent grid count by the share of brain in them, so that the background round a head,
which is the same in every head, counts in nothing.

Channels' means and variances (divergence, collapse) are over all cells of all patients, counted in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from medmap.align import STEM, AlignedSegmenter
from medmap.checkpoint import load_network, untrained_network
from medmap.core.box import Box
from medmap.core.case import Prepared
from medmap.core.clouds import Clouds, between_kl, likeness, mmd, planar, probe, retrieval
from medmap.core.dependence import estimate_total_correlation, require_scikit_learn
from medmap.core.gaussian import Gaussian
from medmap.core.joint import total_correlation
from medmap.core.spread import chance_gap, effective_rank, modality_gap
from medmap.data.labelmaps import patient_of
from medmap.diagnosis import means
from medmap.errors import InputError
from medmap.inference import encode_alone, network_device

Matrix = NDArray[np.float64]

ELEMENTS = 16
"""Latent elements of each sequence over which a conditional total correlation is worked out."""


@dataclass(frozen=True)
class Spread:
    """Mean [C] and covariance [C C] of one sequence's latents over the brain cells of all patients."""

    mean: Matrix
    covariance: Matrix


@dataclass(frozen=True)
class LevelLatents:
    """One level's latents: a point [8 C] a patient and sequence, and each sequence's spread over cells."""

    clouds: Clouds
    spreads: dict[str, Spread]


def latent_numbers(
    run: Path,
    cases: Sequence[Prepared],
    *,
    levels: Sequence[str] | None = None,
    patients: Mapping[str, str] | None = None,
    which: str = "best",
    components: int = 4,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Numbers on the latents of a trained run, before training (weights made again from its seed) and after.

    cases:      prepared as for the run, best those it did not train on; some may lack sequences
    levels:     of the network, all where none is named (``stem`` among them)
    patients:   {case: patient}, by the names of the cases where it is not given
    which:      the checkpoint; components: of each sequence, for the total correlation; seed: of shuffles and maps

    Returns {"run", "weights", "rows": {"modality": [N], "case": [N], "patient": [N]}, "levels": {level: {"stride",
    "before": numbers, "after": numbers}}}; what is undefined is None. The numbers of a level are those of
    `level_numbers`. `medmap.figures.latent_map` draws them.
    Raises InputError for fewer than two cases, a level the network has not, and where scikit-learn is not installed.
    """
    require_scikit_learn()
    if len(cases) < 2:
        raise InputError(f"{run}: found {len(cases)} cases, expected 2 or more to compare patients with each other")
    networks = {"before": untrained_network(run), "after": load_network(run, which)}
    wanted = _levels(networks["after"], levels)
    strides = {level: _stride(networks["after"], level) for level in wanted}
    found: dict[str, Any] = {level: {"stride": stride} for level, stride in strides.items()}
    for when, network in networks.items():
        latents = read_latents(network.to(device), cases, wanted, patients)
        for level, one in latents.items():
            found[level][when] = level_numbers(one, components=components, seed=seed)
    clouds = latents[wanted[0]].clouds
    rows = {"modality": list(clouds.modality), "case": list(clouds.case), "patient": list(clouds.patient)}
    return {"run": Path(run).name, "weights": which, "rows": rows, "levels": found}


def level_numbers(latents: LevelLatents, *, components: int = 4, seed: int = 0) -> dict[str, Any]:
    """All numbers of one level, plain types, None where undefined.

    gap:               share of the points' variance between sequences, and what chance gives
    kl:                `between_kl` of the channels' means and variances over cells, nats per channel
    mmd:               `mmd` of the points
    likeness, retrieval, probe: of the points, see `medmap.core.clouds`
    rank:              `effective_rank` of the covariance over cells within sequences, and how many channels there are
    variance:          of channels over cells within sequences: mean, least
    total_correlation: of the points of patients with all sequences, see `medmap.core.dependence`
    map:               the points on a plane, see `medmap.core.clouds.planar`

    Raises InputError where scikit-learn is not installed.
    """
    clouds, spreads = latents.clouds, latents.spreads
    within = np.mean([spread.covariance for spread in spreads.values()], axis=0)
    samples, patients = clouds.paired(clouds.names)
    dependence = None
    if len(patients) >= 3:
        named = dict(zip(clouds.names, samples, strict=True))
        dependence = asdict(estimate_total_correlation(named, components=components, patients=patients, seed=seed))
    numbers = {
        "gap": {"share": modality_gap(clouds.points, clouds.modality), "chance": chance_gap(clouds.modality)},
        "kl": between_kl({name: (one.mean, np.diag(one.covariance)) for name, one in spreads.items()}),
        "mmd": mmd(clouds, seed),
        "likeness": likeness(clouds),
        "retrieval": retrieval(clouds),
        "probe": probe(clouds),
        "rank": {"effective": effective_rank(within), "channels": len(within)},
        "variance": {"mean": float(np.diag(within).mean()), "least": float(np.diag(within).min())},
        "total_correlation": dependence,
        "map": planar(clouds.points, seed),
    }
    plain: dict[str, Any] = _plain(numbers)
    return plain


def read_latents(
    network: AlignedSegmenter,
    cases: Sequence[Prepared],
    levels: Sequence[str],
    patients: Mapping[str, str] | None = None,
) -> dict[str, LevelLatents]:
    """The latents of every case and sequence, each encoded alone; means where a level holds Gaussians.

    patients: {case: patient}, by the names of the cases where it is not given

    Raises InputError where no case has a sequence that the network knows.
    """
    pairs = [(case, name) for case in cases for name in network.modalities if name in case.images]
    if not pairs:
        raise InputError(f"cases: none has one of {', '.join(network.modalities)}; these are what the network reads")
    points: dict[str, list[Matrix]] = {level: [] for level in levels}
    sums: dict[str, dict[str, _Sums]] = {level: {} for level in levels}
    for case, name in pairs:
        for level, cells in _cells(network, case, name, levels):
            points[level].append(cells.octants())
            sums[level][name] = cells.sums().joined(sums[level].get(name))
    modality, case_ids = tuple(name for _, name in pairs), tuple(case.id for case, _ in pairs)
    whose = tuple(patient_of(case) if patients is None else patients[case] for case in case_ids)
    return {
        level: LevelLatents(
            Clouds(np.stack(points[level]), modality, case_ids, whose),
            {name: sums[level][name].spread() for name in network.modalities if name in sums[level]},
        )
        for level in levels
    }


def conditional_dependence(
    network: AlignedSegmenter, case: Prepared, level: str, elements: int = ELEMENTS, seed: int = 0
) -> dict[str, Any]:
    """Total correlation of q(Z | X), the latents of *one* patient's images, and whether the encoders are private.

    A network states q(Z_j | X) itself: N(z_j, I), or N(μ_j, diag σ_j²) where its latents are Gaussian or its anchor
    learns variances (those of an anchor are taken for 1: it changes nothing). The noise of two
    sequences is drawn apart, so the covariance of q(Z | X) is block-diagonal, and its total correlation 0 whatever the
    patient, the weights and the training: not a finding but how the family was chosen. (A deterministic encoder read
    as a point gives the same: a product of point masses is the point mass of the vector.)

    ``nats``:    TC of that covariance over ``elements`` elements of each sequence
    ``private``: whether q(Z_j | X) = q(Z_j | X_j); ``leak``: by how much of its standard deviation Z_j changes at most
                 when all other images are replaced by noise. A joint stem leaks: then Z_j depends on X_k, and nats is 0
                 all the same.
    Raises InputError for a level the network has not, or a case with fewer than two sequences of the network.
    """
    _levels(network, [level])
    names = [name for name in network.modalities if name in case.images]
    if len(names) < 2:
        raise InputError(f"case {case.id}: found {len(names)} sequences of the network, expected 2 or more")
    box = Box.union(case.images[name].box for name in names).snapped(network.stride)
    images = {name: torch.from_numpy(case.images[name].window(box).astype(np.float32))[None, None] for name in names}
    noise = torch.Generator().manual_seed(seed)
    leaks, variances = [], []
    pick = np.random.default_rng(seed)
    for name in names:
        others = {k: image if k == name else torch.randn(image.shape, generator=noise) for k, image in images.items()}
        own, changed = (_encoded(network, some, level)[name] for some in (images, others))
        spread = float(own.mean.std())
        leaks.append(float((own.mean - changed.mean).abs().max()) / (spread or 1.0))
        log_var = own.log_var.expand_as(own.mean).flatten().numpy().astype(float)
        variances.append(np.exp(log_var[pick.choice(log_var.size, min(elements, log_var.size), replace=False)]))
    covariance = np.diag(np.concatenate(variances))
    nats, leak = total_correlation(covariance, [len(v) for v in variances]), max(leaks)
    return {"nats": nats, "leak": leak, "private": leak < 1e-4, "gaussian": network.is_gaussian(level)}


# ---- reading ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cells:
    """The cells of a latent: values [C n], the share of brain in each [n], and which octant [n] each lies in."""

    values: Matrix
    brain: Matrix
    octant: NDArray[np.int64]

    def octants(self) -> Matrix:
        """[8 C] means; of an octant without brain, the mean of all."""
        weight = np.eye(8)[self.octant] * self.brain[:, None]
        total = weight.sum(axis=0)
        means = self.values @ weight / np.where(total > 0, total, 1)
        whole = self.values @ self.brain / self.brain.sum()
        return np.asarray(np.where(total > 0, means, whole[:, None]).ravel())

    def sums(self) -> _Sums:
        weighted = self.values * self.brain
        return _Sums(float(self.brain.sum()), weighted.sum(axis=1), weighted @ self.values.T)


@dataclass(frozen=True)
class _Sums:
    weight: float
    first: Matrix
    second: Matrix

    def joined(self, other: _Sums | None) -> _Sums:
        if other is None:
            return self
        return _Sums(self.weight + other.weight, self.first + other.first, self.second + other.second)

    def spread(self) -> Spread:
        mean = self.first / self.weight
        return Spread(mean, self.second / self.weight - np.outer(mean, mean))


def _cells(network: AlignedSegmenter, case: Prepared, name: str, levels: Sequence[str]) -> Iterator[tuple[str, _Cells]]:
    with torch.inference_mode():
        latents = encode_alone(network, case, name)
    image, middle = case.images[name], _middle(case, list(network.modalities))
    mask = torch.from_numpy(image.window(latents.box) != 0).float()[None, None]
    for level in levels:
        values = means(network, level, latents.levels[level], dim=1)[0].float().cpu()
        brain = F.adaptive_avg_pool3d(mask, values.shape[1:])[0, 0].double().numpy()
        sides = [
            a + (np.arange(n) + 0.5) * (b - a) / n >= m
            for a, b, n, m in zip(latents.box.start, latents.box.stop, brain.shape, middle, strict=True)
        ]
        octant = 4 * sides[0][:, None, None] + 2 * sides[1][:, None] + 1 * sides[2]
        yield level, _Cells(values.double().flatten(1).numpy(), brain.ravel(), octant.ravel())


def _middle(case: Prepared, names: Sequence[str]) -> list[float]:
    """Of the box round all sequences, so that the octants of each are the same places."""
    box = Box.union(case.images[name].box for name in names if name in case.images)
    return [(a + b) / 2 for a, b in zip(box.start, box.stop, strict=True)]


def _encoded(network: AlignedSegmenter, images: dict[str, Tensor], level: str) -> dict[str, Gaussian]:
    device = network_device(network)
    seen = torch.tensor([[name in images for name in network.modalities]], device=device)
    with torch.inference_mode():
        encoded = network.encode({name: image.to(device) for name, image in images.items()}, seen).levels[level]
    found = {name: z.float().cpu() for name, z in encoded.items()}
    if network.is_gaussian(level):
        return {name: Gaussian.split(z, dim=1) for name, z in found.items()}
    return {name: Gaussian.unit(z) for name, z in found.items()}


def _levels(network: AlignedSegmenter, levels: Sequence[str] | None) -> list[str]:
    offered = [*([STEM] if network.stem is not None else []), *network.backbone.strides]
    unknown = [level for level in levels or () if level not in offered]
    if unknown:
        raise InputError(f"levels: the network has no {', '.join(unknown)}; it has {', '.join(offered)}")
    return list(levels or offered)


def _stride(network: AlignedSegmenter, level: str) -> int:
    return 1 if level == STEM else network.backbone.strides[level]


# ---- numbers ----------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Without NaN and infinity, which JSON has no words for."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return float(value) if np.isfinite(value) else None
    return value
