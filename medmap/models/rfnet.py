"""RFNet: features are fused region by region, guided by probability maps; longer than others, with two decoders.

Per modality j and level l, in encoder j (conv without bias, IN = instance normalisation, act = LeakyReLU 0.2):

    u = conv(x_{j,l−1}),   a = act(IN(u)),   v = conv(act(IN(conv(a)))),   x_{j,l} = a + act(IN(v))

Per level from the coarsest to the finest, over the modalities S that are present, with h the upsampled and convolved
output of the level below (none at the coarsest):

    p        = softmax over classes of prm_l( h, embed([x_j]_{j∈S}) )                       probability map, detached
    g_{jk}   = Σ_voxels p_k x_j / Σ_voxels p_k                                              what j shows in region k
    w_{·k}   = σ( W₂ act( W₁ [ [g_{jk}]_{j∈S}, mean p_k ] + b₁ ) + b₂ )                     one pair of layers a class
    f_l      = [ refine( [ p_k Σ_{j∈S} w_{jk} x_j ]_k ),  refine'( [x_j]_{j∈S} ) ]          regions, and a short cut
    y_l      = conv 1( conv 3( [h, f_l] ) ), at the coarsest level f_l;     logits = conv 1(y_1)

with refine = convolutions of 1, 3 and 1 voxels. Each probability map is supervised. A second decoder, one for all
modalities, segments the skips x_{j,1} … x_{j,4} of a single modality, so that each encoder learns to segment by itself.

    L = L_seg(logits) + Σ_j L_seg(separate_j) + Σ_l L_seg(prm_l)

Default weights 1, as published. A modality that is dropped but exists is supervised through ``separate`` as well. For
the first 1/15 of the training (20 of 300 epochs) L_seg(logits) has no gradient: the maps come first.

What is absent. [x_j]_{j∈S} is a concatenation over all M with zeros at the absent. Only linear maps read it: the
convolutions of 1 voxel, without bias, and W₁, whose bias b₁ is no modality's own. So the sum over S alone comes out, as
in a network that was never built for the others. The gates are sigmoids, one by one, and those of the absent are 0.
Absent images meet no encoder and no decoder. Nothing is concatenated either: each modality goes through its own columns
of these maps, once for all subsets it is in, and the results are added.

Latents for alignment are (u, v), twice the channels of x_{j,l}: what stands before the two normalisations. The decoders
apply IN, act and the sum to them; the function that is computed is the published one. Without a bias what is 0 around
a latent gives 0 features before normalisation.

Source: Ding, Yu, Yang: RFNet, ICCV 2021, and the facts of its public code. Deviations:

* Convolutions in front of a normalisation without parameters have no bias: it would be taken away again, and get no
  gradient. 5176 parameters fewer at the published size.
* Zeros pad the convolutions, not reflections, and ε of the normalisations is 1e-3, not 1e-5. Over a volume without
  contrast each normalisation multiplies the gradient by up to 1/√ε, and more than twenty stand in a row: an empty crop,
  or with reflections any constant one, made it infinite.
* Upsampling does not align corners: with aligned corners the shift between two levels depends on the size of the crop,
  and training crops and test volumes differ in size.
* L_seg is the criterion of the recipe (Dice without background and cross-entropy), the published one weighs the
  cross-entropy by class and clips it; the coarse maps are upsampled as logits, not as probabilities.
* Only images that exist are encoded and supervised; the published code has all of them in every training step. A latent
  that alignment put in for a dropped modality is used, but is not supervised through ``separate``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from medmap.core.modality import ModalitySet
from medmap.models.backbone import Auxiliary, Decoded, Encoded, all_true, columns
from medmap.models.blocks import cropped, encode_separately, instance_norm, leaky_relu, size_named
from medmap.models.convolution import Conv3d, Head, share_of_part

SLOPE = 0.2
EPSILON = 1e-3
MAP_CHANNELS = 16
WARM_UP = 20 / 300


@dataclass(frozen=True)
class RFNetSize:
    """channels: of the features per level (even), level l has stride 2^(l−1)
    hidden:   width of the layer that gates the modalities
    light:    at full resolution, which costs as much as all other levels together, an encoder has one convolution in
              place of three, a refinement none of 3 voxels, and a decoder adds the skip; then the fused one convolves
              once, the separate one not at all
    """

    channels: tuple[int, ...]
    hidden: int
    light: bool = False

    def levels(self) -> dict[str, int]:
        """{level: channels}, the finest first."""
        return {f"x{level}": channels for level, channels in enumerate(self.channels, start=1)}

    def is_light(self, level: str) -> bool:
        """Whether a level is spared."""
        return self.light and level == "x1"


class Part(NamedTuple):
    """What the fused decoder needs of one modality at one level, whatever the others are.

    features [B C x y z]; embedded, short: their share of what the first convolutions of embed and refine' give
    """

    features: Tensor
    embedded: Tensor
    short: Tensor

    def masked(self, rows: Bool[Tensor, " B"]) -> Part:
        """0 in the samples that are not to be looked at."""
        if all_true(rows):
            return self
        mask = rows[:, None, None, None, None]
        return Part(*(torch.where(mask, z, 0) for z in self))


class RFNet(nn.Module):
    """Region-aware fusion; see the head of this file.

    modalities: M sequences; classes: K; size: ``tiny`` (0.9 M parameters at M = K = 4) or ``faithful`` (8.98 M)

    >>> net = RFNet(ModalitySet(("t1c", "t2f")), classes=4, size="tiny").eval()
    >>> seen = torch.tensor([[True, False]])
    >>> encoded = net.encode({"t1c": torch.randn(1, 1, 17, 20, 16)}, seen)
    >>> net.decode(encoded, seen).logits.shape
    torch.Size([1, 4, 17, 20, 16])
    """

    separable = True
    uses_dropped = True
    progress: float = 1.0

    def __init__(self, modalities: ModalitySet, classes: int, size: str = "tiny") -> None:
        super().__init__()
        shape = size_named(SIZES, size, "rfnet")
        self.modalities = modalities
        self.classes = classes
        self.channels = shape.levels()
        self.strides = {level: 2**index for index, level in enumerate(self.channels)}
        self.loss_weights = {"separate": 1.0, "prm": 1.0}
        self.encoders = nn.ModuleDict({name: _Encoder(shape) for name in modalities})
        self.separate = _SeparateDecoder(shape, classes)
        self.fused = _FusedDecoder(shape, modalities, classes)
        self.apply(_initialise)

    def supported_subsets(self) -> list[ModalitySet]:
        return self.modalities.subsets()

    def encode(self, images: Mapping[str, Tensor], seen: Bool[Tensor, "B M"]) -> Encoded:
        return encode_separately(self.encoders, images, seen, self.modalities, self.strides)

    def digest(self, level: str, name: str, latent: Tensor) -> Part:
        """Features of a modality and what the linear maps of the fused decoder make of them."""
        features = features_of(latent, self.channels[level])
        index = self.modalities.names.index(name)
        readers = self.fused.maps[level].embed[0], self.fused.fusions[level].short_cut[0]
        return Part(features, *(reader.of_one(features, index) for reader in readers))

    def decode(self, encoded: Encoded, kept: Bool[Tensor, "B M"]) -> Decoded:
        own = encoded.own(kept) if self.training else torch.zeros_like(kept)
        parts: dict[str, dict[str, Part]] = {}
        features: dict[str, dict[str, Tensor]] = {}
        for level in self.strides:
            present = encoded.present(level, kept)
            used = [name for name, _ in columns(present | own, self.modalities)]
            whole = {name: encoded.digest(self, level, name) for name in used}
            features[level] = {name: part.features for name, part in whole.items()}
            parts[level] = {name: whole[name].masked(rows) for name, rows in columns(present, self.modalities)}
        logits, maps = self.fused(parts, {level: encoded.present(level, kept) for level in self.strides})
        if self.training and self.progress < WARM_UP:
            logits = logits.detach() + 0 * logits
        auxiliary = {**self._separate(features, own), **self._maps(maps)} if self.training else {}
        auxiliary = {name: Auxiliary(cropped(z, encoded.size), rows) for name, (z, rows) in auxiliary.items()}
        return Decoded(cropped(logits, encoded.size), auxiliary, {})

    def _separate(self, features: Mapping[str, Mapping[str, Tensor]], own: Tensor) -> dict[str, Auxiliary]:
        """Each modality segmented by itself, in the samples that have it; 0 in the others."""
        found = {}
        for name, rows in columns(own, self.modalities):
            index = rows.nonzero().squeeze(1)
            logits = self.separate({level: latents[name].index_select(0, index) for level, latents in features.items()})
            whole = logits.new_zeros(len(rows), *logits.shape[1:]).index_copy(0, index, logits)
            found[f"separate/{name}"] = Auxiliary(whole, rows)
        return found

    def _maps(self, maps: Mapping[str, Tensor]) -> dict[str, Auxiliary]:
        return {f"prm/{level}": Auxiliary(upsampled(z, self.strides[level])) for level, z in maps.items()}


def activated(x: Tensor) -> Tensor:
    """Instance normalisation without parameters, then LeakyReLU(0.2)."""
    return leaky_relu(instance_norm(x, eps=EPSILON), SLOPE)


def features_of(latent: Float[Tensor, "B D x y z"], channels: int) -> Float[Tensor, "B C x y z"]:
    """x = act(IN(u)) + act(IN(v)) of the latent (u, v), C channels each; of u alone where D = C.

    >>> u, v = torch.randn(2, 1, 3, 4, 4, 4)
    >>> torch.equal(features_of(torch.cat([u, v], dim=1), 3), activated(u) + activated(v))
    True
    """
    return reduce(torch.add, torch.split(activated(latent), channels, dim=1))


def upsampled(x: Tensor, factor: int) -> Tensor:
    """Trilinear; what a voxel gets depends on its neighbours and not on the size of the volume."""
    if factor == 1:
        return x
    return F.interpolate(x, scale_factor=float(factor), mode="trilinear", align_corners=False)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv3d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)


def _conv(before: int, after: int, kernel: int = 3, stride: int = 1) -> nn.Conv3d:
    return Conv3d(before, after, kernel, stride, kernel // 2, bias=False)


class _Block(nn.Module):
    """act(IN(conv(x)))."""

    def __init__(self, before: int, after: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = _conv(before, after, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return activated(self.conv(x))

    def of_one(self, x: Tensor, index: int) -> Tensor:
        """The convolution's share of part ``index`` of a joined input whose parts have as many channels as x."""
        return share_of_part(self.conv, x, index)


