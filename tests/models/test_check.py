"""`check_backbone` finds each fault in a network that has it, and nothing in networks that have none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medmap.core.box import bounding_box
from medmap.core.modality import ModalitySet
from medmap.models import check_backbone
from medmap.models.backbone import Decoded, Encoded, columns, encode_rows, stacked
from medmap.models.blocks import cropped, pad_to_stride
from medmap.models.check import LAWS, faults
from medmap.models.unet import SIZES, UNet, UNetSize

THREE = ModalitySet(("t1n", "t1c", "t2f"))
SMALL = (7, 8, 5)


class Honest(nn.Module):
    """The smallest network that keeps every promise; each network below breaks one."""

    separable = True
    strides: Mapping[str, int] = {"x1": 1, "x2": 2}

    def __init__(self) -> None:
        super().__init__()
        self.modalities, self.classes = THREE, 3
        self.first = nn.ModuleDict({name: nn.Conv3d(1, 4, 3, padding=1) for name in THREE})
        self.second = nn.ModuleDict({name: nn.Conv3d(4, 4, 3, stride=2, padding=1) for name in THREE})
        self.head = nn.Conv3d(4, 3, 1)

    def supported_subsets(self) -> list[ModalitySet]:
        return self.modalities.subsets()

    def latents(self, name: str, image: Tensor) -> dict[str, Tensor]:
        x1 = self.first[name](image)
        return {"x1": x1, "x2": self.second[name](x1.relu())}

    def one(self, name: str, image: Tensor, rows: Tensor) -> dict[str, Tensor]:
        return encode_rows(lambda some: self.latents(name, some), image, rows)

    def encode(self, images: Mapping[str, Tensor], seen: Tensor) -> Encoded:
        x, y, z = next(iter(images.values())).shape[2:]
        found = {name: self.one(name, pad_to_stride(images[name], 2), rows) for name, rows in columns(seen, THREE)}
        return Encoded({level: {name: z[level] for name, z in found.items()} for level in ("x1", "x2")}, (x, y, z))

    def fused(self, latents: Mapping[str, Tensor], kept: Tensor) -> Tensor:
        share = kept / kept.sum(dim=1, keepdim=True)
        return (share[:, :, None, None, None, None] * stacked(latents, THREE)).sum(dim=1)

    def whole(self, levels: Mapping[str, Mapping[str, Tensor]], kept: Tensor) -> Tensor:
        below = F.interpolate(self.fused(levels["x2"], kept), scale_factor=2.0)
        return self.head((below + self.fused(levels["x1"], kept)).relu())

    def decode(self, encoded: Encoded, kept: Tensor) -> Decoded:
        return Decoded(cropped(self.whole(encoded.levels, kept), encoded.size), {}, {})


class MeansOverSeen(Honest):
    """Leak through values: fuses what is seen, not what is kept."""

    separable = False

    def encode(self, images, seen):
        return replace(super().encode(images, seen), context=seen)

    def decode(self, encoded, kept):
        return super().decode(encoded, encoded.context)


class MeansOverSeenInTraining(MeansOverSeen):
    """The same leak, in train mode alone: the published filling."""

    def decode(self, encoded, kept):
        return Honest.decode(self, encoded, encoded.context if self.training else kept)


class CropsToAll(Honest):
    """Leak through the crop: whatever is seen decides the box outside which latents are 0."""

    separable = False

    def encode(self, images, seen):
        encoded = super().encode(images, seen)
        here = torch.stack([(images[n][:, 0] != 0) & r[:, None, None, None] for n, r in columns(seen, THREE)]).any(0)
        inside = torch.zeros_like(here)
        for row, support in enumerate(here.numpy()):
            box = bounding_box(support)
            if box is not None:
                inside[row][box.slices] = True
        inside = pad_to_stride(inside[:, None].float(), 2)
        shrunk = {"x1": inside, "x2": inside[:, :, ::2, ::2, ::2]}
        levels = {level: {n: z * shrunk[level] for n, z in named.items()} for level, named in encoded.levels.items()}
        return replace(encoded, levels=levels)


class NormalisesAcross(Honest):
    """Leak through statistics: one mean and deviation over all the seen sequences of a sample."""

    separable = False

    def encode(self, images, seen):
        stack = torch.stack([images[n] * r[:, None, None, None, None] for n, r in columns(seen, THREE)])
        count = seen.sum(dim=1).view(-1, 1, 1, 1, 1) * stack[0, 0].numel()
        mean = stack.sum(dim=(0, 2, 3, 4, 5)).view(-1, 1, 1, 1, 1) / count
        power = stack.square().sum(dim=(0, 2, 3, 4, 5)).view(-1, 1, 1, 1, 1) / count
        deviation = (power - mean.square()).clamp(min=0).add(1e-3).sqrt()
        return super().encode({name: (x - mean) / deviation for name, x in images.items()}, seen)


class NormalisesAcrossAndSaysSeparable(NormalisesAcross):
    separable = True


class CountsAbsentImages(Honest):
    """Leak through statistics: in training, BatchNorm meets a zero image wherever a sequence is absent."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({name: nn.BatchNorm3d(4) for name in THREE})

    def latents(self, name, image):
        x1 = self.norms[name](self.first[name](image))
        return {"x1": x1, "x2": self.second[name](x1.relu())}

    def one(self, name, image, rows):
        present = rows.view(-1, 1, 1, 1, 1)
        return {level: z * present for level, z in self.latents(name, image * present).items()}


