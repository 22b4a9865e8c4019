"""PMKL: a teacher that sees every sequence, and students that see a few; longer than others, being two networks.

Teacher, for modality j and level l with stride 2^(l−1)::

    u_{j,l} = conv_{j,l}(act(norm(z_{j,l−1})))                    stride 2 from l = 2; u_{j,1} = conv(x_j)
    z_{j,l} = u + conv(act(norm(conv(act(norm(u))))))             the latent
    h_{j,l} = act(norm_{j,l}(z_{j,l})),  0 for an absent j
    a_l     = sigmoid(norm(conv(h_{1,l} … h_{M,l})))              [B M x y z], a map over the modalities per voxel
    f_l     = act(norm(conv1(a_{1,l} h_{1,l} … a_{M,l} h_{M,l})))
    d_4 = f_4,   d_l = convs(up2(d_{l+1}), f_l),   logits = conv1(d_1)

Convolutions are 3³ (conv1: 1³), norm is an instance normalisation with scale and shift, act is LeakyReLU(0.2). A
student has one encoder whose input channels are the sequences it may look at, and f_l = h_l.

Training has two stages: in the first half of the steps the teacher learns, from all that is seen; then it is frozen and
every student learns from it (s, t: logits of a student and the teacher, y: the truth, v: voxels of the batch)::

    kd/S          = T² Σ_v w_v KL( softmax(t_v/T) ‖ softmax(s_v/T) ) / Σ_v w_v          T = 10, weight 0.5
                    w_v = [argmax t_v = y_v] · max(0, CE(s_v, y_v) − CE(t_v, y_v)),  a constant for the gradient
    contrastive/S = 1/B² Σ_{b,c} { d_bc² if b = c, else max(0, 1 − d_bc)² }             weight 0.5
                    d_bc = ‖e(z^s_b) − e'(z^t_c)‖;  e, e': mean over the volume of the deepest latents, C → 32 → 16
                    linear with a ReLU between, scaled to length 1; both are learned with the student

So the teacher is followed where it is right and the student is worse, and a student's view of a patient comes to lie
next to the teacher's view of that patient and apart from its view of the others. A batch of one has positives alone,
which e and e' meet by constants: it takes two or more for this term to mean anything.

Source: Chen, Dou, Jin, Liu, Heng, "Learning with privileged multimodal knowledge for unimodal segmentation", IEEE
Transactions on Medical Imaging 41 (2022). Deviations from the public code:

* Teacher and students are one network with one checkpoint: one command trains both stages and resumes in either, and
  whoever asks for a subset is answered by the one made for it. The schedule of the learning rate starts anew.
* Levels are pre-activated, so that latents leave before a normalisation, where they can be aligned. Layers and their
  number of parameters are the same.
* Borders are padded with zeros, not reflected. Reflected, a crop of nothing but air stays constant through all layers,
  every variance is 0, and a gradient grows by 1/√ε = 316 at each normalisation until it overflows.
* The teacher is trained (the public code loads it), and sees what there is where a sequence is absent from the data.
* A student is fed each of its sequences once, not four copies of the only one.
* ``kd`` is a divergence times T² in place of a cross-entropy: the gradient differs by the factor T² alone, without
  which it fades like 1/T². Without a voxel that counts it is 0, not 0/0.
* ``contrastive`` looks at deepest latents, pooled over the whole volume. The original flattens a map of 41³ · 16
  numbers of the decoder and spends 70 M parameters on two dense layers of it, for crops of 80³ voxels only.
* The criterion (Dice + cross-entropy) is medmap's. The L2 of 1e-5 is the optimiser's weight decay,
  which spares biases; its momentum is Nesterov's; patches are augmented and gradients clipped as for every network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from medmap.core.modality import ModalitySet
from medmap.errors import ConfigError, InputError
from medmap.models.backbone import Auxiliary, Decoded, Encoded, Term, columns, encode_rows, masks_are_free, stacked
from medmap.models.blocks import (
    InstanceNorm,
    LeakyReLU,
    cropped,
    encode_separately,
    mean_of_present,
    pad_to_stride,
    size_named,
)
from medmap.models.convolution import Conv3d, Head
from medmap.models.distillation import contrastive_loss, distillation_loss

IMAGE, TEACHER = "image", "teacher"

TEACHER_SHARE = 0.5
"""Share of the training steps in which the teacher learns; the students learn in the others."""


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


class PMKL(nn.Module):
    """A teacher and its students; see the head of this file.

    modalities: M sequences; classes: K; size: ``tiny`` (1.5 M parameters at M = 4) or ``faithful`` (14.9 M)
    students:   the subsets that have a student, each one sequence where None; all others but the whole have no answer
    progress:   share of the training steps that are done; None lets teacher and students learn at once

    The students look at the images themselves, which is why these are a level of the latents.
    Raises ConfigError for an unknown size, and for one subset twice.

    >>> net = PMKL(ModalitySet(("t1c", "t2f")), classes=4, size="tiny")
    >>> [str(subset) for subset in net.supported_subsets()]
    ['t1c', 't2f', 't1c+t2f']
    >>> seen, kept = torch.tensor([[True, True]]), torch.tensor([[False, True]])
    >>> images = {name: torch.randn(1, 1, 17, 20, 16) for name in net.modalities}
    >>> decoded = net.decode(net.encode(images, seen), kept)
    >>> decoded.logits.shape, sorted(decoded.auxiliary), sorted(decoded.losses)[:2]
    (torch.Size([1, 4, 17, 20, 16]), ['student/t1c', 'student/t2f', 'teacher'], ['contrastive/t1c', 'contrastive/t2f'])
    """

    separable = True
    uses_dropped = True

    def __init__(
        self,
        modalities: ModalitySet,
        classes: int,
        size: str = "tiny",
        students: Sequence[ModalitySet] | None = None,
    ) -> None:
        super().__init__()
        if students is None:
            students = [subset for subset in modalities.subsets() if len(subset) == 1]
        subsets = [modalities.pick(subset) for subset in students]
        repeated = sorted({str(subset) for subset in subsets if subsets.count(subset) > 1})
        if repeated:
            raise ConfigError(f"PMKL: more than one student of {', '.join(repeated)}; name each subset once")
        self.modalities = modalities
        self.classes = classes
        self.progress: float | None = None
        # Everybody learns from all rows they may look at, asked or not: in the answer a row would count for less, the
        # more of the batch somebody else was asked about.
        self.loss_weights = {"dice_ce": 0.0, "teacher": 1.0, "student": 1.0, "kd": 0.5, "contrastive": 0.5}
        self.stages = (TEACHER_SHARE,)
        self.needs = {"kd": "teacher", "contrastive": "teacher"}
        self.teacher = PMKLTeacher(modalities, classes, size)
        self.strides = {IMAGE: 1, **self.teacher.strides}
        self.students = nn.ModuleDict({str(subset): _Student(subset, classes, size) for subset in subsets})

    def supported_subsets(self) -> list[ModalitySet]:
        named = {*self.students, str(self.modalities)}
        return [subset for subset in self.modalities.subsets() if str(subset) in named]

    def encode(self, images: Mapping[str, Tensor], seen: Bool[Tensor, "B M"]) -> Encoded:
        teaching, _ = self._stage()
        # Frozen for whoever asks: a loss on its latents would move it under its students.
        with torch.set_grad_enabled((teaching or not self.training) and torch.is_grad_enabled()):
            encoded = self.teacher.encode(images, seen)
        stride = max(self.strides.values())
        shown = {
            name: torch.where(rows[:, None, None, None, None], pad_to_stride(images[name], stride), 0)
            for name, rows in columns(seen, self.modalities)
        }
        return replace(encoded, levels={IMAGE: shown, **encoded.levels})

    def decode(self, encoded: Encoded, kept: Bool[Tensor, "B M"]) -> Decoded:
        teaching, learning = self._stage()
        asked = self._asked(kept)
        if masks_are_free():
            return self._everybody(encoded, kept, asked)
        logits = torch.zeros((len(kept), self.classes, *encoded.size), device=kept.device)
        lesson: _Said | None = None
        if self.training or bool(asked[TEACHER].any()):
            mask, rows = (encoded.seen, None) if self.training else (kept, asked[TEACHER])
            assert mask is not None
            with torch.set_grad_enabled(teaching and torch.is_grad_enabled()):
                lesson = self._teacher_says(encoded, mask, torch.ones_like(kept[:, 0]) if rows is None else rows)
            logits = _put(logits, asked[TEACHER], lesson)
        said: dict[str, _Said] = {}
        for name, student in self.students.items():
            rows = self._has(name, encoded.seen) if learning and encoded.seen is not None else asked[name]
            if bool(rows.any()):
                with torch.set_grad_enabled((learning or not self.training) and torch.is_grad_enabled()):
                    said[name] = self._student_says(cast(_Student, student), encoded, rows)
                logits = _put(logits, asked[name], said[name])
        if not self.training:
            return Decoded(logits, {}, {})
        assert lesson is not None
        logits = logits.detach()
        auxiliary = {TEACHER: Auxiliary(lesson.logits, torch.ones_like(asked[TEACHER]))} if teaching else {}
        if not learning:
            return Decoded(logits, auxiliary, {})
        auxiliary |= {f"student/{name}": Auxiliary(_put(logits, one.rows, one), one.rows) for name, one in said.items()}
        return Decoded(logits, auxiliary, self._lessons(said, lesson))

    def _everybody(self, encoded: Encoded, kept: Bool[Tensor, "B M"], asked: Mapping[str, Tensor]) -> Decoded:
        """The answer without looking who is asked: all of them, and the others' put to 0."""
        everything = torch.ones_like(kept)
        answers = {TEACHER: self.teacher.decode(encoded, everything).logits}
        for name, student in self.students.items():
            images = torch.cat([encoded.levels[IMAGE][one] for one in cast(_Student, student).subset], dim=1)
            answers[name] = cropped(student(images)[0], encoded.size)
        each = [torch.where(asked[name][:, None, None, None, None], z, 0) for name, z in answers.items()]
        return Decoded(torch.stack(each).sum(dim=0), {}, {})

    def _stage(self) -> tuple[bool, bool]:
        """Whether the teacher learns, and whether the students do."""
        if not self.training or self.progress is None:
            return self.training, self.training
        return self.progress < TEACHER_SHARE, self.progress >= TEACHER_SHARE

    def _asked(self, kept: Bool[Tensor, "B M"]) -> dict[str, Bool[Tensor, " B"]]:
        """{who answers: the samples it is asked about}. Raises InputError for a subset that nobody answers."""
        asked = {name: self._has(name, kept) & (kept.sum(dim=1) == len(name.split("+"))) for name in self.students}
        asked[TEACHER] = kept.all(dim=1) & ~_any(asked.values(), kept)
        if not masks_are_free() and not bool(_any(asked.values(), kept).all()):
            answers = ", ".join(map(str, self.supported_subsets()))
            raise InputError(f"PMKL was asked about a subset of sequences that has no student; it answers {answers}")
        return asked

    def _has(self, name: str, mask: Bool[Tensor, "B M"]) -> Bool[Tensor, " B"]:
        """Samples that have every sequence of a student."""
        return mask[:, [self.modalities.names.index(one) for one in name.split("+")]].all(dim=1)

    def _teacher_says(self, encoded: Encoded, mask: Bool[Tensor, "B M"], rows: Bool[Tensor, " B"]) -> _Said:
        part, shown = _rows_of(encoded, rows), mask[rows]
        deepest = list(self.teacher.strides)[-1]
        pooled = mean_of_present(part.levels[deepest], shown, self.modalities)
        return _Said(rows, self.teacher.decode(part, shown).logits, pooled)

    def _student_says(self, student: _Student, encoded: Encoded, rows: Bool[Tensor, " B"]) -> _Said:
        logits, deepest = student(torch.cat([encoded.levels[IMAGE][name][rows] for name in student.subset], dim=1))
        return _Said(rows, cropped(logits, encoded.size), deepest)

    def _lessons(self, said: Mapping[str, _Said], lesson: _Said) -> dict[str, Term]:
        terms: dict[str, Term] = {}
        for name, own in said.items():
            right = lesson.logits[own.rows].detach()
            terms[f"kd/{name}"] = partial(_distilled, own, right)
            student = cast(_Student, self.students[name])
            theirs = student.teacher_embedding(lesson.deepest[own.rows].detach())
            terms[f"contrastive/{name}"] = contrastive_loss(student.embedding(own.deepest), theirs)
        return terms


