"""U-HVED: its size, the product of experts, sampling, each loss term, and the published faults it must not have."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from medmap.align import AlignedSegmenter
from medmap.anchors import Anchor, FixedModality, LearnedMixture, StandardNormal, alignment_loss
from medmap.config import Config, ModelConfig
from medmap.core.gaussian import Gaussian
from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.criterion import DiceCE, term_weights, total_loss
from medmap.errors import ConfigError
from medmap.models.backbone import Encoded
from medmap.models.blocks import normalise
from medmap.models.check import check_backbone, faults
from medmap.models.uhved import LOG_VAR_LIMIT, SIZES, UHVED, UHVEDSize, product_of_experts

THREE = ModalitySet(("t1n", "t1c", "t2f"))
FIVE = ("t1n", "t1c", "t2w", "t2f", "adc")

# Another batch size takes another convolution kernel, whose float32 sums differ in the last digits.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _micro(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two levels: with the structure of faithful, and with that of tiny."""
    monkeypatch.setitem(SIZES, "micro", UHVEDSize((4, 8)))
    monkeypatch.setitem(SIZES, "light", UHVEDSize((4, 8), light=True))


@pytest.fixture
def net() -> UHVED:
    torch.manual_seed(0)
    return UHVED(THREE, classes=3, size="micro")


def images(batch: int, *size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(batch, 1, *(size or (8, 8, 8)), generator=generator) for name in THREE}


def mask(*rows: str) -> Tensor:
    return torch.tensor([[name in row.split("+") for name in THREE] for row in rows])


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --- sizes and the contract ------------------------------------------------------------------------------------------


def test_faithful_has_the_published_number_of_parameters_and_a_bias_at_both_ends_of_a_path() -> None:
    with torch.device("meta"):
        net = UHVED(GLIOMA_MRI, classes=4, size="faithful")
    biases = sum(m.bias.numel() for m in net.modules() if isinstance(m, nn.Conv3d) and m.bias is not None)
    assert (parameters(net), biases) == (1_250_592, 40)
    assert parameters(net) - biases == 1_250_552


def test_tiny_is_below_a_million() -> None:
    assert parameters(UHVED(GLIOMA_MRI, classes=4)) < 1e6


def test_an_unknown_size_is_told_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"uhved has no size 'base'; expected one of tiny, faithful"):
        UHVED(THREE, classes=3, size="base")


@pytest.mark.parametrize(("count", "size"), [(2, "tiny"), (3, "micro"), (4, "light"), (5, "light")])
def test_every_law_of_a_backbone(count: int, size: str) -> None:
    modalities = ModalitySet(FIVE[:count])
    assert not faults(check_backbone(lambda: UHVED(modalities, classes=3, size=size), size=(7, 8, 5)))


@pytest.mark.parametrize("size", [(2, 2, 2), (5, 9, 33), (16, 17, 18)])
def test_any_crop_and_a_batch_of_one(size: tuple[int, int, int]) -> None:
    net = UHVED(THREE, classes=3)
    decoded = net.decode(net.encode(images(1, *size), mask("t1n+t1c")), mask("t1c"))
    assert decoded.logits.shape == (1, 3, *size)
    assert all(term.isfinite() for term in decoded.losses.values())


def test_a_saved_network_answers_as_before(net: UHVED) -> None:
    torch.manual_seed(7)
    other, seen = UHVED(THREE, classes=3, size="micro").eval(), mask("t1n+t2f")
    given, net = images(1), net.eval()
    logits = net.decode(net.encode(given, seen), seen).logits
    assert (other.decode(other.encode(given, seen), seen).logits - logits).abs().max() > 1e-3
    other.load_state_dict(load(save(net.state_dict())))
    assert torch.equal(other.decode(other.encode(given, seen), seen).logits, logits)


def test_samples_in_which_a_sequence_does_not_exist_never_meet_a_layer(net: UHVED) -> None:
    """NaN stands where there is no image: one multiplication with it would show."""
    seen, given = mask("t1n+t1c+t2f", "t1c", "t1n+t2f"), images(3)
    for m, name in enumerate(THREE):
        given[name][~seen[:, m]] = torch.nan
    decoded = net.decode(net.encode(given, seen), seen)
    (decoded.logits.sum() + sum(decoded.losses.values())).backward()
    assert decoded.logits.isfinite().all()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in net.parameters())


