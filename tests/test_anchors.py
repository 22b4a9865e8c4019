"""Every anchor keeps one contract; then, anchor by anchor, what it is against a closed form or a count by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from medmap.anchors import (
    Anchor,
    ElectedTeacher,
    FixedModality,
    GatedMixture,
    LearnedMixture,
    Moments,
    MovingMoments,
    PrecisionWeighted,
    RatioMixture,
    StandardNormal,
    Uniform,
    alignment_loss,
    build_anchor,
)
from medmap.config import AlignConfig, load_config
from medmap.core.modality import ModalitySet
from medmap.errors import ConfigError

CHANNELS, SIZE = 4, (2, 3, 2)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def mask(*rows: str) -> Tensor:
    """A row a sample, a letter a modality: "ab" has the first two of three."""
    return torch.tensor([[letter in row for letter in "abc"] for row in rows])


def latents(seed: int = 2, batch: int = 2, modalities: int = 3, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(batch, modalities, CHANNELS, *SIZE, generator=generator)


ALL, SOME = mask("abc", "abc"), mask("ab", "b")


def given_of(kind: str, z: Tensor, seed: int = 7) -> dict[str, Tensor]:
    """The latents' own log-variances, where they have any."""
    return {} if kind == "plain" else {"log_var": latents(seed, *z.shape[:2])}


# ---- each anchor, its parameters in the order in which the modalities stand --------------------------------------


def learned(order: list[int]) -> LearnedMixture:
    anchor = LearnedMixture(3)
    anchor.theta.data = torch.tensor([0.3, -1.0, 2.0])[order]
    return anchor


def ratio(order: list[int]) -> RatioMixture:
    anchor = RatioMixture(3)
    anchor.w.data = torch.tensor([0.2, 0.5, 0.1])[order]
    return anchor


def precision(order: list[int]) -> PrecisionWeighted:
    anchor, generator = PrecisionWeighted(3, CHANNELS), torch.Generator().manual_seed(5)
    for parameter in anchor.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    anchor.heads = torch.nn.ModuleList(anchor.heads[m] for m in order)
    return anchor


def gated(order: list[int]) -> GatedMixture:
    anchor = GatedMixture(3, CHANNELS)
    anchor.gate.data = torch.tensor([2.0, -1.0, 0.5, 1.0])
    anchor.bias.data = torch.tensor([0.5, 0.0, -1.0])[order]
    return anchor


def moving(order: list[int]) -> MovingMoments:
    """After one batch, at rest."""
    anchor = MovingMoments(3, CHANNELS)
    alignment_loss(latents(11), anchor, ALL)
    return anchor.eval()


def elected(order: list[int]) -> ElectedTeacher:
    anchor = ElectedTeacher(3)
    anchor.elect([(0.3, 0.8, math.nan)[m] for m in order])
    return anchor


ANCHORS: dict[str, Callable[[list[int]], Anchor]] = {
    "uniform": lambda order: Uniform(3),
    "learned": learned,
    "ratio": ratio,
    "fixed": lambda order: FixedModality(order.index(1)),
    "normal": lambda order: StandardNormal(),
    "precision": precision,
    "moments": lambda order: Moments(3),
    "moving": moving,
    "gated": gated,
    "elected": elected,
}

GIVEN = ("normal", "moving")
"""Anchors that are not made of the sample: a single modality pays, and so do modalities that agree."""

KINDS = ("plain", "gaussian")
anchors = pytest.mark.parametrize(("name", "kind"), list(product(ANCHORS, KINDS)))
made_of_the_sample = pytest.mark.parametrize(
    ("name", "kind"), list(product([name for name in ANCHORS if name not in GIVEN], KINDS))
)


def made(name: str) -> Anchor:
    return ANCHORS[name]([0, 1, 2])


# ---- the contract ------------------------------------------------------------------------------------------------


