"""mmFormer: encoders, transformers in and across modalities, one decoder; longer than others, with two kinds of each.

Zhang, He, Yang, Li, Wei, Huang, Zhang, He, Zheng: "mmFormer: Multimodal Medical Transformer for Incomplete Multimodal
Learning of Brain Tumor Segmentation", MICCAI 2022. The facts were checked against its public code.

Forward pass, j a modality of the M, l = 1 … 5 a level of stride 2^(l−1), S the modalities that are kept:

    x_{j,1…5} = encoder_j(image_j)                                          latents, before any normalisation
    t_j   = T(W_j x_{j,5}, p_j)                       j ∈ S                 intra-modality transformer, one per modality
    [u_j] = T([t_j], [p_j])                           over all j ∈ S        inter-modality transformer
    f_5   = fuse_5( V [u_1 … u_M] )                   u_j = 0 for j ∉ S     tokens back on their grid, side by side
    f_l   = fuse_l( [x_{1,l} … x_{M,l}] )             x_{j,l} = 0 for j ∉ S
    d_5   = f_5,   d_l = merge_l( [f_l, conv(up d_{l+1})] ),   logits = head(d_1)

    T(t, p):  h = t + p;  h = h + attention(LN h);  h + MLP(LN h)            tokens t, positions p, each N × D

T has one block; its positions p_j serve both transformers. Every convolution but an encoder's first, W, V and the
heads comes after its normalisation and activation (instance normalisation without scale and shift, LeakyReLU 0.2), 3³
convolutions pad by reflection, upsampling is trilinear, and convolutions start from He's normal distribution.

Loss, all weights 1, L the criterion (Dice and cross-entropy, worked out by the trainer) and Y the truth:

    L(logits, Y) + Σ_j L(separate(x_{j,1…5}), Y) + Σ_{l=2…5} L(up(head_l(d_l)), Y)

    separate/<modality>: one decoder for all of them, on one modality alone, over the samples in which that modality is
                         seen, also where this pass dropped it (``uses_dropped``); never where it is absent, nor
                         where an anchor has taken the place of its latents
    deep/x2 … deep/x5:   the fused decoder's coarser levels, brought to full resolution

Deviations from the paper and its public code:

* Tokens of all modalities go back to the grid modality by modality. The public code reads the modality-major sequence
  as if it were voxel-major, so that a voxel there holds tokens of other places and not one of each modality.
* Tokens of absent modalities are no keys, and what they would have gathered is replaced by zeros. The public code
  zeroes the tokens, adds their positions and attends to them: sequences that do not exist move the answer.
* Positions belong to a reference grid (8³ at 128³ voxels) and are interpolated to any other; the public code runs at
  one crop size.
* The M convolutions from tokens back to 128 channels that no forward pass uses are not there: at M = 4 these are
  4 · (512 · 128 + 128) = 262 656 parameters of the published 36 654 416. `faithful` has the other 36 391 760.
* Only images that exist are encoded; the public code encodes all of them.
* A channel that is constant passes no gradient (`_Normalise`): under the usual normalisation a crop of nothing but
  background multiplies gradients by 1/√ε ≈ 316 in every layer, until they overflow.
* Fusion takes M modalities; in the public code that number was the number of classes, both being 4.
* What attention adds is dropped out once, not twice in a row.
* Deep supervision upsamples logits where the public code upsamples probabilities: the criterion takes logits.
* Cross-entropy is not weighted by class frequencies: the criterion is the same for every network.

The intra-modality transformers run in `decode`: x_{j,5}, what is aligned and may be filled, then decides what they
see; encoding stays convolutional, so that latents of one sequence may be put on a larger box; and positions are those
of the box that all sequences share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from medmap.core.modality import ModalitySet
from medmap.models.backbone import Auxiliary, Decoded, Encoded, all_true, columns, masks_are_free, stacked
from medmap.models.blocks import LeakyReLU, cropped, encode_separately, instance_norm, size_named
from medmap.models.convolution import Conv3d, Head, share_of_part

Latents = Mapping[str, Tensor]


@dataclass(frozen=True)
class MMFormerSize:
    """channels: of x1 … x5
    width:    D, of the tokens
    heads:    of an attention
    hidden:   of the MLP
    grid:     tokens per axis of the position tables' reference crop, whose side is then 16 · grid voxels
    light:    full resolution, which costs as much as all other levels together, gets one convolution per block
    """

    channels: tuple[int, int, int, int, int]
    width: int
    heads: int
    hidden: int
    grid: int
    light: bool = False


class MMFormer(nn.Module):
    """Encoders and transformers per modality, a transformer across them, a fused decoder; see the head of this file.

    modalities: M sequences; classes: K; size: ``tiny`` (1.0 M parameters at M = 4), ``faithful`` (36.4 M, as
    published). Raises ConfigError for another size.

    >>> net = MMFormer(ModalitySet(("t1c", "t2f")), classes=4, size="tiny")
    >>> seen = torch.tensor([[True, False]])
    >>> net.decode(net.encode({"t1c": torch.randn(1, 1, 17, 20, 16)}, seen), seen).logits.shape
    torch.Size([1, 4, 17, 20, 16])
    """

    separable = True
    uses_dropped = True

    def __init__(self, modalities: ModalitySet, classes: int, size: str = "tiny") -> None:
        super().__init__()
        shape = size_named(SIZES, size, "mmformer")
        self.modalities = modalities
        self.classes = classes
        self.strides = {f"x{level}": 2 ** (level - 1) for level in range(1, 6)}
        self.loss_weights = {"separate": 1.0, "deep": 1.0}
        channels = dict(zip(self.strides, shape.channels, strict=True))
        self.encoders = nn.ModuleDict({name: _Encoder(shape) for name in modalities})
        self.separate = _Decoder(shape, classes)
        self.bottleneck = _Bottleneck(modalities, shape)
        self.fusions = nn.ModuleDict(
            {level: _Fusion(len(modalities), c, shape.light and level == "x1") for level, c in channels.items()}
        )
        self.fused = _Decoder(shape, classes)
        self.deep = nn.ModuleDict({level: Head(c, classes) for level, c in channels.items() if level != "x1"})
        for module in self.modules():
            if isinstance(module, nn.Conv3d) and not isinstance(module, Head):
                nn.init.kaiming_normal_(module.weight)

    def supported_subsets(self) -> list[ModalitySet]:
        return self.modalities.subsets()

    def encode(self, images: Mapping[str, Tensor], seen: Bool[Tensor, "B M"]) -> Encoded:
        return encode_separately(self.encoders, images, seen, self.modalities, self.strides)

    def digest(self, level: str, name: str, latent: Tensor) -> Tensor:
        """x1 … x4: a modality's share of a fusion's first convolution; x5: its tokens on their grid."""
        if level == "x5":
            return self.bottleneck.within(name, latent)
        return self.fusions[level].of_one(latent, self.modalities.names.index(name))

    def decode(self, encoded: Encoded, kept: Bool[Tensor, "B M"]) -> Decoded:
        fused = {level: self._fused(level, encoded, encoded.present(level, kept)) for level in self.strides}
        logits, decoded = self.fused(fused)
        auxiliary = {}
        if self.training:
            auxiliary = {**self._separate(encoded, kept), **self._deep({**decoded, "x5": fused["x5"]}, encoded)}
        return Decoded(cropped(logits, encoded.size), auxiliary, {})

    def _fused(self, level: str, encoded: Encoded, present: Tensor) -> Float[Tensor, "B C x y z"]:
        """f_l of the modalities that are present."""
        rows = dict(columns(present, self.modalities))
        parts = {name: encoded.digest(self, level, name) for name in rows}
        fusion = self.fusions[level]
        if level == "x5":
            joined: Tensor = fusion(self.bottleneck(parts, present))
            return joined
        shares: Tensor = fusion.of_shares([_where(rows[name], part) for name, part in parts.items()])
        return shares

    def _separate(self, encoded: Encoded, kept: Tensor) -> dict[str, Auxiliary]:
        """Each modality's own answer, where its latents are still its own: seen, and nothing filled in."""
        found = {}
        for name, rows in columns(encoded.own(kept), self.modalities):
            own = {level: encoded.levels[level][name] for level in self.strides}
            if all_true(rows):
                logits, _ = self.separate(own)
            else:
                logits = _on_rows(self.separate({level: x[rows] for level, x in own.items()})[0], rows)
            found[f"separate/{name}"] = Auxiliary(cropped(logits, encoded.size), rows)
        return found

    def _deep(self, decoded: Latents, encoded: Encoded) -> dict[str, Auxiliary]:
        """The coarser levels' own answers, at full resolution."""
        return {
            f"deep/{level}": Auxiliary(cropped(_up(head(decoded[level]), self.strides[level]), encoded.size))
            for level, head in self.deep.items()
        }


