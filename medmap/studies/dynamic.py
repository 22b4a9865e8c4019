r"""Should the anchor move?

The paper leaves open whether P_mix should follow the training or the patient. `ema` remembers the moments of the
mixture over the training, `gated` weighs the modalities anew for each patient; with filling the segmentation loss can
reach the gate. Hypothesis: an anchor that knows the patient beats one that does not. P\* and α = 0 are the controls.
The comparisons with P\* were added when the runs were done and had been looked at.
"""

from medmap.evidence.plan import Arm, Study
from medmap.evidence.views import latent_table
from medmap.studies._common import NONE, PHANTOMS, PSTAR, RECIPE

STUDY = Study(
    name="dynamic",
    asks="Does an anchor that follows the training or the patient beat a fixed rule?",
    about=__doc__.partition("\n\n")[2],
    data=PHANTOMS,
    recipe=RECIPE,
    arms=(
        Arm("α = 0", (NONE,)),
        Arm("P*", (PSTAR,), against="α = 0"),
        Arm("ema", ("align.anchor=ema",), against="α = 0"),
        Arm("gated", ("align.anchor=gated",), against="α = 0"),
        Arm("gated, filled", ("align.anchor=gated", "align.fill=kept"), against="α = 0"),
        Arm("P*, filled", (PSTAR, "align.fill=kept"), against="α = 0"),
    ),
    also=(("ema", "P*"), ("gated", "P*"), ("gated, filled", "P*, filled")),
    more=latent_table,
)
