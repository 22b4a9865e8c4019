"""Training patches, changed as another head, another coil or another scanner might have changed them.

First `draw` decides what happens (plain numbers, a fixed count of them, from a CPU generator); then `apply_draw` does
exactly that, on whatever device the images are. `augment` is one after the other.

Two conventions hold throughout. Position is shared by all sequences of a sample, brightness is each image's own: one
head, several acquisitions. And the background, where a z-scored image is exactly 0, stays exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from itertools import product
from math import ceil, cos, radians, sin

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from medmap.config import AugmentConfig
from medmap.core.box import Index3
from medmap.errors import InputError

Volume = Float[Tensor, "X Y Z"]
Step = tuple[Callable[..., Tensor], tuple[float, ...]]
"""One change of one image: a function below and its parameters after the image."""


@dataclass(frozen=True)
class Placement:
    """How one sample lies in its patch: turned in mm, then scaled about the centre, then mirrored.

    rotation_deg: about the first, then the second, then the third axis; positive turns axis 1 → 2, 2 → 0, 0 → 1
    scale:        above 1 the anatomy grows
    flip:         per axis
    spacing_mm:   edges of a voxel, of which only the ratios count
    """

    rotation_deg: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scale: float = 1.0
    flip: tuple[bool, bool, bool] = (False, False, False)
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def edges(self) -> tuple[float, ...]:
        """Edges of a voxel over the first one, to a thousandth: cubes stay cubes where a header rounds."""
        return tuple(round(mm / self.spacing_mm[0], 3) for mm in self.spacing_mm)

    @property
    def interpolates(self) -> bool:
        """False where a centre crop and flips are enough, so that every voxel keeps its value."""
        return any(self.rotation_deg) or self.scale != 1

    def to_source(self) -> Float[Tensor, "3 3"]:
        """Offset from the patch's centre → the source's, voxels, before flips: S⁻¹ Rᵀ S / scale, S = diag(edges)."""
        (cx, sx), (cy, sy), (cz, sz) = ((cos(radians(a)), sin(radians(a))) for a in self.rotation_deg)
        about_x = torch.tensor([[1, 0, 0], [0, cx, -sx], [0, sx, cx]], dtype=torch.float64)
        about_y = torch.tensor([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]], dtype=torch.float64)
        about_z = torch.tensor([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]], dtype=torch.float64)
        edges = torch.tensor(self.edges, dtype=torch.float64)
        return (about_z @ about_y @ about_x).T * edges / edges[:, None] / self.scale


@dataclass(frozen=True)
class Draw:
    """Everything that will happen to a batch: ``placements[b]``, and the steps ``scans[b][m]`` in their order."""

    placements: tuple[Placement, ...]
    scans: tuple[tuple[tuple[Step, ...], ...], ...]

    def of(self, rows: slice) -> Draw:
        """What will happen to some of the samples."""
        return Draw(self.placements[rows], self.scans[rows])

    def on(self, spacing_mm: tuple[float, float, float]) -> Draw:
        """The same on voxels of such edges."""
        return replace(self, placements=tuple(replace(p, spacing_mm=spacing_mm) for p in self.placements))


def augment(
    images: Float[Tensor, "B M X Y Z"],
    target: Int[Tensor, "B X Y Z"],
    seen: Bool[Tensor, "B M"],
    config: AugmentConfig,
    generator: torch.Generator,
    size: Index3 | None = None,
) -> tuple[Float[Tensor, "B M x y z"], Int[Tensor, "B x y z"]]:
    """Random training patches out of crops.

    images:    z-scored, background exactly 0, cubic voxels
    target:    class indices, 0 = background
    seen:      an image that is not seen comes out as zeros and has no influence
    generator: on the CPU. The same state gives the same result (bit for bit on a CPU), and the numbers taken from it
               depend on B and M only
    size:      of the patch, at most that of the crop (default: the same). A crop of `largest_source_size` keeps every
               turned patch full; beyond a smaller crop lies background

    Returns new tensors. Raises InputError for a patch larger than its crop.

    >>> images, target = torch.randn(2, 4, 12, 12, 12), torch.zeros(2, 12, 12, 12, dtype=torch.long)
    >>> seen = torch.ones(2, 4, dtype=torch.bool)
    >>> new, _ = augment(images, target, seen, AugmentConfig(), torch.Generator().manual_seed(0), size=(8, 8, 8))
    >>> new.shape
    torch.Size([2, 4, 8, 8, 8])
    """
    batch, modalities = seen.shape
    return apply_draw(images, target, seen, draw(config, batch, modalities, generator), size)


def draw(config: AugmentConfig, batch: int, modalities: int, generator: torch.Generator) -> Draw:
    """Decide for B samples of M images. As many numbers are taken whatever is switched on, also with all of it off."""
    count = _PER_SAMPLE + modalities * _PER_IMAGE
    rows = torch.rand(batch, count, generator=generator, dtype=torch.float64).tolist()
    if not config.enabled:
        return Draw((Placement(),) * batch, (((),) * modalities,) * batch)
    placements, scans = [], []
    for row in rows:
        u = iter(row)
        placements.append(_draw_placement(config, u))
        scans.append(tuple(_draw_steps(config, u) for _ in range(modalities)))
        assert next(u, None) is None, "_PER_SAMPLE or _PER_IMAGE miscounts"
    return Draw(tuple(placements), tuple(scans))


@torch.no_grad()
def apply_draw(
    images: Float[Tensor, "B M X Y Z"],
    target: Int[Tensor, "B X Y Z"],
    seen: Bool[Tensor, "B M"],
    what: Draw,
    size: Index3 | None = None,
) -> tuple[Float[Tensor, "B M x y z"], Int[Tensor, "B x y z"]]:
    """Do what was drawn. Arguments, result and errors as in `augment`."""
    size = size or (images.shape[2], images.shape[3], images.shape[4])
    new_images = images.new_empty(*images.shape[:2], *size)
    new_target = target.new_empty(target.shape[0], *size)
    with torch.autocast(images.device.type, enabled=False):  # matrix products in bf16 would round the images
        for b, present in enumerate(seen.tolist()):
            there = [m for m, seen_here in enumerate(present) if seen_here]
            placed, new_target[b] = place(images[b, there], target[b], what.placements[b], size)
            new_images[b] = 0
            for image, m in zip(placed, there, strict=True):
                new_images[b, m] = reduce(lambda x, step: step[0](x, *step[1]), what.scans[b][m], image)
    return new_images, new_target


# --- what is drawn -----------------------------------------------------------------------------------------------

_BIAS_TERMS = tuple(ijk for ijk in product(range(4), repeat=3) if 1 <= sum(ijk) <= 3)
"""Exponents (i, j, k) of the monomials xⁱ yʲ zᵏ of degree 1 to 3."""

_PER_SAMPLE = 9
_PER_IMAGE = 19 + len(_BIAS_TERMS)


def _between(limits: tuple[float, float], u: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * u


def _about_one(limits: tuple[float, float], u: float) -> float:
    """Below and above 1 are equally likely where the range holds 1."""
    low, high = limits
    if not low < 1 < high:
        return _between(limits, u)
    return _between((low, 1), 2 * u) if u < 0.5 else _between((1, high), 2 * u - 1)


def _draw_placement(c: AugmentConfig, u: Iterator[float]) -> Placement:
    turned = next(u) < c.p_rotation
    x, y, z = (_between(c.rotation_deg, next(u)) for _ in range(3))
    scaled = next(u) < c.p_scaling
    factor = _about_one(c.scale, next(u))
    left, front, bottom = (next(u) < c.p_flip and axis in c.flip_axes for axis in range(3))
    return Placement((x, y, z) if turned else (0.0, 0.0, 0.0), factor if scaled else 1.0, (left, front, bottom))


def _draw_steps(c: AugmentConfig, u: Iterator[float]) -> tuple[Step, ...]:
    # Every parameter is drawn, wanted or not: the stream of numbers must not depend on the outcome.
    candidates: tuple[tuple[bool, Step], ...] = (
        (
            next(u) < c.p_bias,
            (bias_field, (_between(c.bias_log_amplitude, next(u)), *(2 * next(u) - 1 for _ in _BIAS_TERMS))),
        ),
        (next(u) < c.p_noise, (noise, (_between(c.noise_sd, next(u)), int(next(u) * 2**53)))),
        (next(u) < c.p_blur, (blur, tuple(_between(c.blur_sigma_voxels, next(u)) for _ in range(3)))),
        (next(u) < c.p_brightness, (brightness, (_about_one(c.brightness, next(u)),))),
        (next(u) < c.p_contrast, (contrast, (_about_one(c.contrast, next(u)),))),
        (next(u) < c.p_low_resolution, (low_resolution, (_between(c.low_resolution, next(u)),))),
        (next(u) < c.p_gamma_inverted, (gamma_inverted, (_about_one(c.gamma, next(u)),))),
        (next(u) < c.p_gamma, (gamma, (_about_one(c.gamma, next(u)),))),
    )
    return tuple(step for wanted, step in candidates if wanted)


# --- position ----------------------------------------------------------------------------------------------------


def place(
    images: Float[Tensor, "M X Y Z"], target: Int[Tensor, "X Y Z"], placement: Placement, size: Index3
) -> tuple[Float[Tensor, "M x y z"], Int[Tensor, "x y z"]]:
    """The patch of ``size`` voxels in the middle of one sample, turned, scaled and mirrored.

    Images are interpolated trilinearly. So is each class's indicator, and the class with the largest share of a voxel
    wins (nearest neighbour loses more of small regions). Outside the crop is background, in images and labels alike.
    Without rotation and scaling no value is computed: the patch is a centre crop, start ⌊(X − x) / 2⌋.
    """
    source = _triple(target.shape)
    if any(x > full for x, full in zip(size, source, strict=True)):
        raise InputError(
            f"augmentation: a patch of {list(size)} voxels was asked of a crop of {list(source)}; "
            "choose a smaller train.patch, or pad the crop with background"
        )
    start = [(full - x) // 2 for x, full in zip(size, source, strict=True)]
    if placement.interpolates:
        grid = _grid(placement, start, size, source).to(images.device)
        classes = torch.arange(1, int(target.max()) + 1, device=target.device)
        shares = (target == classes[:, None, None, None]).to(images.dtype)
        images, shares = _sample(torch.cat([images, shares]), grid).split([len(images), len(shares)])
        target = _winner(shares)
    else:
        x, y, z = (slice(a, a + x) for a, x in zip(start, size, strict=True))
        images, target = images[:, x, y, z], target[x, y, z]
    axes = [axis - 3 for axis in range(3) if placement.flip[axis]]
    return (images.flip(axes), target.flip(axes)) if axes else (images, target)


def _triple(values: Iterable[float]) -> Index3:
    x, y, z = (int(v) for v in values)
    return x, y, z


def _grid(placement: Placement, start: Iterable[int], size: Index3, source: Index3) -> Float[Tensor, "x y z 3"]:
    """Where each voxel of the patch comes from, in grid_sample's terms: axes reversed, −1 and 1 = the outer faces."""
    full = torch.tensor(source, dtype=torch.float64)
    offsets = [torch.arange(x, dtype=torch.float64) - (x - 1) / 2 for x in size]
    centre = torch.tensor([a + (x - 1) / 2 for a, x in zip(start, size, strict=True)], dtype=torch.float64)
    columns = placement.to_source() * (2 / full)[:, None]
    a, b, c = (torch.outer(o, column).flip(-1).float() for o, column in zip(offsets, columns.T, strict=True))
    origin = ((2 * centre + 1) / full - 1).flip(-1).float()
    return (a + origin)[:, None, None] + b[:, None] + c


