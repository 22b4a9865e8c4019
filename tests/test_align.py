"""MedMAP itself: the alignment loss, filling, and that nothing a pass may not look at reaches its answer.

Sections 1–7 are the faults of the published fragment, each with the test that would find it; the file is long because
they stand in one place. What every anchor has to keep is in test_anchors.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from medmap.align import AlignedSegmenter, build_segmenter, fill_absent
from medmap.anchors import (
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
from medmap.config import FILLING, AlignConfig, ModelConfig
from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.errors import ConfigError, InputError
from medmap.models.backbone import stacked
from medmap.models.blocks import placed
from medmap.models.unet import SIZES, UNetSize

THREE = ModalitySet(("t1n", "t1c", "t2f"))
STEMS = ("none", "joint", "non_shared", "enhanced")

# Another batch size, or images left out, takes another convolution kernel: float32 sums then differ in the last
# digits. A leak in these tests comes from images a hundred times too bright, and moves logits by their own size.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _micro(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A U-Net of two levels, on one thread and from one seed."""
    monkeypatch.setitem(SIZES, "micro", UNetSize((4, 8)))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def segmenter(stem: str = "none", **align: object) -> AlignedSegmenter:
    """A network whose weights have left their start, so that gates and mixtures are no plain means."""
    model = ModelConfig(size="micro", stem=stem)
    align = {"anchor": "pstar", "levels": ("x2",) if stem == "none" else ("stem", "x2"), **align}
    torch.manual_seed(0)
    net = build_segmenter(model, AlignConfig(**align), THREE, classes=3)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    net.elect({"t1c": 0.5, "t2f": 0.4})
    return net


def images(batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, 8, 8, 8, generator=torch.Generator().manual_seed(seed))


def mask(*rows: str) -> Tensor:
    return torch.tensor([[name in row.split("+") for name in THREE] for row in rows])


def replaced(batch: Tensor, where: Tensor) -> Tensor:
    """Strong noise in the images that a mask names."""
    noise = 100 * torch.randn(batch.shape, generator=torch.Generator().manual_seed(9))
    return torch.where(where[:, :, None, None, None], noise, batch)


def named(batch: Tensor) -> dict[str, Tensor]:
    return {name: batch[:, m : m + 1] for m, name in enumerate(THREE)}


ALL = mask("t1n+t1c+t2f", "t1n+t1c+t2f")
KEPT = mask("t1n", "t1c+t2f")
LATENT = (4, 2, 2, 2)


def latents(batch: int = 2, modalities: int = 3, seed: int = 2) -> Tensor:
    return torch.randn(batch, modalities, *LATENT, generator=torch.Generator().manual_seed(seed))


def with_theta(*theta: float) -> LearnedMixture:
    anchor = LearnedMixture(len(theta))
    with torch.no_grad():
        anchor.theta.copy_(torch.tensor(theta))
    return anchor


def with_w(*w: float) -> RatioMixture:
    anchor = RatioMixture(len(w))
    with torch.no_grad():
        anchor.w.copy_(torch.tensor(w))
    return anchor


# --- witnesses: the closed forms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", [Uniform(4), with_theta(0.1, 1.0, -2.0, 0.3)], ids=["uniform", "learned"])
def test_for_four_modalities_a_mixture_costs_the_published_sum_of_mse_over_eight(anchor: Uniform) -> None:
    z, seen = latents(2, 4), torch.ones(2, 4, dtype=torch.bool)
    p = torch.einsum("m,bmcxyz->bcxyz", anchor.weights(), z)
    published = sum(F.mse_loss(z[:, m], p) for m in range(4)) / 8
    torch.testing.assert_close(alignment_loss(z, anchor, seen), published)


def test_the_mean_runs_over_what_is_seen() -> None:
    """Two of three seen: Σ_j over these two of half the squared distance to their midpoint, over 2."""
    z = latents(1)
    half = (z[:, 0] - z[:, 2]) / 2
    loss = alignment_loss(z, Uniform(3), mask("t1n+t2f"))
    torch.testing.assert_close(loss, 0.5 * half.square().mean())


def test_standard_normal_costs_half_the_mean_square() -> None:
    z = latents()
    torch.testing.assert_close(alignment_loss(z, StandardNormal(), ALL), 0.5 * z.square().mean())


def test_a_learned_mixture_starts_as_the_uniform_one() -> None:
    z, seen = latents(), mask("t1n+t1c+t2f", "t1n+t2f")
    torch.testing.assert_close(LearnedMixture(3)(z, seen).mean, Uniform(3)(z, seen).mean)
    assert LearnedMixture(3).weights().tolist() == pytest.approx([1 / 3] * 3)