class _Normalise(nn.Module):
    """Instance normalisation of x [B C x y z] without scale and shift; a channel that is constant becomes 0, for good.

        y = (x − μ)/√(v + ε),   0 where v/(v + ε) < 1e-3           μ, v: over the voxels of a channel; ε = 1e-5

    y would be next to 0 there anyway, but its gradient g/√ε. What is tested is mean(y²) = v/(v + ε).
    """

    def forward(self, x: Tensor) -> Tensor:
        y = instance_norm(x)
        with torch.autocast(x.device.type, enabled=False):  # which would make a copy in float32
            norm = torch.linalg.vector_norm(y.detach(), dim=(2, 3, 4), keepdim=True).float()
        varied: Tensor = norm.square() > 1e-3 * y[0, 0].numel()
        if x.device.type == "cpu" and not masks_are_free() and bool(varied.all()):
            return y
        return y * varied


def _conv(before: int, channels: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Normalisation, LeakyReLU(0.2), convolution."""
    return nn.Sequential(_Normalise(), LeakyReLU(0.2), _bare(before, channels, kernel, stride))


def _bare(before: int, channels: int, kernel: int = 3, stride: int = 1) -> nn.Conv3d:
    return Conv3d(before, channels, kernel, stride=stride, padding=kernel // 2, padding_mode="reflect")


def _up(x: Tensor, factor: int = 2) -> Tensor:
    return F.interpolate(x, scale_factor=float(factor), mode="trilinear", align_corners=True)


def _on_rows(some: Float[Tensor, "b *rest"], rows: Bool[Tensor, " B"]) -> Float[Tensor, "B *rest"]:
    """Samples of a batch in their places; zeros in the others."""
    index = rows.nonzero().squeeze(1)
    return some.new_zeros((len(rows), *some.shape[1:])).index_copy(0, index, some)


def _where(rows: Bool[Tensor, " B"], x: Float[Tensor, "B C x y z"]) -> Float[Tensor, "B C x y z"]:
    """0 in the samples that are not to be looked at."""
    return x if all_true(rows) else x.where(rows[:, None, None, None, None], 0.0)


class _Fusion(nn.Module):
    """From all modalities' channels to one modality's number of them.

    Its first convolution is of 1³ and follows a normalisation, so that it is a sum over modalities:

        W act(IN [x_1 … x_M]) + b = Σ_j W_j act(IN x_j) + b                 IN of what is absent, 0, is 0
    """

    def __init__(self, modalities: int, channels: int, light: bool) -> None:
        super().__init__()
        self.first = _conv(modalities * channels, channels, 1)
        self.rest = nn.Sequential(*([] if light else [_conv(channels, channels), _conv(channels, channels, 1)]))

    def forward(self, joined: Float[Tensor, "B MC x y z"]) -> Float[Tensor, "B C x y z"]:
        out: Tensor = self.rest(self.first(joined))
        return out

    def of_one(self, x: Float[Tensor, "B C x y z"], index: int) -> Float[Tensor, "B C x y z"]:
        """A modality's summand W_j act(IN x_j)."""
        normalise, act, conv = self.first
        return share_of_part(conv, act(normalise(x)), index)

    def of_shares(self, shares: Sequence[Float[Tensor, "B C x y z"]]) -> Float[Tensor, "B C x y z"]:
        """The same as of [x_1 … x_M], from the summands."""
        *_, conv = self.first
        out: Tensor = self.rest(reduce(torch.add, shares) + conv.bias[:, None, None, None])
        return out


class _Encoder(nn.Module):
    """One modality's encoder: image [B 1 X Y Z] → {level: [B C x y z]}.

    h_l = conv(x_{l−1}), x_l = h_l + conv(conv(h_l))                        light: x_1 = h_1
    """

    def __init__(self, shape: MMFormerSize) -> None:
        super().__init__()
        first, *_ = shape.channels
        self.enter = nn.ModuleList([_bare(1, first), *(_conv(b, c, stride=2) for b, c in pairwise(shape.channels))])
        self.inner = nn.ModuleDict(
            {
                f"x{level}": nn.Sequential(_conv(c, c), _conv(c, c))
                for level, c in enumerate(shape.channels, start=1)
                if not (shape.light and level == 1)
            }
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        latents = {}
        for index, enter in enumerate(self.enter, start=1):
            level = f"x{index}"
            x = enter(x)
            if level in self.inner:
                x = x + self.inner[level](x)
            latents[level] = x
        return latents


class _Decoder(nn.Module):
    """{x1 … x5: [B C x y z]} → logits [B K X Y Z], and the decoded levels {x1 … x4: [B C x y z]}."""

    def __init__(self, shape: MMFormerSize, classes: int) -> None:
        super().__init__()
        self.levels = nn.ModuleDict(
            {
                f"x{index}": _DecoderLevel(below, c, shape.light and index == 1)
                for index, (c, below) in enumerate(pairwise(shape.channels), start=1)
            }
        )
        self.head = Head(shape.channels[0], classes)

    def forward(self, skips: Latents) -> tuple[Tensor, dict[str, Tensor]]:
        x = skips["x5"]
        decoded = {}
        for name in reversed(list(self.levels)):
            x = self.levels[name](x, skips[name])
            decoded[name] = x
        return self.head(x), decoded


class _DecoderLevel(nn.Module):
    """Upsample ×2 and convolve, join the skip, convolve.

    light: a 1×1×1 convolution before the upsampling; the skip is added and one convolution follows
    """

    def __init__(self, below: int, channels: int, light: bool) -> None:
        super().__init__()
        self.light = light
        self.reduce = _conv(below, channels, 1 if light else 3)
        join = _conv(channels if light else 2 * channels, channels)
        self.merge = join if light else nn.Sequential(join, _conv(channels, channels, 1))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        if self.light:
            light: Tensor = self.merge(skip + _up(self.reduce(x)))
            return light
        out: Tensor = self.merge(torch.cat([skip, self.reduce(_up(x))], dim=1))
        return out


class _Bottleneck(nn.Module):
    """x5 of the present modalities through both kinds of transformer: {modality: [B C x y z]} → [B M·C x y z]."""

    def __init__(self, modalities: ModalitySet, shape: MMFormerSize) -> None:
        super().__init__()
        self.modalities = modalities
        channels, count = shape.channels[-1], len(modalities)
        self.enter = nn.ModuleDict({name: nn.Conv3d(channels, shape.width, 1) for name in modalities})
        self.positions = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(1, shape.width, *[shape.grid] * 3)) for name in modalities}
        )
        self.intra = nn.ModuleDict({name: _Transformer(shape) for name in modalities})
        self.inter = _Transformer(shape)
        self.leave = nn.Conv3d(count * shape.width, count * channels, 1)

    def within(self, name: str, x5: Float[Tensor, "B C x y z"]) -> Float[Tensor, "B D x y z"]:
        """One modality's tokens, through its own transformer and back on their grid."""
        x, y, z = x5.shape[2:]
        own = self.intra[name](_tokens(self.enter[name](x5)), self._positions(name, (x, y, z)))
        return _grid(own, (x, y, z))

    def forward(self, within: Latents, present: Bool[Tensor, "B M"]) -> Float[Tensor, "B MC x y z"]:
        x, y, z = next(iter(within.values())).shape[2:]
        usable = dict(columns(present, self.modalities))
        own = torch.cat([_tokens(within[name]) for name in usable], dim=1)
        positions = torch.cat([self._positions(name, (x, y, z)) for name in usable], dim=1)
        attended = torch.stack(list(usable.values()), dim=1)[..., None].expand(-1, -1, x * y * z).flatten(1)
        across = self.inter(own, positions, attended).where(attended[:, :, None], 0.0)
        parts = across.unflatten(1, (len(usable), -1)).unbind(dim=1)
        grids = {name: _grid(part, (x, y, z)) for name, part in zip(usable, parts, strict=True)}
        joined: Tensor = self.leave(stacked(grids, self.modalities).flatten(1, 2))
        return joined

    def _positions(self, name: str, size: tuple[int, int, int]) -> Float[Tensor, "1 N D"]:
        return _tokens(_on_grid(self.positions[name], size))