def _sample(volumes: Float[Tensor, "C X Y Z"], grid: Float[Tensor, "x y z 3"]) -> Float[Tensor, "C x y z"]:
    if not len(volumes):
        return grid.new_empty(0, *grid.shape[:3])
    # One plane of the patch per batch entry: on a CPU grid_sample divides its work over the batch only.
    planes = grid[:, None].to(volumes.dtype)
    shared = volumes.expand(len(planes), *volumes.shape)
    return F.grid_sample(shared, planes, padding_mode="zeros", align_corners=False)[:, :, 0].transpose(0, 1)


def _winner(shares: Float[Tensor, "K x y z"]) -> Int[Tensor, "x y z"]:
    """The class with the largest share of a voxel, 0 where the background, whose share is the rest, has it."""
    winner = torch.zeros(shares.shape[1:], dtype=torch.long, device=shares.device)
    best = 1 - shares.sum(0)  # argmax would say the same ten times slower
    for k, share in enumerate(shares, start=1):
        wins = share > best
        best, winner = torch.where(wins, share, best), winner.masked_fill_(wins, k)
    return winner


def source_size(size: Index3, placements: Iterable[Placement]) -> Index3:
    """The smallest crop in which patches of ``size``, so placed, meet no edge; each axis keeps the patch's parity.

    >>> source_size((64, 64, 64), [Placement(rotation_deg=(0, 0, 45)), Placement(scale=0.5)])
    (128, 128, 128)
    """
    steps = torch.tensor([x - 1 for x in size], dtype=torch.float64)
    need = [1 + placement.to_source().abs() @ steps for placement in placements]
    widest = torch.stack([torch.tensor(size, dtype=torch.float64), *need]).amax(0).tolist()
    return _triple(x + 2 * ceil((w - x) / 2 - 1e-6) for x, w in zip(size, widest, strict=True))