def test_weights_are_renormalised_over_what_is_seen() -> None:
    z, anchor = latents(1), with_theta(0.0, math.log(2), math.log(5))
    p = anchor(z, mask("t1n+t1c")).mean
    torch.testing.assert_close(p, z[:, 0] / 3 + 2 * z[:, 1] / 3)


def test_a_fixed_anchor_is_not_moved_by_its_own_loss() -> None:
    z = latents(1).requires_grad_()
    alignment_loss(z, FixedModality(1), ALL[:1]).backward()
    assert z.grad is not None
    assert not z.grad[:, 1].any()
    assert z.grad[:, 0].any()
    torch.testing.assert_close(z.grad[:, 0], (z[:, 0] - z[:, 1]).detach() / (3 * z[:, 0].numel()))


def test_a_fixed_anchor_says_nothing_where_its_modality_is_not_seen() -> None:
    """7. P^k contributes nothing to a sample in which k is unseen."""
    z = latents().requires_grad_()
    alone = alignment_loss(z[:1], FixedModality(1), mask("t1n+t1c+t2f"))
    both = alignment_loss(z, FixedModality(1), mask("t1n+t1c+t2f", "t1n+t2f"))
    torch.testing.assert_close(both, alone / 2)
    both.backward()
    assert z.grad is not None
    assert not z.grad[1].any()


# --- 1. degenerate weights ------------------------------------------------------------------------------------------


@given(theta=st.lists(st.floats(-3, 3), min_size=3, max_size=3))
@settings(max_examples=25, deadline=None)
def test_equal_weights_are_the_minimiser_for_any_fixed_latents(theta: list[float]) -> None:
    z = latents().double()
    least, other = alignment_loss(z, Uniform(3), ALL), alignment_loss(z, with_theta(*theta), ALL)
    assert other >= least - 1e-6
    if max(theta) - min(theta) > 0.1:
        assert other > least


def test_weights_slide_to_one_over_m_whatever_the_latents_are_worth() -> None:
    """One latent is nothing but 0: the loss alone tells the weights no word of it."""
    z, anchor = latents(), with_theta(1.0, 0.0, -1.0)
    z[:, 0] = 0
    trajectory = []
    optimiser = torch.optim.SGD(anchor.parameters(), lr=2.0)
    for _ in range(150):
        trajectory.append(anchor.weights().detach())
        optimiser.zero_grad()
        alignment_loss(z, anchor, ALL).backward()
        optimiser.step()
    away = [float((w - 1 / 3).abs().max()) for w in trajectory]
    assert away[0] > 0.3
    assert away[-1] < 1e-2
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(away))


def test_weights_have_no_gradient_at_one_over_m_and_none_once_latents_coincide() -> None:
    apart, together = LearnedMixture(3), with_theta(1.0, 0.0, -1.0)
    alignment_loss(latents(), apart, ALL).backward()
    alignment_loss(latents()[:, :1].expand(-1, 3, -1, -1, -1, -1), together, ALL).backward()
    for anchor in (apart, together):
        assert anchor.theta.grad is not None
        assert anchor.theta.grad.abs().max() < 1e-7


@pytest.mark.parametrize("fill", ["none", "kept"])
def test_the_segmentation_loss_reaches_the_weights_through_filling_only(fill: str) -> None:
    net = segmenter(fill=fill)
    out = net(images(), ALL, mask("t1n+t1c", "t1c+t2f"))
    (gradient,) = torch.autograd.grad(out.logits.square().sum(), net.anchors["x2"].theta, allow_unused=True)
    if fill == "none":
        assert gradient is None
    else:
        assert gradient.abs().max() > 1e-6


# --- 2. w / Σw --------------------------------------------------------------------------------------------------------


def test_the_published_weights_start_with_a_negative_one_seven_times_in_eight() -> None:
    """All four of one sign has probability 2/16, so some weight is negative with probability 0.875."""
    draws = 3000
    negative = sum(bool((RatioMixture(4).weights() < 0).any()) for _ in range(draws)) / draws
    assert negative == pytest.approx(0.875, abs=4 * math.sqrt(0.875 * 0.125 / draws))


