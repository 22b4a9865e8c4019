"""The criterion, the sum of all loss terms, and the watch on collapsing latents."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from medmap.align import Output
from medmap.config import Config


class DiceCE:
    """The criterion: soft Dice of the classes plus their cross-entropy, both of MONAI.

        L = 1 − mean over classes k > 0 of  2 Σ p_k y_k / (Σ p_k + Σ y_k)   +   − mean over voxels of log p_y

    p is the softmax; sums run over the whole batch, so that a patch without enhancing tumour does not swing between 0
    and 1. Not the Dice of the nested regions: a voxel given to the innermost class would count in every one of them,
    and networks then begin by calling the whole tumour enhancing.
    """

    def __init__(self) -> None:
        from monai.losses import DiceCELoss

        self.loss = DiceCELoss(
            include_background=False, to_onehot_y=True, softmax=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5
        )

    def __call__(self, logits: Float[Tensor, "B K x y z"], target: Int[Tensor, "B X Y Z"]) -> Tensor:
        """A scalar; a target of another resolution is sampled at the logits' voxels."""
        target = target[:, None]
        if target.shape[2:] != logits.shape[2:]:
            target = F.interpolate(target.float(), size=logits.shape[2:], mode="nearest").long()
        loss: Tensor = self.loss(logits.float(), target)
        return loss


def total_loss(output: Output, target: Tensor, criterion: DiceCE, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
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
