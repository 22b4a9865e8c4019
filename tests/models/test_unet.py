"""The plain backbone: its sizes, its fusion, absent samples. `test_check` holds it to the laws of every backbone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.errors import ConfigError
from medmap.models import BACKBONES, build_backbone
from medmap.models.unet import SIZES, UNet, UNetSize

THREE = ModalitySet(("t1n", "t1c", "t2f"))

# Another batch size takes another convolution kernel, whose float32 sums differ in the last digits.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def micro(monkeypatch: pytest.MonkeyPatch) -> Iterator[UNet]:
    monkeypatch.setitem(SIZES, "micro", UNetSize((4, 8)))
    torch.manual_seed(0)
    net = UNet(THREE, classes=3, size="micro").eval()
    with torch.no_grad():
        for fusion in net.fusions.values():
            for score in fusion.scores.values():
                score.weight.normal_()
    return net


def images(batch: int, size: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(batch, 1, size, size, size, generator=generator) for name in THREE}


def mask(*rows: str) -> Tensor:
    return torch.tensor([[name in row.split("+") for name in THREE] for row in rows])


@pytest.mark.parametrize(("size", "least", "most"), [("tiny", 0.3e6, 1e6), ("base", 8e6, 10e6), ("large", 27e6, 33e6)])
def test_sizes_with_four_modalities(size: str, least: float, most: float) -> None:
    count = sum(p.numel() for p in UNet(GLIOMA_MRI, classes=4, size=size).parameters())
    assert least < count < most


def test_an_unknown_size_or_name_is_told_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"unet has no size 'huge'; expected one of tiny, "):
        UNet(THREE, classes=3, size="huge")
    with pytest.raises(ConfigError, match=r"backbone 'unett' is not known; did you mean unet\? expected one of unet"):
        build_backbone("unett", THREE, 3, "tiny")
    with pytest.raises(ConfigError, match=r"backbone 'qq' is not known; expected one of unet"):
        build_backbone("qq", THREE, 3, "tiny")
    assert set(BACKBONES) >= {"unet"}


def test_a_modality_the_network_was_not_built_for_has_no_say() -> None:
    net = UNet(ModalitySet(("t1c",)), classes=2, size="tiny").eval()
    seen = torch.ones(1, 1, dtype=torch.bool)
    both = images(1, 16)
    only = net.decode(net.encode({"t1c": both["t1c"]}, seen), seen).logits
    torch.testing.assert_close(net.decode(net.encode(both, seen), seen).logits, only, **CLOSE)


def test_fusion_starts_as_the_plain_mean_of_what_is_kept() -> None:
    net = UNet(THREE, classes=3, size="tiny")
    latents = {name: torch.randn(2, 8, 4, 4, 4) for name in THREE}
    fused = net.fusions["x1"](latents, mask("t1n+t1c+t2f", "t1c+t2f"))
    mean = torch.stack([sum(latents[n][0] for n in THREE) / 3, (latents["t1c"][1] + latents["t2f"][1]) / 2])
    torch.testing.assert_close(fused, net.fusions["x1"].after(mean), **CLOSE)


def test_whatever_the_gates_say_the_fusion_of_equal_latents_is_that_latent(micro: UNet) -> None:
    """Weights are positive and sum to 1 over what is kept."""
    z = torch.randn(1, 4, 4, 4, 4)
    fusion = micro.fusions["x1"]
    for kept in ("t1c", "t1n+t2f", "t1n+t1c+t2f"):
        torch.testing.assert_close(_fused(fusion, dict.fromkeys(THREE, z), kept), fusion.after(z), **CLOSE)


def test_gates_that_have_learned_are_not_a_mean_any_more(micro: UNet) -> None:
    latents = {name: torch.randn(1, 4, 4, 4, 4) for name in THREE}
    fusion = micro.fusions["x1"]
    mean = fusion.after(sum(latents.values()) / 3)
    assert (_fused(fusion, latents, "t1n+t1c+t2f") - mean).abs().max() > 0.1


def _fused(fusion: torch.nn.Module, latents: dict[str, torch.Tensor], kept: str) -> torch.Tensor:
    return fusion({name: fusion.digest(name, z) for name, z in latents.items()}, mask(kept))


def test_deep_supervision_in_train_mode_only() -> None:
    net = UNet(ModalitySet(("t1c",)), classes=3, size="large")
    seen = torch.ones(1, 1, dtype=torch.bool)
    encoded = net.encode({"t1c": torch.randn(1, 1, 32, 32, 32)}, seen)
    trained = net.train().decode(encoded, seen).auxiliary
    assert {name: tuple(a.logits.shape) for name, a in trained.items()} == {
        "deep/x2": (1, 3, 16, 16, 16),
        "deep/x3": (1, 3, 8, 8, 8),
    }
    assert all(a.rows is None for a in trained.values())
    assert net.eval().decode(encoded, seen).auxiliary == {}


def test_samples_in_which_a_sequence_does_not_exist_never_meet_a_layer(micro: UNet) -> None:
    """NaN stands where there is no image: one multiplication with it would show."""
    seen = mask("t1n+t1c+t2f", "t1c", "t1n+t2f")
    given = images(3)
    for m, name in enumerate(THREE):
        given[name][~seen[:, m]] = torch.nan
    encoded = micro.encode(given, seen)
    assert not encoded.levels["x2"]["t1n"][1].any()
    logits = micro.decode(encoded, seen).logits
    assert logits.isfinite().all()
    for row in range(3):
        alone = micro.decode(micro.encode({n: x[[row]] for n, x in given.items()}, seen[[row]]), seen[[row]]).logits
        torch.testing.assert_close(logits[[row]], alone, **CLOSE)


def test_a_sequence_that_no_sample_has_needs_no_image(micro: UNet) -> None:
    seen = mask("t1n", "t1c")
    encoded = micro.encode({name: x for name, x in images(2).items() if name != "t2f"}, seen)
    assert set(encoded.levels["x1"]) == {"t1n", "t1c"}
    assert micro.decode(encoded, seen).logits.isfinite().all()


def test_masks_are_per_sample(micro: UNet) -> None:
    given = {name: x[:1].expand(2, -1, -1, -1, -1) for name, x in images(1).items()}
    encoded = micro.encode(given, mask("t1n+t1c+t2f", "t1n+t1c+t2f"))
    one, two = micro.decode(encoded, mask("t1n", "t1c+t2f")).logits
    assert (one - two).abs().max() > 1e-2


def test_filled_latents_are_used_where_they_were_put_in(micro: UNet) -> None:
    kept = mask("t1n")
    encoded = micro.encode(images(1), mask("t1n+t1c+t2f"))
    put_in = {**encoded.levels["x2"], "t1c": torch.randn_like(encoded.levels["x2"]["t1c"])}
    filled = encoded.with_filled("x2", put_in, mask("t1c"))
    assert filled.present("x2", kept).tolist() == [[True, True, False]]
    assert filled.present("x1", kept).tolist() == [[True, False, False]]
    without, with_it = micro.decode(encoded, kept).logits, micro.decode(filled, kept).logits
    assert (without - with_it).abs().max() > 1e-3


def test_bfloat16_autocast_runs_with_absent_samples(micro: UNet) -> None:
    seen = mask("t1n+t1c+t2f", "t1c")
    with torch.autocast("cpu", torch.bfloat16):
        logits = micro.decode(micro.encode(images(2), seen), seen).logits
    assert logits.isfinite().all()
    # bfloat16 carries 8 bits: some percent of the spread of the logits.
    exact = micro.decode(micro.encode(images(2), seen), seen).logits
    assert (logits.float() - exact).abs().max() < 0.1 * (exact.max() - exact.min())