def test_ratio_is_an_option_and_softmax_the_default() -> None:
    default, ratio = AlignConfig(anchor="pstar"), AlignConfig(anchor="pstar", weights="ratio")
    assert type(build_anchor(default, THREE)) is LearnedMixture
    published = build_anchor(ratio, THREE)
    assert type(published) is RatioMixture
    assert float(published.weights().sum().detach()) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(published.weights(), published.w / published.w.sum())


@given(theta=st.lists(st.floats(-30, 30), min_size=1, max_size=5))
def test_softmax_weights_are_positive_and_sum_to_one(theta: list[float]) -> None:
    weights = with_theta(*theta).weights().detach()
    assert (weights >= 0).all()
    assert float(weights.sum()) == pytest.approx(1, abs=1e-5)


# --- 3. leaks ---------------------------------------------------------------------------------------------------------

NAMES = ("none", "pstar", "pk", "pn", "uniform", "precision", "moments", "ema", "gated", "lckd")
SETUPS = [
    (stem, {"anchor": anchor, "fill": fill} | ({"fixed": "t1c"} if anchor == "pk" else {}))
    for stem, anchor, fill in product(STEMS, NAMES, ("none", "kept"))
    if fill == "none" or anchor in FILLING
]
setups = pytest.mark.parametrize(
    ("stem", "align"), SETUPS, ids=["-".join([s, *map(str, a.values())]) for s, a in SETUPS]
)


@setups
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_voxels_of_a_dropped_sequence_move_no_logit(stem: str, align: dict, training: bool) -> None:
    """Leak 1 (a joint T) and leak 2 (an anchor over what was dropped)."""
    net = segmenter(stem, **align).train(training)

    def logits(batch: Tensor, seen: Tensor) -> Tensor:
        torch.manual_seed(3)  # of the samples that are drawn where variances are learned
        return net(batch, seen, KEPT).logits

    with torch.no_grad():
        before = logits(images(), ALL)
        torch.testing.assert_close(logits(replaced(images(), ~KEPT), ALL), before, **CLOSE)
        # Really absent, or only dropped: one and the same answer.
        torch.testing.assert_close(logits(images(), KEPT), before, **CLOSE)
        assert (logits(replaced(images(), KEPT), ALL) - before).abs().max() > 0.1


@setups
def test_the_voxels_of_an_absent_sequence_move_no_logit_no_loss_and_no_gradient(stem: str, align: dict) -> None:
    seen = mask("t1n+t1c", "t1c+t2f")
    found = []
    for batch in (images(), replaced(images(), ~seen)):
        net = segmenter(stem, **align).train()
        out = net(batch, seen, KEPT)
        (out.logits.square().mean() + sum(out.losses.values())).backward()
        found.append((out.logits, out.losses, {n: p.grad for n, p in net.named_parameters() if p.grad is not None}))
    for (n, a), (m, b) in zip(found[0][2].items(), found[1][2].items(), strict=True):
        assert n == m
        torch.testing.assert_close(b, a, **CLOSE)
    torch.testing.assert_close(found[1][:2], found[0][:2], **CLOSE)


@setups
def test_where_what_was_dropped_is_not_used_it_need_not_be_there(stem: str, align: dict) -> None:
    net = segmenter(stem, **align).train()
    assert net.uses_dropped == (align["anchor"] != "none")
    if net.uses_dropped:
        return
    with torch.no_grad():
        whole, part = (net(batch, ALL, KEPT) for batch in (images(), images() * KEPT[:, :, None, None, None]))
    assert torch.equal(whole.logits, part.logits)
    assert whole.losses == part.losses


@setups
def test_what_is_encoded_once_may_be_decoded_for_every_subset(stem: str, align: dict) -> None:
    """What evaluation does: encode everything, decode the kept; the same as never having had the rest."""
    net = segmenter(stem, **align).eval()
    assert net.separable == (stem != "joint" and not (stem != "none" and align["fill"] != "none"))
    with torch.no_grad():
        kept, without = mask("t1n", "t1c"), {name: x for name, x in named(images()).items() if name != "t2f"}
        alone = net.decode(net.encode(without, kept), kept).logits
        if net.separable:
            encoded = net.encode(named(replaced(images(), ~kept)), ALL)
            torch.testing.assert_close(net.decode(encoded, kept).logits, alone, **CLOSE)


@pytest.mark.parametrize("stem", ["none", "non_shared"])
def test_the_published_filling_leaks_what_was_dropped(stem: str) -> None:
    """3. fill: seen is the published form; the test above would find it."""
    net = segmenter(stem, fill="seen").train()
    with torch.no_grad():
        logits = [net(batch, ALL, KEPT).logits for batch in (images(), replaced(images(), ~KEPT))]
    assert (logits[0] - logits[1]).abs().max() > 0.1


