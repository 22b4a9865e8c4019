"""How every figure looks and how it spells: sizes, colours, markers, names of sequences, regions and metrics."""

from __future__ import annotations

import numpy as np

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "legend.frameon": False,
    "lines.linewidth": 2.2,
}
LABELS = {"t1n": "T1n", "t1c": "T1c", "t2w": "T2w", "t2f": "FLAIR"}
REGION_NAMES = {"WT": "whole tumour", "TC": "tumour core", "ET": "enhancing tumour", "RC": "resection cavity"}
HUES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
REGION_HUES = ("#56B4E9", "#D55E00", "#F0E442", "#009E73", "#CC79A7")
INK, FAINT = "#1a1a1a", "#d5d5d5"
NUMBERED_ROWS = 31  # a heat map of more subsets (M > 5) is drawn without numbers; the table has them

METRIC_NAMES = {
    "dice": "Dice",
    "hd95_mm": "HD95 (mm)",
    "nsd": "surface Dice",
    "volume_error_ml": "volume error (ml)",
    "lesion_dice": "lesion-wise Dice",
    "lesion_hd95_mm": "lesion-wise HD95 (mm)",
    "lesion_f1": "lesion F1",
}


def label(text: str) -> str:
    """The field's spelling of every sequence named in a text.

    >>> label("t1c+t2f"), label("without t1c"), label("adc")
    ('T1c + FLAIR', 'without T1c', 'adc')
    """
    return " ".join(LABELS.get(word, word) for word in text.replace("+", " + ").split())


def number(value: float | None, digits: int = 2) -> str:
    """A number as the figures and tables print it; a dash where it is undefined.

    >>> number(0.7149), number(None), number(float("nan"))
    ('0.71', '–', '–')
    """
    return f"{value:.{digits}f}" if value is not None and np.isfinite(value) else "–"