def largest_source_size(size: Index3, config: AugmentConfig) -> Index3:
    """`source_size` for anything that ``config`` may draw (angles on a grid of seven per axis, to a voxel)."""
    if not config.enabled:
        return size
    low, high = config.rotation_deg if config.p_rotation else (0.0, 0.0)
    angles = torch.linspace(low, high, 7).tolist()
    scale = config.scale[0] if config.p_scaling else 1.0
    return source_size(size, [Placement((x, y, z), scale) for x, y, z in product(angles, repeat=3)])


# --- intensity: one image each, background stays 0 -----------------------------------------------------------------


def bias_field(image: Volume, log_amplitude: float, *coefficients: float) -> Volume:
    """Uneven sensitivity of the receive coil: x' ∝ (x − min x) · exp(a · p / max |p|).

    p is a polynomial of degree 1 to 3 in coordinates −1 … 1 of the patch, one coefficient for each of the 19 monomials;
    a = log_amplitude. The field multiplies a signal that is not negative, so the brain's minimum stands for signal 0;
    then mean and deviation inside the brain are restored, as preparing the scan afresh would do.
    """
    table = image.new_zeros(4, 4, 4)
    for (i, j, k), coefficient in zip(_BIAS_TERMS, coefficients, strict=True):
        table[i, j, k] = coefficient
    for size in image.shape:  # each round turns the first axis of exponents into the last axis of voxels
        x = torch.linspace(-1, 1, size, device=image.device, dtype=image.dtype)
        table = torch.tensordot(table, x ** torch.arange(4, device=x.device)[:, None], dims=([0], [0]))
    field = (table * (log_amplitude / table.abs().amax().clamp(min=1e-12))).exp_()
    low, _ = _range(image)
    return _restore(field.mul_(image - low), image)


