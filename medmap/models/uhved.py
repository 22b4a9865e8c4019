"""U-HVED: every sequence is an expert that gives a mean and a variance; their product is decoded.

    N(μ_{j,l}, σ²_{j,l}) = encoder_j(x_j)                                  per sequence j, level l, element by element
    1/σ_l² = 1 + Σ_j 1/σ²_{j,l}      μ_l = σ_l² Σ_j μ_{j,l} / σ²_{j,l}      j over what is kept, 1 is the prior N(0, I)
    z_l     = μ_l + σ_l ε,  ε ~ N(0, I)  in training;   z_l = μ_l  at test
    logits  = decoder(z_1 … z_L)        x̂_j = decoder_j(z_1 … z_L)         for every sequence that is seen

An encoder level is twice [normalisation, LeakyReLU, convolution 3³]. One half of its channels is μ, the other log σ²;
both go on, through maximum pooling, to the next level. A decoder upsamples linearly, joins the skip and does the same.

Terms, besides the criterion, and their weights in the published code:

    kl             0.1   1/L Σ_l mean over elements of KL( N(μ_l, σ_l²) ‖ N(0, I) ), in nats
    reconstruction 0.1   mean of (x̂_j − x_j)² over the brain (x_j ≠ 0) of every sequence that is seen, dropped or not

A subset is drawn at each step, so that ``kl`` estimates the mean over subsets in the paper's bound: its posterior is
the mixture of the products over subsets, and the divergence of a mixture is at most the mean of its parts'.

Latents of 0, which stand where a sequence has no brain when boxes are joined at test, mean N(0, I): the expert there
repeats the prior. What an anchor fills in counts as an expert too. It repeats what was kept, so that the fused variance
then comes out too small.

Source: Dorent et al., Hetero-Modal Variational Encoder-Decoder, MICCAI 2019 (arXiv 1907.11150), and the published
checkpoint of 1 250 552 parameters. Deviations:

* The 1×1×1 convolutions, first and last of a path, have a bias: 40 more parameters with M = 4, K = 4. Without one
  the first has no gradient, because the normalisation behind it takes away all it could learn, a scale.
* The product is exact; the code adds 1e-7 to variances, which a sharp expert notices.
* log σ² is held within ±10 in place of ±50: the ratio of two variances then fits a float.
* Segmentation at test comes from the mean; the code segments from a sample, another one each time.
* Reconstruction looks at the brain alone; in the code the background, most of a volume, counts as well.
* The code also pulls the posterior of every subset to that of the drawn one, which the bound does not ask for.
* The subset is per sample, and an absent image is never encoded.
* The slope of LeakyReLU is 0.01 (0.02).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from medmap.core.gaussian import Gaussian, kl
from medmap.core.modality import ModalitySet
from medmap.core.processes import averaged, processes
from medmap.models.backbone import Decoded, Encoded, columns, stacked
from medmap.models.blocks import cropped, encode_separately, normalise, size_named
from medmap.models.convolution import Conv3d, Head

LOG_VAR_LIMIT = 10.0
"""|log σ²| of an expert is at most this: standard deviations between 1/150 and 150 times the prior's."""


@dataclass(frozen=True)
class UHVEDSize:
    """channels: of an encoder per level, means and log-variances together; level l has stride 2^(l−1)
    light:    at full resolution, which costs the most, one convolution in place of two; one image decoder that gives
              all M images, in place of M of them
    """

    channels: tuple[int, ...]
    light: bool = False


