"""What a network's encoders made of one patient's sequences, and what of it is kept from one call to the next."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from medmap.core.box import Box, Boxed


@dataclass(frozen=True)
class SequenceLatents:
    """One sequence, encoded on its own box: {level: [1 C x y z]}, {level: what the backbone made of that}."""

    box: Box
    levels: dict[str, Tensor]
    digests: dict[str, Any] = field(default_factory=dict)


class KeptLatents:
    """Latents that are kept: a sequence is encoded again only where its prepared image has become another one.

    Belongs to one network and one precision. Whatever is asked next takes the place of what it is not equal to, so that
    one patient is held at a time.

    >>> kept, image = KeptLatents(), Boxed(np.ones((2, 2, 2)), Box((0, 0, 0), (2, 2, 2)))
    >>> calls = []
    >>> encode = lambda: calls.append(1) or SequenceLatents(image.box, {})
    >>> _ = kept.get("t2f", image, encode), kept.get("t2f", image, encode)
    >>> len(calls)
    1
    """

    def __init__(self) -> None:
        self._held: dict[Hashable, tuple[Boxed, SequenceLatents]] = {}

    def get(self, key: Hashable, image: Boxed, encode: Callable[[], SequenceLatents]) -> SequenceLatents:
        """The latents of an image; ``encode`` makes them where they are not those of the last image of this key."""
        held = self._held.get(key)
        if held is None or held[0].box != image.box or not np.array_equal(held[0].values, image.values):
            self._held.pop(key, None)  # before there are new ones: latents are large
            self._held[key] = held = image, encode()
        return held[1]