def noise(image: Volume, sd: float, seed: int) -> Volume:
    """x' = x + n, n ~ N(0, sd²) at each voxel of the brain, from a generator of its own on the image's device."""
    generator = torch.Generator(image.device).manual_seed(seed)
    drawn = torch.randn(image.shape, generator=generator, device=image.device, dtype=image.dtype)
    return drawn.mul_(sd).add_(image).masked_fill_(image == 0, 0)


def blur(image: Volume, *sigma_voxels: float) -> Volume:
    """Gaussian blur within the brain: x' = G x / G 1_brain, widths per axis in voxels, cut at 4 σ.

    A scanner blurs before anything is stripped from the head, so the zeros around the brain must not bleed in.
    """
    operators = [_gaussian(n, sigma, image) for n, sigma in zip(image.shape, sigma_voxels, strict=True)]
    return _within_brain(image, lambda pair: _along_axes(pair, operators))


def low_resolution(image: Volume, factor: float) -> Volume:
    """A coarser acquisition: each axis taken to round(factor · n) voxels (nearest) and back (linear), in the brain."""
    coarse = [max(1, round(factor * n)) for n in image.shape]

    def there_and_back(pair: Float[Tensor, "2 X Y Z"]) -> Float[Tensor, "2 X Y Z"]:
        small = F.interpolate(pair[None], size=coarse, mode="nearest-exact")
        return F.interpolate(small, size=list(image.shape), mode="trilinear", align_corners=False)[0]

    return _within_brain(image, there_and_back)


