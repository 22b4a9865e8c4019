"""Does alignment help where patients to learn from lack sequences themselves?

Dropping a sequence in training is not the same as never having had it: nothing can be drawn in its place, and fewer
pairs are seen together. Hypothesis: that is where an anchor helps. Each sequence of each patient to learn from is
absent with the probability on the axis; patients who validate and who test are complete.
"""

from dataclasses import replace

from medmap.evidence.plan import Study
from medmap.evidence.views import effects_along, gain_at_ends
from medmap.studies._common import PHANTOMS, RECIPE, pairs

STUDY = Study(
    name="incomplete",
    asks="Does what alignment brings depend on how many sequences are absent from the training data?",
    about=__doc__.partition("\n\n")[2],
    data=PHANTOMS,
    recipe=RECIPE,
    arms=pairs(
        [
            (
                f"{100 * rate:.0f} % absent",
                rate,
                replace(PHANTOMS, name=f"phantoms-4mm-missing{100 * rate:.0f}", missing=rate) if rate else PHANTOMS,
                (),
            )
            for rate in (0.0, 0.25, 0.5)
        ]
    ),
    axis="share of the training sequences that are absent",
    more=gain_at_ends,
    draws={"gain": effects_along},
)
