r"""Where should latents be pulled?

The paper aligns before the encoders in its first public form and on their first features in its second. Early latents
are places and edges, deep ones say what is there; an anchor may act on either, or on all. Hypothesis: aligning deep
latents costs least, aligning early ones or all of them costs Dice with every sequence at hand. x1 is full resolution,
x4 the deepest; P\* with α = 0.1, which levels that are aligned together share (0.025 each of all four); latents before
normalisation. That levels are compared with the deepest was added when the runs were done and had been looked at.
"""

from medmap.evidence.plan import Arm, Study
from medmap.evidence.views import latent_tables
from medmap.studies._common import NONE, PHANTOMS, PSTAR, RECIPE

LEVELS = {"x4": "[x4]", "x3": "[x3]", "x2": "[x2]", "x1": "[x1]", "all levels": "[x1,x2,x3,x4]"}

STUDY = Study(
    name="levels",
    asks="Does it matter which level of the network is aligned?",
    about=__doc__.partition("\n\n")[2],
    data=PHANTOMS,
    recipe=RECIPE,
    arms=(
        Arm("α = 0", (NONE,)),
        *(Arm(name, (PSTAR, f"align.levels={levels}"), against="α = 0") for name, levels in LEVELS.items()),
    ),
    also=tuple((name, "x4") for name in LEVELS if name != "x4"),
    more=latent_tables,
)