@anchors
@given(order=st.permutations([0, 1, 2]), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_the_order_of_modalities_is_a_matter_of_names_only(name: str, kind: str, order: list[int], seed: int) -> None:
    z, seen = latents(seed), mask("ab", "bc")
    own = given_of(kind, z, seed + 100)
    turned = {key: value[:, order] for key, value in own.items()}
    one, other = made(name), ANCHORS[name](order)
    here, there = one(z, seen, **own), other(z[:, order], seen[:, order], **turned)
    torch.testing.assert_close(there.mean, here.mean)
    torch.testing.assert_close(there.log_var, here.log_var, **CLOSE)
    torch.testing.assert_close(
        alignment_loss(z[:, order], other, seen[:, order], **turned), alignment_loss(z, one, seen, **own), **CLOSE
    )


@anchors
@pytest.mark.parametrize("garbage", [1e3, math.nan])
def test_what_is_not_seen_reaches_no_anchor_no_loss_and_no_gradient(name: str, kind: str, garbage: float) -> None:
    results = []
    for rubbish in (None, garbage):
        z, anchor = latents(), made(name)
        own = given_of(kind, z)
        for values in (z, *own.values()):
            if rubbish is not None:
                values[~SOME] = rubbish
            values.requires_grad_()
        loss = alignment_loss(z, anchor, SOME, **own)
        (loss + 0 * sum(p.sum() for p in anchor.parameters())).backward()
        gradients = [z.grad, *(own[key].grad for key in own), *(p.grad for p in anchor.parameters())]
        results.append((loss, [g for g in gradients if g is not None]))
    torch.testing.assert_close(results[1], results[0])
    gradient = results[0][1][0]
    assert gradient.isfinite().all()
    assert not gradient[~SOME].any()


@anchors
def test_an_anchor_that_fills_is_made_of_what_is_kept_alone(name: str, kind: str) -> None:
    z, own = latents(), given_of(kind, latents())
    changed = z.masked_fill(~SOME[:, :, None, None, None, None], 1e3)
    spread = {key: value.masked_fill(~SOME[:, :, None, None, None, None], 50) for key, value in own.items()}
    torch.testing.assert_close(made(name)(changed, SOME, **spread), made(name)(z, SOME, **own))


@anchors
def test_the_loss_is_the_mean_of_the_samples_losses(name: str, kind: str) -> None:
    """Masks are per sample: each sample is judged as if it were alone."""
    z, seen, anchor = latents(batch=3), mask("abc", "b", "bc"), made(name)
    own = given_of(kind, z)
    alone = [
        alignment_loss(z[[b]], anchor, seen[[b]], **{key: value[[b]] for key, value in own.items()}) for b in range(3)
    ]
    torch.testing.assert_close(alignment_loss(z, anchor, seen, **own), torch.stack(alone).mean())


@anchors
def test_a_sample_without_anything_costs_nothing(name: str, kind: str) -> None:
    for seen in (torch.zeros(2, 3, dtype=torch.bool), mask("", "ab")):
        z, anchor = latents().requires_grad_(), made(name)
        loss = alignment_loss(z, anchor, seen, **given_of(kind, z))
        if not seen.any():
            assert loss == 0
        loss.backward()
        assert z.grad is not None
        assert z.grad.isfinite().all()
        assert not z.grad[0].any()
        assert all(p.grad is None or p.grad.isfinite().all() for p in anchor.parameters())


@made_of_the_sample
def test_a_single_modality_costs_nothing(name: str, kind: str) -> None:
    """Its anchor is itself: 0, not NaN, and no gradient that is not finite."""
    z, anchor = latents().requires_grad_(), made(name)
    loss = alignment_loss(z, anchor, mask("b", "b"), **given_of(kind, z))
    # The mixture's variance goes through exp and log: rounding of numbers of order 1.
    assert loss.item() == pytest.approx(0, abs=0 if kind == "plain" and name != "moments" else 1e-6)
    loss.backward()
    for gradient in (z.grad, *(p.grad for p in anchor.parameters())):
        assert gradient is None or gradient.isfinite().all()


@made_of_the_sample
def test_where_all_agree_nothing_is_to_be_paid(name: str, kind: str) -> None:
    z = latents()[:, :1].expand(-1, 3, -1, -1, -1, -1)
    own = {key: value[:, :1].expand_as(z) for key, value in given_of(kind, z).items()}
    # Heads of their own would read one latent as three Gaussians.
    anchor = PrecisionWeighted(3, CHANNELS) if name == "precision" else made(name)
    for seen in (ALL, SOME):
        assert alignment_loss(z, anchor, seen, **own).item() == pytest.approx(0, abs=1e-6)


@anchors
def test_where_they_differ_the_loss_is_positive_and_moves_latents_and_parameters(name: str, kind: str) -> None:
    z, anchor = latents().requires_grad_(), made(name)
    loss = alignment_loss(z, anchor, ALL, **given_of(kind, z))
    assert loss > 0.01
    loss.backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert (z.grad.abs().amax(dim=(2, 3, 4, 5)) > 0).sum() >= 4  # all but a teacher, who is not moved by his pupils
    if not (name == "precision" and kind == "gaussian"):  # heads rest where latents bring their own variances
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in anchor.parameters())


