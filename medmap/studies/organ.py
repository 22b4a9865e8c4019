"""Does it carry over to another organ?

Alignment speaks of modalities, not of brains. Livers with lesions in three phases of contrast agent (the phantom's),
the same network, the same recipe.
"""

from medmap.evidence.plan import Arm, Phantoms, Study
from medmap.phantom import Settings
from medmap.studies._common import NONE, PSTAR, RECIPE

LIVERS = Phantoms("livers-4mm", test=60, settings=Settings(organ="liver", spacing_mm=4.0))

STUDY = Study(
    name="organ",
    asks="Does alignment change Dice of lesions of the liver in three phases?",
    about=__doc__.partition("\n\n")[2],
    data=LIVERS,
    recipe=RECIPE,
    arms=(Arm("α = 0", (NONE,)), Arm("P*", (PSTAR,), against="α = 0")),
)
