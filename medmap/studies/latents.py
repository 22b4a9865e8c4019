r"""What does alignment do to latents?

The paper shows t-SNE maps in which modalities overlap after alignment. Overlap on a map is no number
([why](../theory.md)); here are some: the gap between modalities, whether a linear probe still guesses the modality,
whether a patient is found again in another modality, effective rank and variance (collapse), before and after
training. Hypothesis: alignment closes the gap at equal Dice. P\* with ten times the usual α shows where that ends.
"""

from medmap.evidence.plan import Arm, Study
from medmap.evidence.views import latent_tables, map_of
from medmap.studies._common import NONE, PHANTOMS, PSTAR, RECIPE

STUDY = Study(
    name="latents",
    asks="Does alignment close the gap between modalities, and what else changes in the latents?",
    about=__doc__.partition("\n\n")[2],
    data=PHANTOMS,
    recipe=RECIPE,
    arms=(
        Arm("α = 0", (NONE,)),
        Arm("P*", (PSTAR,), against="α = 0"),
        Arm("P*, α = 1", (PSTAR, "align.alpha=1"), against="α = 0"),
        Arm("moments", ("align.anchor=moments",), against="α = 0"),
    ),
    more=latent_tables,
    draws={"map-none": map_of("α = 0"), "map-pstar": map_of("P*")},
)
