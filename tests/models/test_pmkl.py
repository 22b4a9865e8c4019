"""PMKL: sizes, attention, students and what they learn from a teacher, and the laws of every backbone."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from medmap.align import AlignedSegmenter, Uniform
from medmap.config import Config
from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.criterion import DiceCE, total_loss
from medmap.errors import ConfigError, InputError
from medmap.models.check import check_backbone, faults
from medmap.models.pmkl import (
    SIZES,
    Answer,
    FrozenTeacher,
    PMKLSize,
    PMKLStudent,
    PMKLTeacher,
    Stage,
    Teacher,
    _upsampling,
    contrastive_loss,
    distillation_loss,
    training_stages,
)

FIVE = ModalitySet((*GLIOMA_MRI, "adc"))
THREE = ModalitySet(("t1n", "t1c", "t2f"))

# Another batch size takes another convolution kernel, whose float32 sums differ in the last digits.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class Spy:
    """A teacher that remembers what it was shown, and answers with a constant and the images themselves."""

    modalities = THREE
    classes = 3

    def __init__(self) -> None:
        self.shown: list[Tensor] = []

    def answer(self, images: dict[str, Tensor], seen: Tensor) -> Answer:
        self.shown.append(seen)
        first = images["t1n"]
        return Answer(first.new_zeros(len(first), 3, *first.shape[2:]), first.expand(-1, 32, -1, -1, -1))


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


def student_of(subset: str = "t2f", taught: bool = False, seed: int = 0) -> PMKLStudent:
    torch.manual_seed(seed)
    student = PMKLStudent(THREE, 3, "tiny", THREE.parse(subset))
    if taught:
        student.attach(FrozenTeacher(PMKLTeacher(THREE, 3)))
    return student


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
        teacher = PMKLTeacher(GLIOMA_MRI, 4, "faithful")
        student = PMKLStudent(GLIOMA_MRI, 4, "faithful", GLIOMA_MRI.pick(["t1c"]))
    decoder = published_decoder(channels, 4)
    assert count(teacher) == 4 * published_encoder(1, channels) + published_attention(channels, 4) + decoder
    assert count(teacher) == 6_650_292
    assert count(student) - count(student.embeddings) == published_encoder(1, channels) + decoder == 2_054_996
    # The original: two dense maps of (80 − 40 + 1)³ · 16 numbers to 32, without biases.
    assert count(student.embeddings) == 2 * (129 * 32 + 33 * 16) < 2 * 32 * 16 * 41**3 / 1000


@pytest.mark.parametrize("m", [1, 4])
def test_tiny_is_small(m: int) -> None:
    modalities = ModalitySet(FIVE.names[:m])
    assert count(PMKLTeacher(modalities, 4)) < 0.7e6
    assert count(PMKLStudent(modalities, 4, "tiny", modalities.pick(modalities.names[:1]))) < 0.25e6


def test_what_cannot_be_built_is_told() -> None:
    with pytest.raises(ConfigError, match=r"pmkl has no size 'huge'; expected one of tiny, faithful"):
        PMKLTeacher(THREE, 3, "huge")
    with pytest.raises(ConfigError, match=r"pmkl has no size 'huge'"):
        PMKLStudent(THREE, 3, "huge", THREE)
    with pytest.raises(InputError, match=r"modality t2w is not one of t1n, t1c, t2f"):
        PMKLStudent(THREE, 3, "tiny", ModalitySet(("t2w",)))


# --- the laws of every backbone


@pytest.mark.parametrize("m", [1, 2, 3])
def test_the_teacher_keeps_the_laws(m: int) -> None:
    assert not faults(check_backbone(lambda: PMKLTeacher(ModalitySet(FIVE.names[:m]), classes=3)))


@pytest.mark.parametrize("m", [4, 5])
def test_the_teacher_keeps_the_laws_with_many_subsets(micro: str, m: int) -> None:
    modalities = ModalitySet(FIVE.names[:m])
    assert not faults(check_backbone(lambda: PMKLTeacher(modalities, classes=3, size=micro), size=(5, 6, 7)))


@pytest.mark.parametrize("m", [2, 3, 4, 5])
@pytest.mark.parametrize("sequences", [("t1c",), ("t1n", "t1c")])
def test_a_student_keeps_the_laws(m: int, sequences: tuple[str, ...]) -> None:
    modalities = ModalitySet(FIVE.names[:m])
    assert not faults(check_backbone(lambda: PMKLStudent(modalities, 3, "tiny", modalities.pick(sequences))))


@pytest.mark.parametrize("subset", ["t2f", "t1n+t2f"])
def test_a_student_with_a_teacher_keeps_the_laws(subset: str) -> None:
    assert not faults(check_backbone(lambda: student_of(subset, taught=True)))


@pytest.mark.parametrize(("mode", "finite"), [("zeros", True), ("reflect", False)])
def test_gradients_of_a_crop_of_air_are_finite_because_borders_are_zeros(mode: str, finite: bool) -> None:
    torch.manual_seed(0)
    net = PMKLStudent(THREE, 3, "faithful", THREE.parse("t2f"))
    for module in net.modules():
        if isinstance(module, nn.Conv3d) and module.kernel_size == (3, 3, 3):
            module.padding_mode = mode
    air = {"t2f": torch.zeros(1, 1, 16, 16, 16)}
    logits = net.decode(net.encode(air, mask("t2f")), mask("t2f")).logits
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


def test_a_student_answers_its_subset_alone() -> None:
    student = student_of("t1n+t2f")
    assert student.supported_subsets() == [THREE.parse("t1n+t2f")]
    assert [student_of(s).separable for s in ("t1c", "t1n+t2f", "t1n+t1c+t2f")] == [True, False, False]
    encoded = student.encode(images(2), mask("t1n+t1c", "t1n+t1c+t2f"))
    assert set(encoded.levels["x4"]) == {"t1n", "t2f"}
    assert not encoded.levels["x4"]["t2f"][0].any()
    assert torch.equal(encoded.levels["x4"]["t1n"], encoded.levels["x4"]["t2f"])
    with pytest.raises(InputError, match=r"a student of t1n\+t2f was asked about samples that lack some of it"):
        student.decode(encoded, mask("t1n+t1c", "t1n+t2f"))


def test_each_sequence_has_its_own_channel_whatever_the_order_asked_for() -> None:
    torch.manual_seed(0)
    one = student_of("t1n+t2f")
    other = PMKLStudent(THREE, 3, "tiny", ModalitySet(("t2f", "t1n")))
    other.load_state_dict(one.state_dict())
    given, kept = images(1), mask("t1n+t2f")
    logits = [net.eval().decode(net.encode(given, kept), kept).logits for net in (one, other)]
    torch.testing.assert_close(*logits)
    swapped = {**given, "t1n": given["t2f"], "t2f": given["t1n"]}
    assert (one.decode(one.encode(swapped, kept), kept).logits - logits[0]).abs().max() > 1e-2


def test_without_a_teacher_there_are_no_terms_and_the_embeddings_rest() -> None:
    student, kept = student_of(), mask("t2f")
    assert student.teacher is None
    encoded = student.train().encode(images(1), kept)
    assert encoded.context is None
    assert student.decode(encoded, kept).losses == {}
    assert not any(p.requires_grad for p in student.embeddings.parameters())


def test_the_teacher_sees_in_training_what_the_student_may_not() -> None:
    student, spy = student_of(), Spy()
    student.attach(spy)
    assert isinstance(spy, Teacher)
    seen, kept = mask("t1n+t2f", "t1n+t1c+t2f"), mask("t2f", "t2f")
    answer = student.train().decode(student.encode(images(2), seen), kept)
    assert torch.equal(spy.shown.pop(), seen)
    assert set(answer.losses) == set(student.loss_weights)
    assert student.loss_weights == {"kd": 0.5, "contrastive": 0.5}
    wild = {**images(2), "t1n": 9 + images(2)["t1n"]}
    other = student.decode(student.encode(wild, seen), kept)
    assert torch.equal(other.logits, answer.logits)
    assert (other.losses["contrastive"] - answer.losses["contrastive"]).abs() > 1e-4
    spy.shown.clear()
    encoded = student.eval().encode(images(2), seen)
    assert (spy.shown, encoded.context) == ([], None)
    assert student.decode(encoded, kept).losses == {}


def test_a_teacher_is_no_part_of_the_student() -> None:
    student, taught = student_of(), student_of(taught=True, seed=1)
    assert student.state_dict().keys() == taught.state_dict().keys()
    assert count(student) == count(taught)
    assert copy.deepcopy(taught).teacher is taught.teacher
    # A network of its own class, with the state of one that had a teacher: the same answer, at any crop size.
    student.load_state_dict(load(save(taught.state_dict())))
    given, kept = images(1, 17, 20, 33), mask("t2f")
    one, two = (net.eval().decode(net.encode(given, kept), kept).logits for net in (student, taught))
    assert one.shape == (1, 3, 17, 20, 33)
    torch.testing.assert_close(one, two)


def test_a_teacher_that_is_a_module_is_not_registered() -> None:
    class Module(nn.Module, Spy):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            Spy.__init__(self)
            self.weight = nn.Parameter(torch.zeros(1))

    student, module = student_of(), Module()
    names = set(student.state_dict())
    student.attach(module)
    assert student.teacher is module
    assert set(student.state_dict()) == names
    assert all(p is not module.weight for p in student.parameters())


def test_a_frozen_teacher_stays_as_it_is() -> None:
    network = AlignedSegmenter(PMKLTeacher(THREE, 3), None, {"x4": Uniform(3)}, fill="kept")
    teacher, student = FrozenTeacher(network), student_of()
    student.attach(teacher)
    before = copy.deepcopy(network.state_dict())
    answer = student.train().decode(student.encode(images(2), mask("t1n+t2f", "t2f")), mask("t2f", "t2f"))
    sum(answer.terms(torch.randint(3, (2, 16, 16, 16))).values()).backward()
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not network.training
    assert all(p.grad is not None and p.grad.any() for p in student.embeddings.parameters())


def test_a_frozen_teacher_answers_from_what_is_seen() -> None:
    network = PMKLTeacher(THREE, 3)
    answer = FrozenTeacher(network).answer(images(2), mask("t1n+t2f", "t1c"))
    encoded = network.encode(images(2), mask("t1n+t2f", "t1c"))
    latents = encoded.levels["x4"]
    mean = torch.stack([(latents["t1n"][0] + latents["t2f"][0]) / 2, latents["t1c"][1]])
    torch.testing.assert_close(answer.deepest, mean)
    torch.testing.assert_close(answer.logits, network.decode(encoded, mask("t1n+t2f", "t1c")).logits)


def test_a_teacher_that_does_not_fit_is_refused() -> None:
    student = student_of()
    with pytest.raises(ConfigError, match=r"the teacher is for t1n\+t1c\+t2f and 4 classes, the student for .* and 3"):
        student.attach(FrozenTeacher(PMKLTeacher(THREE, 4)))
    with pytest.raises(ConfigError, match=r"the teacher is for t1n\+t1c\+t2w\+t2f and 3 classes"):
        student.attach(FrozenTeacher(PMKLTeacher(GLIOMA_MRI, 3)))
    assert student.teacher is None


def test_a_teacher_may_have_another_size(micro: str) -> None:
    teacher = FrozenTeacher(PMKLTeacher(THREE, 3))
    fits = PMKLStudent(THREE, 3, micro, THREE.parse("t2f"), teacher_channels=32)
    fits.attach(teacher)
    answer = fits.decode(fits.encode(images(2), mask("t2f", "t2f")), mask("t2f", "t2f"))
    assert answer.losses["contrastive"].isfinite()
    unfit = PMKLStudent(THREE, 3, micro, THREE.parse("t2f"))
    unfit.attach(teacher)
    with pytest.raises(ConfigError, match=r"have 32 channels, the student expects 8; .* teacher_channels=32"):
        unfit.encode(images(2), mask("t2f", "t2f"))


def test_a_batch_of_one_has_terms() -> None:
    student = student_of(taught=True)
    answer = student.decode(student.encode(images(1), mask("t1n+t2f")), mask("t2f"))
    terms = answer.terms(torch.zeros(1, 16, 16, 16, dtype=torch.long))
    assert all(term.isfinite() for term in terms.values())
    assert float(terms["contrastive"].detach()) > 0


def test_bfloat16_autocast_runs() -> None:
    student, seen, kept = student_of("t1n+t2f", taught=True), mask("t1n+t2f", "t1n+t1c+t2f"), mask("t1n+t2f", "t1n+t2f")
    with torch.autocast("cpu", torch.bfloat16):
        answer = student.decode(student.encode(images(2), seen), kept)
        terms = answer.terms(torch.zeros(2, 16, 16, 16, dtype=torch.long))
    assert answer.logits.isfinite().all()
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


def trained(net: AlignedSegmenter, seen: Tensor, kept: Tensor, steps: int) -> list[dict[str, float]]:
    """The terms of each step."""
    batch, target = blobs()
    batch = batch * seen[:, :, None, None, None]
    optimiser, criterion, rows = torch.optim.AdamW(net.parameters(), lr=3e-2), DiceCE(), []
    net.train()
    for _ in range(steps):
        output = net(batch, seen, kept)
        loss, terms = total_loss(output, target, criterion, Config())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        rows.append({"loss": float(loss.detach()), **{name: float(term.detach()) for name, term in terms.items()}})
    return rows


def test_teacher_then_student_learn_with_sequences_really_absent(micro: str) -> None:
    torch.manual_seed(0)
    seen = mask("t1n+t1c+t2f", "t1c+t2f")
    teacher = AlignedSegmenter(PMKLTeacher(THREE, 3, micro), None, {})
    rows = trained(teacher, seen, seen, steps=20)
    assert set(rows[0]) == {"loss", "dice_ce"}
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    student = PMKLStudent(THREE, 3, micro, THREE.parse("t2f"))
    student.attach(FrozenTeacher(teacher))
    rows = trained(AlignedSegmenter(student, None, {}), seen, mask("t2f", "t2f"), steps=20)
    assert set(rows[0]) == {"loss", "dice_ce", "kd", "contrastive"}
    assert rows[0]["loss"] == pytest.approx(
        rows[0]["dice_ce"] + 0.5 * rows[0]["kd"] + 0.5 * rows[0]["contrastive"], rel=1e-5
    )
    for term in ("dice_ce", "kd", "contrastive"):
        assert rows[-1][term] < 0.8 * rows[0][term], term


def test_stages_are_the_teacher_then_its_students() -> None:
    stages = training_stages(THREE, [THREE.parse("t2f"), ModalitySet(("t2f", "t1n"))])
    assert stages == (
        Stage("teacher", None, None),
        Stage("student-t2f", THREE.parse("t2f"), "teacher"),
        Stage("student-t1n+t2f", THREE.parse("t1n+t2f"), "teacher"),
    )
    with pytest.raises(ConfigError, match=r"PMKL needs the subset of at least one student"):
        training_stages(THREE, [])
    with pytest.raises(ConfigError, match=r"more than one student of t1n\+t2f; name each subset once"):
        training_stages(THREE, [THREE.parse("t1n+t2f"), ModalitySet(("flair", "t1"))])
    with pytest.raises(InputError, match=r"modality t2w is not one of t1n, t1c, t2f"):
        training_stages(THREE, [ModalitySet(("t2w",))])
