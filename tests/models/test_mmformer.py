"""mmFormer: its published size, its two kinds of transformer, its auxiliary answers, and faults it must not have.

Where the public code has a fault, the faulty form stands beside the test, which is seen to tell it from ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from made_up_sizes import MICRO
from made_up_training import config
from torch import Tensor, nn
from torch.nn import functional as F

from medmap.align import AlignedSegmenter, Output
from medmap.anchors import LearnedMixture
from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.criterion import DiceCE, total_loss
from medmap.errors import ConfigError
from medmap.models import mmformer
from medmap.models.backbone import Backbone, Encoded, stacked
from medmap.models.check import check_backbone, faults
from medmap.models.mmformer import SIZES, MMFormer

THREE = ModalitySet(("t1n", "t1c", "t2f"))
FIVE = ("t1n", "t1c", "t2w", "t2f", "adc")
SIDE = 32  # two strides, the least there is

# Another batch size takes another convolution kernel, whose float32 sums differ in the last digits.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _micro(monkeypatch: pytest.MonkeyPatch) -> None:
    """The structure of every size, with hardly any channels; the position tables' reference crop has 32³ voxels."""
    monkeypatch.setitem(SIZES, "micro", MICRO["mmformer"])


@pytest.fixture
def net() -> Iterator[MMFormer]:
    torch.manual_seed(0)
    net = MMFormer(THREE, classes=3, size="micro").eval()
    with torch.no_grad():
        for positions in net.bottleneck.positions.values():
            positions.normal_()
    return net


def images(batch: int, size: tuple[int, int, int] = (SIDE, SIDE, SIDE)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(batch, 1, *size, generator=generator) for name in THREE}


def mask(*rows: str) -> Tensor:
    return torch.tensor([[name in row.split("+") for name in THREE] for row in rows])


ALL = "t1n+t1c+t2f"

# ---- sizes -------------------------------------------------------------------------------------------------------

PUBLISHED = 36_654_416  # of the public code, at 128³ with 4 modalities and 4 classes
UNUSED = 4 * (512 * 128 + 128)  # of these: a convolution per modality from tokens to channels that nothing calls


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_the_faithful_size_is_the_published_one_without_what_is_never_used() -> None:
    with torch.device("meta"):
        net = MMFormer(GLIOMA_MRI, classes=4, size="faithful")
    assert count(net) == PUBLISHED - UNUSED
    assert count(net.encoders["t1c"]) == 1_473_216
    assert count(net.bottleneck.intra["t1c"]) == 5_250_048
    assert pytest.approx(36.65e6, rel=0.005) == PUBLISHED


def test_tiny_is_small() -> None:
    with torch.device("meta"):
        assert 0.5e6 < count(MMFormer(GLIOMA_MRI, classes=4, size="tiny")) <= 1e6


def test_an_unknown_size_is_told_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"mmformer has no size 'base'; expected one of tiny, faithful"):
        MMFormer(THREE, classes=3, size="base")


# ---- the contract ------------------------------------------------------------------------------------------------