@anchors
@pytest.mark.parametrize("level", [0.0, 0.7, -300.0])
def test_latents_without_any_variance_and_huge_ones_give_numbers(name: str, kind: str, level: float) -> None:
    flat = torch.full((1, 3, CHANNELS, *SIZE), level)
    for z in (flat, flat.index_fill(1, torch.tensor(1), 0.0), latents(batch=1, spread=1e3), flat[..., :1, :1, :1]):
        z.requires_grad_()
        anchor = made(name)
        loss = alignment_loss(z, anchor, mask("abc"), **({} if kind == "plain" else {"log_var": torch.zeros_like(z)}))
        loss.backward()
        assert loss.isfinite()
        assert z.grad is not None
        assert z.grad.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in anchor.parameters())


@pytest.mark.parametrize(
    ("name", "one", "equal", "elsewhere"),
    [
        ("learned", 0, 0, 1),
        ("uniform", 0, 0, 1),
        ("gated", 0, 0, 1),
        ("precision", 0, 0, 1),
        ("fixed", 0, 0, 1),
        ("elected", 0, 0, 1),
        ("moments", 0, 0, 0),
        ("moving", 1, 1, 1),
        ("normal", 1, 1, 1),
    ],
)
def test_when_there_is_something_to_pay(name: str, one: bool, equal: bool, elsewhere: bool) -> None:
    """The table of docs/method.md: one sequence; all latents equal; the same values in other voxels."""
    anchor = PrecisionWeighted(3, CHANNELS) if name == "precision" else made(name)
    alike = latents(batch=1)[:, :1].expand(-1, 3, -1, -1, -1, -1)
    moved = torch.stack([alike[:, 0], alike[:, 1].flip((2, 3)), alike[:, 2].roll(1, dims=2)], dim=1)
    paid = [
        alignment_loss(z, anchor, seen).item()
        for z, seen in ((latents(batch=1), mask("b")), (alike, mask("abc")), (moved, mask("abc")))
    ]
    for loss, something in zip(paid, (one, equal, elsewhere), strict=True):
        assert loss > 0.01 if something else loss < 1e-6


@made_of_the_sample
def test_the_trivial_optimum_is_one(name: str, kind: str) -> None:
    """Constant and equal latents cost nothing, which is why latents are watched."""
    flat = torch.full((2, 3, CHANNELS, *SIZE), 0.7)
    own = {} if kind == "plain" else {"log_var": torch.zeros_like(flat)}
    anchor = PrecisionWeighted(3, CHANNELS) if name == "precision" else made(name)
    assert alignment_loss(flat, anchor, ALL, **own) < 1e-6