def test_bfloat16_autocast_runs_with_absent_samples(net: UHVED) -> None:
    seen, net = mask("t1n+t1c+t2f", "t1c"), net.eval()
    with torch.autocast("cpu", torch.bfloat16):
        encoded = net.encode(images(2), seen)
        logits = net.decode(encoded, seen).logits
    assert encoded.levels["x1"]["t1c"].dtype == logits.dtype == torch.bfloat16
    exact = net.decode(net.encode(images(2), seen), seen).logits
    # bfloat16 carries 8 bits: some percent of the spread of the logits.
    assert (logits.float() - exact).abs().max() < 0.1 * (exact.max() - exact.min())


# --- the product of experts ------------------------------------------------------------------------------------------


def experts(*parts: tuple[float, float]) -> dict[str, Tensor]:
    """One element each: (mean, variance)."""
    return {
        name: torch.tensor([mean, variance]).view(1, 2, 1, 1, 1)
        for name, (mean, variance) in zip(THREE, [(m, torch.tensor(v).log().item()) for m, v in parts], strict=True)
    }


def spread(q: Gaussian) -> Tensor:
    return q.log_var.exp()


def test_the_product_of_three_experts_and_the_prior_by_hand() -> None:
    """Variances ½, ¼ and 1: precisions 2, 4 and 1, and the prior's 1."""
    latents = experts((3.0, 0.5), (-1.0, 0.25), (6.0, 1.0))
    for kept, precision, mean in (
        ("t1n+t1c+t2f", 8, (2 * 3 - 4 * 1 + 6) / 8),
        ("t1n+t1c", 7, (2 * 3 - 4 * 1) / 7),
        ("t2f", 2, 6 / 2),
    ):
        fused = product_of_experts(latents, mask(kept), THREE)
        assert fused.mean.item() == pytest.approx(mean, rel=1e-6)
        assert spread(fused).item() == pytest.approx(1 / precision, rel=1e-6)


def test_the_product_is_per_sample_and_the_prior_where_nothing_is_present() -> None:
    latents = {name: x.expand(2, -1, 2, 2, 2) for name, x in experts((3.0, 0.5), (-1.0, 0.25), (6.0, 1.0)).items()}
    fused = product_of_experts(latents, mask("t1c", ""), THREE)
    assert fused.mean.shape == fused.log_var.shape == (2, 1, 2, 2, 2)
    torch.testing.assert_close(fused.mean[:, 0, 0, 0, 0], torch.tensor([-0.8, 0.0]))
    torch.testing.assert_close(spread(fused)[:, 0, 0, 0, 0], torch.tensor([0.2, 1.0]))


def test_the_density_is_the_product_of_the_densities() -> None:
    """log q(z) − log p(z) − Σ_j log q_j(z) is one constant, whatever z is."""
    torch.manual_seed(0)
    latents = {name: torch.randn(1, 2, 1, 1, 1) for name in THREE}
    fused = product_of_experts(latents, mask("t1n+t1c+t2f"), THREE)
    parts = [Gaussian.split(z.double(), dim=1) for z in latents.values()]
    z = torch.linspace(-3, 3, 7, dtype=torch.float64)

    def log_density(q: Gaussian) -> Tensor:
        return Normal(q.mean.double().squeeze(), (0.5 * q.log_var.double()).exp().squeeze()).log_prob(z)

    rest = log_density(fused) - sum(map(log_density, parts)) - Normal(0.0, 1.0).log_prob(z)
    torch.testing.assert_close(rest, rest[:1].expand(7), rtol=0, atol=1e-5)


