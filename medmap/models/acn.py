"""ACN: a path that sees every sequence and a path that sees what is left teach each other.

Wang et al., "ACN: Adversarial Co-training Network for Brain Tumor Segmentation with Missing Modalities", MICCAI 2021.

    z_j        = T_j(x_j)                              private stem of modality j: level ``private``, stride 1
    ŷ⁺, h⁺     = multi(concat_j [j ∈ seen] z_j)        training only
    ŷ, h       = mono(concat_j [j ∈ kept] z_j)         the answer

ŷ are logits, p = softmax(ŷ) probabilities, h the features of the deepest level before dropout; h̄ is h without its
gradient. Both paths are U-Nets after Myronenko (BrainLes 2018): residual blocks [GroupNorm, ReLU, conv 3³] ×2, strided
convolutions down, 1³ convolution, nearest upsampling and an added skip on the way up, dropout 0.2 at the deepest level.

    L = 0.8 DiceCE(ŷ) + 0.2 DiceCE(ŷ⁺)                                          dice_ce, multi
      + 10 r(t) · mean over voxels of Σ_k (p_k − p⁺_k)²                          consistency
      + 0.5 · mean of ((μ(h) − h̄⁺)² / σ² + log σ²) / 2                           transfer
      + ½ softplus(D(Ī⁺)) + ½ softplus(−D(R I))                                  entropy_adversary
      + ½ softplus(D'(h̄⁺)) + ½ softplus(−D'(R'h))                                feature_adversary

r(t)   ramp exp(−5 (1 − t)²), where t runs from 0 to 1 in the first 20/300 of the training
μ, σ²  variational information distillation (Ahn et al., CVPR 2019): three 1³ convolutions; a learned variance per
       channel, 5 at first
I      entropy map [B K X Y Z]: I_k = −p_k log p_k / log K, as in ADVENT (Vu et al., CVPR 2019)
D, D'  discriminators, scores > 0 mean "mono"; the two terms are their own cross-entropy, at full strength (weight 1)
R      `reverse_gradient`, so that mono's push is −λ times the gradient of D's whole cross-entropy softplus(−D(I)), with
       the paper's λ: 1e-3 for the entropy, 2e-4 for the features. A weight w in ``model.loss_weights`` multiplies both:
       the push is w λ, and 0 switches discriminator and push off

Deviations from paper and public code:

* One model for all subsets, drawn per sample, instead of one model per subset: mono has an input for every modality,
  and what is not kept enters as zeros.
* Private stems before the paths, which MedMAP needs to align early-fused images; they end in a convolution without
  bias, before any normalisation. An anchor that fills ``private`` fills mono alone: multi sees what was really there.
  One that fills an outer ``stem`` fills both.
* The published transfer term compares the mono path with itself; here its target is the multi path.
* Classes exclude each other: one softmax. The published network ends in sigmoids and takes the entropy map of a softmax
  over these, whose entropy is never near 0, however sure the network.
* Soft Dice becomes medmap's criterion, Dice plus cross-entropy, with the same weights.
* The discriminators live in the network, its checkpoint and its one optimiser, in place of optimisers that are made
  anew at every step. By gradient reversal mono ascends D's loss, where they let it descend the loss with the
  label swapped; the direction is the same, and so is the size at the balance, where D cannot tell.
* Dropout is off at test; published, the mono path never leaves training mode.
* The auto-encoder branch of Myronenko, which the public code runs without a loss, is left out.
* Entropy maps are padded with zeros (certainty) to a multiple of the discriminator's stride; the ramp counts steps;
  consistency is the published sum of the classes' mean squared differences, the background's with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from medmap.core.modality import ModalitySet
from medmap.models.backbone import Auxiliary, Decoded, Encoded, stacked
from medmap.models.blocks import cropped, pad_to_stride, reverse_gradient, size_named
from medmap.models.convolution import Conv3d, Head
from medmap.models.stem import PrivateStem

LEVEL = "private"

RAMP = 20 / 300
"""Share of the training in which the consistency grows to its full weight."""

ENTROPY_PUSH = 1e-3
FEATURE_PUSH = 2e-4
"""λ of the two adversaries; see the head of this file."""


@dataclass(frozen=True)
class ACNSize:
    """channels: of both paths, per level; level l has stride 2^(l−1); multiples of 8
    blocks:   residual blocks of the encoder, per level, behind its convolution; full resolution is the dearest
    private:  channels through a private stem, from the image to its latent
    entropy:  channels of the entropy discriminator, each layer of stride 2; one more layer gives the score
    feature:  channels of the feature discriminator, at the resolution of the features
    """

    channels: tuple[int, ...]
    blocks: tuple[int, ...]
    private: tuple[int, ...]
    entropy: tuple[int, ...]
    feature: tuple[int, ...]


class ACN(nn.Module):
    """Adversarial co-training of a full and a partial path; see the head of this file.

    modalities: M sequences; classes: K; size: ``tiny`` (0.96 M parameters at M = 4, half of them answer) or
    ``faithful`` (4.70 M each path, and 15.5 M in the discriminators). At test the mono path alone runs.

    >>> net = ACN(ModalitySet(("t1c", "t2f")), classes=4).eval()
    >>> seen = torch.tensor([[True, False]])
    >>> net.decode(net.encode({"t1c": torch.randn(1, 1, 17, 20, 16)}, seen), seen).logits.shape
    torch.Size([1, 4, 17, 20, 16])
    """

    separable = True
    uses_dropped = True

    def __init__(self, modalities: ModalitySet, classes: int, size: str = "tiny") -> None:
        super().__init__()
        shape = size_named(SIZES, size, "acn")
        deep = shape.channels[-1]
        self.modalities = modalities
        self.classes = classes
        self.strides = {LEVEL: 1}
        self.progress = 1.0  # without a trainer that counts, consistency has its full weight
        self.loss_weights = {
            "dice_ce": 0.8,
            "multi": 0.2,
            "consistency": 10.0,
            "transfer": 0.5,
            "entropy_adversary": 1.0,
            "feature_adversary": 1.0,
        }
        self.private = PrivateStem(modalities, shape.private)
        self.multi = _Path(len(modalities), classes, shape)
        self.mono = _Path(len(modalities), classes, shape)
        self.transfer = Transfer(deep)
        self.entropy_discriminator = _EntropyDiscriminator(classes, shape.entropy)
        self.feature_discriminator = _feature_discriminator(deep, shape.feature)

    def supported_subsets(self) -> list[ModalitySet]:
        return self.modalities.subsets()

    def encode(self, images: Mapping[str, Tensor], seen: Bool[Tensor, "B M"]) -> Encoded:
        x, y, z = next(iter(images.values())).shape[2:]
        latents = self.private(images, seen)
        # An anchor that fills overwrites what was dropped; the multi path must still find it.
        return Encoded({LEVEL: latents}, (x, y, z), context=latents if self.training else None, seen=seen)

    def decode(self, encoded: Encoded, kept: Bool[Tensor, "B M"]) -> Decoded:
        mono = self.mono(self._joined(encoded.levels[LEVEL], encoded.present(LEVEL, kept)))
        if not self.training:
            return Decoded(mono.logits, {}, {})
        latents = encoded.levels[LEVEL] if encoded.context is None else encoded.context
        multi = self.multi(self._joined(latents, kept if encoded.seen is None else encoded.seen))
        return Decoded(mono.logits, {"multi": Auxiliary(multi.logits)}, self._co_training(mono, multi))

    def _joined(self, latents: Mapping[str, Tensor], shown: Bool[Tensor, "B M"]) -> Float[Tensor, "B C X Y Z"]:
        """Early fusion: the latents in the order of the modalities, zeros for what is not shown."""
        every = stacked(latents, self.modalities)
        return torch.where(shown[:, :, None, None, None, None], every, 0).flatten(1, 2)

    def _co_training(self, mono: Answer, multi: Answer) -> dict[str, Tensor]:
        entropies = entropy_map(mono.logits), entropy_map(multi.logits)
        return {
            "consistency": ramp_up(self.progress) * disagreement(mono.logits, multi.logits),
            "transfer": self.transfer(mono.deep, multi.deep),
            "entropy_adversary": adversary(self.entropy_discriminator, *entropies, ENTROPY_PUSH),
            "feature_adversary": adversary(self.feature_discriminator, mono.deep, multi.deep, FEATURE_PUSH),
        }


class Answer(NamedTuple):
    """What a path gives: logits [B K X Y Z] and its deepest features [B C x y z], before dropout."""

    logits: Tensor
    deep: Tensor


def ramp_up(progress: float) -> float:
    """r = exp(−5 (1 − t)²) with t = min(1, progress / RAMP): from 0.0067 to 1.

    >>> round(ramp_up(0.0), 4), ramp_up(RAMP), ramp_up(1.0)
    (0.0067, 1.0, 1.0)
    """
    return math.exp(-5 * (1 - min(1.0, progress / RAMP)) ** 2)


def disagreement(one: Float[Tensor, "B K X Y Z"], other: Float[Tensor, "B K X Y Z"]) -> Float[Tensor, ""]:
    """Mean over voxels of Σ_k (p_k − q_k)², p and q the softmax of two logits; between 0 and 2."""
    difference = one.float().softmax(dim=1) - other.float().softmax(dim=1)
    return difference.square().sum(dim=1).mean()


def entropy_map(logits: Float[Tensor, "B K X Y Z"]) -> Float[Tensor, "B K X Y Z"]:
    """I_k = −p_k log p_k / log K; over the classes it adds up to 1 where the network knows nothing, 0 where it is sure.

    >>> entropy_map(torch.zeros(1, 2, 1, 1, 1)).flatten()
    tensor([0.5000, 0.5000])
    """
    log_p = logits.float().log_softmax(dim=1)
    return -log_p.exp() * log_p / math.log(max(2, logits.shape[1]))


def adversary(discriminator: nn.Module, mono: Tensor, multi: Tensor, push: float) -> Float[Tensor, ""]:
    """½ softplus(D(multi)) + ½ softplus(−D(mono)): the loss of a discriminator whose score is > 0 for mono.

    On the way back the discriminator gets this loss's gradient, multi nothing, and mono −push times the gradient of
    softplus(−D(mono)): it learns to be taken for multi.
    """
    # 2: the ½ is the discriminator's, which sees both paths; mono's push has none.
    of_mono, of_multi = discriminator(reverse_gradient(mono, 2 * push)), discriminator(multi.detach())
    return (F.softplus(of_multi.float()).mean() + F.softplus(-of_mono.float()).mean()) / 2


class Transfer(nn.Module):
    """Variational information distillation: mono's features h predict multi's t as a Gaussian.

        mean of ((μ(h) − t)² / σ² + log σ²) / 2      μ: three 1³ convolutions; σ² = softplus(s) + 1e-5 per channel

    Up to a constant −log N(t; μ(h), σ²), the variational bound on the mutual information of both paths. t is a target:
    no gradient reaches the multi path.
    """

    def __init__(self, channels: int, variance: float = 5.0) -> None:
        super().__init__()
        one, two, three = (nn.Conv3d(channels, channels, 1, bias=False) for _ in range(3))
        self.mean = nn.Sequential(one, nn.ReLU(), two, nn.ReLU(), three)
        self.spread = nn.Parameter(torch.full((channels,), math.log(math.expm1(variance - 1e-5))))

    def forward(self, mono: Float[Tensor, "B C x y z"], multi: Float[Tensor, "B C x y z"]) -> Float[Tensor, ""]:
        variance = (F.softplus(self.spread.float()) + 1e-5)[:, None, None, None]
        error = self.mean(mono).float() - multi.detach().float()
        loss: Tensor = ((error.square() / variance + variance.log()) / 2).mean()
        return loss


class _Path(nn.Module):
    """A residual U-Net: [B C X Y Z] of any size → `Answer`."""

    def __init__(self, inputs: int, classes: int, shape: ACNSize) -> None:
        super().__init__()
        channels = shape.channels
        self.stride = 2 ** (len(channels) - 1)
        enter = Conv3d(inputs, channels[0], 3, padding=1)
        down = (Conv3d(before, after, 3, stride=2, padding=1) for before, after in pairwise(channels))
        self.encoder = nn.ModuleList(
            nn.Sequential(conv, *(_Residual(conv.out_channels) for _ in range(count)))
            for conv, count in zip((enter, *down), shape.blocks, strict=True)
        )
        self.dropout = nn.Dropout(0.2)
        self.decoder = nn.ModuleList(_Up(below, after) for after, below in reversed(list(pairwise(channels))))
        self.head = Head(channels[0], classes)

    def forward(self, x: Tensor) -> Answer:
        size = x.shape[2:]
        x = pad_to_stride(x, self.stride)
        skips = []
        for level in self.encoder:
            x = level(x)
            skips.append(x)
        deep = skips.pop()
        x = self.dropout(deep)
        for level in self.decoder:
            x = level(x, skips.pop())
        return Answer(cropped(self.head(x), size), deep)


class _Residual(nn.Module):
    """x + conv(act(norm(conv(act(norm(x))))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers = [
            layer
            for _ in range(2)
            for layer in (
                nn.GroupNorm(8, channels),
                nn.ReLU(inplace=True),
                Conv3d(channels, channels, 3, padding=1),
            )
        ]
        self.inner = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.inner(x)
        return out


class _Up(nn.Module):
    """1³ convolution, nearest upsampling ×2, plus the skip, then a residual block."""

    def __init__(self, below: int, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv3d(below, channels, 1)
        self.merge = _Residual(channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        out: Tensor = self.merge(F.interpolate(self.reduce(x), scale_factor=2.0, mode="nearest") + skip)
        return out


class _EntropyDiscriminator(nn.Module):
    """Entropy map [B K X Y Z] of any size → scores [B 1 x y z] of patches: convolutions 4³ of stride 2, LeakyReLU."""

    def __init__(self, classes: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.stride = 2 ** (len(channels) + 1)
        self.score = nn.Sequential(
            *(
                layer
                for before, after in pairwise((classes, *channels))
                for layer in (nn.Conv3d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True))
            ),
            nn.Conv3d(channels[-1], 1, 4, stride=2, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.score(pad_to_stride(x, self.stride))
        return scores


def _feature_discriminator(features: int, channels: tuple[int, ...]) -> nn.Sequential:
    """Features [B C x y z] → scores: convolutions 3³ and LeakyReLU, the last one of stride 2."""
    layers: list[nn.Module] = []
    for before, after in pairwise((features, *channels)):
        layers += [Conv3d(before, after, 3, padding=1), nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*layers, Conv3d(channels[-1], 1, 3, stride=2, padding=1))


SIZES: dict[str, ACNSize] = {
    "tiny": ACNSize((8, 16, 32, 48), blocks=(0, 1, 1, 2), private=(1, 4, 1), entropy=(8, 16), feature=(16, 32)),
    "faithful": ACNSize(
        (16, 32, 64, 128), blocks=(1, 2, 2, 4), private=(1, 8, 1), entropy=(64, 128, 256, 512), feature=(256, 512)
    ),
}
