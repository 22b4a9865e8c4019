"""Networks: one paper, one file. A new backbone is a file beside these and a line in BACKBONES."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches

from medmap.core.modality import ModalitySet
from medmap.errors import ConfigError
from medmap.models.acn import ACN
from medmap.models.backbone import Backbone
from medmap.models.check import check_backbone as check_backbone
from medmap.models.mmformer import MMFormer
from medmap.models.pmkl import PMKL
from medmap.models.rfnet import RFNet
from medmap.models.uhved import UHVED
from medmap.models.unet import UNet

Builder = Callable[[ModalitySet, int, str], Backbone]

BACKBONES: dict[str, Builder] = {
    "unet": UNet,
    "pmkl": PMKL,
    "mmformer": MMFormer,
    "acn": ACN,
    "rfnet": RFNet,
    "uhved": UHVED,
}


def build_backbone(
    name: str, modalities: ModalitySet, classes: int, size: str, students: Sequence[ModalitySet] = ()
) -> Backbone:
    """A backbone by name; students: of a PMKL, by the subset that each answers, where they are not the usual ones.

    Raises ConfigError with the nearest name for a backbone that does not exist, and for students of any other.
    """
    if name not in BACKBONES:
        near = get_close_matches(name, BACKBONES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"backbone {name!r} is not known; {hint}expected one of {', '.join(BACKBONES)}")
    if not students:
        return BACKBONES[name](modalities, classes, size)
    if BACKBONES[name] is not PMKL:
        raise ConfigError(f"model.students: {name} has none; it answers every subset by itself. Only pmkl has students")
    return PMKL(modalities, classes, size, students)
