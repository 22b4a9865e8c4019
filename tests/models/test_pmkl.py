"""PMKL: sizes, attention, students and what they learn from a teacher, and the laws of every backbone."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from medmap.align import AlignedSegmenter, build_segmenter
from medmap.anchors import Uniform
from medmap.config import AlignConfig, Config, ModelConfig
from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.criterion import DiceCE, total_loss
from medmap.errors import ConfigError, InputError
from medmap.models.check import check_backbone, faults
from medmap.models.distillation import contrastive_loss, distillation_loss
from medmap.models.pmkl import (
    PMKL,
    SIZES,
    PMKLSize,
    PMKLTeacher,
    _Student,
    _upsampling,
)

FIVE = ModalitySet((*GLIOMA_MRI, "adc"))
FULL = "t1n+t1c+t2f"
THREE = ModalitySet(("t1n", "t1c", "t2f"))

# Another batch size takes another convolution kernel, whose float32 sums differ in the last digits.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def micro(monkeypatch: pytest.MonkeyPatch) -> str:
    """A size of two levels."""
    monkeypatch.setitem(SIZES, "micro", PMKLSize((4, 8)))
    return "micro"


def images(batch: int, *size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y, z = size or (16, 16, 16)
    return {name: torch.randn(batch, 1, x, y, z, generator=generator) for name in THREE}


def mask(*rows: str) -> Tensor:
    return torch.tensor([[name in row.split("+") for name in THREE] for row in rows])


def network(progress: float | None = None, students: Sequence[str] | None = None, size: str = "tiny") -> PMKL:
    torch.manual_seed(0)
    net = PMKL(THREE, 3, size, None if students is None else [THREE.parse(subset) for subset in students])
    net.progress = progress
    return net


# --- sizes


def conv(before: int, after: int, kernel: int) -> int:
    return after * (before * kernel**3 + 1)


def published_encoder(inputs: int, channels: tuple[int, ...]) -> int:
    """Each level three convolutions, each of them with an instance normalisation."""
    return sum(conv(b, c, 3) + 2 * conv(c, c, 3) + 3 * 2 * c for b, c in pairwise((inputs, *channels)))


def published_decoder(channels: tuple[int, ...], classes: int) -> int:
    up = sum(conv(b, c, 3) + conv(2 * c, c, 3) + conv(c, c, 1) + 3 * 2 * c for c, b in pairwise(channels))
    return up + conv(channels[0], classes, 1)


def published_attention(channels: tuple[int, ...], m: int) -> int:
    return sum(conv(m * c, m, 3) + 2 * m + conv(m * c, c, 1) + 2 * c for c in channels)


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_faithful_sizes_are_the_published_layers() -> None:
    channels = (16, 32, 64, 128)
    with torch.device("meta"):
        net = PMKL(GLIOMA_MRI, 4, "faithful")
    decoder = published_decoder(channels, 4)
    assert count(net.teacher) == 4 * published_encoder(1, channels) + published_attention(channels, 4) + decoder
    assert count(net.teacher) == 6_650_292
    student = net.students["t1c"]
    assert count(student.encoder) + count(student.decoder) == published_encoder(1, channels) + decoder == 2_054_996
    # The original: two dense maps of (80 − 40 + 1)³ · 16 numbers to 32, without biases.
    embeddings = count(student.embedding) + count(student.teacher_embedding)
    assert embeddings == 2 * (129 * 32 + 33 * 16) < 2 * 32 * 16 * 41**3 / 1000
    assert count(net) == count(net.teacher) + 4 * count(student)


def test_tiny_is_small() -> None:
    assert count(PMKL(GLIOMA_MRI, 4)) < 1.6e6
    assert count(_Student(GLIOMA_MRI.pick(["t1c"]), 4, "tiny")) < 0.25e6


def test_what_cannot_be_built_is_told() -> None:
    with pytest.raises(ConfigError, match=r"pmkl has no size 'huge'; expected one of tiny, faithful"):
        PMKL(THREE, 3, "huge")
    with pytest.raises(InputError, match=r"modality t2w is not one of t1n, t1c, t2f"):
        PMKL(THREE, 3, "tiny", [ModalitySet(("t2w",))])
    with pytest.raises(ConfigError, match=r"more than one student of t1n\+t2f; name each subset once"):
        PMKL(THREE, 3, "tiny", [THREE.parse("t1n+t2f"), ModalitySet(("flair", "t1"))])


# --- the laws of every backbone


@pytest.mark.parametrize("m", [1, 2, 3])
def test_the_teacher_keeps_the_laws(m: int) -> None:
    assert not faults(check_backbone(lambda: PMKLTeacher(ModalitySet(FIVE.names[:m]), classes=3)))


@pytest.mark.parametrize("m", [4, 5])
def test_the_teacher_keeps_the_laws_with_many_subsets(micro: str, m: int) -> None:
    modalities = ModalitySet(FIVE.names[:m])
    assert not faults(check_backbone(lambda: PMKLTeacher(modalities, classes=3, size=micro), size=(5, 6, 7)))


@pytest.mark.parametrize("m", [1, 2, 3])
def test_a_teacher_with_its_students_keeps_the_laws(m: int) -> None:
    assert not faults(check_backbone(lambda: PMKL(ModalitySet(FIVE.names[:m]), classes=3)))


@pytest.mark.parametrize(("m", "of"), [(4, (1, 3)), (5, (1,))])
def test_many_students_keep_the_laws(micro: str, m: int, of: tuple[int, ...]) -> None:
    modalities = ModalitySet(FIVE.names[:m])
    several = [subset for subset in modalities.subsets() if len(subset) in of]
    assert not faults(check_backbone(lambda: PMKL(modalities, 3, micro, several), size=(5, 6, 7)))


@pytest.mark.parametrize(("mode", "finite"), [("zeros", True), ("reflect", False)])
def test_gradients_of_a_crop_of_air_are_finite_because_borders_are_zeros(mode: str, finite: bool) -> None:
    torch.manual_seed(0)
    net = _Student(THREE.parse("t2f"), 3, "faithful")
    for module in net.modules():
        if isinstance(module, nn.Conv3d) and module.kernel_size == (3, 3, 3):
            module.padding_mode = mode
    logits, _ = net(torch.zeros(1, 1, 16, 16, 16))
    (torch.randn_like(logits) * logits).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None) is finite


# --- the teacher


def test_a_map_at_zero_silences_its_modality_and_that_one_alone() -> None:
    net = PMKLTeacher(THREE, 3).eval()
    with torch.no_grad():
        for fusion in net.fusions.values():
            fusion.attend[1].weight.zero_()
            fusion.attend[1].bias.copy_(torch.tensor([50.0, -200.0, 50.0]))
    everything, given = mask("t1n+t1c+t2f"), images(1)
    logits = net.decode(net.encode(given, everything), everything).logits
    for name, moves in (("t1n", True), ("t1c", False), ("t2f", True)):
        other = {**given, name: torch.randn_like(given[name])}
        changed = net.decode(net.encode(other, everything), everything).logits
        assert bool((changed - logits).abs().max() > 1e-2) is moves


def test_absent_samples_meet_no_layer_and_are_exact_zeros() -> None:
    """NaN stands where there is no image: one multiplication with it would show."""
    net, seen, given = PMKLTeacher(THREE, 3).eval(), mask("t1n+t1c+t2f", "t1c", "t1n+t2f"), images(3)
    for m, name in enumerate(THREE):
        given[name][~seen[:, m]] = torch.nan
    encoded = net.encode(given, seen)
    features = net._features(encoded, "x1", seen)
    assert not features[~seen].any()
    assert features[seen].any()
    logits = net.decode(encoded, seen).logits
    for row in range(3):
        alone = net.decode(net.encode({n: x[[row]] for n, x in given.items()}, seen[[row]]), seen[[row]]).logits
        torch.testing.assert_close(logits[[row]], alone, **CLOSE)


def test_light_upsampling_is_the_same_before_and_after() -> None:
    convolved, activated, double = (layers := _upsampling(6, 4, light=True))
    x = torch.randn(2, 6, 3, 4, 5)
    torch.testing.assert_close(layers(x), activated(convolved(double(x))), **CLOSE)


def test_the_teacher_is_aligned_and_filled_at_its_deepest_level() -> None:
    net = AlignedSegmenter(PMKLTeacher(THREE, 3), None, {"x4": Uniform(3)}, fill="kept")
    batch = torch.stack(list(images(2).values()), dim=1)[:, :, 0]
    output = net(batch, mask("t1n+t1c+t2f", "t1n+t1c+t2f"), mask("t1c", "t1n+t2f"))
    assert output.latents["x4"].shape == (2, 3, 32, 2, 2, 2)
    assert float(output.losses["align/x4"].detach()) > 0
    net.fill = "none"
    unfilled = net(batch, mask("t1n+t1c+t2f", "t1n+t1c+t2f"), mask("t1c", "t1n+t2f"))
    assert (unfilled.logits - output.logits).abs().max() > 1e-3


# --- the student's terms, by hand


def two_voxels(*values: tuple[float, float]) -> Tensor:
    """Logits [1 2 2 1 1] of two classes."""
    return torch.tensor(values).T.reshape(1, 2, 2, 1, 1)


def softmax(*logits: float) -> list[float]:
    powers = [math.exp(z) for z in logits]
    return [p / sum(powers) for p in powers]


def test_distillation_by_hand() -> None:
    """Two voxels in which the teacher is right and better, more so in the second."""
    s, t = ((0.0, 0.0), (1.0, -1.0)), ((3.0, 0.0), (-2.0, 1.0))
    student = two_voxels(*s).requires_grad_()
    truth = torch.tensor([0, 1]).reshape(1, 2, 1, 1)
    loss = distillation_loss(student, two_voxels(*t), truth)
    weights = [math.log(softmax(*t[v])[y] / softmax(*s[v])[y]) for v, y in enumerate((0, 1))]
    soft = [(softmax(*(z / 10 for z in t[v])), softmax(*(z / 10 for z in s[v]))) for v in (0, 1)]
    kl = [sum(p * math.log(p / q) for p, q in zip(*pair, strict=True)) for pair in soft]
    expected = 100 * sum(w * d for w, d in zip(weights, kl, strict=True)) / sum(weights)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    # The weights are constants: T · w/Σw · (softmax(s/T) − softmax(t/T)).
    loss.backward()
    (p, q), (p2, q2) = soft
    pulls = [10 * w / sum(weights) for w in weights]
    expected_gradient = two_voxels(
        (pulls[0] * (q[0] - p[0]), pulls[0] * (q[1] - p[1])), (pulls[1] * (q2[0] - p2[0]), pulls[1] * (q2[1] - p2[1]))
    )
    torch.testing.assert_close(student.grad, expected_gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((-2.0, 0.0), (-1.0, 0.0)), ((3.0, 0.0), (2.0, 0.0))],
    ids=["the teacher is wrong", "the student is better"],
)
def test_nothing_is_learned_where_the_teacher_is_no_help(
    student: tuple[float, float], teacher: tuple[float, float]
) -> None:
    """The sum of the weights is 0 then: 0/0 would be NaN."""
    logits = two_voxels(student, student).requires_grad_()
    loss = distillation_loss(logits, two_voxels(teacher, teacher), torch.zeros(1, 2, 1, 1, dtype=torch.long))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not logits.grad.any()
    # Beside a voxel that counts, the others still do not.
    mixed = distillation_loss(
        two_voxels((0.0, 0.0), student), two_voxels((3.0, 0.0), teacher), torch.zeros(1, 2, 1, 1, dtype=torch.long)
    )
    alone = distillation_loss(
        two_voxels((0.0, 0.0), (0.0, 0.0)), two_voxels((3.0, 0.0), (3.0, 0.0)), torch.zeros(1, 2, 1, 1).long()
    )
    torch.testing.assert_close(mixed, alone)


def test_contrastive_by_hand() -> None:
    ours, theirs = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    same = 0 + (0.8**2 + 0.4**2)
    apart = (1 - math.hypot(0.2, 0.6)) ** 2 + 0  # the other pair is √2 apart, beyond the margin
    assert float(contrastive_loss(ours, theirs)) == pytest.approx((same + apart) / 4, rel=1e-5)
    assert float(contrastive_loss(ours[:1], theirs[1:])) == pytest.approx(0.2**2 + 0.6**2, rel=1e-5)


def test_contrastive_of_equal_embeddings_has_a_gradient_that_is_finite() -> None:
    embedding = torch.tensor([[0.6, 0.8]] * 3, requires_grad=True)
    loss = contrastive_loss(embedding, torch.tensor([[0.6, 0.8]] * 3))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(6 / 9, rel=1e-4)
    assert embedding.grad.isfinite().all()


# --- students


def test_each_subset_is_answered_by_the_one_made_for_it() -> None:
    net = network(students=["t1c", "t1n+t2f"]).eval()
    assert [str(s) for s in net.supported_subsets()] == ["t1c", "t1n+t2f", "t1n+t1c+t2f"]
    given, kept = images(3), mask("t1n+t2f", "t1c", "t1n+t1c+t2f")
    everything = mask(*["t1n+t1c+t2f"] * 3)
    logits = net.decode(net.encode(given, everything), kept).logits
    both, _ = net.students["t1n+t2f"](torch.cat([given["t1n"], given["t2f"]], dim=1)[:1])
    one, _ = net.students["t1c"](given["t1c"][1:2])
    whole = net.teacher.decode(net.teacher.encode(given, everything), everything).logits[2:]
    torch.testing.assert_close(logits, torch.cat([both, one, whole]), **CLOSE)
    for other in ("t2f", "t1n+t1c"):
        with pytest.raises(InputError, match=r"no student; it answers t1c, t1n\+t2f, t1n\+t1c\+t2f"):
            net.decode(net.encode(given, everything), mask("t1c", "t1c", other))


def test_first_the_teacher_learns_and_then_the_students() -> None:
    seen, kept = mask("t1n+t1c+t2f", "t1n+t1c+t2f"), mask("t1c", "t1n+t1c+t2f")
    truth = torch.randint(3, (2, 16, 16, 16), generator=torch.Generator().manual_seed(0))
    learners = {
        0.0: {"teacher"},
        0.49: {"teacher"},
        0.5: {"students"},
        1.0: {"students"},
        None: {"teacher", "students"},
    }
    for progress, expected in learners.items():
        net = network(progress).train()
        decoded = net.decode(net.encode(images(2), seen), kept)
        auxiliary = [a.logits[a.rows] for a in decoded.auxiliary.values()]
        every = [decoded.logits, *auxiliary, *decoded.terms(truth).values()]
        sum((value * torch.randn_like(value)).mean() for value in every).backward()
        assert {name.partition(".")[0] for name, p in net.named_parameters() if p.grad is not None} == expected, (
            progress
        )


def test_everybody_learns_from_all_rows_they_may_look_at_whoever_is_asked() -> None:
    seen, kept = mask("t1n+t1c+t2f", "t1c+t2f", "t1n+t1c+t2f"), mask("t1c", "t2f", "t1n+t1c+t2f")
    net = network().train()
    decoded = net.decode(net.encode(images(3), seen), kept)
    rows = {name: auxiliary.rows.tolist() for name, auxiliary in decoded.auxiliary.items()}
    assert rows == {
        "teacher": [True, True, True],
        "student/t1n": [True, False, True],
        "student/t1c": [True, True, True],
        "student/t2f": [True, True, True],
    }
    assert set(decoded.losses) == {f"{term}/{name}" for term in ("kd", "contrastive") for name in THREE}
    net.eval()
    answer = net.decode(net.encode(images(3), seen), kept)
    assert (answer.auxiliary, dict(answer.losses)) == ({}, {})


@pytest.mark.parametrize("progress", [0.2, 0.7])
def test_how_much_a_row_teaches_does_not_depend_on_what_another_is_asked(progress: float, micro: str) -> None:
    def gradient(*kept: str) -> Tensor:
        net = AlignedSegmenter(network(size=micro), None, {}).train()
        net.at_progress(progress)
        target = torch.randint(3, (2, 16, 16, 16), generator=torch.Generator().manual_seed(0))
        batch = torch.stack(list(images(2).values()), dim=1)[:, :, 0]
        loss, _ = total_loss(net(batch, mask(FULL, FULL), mask(*kept)), target, DiceCE(), Config())
        loss.backward()
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

    assert torch.allclose(gradient(FULL, FULL), gradient("t2f", "t2f"), atol=1e-6)
    assert torch.allclose(gradient(FULL, FULL), gradient(FULL, "t1c"), atol=1e-6)


def test_the_teacher_sees_in_training_what_a_student_may_not() -> None:
    net, seen, kept = network(0.7).train(), mask("t1n+t2f", "t1n+t1c+t2f"), mask("t2f", "t2f")
    truth = torch.randint(3, (2, 16, 16, 16), generator=torch.Generator().manual_seed(0))
    wild = {**images(2), "t1n": 9 + images(2)["t1n"]}
    one, other = (net.decode(net.encode(given, seen), kept) for given in (images(2), wild))
    assert torch.equal(one.logits, other.logits)
    terms = one.terms(truth), other.terms(truth)
    assert (terms[0]["contrastive/t2f"] - terms[1]["contrastive/t2f"]).abs() > 1e-4
    assert (terms[0]["kd/t2f"] - terms[1]["kd/t2f"]).abs() > 1e-6


def test_a_batch_of_one_has_terms() -> None:
    net = network().train()
    decoded = net.decode(net.encode(images(1), mask("t1n+t2f")), mask("t2f"))
    terms = decoded.terms(torch.zeros(1, 16, 16, 16, dtype=torch.long))
    assert set(terms) == {"kd/t1n", "kd/t2f", "contrastive/t1n", "contrastive/t2f"}
    assert all(term.isfinite() for term in terms.values())
    assert float(terms["contrastive/t2f"].detach()) > 0


def test_the_state_is_whole_in_one_file(micro: str) -> None:
    one, other = network(size=micro), network(size=micro)
    with torch.no_grad():
        for p in one.parameters():
            p.add_(0.1 * torch.randn_like(p))
    other.load_state_dict(load(save(one.state_dict())))
    given, kept = images(2), mask("t1c", "t1n+t1c+t2f")
    everything = mask("t1n+t1c+t2f", "t1n+t1c+t2f")
    first, second = (net.eval().decode(net.encode(given, everything), kept).logits for net in (one, other))
    torch.testing.assert_close(first, second)


def test_bfloat16_autocast_runs() -> None:
    net, seen, kept = network().train(), mask("t1n+t2f", "t1n+t1c+t2f"), mask("t2f", "t1n+t1c+t2f")
    with torch.autocast("cpu", torch.bfloat16):
        decoded = net.decode(net.encode(images(2), seen), kept)
        terms = decoded.terms(torch.zeros(2, 16, 16, 16, dtype=torch.long))
    assert decoded.logits.isfinite().all()
    assert {term.dtype for term in terms.values()} == {torch.float32}


# --- training


def blobs() -> tuple[Tensor, Tensor]:
    """Images [2 3 X Y Z] of two patients and their truth: t1c shows class 2, t2f both classes alike."""
    generator = torch.Generator().manual_seed(3)
    target = torch.zeros(2, 16, 16, 16, dtype=torch.long)
    target[0, 3:12, 3:12, 3:12] = target[1, 5:14, 4:12, 2:9] = 1
    target[0, 5:9, 5:9, 5:9] = target[1, 7:11, 6:10, 4:7] = 2
    noise = 0.3 * torch.randn(2, 3, 16, 16, 16, generator=generator)
    return noise + torch.stack([0 * target, target == 2, target > 0], dim=1), target


def trained(net: AlignedSegmenter, seen: Tensor, kept: Tensor, steps: int, progress: float) -> list[dict[str, float]]:
    """The terms of each step."""
    batch, target = blobs()
    batch = batch * seen[:, :, None, None, None]
    optimiser, criterion, rows = torch.optim.AdamW(net.parameters(), lr=3e-2), DiceCE(), []
    net.train().at_progress(progress)
    for _ in range(steps):
        output = net(batch, seen, kept)
        loss, terms = total_loss(output, target, criterion, Config())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        rows.append({"loss": float(loss.detach()), **{name: float(term.detach()) for name, term in terms.items()}})
    return rows


def test_teacher_then_students_learn_with_sequences_really_absent(micro: str) -> None:
    net = AlignedSegmenter(network(size=micro, students=["t1c", "t2f"]), None, {})
    seen, kept = mask("t1n+t1c+t2f", "t1c+t2f"), mask("t2f", "t2f")
    rows = trained(net, seen, kept, steps=20, progress=0.1)
    assert set(rows[0]) == {"loss", "teacher"}
    assert rows[-1]["teacher"] < 0.6 * rows[0]["teacher"]
    taught = copy.deepcopy(net.backbone.teacher.state_dict())
    rows = trained(net, seen, kept, steps=20, progress=0.6)
    own = {f"{term}/{name}" for term in ("kd", "contrastive") for name in ("t1c", "t2f")}
    assert set(rows[0]) == {"loss", "student/t1c", "student/t2f", *own}
    parts = rows[0]["student/t2f"] + rows[0]["student/t1c"] + 0.5 * sum(rows[0][name] for name in own)
    assert rows[0]["loss"] == pytest.approx(parts, rel=1e-5)
    for term in ("student/t2f", "student/t1c", "kd/t2f", "contrastive/t2f"):
        assert rows[-1][term] < 0.8 * rows[0][term], term
    assert all(torch.equal(value, taught[name]) for name, value in net.backbone.teacher.state_dict().items())


def test_aligning_the_teacher_moves_it_in_its_own_half_alone(micro: str) -> None:
    net = AlignedSegmenter(network(size=micro), None, {"x2": Uniform(3)})
    seen, kept = mask("t1n+t1c+t2f", "t1n+t1c+t2f"), mask("t2f", "t1c")
    before = copy.deepcopy(net.backbone.teacher.state_dict())
    rows = trained(net, seen, kept, steps=2, progress=0.6)
    assert rows[0]["align/x2"] > 0  # there is something to pull at
    assert all(torch.equal(value, before[name]) for name, value in net.backbone.teacher.state_dict().items())
    trained(net, seen, kept, steps=2, progress=0.1)
    assert not all(torch.equal(value, before[name]) for name, value in net.backbone.teacher.state_dict().items())


@pytest.mark.parametrize(
    ("model", "align", "told"),
    [
        ({"stem": "non_shared"}, {"anchor": "none"}, "model.stem: non_shared"),
        ({}, {"anchor": "pstar", "fill": "kept"}, "align.fill: kept"),
        ({}, {"anchor": "precision"}, "align.anchor: precision"),
    ],
)
def test_what_would_move_a_frozen_teacher_or_dress_up_a_student_is_refused(
    model: dict[str, Any], align: dict[str, Any], told: str
) -> None:
    settings = ModelConfig(name="pmkl", size="tiny", **model), AlignConfig(**align)
    with pytest.raises(ConfigError, match=f"{told}: pmkl cannot have it, for its students learn from a teacher"):
        build_segmenter(*settings, GLIOMA_MRI, 4)
