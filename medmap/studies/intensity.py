"""Does alignment hold where sequences have other intensities than those it learned?

The paper names unequal intensity statistics among modalities as where alignment should fail. The same network is tested
on phantoms of its own kind, on others whose contrast between tissues is drawn at random for every scan, and on others
with three times the noise. Hypothesis: an anchor that pulls modalities together makes one of them stand for another, so
a strange one does more harm.
"""

from dataclasses import replace

from medmap.evidence.plan import Arm, Study
from medmap.phantom import Settings
from medmap.studies._common import NONE, PHANTOMS, PSTAR, RECIPE
from medmap.studies.dependence import NOISE

STRANGE = (
    replace(PHANTOMS, name="random contrast", test=30, seed=2, settings=Settings(spacing_mm=4.0, randomised=1.0)),
    replace(PHANTOMS, name="strong noise", test=30, seed=2, settings=Settings(spacing_mm=4.0, noise=NOISE)),
)
DATA = replace(PHANTOMS, others=STRANGE)

STUDY = Study(
    name="intensity",
    asks="Does alignment change Dice where intensities are not those it learned from?",
    about=__doc__.partition("\n\n")[2],
    data=DATA,
    recipe=RECIPE,
    arms=(
        Arm("α = 0", (NONE,)),
        Arm("P*", (PSTAR,), against="α = 0"),
        Arm("P*, α = 1", (PSTAR, "align.alpha=1"), against="α = 0"),
    ),
)