class LearnsFromAbsentImages(CountsAbsentImages):
    """Worse: whatever stands in the place of an absent image enters the running statistics."""

    def one(self, name, image, rows):
        return {level: z * rows.view(-1, 1, 1, 1, 1) for level, z in self.latents(name, image).items()}


class AttendsToAll(Honest):
    """Leak through attention: the softmax runs over every sequence, and only the values are masked."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Conv3d(4, 1, 1)

    def fused(self, latents, kept):
        z = stacked(latents, THREE)
        weights = torch.stack([self.score(z[:, m]) for m in range(3)], dim=1).softmax(dim=1)
        return (weights * kept[:, :, None, None, None, None] * z).sum(dim=1)


class AttendsToAllLater(AttendsToAll):
    """The same leak behind scores that start at 0, so that an untrained network would not show it."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)


class HasUnusedLayer(Honest):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)


class HasSilencedLayer(Honest):
    """The layer is called, and its result multiplied by 0."""

    def __init__(self) -> None:
        super().__init__()
        self.silenced = nn.Conv3d(4, 4, 1)

    def fused(self, latents, kept):
        z = super().fused(latents, kept)
        return z + 0 * self.silenced(z)


class MixesSamples(Honest):
    def whole(self, levels, kept):
        logits = super().whole(levels, kept)
        return logits + logits.mean(dim=0, keepdim=True)


class UsesBatchStatisticsInEval(Honest):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm3d(4, track_running_stats=False)

    def fused(self, latents, kept):
        return self.norm(super().fused(latents, kept))


class ReadsOneMask(Honest):
    """The published fragment: sample 0's mask for the whole batch."""

    def decode(self, encoded, kept):
        return super().decode(encoded, kept[:1].expand_as(kept))


class ForgetsToCrop(Honest):
    def decode(self, encoded, kept):
        return Decoded(self.whole(encoded.levels, kept), {}, {})


class BreaksOnOddSizes(Honest):
    def encode(self, images, seen):
        x, y, z = next(iter(images.values())).shape[2:]
        found = {name: self.one(name, images[name], rows) for name, rows in columns(seen, THREE)}
        return Encoded({level: {n: z[level] for n, z in found.items()} for level in ("x1", "x2")}, (x, y, z))


class DividesByDeviation(Honest):
    """0 / 0 where an image is constant."""

    def latents(self, name, image):
        return super().latents(name, (image - image.mean((1, 2, 3, 4), True)) / image.std((1, 2, 3, 4), keepdim=True))


class HasInfiniteGradient(Honest):
    """The values are finite, the derivative of a square root at 0 is not."""

    def latents(self, name, image):
        x1 = self.first[name](image)
        return super().latents(name, image) | {"x1": x1 + (x1 - x1).abs().sqrt()}


