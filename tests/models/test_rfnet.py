"""RFNet: its published size, its latents, region-aware fusion by hand, what is absent, and what is supervised when."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from medmap.align import AlignedSegmenter
from medmap.anchors import LearnedMixture
from medmap.config import Config
from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.criterion import DiceCE, total_loss
from medmap.errors import ConfigError
from medmap.models.check import check_backbone, faults
from medmap.models.rfnet import (
    SIZES,
    Part,
    RFNet,
    RFNetSize,
    _EncoderLevel,
    _RegionFusion,
    features_of,
    upsampled,
)

THREE = ModalitySet(("t1n", "t1c", "t2f"))
TWO = ModalitySet(("t1c", "t2f"))

# Another batch size takes another convolution kernel, whose float32 sums differ in the last digits.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _micro(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published structure at two levels of few channels."""
    monkeypatch.setitem(SIZES, "micro", RFNetSize((4, 8), hidden=8))
    torch.manual_seed(0)


def micro() -> RFNet:
    return RFNet(THREE, classes=3, size="micro")


def images(batch: int, size: tuple[int, int, int] = (8, 8, 8)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(batch, 1, *size, generator=generator) for name in THREE}


def mask(*rows: str) -> Tensor:
    return torch.tensor([[name in row.split("+") for name in THREE] for row in rows])


ALL = "t1n+t1c+t2f"


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_faithful_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        net = RFNet(GLIOMA_MRI, classes=4, size="faithful")
    convolutions = [c for c in net.modules() if isinstance(c, nn.Conv3d) and c.bias is None]
    biases_left_out = sum(c.out_channels for c in convolutions)
    widths = ((1, 16), (16, 32), (32, 64), (64, 128))
    assert parameters(net.encoders["t1c"]) == sum(27 * (before * after + 2 * after**2) for before, after in widths)
    assert parameters(net) == 8_979_784
    assert parameters(net) + biases_left_out == 8_984_960
    assert parameters(net) == pytest.approx(8.98e6, rel=5e-3)


def test_tiny_has_less_than_a_million_parameters() -> None:
    assert parameters(RFNet(GLIOMA_MRI, classes=4, size="tiny")) < 1e6


def test_an_unknown_size_is_told_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"rfnet has no size 'huge'; expected one of tiny, faithful"):
        RFNet(THREE, classes=3, size="huge")


@pytest.mark.parametrize(
    ("count", "size", "image"),
    [(2, "tiny", (15, 16, 13)), (3, "micro", (5, 6, 7)), (4, "micro", (5, 6, 7)), (5, "micro", (5, 6, 7))],
)
def test_keeps_every_law(count: int, size: str, image: tuple[int, int, int]) -> None:
    modalities = ModalitySet(("t1n", "t1c", "t2w", "t2f", "adc")[:count])
    assert not faults(check_backbone(lambda: RFNet(modalities, classes=3, size=size), size=image))


@pytest.mark.parametrize("light", [False, True])
def test_latents_hold_all_that_the_features_are_made_of(light: bool) -> None:
    """Offering (u, v) for alignment does not change what is computed."""
    level = _EncoderLevel(2, 4, 2, light)
    latent, features = level(torch.randn(2, 2, 8, 8, 8))
    assert latent.shape[1] == (4 if light else 8)
    torch.testing.assert_close(features_of(latent, 4), features)


def test_latents_leave_before_a_normalisation() -> None:
    """Stronger filters give stronger latents, and the same logits: normalisation takes the strength away."""
    net, seen = micro().eval(), mask(ALL)
    given = images(1)
    before = net.encode(given, seen)
    with torch.no_grad():
        for encoder in net.encoders.values():
            for level in encoder.levels.values():
                level.enter.weight.mul_(3)
                level.inner[1].weight.mul_(3)
    after = net.encode(given, seen)
    u = slice(0, net.channels["x1"])
    torch.testing.assert_close(after.levels["x1"]["t1c"][:, u], 3 * before.levels["x1"]["t1c"][:, u], **CLOSE)
    one, two = net.decode(before, seen).logits, net.decode(after, seen).logits
    assert (one - two).abs().max() < 0.02 * (one.max() - one.min())


def test_upsampling_does_not_look_at_the_size_of_the_volume() -> None:
    """With aligned corners the first eight voxels would move when the volume grows."""
    x = torch.randn(1, 2, 6, 7, 8)
    torch.testing.assert_close(upsampled(x, 2)[:, :, :8], upsampled(x[:, :, :5], 2)[:, :, :8])
    assert upsampled(x, 1) is x


