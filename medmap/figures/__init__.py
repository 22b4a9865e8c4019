"""One function per figure: plain data in, a matplotlib Figure out. Nothing is shown, nothing is written.

A new figure is one function in the file of its subject and one row of ``FIGURES``.
"""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from medmap.figures.examples import example_overlays
from medmap.figures.explain import explanation_figure
from medmap.figures.latents import latent_map, latent_pca
from medmap.figures.reliability import reliability_diagram
from medmap.figures.subsets import cost_of_losing, mean_loss, order_subsets, subset_heatmap
from medmap.figures.training import alignment_effect, anchor_weights, learning_curves

__all__ = [
    "FIGURES",
    "alignment_effect",
    "anchor_weights",
    "cost_of_losing",
    "example_overlays",
    "explanation_figure",
    "latent_map",
    "latent_pca",
    "learning_curves",
    "mean_loss",
    "order_subsets",
    "reliability_diagram",
    "subset_heatmap",
]

FIGURES: dict[str, Callable[..., Figure | None]] = {
    "subset_heatmap": subset_heatmap,
    "cost_of_losing": cost_of_losing,
    "learning_curves": learning_curves,
    "alignment_effect": alignment_effect,
    "anchor_weights": anchor_weights,
    "latent_pca": latent_pca,
    "latent_map": latent_map,
    "example_overlays": example_overlays,
    "explanation": explanation_figure,
    "reliability_diagram": reliability_diagram,
}
