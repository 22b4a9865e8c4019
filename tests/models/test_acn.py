"""ACN: its sizes, what each path sees, each term of its loss, and the published faults it must not have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from made_up_sizes import MICRO
from safetensors.torch import load, save
from torch import Tensor, nn

from medmap.align import AlignedSegmenter
from medmap.anchors import LearnedMixture
from medmap.config import AlignConfig, Config, ModelConfig
from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.criterion import DiceCE, total_loss
from medmap.errors import ConfigError
from medmap.models.acn import (
    ACN,
    ENTROPY_PUSH,
    FEATURE_PUSH,
    RAMP,
    SIZES,
    Transfer,
    adversary,
    disagreement,
    entropy_map,
    ramp_up,
)
from medmap.models.check import check_backbone, faults

THREE = ModalitySet(("t1n", "t1c", "t2f"))
FIVE = ("t1n", "t1c", "t2w", "t2f", "adc")
OWN_TERMS = {"consistency", "transfer", "entropy_adversary", "feature_adversary"}

# Another batch size takes another convolution kernel, whose float32 sums differ in the last digits.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _micro(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "micro", MICRO["acn"])


@pytest.fixture
def net() -> Iterator[ACN]:
    torch.manual_seed(0)
    return ACN(THREE, classes=3, size="micro")


def images(batch: int, *size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(batch, 1, *(size or (8, 8, 8)), generator=generator) for name in THREE}


def mask(*rows: str) -> Tensor:
    return torch.tensor([[name in row.split("+") for name in THREE] for row in rows])


def inputs_of(path: nn.Module) -> list[Tensor]:
    """What a path is given from now on."""
    found: list[Tensor] = []
    path.register_forward_pre_hook(lambda _, given: found.append(given[0].detach().clone()))
    return found


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in module.parameters()]


# --- sizes and the contract ------------------------------------------------------------------------------------------


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_faithful_paths_have_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        net = ACN(GLIOMA_MRI, classes=4, size="faithful")
    assert parameters(net.mono) == parameters(net.multi) == 4_704_228
    assert parameters(net.mono) == pytest.approx(4.70e6, rel=5e-3)
    assert parameters(net.entropy_discriminator) == 11_060_161
    assert parameters(net.feature_discriminator) == 4_438_273


def test_tiny_is_below_a_million() -> None:
    assert parameters(ACN(GLIOMA_MRI, classes=4)) < 1e6


def test_an_unknown_size_is_told_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"acn has no size 'base'; expected one of tiny, faithful"):
        ACN(THREE, classes=3, size="base")


@pytest.mark.parametrize(("count", "size"), [(2, "tiny"), (3, "micro"), (4, "micro"), (5, "micro")])
def test_every_law_of_a_backbone(count: int, size: str) -> None:
    modalities = ModalitySet(FIVE[:count])
    assert not faults(check_backbone(lambda: ACN(modalities, classes=3, size=size), size=(7, 8, 5)))


@pytest.mark.parametrize("size", [(2, 2, 2), (5, 9, 33), (16, 17, 18)])
def test_any_crop_and_a_batch_of_one(size: tuple[int, int, int]) -> None:
    net = ACN(THREE, classes=3)
    decoded = net.decode(net.encode(images(1, *size), mask("t1n+t1c")), mask("t1c"))
    assert decoded.logits.shape == decoded.auxiliary["multi"].logits.shape == (1, 3, *size)
    assert all(term.isfinite() for term in decoded.losses.values())


# --- what each path sees ---------------------------------------------------------------------------------------------


def test_multi_sees_what_is_there_and_mono_what_is_kept_and_the_rest_is_zero(net: ACN) -> None:
    """NaN stands where there is no image: one multiplication with it would show."""
    multi, mono = inputs_of(net.multi), inputs_of(net.mono)
    seen, kept = mask("t1n+t1c+t2f", "t1n+t2f"), mask("t1c", "t1n+t2f")
    given = images(2)
    given["t1c"][1] = torch.nan
    decoded = net.decode(net.encode(given, seen), kept)
    assert multi[0].flatten(2).any(dim=2).tolist() == seen.tolist()
    assert mono[0].flatten(2).any(dim=2).tolist() == kept.tolist()
    assert torch.equal(multi[0][1], mono[0][1])
    assert decoded.logits.isfinite().all()


def test_early_fusion_goes_by_name_and_not_by_position(net: ACN) -> None:
    net.eval()
    given, seen = images(1), mask("t1n+t1c+t2f")
    logits = net.decode(net.encode(given, seen), seen).logits
    backwards = net.decode(net.encode(dict(reversed(given.items())), seen), seen).logits
    assert torch.equal(logits, backwards)
    swapped = {**given, "t1n": given["t1c"], "t1c": given["t1n"]}
    assert (net.decode(net.encode(swapped, seen), seen).logits - logits).abs().max() > 1e-3


def test_an_anchor_fills_mono_and_not_multi(net: ACN) -> None:
    """Filled latents overwrite what was dropped; a multi path that got these would have nothing to teach."""
    anchor = LearnedMixture(3)
    segmenter = AlignedSegmenter(net, None, {"private": anchor}, fill="kept")
    multi, mono = inputs_of(net.multi), inputs_of(net.mono)
    seen, kept = mask("t1n+t1c+t2f"), mask("t1n+t2f")
    given = torch.cat(list(images(1).values()), dim=1)
    output = segmenter(given, seen, kept)
    latents = output.latents["private"]
    torch.testing.assert_close(multi[0], latents[:, :, 0])
    torch.testing.assert_close(mono[0][:, [0, 2]], latents[:, [0, 2], 0])
    torch.testing.assert_close(mono[0][:, 1], (latents[:, 0, 0] + latents[:, 2, 0]) / 2)
    assert set(output.losses) == {*OWN_TERMS, "align/private"}


def test_one_network_answers_every_subset_and_another_one_in_every_sample(net: ACN) -> None:
    """Published: one network for each subset."""
    net.eval()
    subsets = [str(subset) for subset in net.supported_subsets()]
    assert len(subsets) == 7
    kept = torch.stack([torch.from_numpy(subset.mask(THREE)) for subset in net.supported_subsets()])
    same = {name: x.expand(7, -1, -1, -1, -1) for name, x in images(1).items()}
    together = net.decode(net.encode(same, torch.ones(7, 3, dtype=torch.bool)), kept).logits
    for row in range(7):
        alone = net.decode(net.encode(images(1), kept[[row]]), kept[[row]]).logits
        torch.testing.assert_close(together[[row]], alone, **CLOSE)
    gaps = [(a - b).abs().max() for a, b in pairwise(together)]
    assert min(gaps) > 1e-3


def test_at_test_the_mono_path_answers_alone_and_without_dropout(net: ACN) -> None:
    """Published: mono stays in training mode, and its dropout on."""
    seen, kept = mask("t1n+t1c+t2f"), mask("t1c")
    net.train()
    one, two = (net.decode(net.encode(images(1), seen), kept).logits for _ in range(2))
    assert (one - two).abs().max() > 1e-3
    net.eval()
    multi = inputs_of(net.multi)
    one, two = (net.decode(net.encode(images(1), seen), kept) for _ in range(2))
    assert torch.equal(one.logits, two.logits)
    assert (one.auxiliary, one.losses, multi) == ({}, {}, [])


# --- the terms -------------------------------------------------------------------------------------------------------


def test_every_term_has_a_default_weight(net: ACN) -> None:
    decoded = net.decode(net.encode(images(1), mask("t1n+t1c")), mask("t1c"))
    assert set(decoded.losses) == OWN_TERMS
    assert {"dice_ce", *decoded.auxiliary, *decoded.losses} == set(net.loss_weights)
    assert decoded.auxiliary["multi"].rows is None
    assert net.loss_weights == {
        "dice_ce": 0.8,
        "multi": 0.2,
        "consistency": 10,
        "transfer": 0.5,
        "entropy_adversary": 1,  # the discriminator's own; the path is pushed with
        "feature_adversary": 1,
    }
    assert (ENTROPY_PUSH, FEATURE_PUSH) == (1e-3, 2e-4)


def test_disagreement_by_hand() -> None:
    """p = (½, ½), q = (¾, ¼): ¼² + ¼². Sure of different classes: 1 + 1."""
    p, q = torch.zeros(1, 2, 1, 1, 2), torch.zeros(1, 2, 1, 1, 2)
    q[:, 0] = math.log(3)
    assert float(disagreement(p, q)) == pytest.approx(0.125)
    assert float(disagreement(q, q)) == 0
    sure = torch.tensor([50.0, -50.0]).view(1, 2, 1, 1, 1)
    assert float(disagreement(sure, -sure)) == pytest.approx(2)


def test_the_ramp_is_a_gaussian_over_the_first_20_of_300_epochs() -> None:
    assert ramp_up(0.0) == pytest.approx(math.exp(-5))
    assert ramp_up(10 / 300) == pytest.approx(math.exp(-5 / 4))
    assert ramp_up(20 / 300) == ramp_up(0.5) == 1
    assert pytest.approx(20 / 300) == RAMP


def test_consistency_follows_the_progress_that_the_trainer_tells(net: ACN) -> None:
    segmenter = AlignedSegmenter(net, None, {})
    given, seen, kept = torch.cat(list(images(1).values()), dim=1), mask("t1n+t1c+t2f"), mask("t1c")
    found = []
    for share in (0.0, 1.0):
        torch.manual_seed(0)
        segmenter.at_progress(share)
        found.append(float(segmenter(given, seen, kept).losses["consistency"].detach()))
    assert found[0] == pytest.approx(math.exp(-5) * found[1], rel=1e-5)
    assert found[1] > 0


def test_transfer_in_closed_form() -> None:
    """With μ = 0 and σ² = 5 it is (mean t² / 5 + log 5) / 2; with μ = t and σ² = 2 it is log 2 / 2."""
    transfer = Transfer(4)
    h, t = torch.randn(2, 4, 3, 3, 3), torch.randn(2, 4, 3, 3, 3)
    transfer.requires_grad_(False)
    transfer.mean[-1].weight.zero_()
    assert float(transfer(h, t)) == pytest.approx(float(t.square().mean() / 5 + math.log(5)) / 2, rel=1e-4)
    for layer in transfer.mean[::2]:
        layer.weight.copy_(torch.eye(4)[:, :, None, None, None])
    transfer.spread.fill_(math.log(math.expm1(2)))
    assert float(transfer(h.abs(), h.abs())) == pytest.approx(math.log(2) / 2, rel=1e-4)


def test_transfer_looks_at_the_multi_path_and_sends_it_nothing(net: ACN) -> None:
    """Published: mono's own features stand where the target belongs, so that the full path never teaches."""
    net.multi.dropout.p = net.mono.dropout.p = 0.0
    seen, kept = mask("t1n+t1c+t2f"), mask("t1c")
    given = images(1)
    others = {**given, "t1n": -given["t1n"]}
    one, two = (net.decode(net.encode(x, seen), kept) for x in (given, others))
    assert torch.equal(one.logits, two.logits)
    assert abs(float((one.losses["transfer"] - two.losses["transfer"]).detach())) > 1e-5
    one.losses["transfer"].backward()
    assert gradients(net.multi) == [None] * len(gradients(net.multi))
    assert all(g is None or not g.any() for g in gradients(net.private.private["t1n"]))
    assert any(g is not None and g.any() for g in gradients(net.mono.encoder))
    assert all(g.any() for g in gradients(net.transfer))


