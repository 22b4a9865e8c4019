"""One function per figure: plain data in, a matplotlib Figure out. Nothing is shown, nothing is written.

A new figure is one function in the file of its subject and one row of ``FIGURES``.
"""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from medmap.figures.examples import example_overlays
from medmap.figures.latents import latent_pca, modality_gap
from medmap.figures.subsets import cost_of_losing, mean_loss, order_subsets, subset_heatmap
from medmap.figures.training import anchor_weights, learning_curves

__all__ = [
    "FIGURES",
    "anchor_weights",
    "cost_of_losing",
    "example_overlays",
    "latent_pca",
    "learning_curves",
    "mean_loss",
    "modality_gap",
    "order_subsets",
    "subset_heatmap",
]

FIGURES: dict[str, Callable[..., Figure | None]] = {
    "subset_heatmap": subset_heatmap,
    "cost_of_losing": cost_of_losing,
    "learning_curves": learning_curves,
    "anchor_weights": anchor_weights,
    "latent_pca": latent_pca,
    "example_overlays": example_overlays,
}