class ForgetsTensor(Honest):
    """A random tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = 1 + torch.rand(4, 1, 1, 1)

    def fused(self, latents, kept):
        return self.gain * super().fused(latents, kept)


class ForgetsWhatItLearned(Honest):
    """A number that passes in training move, and that no state dict holds."""

    level = 0.0

    def whole(self, levels, kept):
        logits = super().whole(levels, kept)
        if self.training:
            self.level = 0.5 * self.level + 0.5 * float(logits.detach().mean()) + 1
        return logits + self.level * (not self.training)


class DeclaresWrongStride(Honest):
    strides: Mapping[str, int] = {"x1": 1, "x2": 4}


class DeclaresAbsentLevel(Honest):
    strides: Mapping[str, int] = {"x1": 1, "x2": 2, "x3": 2}


class EncodesAbsentRows(Honest):
    """Biases stay where the sequence is not seen."""

    def one(self, name, image, rows):
        return self.latents(name, image)


class HandsOnContext(Honest):
    """Declared separable, with a context that a sequence encoded alone would lack."""

    def encode(self, images, seen):
        return replace(super().encode(images, seen), context=seen)


class NeverStopsDropping(Honest):
    """Dropout in eval mode: a sample alone and in a batch are then different too."""

    def whole(self, levels, kept):
        return F.dropout(super().whole(levels, kept), 0.5)


class IgnoresItsDigests(Honest):
    """Has a digest, and decodes from latents that are no longer there."""

    def digest(self, level, name, latent):
        return 2 * latent


class DigestsTwice(Honest):
    """Doubles what it is given, and what it has doubled already."""

    def digest(self, level, name, latent):
        return 2 * latent

    def decode(self, encoded, kept):
        levels = encoded.digests or encoded.levels
        doubled = {level: {name: 2 * z for name, z in each.items()} for level, each in levels.items()}
        return super().decode(replace(encoded, levels=doubled), kept)


BROKEN: dict[type[Honest], set[str]] = {
    MeansOverSeen: {"leakage"},
    MeansOverSeenInTraining: {"leakage"},
    CropsToAll: {"leakage"},
    NormalisesAcross: {"leakage"},
    NormalisesAcrossAndSaysSeparable: {"leakage", "separable"},
    AttendsToAllLater: {"leakage"},
    AttendsToAll: {"leakage"},
    CountsAbsentImages: {"statistics"},
    LearnsFromAbsentImages: {"statistics"},
    HasUnusedLayer: {"gradients"},
    HasSilencedLayer: {"gradients"},
    MixesSamples: {"samples"},
    UsesBatchStatisticsInEval: {"samples"},
    ReadsOneMask: {"samples"},
    ForgetsToCrop: {"shape"},
    BreaksOnOddSizes: {"shape"},
    DividesByDeviation: {"finite"},
    HasInfiniteGradient: {"finite"},
    ForgetsTensor: {"saving"},
    ForgetsWhatItLearned: {"saving"},
    DeclaresWrongStride: {"strides"},
    DeclaresAbsentLevel: {"strides"},
    EncodesAbsentRows: {"strides"},
    HandsOnContext: {"separable"},
    IgnoresItsDigests: {"digests"},
    DigestsTwice: {"digests"},
    NeverStopsDropping: {"deterministic", "samples"},
}


@pytest.mark.parametrize("network", BROKEN, ids=lambda network: network.__name__)
def test_each_fault_breaks_its_law_and_no_other(network: type[Honest]) -> None:
    found = faults(check_backbone(network, size=SMALL))
    assert {finding.law for finding in found} == BROKEN[network], found


def test_every_law_is_broken_by_some_network() -> None:
    assert {law for laws in BROKEN.values() for law in laws} | {"members"} == set(LAWS)


def test_an_honest_network_keeps_every_law_and_is_told_which() -> None:
    findings = check_backbone(Honest, size=SMALL)
    assert [finding.law for finding in findings] == list(LAWS)
    assert not faults(findings)
    assert all(finding.ok and finding.detail == LAWS[finding.law][0] for finding in findings)


def test_a_fault_is_told_in_words() -> None:
    (leak,) = faults(check_backbone(MeansOverSeen, size=SMALL))
    assert leak.detail.startswith("kept t1n: logits with t1c+t2f removed and logits when t1c+t2f is seen but not kept")
    (dead,) = faults(check_backbone(HasUnusedLayer, size=SMALL))
    assert dead.detail == "no subset gives a gradient to unused.weight, unused.bias"


def test_what_a_network_raises_is_a_finding() -> None:
    (odd,) = faults(check_backbone(BreaksOnOddSizes, size=SMALL))
    assert odd.detail.startswith("raised RuntimeError: ")
    assert re.search(r" \(test_check\.py, line \d+\)$", odd.detail), "the network's own line, not torch's"


def test_an_error_of_medmap_names_the_thing_itself() -> None:
    (first, *_) = check_backbone(lambda: UNet(THREE, classes=3, size="huge"), size=SMALL)
    assert first.detail.startswith("raised ConfigError: unet has no size 'huge'")
    assert ".py" not in first.detail


def test_something_that_is_no_backbone_lacks_members() -> None:
    members = check_backbone(lambda: nn.Linear(1, 1))[0]
    assert not members.ok
    assert members.detail.startswith("Linear lacks modalities, classes, strides, separable, encode, decode")
    assert "torch.nn.Module" in check_backbone(lambda: "unet")[0].detail


def test_a_network_may_support_some_subsets_only() -> None:
    class Student(Honest):
        """Answers from t1c alone and has no encoder for anything else."""

        def __init__(self) -> None:
            super().__init__()
            for layers in (self.first, self.second):
                del layers["t1n"], layers["t2f"]

        def supported_subsets(self) -> list[ModalitySet]:
            return [THREE.parse("t1c")]

        def encode(self, images, seen):
            only = torch.tensor([False, True, False])
            return super().encode(images, seen & only)

    assert not faults(check_backbone(Student, size=SMALL))


def test_unsupported_subsets_are_refused_by_name() -> None:
    class Strange(Honest):
        def supported_subsets(self) -> list[ModalitySet]:
            return [ModalitySet(("adc",))]

    members = check_backbone(Strange)[0]
    assert "adc" in members.detail
    assert "t1n+t1c+t2f" in members.detail


def test_the_callers_random_state_is_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    check_backbone(Honest, size=SMALL)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_the_unet_keeps_every_law(count: int) -> None:
    names = ModalitySet(("t1n", "t1c", "t2w", "t2f", "adc")[:count])
    assert not faults(check_backbone(lambda: UNet(names, classes=4, size="tiny")))


def test_the_unet_with_deep_supervision_keeps_every_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "deep", UNetSize((4, 8), deep=("x1",)))
    assert not faults(check_backbone(lambda: UNet(THREE, classes=4, size="deep"), size=SMALL))