class _Said(NamedTuple):
    """What teacher or student says of some samples: rows Bool[B]; logits and deepest latents of these rows."""

    rows: Tensor
    logits: Tensor
    deepest: Tensor


def _put(logits: Tensor, asked: Bool[Tensor, " B"], said: _Said) -> Tensor:
    """Logits with those rows replaced that somebody was asked about."""
    return logits.index_copy(0, asked.nonzero().squeeze(1), said.logits[asked[said.rows]].to(logits.dtype))


def _any(masks: Iterable[Bool[Tensor, " B"]], like: Bool[Tensor, "B M"]) -> Bool[Tensor, " B"]:
    return torch.stack([torch.zeros_like(like[:, 0]), *masks]).any(dim=0)


def _rows_of(encoded: Encoded, rows: Bool[Tensor, " B"]) -> Encoded:
    levels = {level: {name: z[rows] for name, z in latents.items()} for level, latents in encoded.levels.items()}
    return replace(encoded, levels=levels, filled={level: mask[rows] for level, mask in encoded.filled.items()})


def _distilled(own: _Said, right: Tensor, target: Tensor) -> Tensor:
    return distillation_loss(own.logits, right, target[own.rows])


def _shape(size: str) -> PMKLSize:
    return size_named(SIZES, size, "pmkl")