class _Recorder(nn.Module):
    """A gate that remembers what it was given and answers 0, so that each weight is ½."""

    def forward(self, given: Tensor) -> Tensor:
        self.given = given
        return torch.zeros(len(given), 2)


def test_features_are_averaged_over_each_region_and_modality() -> None:
    """Two regions of a volume of four voxels: region 0 is the first three, region 1 the last."""
    fusion = _RegionFusion(TWO, channels=2, classes=2, hidden=4, light=True)
    fusion.gates = nn.ModuleList([_Recorder(), _Recorder()])
    features = {name: torch.zeros(1, 2, 4, 1, 1) for name in TWO}
    features["t1c"][0, 0, :, 0, 0] = torch.tensor([1.0, 2.0, 3.0, 10.0])
    features["t2f"][0, 1, :, 0, 0] = torch.tensor([0.0, 0.0, 6.0, 20.0])
    p = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])[None, :, :, None, None]
    weights = fusion.weights(torch.cat(list(features.values()), dim=1), [0, 1], p, torch.tensor([[True, False]]))
    torch.testing.assert_close(fusion.gates[0].given, torch.tensor([[2.0, 0, 0, 2.0, 0.75]]))
    torch.testing.assert_close(fusion.gates[1].given, torch.tensor([[10.0, 0, 0, 20.0, 0.25]]))
    assert weights.tolist() == [[[0.5, 0.0], [0.5, 0.0]]]


def test_an_empty_region_does_no_harm() -> None:
    fusion = _RegionFusion(TWO, channels=4, classes=2, hidden=4, light=False)
    p = torch.stack([torch.ones(1, 4, 4, 4), torch.zeros(1, 4, 4, 4)], dim=1)
    parts = {name: Part(*torch.randn(3, 1, 4, 4, 4, 4)) for name in TWO}
    assert fusion(parts, p, torch.ones(1, 2, dtype=torch.bool)).isfinite().all()


def test_regions_are_weighed_sums_of_the_modalities_joined_and_convolved() -> None:
    fusion = _RegionFusion(TWO, channels=2, classes=3, hidden=4, light=False)
    features, p = {name: torch.randn(2, 2, 3, 3, 3) for name in TWO}, torch.randn(2, 3, 3, 3, 3).softmax(dim=1)
    present = torch.tensor([[True, True], [True, False]])
    features["t2f"][1] = 0
    w = fusion.weights(torch.cat(list(features.values()), dim=1), [0, 1], p, present)[..., None, None, None, None]
    joined = [sum(p[:, k, None] * w[:, k, m] * features[name] for m, name in enumerate(TWO)) for k in range(3)]
    expected = fusion.refine[0].conv(torch.cat(joined, dim=1))
    torch.testing.assert_close(fusion.regions(features, p, present), expected)


def test_a_modality_goes_through_its_own_columns_of_what_reads_all_of_them() -> None:
    net = RFNet(TWO, classes=3, size="tiny")
    latents = {name: torch.randn(1, 2 * net.channels["x2"], 4, 4, 4) for name in TWO}
    parts = {name: net.digest("x2", name, z) for name, z in latents.items()}
    joined = torch.cat([part.features for part in parts.values()], dim=1)
    embedded, short = sum(part.embedded for part in parts.values()), sum(part.short for part in parts.values())
    torch.testing.assert_close(embedded, net.fused.maps["x2"].embed[0].conv(joined), **CLOSE)
    torch.testing.assert_close(short, net.fused.fusions["x2"].short_cut[0].conv(joined), **CLOSE)


def _without(net: RFNet, name: str) -> RFNet:
    """The network for the other modalities, with the weights that ``net`` has for them."""
    others = net.modalities.pick(other for other in net.modalities if other != name)
    small = RFNet(others, net.classes, "micro")
    at = [net.modalities.names.index(other) for other in others]
    state = small.state_dict()
    for key, ours in net.state_dict().items():
        if key not in state:
            continue
        if key.endswith(("embed.0.conv.weight", "short_cut.0.conv.weight")):
            ours = ours.unflatten(1, (len(net.modalities), -1))[:, at].flatten(1, 2)
        elif ".gates." in key and key.endswith(".0.weight"):
            pooled = ours[:, :-1].unflatten(1, (len(net.modalities), -1))[:, at].flatten(1, 2)
            ours = torch.cat([pooled, ours[:, -1:]], dim=1)
        elif ".gates." in key and key.endswith((".2.weight", ".2.bias")):
            ours = ours[at]
        state[key] = ours
    small.load_state_dict(state)
    return small


