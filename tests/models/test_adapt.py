"""Anybody's encoder and decoder as a backbone: the laws, the mean, resolutions, and what is said where nothing fits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import medmap
from medmap.align import AlignedSegmenter
from medmap.anchors import LearnedMixture
from medmap.config import load_config
from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.errors import ConfigError
from medmap.models import BACKBONES, check_backbone
from medmap.models.adapt import Adapted, adapt
from medmap.models.check import faults

PAIR = ModalitySet(("t1c", "t2f"))
TWO = {"x1": 1, "x2": 2}
PAGE = Path(__file__).parents[2] / "docs" / "own-network.md"


class Encoder(nn.Module):
    """Two maps, at full and at half resolution."""

    def __init__(self, padding: int = 1) -> None:
        super().__init__()
        self.fine = nn.Conv3d(1, 4, 3, padding=1)
        self.coarse = nn.Conv3d(4, 6, 3, stride=2, padding=padding)

    def forward(self, image: Tensor) -> Any:
        fine = self.fine(image)
        return [fine, self.coarse(fine.relu())]


class Named(Encoder):
    """The same maps by name, the coarse one first."""

    def forward(self, image: Tensor) -> Any:
        fine, coarse = super().forward(image)
        return {"x2": coarse, "x1": fine}


class Decoder(nn.Module):
    """Logits at full resolution."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.InstanceNorm3d(4, affine=True), nn.InstanceNorm3d(6, affine=True)])
        self.head = nn.Conv3d(10, classes, 3, padding=1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        fine, coarse = (norm(z).relu() for norm, z in zip(self.norms, maps, strict=True))
        return self.head(torch.cat([fine, F.interpolate(coarse, scale_factor=2.0)], dim=1))


class Coarse(Decoder):
    """Logits at half resolution."""

    def forward(self, maps: list[Tensor]) -> Tensor:
        return F.avg_pool3d(super().forward(maps), 2)


class First(nn.Module):
    """The first map is the answer; it has as many channels as there are classes."""

    def forward(self, maps: list[Tensor]) -> Tensor:
        return maps[0]


class Pool(nn.Module):
    """Means over cubes of two voxels, as two channels."""

    def forward(self, image: Tensor) -> list[Tensor]:
        small = F.avg_pool3d(image, 2)
        return [torch.cat([small, -small], dim=1)]


def mask(*rows: str, of: ModalitySet = PAIR) -> Tensor:
    return torch.tensor([[name in row.split("+") for name in of] for row in rows])


def answer(net: Adapted, images: dict[str, Tensor], seen: Tensor, kept: Tensor | None = None) -> Tensor:
    return net.decode(net.encode(images, seen), seen if kept is None else kept).logits


# ---- laws -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_tiny_pair_keeps_every_law(count: int) -> None:
    build = adapt(Encoder, Decoder, levels=TWO)
    assert not faults(check_backbone(lambda: build(GLIOMA_MRI.pick(GLIOMA_MRI.names[:count]), 3)))


@pytest.mark.parametrize(("encoder", "decoder"), [(Named, Decoder), (Encoder, Coarse)])
def test_maps_by_name_and_coarse_logits_keep_every_law(encoder: Any, decoder: Any) -> None:
    assert not faults(check_backbone(lambda: adapt(encoder, decoder, levels=TWO)(PAIR, 3)))


def test_a_fault_of_the_decoder_is_found() -> None:
    class Noisy(Decoder):
        def forward(self, maps: list[Tensor]) -> Tensor:
            return super().forward(maps) + torch.rand(())

    broken = {finding.law for finding in faults(check_backbone(lambda: adapt(Encoder, Noisy, levels=TWO)(PAIR, 3)))}
    assert broken == {"deterministic"}


def on_the_page(name: str, language: str = "python") -> Any:
    """What an example of the page calls by that name."""
    found: dict[str, Any] = {}
    for block in re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        if f"{name} = medmap.adapt(" in block:
            code = block.replace("assert not faults", "lambda: faults")
            exec(compile(f"import medmap\n{code}", PAGE.name, "exec"), found)
    return found[name]


@pytest.mark.parametrize("name", ["Mine", "Dynamic"])
def test_monais_networks_keep_every_law(name: str) -> None:
    build = on_the_page(name)
    three = ModalitySet(("t1c", "t2w", "t2f"))
    assert not faults(check_backbone(lambda: build(three, 4), size=(15, 9, 8)))


def test_swin_unetr_answers_from_what_is_there_and_learns_everywhere() -> None:
    """The whole check takes minutes at the 64 voxels that its stride of 32 asks for."""
    net = on_the_page("Swin", "py")(PAIR, 4)
    images = {name: torch.randn(1, 1, 33, 40, 48) for name in PAIR}
    logits = answer(net, images, mask("t1c+t2f"))
    assert logits.shape == (1, 4, 33, 40, 48)
    (logits * torch.randn_like(logits)).sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    with torch.no_grad():
        alone, wild = (
            answer(net.eval(), {**images, "t2f": scale * images["t2f"]}, mask("t1c+t2f"), mask("t1c"))
            for scale in (1, 100)
        )
    assert torch.equal(alone, wild)


# ---- what is worked out -----------------------------------------------------------------------------------------


def test_the_decoder_gets_the_mean_of_what_is_kept() -> None:
    class Twice(nn.Module):
        def forward(self, image: Tensor) -> Tensor:  # one map needs no list
            return torch.cat([image, 2 * image], dim=1)

    net = adapt(Twice, lambda classes: First(), levels={"x1": 1})(PAIR, 2)
    one, two = torch.randn(2, 1, 2, 2, 2), torch.randn(2, 1, 2, 2, 2)
    logits = answer(net, {"t1c": one, "t2f": two}, mask("t1c+t2f", "t1c+t2f"), mask("t1c+t2f", "t2f"))
    torch.testing.assert_close(logits[0], torch.cat([(one + two) / 2, one + two], dim=1)[0])
    torch.testing.assert_close(logits[1], torch.cat([two, 2 * two], dim=1)[1])


def test_what_was_filled_in_counts_as_present() -> None:
    net = adapt(lambda: nn.Conv3d(1, 2, 1), lambda classes: First(), levels={"x1": 1})(PAIR, 2)
    kept = mask("t1c")
    encoded = net.encode({name: torch.randn(1, 1, 2, 2, 2) for name in PAIR}, mask("t1c+t2f"))
    own = encoded.levels["x1"]["t1c"]
    filled = encoded.with_filled("x1", {"t1c": own, "t2f": 3 * own}, mask("t2f"))
    torch.testing.assert_close(net.decode(encoded, kept).logits, own)
    torch.testing.assert_close(net.decode(filled, kept).logits, 2 * own)


def test_logits_of_another_resolution_are_interpolated_where_they_belong() -> None:
    """Pooling and interpolation leave a linear image as it is, but for the border."""
    net = adapt(Pool, lambda classes: First(), levels={"x1": 2})(ModalitySet(("t1c",)), 2)
    ramp = (torch.arange(9.0)[:, None, None] + 2 * torch.arange(8.0)[:, None] - torch.arange(7.0))[None, None]
    logits = answer(net, {"t1c": ramp}, torch.ones(1, 1, dtype=torch.bool))
    inner = (slice(None), slice(None), slice(1, 7), slice(1, 7), slice(1, 5))  # 9 and 7 are padded with zeros
    torch.testing.assert_close(logits[inner], torch.cat([ramp, -ramp], dim=1)[inner])


def test_every_sequence_has_an_encoder_of_its_own() -> None:
    net = adapt(Encoder, Decoder, levels=TWO)(GLIOMA_MRI, 3)
    assert len({p.data_ptr() for p in net.encoders.parameters()}) == 4 * 4
    assert net.strides == TWO
    assert net.supported_subsets() == GLIOMA_MRI.subsets()


def test_images_that_do_not_exist_never_meet_a_layer() -> None:
    net = adapt(Encoder, Decoder, levels=TWO)(PAIR, 3).eval()
    images = {name: torch.randn(2, 1, 7, 8, 9) for name in PAIR}
    images["t2f"][1] = torch.nan
    seen = mask("t1c+t2f", "t1c")
    logits = answer(net, images, seen)
    assert logits.isfinite().all()
    alone = answer(net, {"t1c": images["t1c"][1:]}, mask("t1c"))
    torch.testing.assert_close(logits[1:], alone, rtol=1e-4, atol=1e-4)


def test_it_learns_with_sequences_that_do_not_exist() -> None:
    torch.manual_seed(0)
    network = AlignedSegmenter(adapt(Encoder, Decoder, levels=TWO)(PAIR, 2), None, {"x2": LearnedMixture(2)})
    labels = torch.zeros(2, 9, 8, 7, dtype=torch.long)
    labels[:, 2:6, 2:6, 2:6] = 1
    images = torch.randn(2, 2, 9, 8, 7) + labels[:, None]
    seen = mask("t1c+t2f", "t2f")
    images[1, 0] = torch.nan
    optimiser = torch.optim.Adam(network.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        out = network(images, seen, seen)
        loss = F.cross_entropy(out.logits, labels) + 0.1 * out.losses["align/x2"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_recipe_trains_it_and_a_predictor_loads_it(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKBONES, "mine", adapt(Encoder, Coarse, levels=TWO))
    settings = "model=mine align=pstar align.levels=[x2] data.val_fraction=0 train.steps=1 train.batch_size=1"
    config = load_config(None, [*settings.split(), "train.precision=fp32", "train.patch=[16, 16, 16]"])
    store = medmap.Store(tiny_store)
    medmap.fit(config, store, tmp_path / "run", device="cpu")
    predictor = medmap.Predictor.load(tmp_path / "run", device="cpu")
    (network,) = predictor.networks
    assert isinstance(network.backbone, Adapted)
    (found,) = predictor.answers(store.load(store.ids[0]), [GLIOMA_MRI.parse("t1c+t2f")])
    assert found.probabilities.shape[1:] == found.box.shape


# ---- what does not fit ------------------------------------------------------------------------------------------


def used(
    encoder: Callable[..., Any] = Encoder, decoder: Callable[..., Any] = Decoder, levels: dict[str, int] = TWO
) -> None:
    net = adapt(encoder, decoder, levels=levels)(PAIR, 3)
    answer(net, {name: torch.randn(1, 1, 15, 16, 12) for name in PAIR}, mask("t1c+t2f"))


@pytest.mark.parametrize(
    ("levels", "found", "cure"),
    [
        ({"x1": 1}, "2 maps, x1 15×16×12, 2 8×8×6; levels={'x1': 1} expects 1", "{'x1': 1, 'x2': 2}"),
        ({"x1": 1, "x2": 4}, "2 maps, x1 16×16×12, x2 8×8×6; .* expects 2, .*x2 4×4×3", "{'x1': 1, 'x2': 2}"),
        ({"a": 1, "b": 2, "c": 4}, "2 maps, a 16×16×12, b 8×8×6; .* expects 3, .*c 4×4×3", "{'a': 1, 'b': 2}"),
    ],
)
def test_levels_that_are_not_the_encoders_are_told_with_those_that_are(
    levels: dict[str, int], found: str, cure: str
) -> None:
    with pytest.raises(ConfigError, match=f"{found}.*; if the encoder is right, write levels={cure}$"):
        used(levels=levels)


def test_a_dict_of_maps_has_to_have_the_levels_names() -> None:
    with pytest.raises(ConfigError, match=r"x2 8×8×6, x1 16×16×12; .*fine 16×16×12.*write levels={'x2': 2, 'x1': 1}"):
        used(encoder=Named, levels={"fine": 1, "coarse": 2})


def test_an_encoder_without_padding_has_no_stride() -> None:
    with pytest.raises(ConfigError, match=r"x2 7×7×5; .*no stride explains what it gives: let its convolutions pad"):
        used(encoder=lambda: Encoder(padding=0))


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        (lambda: nn.Flatten(2), r"map x1 of the encoder is \[1, 1, 3072\], expected \[1, C, x, y, z\]"),
        (lambda: nn.Flatten(0), r"map x1 of the encoder is \[3072\]"),
        (Decoder, "missing 1 required positional argument: 'classes'"),
        (lambda: None, r"encoder\(\) gives something of type NoneType, expected a torch.nn.Module"),
        (Encoder(), r"encoder is a network \(Encoder\), expected what makes one"),
    ],
)
def test_encoders_that_are_none(encoder: Any, words: str) -> None:
    with pytest.raises((ConfigError, TypeError), match=words):
        used(encoder=encoder)


def test_an_encoder_that_gives_no_maps() -> None:
    class Number(nn.Module):
        def forward(self, image: Tensor) -> float:
            return 0.5

    with pytest.raises(
        ConfigError, match=r"encoder gives something of type float, expected a list or dict of maps \[B"
    ):
        used(encoder=Number)


@pytest.mark.parametrize(
    ("decoder", "words"),
    [
        (lambda classes: Decoder(2), r"gives \[1, 2, 16, 16, 12\], expected logits \[1, 3, x, y, z\]; .*decoder\(3\)"),
        (lambda classes: nn.Identity(), r"the decoder gives something of type list, expected logits \[1, 3, x, y, z\]"),
        (lambda classes: classes, r"decoder\(3\) gives something of type int, expected a torch.nn.Module"),
        (Decoder(3), r"decoder is a network \(Decoder\), expected what makes one"),
    ],
)
def test_decoders_that_are_none(decoder: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        used(decoder=decoder)


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ({}, "levels is empty, expected a name and a stride for each map"),
        ({"stem": 1}, "'stem' cannot be a level"),
        ({"x.1": 1}, r"'x\.1' cannot be a level"),
        ({"x1": 2, "x2": 3}, "stride 2 of level x1 does not divide the coarsest, 3"),
        ({"x1": 0, "x2": 2}, "stride 0 of level x1 does not divide"),
    ],
)
def test_levels_that_cannot_be(levels: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        adapt(Encoder, Decoder, levels=levels)
