"""Modalities have names: an ordered set of them, their aliases, their subsets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from medmap.errors import InputError

ALIASES: dict[str, str] = {
    alias: name
    for name, aliases in {
        "t1n": ("t1", "t1w", "t1n", "native", "t1native"),
        "t1c": ("t1ce", "t1gd", "t1c", "t1post", "t1wce", "ce-gadolinium_t1w", "ce-gd_t1w"),
        "t2w": ("t2", "t2w"),
        "t2f": ("flair", "t2f", "fla", "t2flair", "t2-flair"),
    }.items()
    for alias in aliases
}


def canonical(name: str) -> str:
    """The canonical id of a modality name: aliases are folded, any other name is lower-cased.

    >>> canonical("T1ce"), canonical("FLAIR"), canonical("ADC")
    ('t1c', 't2f', 'adc')
    """
    key = name.strip().lower()
    return ALIASES.get(key, key)


@dataclass(frozen=True)
class ModalitySet:
    """An ordered set of M ≥ 1 modalities.

    names: canonical ids, in the order in which masks list them. Order is a matter of masks only: nothing a user
    meets is an integer channel.

    Raises InputError for an empty set or a name that appears twice (also under an alias).

    >>> four = ModalitySet(("t1n", "t1c", "t2w", "t2f"))
    >>> len(four.subsets()), str(four.parse("flair+t1ce"))
    (15, 't1c+t2f')
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        names = tuple(canonical(name) for name in self.names)
        if not names or "" in names:
            raise InputError(f"a set of modalities needs at least one name each; found {self.names!r}")
        if len(set(names)) < len(names):
            raise InputError(
                f"modalities {', '.join(self.names)}: a name appears twice (aliases count as the same name); "
                "name each modality once"
            )
        object.__setattr__(self, "names", names)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and canonical(name) in self.names

    def __str__(self) -> str:
        return "+".join(self.names)

    def pick(self, names: Iterable[str]) -> ModalitySet:
        """The named modalities, in this set's order. Raises InputError for a name this set does not hold."""
        wanted = [canonical(name) for name in names]
        unknown = [name for name in wanted if name not in self.names]
        if unknown:
            raise InputError(
                f"modality {', '.join(unknown)} is not one of {', '.join(self.names)}; use one of these names "
                "or an alias (t1 t1ce t2 flair)"
            )
        return ModalitySet(tuple(name for name in self.names if name in wanted))

    def parse(self, text: str) -> ModalitySet:
        """A subset written with plus signs or commas, such as ``t1ce+flair``."""
        return self.pick(part for part in text.replace(",", "+").split("+") if part.strip())

    def subsets(self) -> list[ModalitySet]:
        """All 2^M − 1 non-empty subsets, by size, then in this set's order."""
        return [ModalitySet(subset) for size in range(1, len(self) + 1) for subset in combinations(self.names, size)]

    def mask(self, within: ModalitySet) -> NDArray[np.bool_]:
        """Bool[M'] over the M' modalities of ``within``: True where this set holds the modality.

        >>> four = ModalitySet(("t1n", "t1c", "t2w", "t2f"))
        >>> four.parse("t1c+t2f").mask(four).tolist()
        [False, True, False, True]
        """
        within.pick(self.names)
        return np.array([name in self.names for name in within.names])


GLIOMA_MRI = ModalitySet(("t1n", "t1c", "t2w", "t2f"))
"""The four sequences of BraTS: T1 native, T1 with contrast agent, T2-weighted, T2-FLAIR."""
