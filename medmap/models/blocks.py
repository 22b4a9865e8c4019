"""Convolution blocks that several networks share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from medmap.core.modality import ModalitySet
from medmap.errors import ConfigError
from medmap.models.backbone import Encoded, all_true, columns, encode_rows, masks_are_free
from medmap.models.convolution import Conv3d, conv3d

ROW_CHANNELS = 128

SLICE_BYTES = 2**21

Size = TypeVar("Size")
Network = TypeVar("Network", bound=nn.Module)


def size_named(sizes: Mapping[str, Size], size: str, network: str) -> Size:
    """A network's size by name. Raises ConfigError with the list of names."""
    if size not in sizes:
        raise ConfigError(f"{network} has no size {size!r}; expected one of {', '.join(sizes)}")
    return sizes[size]


def instance_norm(
    x: Float[Tensor, "B C x y z"], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Float[Tensor, "B C x y z"]:
    """Every channel of every sample to mean 0 and variance 1, then scale and shift; fast in either memory layout.

    The instance normalisation of one sample is its batch normalisation. For that torch has a kernel that works on
    channels-last volumes as they lie, and for the other none: it would copy them back and forth.

    >>> x = torch.randn(2, 3, 4, 5, 6)
    >>> torch.allclose(instance_norm(x.to(memory_format=torch.channels_last_3d)), F.instance_norm(x), atol=1e-5)
    True
    """
    if x.is_contiguous():
        return F.instance_norm(x, weight=weight, bias=bias, eps=eps)
    in_rows = x.device.type == "cpu" and not torch.is_grad_enabled()
    of_one = _batch_norm_in_rows if in_rows else _batch_norm_of_one
    each = [of_one(sample, weight, bias, eps) for sample in x.split(1)]
    return each[0] if len(each) == 1 else torch.cat(each)


def _batch_norm_of_one(x: Float[Tensor, "1 C x y z"], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


def _batch_norm_in_rows(
    x: Float[Tensor, "1 C x y z"], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Float[Tensor, "1 C x y z"]:
    """The same without a backward pass, and faster: several voxels are taken for one with as many channels.

    torch's kernel goes through memory voxel by voxel, and few channels fill no register. The moments of every k-th
    voxel are put together, which are equally many for each i::

        μ = 1/k Σ_i μ_i        σ² = 1/k Σ_i (σ²_i + (μ_i − μ)²)                                 i = 1 … k
    """
    channels, (depth, rows, across) = x.shape[1], x.shape[2:]
    k = next(k for k in (8, 4, 2, 1) if k == 1 or (k * channels <= ROW_CHANNELS and rows * across % k == 0))
    wide = x.permute(0, 2, 3, 4, 1).reshape(1, depth, -1, 1, k * channels).permute(0, 4, 1, 2, 3)
    as_float = [torch.zeros(k * channels), torch.ones(k * channels)]  # or the moments would come in bf16
    means, variances = (m.view(k, channels) for m in torch.batch_norm_update_stats(wide, *as_float, 0.0))
    mean = means.mean(dim=0)
    variance = (variances + (means - mean).square()).mean(dim=0)
    repeated = [None if v is None else v.repeat(k) for v in (mean, variance, weight, bias)]
    out = F.batch_norm(wide, *repeated, training=False, eps=eps)
    return out.permute(0, 2, 3, 4, 1).reshape(1, depth, rows, across, channels).permute(0, 4, 1, 2, 3)


def placed(network: Network, device: torch.device) -> Network:
    """A network on a device, its weights laid out so that convolutions need not copy what they are given.

    That is channels last, for which `instance_norm` is made; a network with torch's own group or instance normalisation
    would lose more in these than its convolutions gain.
    """
    network = network.to(device)
    copying = (nn.GroupNorm, nn.InstanceNorm3d)
    if not any(type(module) in copying for module in network.modules()):
        network = network.to(memory_format=torch.channels_last_3d)
    return network


class InstanceNorm(nn.InstanceNorm3d):
    """`instance_norm` with a learned scale and shift for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return instance_norm(x, self.weight, self.bias, self.eps)


def leaky_relu(x: Tensor, slope: float) -> Tensor:
    """LeakyReLU, in place where that saves what the backward pass would keep.

    Without a backward pass there is nothing to save, and on a CPU bf16 arithmetic in place takes twice as long.
    """
    return F.leaky_relu(x, slope, inplace=torch.is_grad_enabled())


class LeakyReLU(nn.LeakyReLU):
    """`leaky_relu` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return leaky_relu(x, self.negative_slope)


def normalise(channels: int) -> nn.Sequential:
    """Instance normalisation with learned scale and shift, then LeakyReLU(0.01)."""
    return nn.Sequential(InstanceNorm(channels), LeakyReLU(0.01))


class EncoderLevel(nn.Module):
    """One resolution of an encoder, pre-activated, so that what it returns is not yet normalised.

        h = conv(act(norm(x)));  out = h + conv(act(norm(h)))      light: out = h

    Latents leave *before* a normalisation: after it every channel has mean 0 and variance 1 whatever the modality, and
    an anchor would have nothing left to align.
    """

    def __init__(self, before: int, channels: int, stride: int, light: bool = False) -> None:
        super().__init__()
        self.enter = nn.Identity() if before == 1 else normalise(before)
        self.down = Conv3d(before, channels, 3, stride=stride, padding=1)
        self.inner = None if light else nn.Sequential(normalise(channels), Conv3d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.down(self.enter(x))
        return h if self.inner is None else h + self.inner(h)


class DecoderLevel(nn.Module):
    """Upsample ×2 (nearest, after a 1×1×1 convolution), join the skip, convolve.

    light: the skip is added and one convolution follows, in place of concatenation and two
    """

    def __init__(self, below: int, channels: int, light: bool = False) -> None:
        super().__init__()
        self.light = light
        self.reduce = nn.Conv3d(below, channels, 1)
        merge = [Conv3d(channels if light else 2 * channels, channels, 3, padding=1), normalise(channels)]
        if not light:
            merge += [Conv3d(channels, channels, 3, padding=1), normalise(channels)]
        self.merge = nn.Sequential(*merge)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        below = self.reduce(x)
        if self.light:
            up = F.interpolate(below, scale_factor=2.0, mode="nearest")
            out: Tensor = self.merge(up + skip)
            return out
        first, *others = self.merge
        joined: Tensor = conv_of_joined(below, skip, first)
        for layer in others:
            joined = layer(joined)
        return joined


_TAPS = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])


def conv_of_joined(
    below: Float[Tensor, "B C x y z"], skip: Float[Tensor, "B D X Y Z"], conv: nn.Conv3d
) -> Float[Tensor, "B E X Y Z"]:
    """conv([up(below), skip]) with a convolution of 3³, and nearest upsampling ×2, without making either.

    The convolution of a joined tensor is the sum of two. That of an upsampled one is a transposed convolution of 4³ and
    stride 2 with k = (w₂, w₁ + w₂, w₀ + w₁, w₀) along each axis: 8 products a voxel and channel in place of 27.

    >>> conv = nn.Conv3d(5, 4, 3, padding=1)
    >>> below, skip = torch.randn(1, 2, 3, 4, 5), torch.randn(1, 3, 6, 8, 10)
    >>> plain = conv(torch.cat([F.interpolate(below, scale_factor=2.0), skip], dim=1))
    >>> torch.allclose(conv_of_joined(below, skip, conv), plain, atol=1e-5)
    True
    """
    weight, channels = conv.weight, below.shape[1]
    with torch.autocast(below.device.type, enabled=False):
        taps = _TAPS.to(weight)
        kernel = torch.einsum("ap,bq,cr,oipqr->ioabc", taps, taps, taps, weight[:, :channels])
    up = F.conv_transpose3d(below, kernel, stride=2, padding=1)
    return up + conv3d(skip, weight[:, channels:], conv.bias, padding=(1, 1, 1))


def pad_to_stride(image: Tensor, stride: int) -> Tensor:
    """Zeros at the end of each axis up to a multiple of ``stride``, and to at least two strides.

    Two, because a normalisation over a single element has no variance.
    """
    missing = [max(2 * stride, -(-n // stride) * stride) - n for n in image.shape[2:]]
    if not any(missing):
        return image
    return F.pad(image, [p for extra in reversed(missing) for p in (0, extra)])


def cropped(volume: Tensor, size: Sequence[int]) -> Tensor:
    """The first ``size`` voxels of each spatial axis: the inverse of `pad_to_stride`."""
    x, y, z = size
    return volume[..., :x, :y, :z]


def encode_separately(
    encoders: nn.ModuleDict,
    images: Mapping[str, Tensor],
    seen: Bool[Tensor, "B M"],
    modalities: ModalitySet,
    strides: Mapping[str, int],
) -> Encoded:
    """Every modality through an encoder of its own, image [B 1 X Y Z] → {level: [B C x y z]}, padded to the strides.

    What was seen is noted, for losses that look at it.
    """
    x, y, z = next(iter(images.values())).shape[2:]
    levels: dict[str, dict[str, Tensor]] = {level: {} for level in strides}
    for name, rows in columns(seen, modalities):
        image = pad_to_stride(images[name], max(strides.values()))
        for level, latent in encode_rows(encoders[name], image, rows).items():
            levels[level][name] = latent
    return Encoded(levels, (x, y, z), seen=seen)


def mean_of_present(
    latents: Mapping[str, Float[Tensor, "B C x y z"]], present: Bool[Tensor, "B M"], modalities: ModalitySet
) -> Float[Tensor, "B C x y z"]:
    """1/|S| Σ_{j∈S} z_j over the modalities S that a sample has, at least one."""
    usable = [name for name, _ in columns(present, modalities)]
    shares = (present.float() / present.sum(dim=1, keepdim=True))[:, [modalities.names.index(n) for n in usable]]
    if masks_are_free():
        parts = (
            latents[n] * share[:, None, None, None, None] for n, share in zip(usable, shares.unbind(1), strict=True)
        )
        return reduce(torch.add, parts)
    mean: Tensor = _WeightedSum.apply(shares.tolist(), *(latents[name] for name in usable))
    return mean


Scored = tuple[Float[Tensor, "B C x y z"], Float[Tensor, "B 1 x y z"]]
"""A modality's latent and its score: what a gated mean needs of it, whatever the others are."""


def gated_mean(
    parts: Mapping[str, Scored], present: Bool[Tensor, "B M"], modalities: ModalitySet
) -> Float[Tensor, "B C x y z"]:
    """Σ_j a_j z_j with a = softmax over the modalities j that a sample has of score_j, per voxel.

    Sums of e^score z, which do not depend on the subset, would be faster. But scores are as large as latents, hundreds:
    only their differences among those that are there fit into an exponential.

    >>> z = torch.randn(1, 2, 3, 3, 3)
    >>> alone = gated_mean({"t1c": (z, z[:, :1])}, torch.tensor([[True]]), ModalitySet(("t1c",)))
    >>> torch.equal(alone, z)
    True
    """
    usable = list(columns(present, modalities))
    latents, scores = zip(*(parts[name] for name, _ in usable), strict=True)
    there = torch.stack([rows for _, rows in usable], dim=1)
    if len(usable) == 1 and all_true(there):
        return latents[0]  # the only weight is 1
    score = torch.cat(scores, dim=1).float().masked_fill(~there[:, :, None, None, None], -torch.inf)
    weights = score.softmax(dim=1).to(latents[0].dtype)
    if masks_are_free() or latents[0].device.type != "cpu" or latents[0].is_contiguous():
        return reduce(torch.add, (z * weights[:, j : j + 1] for j, z in enumerate(latents)))
    fused: Tensor = _WeighedByVoxel.apply(there.tolist(), weights, *latents)
    return fused


class _WeighedByVoxel(torch.autograd.Function):
    """Σ_j a_j z_j on a CPU, weights a [B M x y z], latents z_j [B C x y z] channels last; over the j that a sample has.

    A product that broadcasts over channels goes through such memory in steps of C: three times as slow as one with
    weights that were spread over the channels before. They are in slices, which stay in the cache.
    """

    @staticmethod
    def forward(ctx: Any, there: list[list[bool]], weights: Tensor, *latents: Tensor) -> Tensor:
        ctx.there = there
        ctx.save_for_backward(weights, *latents)
        out = torch.empty_like(latents[0])
        for row, sample, into, *own in zip(there, *(v.split(1) for v in (weights, out, *latents)), strict=True):
            used = [j for j, has in enumerate(row) if has]
            for weight, result, *slices in _sliced(sample, into, *own):
                first, *others = used
                total = slices[first] * _spread(weight, first, result)
                for j in others:
                    total = torch.addcmul(total, slices[j], _spread(weight, j, result))
                result.copy_(total)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weights, *latents = ctx.saved_tensors
        ones = torch.ones(1, gradient.shape[1], 1, 1, 1, dtype=gradient.dtype)
        for_weights, parts = torch.zeros_like(weights), [torch.zeros_like(z) for z in latents]
        whole = (gradient.contiguous(memory_format=torch.channels_last_3d), weights, for_weights)
        for row, *own in zip(ctx.there, *(v.split(1) for v in (*whole, *latents, *parts)), strict=True):
            for upstream, weight, for_weight, *slices in _sliced(*own):
                for j in (j for j, has in enumerate(row) if has):
                    torch.mul(upstream, _spread(weight, j, upstream), out=slices[len(row) + j])
                    for_weight[:, j : j + 1] = F.conv3d(upstream * slices[j], ones)  # their sum, and faster than that
        return None, for_weights, *parts


def _spread(weights: Tensor, j: int, like: Tensor) -> Tensor:
    """One modality's weights, for every channel."""
    return weights[:, j : j + 1].expand_as(like).contiguous(memory_format=torch.channels_last_3d)


def _sliced(*volumes: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices of volumes along their first axis in space, the same of each, small enough for a cache."""
    largest = max(volume.numel() * volume.element_size() for volume in volumes)
    count = min(volumes[0].shape[2], -(-largest // SLICE_BYTES))
    return zip(*(volume.chunk(count, dim=2) for volume in volumes), strict=True)


class _WeightedSum(torch.autograd.Function):
    """Σ_j a_bj z_bj with one weight for each sample b and term j.

    Sample by sample these are sums along memory; as products that broadcast the weights they take five times as long.
    """

    @staticmethod
    def forward(ctx: Any, weights: list[list[float]], *terms: Tensor) -> Tensor:
        ctx.weights = weights
        samples = zip(weights, *(term.split(1) for term in terms), strict=True)
        each = [_weighted(row, one) for row, *one in samples]
        return each[0] if len(each) == 1 else torch.cat(each)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts = [torch.zeros_like(gradient) for _ in ctx.weights[0]]
        for sample, row in enumerate(ctx.weights):
            for weight, part in zip(row, parts, strict=True):
                if weight:
                    torch.mul(gradient[sample], weight, out=part[sample])
        return None, *parts


def _weighted(weights: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    """Σ_j a_j z_j, not in place: see `leaky_relu`."""
    first, *others = [(weight, term) for weight, term in zip(weights, terms, strict=True) if weight]
    total = first[1] * first[0]
    for weight, term in others:
        total = torch.add(total, term, alpha=weight)
    return total


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradient, None


def reverse_gradient(x: Tensor, strength: float) -> Tensor:
    """x itself on the way forward; on the way back its gradient, multiplied by −strength.

    What stands behind it learns as usual, what stands before it learns the opposite: one optimiser trains a
    discriminator and the network that is to deceive it (Ganin et al., JMLR 2016).

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> (5 * reverse_gradient(x, 0.1)).backward()
    >>> x.grad
    tensor(-0.5000)
    """
    reversed_: Tensor = _ReverseGradient.apply(x, strength)
    return reversed_