@pytest.mark.parametrize("log_var", [-LOG_VAR_LIMIT, LOG_VAR_LIMIT])
def test_the_product_is_exact_for_experts_at_the_limits(log_var: float) -> None:
    """1e-7 added to the variances, as published, is 0.2 % of the sharpest."""
    latents = {name: torch.tensor([2.0, log_var]).view(1, 2, 1, 1, 1) for name in THREE}
    fused = product_of_experts(latents, mask("t1n+t1c+t2f"), THREE)
    precision = 1 + 3 * torch.tensor(-log_var, dtype=torch.float64).exp().item()
    assert spread(fused).item() * precision == pytest.approx(1, rel=1e-5)
    assert fused.mean.item() == pytest.approx(2 * (precision - 1) / precision, rel=1e-5)


def test_latents_of_zero_are_an_expert_that_repeats_the_prior() -> None:
    """So that a sequence whose box ends here says N(0, I), and does not say it with certainty."""
    nothing = torch.zeros(1, 2, 1, 1, 1)
    fused = product_of_experts({**experts((3.0, 0.5), (0.0, 1.0), (0.0, 1.0)), "t1c": nothing}, mask("t1n+t1c"), THREE)
    assert (fused.mean.item(), spread(fused).item()) == (pytest.approx(6 / 4), pytest.approx(1 / 4))


values = st.floats(-LOG_VAR_LIMIT, LOG_VAR_LIMIT, width=32)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(values, values), min_size=3, max_size=3), st.permutations(range(3)))
def test_the_product_knows_no_order_and_more_experts_never_raise_the_variance(
    parts: list[tuple[float, float]], order: list[int]
) -> None:
    tensors = [torch.tensor(part).view(1, 2, 1, 1, 1) for part in parts]
    latents = dict(zip(THREE, tensors, strict=True))
    shuffled = dict(zip(THREE, [tensors[i] for i in order], strict=True))
    everything = mask("t1n+t1c+t2f")
    one, two = (product_of_experts(z, everything, THREE) for z in (latents, shuffled))
    torch.testing.assert_close(one.log_var, two.log_var, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.mean, two.mean, rtol=1e-4, atol=1e-4)
    grown = [product_of_experts(latents, mask(kept), THREE) for kept in ("", "t1n", "t1n+t1c", "t1n+t1c+t2f")]
    assert all(bool((more.log_var <= less.log_var).all()) for less, more in pairwise(grown))


def test_log_variances_stay_in_range_and_means_are_free(net: UHVED) -> None:
    with torch.no_grad():
        for encoder in net.encoders.values():
            encoder.levels[-1][-1].weight.mul_(1e3)
    seen = mask("t1n+t1c+t2f")
    encoded = net.encode(images(1), seen)
    mean, log_var = Gaussian.split(encoded.levels["x2"]["t1c"], dim=1)
    assert (log_var.min(), log_var.max()) == (-LOG_VAR_LIMIT, LOG_VAR_LIMIT)
    assert mean.abs().max() > 10 * LOG_VAR_LIMIT
    stack = torch.stack(list(encoded.levels["x2"].values()), dim=1)
    for anchor in (StandardNormal(), FixedModality(0), LearnedMixture(3)):
        own = Gaussian.split(stack, dim=2)
        assert alignment_loss(own.mean, anchor, seen, own.log_var).isfinite()
    assert all(term.isfinite() for term in net.decode(encoded, seen).losses.values())


# --- sampling --------------------------------------------------------------------------------------------------------


def test_training_decodes_a_sample_and_evaluation_the_mean(net: UHVED) -> None:
    seen = mask("t1n+t2f")
    encoded = net.encode(images(1), seen)
    first, second = net.decode(encoded, seen).logits, net.decode(encoded, seen).logits
    assert (first - second).abs().max() > 1e-2
    net.eval()
    means = [product_of_experts(encoded.levels[level], seen, THREE).mean for level in ("x1", "x2")]
    assert torch.equal(net.decode(encoded, seen).logits, net.decoder(means))
    assert torch.equal(net.decode(encoded, seen).logits, net.decode(encoded, seen).logits)