@pytest.mark.parametrize("training", [False, True])
def test_a_network_without_a_modality_is_one_that_never_had_it(training: bool) -> None:
    """Neither weights nor probability maps can tell an absent modality from one that the network was not built for."""
    net = micro().train(training)
    small, kept = _without(net, "t1c").train(training), mask("t1n+t2f", "t2f")
    given = images(2)
    answer = net.decode(net.encode(given, mask(ALL, ALL)), kept)
    alone = small.decode(small.encode(given, kept[:, [0, 2]]), kept[:, [0, 2]])
    torch.testing.assert_close(answer.logits, alone.logits, **CLOSE)
    for name in ("prm/x1", "prm/x2") if training else ():
        torch.testing.assert_close(answer.auxiliary[name].logits, alone.auxiliary[name].logits, **CLOSE)


@pytest.mark.parametrize("training", [False, True])
def test_samples_in_which_a_sequence_does_not_exist_never_meet_a_layer(training: bool) -> None:
    """NaN stands where there is no image: one multiplication with it would show."""
    net = micro().train(training)
    seen = mask(ALL, "t1c", "t1n+t2f")
    given = images(3)
    for m, name in enumerate(THREE):
        given[name][~seen[:, m]] = torch.nan
    answer = net.decode(net.encode(given, seen), seen)
    every = [answer.logits, *(auxiliary.logits for auxiliary in answer.auxiliary.values())]
    assert len(every) == (6 if training else 1)
    sum((z.sum() for z in every), torch.zeros(())).backward()
    assert all(z.isfinite().all() for z in every)
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_in_training_maps_and_every_seen_modality_are_supervised() -> None:
    net = micro().train()
    encoded = net.encode(images(2, (7, 8, 5)), mask(ALL, "t1n+t1c"))
    auxiliary = net.decode(encoded, mask("t1n", "t1c")).auxiliary
    assert {name: tuple(a.logits.shape) for name, a in auxiliary.items()} == dict.fromkeys(
        ("separate/t1n", "separate/t1c", "separate/t2f", "prm/x1", "prm/x2"), (2, 3, 7, 8, 5)
    )
    rows = {name: None if a.rows is None else a.rows.tolist() for name, a in auxiliary.items()}
    assert rows["separate/t1n"] == rows["separate/t1c"] == [True, True]
    assert rows["separate/t2f"] == [True, False]
    assert rows["prm/x1"] is None
    assert not auxiliary["separate/t2f"].logits[1].any()
    assert {name.partition("/")[0] for name in auxiliary} == set(net.loss_weights)
    assert net.eval().decode(encoded, mask("t1n", "t1c")).auxiliary == {}


def test_a_modality_is_segmented_by_itself_from_its_own_latents_alone() -> None:
    net = micro().train()
    given = images(2)
    found = net.decode(net.encode(given, mask(ALL, "t1n+t1c")), mask("t1n", "t1n")).auxiliary["separate/t2f"]
    features = {
        level: features_of(latents["t2f"][:1], net.channels[level])
        for level, latents in net.encode(given, mask("t2f", "t2f")).levels.items()
    }
    torch.testing.assert_close(found.logits[:1], net.separate(features), **CLOSE)


def test_what_was_put_in_is_used_but_not_segmented_by_itself() -> None:
    net = micro().train()
    kept, encoded = mask("t1n"), net.encode(images(1), mask("t1n+t1c"))
    put_in = {**encoded.levels["x2"], "t1c": torch.randn_like(encoded.levels["x2"]["t1c"])}
    without, with_it = net.decode(encoded, kept), net.decode(encoded.with_filled("x2", put_in, mask("t1c")), kept)
    assert (without.logits - with_it.logits).abs().max() > 1e-3
    assert "separate/t1c" in without.auxiliary
    assert "separate/t1c" not in with_it.auxiliary
    assert "separate/t1n" in with_it.auxiliary


def _touched(net: RFNet, total: Tensor) -> set[str]:
    """The parameters that a loss moves."""
    net.zero_grad()
    total.backward()
    return {name for name, p in net.named_parameters() if p.grad is not None and bool(p.grad.any())}


