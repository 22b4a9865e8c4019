"""Anybody's encoder and decoder as a backbone.

    [z_{j,1}, …, z_{j,L}] = encoder_j(x_j)       per modality j; x_j is padded to the coarsest stride
    f_l    = Σ_{j∈S} z_{j,l} / |S|               per level l and sample; S is what is kept or filled in
    logits = decoder([f_1, …, f_L])              resampled to the image where they have another resolution

The encoder sees one sequence at a time, the decoder what is fused; neither has to know about modalities or masks.
Alignment wants maps from *before* a normalisation (docs/method.md), and the decoder to normalise what it gets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn import functional as F

from medmap.core.modality import ModalitySet
from medmap.errors import ConfigError
from medmap.models.backbone import Decoded, Encoded
from medmap.models.blocks import cropped, encode_separately, mean_of_present


def adapt(
    encoder: Callable[[], nn.Module], decoder: Callable[[int], nn.Module], levels: Mapping[str, int]
) -> Callable[..., Adapted]:
    """What builds a `Backbone` from an encoder and a decoder, called as (modalities, classes) like any other.

    encoder: makes a fresh network: image [B 1 X Y Z] → maps [B C x y z], a sequence of them or a dict by level; X, Y
             and Z are multiples of the coarsest stride, at least two of it
    decoder: makes a network for K classes: list of fused maps in the order of ``levels`` → logits [B K x y z]
    levels:  {name: voxels per element} of every map, in the order in which a sequence has them

    Raises ConfigError, here and when the networks are first used, for what does not fit together: the thing, what was
    found, what was expected.

    >>> import torch
    >>> class Two(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fine, self.coarse = nn.Conv3d(1, 8, 3, padding=1), nn.Conv3d(8, 8, 2, stride=2)
    ...     def forward(self, x):
    ...         fine = self.fine(x)
    ...         return fine, self.coarse(fine.relu())
    >>> class Join(nn.Module):
    ...     def __init__(self, classes):
    ...         super().__init__()
    ...         self.head = nn.Conv3d(8, classes, 1)
    ...     def forward(self, maps):
    ...         return self.head((maps[0] + F.interpolate(maps[1], scale_factor=2)).relu())
    >>> Mine = adapt(Two, Join, levels={"x1": 1, "x2": 2})
    >>> net = Mine(ModalitySet(("t1c", "t2f")), classes=4)
    >>> seen = torch.tensor([[True, False]])
    >>> net.decode(net.encode({"t1c": torch.randn(1, 1, 9, 8, 7)}, seen), seen).logits.shape
    torch.Size([1, 4, 9, 8, 7])
    """
    for name, factory, example in (("encoder", encoder, "lambda: Net(…)"), ("decoder", decoder, "lambda classes: …")):
        if isinstance(factory, nn.Module):
            raise ConfigError(
                f"adapt: {name} is a network ({type(factory).__name__}), expected what makes one: "
                f"the class itself, or {example}"
            )
    _check_levels(levels)

    def build(modalities: ModalitySet, classes: int, size: str = "only") -> Adapted:
        """The network for these modalities and classes; there is one size, whatever ``size`` says."""
        return Adapted(modalities, classes, encoder, decoder, levels)

    return build


class Adapted(nn.Module):
    """An encoder per modality, the mean of what is present at every level, one decoder; `adapt` makes it."""

    separable = True

    def __init__(
        self,
        modalities: ModalitySet,
        classes: int,
        encoder: Callable[[], nn.Module],
        decoder: Callable[[int], nn.Module],
        levels: Mapping[str, int],
    ) -> None:
        super().__init__()
        self.modalities = modalities
        self.classes = classes
        self.strides = dict(levels)
        self.encoders = nn.ModuleDict({name: _Named(_made("encoder()", encoder()), levels) for name in modalities})
        self.decoder = _made(f"decoder({classes})", decoder(classes))

    def supported_subsets(self) -> list[ModalitySet]:
        return self.modalities.subsets()

    def encode(self, images: Mapping[str, Tensor], seen: Bool[Tensor, "B M"]) -> Encoded:
        return encode_separately(self.encoders, images, seen, self.modalities, self.strides)

    def decode(self, encoded: Encoded, kept: Bool[Tensor, "B M"]) -> Decoded:
        fused = [
            mean_of_present(encoded.levels[level], encoded.present(level, kept), self.modalities)
            for level in self.strides
        ]
        logits = self.decoder(fused)
        self._check_logits(logits, len(kept))
        padded = [n * next(iter(self.strides.values())) for n in fused[0].shape[2:]]
        if list(logits.shape[2:]) != padded:
            logits = F.interpolate(logits, size=padded, mode="trilinear")
        return Decoded(cropped(logits, encoded.size), {}, {})

    def _check_logits(self, logits: object, batch: int) -> None:
        if not isinstance(logits, Tensor) or logits.ndim != 5 or logits.shape[:2] != (batch, self.classes):
            raise ConfigError(
                f"adapt: the decoder gives {_what(logits)}, expected logits [{batch}, {self.classes}, x, y, z]; "
                f"it was made by decoder({self.classes}), the number of classes"
            )


class _Named(nn.Module):
    """An encoder whose maps come back by level, held to their strides."""

    def __init__(self, network: nn.Module, strides: Mapping[str, int]) -> None:
        super().__init__()
        self.network = network
        self.strides = dict(strides)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        found = self.network(image)
        maps = dict(found) if isinstance(found, Mapping) else _numbered(found, self.strides)
        for name, z in maps.items():
            if not isinstance(z, Tensor) or z.ndim != 5 or len(z) != len(image):
                raise ConfigError(
                    f"adapt: map {name} of the encoder is {_what(z)}, expected [{len(image)}, C, x, y, z] "
                    "(tokens have to be put back on their grid)"
                )
        size = tuple(image.shape[2:])
        expected = {level: tuple(n // stride for n in size) for level, stride in self.strides.items()}
        if {level: tuple(z.shape[2:]) for level, z in maps.items()} != expected:
            raise ConfigError(_mismatch(maps, size, self.strides))
        return {level: maps[level] for level in self.strides}


def _numbered(found: object, strides: Mapping[str, int]) -> dict[str, Tensor]:
    """A sequence of maps by level; what goes beyond the levels is called by its number."""
    if isinstance(found, Tensor):
        found = [found]
    if not isinstance(found, Sequence):
        raise ConfigError(f"adapt: the encoder gives {_what(found)}, expected a list or dict of maps [B C x y z]")
    names = [*strides, *(str(n) for n in range(len(strides) + 1, len(found) + 1))]
    return dict(zip(names, found, strict=False))


def _mismatch(maps: Mapping[str, Tensor], size: tuple[int, ...], strides: Mapping[str, int]) -> str:
    found = ", ".join(f"{name} {_by(z.shape[2:])}" for name, z in maps.items())
    expected = ", ".join(f"{name} {_by([n // stride for n in size])}" for name, stride in strides.items())
    measured = {f"x{n}" if n.isdigit() else n: _stride(tuple(z.shape[2:]), size) for n, z in maps.items()}
    cure = f"if the encoder is right, write levels={measured}"
    if None in measured.values():
        cure = "no stride explains what it gives: let its convolutions pad"
    return (
        f"adapt: for an image of {_by(size)} the encoder gives {len(maps)} maps, {found}; "
        f"levels={dict(strides)} expects {len(strides)}, {expected}; {cure}"
    )


def _stride(small: tuple[int, ...], size: tuple[int, ...]) -> int | None:
    """The least stride at which a size, rounded up, gives the small one."""
    return next((s for s in range(1, max(size) + 1) if tuple(-(-n // s) for n in size) == small), None)


def _by(size: Sequence[int]) -> str:
    return "×".join(map(str, size))


def _what(thing: object) -> str:
    return str(list(thing.shape)) if isinstance(thing, Tensor) else f"something of type {type(thing).__name__}"


def _made(call: str, network: object) -> nn.Module:
    if not isinstance(network, nn.Module):
        raise ConfigError(f"adapt: {call} gives {_what(network)}, expected a torch.nn.Module")
    return network


def _check_levels(levels: Mapping[str, int]) -> None:
    example = "expected a name and a stride for each map of the encoder, such as {'x1': 1, 'x2': 2}"
    if not levels:
        raise ConfigError(f"adapt: levels is empty, {example}")
    coarsest = max(levels.values())
    for name, stride in levels.items():
        if not name.isidentifier() or name == "stem":
            raise ConfigError(f"adapt: {name!r} cannot be a level ('stem' is the one of model.stem), {example}")
        if stride < 1 or coarsest % stride:
            raise ConfigError(f"adapt: stride {stride} of level {name} does not divide the coarsest, {coarsest}")