class UHVED(nn.Module):
    """Experts per sequence and level, their product, decoders for the labels and for every image; see the file's head.

    modalities: M sequences; classes: K; size: ``tiny`` (0.5 M parameters at M = 4) or ``faithful`` (1.25 M).
    Latents hold mean and log-variance, [B 2c x y z]. Behind a stem, what is reconstructed is what the stem gave.

    >>> net = UHVED(ModalitySet(("t1c", "t2f")), classes=4)
    >>> seen = torch.tensor([[True, False]])
    >>> answer = net.decode(net.encode({"t1c": torch.randn(1, 1, 17, 20, 16)}, seen), seen)
    >>> answer.logits.shape, sorted(answer.losses)
    (torch.Size([1, 4, 17, 20, 16]), ['kl', 'reconstruction'])
    """

    separable = True
    gaussian = True
    uses_dropped = True

    def __init__(self, modalities: ModalitySet, classes: int, size: str = "tiny") -> None:
        super().__init__()
        shape = size_named(SIZES, size, "uhved")
        self.modalities = modalities
        self.classes = classes
        self.strides = {f"x{level + 1}": 2**level for level in range(len(shape.channels))}
        self.encoders = nn.ModuleDict({name: _Encoder(shape) for name in modalities})
        finest = shape.channels[0] // 2
        self.decoder = _Decoder(shape, Head(finest, classes))
        images = [len(modalities)] if shape.light else [1] * len(modalities)
        self.image_decoders = nn.ModuleList([_Decoder(shape, nn.Conv3d(finest, count, 1)) for count in images])
        self.loss_weights = {"kl": 0.1, "reconstruction": 0.1}

    def supported_subsets(self) -> list[ModalitySet]:
        return self.modalities.subsets()

    def encode(self, images: Mapping[str, Tensor], seen: Bool[Tensor, "B M"]) -> Encoded:
        """Experts of the seen sequences. In training the images themselves go along, to be reconstructed."""
        encoded = encode_separately(self.encoders, images, seen, self.modalities, self.strides)
        return replace(encoded, context=dict(images) if self.training else None)

    def decode(self, encoded: Encoded, kept: Bool[Tensor, "B M"]) -> Decoded:
        """Logits from the product of the kept experts: of a sample in training, of its mean otherwise."""
        posteriors = [
            product_of_experts(encoded.levels[level], encoded.present(level, kept), self.modalities)
            for level in self.strides
        ]
        # Fused in float32; the convolutions go on in the precision of the encoders.
        precision = next(iter(encoded.levels["x1"].values())).dtype
        samples = [(_sampled(q) if self.training else q.mean).to(precision) for q in posteriors]
        losses = {}
        if self.training and encoded.context is not None:
            losses = {"kl": _kl_to_prior(posteriors), "reconstruction": self._reconstruction(samples, encoded)}
        return Decoded(cropped(self.decoder(samples), encoded.size), {}, losses)

    def _reconstruction(self, samples: Sequence[Tensor], encoded: Encoded) -> Float[Tensor, ""]:
        """Mean squared error over the brain of every sequence that was seen itself; 0 where no image has any."""
        assert encoded.seen is not None
        own = encoded.seen
        for level, filled in encoded.filled.items():
            if level not in self.strides:  # behind a stem, an image that an anchor put there is nobody's
                own = own & ~filled
        made = torch.cat([decoder(samples) for decoder in self.image_decoders], dim=1)
        # Detached: a stem could otherwise learn to make images that are easy to reconstruct.
        images = stacked(encoded.context, self.modalities)[:, :, 0].detach()
        brain = (images != 0) & own[:, :, None, None, None]
        errors = torch.where(brain, cropped(made, encoded.size).float() - images, 0)
        voxels = averaged(brain.sum().float()).clamp(min=1 / processes())
        return averaged(errors.square().sum()) / voxels


def product_of_experts(
    latents: Mapping[str, Float[Tensor, "B C x y z"]], present: Bool[Tensor, "B M"], modalities: ModalitySet
) -> Gaussian:
    """The normalised product of the prior N(0, I) and the experts that are present, in float32.

        1/σ² = 1 + Σ_j 1/σ_j²        μ = σ² Σ_j μ_j / σ_j²

    latents: mean and log-variance, one half of the C channels each. Returns a Gaussian of [B C/2 x y z]; the prior
    where nothing is present. Source: the product of Gaussian densities; Wu & Goodman 2018 for its use in autoencoders.

    >>> one = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1, 1)
    >>> fused = product_of_experts({"t1c": one}, torch.tensor([[True]]), ModalitySet(("t1c",)))
    >>> float(fused.mean), round(float(fused.log_var.exp()), 3)
    (1.5, 0.5)
    """
    mean, _ = Gaussian.split(next(iter(latents.values())), dim=1)
    precision = torch.ones_like(mean, dtype=torch.float32)
    weighted = torch.zeros_like(precision)
    for name, rows in columns(present, modalities):
        expert = Gaussian.split(latents[name].float(), dim=1)
        trust = (-expert.log_var).exp() * rows[:, None, None, None, None]
        precision = precision + trust
        weighted = weighted + trust * expert.mean
    return Gaussian(weighted / precision, -precision.log())