def test_entropy_by_hand() -> None:
    """p = (¼, ¾): −¼ log₂ ¼ = 0.5 and −¾ log₂ ¾ = 0.3113, of a largest entropy of 1."""
    logits = torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1, 1)
    torch.testing.assert_close(entropy_map(logits).flatten(), torch.tensor([0.5, 0.3113]), atol=1e-4, rtol=0)


def test_entropy_is_that_of_a_distribution() -> None:
    """1 where nothing is known, 0 where the network is sure. Published: a softmax over sigmoids, never below 0.87."""
    assert float(entropy_map(torch.zeros(1, 4, 1, 1, 1)).sum()) == pytest.approx(1)
    sure = torch.tensor([40.0, -40.0, -40.0, -40.0]).view(1, 4, 1, 1, 1).requires_grad_()
    entropy = entropy_map(sure).sum()
    assert float(entropy.detach()) < 1e-6
    assert float(entropy_map(sure.sigmoid()).sum().detach()) > 0.87
    entropy.backward()
    assert sure.grad.isfinite().all()


def test_an_adversary_in_closed_form() -> None:
    """D(x) = w x: the discriminator gets its own gradient in full, mono −λ times that of softplus(−D), multi none."""
    discriminator = nn.Conv3d(1, 1, 1, bias=False)
    w, a, b = 0.7, 1.5, -0.4
    nn.init.constant_(discriminator.weight, w)
    mono, multi = (torch.full((1, 1, 1, 1, 1), value, requires_grad=True) for value in (b, a))
    loss = adversary(discriminator, mono, multi, push=1e-3)
    assert float(loss.detach()) == pytest.approx((math.log1p(math.exp(w * a)) + math.log1p(math.exp(-w * b))) / 2)
    loss.backward()

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    assert float(discriminator.weight.grad) == pytest.approx((a * sigmoid(w * a) - b * sigmoid(-w * b)) / 2)
    assert float(mono.grad) == pytest.approx(1e-3 * w * sigmoid(-w * b))
    assert multi.grad is None