def test_the_sample_has_the_posterior_s_mean_and_variance(net: UHVED) -> None:
    decoded: list[Tensor] = []
    net.decoder.register_forward_pre_hook(lambda _, given: decoded.append(given[0][1]))
    latents = torch.cat([torch.full((1, 4, 16, 16, 16), 3.0), torch.zeros(1, 4, 16, 16, 16)], dim=1)
    levels = {"x1": {"t1c": torch.zeros(1, 4, 32, 32, 32)}, "x2": {"t1c": latents}}
    net.decode(Encoded(levels, (32, 32, 32)), mask("t1c"))
    # 16384 draws: the mean of N(1.5, ½) is known to 0.006, its variance to 0.006.
    assert decoded[0].mean().item() == pytest.approx(1.5, abs=0.03)
    assert decoded[0].var().item() == pytest.approx(0.5, abs=0.03)


def test_both_halves_of_an_expert_get_a_gradient_through_the_sample(net: UHVED) -> None:
    """Without noise, log σ² of a lone expert would be moved by its mean alone."""
    latent = torch.zeros(1, 4, 8, 8, 8, requires_grad=True)
    levels = {"x1": {"t1c": latent}, "x2": {"t1c": torch.zeros(1, 8, 4, 4, 4)}}
    for training in (True, False):
        (slope,) = torch.autograd.grad(
            net.train(training).decode(Encoded(levels, (8, 8, 8)), mask("t1c")).logits.square().sum(), latent
        )
        assert slope[:, :2].any()
        assert bool(slope[:, 2:].any()) is training


def test_evaluation_needs_levels_alone(net: UHVED) -> None:
    net.eval()
    seen, given = mask("t1n+t1c"), images(1)
    encoded = net.encode(given, seen)
    assert encoded.context is None
    alone = {n: net.encode({n: given[n]}, mask(n)).levels for n in ("t1n", "t1c")}
    levels = {level: {n: z[level][n] for n, z in alone.items()} for level in net.strides}
    decoded = net.decode(Encoded(levels, encoded.size), seen)
    torch.testing.assert_close(decoded.logits, net.decode(encoded, seen).logits, **CLOSE)
    assert not decoded.losses
    assert not decoded.auxiliary


# --- the terms -------------------------------------------------------------------------------------------------------


def paints(net: UHVED, value: float) -> None:
    """Every image decoder gives this value everywhere."""
    with torch.no_grad():
        for decoder in net.image_decoders:
            decoder.head.weight.zero_()
            decoder.head.bias.fill_(value)


def test_kl_is_the_divergence_of_the_fused_posterior_from_the_prior(net: UHVED) -> None:
    seen, kept = mask("t1n+t1c+t2f", "t1c+t2f"), mask("t1n+t2f", "t1c")
    encoded = net.encode(images(2), seen)
    levels = []
    for level in ("x1", "x2"):
        q = product_of_experts(encoded.levels[level], kept, THREE)
        levels.append(kl_divergence(Normal(q.mean, (0.5 * q.log_var).exp()), Normal(0.0, 1.0)).mean())
    torch.testing.assert_close(net.decode(encoded, kept).losses["kl"], (levels[0] + levels[1]) / 2)


@pytest.mark.parametrize("size", ["micro", "light"])
def test_reconstruction_is_the_error_over_the_brain_of_what_is_seen_dropped_or_not(size: str) -> None:
    """Images of 1 (voxel by voxel 0 elsewhere), guesses of 3 everywhere: what counts errs by 2."""
    net = UHVED(THREE, classes=3, size=size)
    paints(net, 3.0)
    given = {name: torch.zeros(2, 1, 9, 8, 7) for name in THREE}
    given["t1n"][:, :, :2] = 1.0
    given["t1c"][0, 0, 0, 0, 0] = -1.0
    given["t1c"][1] = torch.nan
    encoded = net.encode(given, mask("t1n+t1c+t2f", "t1n+t2f"))
    found = net.decode(encoded, mask("t1n", "t2f")).losses["reconstruction"]
    strip = 2 * 8 * 7
    expected = (2 * strip * (3 - 1) ** 2 + (3 + 1) ** 2) / (2 * strip + 1)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_an_image_without_brain_reconstructs_to_no_loss(net: UHVED) -> None:
    seen = mask("t1n")
    assert net.decode(net.encode({"t1n": torch.zeros(1, 1, 8, 8, 8)}, seen), seen).losses["reconstruction"] == 0