def test_the_published_filling_does_not_leak_at_test() -> None:
    """There P_mix is made of what is there: leak 2 is that training and test differ."""
    net = segmenter(fill="seen").eval()
    with torch.no_grad():
        logits = [
            net.decode(net.encode(named(batch), ALL), KEPT).logits for batch in (images(), replaced(images(), ~KEPT))
        ]
    torch.testing.assert_close(*logits, **CLOSE)


def test_a_joint_stem_that_saw_the_dropped_images_would_leak() -> None:
    """Why it is given only what is kept."""
    net = segmenter("joint").eval()
    with torch.no_grad():
        logits = [
            net.decode(net.encode(named(b), ALL, ALL), KEPT).logits for b in (images(), replaced(images(), ~KEPT))
        ]
    assert (logits[0] - logits[1]).abs().max() > 0.1


def test_the_leaking_stem_leaks_in_training_and_cannot_where_a_sequence_is_really_absent() -> None:
    net, honest = segmenter("leaking").train(), segmenter("joint").train()
    with torch.no_grad():
        for network, leaks in ((net, True), (honest, False)):
            first, second = (network(b, ALL, KEPT).logits for b in (images(), replaced(images(), ~KEPT)))
            assert bool((first - second).abs().max() > 0.1) == leaks
        absent = images() * KEPT[:, :, None, None, None]
        torch.testing.assert_close(net(absent, KEPT, KEPT).logits, honest(absent, KEPT, KEPT).logits)


# --- filling ----------------------------------------------------------------------------------------------------------


def test_filling_puts_the_anchor_over_the_kept_where_a_latent_is_absent() -> None:
    seen, kept = mask("t1n+t1c+t2f", "t1n+t1c"), mask("t1n+t1c", "t1c")
    with torch.no_grad():
        before = segmenter().encode(named(images()), seen)
    after = fill_absent(before, "x2", Uniform(3), THREE, over=kept, kept=kept)
    z, put = before.levels["x2"], after.levels["x2"]
    torch.testing.assert_close(put["t2f"][0], (z["t1n"][0] + z["t1c"][0]) / 2)
    for name in ("t1n", "t2f"):
        torch.testing.assert_close(put[name][1], z["t1c"][1])
    assert torch.equal(put["t1c"], z["t1c"])
    assert torch.equal(put["t1n"][0], z["t1n"][0])
    assert after.present("x2", kept).all()
    assert after.present("x1", kept).tolist() == kept.tolist()
    assert before.filled == {}


def test_what_was_never_encoded_is_no_part_of_a_filling() -> None:
    """A joint stem sees what is kept alone: over all that is seen, zeros would pass for latents."""
    net = segmenter("joint", levels=("x2",), fill="seen").train()
    kept = mask("t1c", "t1c")
    put = {}
    decode = net.backbone.decode
    net.backbone.decode = lambda encoded, kept: put.update(encoded.levels["x2"]) or decode(encoded, kept)
    with torch.no_grad():
        net(images(), ALL, kept)
    assert put["t1c"].abs().mean() > 0.01
    torch.testing.assert_close(put["t2f"], put["t1c"])


def test_a_fixed_anchor_fills_only_where_its_modality_is_kept() -> None:
    kept = mask("t1n+t1c", "t1n")
    with torch.no_grad():
        before = segmenter().encode(named(images()), ALL)
    after = fill_absent(before, "x2", FixedModality(1), THREE, over=kept, kept=kept)
    assert after.present("x2", kept).tolist() == [[True, True, True], [True, False, False]]
    assert torch.equal(after.levels["x2"]["t2f"][0], before.levels["x2"]["t1c"][0])


@pytest.mark.parametrize("stem", ["non_shared", "enhanced", "joint"])
def test_at_the_stem_the_loss_is_about_the_latents_as_they_were(stem: str) -> None:
    filled, plain = (segmenter(stem, fill=fill, levels=("stem",)).train() for fill in ("kept", "none"))
    one, two = (net(images(), ALL, KEPT) for net in (filled, plain))
    torch.testing.assert_close(one.losses["align/stem"], two.losses["align/stem"])
    torch.testing.assert_close(one.latents["stem"], two.latents["stem"])
    seen = KEPT if stem == "joint" else ALL
    own = stacked(filled.stem(named(images()), seen), THREE)
    torch.testing.assert_close(one.losses["align/stem"], alignment_loss(own, filled.anchors["stem"], seen))
    assert (one.logits - two.logits).abs().max() > 1e-3


