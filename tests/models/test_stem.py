"""The encoder T: which image may reach which latent, and that absent images meet no statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.errors import ConfigError
from medmap.models.stem import JointStem, Stem, build_stem

THREE = ModalitySet(("t1n", "t1c", "t2f"))
KINDS = ("joint", "non_shared", "enhanced")

# Batches of another size take another convolution kernel, whose float32 sums differ in the last digits.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def made(kind: str, modalities: ModalitySet = THREE, published: bool = False) -> Stem:
    torch.manual_seed(0)
    stem = build_stem(kind, modalities, published)
    assert stem is not None
    return stem


def images(batch: int = 2, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(batch, 1, 6, 6, 6, generator=generator) for name in THREE}


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_the_published_joint_form_has_880_parameters() -> None:
    stem = made("joint", GLIOMA_MRI, published=True)
    assert parameters(stem) == 880  # 2 · (4·4·27 + 4 + 4)
    assert [type(layer).__name__ for layer in stem.mix] == ["Conv3d", "BatchNorm3d", "ReLU"] * 2


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("joint", 2 * 9 * 27 + 2 * 3),
        ("non_shared", 3 * (2 * 27 + 2)),
        ("enhanced", 3 * (8 * 27 + 64 * 27 + 8 * 27 + 2 * 2 * 8)),
    ],
)
def test_sizes(kind: str, count: int) -> None:
    assert parameters(made(kind)) == count


def test_none_is_no_stem_and_other_names_are_refused() -> None:
    assert build_stem("none", THREE) is None
    with pytest.raises(ConfigError, match="expected none, joint, leaking, non_shared, enhanced"):
        build_stem("shared", THREE)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_one_full_resolution_channel_for_each_image_that_is_there(kind: str, published: bool) -> None:
    seen = torch.tensor([[True, True, False], [False, True, False]])
    latents = made(kind, published=published)(images(), seen)
    assert set(latents) == {"t1n", "t1c"}
    assert all(z.shape == (2, 1, 6, 6, 6) for z in latents.values())
    assert not latents["t1n"][1].any()
    assert latents["t1n"][0].any()


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_seen_reaches_no_latent_and_no_statistics(kind: str, training: bool, published: bool) -> None:
    seen = torch.tensor([[True, True, False], [False, True, False]])
    given = images()
    wild = {name: x.clone() for name, x in given.items()}
    wild["t1n"][1] = 100
    wild["t2f"][:] = 100
    removed = {name: x for name, x in given.items() if name != "t2f"}
    results, buffers = [], []
    for batch in (given, wild, removed):
        stem = made(kind, published=published).train(training)
        results.append(stem(batch, seen))
        buffers.append(dict(stem.named_buffers()))
    for other, state in zip(results[1:], buffers[1:], strict=True):
        for name, z in results[0].items():
            torch.testing.assert_close(other[name], z, **CLOSE)
        for name, buffer in buffers[0].items():
            torch.testing.assert_close(state[name], buffer, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_joint_stem_lets_one_image_into_anothers_latent(kind: str) -> None:
    stem, seen, given = made(kind), torch.ones(2, 3, dtype=torch.bool), images()
    other = {**given, "t2f": -3 * given["t2f"]}
    moved = (stem(given, seen)["t1c"] - stem(other, seen)["t1c"]).abs().max()
    assert (moved > 1e-2) == isinstance(stem, JointStem)
    assert stem.separable == (not isinstance(stem, JointStem))


@pytest.mark.parametrize("kind", ["non_shared", "enhanced"])
def test_private_batch_statistics_do_not_count_absent_rows(kind: str) -> None:
    """The row without t1c must not be there for t1c's normalisation: as if the batch were one sample smaller."""
    together, alone = made(kind, published=True).train(), made(kind, published=True).train()
    a = together(images(), torch.tensor([[True, True, True], [True, False, True]]))["t1c"][:1]
    b = alone({name: x[:1] for name, x in images().items()}, torch.ones(1, 3, dtype=torch.bool))["t1c"]
    torch.testing.assert_close(a, b, **CLOSE)


def test_latents_leave_before_a_normalisation_unless_the_published_form_is_asked_for() -> None:
    seen = torch.ones(2, 3, dtype=torch.bool)
    for kind in KINDS:
        ours, theirs = (made(kind, published=published).train()(images(), seen) for published in (False, True))
        assert min(float(z.detach().min()) for z in ours.values()) < 0
        assert min(float(z.detach().min()) for z in theirs.values()) >= 0
        spread = torch.stack([z.detach().std() for z in ours.values()])
        assert (spread - 1).abs().max() > 0.1