def in_training(net: UHVED, anchors: dict[str, Anchor] | None = None) -> Callable[..., object]:
    return AlignedSegmenter(net, None, anchors or {}).train()


def stack_of(given: dict[str, Tensor]) -> Tensor:
    return torch.cat([given[name] for name in THREE], dim=1)


def test_what_was_dropped_is_reconstructed_from_what_was_kept(net: UHVED) -> None:
    output = in_training(net)(stack_of(images(1)), mask("t1n+t1c"), mask("t1n"))
    output.losses["reconstruction"].backward()
    moved = [any(bool(p.grad.any()) for p in decoder.parameters()) for decoder in net.image_decoders]
    assert moved == [True, True, False]
    touched = {n: any(p.grad is not None for p in encoder.parameters()) for n, encoder in net.encoders.items()}
    assert all(p.grad.any() for p in net.encoders["t1n"].parameters())
    assert not touched["t2f"]
    assert not any(bool(p.grad.any()) for p in net.encoders["t1c"].parameters() if p.grad is not None)


def test_a_stem_is_not_moved_by_the_target_it_makes(net: UHVED) -> None:
    """Guesses that depend on nothing: only the target could send a gradient to the image."""
    paints(net, 1.0)
    image = torch.randn(1, 1, 8, 8, 8, requires_grad=True)
    seen = mask("t1n")
    net.decode(net.encode({"t1n": image}, seen), seen).losses["reconstruction"].backward()
    assert image.grad is None or not image.grad.any()


def test_published_weights_by_default_and_each_term_by_name(net: UHVED) -> None:
    output = in_training(net)(stack_of(images(1)), mask("t1n+t1c"), mask("t1n"))
    assert term_weights(output, Config()) == {"dice_ce": 1.0, "kl": 0.1, "reconstruction": 0.1}
    other = Config(model=ModelConfig(loss_weights={"kl": 0, "reconstruction": 0.5}))
    assert term_weights(output, other) == {"dice_ce": 1.0, "kl": 0, "reconstruction": 0.5}
    loss, terms = total_loss(output, torch.zeros(1, 8, 8, 8, dtype=torch.long), DiceCE(), other)
    torch.testing.assert_close(loss, terms["dice_ce"] + 0.5 * terms["reconstruction"])


def test_the_first_convolution_has_something_to_learn(net: UHVED) -> None:
    """Published without a bias: a factor that the normalisation behind it divides away."""

    def slope(bias: bool) -> float:
        trial = copy.deepcopy(net)
        entry = trial.encoders["t1n"].levels[0][0]
        with torch.no_grad():
            entry.weight.copy_(torch.tensor([-1.0, -0.5, 0.5, 1.0]).view(4, 1, 1, 1, 1))
        if not bias:
            nn.init.zeros_(entry.bias)
        torch.manual_seed(1)
        seen = mask("t1n")
        trial.decode(trial.encode(images(1), seen), seen).logits.square().sum().backward()
        return float((entry.weight.grad * entry.weight.detach()).norm())

    assert slope(bias=True) > 100 * slope(bias=False)


# --- alignment -------------------------------------------------------------------------------------------------------


def mixture_over(seen: Tensor) -> Callable[[Tensor, Tensor], Normal]:
    """Moments of the equal mixture of what is seen, sample by sample."""

    def anchor(mean: Tensor, variance: Tensor) -> Normal:
        share = (seen / seen.sum(dim=1, keepdim=True))[:, :, None, None, None, None].double()
        centre = (share * mean).sum(dim=1)
        around = (share * (variance + (mean - centre[:, None]).square())).sum(dim=1)
        return Normal(centre[:, None], around.sqrt()[:, None])

    return anchor


SEEN = mask("t1n+t1c+t2f", "t1n+t1c", "t1c")


