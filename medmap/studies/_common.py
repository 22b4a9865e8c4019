"""What studies have in common: small phantoms, patients, and recipes that a core carries out in minutes."""

from collections.abc import Sequence
from dataclasses import replace

from medmap.evidence.plan import Arm, Data, Patients, Phantoms

PHANTOMS = Phantoms("phantoms-4mm", test=60)
MANY_PHANTOMS = replace(PHANTOMS, test=120)

RECIPE = (
    "model.size=tiny",
    "sampling.subsets=uniform",
    "train.steps=1200",
    "train.batch_size=1",
    "train.patch=[32,32,32]",
    "train.lr=2e-3",
    "train.ema=0.99",
    "train.validate_every=400",
)
"""For phantoms at 4 mm: a minute and a half of a core for a tiny U-Net. Chosen with α = 0 on validation phantoms, where
its three seeds reach 58, 57 and 58 % (`validation` in docs/studies/runs); at 4e-3 they were 57, 55 and 56 %."""

AFRICA = Patients("ssa-2mm", 3, 3.0, others=(Patients("brats2021-2mm", 1, 3.0),))
"""BraTS-Africa in three folds, at 3 mm; BraTS 2021, another population, is asked about as well."""

REAL = (
    "sampling.subsets=uniform",
    "train.steps=600",
    "train.batch_size=1",
    "train.patch=[48,48,48]",
    "train.lr=2e-3",
    "train.ema=0.99",
    "train.validate_every=200",
)
"""For patients at 3 mm, chosen with α = 0 on the validation patients of one fold: a small U-Net reaches 36 % there,
37 % at 4e-3, 35 % after twice the steps, and a tiny one 35 %. So U-Nets are small; others are tiny, being slow."""

SMALL, TINY = "model.size=small", "model.size=tiny"

NONE, PSTAR = "align.anchor=none", "align.anchor=pstar"


def pairs(where: Sequence[tuple[str, float, Data, Sequence[str]]]) -> tuple[Arm, ...]:
    """P* against α = 0 on each of some data: (what they are called, their number on the axis, they, more settings)."""
    arms = []
    for called, at, data, settings in where:
        none = Arm(f"{called}, α = 0", (NONE, *settings), series="α = 0", at=at, data=data)
        arms += [none, Arm(f"{called}, P*", (PSTAR, *settings), against=none.name, series="P*", at=at, data=data)]
    return tuple(arms)