# --- 4. scale ---------------------------------------------------------------------------------------------------------


def test_features_are_scaled_at_test_only_in_the_published_form() -> None:
    published, ours = segmenter(scale_at_test=True), segmenter()
    with torch.no_grad():
        for net in (published, ours):
            net.anchors["x2"].theta.copy_(torch.tensor([0.0, 1.0, 2.0]))
        a, b = (net.train()(images(), ALL, KEPT).logits for net in (published, ours))
        torch.testing.assert_close(a, b)
        a, b = (net.eval()(images(), ALL, KEPT).logits for net in (published, ours))
        assert (a - b).abs().max() > 1e-2
        encoded = ours.encode(named(images()), ALL)
        w = torch.tensor([0.0, 1.0, 2.0]).softmax(dim=0)
        by_hand = {name: z * w[m] for m, (name, z) in enumerate(encoded.levels["x2"].items())}
        levels = {**encoded.levels, "x2": by_hand}
        scaled = type(encoded)(levels, encoded.size)
        torch.testing.assert_close(a, ours.backbone.decode(scaled, KEPT).logits)


# --- 5. masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("fill", ["none", "kept"])
def test_each_sample_has_its_own_masks(stem: str, fill: str) -> None:
    net, seen = segmenter(stem, fill=fill).train(), mask("t1n+t1c+t2f", "t1c+t2f")
    kept = mask("t1n+t2f", "t1c")
    both = net(images(), seen, kept)
    singles = [net(images()[[b]], seen[[b]], kept[[b]]) for b in range(2)]
    torch.testing.assert_close(both.logits, torch.cat([s.logits for s in singles]), **CLOSE)
    for name, loss in both.losses.items():
        torch.testing.assert_close(loss, (singles[0].losses[name] + singles[1].losses[name]) / 2, **CLOSE)


# --- 6. the trivial optimum -------------------------------------------------------------------------------------------


def test_latents_are_handed_out_so_that_somebody_can_watch_them_collapse() -> None:
    out = segmenter("non_shared").train()(images(), ALL, KEPT)
    assert {level: tuple(z.shape) for level, z in out.latents.items()} == {
        "stem": (2, 3, 1, 8, 8, 8),
        "x2": (2, 3, 8, 4, 4, 4),
    }
    # What over-alignment is watched by: the spread of each channel over the samples' voxels.
    assert (out.latents["x2"].std(dim=(0, 3, 4, 5)) > 0.01).all()


def test_alignment_alone_pulls_the_modalities_together() -> None:
    net = segmenter(anchor="uniform").train()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        loss = net(images(), ALL, ALL).losses["align/x2"]
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stem", "offered"), [("none", "x1, x2"), ("joint", "stem, x1, x2")])
def test_an_unknown_level_is_told_with_those_there_are(stem: str, offered: str) -> None:
    with pytest.raises(ConfigError, match=rf"align\.levels: unet micro has no level 'x7'; it offers {offered}$"):
        segmenter(stem, levels=("x2", "x7"))


def test_a_level_that_is_nearly_one_is_told_which() -> None:
    with pytest.raises(ConfigError, match="no level 'xx2'; did you mean x2"):
        segmenter("none", levels=("xx2",))


def test_the_stem_is_a_level_only_where_there_is_one() -> None:
    with pytest.raises(ConfigError, match="no level 'stem'"):
        segmenter("none", levels=("stem",))


def test_a_fixed_modality_goes_by_any_of_its_names() -> None:
    anchor = build_anchor(AlignConfig(anchor="pk", fixed="FLAIR"), THREE)
    assert isinstance(anchor, FixedModality)
    assert anchor.index == 2
    with pytest.raises(ConfigError, match=r"align\.fixed: adc is not one of the model's modalities t1n, t1c, t2f"):
        build_anchor(AlignConfig(anchor="pk", fixed="adc"), THREE)


@pytest.mark.parametrize(
    ("align", "kind"),
    [
        ({"anchor": "pstar"}, LearnedMixture),
        ({"anchor": "pn"}, StandardNormal),
        ({"anchor": "uniform"}, Uniform),
        ({"anchor": "pk", "fixed": "t1c"}, FixedModality),
        ({"anchor": "precision"}, PrecisionWeighted),
        ({"anchor": "moments"}, Moments),
        ({"anchor": "ema"}, MovingMoments),
        ({"anchor": "gated"}, GatedMixture),
        ({"anchor": "lckd"}, ElectedTeacher),
    ],
)
def test_each_anchor_by_its_name(align: dict, kind: type[nn.Module]) -> None:
    net = segmenter("enhanced", **align)
    assert [type(anchor) for anchor in net.anchors.values()] == [kind, kind]
    assert sorted(net(images(), ALL, KEPT).losses) == ["align/stem", "align/x2"]


