"""Do the weights of the learned mixture mean anything?

Without filling, the only force on w is the alignment loss, whose minimiser is w = 1/M (docs/theory.md): hypothesis,
the weights stay there, whatever the seed. A softmax begins there; the published form divides w by
its sum and begins at N(0, 0.1²), where some weight is negative with probability 0.88. Where absent latents are filled
by the anchor, the segmentation reaches w. That the leak is compared with the same filling without it was added when
the runs were done and had been looked at.
"""

from medmap.evidence.plan import Arm, Study
from medmap.evidence.views import last_weights, weights_over_steps
from medmap.studies._common import NONE, PHANTOMS, PSTAR, RECIPE

FORMS = {
    "softmax": (),
    "softmax, detached": ("align.detach=true",),
    "published w/Σw": ("align.weights=ratio",),
    "published w/Σw, detached": ("align.weights=ratio", "align.detach=true"),
    "softmax, filled": ("align.fill=kept",),
    "softmax, filled by what was dropped": ("align.fill=seen",),
    "published w/Σw, filled": ("align.weights=ratio", "align.fill=kept"),
    "uniform, filled": ("align.anchor=uniform", "align.fill=kept"),
}

STUDY = Study(
    name="weights",
    asks="When do the weights of P* leave 1/M, and does it matter?",
    about=__doc__.partition("\n\n")[2],
    data=PHANTOMS,
    recipe=RECIPE,
    arms=(
        Arm("α = 0", (NONE,)),
        *(Arm(name, (PSTAR, *settings), against="α = 0") for name, settings in FORMS.items()),
    ),
    also=(("softmax, filled by what was dropped", "softmax, filled"),),
    more=last_weights,
    draws={"trajectories": weights_over_steps},
)