@pytest.mark.parametrize("term", ["entropy_adversary", "feature_adversary"])
def test_adversaries_push_the_mono_path_alone(net: ACN, term: str) -> None:
    net.decode(net.encode(images(1), mask("t1n+t1c+t2f")), mask("t1c")).losses[term].backward()
    name = term.replace("adversary", "discriminator")
    assert all(g is not None and g.any() for g in gradients(getattr(net, name)))
    assert any(g is not None and g.any() for g in gradients(net.mono))
    assert gradients(net.multi) == [None] * len(gradients(net.multi))


def test_discriminators_learn_with_one_optimiser_whose_state_persists() -> None:
    """Published: a new optimiser at every step, whose moments are forgotten."""
    torch.manual_seed(0)
    net = ACN(THREE, classes=3, size="micro")
    discriminators = net.entropy_discriminator, net.feature_discriminator
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    sure, unsure = 20 * torch.randn(2, 3, 8, 8, 8), torch.randn(2, 3, 8, 8, 8)
    low, high = torch.randn(2, 16, 4, 4, 4), torch.randn(2, 16, 4, 4, 4) + 1
    terms: list[Tensor] = []
    for _ in range(30):
        terms = [
            adversary(net.entropy_discriminator, entropy_map(unsure), entropy_map(sure), ENTROPY_PUSH),
            adversary(net.feature_discriminator, low, high, FEATURE_PUSH),
        ]
        optimizer.zero_grad()
        sum(terms, torch.zeros(())).backward()
        optimizer.step()
    assert all(float(term.detach()) < 0.5 for term in terms)  # log 2 where they cannot tell
    kept = [optimizer.state[p] for d in discriminators for p in d.parameters()]
    assert [int(state["step"]) for state in kept] == [30] * len(kept)