def _refinement(before: int, inner: int, after: int, light: bool) -> nn.Sequential:
    """Convolutions of 1, 3 and 1 voxels; light: without the one of 3."""
    middle = [] if light else [_Block(inner, inner)]
    return nn.Sequential(_Block(before, inner, 1), *middle, _Block(inner, after, 1))


class _EncoderLevel(nn.Module):
    """x → the latent (u, v) and the features a + act(IN(v)); light: u and a."""

    def __init__(self, before: int, channels: int, stride: int, light: bool) -> None:
        super().__init__()
        self.enter = _conv(before, channels, stride=stride)
        self.inner = None if light else nn.Sequential(_Block(channels, channels), _conv(channels, channels))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u = self.enter(x)
        a = activated(u)
        if self.inner is None:
            return u, a
        v = self.inner(a)
        return torch.cat([u, v], dim=1), a + activated(v)


class _Encoder(nn.Module):
    """One modality's encoder: image [B 1 X Y Z] → latents {level: [B 2C x y z]}."""

    def __init__(self, shape: RFNetSize) -> None:
        super().__init__()
        steps = zip(shape.levels(), pairwise((1, *shape.channels)), strict=True)
        self.levels = nn.ModuleDict(
            {
                level: _EncoderLevel(before, channels, 1 if level == "x1" else 2, shape.is_light(level))
                for level, (before, channels) in steps
            }
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        latents = {}
        for name, level in self.levels.items():
            latents[name], x = level(x)
        return latents


class _Stage(nn.Module):
    """One step of a decoder towards full resolution: up to the skip's resolution, then together with the skip.

    light: the skip is added, and then convolved with where ``merges``
    """

    def __init__(self, below: int, channels: int, light: bool, merges: bool) -> None:
        super().__init__()
        self.light = light
        self.rise = _Block(below, channels, 1 if light else 3)
        blocks = [_Block(2 * channels, channels), _Block(channels, channels, 1)]
        if light:
            blocks = [_Block(channels, channels)] if merges else []
        self.merge = nn.Sequential(*blocks)

    def up(self, x: Tensor) -> Tensor:
        """Upsampled ×2 and convolved; light: in the other order, an eighth of the work."""
        return upsampled(self.rise(x), 2) if self.light else self.rise(upsampled(x, 2))

    def join(self, up: Tensor, skip: Tensor) -> Tensor:
        joined: Tensor = self.merge(up + skip if self.light else torch.cat([up, skip], dim=1))
        return joined


def _stages(shape: RFNetSize, merges: bool) -> nn.ModuleDict:
    """A step into every level but the deepest, from the level below it."""
    steps = zip(shape.levels(), pairwise(shape.channels), strict=False)
    return nn.ModuleDict({level: _Stage(below, c, shape.is_light(level), merges) for level, (c, below) in steps})


class _SeparateDecoder(nn.Module):
    """Logits from the features {level: [B C x y z]} of a single modality, whichever it is."""

    def __init__(self, shape: RFNetSize, classes: int) -> None:
        super().__init__()
        self.stages = _stages(shape, merges=False)
        self.head = Head(shape.channels[0], classes)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        *shallow, deepest = features
        x = features[deepest]
        for level in reversed(shallow):
            stage = self.stages[level]
            x = stage.join(stage.up(x), features[level])
        logits: Tensor = self.head(x)
        return logits


class _FusedDecoder(nn.Module):
    """Logits, and those of the probability map of every level, from the modalities' parts."""

    def __init__(self, shape: RFNetSize, modalities: ModalitySet, classes: int) -> None:
        super().__init__()
        levels = shape.levels()
        self.stages = _stages(shape, merges=True)
        self.maps = nn.ModuleDict(
            {
                level: _ProbabilityMap(
                    len(modalities), c, classes, shape.is_light(level), deepest=level not in self.stages
                )
                for level, c in levels.items()
            }
        )
        self.fusions = nn.ModuleDict(
            {
                level: _RegionFusion(modalities, c, classes, shape.hidden, shape.is_light(level))
                for level, c in levels.items()
            }
        )
        self.head = Head(shape.channels[0], classes)

    def forward(
        self, parts: Mapping[str, Mapping[str, Part]], present: Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, "B K x y z"], dict[str, Tensor]]:
        maps: dict[str, Tensor] = {}
        x = None
        for level in reversed(list(parts)):
            h = None if x is None else self.stages[level].up(x)
            maps[level] = self.maps[level](parts[level], h)
            # Detached: the map learns from its own supervision, and the fusion takes it as it is.
            skip = self.fusions[level](parts[level], maps[level].detach().softmax(dim=1), present[level])
            x = skip if h is None else self.stages[level].join(h, skip)
        return self.head(x), maps


