"""Which encoder T, and what does a joint one see that it must not?

T maps each image to a latent before the backbone. The paper's is joint (groups = 1), and compares a private one a
modality and a wider one. A joint T mixes images before anything is masked: in its published first form a "missing"
sequence is dropped behind T and so never missing. *Leaking* is that form: it is shown as the fragment would score it,
with the dropped images in T's view, beside what the same network reaches where they are really absent. Each T stands
without a loss (against none) and with P* on its output (against the same T). The loss pulls what there are latents of:
all that a patient has where T is private or leaking, what is kept of it where T is joint; so these differ in how much
is pulled as well. The backbones are a convolutional and a transformer network. Seconds and parameters are in the table.
"""

from medmap.evidence.plan import Arm, Study
from medmap.evidence.views import cost_table, leak_lines
from medmap.studies._common import NONE, PHANTOMS, PSTAR, RECIPE, TINY

STEMS = ("leaking", "joint", "non_shared", "enhanced")


def _arms(network: str, size: str, stems: tuple[str, ...]) -> tuple[Arm, ...]:
    model = (f"model.name={network}", size)
    bare = Arm(f"{network}, no T", (*model, NONE))
    arms = [bare]
    for stem in stems:
        alone = Arm(f"{network}, {stem}, no loss", (*model, NONE, f"model.stem={stem}"), against=bare.name)
        pulled = (*model, PSTAR, f"model.stem={stem}", "align.levels=[stem]")
        arms += [alone, Arm(f"{network}, {stem}", pulled, against=alone.name)]
    return tuple(arms)


STUDY = Study(
    name="encoders",
    asks="Does the encoder T matter, and how much of a joint T's score is a leak?",
    about=__doc__.partition("\n\n")[2],
    data=PHANTOMS,
    recipe=RECIPE,
    arms=(*_arms("unet", TINY, STEMS), *_arms("mmformer", TINY, ("non_shared", "joint"))),
    minutes=4,
    more=lambda results: [*leak_lines(results), "", *cost_table(results)],
)