@anchors
def test_the_loss_is_in_float32_under_bfloat16(name: str, kind: str) -> None:
    z, own = latents(), given_of(kind, latents())
    whole = alignment_loss(z, made(name), SOME, **own)
    with torch.autocast("cpu", torch.bfloat16):
        under = alignment_loss(z, made(name), SOME, **own)
    halves = alignment_loss(z.bfloat16(), made(name), SOME, **{key: value.bfloat16() for key, value in own.items()})
    assert whole.dtype == under.dtype == halves.dtype == torch.float32
    torch.testing.assert_close(under, whole)
    torch.testing.assert_close(halves, whole, rtol=0.05, atol=0.02)  # 8 bits of every latent


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_modalities_will_do(count: int) -> None:
    teacher = ElectedTeacher(count)
    teacher.elect([0.5] * count)
    fresh = [
        Uniform(count),
        LearnedMixture(count),
        RatioMixture(count),
        FixedModality(count - 1),
        StandardNormal(),
        PrecisionWeighted(count, CHANNELS),
        Moments(count),
        MovingMoments(count, CHANNELS),
        GatedMixture(count, CHANNELS),
        teacher,
    ]
    assert len(fresh) == len(ANCHORS)
    z = latents(modalities=count)
    for anchor in fresh:
        loss = alignment_loss(z, anchor, torch.ones(2, count, dtype=torch.bool))
        assert loss.isfinite()
        assert bool(loss > 1e-3) == (count > 1 or isinstance(anchor, StandardNormal | MovingMoments)), anchor


@anchors
def test_an_anchor_that_was_used_can_be_copied_and_saved(name: str, kind: str) -> None:
    """The moving average of weights is a copy, and a checkpoint is all that a resumed run has."""
    z, anchor = latents().requires_grad_(), made(name)
    own = given_of(kind, z)
    alignment_loss(z, anchor, SOME, **own).backward()
    other = made(name)
    for value in (*other.parameters(), *other.buffers()):
        value.data.zero_()
    other.load_state_dict(anchor.state_dict())
    for twin in (copy.deepcopy(anchor), other):
        assert torch.equal(alignment_loss(z, twin, ALL, **own), alignment_loss(z, anchor, ALL, **own))


# ---- precision ---------------------------------------------------------------------------------------------------


def test_the_barycentre_by_hand() -> None:
    """Means 0 and 3 with variances 1 and ½: mean 2, precision the mean of 1 and 2."""
    z = torch.tensor([0.0, 3.0]).view(1, 2, 1, 1, 1, 1)
    log_var = torch.tensor([0.0, math.log(0.5)]).view(1, 2, 1, 1, 1, 1)
    p = PrecisionWeighted(2)(z, torch.ones(1, 2, dtype=torch.bool), log_var)
    assert (p.mean.item(), p.log_var.exp().item()) == (pytest.approx(2.0), pytest.approx(1 / 1.5))


def test_precision_costs_the_exact_divergence_from_the_barycentre() -> None:
    z, log_var = latents(), latents(7)
    trust = (-log_var.double()).exp() * ALL[:, :, None, None, None, None]
    centre = Normal(
        (trust * z).sum(1, keepdim=True) / trust.sum(1, keepdim=True), (3 / trust.sum(1, keepdim=True)).sqrt()
    )
    each = kl_divergence(Normal(z.double(), (0.5 * log_var.double()).exp()), centre)
    torch.testing.assert_close(alignment_loss(z, PrecisionWeighted(3), ALL, log_var).double(), each.mean(), **CLOSE)


def test_the_product_of_experts_would_charge_those_who_agree() -> None:
    """Why the precision is the mean: with the sum, four unit Gaussians that agree pay 0.81 nats an element."""
    unit, product_of_four = Normal(0.0, 1.0), Normal(0.0, 0.5)
    assert kl_divergence(unit, product_of_four).item() == pytest.approx(0.81, abs=0.005)


def test_heads_begin_at_unit_variance_where_the_anchor_is_the_plain_mean() -> None:
    z, seen = latents(), mask("abc", "ac")
    begun = PrecisionWeighted(3, CHANNELS)
    p = begun(z, seen)
    torch.testing.assert_close(p.mean, Uniform(3)(z, seen).mean, **CLOSE)
    torch.testing.assert_close(p.log_var, torch.zeros_like(p.log_var), **CLOSE)
    torch.testing.assert_close(alignment_loss(z, begun, seen), alignment_loss(z, Uniform(3), seen), **CLOSE)