def test_without_alpha_and_filling_there_is_no_anchor_and_nothing_to_pay() -> None:
    for align in ({"alpha": 0.0}, {"anchor": "none"}):
        net = segmenter(**align)
        assert len(net.anchors) == 0
        out = net(images(), ALL, KEPT)
        assert (out.losses, out.latents) == ({}, {})
    assert len(segmenter(alpha=0.0, fill="kept").anchors) == 1


def test_weights_are_told_by_name() -> None:
    net = segmenter()
    told = net.anchor_weights()["x2"]
    assert list(told) == list(THREE)
    assert sum(told.values()) == pytest.approx(1, abs=1e-6)
    assert segmenter(anchor="pn").anchor_weights() == {}


def test_the_published_stem_can_be_asked_for() -> None:
    model = ModelConfig(size="micro", stem="joint", stem_published=True)
    net = build_segmenter(model, AlignConfig(anchor="pstar", levels=("stem",)), GLIOMA_MRI, classes=4)
    assert net.stem is not None
    assert sum(p.numel() for p in net.stem.parameters()) == 880


def test_the_coarsest_stride_is_known() -> None:
    assert segmenter("joint").stride == 2


def test_on_a_cpu_weights_are_laid_out_as_the_normalisation_likes_them() -> None:
    """Outputs are the same but for rounding; a network whose normalisation would copy stays as it is."""
    torch.manual_seed(0)
    plain = build_segmenter(ModelConfig(size="tiny"), AlignConfig(), GLIOMA_MRI, 4).eval()
    fast = placed(copy.deepcopy(plain), torch.device("cpu"))
    kernel = fast.backbone.decoder["x1"].merge[0].weight
    assert kernel.is_contiguous(memory_format=torch.channels_last_3d)
    assert not kernel.is_contiguous()
    images, kept = torch.randn(2, 4, 16, 16, 16), torch.tensor([[True, False, True, True], [False, False, True, False]])
    torch.testing.assert_close(fast(images, kept, kept).logits, plain(images, kept, kept).logits, atol=1e-4, rtol=1e-3)
    grouped = placed(
        build_segmenter(ModelConfig(name="acn", size="tiny"), AlignConfig(), GLIOMA_MRI, 4), torch.device("cpu")
    )
    assert all(weights.is_contiguous() for weights in grouped.parameters())


@pytest.mark.parametrize(("weights", "term"), [({"teacher": 0}, "kd"), ({"teacher": 0, "kd": 0}, "contrastive")])
def test_a_student_is_not_asked_for_without_a_teacher(weights: dict[str, float], term: str) -> None:
    model = ModelConfig(name="pmkl", size="tiny", loss_weights=weights)
    with pytest.raises(ConfigError, match=f"teacher is switched off, but {term} of pmkl has nothing to learn from"):
        build_segmenter(model, AlignConfig(anchor="none"), GLIOMA_MRI, 4)


def test_students_may_do_without_a_teacher_who_teaches_nothing() -> None:
    model = ModelConfig(name="pmkl", size="tiny", loss_weights={"teacher": 0, "kd": 0, "contrastive": 0})
    network = build_segmenter(model, AlignConfig(anchor="none"), GLIOMA_MRI, 4)
    assert len(network.backbone.supported_subsets()) == len(GLIOMA_MRI) + 1


def test_students_of_pmkl_are_named_by_their_subsets() -> None:
    model = ModelConfig(name="pmkl", size="tiny", students=("t2f+t1c", "t2w"))
    network = build_segmenter(model, AlignConfig(anchor="none"), GLIOMA_MRI, 4)
    assert [str(subset) for subset in network.backbone.supported_subsets()] == ["t2w", "t1c+t2f", str(GLIOMA_MRI)]
    with pytest.raises(ConfigError, match=r"model\.students: unet has none"):
        build_segmenter(model.model_copy(update={"name": "unet"}), AlignConfig(anchor="none"), GLIOMA_MRI, 4)
    with pytest.raises(InputError, match="t9"):
        build_segmenter(ModelConfig(name="pmkl", size="tiny", students=("t9",)), AlignConfig(), GLIOMA_MRI, 4)
