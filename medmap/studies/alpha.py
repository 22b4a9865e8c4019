"""How hard should latents be pulled?

The paper gives no value of α. Hypothesis: there is a best one, below it nothing happens, above it all latents become
alike and the full set of sequences, which had most to tell them apart by, suffers first (over-alignment). So Dice
with everything is shown beside Dice with something missing.
"""

from medmap.evidence.findings import MEAN, Outcome
from medmap.evidence.plan import FULL, MISSING, Arm, Study
from medmap.evidence.views import levels_along
from medmap.studies._common import NONE, PHANTOMS, PSTAR, RECIPE

AXIS = "α, weight of the alignment loss (no unit)"

STUDY = Study(
    name="alpha",
    asks="From which α on does alignment help, and from which does it hurt?",
    about=__doc__.partition("\n\n")[2],
    data=PHANTOMS,
    recipe=RECIPE,
    arms=(
        Arm("α = 0", (NONE,), series="P*", at=0.0),
        *(
            Arm(f"α = {alpha:g}", (PSTAR, f"align.alpha={alpha:g}"), against="α = 0", series="P*", at=alpha)
            for alpha in (0.001, 0.01, 0.1, 1.0, 10.0)
        ),
    ),
    axis=AXIS,
    draws={
        "full": lambda results: levels_along(
            results, {"everything given": Outcome("test", FULL, MEAN), MISSING: Outcome("test", MISSING, MEAN)}
        )
    },
)
