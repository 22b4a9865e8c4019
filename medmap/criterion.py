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


def term_weights(output: Output, config: Config) -> dict[str, float]:
    """{term: its weight in the loss}, the criterion first.

    From ``model.loss_weights``, by the term's name or the part before its first slash; else what the backbone says;
    else ½ for auxiliary logits and 1 for any other. Of L_align, α divided by the number of levels.
    """
    chosen = {**output.weights, **config.model.loss_weights}
    levels = sum(name.startswith("align/") for name in output.losses)
    usual = {"dice_ce": 1.0, **dict.fromkeys(output.auxiliary, 0.5), **dict.fromkeys(output.losses, 1.0)}
    return {
        name: chosen.get(name, chosen.get(name.partition("/")[0], weight))
        * (config.align.alpha / levels if name.startswith("align/") else 1.0)
        for name, weight in usual.items()
    }


def total_loss(output: Output, target: Tensor, criterion: DiceCE, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """L = Σ weight · term over the criterion, auxiliary logits, own terms and L_align; and each term by name.

    What has weight 0 is named only where it costs nothing; auxiliary logits without a row that counts are no term.
    """
    terms: dict[str, Tensor] = {}
    loss = torch.zeros((), device=output.logits.device)
    for name, weight in term_weights(output, config).items():
        own = output.losses.get(name)
        if isinstance(own, Tensor):
            terms[name] = own
        elif not weight:
            continue
        elif own is not None:
            terms[name] = own(target)
        else:
            logits, rows = (output.logits, None) if name == "dice_ce" else output.auxiliary[name]
            counted = slice(None) if rows is None else rows
            if not len(logits[counted]):
                continue
            terms[name] = criterion(logits[counted], target[counted])
        loss = loss + weight * terms[name]
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