class _ProbabilityMap(nn.Module):
    """Logits [B K x y z] of one level from the modalities' features, and from the level below where there is one."""

    def __init__(self, modalities: int, channels: int, classes: int, light: bool, deepest: bool) -> None:
        super().__init__()
        self.embed = _refinement(modalities * channels, channels // 4, channels, light)
        self.inner = _Block(channels if deepest else 2 * channels, MAP_CHANNELS, 1)
        self.head = Head(MAP_CHANNELS, classes)

    def forward(self, parts: Mapping[str, Part], h: Tensor | None) -> Float[Tensor, "B K x y z"]:
        x = _after_first(self.embed, reduce(torch.add, (part.embedded for part in parts.values())))
        logits: Tensor = self.head(self.inner(x if h is None else torch.cat([h, x], dim=1)))
        return logits


class _RegionFusion(nn.Module):
    """The skip connection of one level: features weighed per region and modality, beside a plain short cut."""

    def __init__(self, modalities: ModalitySet, channels: int, classes: int, hidden: int, light: bool) -> None:
        super().__init__()
        self.modalities = modalities
        self.gates = nn.ModuleList(
            nn.Sequential(
                nn.Linear(len(modalities) * channels + 1, hidden),
                nn.LeakyReLU(SLOPE),
                nn.Linear(hidden, len(modalities)),
            )
            for _ in range(classes)
        )
        self.refine = _refinement(classes * channels, channels, channels // 2, light)
        self.short_cut = _refinement(len(modalities) * channels, channels, channels // 2, light)

    def forward(
        self, parts: Mapping[str, Part], p: Float[Tensor, "B K x y z"], present: Bool[Tensor, "B M"]
    ) -> Float[Tensor, "B C x y z"]:
        regions = self.regions({name: part.features for name, part in parts.items()}, p, present)
        short = reduce(torch.add, (part.short for part in parts.values()))
        return torch.cat([_after_first(self.refine, regions), _after_first(self.short_cut, short)], dim=1)

    def regions(
        self, features: Mapping[str, Float[Tensor, "B C x y z"]], p: Tensor, present: Tensor
    ) -> Float[Tensor, "B C x y z"]:
        """Σ_k R_k p_k Σ_j w_jk x_j with R = [R_k]_k the first convolution of refine, as Σ_k p_k ([w_jk R_k]_j [x_j]_j).

        The sum over modalities goes into the convolution's weights, which are small, in place of K mixtures, which are
        not.
        """
        index = [self.modalities.names.index(name) for name in features]
        x = torch.cat(list(features.values()), dim=1)
        weights = self.weights(x, index, p, present)[:, :, index]
        rows = self.refine[0].conv.weight.flatten(1).unflatten(1, (p.shape[1], 1, -1))
        each = []
        for one, maps, w in zip(x.split(1), p.to(x.dtype).split(1), weights, strict=True):
            kernels = (rows * w[..., None]).flatten(2)[..., None, None, None]
            each.append(
                reduce(torch.add, (F.conv3d(one, kernels[:, k]) * maps[:, k : k + 1] for k in range(p.shape[1])))
            )
        return each[0] if len(each) == 1 else torch.cat(each)

    def weights(
        self, x: Float[Tensor, "B C x y z"], index: Sequence[int], p: Tensor, present: Tensor
    ) -> Float[Tensor, "B K M"]:
        """w of every region and modality, between 0 and 1, and 0 for what is not present. x: features of some
        modalities, joined; index: which"""
        area = p.flatten(2).float().mean(dim=2)[..., None]
        sums = (_last(p).transpose(1, 2).to(x.dtype) @ _last(x)).float() / p[0, 0].numel()
        pooled = area.new_zeros(*p.shape[:2], len(self.modalities), x.shape[1] // len(index))
        pooled[:, :, index] = (sums / (area + 1e-7)).unflatten(2, (len(index), -1))
        given = torch.cat([pooled.flatten(2), area], dim=2)
        scores = torch.stack([gate(given[:, k]) for k, gate in enumerate(self.gates)], dim=1)
        return scores.sigmoid() * present[:, None]


def _after_first(refinement: nn.Sequential, x: Tensor) -> Tensor:
    """The rest of a refinement whose first convolution is done."""
    x = activated(x)
    for block in refinement[1:]:
        x = block(x)
    return x


def _last(x: Float[Tensor, "B C x y z"]) -> Float[Tensor, "B v C"]:
    """Voxels in rows; no copy where channels lie last."""
    return x.permute(0, 2, 3, 4, 1).flatten(1, 3)


SIZES: dict[str, RFNetSize] = {
    "tiny": RFNetSize((8, 16, 24, 32), hidden=32, light=True),
    "faithful": RFNetSize((16, 32, 64, 128), hidden=128),
}