def brightness(image: Volume, factor: float) -> Volume:
    """x' = factor · x."""
    return image * factor


def contrast(image: Volume, factor: float) -> Volume:
    """x' = mean + factor · (x − mean), clipped to the range of x; mean and range are the brain's."""
    mean, _ = _moments(image, image != 0)
    low, high = _range(image)
    return (image - mean).mul_(factor).add_(mean).clamp_(low, high).masked_fill_(image == 0, 0)


def gamma(image: Volume, exponent: float) -> Volume:
    """x' ∝ ((x − min x) / (max x − min x)) ^ exponent, with the brain's mean and deviation restored."""
    low, high = _range(image)
    unit = (image - low).div_((high - low).clamp(min=1e-7)).clamp_(0, 1)
    return _restore(unit.pow_(exponent), image)


def gamma_inverted(image: Volume, exponent: float) -> Volume:
    """`gamma` of the negative: x' = −gamma(−x); it stretches the other end of the range."""
    return gamma(-image, exponent).neg_().masked_fill_(image == 0, 0)  # no -0.0 in the background


def _moments(values: Volume, brain: Bool[Tensor, "X Y Z"]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the brain, 0-d tensors; 0 for an empty one."""
    count = brain.sum().clamp(min=1)
    mean = (values * brain).sum() / count
    centred = (values - mean).mul_(brain)
    return mean, (centred.square_().sum() / count).sqrt()


def _range(image: Volume) -> tuple[Tensor, Tensor]:
    outside = image == 0
    return image.masked_fill(outside, torch.inf).amin(), image.masked_fill(outside, -torch.inf).amax()


def _restore(changed: Volume, image: Volume) -> Volume:
    """``changed`` (overwritten), brought to the mean and deviation of ``image`` within the brain; 0 outside."""
    brain = image != 0
    mean, sd = _moments(image, brain)
    new_mean, new_sd = _moments(changed, brain)
    return changed.sub_(new_mean).mul_(sd / new_sd.clamp(min=1e-7)).add_(mean).masked_fill_(~brain, 0)


def _within_brain(image: Volume, smooth: Callable[[Tensor], Tensor]) -> Volume:
    """A linear operator A kept within the brain: A x / A 1_brain; x itself where A sees hardly any brain."""
    brain = image != 0
    value, share = smooth(torch.stack((image, brain.to(image.dtype))))
    return torch.where(brain & (share > 0.01), value / share, image)


def _gaussian(n: int, sigma: float, like: Tensor) -> Float[Tensor, "n n"]:
    """Weights exp(−d² / 2σ²) between the voxels of an axis, not normalised: `_within_brain` divides by their sum."""
    voxel = torch.arange(n, device=like.device, dtype=like.dtype)
    distance = voxel[:, None] - voxel
    weights = (distance.square() / (-2 * sigma**2)).exp_()
    return weights.masked_fill_(distance.abs() > 4 * sigma, 0)


def _along_axes(pair: Float[Tensor, "2 X Y Z"], operators: list[Tensor]) -> Float[Tensor, "2 X Y Z"]:
    x, y, z = operators
    return (x @ (y @ (pair @ z)).flatten(2)).view(pair.shape)  # symmetric operators: no transposes