def _sampled(q: Gaussian) -> Tensor:
    """μ + σ ε, through which gradients reach μ and σ."""
    return q.mean + (0.5 * q.log_var).exp() * torch.randn_like(q.mean)


def _kl_to_prior(posteriors: Sequence[Gaussian]) -> Float[Tensor, ""]:
    """KL to N(0, I), the mean over elements and then over levels."""
    return torch.stack([kl(q, Gaussian.unit(torch.zeros_like(q.mean))).mean() for q in posteriors]).mean()


class _Encoder(nn.Module):
    """One sequence's encoder: image [B 1 X Y Z] → {level: [B 2c x y z]}, means and log-variances."""

    def __init__(self, shape: UHVEDSize) -> None:
        super().__init__()
        finest, *coarser = shape.channels
        if shape.light:
            first: nn.Module = _convolution(1, finest)
        else:
            first = nn.Sequential(nn.Conv3d(1, finest, 1), nn.LeakyReLU(0.01), _block(finest, finest, finest))
        deeper = [_block(before, c, c) for before, c in zip(shape.channels, coarser, strict=False)]
        self.levels = nn.ModuleList([first, *deeper])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        latents = {}
        for index, level in enumerate(self.levels, start=1):
            x = level(x if index == 1 else F.max_pool3d(x, 2))
            mean, log_var = Gaussian.split(x, dim=1)
            latents[f"x{index}"] = Gaussian(mean, log_var.clamp(-LOG_VAR_LIMIT, LOG_VAR_LIMIT)).joined(dim=1)
        return latents


class _Decoder(nn.Module):
    """Samples [B c_l x y z] of all levels, the finest first → [B out X Y Z], by a head of ``out`` channels."""

    def __init__(self, shape: UHVEDSize, head: nn.Conv3d) -> None:
        super().__init__()
        sampled = [c // 2 for c in shape.channels]
        self.levels = nn.ModuleList(
            _block(sampled[i + 1] + sampled[i], None if shape.light and i == 0 else shape.channels[i], sampled[i])
            for i in reversed(range(len(sampled) - 1))
        )
        self.head = head

    def forward(self, samples: Sequence[Tensor]) -> Tensor:
        *skips, x = samples
        for level, skip in zip(self.levels, reversed(skips), strict=True):
            up = F.interpolate(x, scale_factor=2.0, mode="trilinear", align_corners=False)
            x = level(torch.cat([up, skip], dim=1))
        out: Tensor = self.head(x)
        return out


def _block(before: int, hidden: int | None, after: int) -> nn.Sequential:
    """[norm, act, convolution] twice, or once without ``hidden``: what comes out is not yet normalised."""
    if hidden is None:
        return nn.Sequential(normalise(before), _convolution(before, after))
    return nn.Sequential(
        normalise(before), _convolution(before, hidden), normalise(hidden), _convolution(hidden, after)
    )


def _convolution(before: int, after: int) -> nn.Conv3d:
    """3³ without a bias. He's initialisation gives means of size 1: smaller ones would drown in the sampled noise."""
    convolution = Conv3d(before, after, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, a=0.01)
    return convolution


SIZES: dict[str, UHVEDSize] = {
    "tiny": UHVEDSize((8, 16, 32, 32), light=True),
    "faithful": UHVEDSize((8, 16, 32, 64)),
}
