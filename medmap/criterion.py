"""The criterion, and the sum of all loss terms."""

from __future__ import annotations

from functools import reduce
from operator import or_

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from medmap.align import AlignedSegmenter, Output
from medmap.config import Config
from medmap.core.processes import averaged, averaged_where_there, gathered, processes
from medmap.models.backbone import Auxiliary

SMOOTH = 1e-5
"""Added to both halves of the fraction, so that a class that nobody has or says is no fault."""


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
            include_background=False, to_onehot_y=True, softmax=True, batch=True, smooth_nr=SMOOTH, smooth_dr=SMOOTH
        )

    def __call__(self, logits: Float[Tensor, "B K x y z"], target: Int[Tensor, "B X Y Z"]) -> Tensor:
        """A scalar; a target of another resolution is sampled at the logits' voxels."""
        target = target[:, None]
        if target.shape[2:] != logits.shape[2:]:
            target = F.interpolate(target.float(), size=logits.shape[2:], mode="nearest").long()
        if processes() > 1:
            return _of_all_rows(logits.float(), target)
        loss: Tensor = self.loss(logits.float(), target)
        return loss


def _of_all_rows(logits: Float[Tensor, "b K x y z"], target: Int[Tensor, "b 1 x y z"]) -> Tensor:
    """The same loss of the rows of all processes, each of which may have some: sums first, then fractions."""
    p = logits.softmax(dim=1)[:, 1:]
    y = torch.zeros_like(logits).scatter_(1, target, 1)[:, 1:]
    found, said, true = averaged(torch.stack([x.sum(dim=(0, 2, 3, 4)) for x in (p * y, p, y)]))
    smooth = SMOOTH / processes()  # as these are means over the processes
    dice = (2 * found + smooth) / (said + true + smooth)
    surprise = averaged(F.cross_entropy(logits, target[:, 0], reduction="sum"))
    return 1 - dice.mean() + surprise / averaged(logits.new_tensor(target.numel()))


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
    Where several processes share the batch, all of them get the loss of the whole batch: each asks for the terms that
    any of them has, and an own term is the mean over those that have it.
    """
    weights = term_weights(output, config)
    wanted = {name: (w, name not in output.losses) for name, w in weights.items() if _counts(output, name, w)}
    terms: dict[str, Tensor] = {}
    loss = torch.zeros((), device=output.logits.device)
    for name, (weight, supervised) in reduce(or_, gathered(wanted)).items():
        if supervised:
            logits, rows = _supervised(output, name)
            counted = slice(None) if rows is None or bool(rows.all()) else rows
            terms[name] = criterion(logits[counted], target[counted])
        else:
            term = output.losses.get(name)
            value = term if term is None or isinstance(term, Tensor) else term(target)
            terms[name] = averaged_where_there(None if value is None else value.float(), loss)
        loss = loss + weight * terms[name]
    return loss, terms


def _counts(output: Output, name: str, weight: float) -> bool:
    """Whether there is something to work out."""
    if name in output.losses:
        return bool(weight) or isinstance(output.losses[name], Tensor)
    _, rows = _supervised(output, name)
    return bool(weight) and (rows is None or bool(rows.any()))


def _supervised(output: Output, name: str) -> Auxiliary:
    """The logits of a term of the criterion; no row of them where only another process has any."""
    if name == "dice_ce":
        return Auxiliary(output.logits)
    nothing = torch.zeros(len(output.logits), dtype=torch.bool, device=output.logits.device)
    return output.auxiliary.get(name, Auxiliary(output.logits, nothing))


class Lesson(nn.Module):
    """The network and its loss as one module: whoever watches what it gives back sees exactly what is learned from.

    A network gives more than is learned from, and a term may come as a function, in which nobody can look for weights.
    """

    def __init__(self, network: AlignedSegmenter, config: Config) -> None:
        super().__init__()
        self.network, self.config, self.criterion = network, config, DiceCE()
        # PyTorch warns where it was told that some weights may rest and finds none: this one always does.
        self.resting = nn.Parameter(torch.zeros((), device=next(network.parameters()).device))

    def forward(
        self, images: Tensor, seen: Tensor, kept: Tensor, target: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The loss, its terms by name, and the latents that were aligned, by level."""
        output: Output = self.network(images, seen, kept)
        with torch.autocast(images.device.type, enabled=False):  # losses are worked out in float32
            loss, terms = total_loss(output, target, self.criterion, self.config)
        latents = {level: z.detach() for level, z in output.latents.items()}
        return loss, {name: term.detach() for name, term in terms.items()}, latents
