"""Does alignment need modalities that depend on each other?

The paper's bound treats latents one by one; the gap to the joint form is their total correlation. Real modalities
share a head, a coil and a moving patient. Hypothesis: the more of it is shared, the less there is to gain from
alignment, or the more: the paper does not say. The complex noise of any two modalities is correlated by ρ here, and so
is their coils' bias; the noise is three times as strong as usual. The total correlation is of latents that are averaged
over eighths of a brain, where the noise of single voxels is gone: what it can see of ρ is the bias.
"""

from dataclasses import replace

from medmap.evidence.plan import Study
from medmap.evidence.views import effects_along, gain_at_ends, latents_along
from medmap.phantom import Settings
from medmap.studies._common import PHANTOMS, RECIPE, pairs

AXIS = "ρ, correlation of noise and bias between modalities (no unit)"
NOISE = 0.045

STUDY = Study(
    name="dependence",
    asks="Does what alignment brings depend on how strongly noise and bias are correlated between modalities?",
    about=__doc__.partition("\n\n")[2],
    data=PHANTOMS,
    recipe=RECIPE,
    arms=pairs(
        [
            (
                f"ρ = {rho:g}",
                rho,
                replace(
                    PHANTOMS,
                    name=f"phantoms-4mm-rho{100 * rho:.0f}",
                    settings=Settings(spacing_mm=4.0, noise=NOISE, noise_correlation=rho, bias_correlation=rho),
                ),
                (),
            )
            for rho in (0.0, 0.5, 0.8, 0.95)
        ]
    ),
    axis=AXIS,
    more=gain_at_ends,
    draws={
        "gain": effects_along,
        "dependence": lambda results: latents_along(
            results, ("total_correlation", "nats"), "total correlation of latents, nats"
        ),
    },
)
