r"""Which anchor, if any?

MedMAP reports its learned mixture P\* as the best of its anchors, before each fixed modality P^k, before the standard
normal P^N, and all of them before no alignment (arXiv 2408.09465). Hypothesis: so it is. Its weights have no reason
to leave 1/M, so the uniform mixture is the control that P\* has to beat; α = 0 is the control of all, and T without a
loss that of the encoder T. Beside the paper's anchors stand those that carry information
([which](../method.md#anchors-that-carry-information)), for the U-Net alone: that was cut for two cores to carry the
grid, before any result was looked at. Every anchor acts on the deepest latents with α = 0.1, of T on its output; that
of `lckd` from the first validation on, at a third of the steps.
"""

from collections.abc import Mapping

from medmap.evidence.plan import Arm, Study
from medmap.evidence.views import latent_table
from medmap.studies._common import NONE, PHANTOMS, PSTAR, RECIPE, TINY

PUBLISHED = {
    "P*": (PSTAR,),
    "uniform": ("align.anchor=uniform",),
    "P^N": ("align.anchor=pn",),
    **{f"P^{k}": ("align.anchor=pk", f"align.fixed={k}") for k in ("t1n", "t1c", "t2w", "t2f")},
    "T, no loss": (NONE, "model.stem=non_shared"),
    "T with P*": (PSTAR, "model.stem=non_shared", "align.levels=[stem]"),
}
INFORMED = {name: (f"align.anchor={name}",) for name in ("precision", "moments", "ema", "gated", "lckd")}


def _arms(network: str, size: str, anchors: Mapping[str, tuple[str, ...]]) -> tuple[Arm, ...]:
    model = (f"model.name={network}", size)
    none = Arm(f"{network}, α = 0", (*model, NONE))
    return (none, *(Arm(f"{network}, {name}", (*model, *s), against=none.name) for name, s in anchors.items()))


CONTROLS = (("P*", "uniform"), ("T with P*", "T, no loss"))


STUDY = Study(
    name="anchors",
    asks="Does pulling latents to an anchor raise Dice, and does it matter to which?",
    about=__doc__.partition("\n\n")[2],
    data=PHANTOMS,
    recipe=RECIPE,
    arms=(*_arms("unet", TINY, PUBLISHED | INFORMED), *_arms("mmformer", TINY, PUBLISHED)),
    minutes=5,
    also=tuple((f"{network}, {a}", f"{network}, {b}") for network in ("unet", "mmformer") for a, b in CONTROLS),
    more=latent_table,
)