class _Transformer(nn.Module):
    """One block: h = t + p;  h = h + attention(LN h);  h + MLP(LN h). Tokens and positions [B N D]."""

    def __init__(self, shape: MMFormerSize) -> None:
        super().__init__()
        self.attention = _Attention(shape.width, shape.heads)
        self.mlp = nn.Sequential(
            nn.LayerNorm(shape.width),
            nn.Linear(shape.width, shape.hidden),
            nn.GELU(),
            nn.Dropout(DROPOUT),
            nn.Linear(shape.hidden, shape.width),
            nn.Dropout(DROPOUT),
        )

    def forward(self, tokens: Tensor, positions: Tensor, attended: Bool[Tensor, "B N"] | None = None) -> Tensor:
        h = tokens + positions
        h = h + self.attention(h, attended)
        out: Tensor = h + self.mlp(h)
        return out


class _Attention(nn.Module):
    """softmax(Q Kᵀ/√d) V of LN h, by heads; tokens that are not ``attended`` are no keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.leave = nn.Sequential(nn.Linear(width, width), nn.Dropout(DROPOUT))

    def forward(self, h: Tensor, attended: Bool[Tensor, "B N"] | None) -> Tensor:
        batch, tokens, width = h.shape
        qkv = self.qkv(self.norm(h)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mask = None if attended is None else attended[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=DROPOUT if self.training else 0.0)
        left: Tensor = self.leave(out.transpose(1, 2).flatten(2))
        return left


def _tokens(grid: Float[Tensor, "B D x y z"]) -> Float[Tensor, "B N D"]:
    return grid.flatten(2).transpose(1, 2)


def _grid(tokens: Float[Tensor, "B N D"], size: tuple[int, int, int]) -> Float[Tensor, "B D x y z"]:
    """The inverse of `_tokens`."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *size)


def _on_grid(table: Float[Tensor, "1 D g g g"], size: tuple[int, int, int]) -> Float[Tensor, "1 D x y z"]:
    """A position table stretched to another grid; on its own, the table itself."""
    return F.interpolate(table, size=size, mode="trilinear", align_corners=False)


DROPOUT = 0.1

SIZES: dict[str, MMFormerSize] = {
    "tiny": MMFormerSize((8, 12, 16, 24, 32), width=48, heads=4, hidden=128, grid=4, light=True),
    "faithful": MMFormerSize((8, 16, 32, 64, 128), width=512, heads=8, hidden=4096, grid=8),
}
