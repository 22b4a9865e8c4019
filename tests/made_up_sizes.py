"""Sizes of few levels and channels, with everything that a level has, for tests that take time by the level."""

from medmap.models.acn import ACNSize
from medmap.models.mmformer import MMFormerSize
from medmap.models.pmkl import PMKLSize
from medmap.models.rfnet import RFNetSize
from medmap.models.uhved import UHVEDSize
from medmap.models.unet import UNetSize

MICRO = {
    "unet": UNetSize((4, 8), light=True),
    "pmkl": PMKLSize((4, 8), light=True),
    "mmformer": MMFormerSize((2, 4, 4, 4, 8), width=8, heads=2, hidden=16, grid=2, light=True),
    "acn": ACNSize((8, 16), blocks=(0, 1), private=(1, 2, 1), entropy=(4,), feature=(8, 8)),
    "rfnet": RFNetSize((4, 8), hidden=8, light=True),
    "uhved": UHVEDSize((4, 8), light=True),
}