@pytest.mark.parametrize(
    ("anchor", "by_hand"),
    [
        (StandardNormal(), lambda mean, variance: Normal(torch.zeros_like(mean), 1.0)),
        (FixedModality(1), lambda mean, variance: Normal(mean[:, 1:2], variance[:, 1:2].sqrt())),
        (LearnedMixture(3), mixture_over(SEEN)),
    ],
    ids=["pn", "pk", "pstar"],
)
def test_alignment_to_any_anchor_is_the_exact_divergence(
    net: UHVED, anchor: Anchor, by_hand: Callable[[Tensor, Tensor], Normal]
) -> None:
    output = in_training(net, {"x2": anchor})(stack_of(images(3)), SEEN, mask("t1n", "t1c", "t1c"))
    mean, log_var = output.latents["x2"].double().chunk(2, dim=2)
    own = Normal(mean, (0.5 * log_var).exp())
    each = kl_divergence(own, by_hand(mean, log_var.exp())).mean(dim=(2, 3, 4, 5))
    expected = ((each * SEEN).sum(dim=1) / SEEN.sum(dim=1)).mean()
    assert output.losses["align/x2"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert set(output.losses) == {"kl", "reconstruction", "align/x2"}


def test_what_an_anchor_fills_in_is_one_more_expert(net: UHVED) -> None:
    """Filled with N(0, I) for two absent sequences: the prior three times over."""
    net.eval()
    decoded: list[Tensor] = []
    net.decoder.register_forward_pre_hook(lambda _, given: decoded.append(given[0][1]))
    aligned = AlignedSegmenter(net, None, {"x2": StandardNormal()}, fill="kept").eval()
    seen = mask("t1c")
    encoded = aligned.encode(images(1), seen)
    aligned.decode(encoded, seen)
    mean, log_var = Gaussian.split(encoded.levels["x2"]["t1c"], dim=1)
    trust = (-log_var).exp()
    torch.testing.assert_close(decoded[0], trust * mean / (3 + trust), **CLOSE)


def test_an_image_that_an_anchor_put_behind_a_stem_is_not_reconstructed(net: UHVED) -> None:
    net.train()
    whole, given = mask("t1n+t1c+t2f"), images(1)

    def loss(second: float, filled: dict[str, Tensor]) -> float:
        torch.manual_seed(0)
        encoded = net.encode(given, whole)
        shown = {**given, "t1c": given["t1c"] + second}
        return net.decode(replace(encoded, context=shown, filled=filled), whole).losses["reconstruction"].item()

    assert loss(3.0, {"stem": mask("t1c")}) == loss(0.0, {"stem": mask("t1c")})
    assert loss(3.0, {"x2": mask("t1c")}) > loss(0.0, {"x2": mask("t1c")})  # filled deeper, it is still the image
    assert loss(3.0, {}) > loss(0.0, {})


# --- it learns -------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_with_really_absent_sequences() -> None:
    torch.manual_seed(0)
    network = AlignedSegmenter(UHVED(THREE, classes=3), None, {"x4": LearnedMixture(3)}).train()
    truth = torch.zeros(2, 16, 16, 16, dtype=torch.long)
    truth[:, 4:12, 4:12, 4:12] = 1
    truth[:, 6:10, 6:10, 6:10] = 2
    batch = truth[:, None].float() + 0.1 * torch.randn(2, 3, 16, 16, 16)
    seen, kept = mask("t1n+t1c+t2f", "t1n+t1c"), mask("t1n+t2f", "t1n+t1c")
    batch[1, 2] = torch.nan
    optimiser = torch.optim.Adam(network.parameters(), lr=5e-3)
    history = []
    for _ in range(20):
        loss, terms = total_loss(network(batch, seen, kept), truth, DiceCE(), Config())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append({name: term.item() for name, term in terms.items()})
    assert history[-1]["dice_ce"] < 0.7 * history[0]["dice_ce"]
    assert history[-1]["reconstruction"] < 0.7 * history[0]["reconstruction"]


def test_latents_are_not_yet_normalised(net: UHVED) -> None:
    """Behind a normalisation all channels would have one mean and one spread, and an anchor nothing to align."""
    latent = net.encode(images(2), mask("t1n+t1c+t2f", "t1n+t1c+t2f")).levels["x2"]["t1n"]
    assert latent.mean(dim=(2, 3, 4)).std() > 0.1
    assert normalise(8)[0](latent).mean(dim=(2, 3, 4)).std() < 1e-4