class FewSubsets(MMFormer):
    """A single modality, all, and one between: every law in a fraction of the time that all subsets take."""

    def supported_subsets(self) -> list[ModalitySet]:
        every = super().supported_subsets()
        return [every[0], every[len(every) // 2], every[-1]]


@pytest.mark.parametrize(("count", "size"), [(2, "tiny"), (3, "micro"), (4, "micro"), (5, "micro")])
def test_it_keeps_every_law_of_a_backbone(count: int, size: str) -> None:
    names = ModalitySet(FIVE[:count])
    assert faults(check_backbone(lambda: FewSubsets(names, classes=3, size=size))) == []


def test_it_is_a_backbone_that_names_its_terms(net: MMFormer) -> None:
    assert isinstance(net, Backbone)
    assert (net.separable, net.uses_dropped) == (True, True)
    assert net.strides == {"x1": 1, "x2": 2, "x3": 4, "x4": 8, "x5": 16}
    assert net.loss_weights == {"separate": 1.0, "deep": 1.0}
    assert len(net.supported_subsets()) == 7


def test_decoding_needs_the_levels_alone(net: MMFormer) -> None:
    """What a prediction holds: each sequence encoded by itself, and nothing that was noted besides."""
    levels: dict[str, dict[str, Tensor]] = {level: {} for level in net.strides}
    for name in ("t1c", "t2f"):
        for level, z in net.encode({name: images(1)[name]}, mask(name)).levels.items():
            levels[level] |= z
    together = net.encode(images(1), mask(ALL))
    kept = mask("t1c+t2f")
    logits = net.decode(Encoded(levels, (SIDE, SIDE, SIDE)), kept).logits
    torch.testing.assert_close(logits, net.decode(together, kept).logits, **CLOSE)


# ---- tokens and space --------------------------------------------------------------------------------------------


def test_every_token_returns_to_its_own_place_in_its_own_modality(
    net: MMFormer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With transformers that change nothing, what leaves the bottleneck is what entered it, side by side."""
    monkeypatch.setattr(mmformer._Transformer, "forward", lambda self, tokens, positions, attended=None: tokens)
    for conv in (*net.bottleneck.enter.values(), net.bottleneck.leave):
        nn.init.zeros_(conv.bias)
        conv.weight.data = torch.eye(len(conv.weight))[:, :, None, None, None]
    latents = {name: torch.randn(2, 8, 2, 3, 4) for name in THREE}
    present = mask(ALL, "t1c")
    expected = stacked(latents, THREE) * present[:, :, None, None, None, None]
    joined = net.bottleneck(within(net, latents), present)
    torch.testing.assert_close(joined, expected.flatten(1, 2), **CLOSE)
    tokens = torch.cat([mmformer._tokens(z) for z in expected.unbind(1)], dim=1)
    published = tokens.view(2, 2, 3, 4, 3 * 8).permute(0, 4, 1, 2, 3)
    assert not torch.allclose(published[:1], joined[:1], atol=1.0)


def within(net: MMFormer, latents: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each modality's tokens after its own transformer."""
    return {name: net.bottleneck.within(name, z) for name, z in latents.items()}


def unmasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published form: whatever does not exist is a zero token with its position, and a key."""
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, attn_mask, dropout_p: original(q, k, v, dropout_p=dropout_p)
    )


@pytest.mark.parametrize("published", [False, True])
def test_what_is_absent_is_no_key(net: MMFormer, monkeypatch: pytest.MonkeyPatch, published: bool) -> None:
    """Beside a sample that has T2-FLAIR, one without does not notice its positions."""
    if published:
        unmasked(monkeypatch)
    seen = mask("t1c", ALL)
    with torch.no_grad():
        encoded = net.encode(images(2), seen)
        before = net.decode(encoded, seen).logits
        net.bottleneck.positions["t2f"].mul_(-3)
        moved = (net.decode(encoded, seen).logits - before).abs().amax(dim=(1, 2, 3, 4))
    assert moved[1] > 1e-3
    assert (moved[0] > 1e-3) if published else (moved[0] == 0)


def test_modalities_do_attend_to_each_other(net: MMFormer) -> None:
    """The inter-modality transformer: T1's own channels of the bottleneck change with T2-FLAIR."""
    nn.init.eye_(net.bottleneck.leave.weight.data.flatten(1))
    latents = {name: torch.randn(1, 8, 2, 2, 2) for name in THREE}
    other = {**latents, "t2f": torch.randn(1, 8, 2, 2, 2)}
    own = [net.bottleneck(within(net, z), mask(ALL))[:, :8] for z in (latents, other)]
    assert (own[0] - own[1]).abs().max() > 1e-3


@pytest.mark.parametrize("level", ["x1", "x2"])
def test_a_fusion_is_a_sum_over_modalities(net: MMFormer, level: str) -> None:
    """Of all modalities side by side, and of the summands of those that are there: the same."""
    fusion, there = net.fusions[level], {"t1n": 0, "t2f": 2}
    latents = {name: torch.randn(2, SIZES["micro"].channels[int(level[1]) - 1], 3, 4, 5) for name in there}
    shares = [fusion.of_one(latents[name], index) for name, index in there.items()]
    joined = torch.cat([latents["t1n"], torch.zeros_like(latents["t1n"]), latents["t2f"]], dim=1)
    torch.testing.assert_close(fusion.of_shares(shares), fusion(joined), **CLOSE)


# ---- any crop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(9, 20, 32), (33, 16, 48), (64, 32, 32)])
def test_any_crop_size(net: MMFormer, size: tuple[int, int, int]) -> None:
    seen = mask(ALL, "t2f")
    decoded = net.train().decode(net.encode(images(2, size), seen), seen)
    assert decoded.logits.shape == (2, 3, *size)
    assert {tuple(a.logits.shape) for a in decoded.auxiliary.values()} == {(2, 3, *size)}
    decoded.logits.square().mean().backward()
    assert all(p.grad.any() for p in net.bottleneck.positions.values())


def test_positions_are_those_of_the_table_on_its_grid_and_between_them_elsewhere() -> None:
    table = torch.randn(1, 6, 4, 4, 4)
    assert torch.equal(mmformer._on_grid(table, (4, 4, 4)), table)
    slope = torch.arange(4.0).reshape(1, 1, 4, 1, 1).expand(1, 1, 4, 4, 4)
    along = mmformer._on_grid(slope, (8, 2, 5))[0, 0, :, 0, 0]
    # Element i of 8 has its middle at (i + ½)/2 − ½ of the table's elements; the ends are held.
    assert along.tolist() == pytest.approx([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])


def test_tokens_come_back_from_a_sequence_to_their_grid() -> None:
    grid = torch.randn(2, 5, 2, 3, 4)
    assert torch.equal(mmformer._grid(mmformer._tokens(grid), (2, 3, 4)), grid)


# ---- nothing unused, nothing absent ------------------------------------------------------------------------------


def without_gradient(net: MMFormer) -> list[str]:
    seen = mask(ALL)
    decoded = net.train().decode(net.encode(images(1), seen), seen)
    every = [decoded.logits, *(a.logits for a in decoded.auxiliary.values())]
    sum((torch.randn_like(z) * z).sum() for z in every).backward()
    return [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]


def test_nothing_is_unused(net: MMFormer) -> None:
    assert without_gradient(net) == []
    net.decode_conv = nn.Conv3d(8, 8, 1)
    assert without_gradient(net) == ["decode_conv.weight", "decode_conv.bias"]


def test_only_what_exists_is_encoded(net: MMFormer) -> None:
    """NaN stands where there is no image: one multiplication with it would show."""
    seen = mask("t1n+t1c", "t1c")
    given = images(2)
    for m, name in enumerate(THREE):
        given[name][~seen[:, m]] = torch.nan
    met: dict[str, int] = {}
    for name, encoder in net.encoders.items():
        encoder.register_forward_pre_hook(lambda _, args, name=name: met.update({name: len(args[0])}))
    decoded = net.train().decode(net.encode(given, seen), seen)
    assert met == {"t1n": 1, "t1c": 2}
    assert all(z.isfinite().all() for z in (decoded.logits, *(a.logits for a in decoded.auxiliary.values())))


def largest_gradient(net: MMFormer, given: dict[str, Tensor]) -> float:
    seen = mask(ALL)
    decoded = net.train().decode(net.encode(given, seen), seen)
    (torch.randn_like(decoded.logits) * decoded.logits).sum().backward()
    return max(float(p.grad.abs().nan_to_num(torch.inf).max()) for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("published", [False, True])
def test_a_crop_of_nothing_but_background_makes_no_gradient_explode(
    monkeypatch: pytest.MonkeyPatch, published: bool
) -> None:
    if published:
        monkeypatch.setattr(mmformer._Normalise, "forward", lambda self, x: F.instance_norm(x))
    torch.manual_seed(0)
    net = MMFormer(THREE, classes=3, size="micro")
    largest = largest_gradient(net, {name: torch.zeros(1, 1, SIDE, SIDE, SIDE) for name in THREE})
    assert (largest > 1e9) if published else (largest < 1e5)


def test_a_channel_with_contrast_is_normalised_as_ever() -> None:
    x = torch.randn(2, 3, 4, 4, 4) * torch.tensor([1.0, 0.01, 100])[:, None, None, None]
    x[1, 0] = 7.0
    expected = F.instance_norm(x)
    torch.testing.assert_close(mmformer._Normalise()(x), expected, **CLOSE)
    x.requires_grad_()
    (mmformer._Normalise()(x) * torch.randn_like(x)).sum().backward()
    assert not x.grad[1, 0].any()
    assert x.grad[0].abs().amax(dim=(1, 2, 3)).min() > 0


def test_latents_leave_before_a_normalisation(net: MMFormer) -> None:
    low, high = (net.encode({"t1c": images(1)["t1c"] * s + s}, mask("t1c")) for s in (1.0, 5.0))
    ratio = high.levels["x1"]["t1c"].std() / low.levels["x1"]["t1c"].std()
    assert ratio > 3
    assert high.levels["x5"]["t1c"].mean(dim=(2, 3, 4)).abs().max() > 1e-2


# ---- auxiliary answers -------------------------------------------------------------------------------------------


def test_auxiliary_answers_in_train_mode_only(net: MMFormer) -> None:
    seen = mask("t1n+t1c", "t1c")
    encoded = net.encode(images(2), seen)
    assert net.decode(encoded, seen).auxiliary == {}
    auxiliary = net.train().decode(encoded, mask("t1c", "t1c")).auxiliary
    names = ["separate/t1n", "separate/t1c", "deep/x2", "deep/x3", "deep/x4", "deep/x5"]
    assert list(auxiliary) == names
    assert auxiliary["separate/t1n"].rows.tolist() == [True, False]
    assert auxiliary["separate/t1c"].rows.tolist() == [True, True]
    assert all(auxiliary[name].rows is None for name in names[2:])


def test_one_decoder_answers_for_each_modality_alone(net: MMFormer) -> None:
    encoded = net.encode(images(2), mask(ALL, "t1n+t2f"))
    same = {level: dict.fromkeys(z, z["t1n"]) for level, z in encoded.levels.items()}
    auxiliary = net.train().decode(replace(encoded, levels=same), mask("t1c", "t2f")).auxiliary
    one, two = auxiliary["separate/t1n"].logits, auxiliary["separate/t2f"].logits
    torch.testing.assert_close(one, two, **CLOSE)
    torch.testing.assert_close(auxiliary["separate/t1c"].logits[0], one[0], **CLOSE)
    assert not auxiliary["separate/t1c"].logits[1].any()
    changed = {**same["x3"], "t2f": torch.randn_like(same["x3"]["t2f"])}
    auxiliary = net.decode(replace(encoded, levels={**same, "x3": changed}), mask("t1c", "t2f")).auxiliary
    torch.testing.assert_close(auxiliary["separate/t1n"].logits, one, **CLOSE)
    assert (auxiliary["separate/t2f"].logits - two).abs().max() > 1e-3


def test_what_was_dropped_learns_from_its_own_answer(net: MMFormer) -> None:
    decoded = net.train().decode(net.encode(images(1), mask("t1n+t1c")), mask("t1c"))
    decoded.logits.square().mean().backward(retain_graph=True)
    assert not any(p.grad is not None and p.grad.any() for p in net.encoders["t1n"].parameters())
    decoded.auxiliary["separate/t1n"].logits.square().mean().backward()
    assert all(p.grad.any() for p in net.encoders["t1n"].parameters())
    assert all(p.grad is None for p in net.encoders["t2f"].parameters())


def test_latents_that_were_filled_in_pass_the_transformers_and_have_no_answer_of_their_own(net: MMFormer) -> None:
    encoded = net.encode(images(1), mask("t1n+t1c"))
    kept = mask("t1n")
    put_in = {**encoded.levels["x5"], "t1c": torch.randn_like(encoded.levels["x5"]["t1c"])}
    filled = encoded.with_filled("x5", put_in, mask("t1c"))
    with torch.no_grad():
        without, with_it = net.decode(encoded, kept).logits, net.decode(filled, kept).logits
    assert (without - with_it).abs().max() > 1e-4
    assert "separate/t1c" in net.train().decode(encoded, kept).auxiliary
    assert "separate/t1c" not in net.decode(filled, kept).auxiliary


# ---- training ----------------------------------------------------------------------------------------------------


def test_some_steps_lower_every_term_with_sequences_absent_and_dropped() -> None:
    torch.manual_seed(0)
    net = AlignedSegmenter(MMFormer(THREE, classes=2, size="micro"), None, {"x5": LearnedMixture(3)}).train()
    truth = torch.zeros(2, SIDE, SIDE, SIDE, dtype=torch.long)
    truth[:, 8:24, 8:24, 8:24] = 1
    batch = torch.randn(2, 3, SIDE, SIDE, SIDE) * 0.3 + 2 * truth[:, None]
    seen, kept = mask(ALL, "t1c+t2f"), mask("t1n+t2f", "t1c")
    batch[1, 0] = torch.nan
    optimizer, history = torch.optim.AdamW(net.parameters(), lr=1e-2), []
    for _ in range(12):
        loss, terms = total_loss(net(batch, seen, kept), truth, DiceCE(), config())
        history.append({name: float(term.detach()) for name, term in terms.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    first, last = history[0], history[-1]
    separate, deep = [f"separate/{name}" for name in THREE], [f"deep/x{level}" for level in range(2, 6)]
    assert set(first) == {"dice_ce", "align/x5", *separate, *deep}
    for name in ("dice_ce", *separate, *deep):
        assert last[name] < 0.9 * first[name], name


def test_terms_weigh_one_each_and_can_be_switched_off(net: MMFormer) -> None:
    seen = mask(ALL)
    decoded = net.train().decode(net.encode(images(1), seen), seen)
    output = Output(decoded.logits, decoded.auxiliary, {}, {}, net.loss_weights)
    truth, criterion = torch.ones(1, SIDE, SIDE, SIDE, dtype=torch.long), DiceCE()
    loss, terms = total_loss(output, truth, criterion, config())
    assert len(terms) == 1 + 3 + 4
    torch.testing.assert_close(loss, sum(terms.values()))
    _, terms = total_loss(output, truth, criterion, config(model__loss_weights={"separate": 0, "deep/x5": 0}))
    assert set(terms) == {"dice_ce", "deep/x2", "deep/x3", "deep/x4"}


def test_bfloat16_autocast_runs_with_absent_samples(net: MMFormer) -> None:
    seen = mask(ALL, "t1c")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = net.decode(net.encode(images(2), seen), seen).logits
        answers = net.train().decode(net.encode(images(2), seen), seen).auxiliary.values()
    assert all(z.isfinite().all() for z in (logits, *(a.logits for a in answers)))
    with torch.no_grad():
        exact = net.eval().decode(net.encode(images(2), seen), seen).logits
    # bfloat16 carries 8 bits, and some thirty normalisations in a row each bring errors back to their full size.
    assert (logits.float() - exact).abs().mean() < 0.1 * exact.std()