@given(scale=st.floats(0, 1e4), weight=st.floats(-50, 50))
@settings(max_examples=25, deadline=None)
def test_log_variances_stay_between_their_bounds(scale: float, weight: float) -> None:
    anchor = PrecisionWeighted(1, CHANNELS)
    anchor.heads[0].weight.data.fill_(weight)
    found = anchor.log_var(scale * latents()[:, 0], 0)
    assert found.min() >= -6
    assert found.max() <= 2


def test_a_sample_has_the_latent_s_mean_and_the_head_s_variance_in_the_rows_that_are_asked_for() -> None:
    anchor = PrecisionWeighted(1, 1)
    anchor.heads[0].bias.data.fill_(math.atanh(0.25))  # log σ² = −1
    z = torch.full((2, 1, 32, 32, 32), 3.0)
    drawn = anchor.sample(z, 0, torch.tensor([True, False]))
    # 32768 draws: the mean is known to 0.003, the variance of 0.37 to 0.003.
    assert drawn[0].mean().item() == pytest.approx(3, abs=0.015)
    assert drawn[0].var().item() == pytest.approx(math.exp(-1), abs=0.015)
    assert torch.equal(drawn[1], z[1])


def test_each_modality_has_a_head_of_its_own_for_samples_as_for_the_loss() -> None:
    anchor, z = PrecisionWeighted(2, CHANNELS), torch.zeros(1, CHANNELS, 16, 16, 16)
    for m, log_var in enumerate((-5.0, 1.0)):
        anchor.heads[m].bias.data.fill_(math.atanh((log_var + 2) / 4))
        drawn = anchor.sample(z, m, torch.tensor([True]))
        assert drawn.var().item() == pytest.approx(math.exp(log_var), rel=0.05)  # 16384 draws: known to 1 %
    own = anchor.read(torch.zeros(1, 2, CHANNELS, 1, 1, 1))
    assert own.log_var[0, :, 0].flatten().tolist() == pytest.approx([-5.0, 1.0], abs=1e-4)


def test_heads_and_gates_stay_soft_however_large_latents_grow() -> None:
    """A tanh and a softmax that are full learn nothing more; latents grow a lot in training."""
    head, gate, z = precision([0, 1, 2]), gated([0, 1, 2]), latents()
    torch.testing.assert_close(head.log_var(1e5 * z[:, 0], 0), head.log_var(1e3 * z[:, 0], 0), rtol=1e-3, atol=1e-3)
    assert 4 - (head.log_var(1e5 * z[:, 0], 0) + 2).abs().max() > 1e-3
    torch.testing.assert_close(gate.shares(1e5 * z, ALL), gate.shares(1e3 * z, ALL), rtol=1e-3, atol=1e-3)
    assert gate.shares(1e5 * z, ALL).min() > 1e-4


def test_who_is_sure_leads_and_who_is_not_is_pulled_less() -> None:
    z = latents().requires_grad_()
    log_var = torch.zeros_like(z).detach()
    log_var[:, 0] = -2
    p = PrecisionWeighted(3)(z, ALL, log_var)
    gap = [(z[:, m] - p.mean).square().mean().item() for m in range(3)]
    assert gap[0] < 0.1 * min(gap[1:])


