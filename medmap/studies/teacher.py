"""Does a teacher help a student with one sequence, and does aligning the teacher help more?

PMKL (Chen et al., IEEE TMI 2022) teaches a network for one modality by one that sees all four; MedMAP aligns the
teacher's latents (arXiv 2408.09465), and its seed experiment is this: three modalities are missing. The control has
the same students with no teacher. The outcome is the mean over the students, each alone
with its one sequence. Two crops a step, or the teacher's view of a patient could not be told from its view of others.
"""

from medmap.evidence.plan import SINGLE, Arm, Study
from medmap.studies._common import NONE, PHANTOMS, PSTAR, RECIPE, TINY

ALONE = "model.loss_weights={kd: 0, contrastive: 0}"

STUDY = Study(
    name="teacher",
    asks="With three of four modalities missing: what does a teacher bring, and what does MedMAP add?",
    about=__doc__.partition("\n\n")[2],
    data=PHANTOMS,
    recipe=(*RECIPE, "model.name=pmkl", TINY, "train.batch_size=2"),
    arms=(
        Arm("no teacher", (NONE, ALONE)),
        Arm("teacher", (NONE,), against="no teacher"),
        Arm("teacher with P*", (PSTAR,), against="teacher"),
    ),
    minutes=8,
    group=SINGLE,
)
