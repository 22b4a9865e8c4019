"""Does alignment help a network on a population that it was not trained on?

The paper names unequal intensity statistics and a shift between training and test data as where alignment should fail
or shine. A network learns from BraTS 2021 and is asked about BraTS-Africa, or from phantoms and is asked about both.
(From BraTS-Africa to BraTS 2021: the main table.)
"""

from dataclasses import replace

from medmap.evidence.plan import Arm, Patients, Phantoms, Study
from medmap.phantom import Settings
from medmap.studies._common import NONE, PSTAR, REAL, SMALL

ENDS = (Patients("ssa-2mm", 1, 3.0), Patients("brats2021-2mm", 1, 3.0))
GLIOMAS = Patients("brats2021-2mm", 2, 3.0, others=ENDS[:1])
SIMULATED = Phantoms("phantoms-3mm", test=20, settings=Settings(spacing_mm=3.0), others=ENDS)


def _arms(called: str, data: Patients | Phantoms) -> tuple[Arm, ...]:
    none = Arm(f"{called}, α = 0", (NONE,), data=data)
    return none, replace(none, name=f"{called}, P*", settings=(PSTAR,), against=none.name)


STUDY = Study(
    name="shift",
    asks="Trained on one population and asked about another: does alignment change Dice there?",
    about=__doc__.partition("\n\n")[2],
    data=SIMULATED,
    recipe=(*REAL, SMALL),
    arms=(*_arms("from BraTS 2021", GLIOMAS), *_arms("from phantoms", SIMULATED)),
    minutes=4,
)
