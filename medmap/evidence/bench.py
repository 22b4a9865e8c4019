"""Methods side by side: the same patients, splits, masks and budget; what `medmap bench` runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from medmap.errors import InputError
from medmap.evidence.plan import Arm, Data, Study

_METHOD = re.compile(r"(?P<name>[\w-]+)(/(?P<size>\w+))?(:(?P<seeds>[1-9]\d*))?")
_ANCHOR = re.compile(r"(?P<name>\w+)(:(?P<fixed>\w+))?(@(?P<level>\w+))?(=(?P<alpha>[\d.e-]+))?")


class Method(NamedTuple):
    """A backbone, its size where it is not the recipe's, and its number of seeds where it is not everybody's."""

    name: str
    size: str | None
    seeds: int | None


def parse_method(text: str) -> Method:
    """``NAME[/SIZE][:SEEDS]``.

    >>> parse_method("mmformer/tiny:1")
    Method(name='mmformer', size='tiny', seeds=1)
    """
    from medmap.models import BACKBONES

    found = _METHOD.fullmatch(text)
    if found is None or found["name"] not in BACKBONES:
        raise InputError(
            f"method {text!r}: expected a backbone, and if you like its size and number of seeds, as in "
            f"unet/small:3; there are {', '.join(BACKBONES)}"
        )
    return Method(found["name"], found["size"], int(found["seeds"]) if found["seeds"] else None)


def parse_anchor(text: str) -> tuple[str, ...]:
    """Settings of ``NAME[:MODALITY][@LEVEL][=ALPHA]``.

    >>> parse_anchor("pk:t1c@x4=0.01")
    ('align.anchor=pk', 'align.fixed=t1c', 'align.levels=[x4]', 'align.alpha=0.01')
    """
    from medmap.config import AlignConfig

    known = AlignConfig.model_fields["anchor"].annotation.__args__  # type: ignore[union-attr]
    found = _ANCHOR.fullmatch(text)
    if found is None or found["name"] not in known:
        raise InputError(
            f"anchor {text!r}: expected an anchor, and if you like its modality, level and α, as in pk:t1c@x4=0.01; "
            f"there are {', '.join(known)}"
        )
    keys = {"fixed": "align.fixed={}", "level": "align.levels=[{}]", "alpha": "align.alpha={}"}
    more = [key.format(found[name]) for name, key in keys.items() if found[name]]
    return (f"align.anchor={found['name']}", *more)


def bench(
    methods: Sequence[str],
    anchors: Sequence[str],
    data: Data,
    recipe: Sequence[str],
    seeds: int,
    name: str,
    unet: str | None = None,
) -> Study:
    """Every method with every anchor; the first anchor of a method is what its others are compared with.

    unet: size of a U-Net that names none, others being tiny then, and all called by it; the configuration's where None

    Raises InputError for a method or an anchor that there is not, and with fewer than one of either.
    """
    if not methods or not anchors:
        raise InputError("a bench needs a method and an anchor or more, such as --methods unet --align none,pstar")
    arms = []
    for method in map(parse_method, methods):
        if unet is not None and method.size is None:
            method = method._replace(size=unet if method.name == "unet" else "tiny")
        model = [f"model.name={method.name}", *([f"model.size={method.size}"] if method.size else [])]
        called = method.name if method.size is None else f"{method.name} {method.size}"
        for number, anchor in enumerate(anchors):
            against = f"{called}, {anchors[0]}" if number else ""
            settings = (*model, *parse_anchor(anchor))
            arms.append(Arm(f"{called}, {anchor}", settings, against, seeds=method.seeds))
    about = f"Methods: {', '.join(methods)}. Anchors: {', '.join(anchors)}."
    asks = "Which method, and what does alignment change?"
    return Study(name, asks, about, data, tuple(arms), tuple(recipe), seeds, minutes=8, by_subset=True)
