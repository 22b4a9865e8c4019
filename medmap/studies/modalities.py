"""How many modalities does alignment need?

With two modalities an anchor is the mean of a pair, with five there is more to agree on. Hypothesis: the more
modalities, the more alignment brings. Apparent diffusion is the fifth.
"""

from dataclasses import replace

from medmap.core.modality import ModalitySet
from medmap.evidence.plan import Study
from medmap.evidence.views import effects_along, gain_at_ends
from medmap.phantom import Settings
from medmap.studies._common import PHANTOMS, RECIPE, pairs

SETS = {2: ("t1c", "t2f"), 3: ("t1c", "t2w", "t2f"), 4: (), 5: ("t1n", "t1c", "t2w", "t2f", "adc")}

STUDY = Study(
    name="modalities",
    asks="Does what alignment brings depend on the number of modalities?",
    about=__doc__.partition("\n\n")[2],
    data=PHANTOMS,
    recipe=RECIPE,
    arms=pairs(
        [
            (
                f"M = {count}",
                float(count),
                replace(
                    PHANTOMS,
                    name=f"phantoms-4mm-m{count}",
                    settings=Settings(spacing_mm=4.0, modalities=ModalitySet(names)),
                )
                if names
                else PHANTOMS,
                (),
            )
            for count, names in SETS.items()
        ]
    ),
    axis="M, number of modalities",
    more=gain_at_ends,
    draws={"gain": effects_along},
)
