r"""Is aligning one by one a bound of aligning jointly, and by how much?

KL(q ‖ Π_j P_mix) = TC(q) + Σ_j KL(q_j ‖ P_mix) (the paper's Eq. 8 drops TC ≥ 0, the total correlation). Both sides
are worked out here in closed form. For private encoders q(Z | X) is a product, its TC is 0, and both forms coincide
whatever the modalities have in common; what they have in common is in the aggregate over patients, whose TC is
estimated from test patients, 4 principal components a modality, a shuffled null subtracted ([how](../theory.md)).
Hypothesis: the aggregate TC rises with the correlation ρ of noise and bias, and alignment raises it. Whether the total
of the loss is a bound of the evidence depends on α, too: at α = 0.1 and a mean over elements it is not.
"""

from collections.abc import Iterator

import numpy as np

from medmap.core.joint import FullGaussian, split_kl
from medmap.evidence.plan import Study
from medmap.evidence.results import Results
from medmap.evidence.views import latents_along, total_correlations
from medmap.studies._common import PHANTOMS, RECIPE
from medmap.studies.dependence import AXIS
from medmap.studies.dependence import STUDY as DEPENDENCE

BLOCKS = (4, 4, 4, 4)


def _identity(draws: int = 200, seed: int = 0) -> float:
    """The largest difference of both sides over random Gaussians and anchors, relative to the joint one."""
    rng, worst = np.random.default_rng(seed), 0.0
    for _ in range(draws):
        a, b = rng.normal(size=(16, 20)), rng.normal(size=(4, 6))
        q, anchor = FullGaussian(rng.normal(size=16), a @ a.T / 20), FullGaussian(rng.normal(size=4), b @ b.T / 6)
        both = split_kl(q, BLOCKS, [anchor] * 4)
        worst = max(worst, abs(both.joint - both.dependence - sum(both.each)) / both.joint)
    return worst


def _lines(results: Results) -> Iterator[str]:
    yield (
        f"Both sides of the identity, 200 random Gaussians of four blocks of four: the largest relative difference is "
        f"{_identity():.0e}."
    )
    yield ""
    yield from total_correlations(results)


STUDY = Study(
    name="theory",
    asks="Is what aligning one by one leaves out, the total correlation, there in trained latents?",
    about=__doc__.partition("\n\n")[2],
    data=PHANTOMS,
    recipe=RECIPE,
    arms=DEPENDENCE.arms,
    axis=AXIS,
    more=_lines,
    draws={
        "dependence": lambda results: latents_along(
            results, ("total_correlation", "nats"), "total correlation of latents, nats"
        )
    },
)
