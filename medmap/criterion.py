"""The criterion, the sum of all loss terms, and the watch on collapsing latents."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from medmap.align import Output
from medmap.config import Config
from medmap.core.labels import LabelScheme


class RegionDiceCE:
    """The criterion: soft Dice of the regions (what is evaluated) plus cross-entropy of the classes (what is drawn).

        L = 1 − mean over regions r of  2 Σ p_r y_r / (Σ p_r + Σ y_r)   +   − mean over voxels of log p_y

    p_r is the sum of the softmax over the classes of r; sums run over the whole batch, so that a patch without
    enhancing tumour does not swing between 0 and 1. Dice is MONAI's ``DiceLoss``; it holds to nnU-Net's choice for
    BraTS of scoring regions, with a softmax in place of three sigmoids, so that regions stay nested.
    """

    def __init__(self, scheme: LabelScheme) -> None:
        from monai.losses import DiceLoss

        regions = [scheme.members(region) for region in scheme.regions]
        table = torch.zeros(len(scheme.regions), len(scheme.classes))
        for row, members in enumerate(regions):
            table[row, list(members)] = 1
        self.table = table
        self.dice = DiceLoss(batch=True, smooth_nr=1e-5, smooth_dr=1e-5)

    def __call__(self, logits: Float[Tensor, "B K x y z"], target: Int[Tensor, "B X Y Z"]) -> Tensor:
        """A scalar; a target of another resolution is sampled at the logits' voxels."""
        if target.shape[1:] != logits.shape[2:]:
            target = F.interpolate(target[:, None].float(), size=logits.shape[2:], mode="nearest")[:, 0].long()
        logits = logits.float()
        table = self.table.to(logits.device)
        probabilities = torch.einsum("rk,bkxyz->brxyz", table, logits.softmax(dim=1))
        truth = table.T[target].movedim(-1, 1)
        loss: Tensor = self.dice(probabilities, truth) + F.cross_entropy(logits, target)
        return loss


def total_loss(
    output: Output, target: Tensor, criterion: RegionDiceCE, config: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = criterion + Σ auxiliary + Σ own terms + α · mean over levels of L_align, and each term by name.

    ``model.loss_weights`` weights every term but the first by its name; an auxiliary term without one counts ½.
    """
    weights = config.model.loss_weights
    terms = {"dice_ce": criterion(output.logits, target)}
    loss = terms["dice_ce"]
    for name, auxiliary in output.auxiliary.items():
        rows = slice(None) if auxiliary.rows is None else auxiliary.rows
        if len(auxiliary.logits[rows]):
            terms[name] = criterion(auxiliary.logits[rows], target[rows])
            loss = loss + weights.get(name, 0.5) * terms[name]
    levels = sum(name.startswith("align/") for name in output.losses)
    for name, term in output.losses.items():
        terms[name] = term
        scale = config.align.alpha / levels if name.startswith("align/") else 1.0
        loss = loss + scale * weights.get(name, 1.0) * term
    return loss, terms


def latent_spread(latents: Float[Tensor, "B M C x y z"], seen: Tensor) -> dict[str, float]:
    """The watch on collapse: standard deviation and effective rank of the latents' channels over voxels.

    std:  mean over channels of the standard deviation
    rank: exp of the entropy of the covariance's normalised eigenvalues, between 1 and C (Roy & Vetterli 2007)
    """
    z = latents.detach().float()[seen].movedim(1, -1).flatten(0, -2)
    covariance = torch.cov(z.T).reshape(z.shape[1], z.shape[1])
    share = torch.linalg.eigvalsh(covariance).clamp(min=0)
    share = share / share.sum().clamp(min=1e-12)
    return {
        "std": float(z.std(dim=0).mean()),
        "rank": float(torch.exp(-(share * share.clamp(min=1e-12).log()).sum())),
    }