def test_discriminators_are_saved_with_the_network(net: ACN) -> None:
    other = ACN(THREE, classes=3, size="micro")
    other.load_state_dict(load(save(net.state_dict())))
    found = []
    for each in (net, other):
        torch.manual_seed(0)
        found.append(each.decode(each.encode(images(2), mask("t1n+t1c", "t2f")), mask("t1c", "t2f")).losses)
    assert all(torch.equal(found[0][name], found[1][name]) for name in OWN_TERMS)


# --- training --------------------------------------------------------------------------------------------------------


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images with a bright cube, masks with absent and with dropped sequences, and the truth."""
    torch.manual_seed(2)
    target = torch.zeros(3, 8, 8, 8, dtype=torch.long)
    target[:, 2:6, 2:6, 2:6] = 1
    target[:, 3:5, 3:5, 3:5] = 2
    given = 0.3 * torch.randn(3, 3, 8, 8, 8) + target[:, None]
    seen = mask("t1n+t1c+t2f", "t1n+t2f", "t1c")
    given[~seen] = torch.nan
    return given, seen, mask("t1c+t2f", "t1n", "t1c"), target


def weighing(**weights: float) -> Config:
    return Config().model_copy(update={"model": ModelConfig(name="acn", loss_weights=weights)})


def test_the_loss_is_the_weighted_sum(net: ACN) -> None:
    given, seen, kept, target = batch()
    criterion = DiceCE()
    output = AlignedSegmenter(net, None, {})(given, seen, kept)
    loss, terms = total_loss(output, target, criterion, weighing())
    expected = 0.8 * criterion(output.logits, target) + 0.2 * criterion(output.auxiliary["multi"].logits, target)
    expected = expected + 10 * terms["consistency"] + 0.5 * terms["transfer"]
    expected = expected + terms["entropy_adversary"] + terms["feature_adversary"]
    torch.testing.assert_close(loss, expected)


def test_weight_zero_switches_an_adversary_off(net: ACN) -> None:
    given, seen, kept, target = batch()
    output = AlignedSegmenter(net, None, {})(given, seen, kept)
    total_loss(output, target, DiceCE(), weighing(entropy_adversary=0))[0].backward()
    assert not any(g.any() for g in gradients(net.entropy_discriminator))
    assert all(g.any() for g in gradients(net.feature_discriminator))


def test_training_with_absent_sequences_lowers_the_loss(net: ACN) -> None:
    given, seen, kept, target = batch()
    segmenter = AlignedSegmenter(net, None, {"private": LearnedMixture(3)})
    optimizer = torch.optim.Adam(segmenter.parameters(), lr=1e-2)
    config = weighing().model_copy(update={"align": AlignConfig(anchor="pstar", alpha=2.0)})
    history = []
    for step in range(40):
        segmenter.at_progress(step / 40)
        loss, terms = total_loss(segmenter(given, seen, kept), target, DiceCE(), config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append({name: float(term.detach()) for name, term in terms.items()})
    for name in ("dice_ce", "multi", "align/private"):  # not transfer: its target moves, and grows, as multi learns
        assert history[-1][name] < 0.8 * history[0][name], name


def test_samples_in_which_nothing_was_dropped_count_as_well(net: ACN) -> None:
    seen = mask("t1n+t2f")
    net.decode(net.encode(images(1), seen), seen).losses["transfer"].backward()
    assert any(g is not None and g.any() for g in gradients(net.mono))


def test_bfloat16_autocast_trains(net: ACN) -> None:
    given, seen, kept, target = batch()
    with torch.autocast("cpu", torch.bfloat16):
        output = AlignedSegmenter(net, None, {})(given, seen, kept)
    loss, terms = total_loss(output, target, DiceCE(), weighing())
    assert {name: term.dtype for name, term in output.losses.items()} == dict.fromkeys(OWN_TERMS, torch.float32)
    assert loss.isfinite()
    assert terms["dice_ce"] > 0
