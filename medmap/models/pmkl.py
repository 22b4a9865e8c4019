"""PMKL: a teacher that sees every sequence, and students that learn from it and see one, or a few.

Teacher, for modality j and level l with stride 2^(l−1)::

    u_{j,l} = conv_{j,l}(act(norm(z_{j,l−1})))                    stride 2 from l = 2; u_{j,1} = conv(x_j)
    z_{j,l} = u + conv(act(norm(conv(act(norm(u))))))             the latent
    h_{j,l} = act(norm_{j,l}(z_{j,l})),  0 for an absent j
    a_l     = sigmoid(norm(conv(h_{1,l} … h_{M,l})))              [B M x y z], a map over the modalities per voxel
    f_l     = act(norm(conv1(a_{1,l} h_{1,l} … a_{M,l} h_{M,l})))
    d_4 = f_4,   d_l = convs(up2(d_{l+1}), f_l),   logits = conv1(d_1)

Convolutions are 3³ (conv1: 1³), norm is an instance normalisation with scale and shift, act is LeakyReLU(0.2). The
student has one encoder whose input channels are the sequences it may look at, and f_l = h_l.

The student's own terms, with a teacher (s, t: logits of student and teacher, y: the truth, v: voxels of the batch)::

    kd          = T² Σ_v w_v KL( softmax(t_v/T) ‖ softmax(s_v/T) ) / Σ_v w_v            T = 10, weight 0.5
                  w_v = [argmax t_v = y_v] · max(0, CE(s_v, y_v) − CE(t_v, y_v)),  a constant for the gradient
    contrastive = 1/B² Σ_{b,c} { d_bc² if b = c, else max(0, 1 − d_bc)² }               weight 0.5
                  d_bc = ‖e(z^s_b) − e'(z^t_c)‖;  e, e': mean over the volume of the deepest latents, C → 32 → 16
                  linear with a ReLU between, scaled to length 1; both are learned with the student

So the teacher is followed where it is right and the student is worse, and a student's view of a patient comes to lie
next to the teacher's view of that patient and apart from its view of the others. A batch of one has positives alone.

Source: Chen, Dou, Jin, Liu, Heng, "Learning with privileged multimodal knowledge for unimodal segmentation", IEEE
Transactions on Medical Imaging 41 (2022). Deviations from the public code:

* Levels are pre-activated, so that latents leave before a normalisation, where they can be aligned. Layers and their
  number of parameters are the same.
* Borders are padded with zeros, not reflected. Reflected, a crop of nothing but air stays constant through all layers,
  every variance is 0, and a gradient grows by 1/√ε = 316 at each normalisation until it overflows.
* The teacher answers any subset, absent sequences being exact zeros; and it is trained (the public code loads it).
* The student is fed each of its sequences once, not four copies of the only one.
* ``kd`` is a divergence times T² in place of a cross-entropy: the gradient differs by the factor T² alone, without
  which it fades like 1/T². Without a voxel that counts it is 0, not 0/0.
* ``contrastive`` looks at deepest latents, pooled over the whole volume. The original flattens a map of 41³ · 16
  numbers of the decoder and spends 70 M parameters on two dense layers of it, for crops of 80³ voxels only.
* The criterion (Dice + cross-entropy) is medmap's. The L2 of 1e-5 is the optimiser's weight decay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from medmap.core.modality import ModalitySet
from medmap.errors import ConfigError, InputError
from medmap.models.backbone import Decoded, Encoded, Term, columns, encode_rows, stacked
from medmap.models.blocks import cropped, encode_separately, mean_of_present, pad_to_stride


@dataclass(frozen=True)
class PMKLSize:
    """channels: per level, level l has stride 2^(l−1)
    light:    at full resolution, where most of the time goes, the encoder has one convolution in place of three, and
              attention and the convolution after upsampling are 1³
    """

    channels: tuple[int, ...]
    light: bool = False


class PMKLTeacher(nn.Module):
    """One encoder per modality, attention over the modalities at every level, one decoder; see the head of this file.

    modalities: M sequences; classes: K; size: ``tiny`` (0.7 M parameters at M = 4) or ``faithful`` (6.7 M).

    >>> net = PMKLTeacher(ModalitySet(("t1c", "t2f")), classes=4, size="tiny")
    >>> seen = torch.tensor([[True, False]])
    >>> net.decode(net.encode({"t1c": torch.randn(1, 1, 17, 20, 16)}, seen), seen).logits.shape
    torch.Size([1, 4, 17, 20, 16])
    """

    separable = True

    def __init__(self, modalities: ModalitySet, classes: int, size: str = "tiny") -> None:
        super().__init__()
        shape = _shape(size)
        self.modalities = modalities
        self.classes = classes
        self.strides = _strides(shape)
        self.loss_weights: dict[str, float] = {}
        self.encoders = nn.ModuleDict({name: _Encoder(1, shape) for name in modalities})
        self.fusions = nn.ModuleDict(
            {
                level: _Attention(len(modalities), channels, light=shape.light and level == "x1")
                for level, channels in zip(self.strides, shape.channels, strict=True)
            }
        )
        self.decoder = _Decoder(shape, classes)

    def supported_subsets(self) -> list[ModalitySet]:
        return self.modalities.subsets()

    def encode(self, images: Mapping[str, Tensor], seen: Bool[Tensor, "B M"]) -> Encoded:
        return encode_separately(self.encoders, images, seen, self.modalities, self.strides)

    def decode(self, encoded: Encoded, kept: Bool[Tensor, "B M"]) -> Decoded:
        fused = {
            level: fusion(self._features(encoded, level, encoded.present(level, kept)))
            for level, fusion in self.fusions.items()
        }
        return Decoded(cropped(self.decoder(fused), encoded.size), {}, {})

    def _features(self, encoded: Encoded, level: str, present: Bool[Tensor, "B M"]) -> Float[Tensor, "B M C x y z"]:
        """h of one level: exact zeros for what is not there, which meets no normalisation."""
        latents = encoded.levels[level]
        found = {
            name: encode_rows(partial(cast(_Encoder, self.encoders[name]).activated, level), latents[name], rows)[level]
            for name, rows in columns(present, self.modalities)
        }
        return stacked(found, self.modalities)


class Answer(NamedTuple):
    """What a teacher says of a batch: logits [B K X Y Z], and its deepest latents [B C x y z], one a sample."""

    logits: Tensor
    deepest: Tensor


@runtime_checkable
class Teacher(Protocol):
    """Whoever teaches a student: built for the same modalities (in this order) and as many classes."""

    modalities: ModalitySet
    classes: int

    def answer(self, images: Mapping[str, Tensor], seen: Bool[Tensor, "B M"]) -> Answer:
        """Of images {modality: [B 1 X Y Z]}, those that are seen; without gradients."""
        ...


class FrozenTeacher:
    """A trained network as a teacher: in eval mode for good, without gradients, answering from all that is seen.

    network: a backbone, or an `AlignedSegmenter` around one, with its filling; it is frozen in place

    Its deepest latents are those of the coarsest level, averaged over the modalities that are seen. A copy of a
    student shares it.

    >>> pair = ModalitySet(("t1c", "t2f"))
    >>> teacher = FrozenTeacher(PMKLTeacher(pair, classes=3))
    >>> image = torch.randn(1, 1, 16, 16, 16)
    >>> answer = teacher.answer({"t1c": image, "t2f": image}, torch.tensor([[True, True]]))
    >>> answer.logits.shape, answer.deepest.shape
    (torch.Size([1, 3, 16, 16, 16]), torch.Size([1, 32, 2, 2, 2]))
    """

    def __init__(self, network: nn.Module) -> None:
        self.network: Any = network.eval().requires_grad_(False)
        backbone: Any = getattr(network, "backbone", network)
        self.modalities: ModalitySet = backbone.modalities
        self.classes: int = backbone.classes
        self.level: str = max(backbone.strides, key=backbone.strides.__getitem__)

    @torch.no_grad()
    def answer(self, images: Mapping[str, Tensor], seen: Bool[Tensor, "B M"]) -> Answer:
        network = self.network.to(seen.device)
        encoded = network.encode(images, seen)
        deepest = mean_of_present(encoded.levels[self.level], seen, self.modalities)
        return Answer(network.decode(encoded, seen).logits, deepest)

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher:
        return self


class PMKLStudent(nn.Module):
    """A network that looks at some of the sequences only, and learns from a teacher that looks at all.

    modalities: the M sequences of the data; classes: K; size: ``tiny`` (0.2 M parameters) or ``faithful`` (2.1 M)
    subset:     what it may look at; the only subset it answers
    teacher_channels: C of the teacher's deepest latents, where not those of a PMKL teacher of this size

    With one sequence it is separable. With several it encodes them jointly: there is one latent, which is offered under
    the name of each of them (so aligning these with each other is free, aligning them with N(0, I) is not). A sample
    that lacks one of its sequences has zeros for latents, and cannot be answered.

    A teacher is attached for training and is no part of the network: neither of its parameters nor of its state. Both
    embeddings always are, without gradients until there is a teacher, so that a state can be loaded with a teacher or
    without. Without one there are no terms but the criterion. The teacher is shown the images as they are handed to
    `encode`: a stem in front of the student would distort them.

    Raises ConfigError for an unknown size, InputError for a subset that is none of the modalities.

    >>> pair = ModalitySet(("t1c", "t2f"))
    >>> student = PMKLStudent(pair, 4, "tiny", pair.pick(["t2f"]))
    >>> student.attach(FrozenTeacher(PMKLTeacher(pair, 4, "tiny")))
    >>> images, seen = {name: torch.randn(2, 1, 16, 16, 16) for name in pair}, torch.tensor([[True, True]] * 2)
    >>> sorted(student.decode(student.encode(images, seen), torch.tensor([[False, True]] * 2)).losses)
    ['contrastive', 'kd']
    """

    uses_dropped = True

    def __init__(
        self,
        modalities: ModalitySet,
        classes: int,
        size: str,
        subset: ModalitySet,
        teacher_channels: int | None = None,
    ) -> None:
        super().__init__()
        shape = _shape(size)
        self.modalities = modalities
        self.classes = classes
        self.subset = modalities.pick(subset)
        self.strides = _strides(shape)
        self.separable = len(self.subset) == 1
        self.loss_weights = {"kd": 0.5, "contrastive": 0.5}
        self.encoder = _Encoder(len(self.subset), shape)
        self.decoder = _Decoder(shape, classes)
        deepest = shape.channels[-1]
        self.embeddings = nn.ModuleDict(
            {"student": _Embedding(deepest), "teacher": _Embedding(teacher_channels or deepest)}
        ).requires_grad_(False)
        # In a tuple, because a module would register a teacher that is one.
        self._held: tuple[Teacher, ...] = ()

    @property
    def teacher(self) -> Teacher | None:
        """Whom it learns from in training."""
        return self._held[0] if self._held else None

    def attach(self, teacher: Teacher) -> None:
        """Learn from a teacher from now on. Raises ConfigError for one of other modalities or classes."""
        if (teacher.modalities, teacher.classes) != (self.modalities, self.classes):
            raise ConfigError(
                f"the teacher is for {teacher.modalities} and {teacher.classes} classes, the student for "
                f"{self.modalities} and {self.classes}; train a teacher on the student's data"
            )
        self._held = (teacher,)
        self.embeddings.requires_grad_(True)

    def supported_subsets(self) -> list[ModalitySet]:
        return [self.subset]

    def encode(self, images: Mapping[str, Tensor], seen: Bool[Tensor, "B M"]) -> Encoded:
        x, y, z = next(iter(images.values())).shape[2:]
        rows = self._answerable(seen)
        levels: dict[str, dict[str, Tensor]] = {level: {} for level in self.strides}
        if bool(rows.any()):
            own = torch.cat([images[name] for name in self.subset], dim=1)
            latents = encode_rows(self.encoder, pad_to_stride(own, max(self.strides.values())), rows)
            levels = {level: dict.fromkeys(self.subset, latent) for level, latent in latents.items()}
        learns = self.training and self.teacher is not None
        return Encoded(levels, (x, y, z), self._lesson(images, seen) if learns else None, seen=seen)

    def decode(self, encoded: Encoded, kept: Bool[Tensor, "B M"]) -> Decoded:
        if not bool(self._answerable(kept).all()):
            raise InputError(
                f"a student of {self.subset} was asked about samples that lack some of it; it answers no other"
            )
        latents = {level: self._own(encoded.levels[level]) for level in self.strides}
        fused = {level: self.encoder.activated(level, latent)[level] for level, latent in latents.items()}
        logits = cropped(self.decoder(fused), encoded.size)
        learns = self.training and encoded.context is not None
        return Decoded(logits, {}, self._losses(logits, list(latents.values())[-1], encoded.context) if learns else {})

    def _answerable(self, mask: Bool[Tensor, "B M"]) -> Bool[Tensor, " B"]:
        return mask[:, [self.modalities.names.index(name) for name in self.subset]].all(dim=1)

    def _own(self, latents: Mapping[str, Tensor]) -> Tensor:
        """The one latent of a level, whichever of its names somebody may have changed it under."""
        first, *others = (latents[name] for name in self.subset)
        return sum(others, start=first) / len(self.subset)

    def _lesson(self, images: Mapping[str, Tensor], seen: Bool[Tensor, "B M"]) -> Answer:
        assert self.teacher is not None
        with torch.no_grad():
            lesson = self.teacher.answer(images, seen)
        found, expected = lesson.deepest.shape[1], self.embeddings["teacher"].channels
        if found != expected:
            raise ConfigError(
                f"the teacher's deepest latents have {found} channels, the student expects {expected}; build the "
                f"student with teacher_channels={found}"
            )
        return lesson

    def _losses(self, logits: Tensor, deepest: Tensor, lesson: Answer) -> dict[str, Term]:
        own, theirs = self.embeddings["student"](deepest), self.embeddings["teacher"](lesson.deepest.detach())
        return {
            "kd": partial(distillation_loss, logits, lesson.logits.detach()),
            "contrastive": contrastive_loss(own, theirs),
        }


def distillation_loss(
    student: Float[Tensor, "B K X Y Z"],
    teacher: Float[Tensor, "B K X Y Z"],
    target: Int[Tensor, "B X Y Z"],
    temperature: float = 10.0,
) -> Float[Tensor, ""]:
    """Follow the teacher where it is right and the student is worse.

        L = T² Σ_v w_v KL( softmax(t_v/T) ‖ softmax(s_v/T) ) / Σ_v w_v,    0 where Σ_v w_v = 0
        w_v = [argmax t_v = y_v] · max(0, CE(s_v, y_v) − CE(t_v, y_v)),    without a gradient

    student, teacher: logits s, t; target: class indices y; temperature: T

    >>> good, bad = torch.zeros(2, 1, 2, 1, 1, 1)
    >>> good[0, 1], truth = 5.0, torch.ones(1, 1, 1, 1, dtype=torch.long)
    >>> bool(distillation_loss(bad, good, truth) > 0), float(distillation_loss(good, bad, truth))
    (True, 0.0)
    """
    student, teacher = student.float(), teacher.float()
    with torch.no_grad():
        behind = F.cross_entropy(student, target, reduction="none") - F.cross_entropy(teacher, target, reduction="none")
        weight = behind.relu() * (teacher.argmax(dim=1) == target)
    soft, theirs = (student / temperature).log_softmax(dim=1), (teacher / temperature).log_softmax(dim=1)
    divergence = F.kl_div(soft, theirs, reduction="none", log_target=True).sum(dim=1)
    return temperature**2 * (weight * divergence).sum() / weight.sum().clamp(min=1e-6)


def contrastive_loss(
    student: Float[Tensor, "B E"], teacher: Float[Tensor, "B E"], margin: float = 1.0
) -> Float[Tensor, ""]:
    """Embeddings of the same sample together, those of different samples at least a margin apart.

        L = 1/B² Σ_{b,c} { d_bc² if b = c, else max(0, m − d_bc)² },    d_bc = ‖student_b − teacher_c‖

    >>> e = torch.eye(3)
    >>> round(float(contrastive_loss(e, e)), 4), round(float(contrastive_loss(e, e[[1, 2, 0]])), 4)
    (0.0, 1.0)
    """
    squared = (student[:, None].float() - teacher[None].float()).square().sum(dim=2)
    # The root of exactly 0 would have an infinite gradient.
    apart = (margin - (squared + 1e-12).sqrt()).relu().square()
    same = torch.eye(len(squared), dtype=torch.bool, device=squared.device)
    return torch.where(same, squared, apart).mean()


@dataclass(frozen=True)
class Stage:
    """One training of the whole procedure.

    name:    of its run: ``teacher``, ``student-t1c``, …
    subset:  what its network may look at; None for the teacher, which answers every subset
    teacher: the name of the stage that must be finished first, because it teaches; None for the teacher
    """

    name: str
    subset: ModalitySet | None = None
    teacher: str | None = None


def training_stages(modalities: ModalitySet, subsets: Iterable[ModalitySet]) -> tuple[Stage, ...]:
    """The teacher, then a student for each subset, in the order in which they can be trained.

    Raises ConfigError where no subset or one subset twice is asked for, InputError for a sequence that is unknown.

    >>> [stage.name for stage in training_stages(ModalitySet(("t1c", "t2f")), [ModalitySet(("flair",))])]
    ['teacher', 'student-t2f']
    """
    students = [modalities.pick(subset) for subset in subsets]
    if not students:
        raise ConfigError("PMKL needs the subset of at least one student; the published ones have one sequence each")
    repeated = sorted({str(subset) for subset in students if students.count(subset) > 1})
    if repeated:
        raise ConfigError(f"PMKL: more than one student of {', '.join(repeated)}; name each subset once")
    return Stage("teacher"), *(Stage(f"student-{subset}", subset, "teacher") for subset in students)


def _shape(size: str) -> PMKLSize:
    if size not in SIZES:
        raise ConfigError(f"pmkl has no size {size!r}; expected one of {', '.join(SIZES)}")
    return SIZES[size]


def _strides(shape: PMKLSize) -> dict[str, int]:
    return {f"x{level + 1}": 2**level for level in range(len(shape.channels))}


def _conv(before: int, channels: int, kernel: int = 3, stride: int = 1) -> nn.Conv3d:
    return nn.Conv3d(before, channels, kernel, stride, padding=kernel // 2)


def _activation(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.InstanceNorm3d(channels, affine=True), nn.LeakyReLU(0.2, inplace=True))


def _upsampling(below: int, channels: int, light: bool) -> nn.Sequential:
    """Nearest ×2, then act(norm(conv)); light: act(norm(conv1)), which gives the same before upsampling as after."""
    double = nn.Upsample(scale_factor=2.0, mode="nearest")
    if light:
        return nn.Sequential(_conv(below, channels, kernel=1), _activation(channels), double)
    return nn.Sequential(double, _conv(below, channels), _activation(channels))


class _Level(nn.Module):
    """One resolution of an encoder: z = u + conv(act(norm(conv(act(norm(u)))))), u = conv(x); light: z = u.

    ``exit`` is the activation that whoever goes on from z applies.
    """

    def __init__(self, before: int, channels: int, stride: int, light: bool) -> None:
        super().__init__()
        self.enter = _conv(before, channels, stride=stride)
        inner = [_activation(channels), _conv(channels, channels), _activation(channels), _conv(channels, channels)]
        self.inner = None if light else nn.Sequential(*inner)
        self.exit = _activation(channels)

    def forward(self, x: Tensor) -> Tensor:
        u: Tensor = self.enter(x)
        return u if self.inner is None else u + self.inner(u)


class _Encoder(nn.Module):
    """Images [B C X Y Z] → latents {level: [B c x y z]}."""

    def __init__(self, inputs: int, shape: PMKLSize) -> None:
        super().__init__()
        levels = zip(_strides(shape), pairwise((inputs, *shape.channels)), strict=True)
        self.levels = nn.ModuleDict(
            {
                name: _Level(before, channels, stride=1 if name == "x1" else 2, light=shape.light and name == "x1")
                for name, (before, channels) in levels
            }
        )

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        latents: dict[str, Tensor] = {}
        enter: nn.Module = nn.Identity()
        x = image
        for name, level in self.levels.items():
            latents[name] = x = level(enter(x))
            enter = cast(_Level, level).exit
        return latents

    def activated(self, level: str, latent: Tensor) -> dict[str, Tensor]:
        """h = act(norm(z)) of one level, under its name."""
        return {level: cast(_Level, self.levels[level]).exit(latent)}


class _Attention(nn.Module):
    """Features [B M C x y z] → one [B C x y z]: a map over the modalities multiplies them, conv1 joins them."""

    def __init__(self, modalities: int, channels: int, light: bool) -> None:
        super().__init__()
        self.attend = nn.Sequential(
            _conv(modalities * channels, modalities, kernel=1 if light else 3),
            nn.InstanceNorm3d(modalities, affine=True),
            nn.Sigmoid(),
        )
        self.fuse = nn.Sequential(_conv(modalities * channels, channels, kernel=1), _activation(channels))

    def forward(self, features: Float[Tensor, "B M C x y z"]) -> Float[Tensor, "B C x y z"]:
        attention: Tensor = self.attend(features.flatten(1, 2))
        fused: Tensor = self.fuse((attention[:, :, None] * features).flatten(1, 2))
        return fused


class _Decoder(nn.Module):
    """Fused features {level: [B C x y z]} → logits: at each level nearest ×2, conv, join the skip, conv, conv1."""

    def __init__(self, shape: PMKLSize, classes: int) -> None:
        super().__init__()
        steps = list(zip(_strides(shape), pairwise(shape.channels), strict=False))
        self.up = nn.ModuleDict(
            {name: _upsampling(below, c, light=shape.light and name == "x1") for name, (c, below) in steps}
        )
        self.join = nn.ModuleDict(
            {
                name: nn.Sequential(_conv(2 * c, c), _activation(c), _conv(c, c, kernel=1), _activation(c))
                for name, (c, _) in steps
            }
        )
        self.head = _conv(shape.channels[0], classes, kernel=1)

    def forward(self, fused: Mapping[str, Tensor]) -> Tensor:
        x = list(fused.values())[-1]
        for level in reversed(list(self.up)):
            x = self.join[level](torch.cat([self.up[level](x), fused[level]], dim=1))
        logits: Tensor = self.head(x)
        return logits


class _Embedding(nn.Module):
    """Latents [B C x y z] → [B 16] of length 1, by way of their mean over the volume.

    It must be latents: after an instance normalisation such a mean would be nearly the same for every sample.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.layers = nn.Sequential(nn.Linear(channels, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, latents: Float[Tensor, "B C x y z"]) -> Float[Tensor, "B E"]:
        return F.normalize(self.layers(latents.float().mean(dim=(2, 3, 4))).float(), dim=1)


SIZES: dict[str, PMKLSize] = {
    "tiny": PMKLSize((8, 16, 24, 32), light=True),
    "faithful": PMKLSize((16, 32, 64, 128)),
}