def test_maps_learn_from_their_own_supervision_only() -> None:
    net, seen = micro().train(), mask(ALL)
    answer = net.decode(net.encode(images(1), seen), seen)
    moved = _touched(net, answer.logits.square().mean())
    assert not any(name.startswith("fused.maps") for name in moved)
    assert {"fused.head.weight", "fused.fusions.x1.gates.0.0.weight", "encoders.t1c.levels.x1.enter.weight"} <= moved


@pytest.mark.parametrize(("progress", "learns"), [(0.0, False), (0.066, False), (0.07, True), (1.0, True)])
def test_the_fused_logits_teach_nothing_before_a_fifteenth_of_the_training(progress: float, learns: bool) -> None:
    net, seen = micro().train(), mask(ALL)
    expected = net.decode(net.encode(images(1), seen), seen).logits
    net.progress = progress
    logits = net.decode(net.encode(images(1), seen), seen).logits
    torch.testing.assert_close(logits, expected)
    assert bool(_touched(net, logits.square().mean())) is learns


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_volumes_without_contrast_leave_finite_gradients_in_the_published_depth(value: float) -> None:
    """With ε = 1e-5 twenty normalisations in a row made the gradient of an empty crop infinite."""
    net = RFNet(ModalitySet(("t1c",)), classes=4, size="faithful").train()
    seen = torch.ones(1, 1, dtype=torch.bool)
    answer = net.decode(net.encode({"t1c": torch.full((1, 1, 16, 16, 16), value)}, seen), seen)
    every = [answer.logits, *(auxiliary.logits for auxiliary in answer.auxiliary.values())]
    sum((torch.randn_like(z) * z).mean() for z in every).backward()
    assert max(float(p.grad.abs().max()) for p in net.parameters()) < 10


def test_bfloat16_autocast_runs_with_absent_samples() -> None:
    net, seen = micro().eval(), mask(ALL, "t1c")
    with torch.no_grad():
        exact = net.decode(net.encode(images(2), seen), seen).logits
        with torch.autocast("cpu", torch.bfloat16):
            logits = net.decode(net.encode(images(2), seen), seen).logits
    # bfloat16 carries 8 bits: some percent of the spread of the logits.
    assert (logits.float() - exact).abs().max() < 0.1 * (exact.max() - exact.min())


@pytest.mark.parametrize("fill", ["none", "kept"])
def test_all_levels_can_be_aligned_and_filled(fill: str) -> None:
    net = micro()
    levels = {level: LearnedMixture(3) for level in net.strides}
    aligned = AlignedSegmenter(net, None, levels, fill).train()
    batch = torch.cat(list(images(2).values()), dim=1)
    out = aligned(batch, mask(ALL, "t1n+t1c"), mask("t1n", "t1n+t1c"))
    assert {"align/x1", "align/x2"} <= set(out.losses)
    assert ("separate/t2f" in out.auxiliary) == (fill == "none")
    out.logits.square().mean().backward()
    moved = [anchor.theta.grad is not None and bool(anchor.theta.grad.any()) for anchor in levels.values()]
    assert moved == [fill == "kept"] * 2


def test_learns_from_patients_that_lack_sequences() -> None:
    """A bright ball in every image; 20 steps take two fifths off the loss."""
    net = AlignedSegmenter(RFNet(THREE, classes=3, size="micro"), None, {}).train()
    grid = torch.stack(torch.meshgrid(*[torch.arange(8.0)] * 3, indexing="ij"))
    distance = (grid - 3.5).norm(dim=0)
    target = ((distance < 3).long() + (distance < 2).long()).expand(3, 8, 8, 8)
    batch = 0.3 * torch.cat(list(images(3).values()), dim=1) + target[:, None]
    seen = mask(ALL, "t1c", "t1n+t2f")
    batch = torch.where(seen[:, :, None, None, None], batch, torch.nan)
    optimizer, losses = torch.optim.Adam(net.parameters(), lr=1e-2), []
    for _ in range(20):
        loss, terms = total_loss(net(batch, seen, mask("t1n", "t1c", "t2f")), target, DiceCE(), Config())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert set(terms) == {"dice_ce", "prm/x1", "prm/x2", "separate/t1n", "separate/t1c", "separate/t2f"}
    assert losses[-1] == pytest.approx(float(sum(terms.values()).detach())), "all weights are 1"
    assert losses[-1] < 0.6 * losses[0]