def _strides(shape: PMKLSize) -> dict[str, int]:
    return {f"x{level + 1}": 2**level for level in range(len(shape.channels))}


def _conv(before: int, channels: int, kernel: int = 3, stride: int = 1) -> nn.Conv3d:
    return Conv3d(before, channels, kernel, stride, padding=kernel // 2)


def _activation(channels: int) -> nn.Sequential:
    return nn.Sequential(InstanceNorm(channels), LeakyReLU(0.2))


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
            InstanceNorm(modalities),
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
        self.head = Head(shape.channels[0], classes)

    def forward(self, fused: Mapping[str, Tensor]) -> Tensor:
        x = list(fused.values())[-1]
        for level in reversed(list(self.up)):
            x = self.join[level](torch.cat([self.up[level](x), fused[level]], dim=1))
        logits: Tensor = self.head(x)
        return logits


class _Student(nn.Module):
    """Images [B |S| X Y Z] → logits, deepest latents; with it the embeddings that compare these with the teacher's."""

    def __init__(self, subset: ModalitySet, classes: int, size: str) -> None:
        super().__init__()
        shape = _shape(size)
        self.subset = subset
        self.encoder = _Encoder(len(subset), shape)
        self.decoder = _Decoder(shape, classes)
        self.embedding, self.teacher_embedding = (_Embedding(shape.channels[-1]) for _ in range(2))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.encoder(image)
        fused = {level: self.encoder.activated(level, latent)[level] for level, latent in latents.items()}
        return self.decoder(fused), list(latents.values())[-1]


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