def test_the_loss_alone_would_have_variances_large() -> None:
    """Why the decoder is given samples: a log-variance has a price in the criterion only."""
    z, wide = latents(), torch.full_like(latents(), 2.0)
    anchor = PrecisionWeighted(3)
    losses = [alignment_loss(z, anchor, ALL, share * wide).item() for share in (-1.0, 0.0, 0.5, 1.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(losses[1] * math.exp(-2), rel=1e-4)


def test_the_mean_log_variance_is_told_of_what_was_seen() -> None:
    z, log_var, anchor = latents(), latents(7), PrecisionWeighted(3)
    assert anchor.told() == {}
    alignment_loss(z, anchor, SOME, log_var)
    assert anchor.told()["log_var"].item() == pytest.approx(log_var[SOME].mean().item(), abs=1e-6)


# ---- moments -----------------------------------------------------------------------------------------------------


def test_moments_cost_the_exact_divergence_of_two_gaussians() -> None:
    z, seen = latents().double(), mask("ab", "abc")
    pooled = z.flatten(3)
    mean, variance = pooled.mean(3), pooled.var(3, correction=0)
    share = (seen / seen.sum(1, keepdim=True))[:, :, None]
    centre = (share * mean).sum(1, keepdim=True)
    around = (share * (variance + mean.square())).sum(1, keepdim=True) - centre.square()
    each = kl_divergence(Normal(mean, variance.sqrt()), Normal(centre, around.sqrt())).mean(2)
    expected = ((each * seen).sum(1) / seen.sum(1)).mean()
    torch.testing.assert_close(alignment_loss(z, Moments(3), seen).double(), expected, **CLOSE)


@given(seed=st.integers(0, 999), spread=st.floats(0.01, 100), count=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_no_modality_pays_moments_more_than_its_own_variance_explains(seed: int, spread: float, count: int) -> None:
    z = latents(seed, modalities=count) + spread * latents(seed + 1, modalities=count)[..., :1, :1, :1]
    anchor, seen = Moments(count), torch.ones(2, count, dtype=torch.bool)
    own, p = anchor.read(z), anchor(z, seen)
    most = 0.5 * (p.log_var[:, None] - own.log_var) + 0.5 * (count - 1)
    assert (anchor.divergence(own, seen) <= most.mean(dim=(2, 3, 4, 5)) + 1e-3).all()


@given(scale=st.floats(0.1, 100), shift=st.floats(-100, 100))
@settings(max_examples=20, deadline=None)
def test_moments_have_no_unit(scale: float, shift: float) -> None:
    """A divergence between distributions: the same for latents that are all stretched and moved alike."""
    torch.testing.assert_close(
        alignment_loss(scale * latents() + shift, Moments(3), ALL), alignment_loss(latents(), Moments(3), ALL),
        rtol=2e-2, atol=1e-4,
    )  # fmt: skip


def test_variances_of_gaussian_latents_count_as_well() -> None:
    z, log_var = latents(), latents(7)
    own = Moments(3).read(z, log_var)
    expected = z.var(dim=(3, 4, 5), correction=0) + log_var.exp().mean(dim=(3, 4, 5))
    torch.testing.assert_close(own.log_var.exp()[..., 0, 0, 0], expected, **CLOSE)


# ---- moments remembered ------------------------------------------------------------------------------------------


def moments_of(*batches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel over all voxels, modalities and samples."""
    values = torch.cat([z.double().movedim(2, 0).flatten(1) for z in batches], dim=1)
    return values.mean(1), values.var(1, correction=0)


def test_it_begins_as_the_first_batch_is_then_the_mean_of_all_and_then_forgets() -> None:
    anchor = MovingMoments(3, CHANNELS, decay=0.75)
    batches = [latents(seed, spread=1 + seed) + seed for seed in range(6)]
    for count, z in enumerate(batches[:3], start=1):
        alignment_loss(z, anchor, ALL)
        mean, variance = moments_of(*batches[:count])
        torch.testing.assert_close(anchor.mean.double(), mean, **CLOSE)
        torch.testing.assert_close(anchor.log_var.exp().double(), variance, rtol=1e-4, atol=1e-4)
    for z in batches[3:]:
        before, spread = anchor.mean.clone(), anchor.log_var.exp()
        alignment_loss(z, anchor, ALL)
        mean, variance = moments_of(z)
        now = 0.75 * before + 0.25 * mean.float()
        torch.testing.assert_close(anchor.mean, now, **CLOSE)
        second = 0.75 * (spread + before.square()) + 0.25 * (variance + mean.square()).float()
        torch.testing.assert_close(anchor.log_var.exp(), second - now.square(), rtol=1e-4, atol=1e-4)
    assert int(anchor.batches) == 6


def test_each_sample_weighs_the_same_however_many_modalities_it_has() -> None:
    anchor, z = MovingMoments(3, CHANNELS), latents(batch=3)
    alignment_loss(z, anchor, mask("abc", "b", ""))
    of_samples = [z[0].mean(dim=(0, 2, 3, 4)), z[1, 1].mean(dim=(1, 2, 3))]
    torch.testing.assert_close(anchor.mean, torch.stack(of_samples).mean(0), **CLOSE)


def test_it_moves_in_training_only_and_not_by_a_batch_without_anything() -> None:
    anchor = MovingMoments(3, CHANNELS)
    assert alignment_loss(latents(), copy.deepcopy(anchor).eval(), ALL) == 0  # nothing is known yet
    alignment_loss(latents(), anchor, torch.zeros_like(ALL))
    assert int(anchor.batches) == 0
    alignment_loss(latents(), anchor, ALL)
    kept = copy.deepcopy(anchor.state_dict())
    anchor(latents(3), ALL)
    alignment_loss(latents(3), anchor.eval(), ALL)
    alignment_loss(latents(3), anchor.train(), torch.zeros_like(ALL))
    assert all(torch.equal(kept[name], value) for name, value in anchor.state_dict().items())


def test_no_gradient_flows_into_it_and_two_losses_may_wait_for_theirs() -> None:
    anchor, z, again = MovingMoments(3, CHANNELS), latents().requires_grad_(), latents().requires_grad_()
    alignment_loss(latents(5), anchor, ALL)
    loss = alignment_loss(z, anchor, ALL)
    alignment_loss(again, copy.deepcopy(anchor).eval(), ALL).backward()
    alignment_loss(latents(6), anchor, ALL)  # changes the buffers before the other loss has gone back
    loss.backward()
    p = anchor(latents(), ALL)
    before = p.mean.clone()
    alignment_loss(latents(6), anchor, ALL)
    assert torch.equal(p.mean, before)
    assert not any(buffer.requires_grad for buffer in anchor.buffers())
    assert again.grad is not None
    assert again.grad.any()
    torch.testing.assert_close(z.grad, again.grad)


def test_a_single_modality_pays_and_who_has_the_anchor_s_moments_does_not() -> None:
    anchor = MovingMoments(3, CHANNELS)
    z = latents(batch=1)[:, :1].expand(2, 3, -1, -1, -1, -1)
    assert alignment_loss(z, anchor, ALL) < 1e-6
    assert alignment_loss(z + 1, anchor.eval(), mask("b", "b")) > 0.1


# ---- gated -------------------------------------------------------------------------------------------------------


def test_a_gate_begins_as_the_plain_mean() -> None:
    z, seen = latents(), mask("abc", "ac")
    torch.testing.assert_close(GatedMixture(3, CHANNELS)(z, seen).mean, Uniform(3)(z, seen).mean)


def test_weights_are_the_case_s_own_and_sum_to_one_over_what_is_seen() -> None:
    z, seen, anchor = latents(batch=3), mask("abc", "abc", "ac"), gated([0, 1, 2])
    shares = anchor.shares(z, seen)
    torch.testing.assert_close(shares.sum(1), torch.ones(3))
    assert (shares[0] - shares[1]).abs().max() > 0.05
    assert shares[2, 1] == 0
    pooled = z[2].mean(dim=(2, 3, 4))
    score = (pooled / (1 + pooled.square().mean(1, keepdim=True)).sqrt()) @ anchor.gate + anchor.bias
    torch.testing.assert_close(shares[2, [0, 2]], score[[0, 2]].softmax(0))
    alignment_loss(z, anchor, seen)
    torch.testing.assert_close(anchor.told()["weights"], shares.mean(0))


def test_the_gate_is_not_pleased_by_latents() -> None:
    """The gradient on latents is that of a mixture whose weights are fixed."""
    anchor, z = gated([0, 1, 2]), latents().requires_grad_()
    alignment_loss(z, anchor, ALL).backward()
    fixed, share = latents().requires_grad_(), anchor.shares(latents(), ALL).detach()
    p = (share[:, :, None, None, None, None] * fixed).sum(1, keepdim=True)
    (0.5 * (fixed - p).square().mean()).backward()
    torch.testing.assert_close(z.grad, fixed.grad)


def test_without_filling_a_gate_has_nothing_to_learn_at_the_plain_mean() -> None:
    """As the weights of P*: there the gradient is 0, for every case at once."""
    anchor = GatedMixture(3, CHANNELS)
    alignment_loss(latents(), anchor, ALL).backward()
    for parameter in anchor.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() < 1e-7


# ---- lckd --------------------------------------------------------------------------------------------------------


def test_without_a_teacher_nothing_is_taught() -> None:
    anchor, z = ElectedTeacher(3), latents().requires_grad_()
    loss = alignment_loss(z, anchor, ALL)
    loss.backward()
    assert loss == 0
    assert z.grad is not None
    assert not z.grad.any()
    assert anchor.told() == {}


def test_pupils_pay_their_mean_distance_and_the_teacher_is_not_moved() -> None:
    anchor, z = elected([0, 1, 2]), latents().requires_grad_()
    loss = alignment_loss(z, anchor, mask("abc", "ac"))
    torch.testing.assert_close(loss, (z[0] - z[0, 1]).abs().mean() / 2)
    loss.backward()
    assert z.grad is not None
    assert not z.grad[0, 1].any()
    assert not z.grad[1].any()
    torch.testing.assert_close(z.grad[0, 0], (z[0, 0] - z[0, 1]).sign().detach() / (2 * 3 * z[0, 0].numel()))


@pytest.mark.parametrize(
    ("scores", "teacher"),
    [
        ([0.1, 0.5, 0.3], 1),
        ([0.5, math.nan, 0.4], 0),
        ([math.nan, math.nan, 0.0], 2),
        ([0.4, 0.4, 0.1], 0),
    ],
)
def test_the_best_is_elected_and_a_later_validation_elects_anew(scores: list[float], teacher: int) -> None:
    anchor = ElectedTeacher(3)
    anchor.elect([0.0, 0.2, 0.1])
    anchor.elect(scores)
    assert int(anchor.teacher) == teacher
    assert anchor.told()["weights"].tolist() == [float(m == teacher) for m in range(3)]
    anchor.elect([math.nan] * 3)
    assert int(anchor.teacher) == teacher


def test_of_gaussian_latents_the_means_are_taught() -> None:
    z, anchor = latents(), elected([0, 1, 2])
    assert torch.equal(alignment_loss(z, anchor, ALL, latents(7)), alignment_loss(z, anchor, ALL))


@pytest.mark.parametrize("name", ["learned", "uniform", "gated", "precision"])
def test_detached_only_each_latent_moves_and_the_loss_is_the_same(name: str) -> None:
    """The pull on Z_j is half of what the published form's doubled loss has: (Z_j − P) / |S|, with P held."""
    z, free, held = latents().requires_grad_(), made(name), made(name)
    held.detached = True
    own = {"log_var": torch.zeros_like(z)} if name == "precision" else {}
    losses = [alignment_loss(z, anchor, ALL, **own) for anchor in (free, held)]
    torch.testing.assert_close(losses[0], losses[1])
    moved = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in losses]
    if name == "uniform":  # of the free one, the anchor's own share comes back: Σ_j of the pulls is 0 for both
        p = z.mean(dim=1, keepdim=True)
        torch.testing.assert_close(moved[1], ((z - p) / 3 / z[0, 0].numel() / len(z)).detach())
    for theta in held.parameters():
        if name == "learned":
            assert torch.autograd.grad(losses[1], theta, retain_graph=True)[0].abs().max() > 0


def test_detached_is_refused_where_nothing_is_mixed() -> None:
    with pytest.raises(ConfigError, match="detach is of anchors that latents are mixed into; found anchor: pk"):
        load_config(None, ["align.anchor=pk", "align.fixed=t1c", "align.detach=true"])
    assert build_anchor(AlignConfig(anchor="pstar", detach=True), ModalitySet(("a", "b"))).detached
