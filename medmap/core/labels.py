"""Label schemes: what the codes in a file mean, and which classes make up a region.

Two layers, so that a network never meets a file's code. A *class* is one exclusive tissue (background, ncr, ed, et, …)
and has an index 0 … K−1; the network's softmax runs over classes. A *region* is a union of classes (WT ⊇ TC ⊇ ET for
glioma); its probability is the sum of its classes'. A *scheme* says which code stands for which class in a family of
files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmap.errors import InputError


@dataclass(frozen=True)
class LabelScheme:
    """A family's label codes, its classes and its regions.

    name:    what the user calls it, e.g. ``brats2023``
    classes: class names; index in this tuple = index in the softmax; the first is the background
    codes:   {class name: code in the file}; the background is always 0
    regions: {region name: class names it is the union of}, in the order of the tables

    >>> SCHEMES["brats2021"].encode(np.array([0, 1, 2, 4])).tolist()
    [0, 1, 2, 3]
    >>> SCHEMES["brats2021"].decode(np.array([0, 1, 2, 3])).tolist()
    [0, 1, 2, 4]
    """

    name: str
    classes: tuple[str, ...]
    codes: Mapping[str, int]
    regions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "codes", {c: int(self.codes[c]) for c in self.codes})
        object.__setattr__(self, "regions", {r: tuple(c) for r, c in self.regions.items()})
        if set(self.codes) != set(self.classes[1:]):
            raise InputError(
                f"label scheme {self.name}: codes are given for {sorted(self.codes)}, "
                f"classes besides the background are {sorted(self.classes[1:])}; give each class one code"
            )
        if len(set(self.codes.values())) < len(self.codes) or not all(0 < v < 256 for v in self.codes.values()):
            raise InputError(f"label scheme {self.name}: codes must be distinct and within 1…255, found {self.codes}")
        for region, members in self.regions.items():
            unknown = set(members) - set(self.classes[1:])
            if unknown or not members:
                raise InputError(
                    f"label scheme {self.name}: region {region} is made of {list(members)}; "
                    f"its members must be among {list(self.classes[1:])}"
                )

    def encode(self, labels: NDArray[Any], what: str = "labels") -> NDArray[np.uint8]:
        """File codes → class indices. Raises InputError naming ``what`` and the codes the scheme does not know."""
        values = np.unique(labels)
        known = {0, *self.codes.values()}
        unknown = [v.item() for v in values if v.item() not in known]
        if unknown:
            raise InputError(
                f"{what}: found label {', '.join(f'{v:g}' for v in unknown[:8])}; scheme {self.name} knows "
                f"{', '.join(f'{code} = {name}' for name, code in self.codes.items())}. "
                f"Name the right scheme with --labels ({', '.join(SCHEMES)})"
            )
        table = np.zeros(256, np.uint8)
        for index, name in enumerate(self.classes[1:], start=1):
            table[self.codes[name]] = index
        classes: NDArray[np.uint8] = table[np.asarray(labels).astype(np.uint8)]
        return classes

    def decode(self, classes: NDArray[Any]) -> NDArray[np.uint8]:
        """Class indices → file codes."""
        table = np.array([0, *(self.codes[name] for name in self.classes[1:])], np.uint8)
        codes: NDArray[np.uint8] = table[classes]
        return codes

    def members(self, region: str) -> tuple[int, ...]:
        """Class indices that make up a region."""
        return tuple(self.classes.index(name) for name in self.regions[region])

    def region_mask(self, classes: NDArray[Any], region: str) -> NDArray[np.bool_]:
        """Bool mask of a region in a map of class indices."""
        return np.isin(classes, self.members(region))

    def without(self, left_out: Collection[str]) -> tuple[NDArray[np.uint8], dict[str, str]]:
        """How a map of classes looks in which some regions are not told: classes that only they tell apart are one.

        Returns UInt8[K], the class that stands for each class (0 where no region is left that holds it), and
        {class that stands for several: the smallest region left that holds them}.

        >>> table, meaning = SCHEMES["brats2023"].without({"ET"})
        >>> table.tolist(), meaning  # background, ncr, ed, et
        ([0, 1, 2, 1], {'ncr': 'TC'})
        """
        told = [region for region in self.regions if region not in left_out]
        inside = {c: [region for region in told if c in self.regions[region]] for c in self.classes[1:]}
        hidden = {c: sum(c in self.regions[region] for region in left_out) for c in inside}
        table, meaning = np.zeros(len(self.classes), np.uint8), {}
        for index, name in enumerate(self.classes[1:], start=1):
            alike = [c for c in inside if inside[c] == inside[name]]
            if inside[name]:
                one = min(alike, key=lambda c: hidden[c])
                table[index] = self.classes.index(one)
                if len(alike) > 1:
                    meaning[one] = min(inside[name], key=lambda region: len(self.regions[region]))
        return table, meaning

    def same_classes(self, other: LabelScheme) -> bool:
        """Whether both schemes mean the same classes (their codes in the file may differ)."""
        return self.classes == other.classes

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for a manifest or a model card."""
        return {
            "name": self.name,
            "classes": list(self.classes),
            "codes": dict(self.codes),
            "regions": {region: list(members) for region, members in self.regions.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LabelScheme:
        """The inverse of `to_dict`."""
        regions = {region: tuple(members) for region, members in data["regions"].items()}
        return cls(data["name"], tuple(data["classes"]), data["codes"], regions)


_GLIOMA = ("background", "ncr", "ed", "et")
_REGIONS = {"WT": ("ncr", "ed", "et"), "TC": ("ncr", "et"), "ET": ("et",)}

SCHEMES: dict[str, LabelScheme] = {
    scheme.name: scheme
    for scheme in (
        LabelScheme("brats2021", _GLIOMA, {"ncr": 1, "ed": 2, "et": 4}, _REGIONS),
        LabelScheme("brats2023", _GLIOMA, {"ncr": 1, "ed": 2, "et": 3}, _REGIONS),
        LabelScheme("brats2024", (*_GLIOMA, "rc"), {"ncr": 1, "ed": 2, "et": 3, "rc": 4}, {**_REGIONS, "RC": ("rc",)}),
        LabelScheme("msd", _GLIOMA, {"ed": 1, "ncr": 2, "et": 3}, _REGIONS),
        LabelScheme(
            "liver",
            ("background", "liver", "lesion"),
            {"liver": 1, "lesion": 2},
            {"LIVER": ("liver", "lesion"), "LESION": ("lesion",)},
        ),
    )
}
"""Known families. BraTS 2018–2021 share ``brats2021``; 4 means enhancing tumour there and resection cavity in 2024."""


def scheme_named(name: str) -> LabelScheme:
    """A known scheme by name. Raises InputError with the list of names."""
    if name not in SCHEMES:
        raise InputError(f"label scheme {name!r} is not known; expected one of {', '.join(SCHEMES)}")
    return SCHEMES[name]
