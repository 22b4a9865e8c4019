"""Padding to strides, its inverse, and blocks that many networks share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from medmap.core.modality import ModalitySet
from medmap.models.backbone import encode_rows
from medmap.models.blocks import (
    DecoderLevel,
    EncoderLevel,
    InstanceNorm,
    cropped,
    gated_mean,
    instance_norm,
    mean_of_present,
    normalise,
    pad_to_stride,
    placed,
    reverse_gradient,
)

sizes = st.tuples(*[st.integers(1, 12)] * 3)


@given(sizes, st.sampled_from([1, 2, 4]))
def test_padding_is_the_least_that_fits_and_cropping_undoes_it(size: tuple[int, int, int], stride: int) -> None:
    image = torch.rand(2, 1, *size) + 1
    padded = pad_to_stride(image, stride)
    for n, m in zip(size, padded.shape[2:], strict=True):
        assert m % stride == 0
        assert m >= 2 * stride
        assert m - n < stride or m == 2 * stride
    assert torch.equal(cropped(padded, size), image)
    assert float(padded.sum()) == pytest.approx(float(image.sum()), rel=1e-5)  # what was added is 0


def test_an_image_that_fits_is_left_as_it_is() -> None:
    image = torch.rand(1, 1, 8, 16, 8)
    assert pad_to_stride(image, 4) is image


def test_an_encoder_level_returns_what_is_not_yet_normalised() -> None:
    """After a normalisation every channel had mean 0 and variance 1, and an anchor nothing left to align."""
    torch.manual_seed(0)
    level = EncoderLevel(1, 6, stride=1)
    low, high = (level(torch.randn(1, 1, 8, 8, 8) * scale + scale) for scale in (1.0, 5.0))
    assert (high.mean(dim=(2, 3, 4)) - low.mean(dim=(2, 3, 4))).abs().max() > 0.5
    assert normalise(6)[0](high).mean(dim=(2, 3, 4)).abs().max() < 1e-5


@pytest.mark.parametrize(("stride", "size"), [(1, 8), (2, 4)])
def test_an_encoder_level_halves_where_it_strides(stride: int, size: int) -> None:
    assert EncoderLevel(3, 5, stride)(torch.randn(2, 3, 8, 8, 8)).shape == (2, 5, size, size, size)


def test_a_decoder_level_doubles_and_joins_the_skip() -> None:
    level = DecoderLevel(below=6, channels=4)
    x, skip = torch.randn(1, 6, 4, 4, 4), torch.randn(1, 4, 8, 8, 8)
    out = level(x, skip)
    assert out.shape == (1, 4, 8, 8, 8)
    assert not torch.allclose(out, level(x, -skip), atol=1e-2)
    assert not torch.allclose(out, level(-x, skip), atol=1e-2)


def test_a_reversed_gradient_is_the_identity_forwards_and_the_negative_backwards() -> None:
    x, y, w = (torch.randn(2, 3, requires_grad=True) for _ in range(3))
    there = reverse_gradient(x * y, 0.3)
    assert torch.equal(there, x * y)
    (w * there).sum().backward()
    torch.testing.assert_close(w.grad, x.detach() * y.detach())  # what stands behind learns at full strength
    torch.testing.assert_close(x.grad, -0.3 * w.detach() * y.detach())
    torch.testing.assert_close(y.grad, -0.3 * w.detach() * x.detach())


def test_a_reversal_of_strength_zero_stops_the_gradient() -> None:
    x = torch.randn(4, requires_grad=True)
    reverse_gradient(x, 0.0).sum().backward()
    assert not x.grad.any()


# ---- channels last -----------------------------------------------------------------------------------------------

LAST = torch.channels_last_3d


@pytest.mark.parametrize("samples", [1, 3])
def test_instance_normalisation_is_the_same_in_either_layout_forwards_and_backwards(samples: int) -> None:
    torch.manual_seed(samples)
    x, upstream = torch.randn(2, samples, 5, 6, 7, 8) * 3 + 2
    scale, shift = torch.randn(2, 5, requires_grad=True)
    found = []
    for layout in (torch.contiguous_format, LAST):
        own = x.to(memory_format=layout, copy=True).requires_grad_()
        y = instance_norm(own, scale, shift)
        assert y.is_contiguous(memory_format=layout)
        gradients = torch.autograd.grad(y, (own, scale, shift), upstream)
        assert gradients[0].is_contiguous(memory_format=layout)
        found.append((y, *gradients))
    torch.testing.assert_close(found[0], found[1], atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_a_mean_of_what_is_present_and_its_gradient(layout: torch.memory_format) -> None:
    modalities = ModalitySet(("t1n", "t1c", "t2w"))
    present = torch.tensor([[True, False, True], [False, True, False]])
    latents = {name: torch.randn(2, 4, 3, 4, 5).to(memory_format=layout).requires_grad_() for name in modalities}
    mean = mean_of_present(latents, present, modalities)
    plain = torch.stack([(latents["t1n"][0] + latents["t2w"][0]) / 2, latents["t1c"][1]])
    torch.testing.assert_close(mean, plain)
    assert mean.is_contiguous(memory_format=layout)
    upstream, leaves = torch.randn_like(mean), tuple(latents.values())
    assert_same = torch.testing.assert_close
    assert_same(torch.autograd.grad(mean, leaves, upstream), torch.autograd.grad(plain, leaves, upstream))


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_rows_that_are_worked_out_lie_among_zeros_as_they_were_laid_out(layout: torch.memory_format) -> None:
    image, rows = torch.randn(3, 2, 4, 4, 4), torch.tensor([False, True, True])
    level = encode_rows(lambda x: {"x1": 2 * x.to(memory_format=layout)}, image, rows)["x1"]
    assert torch.equal(level[1:], 2 * image[1:])
    assert not level[0].any()
    assert level.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    "shape", [(1, 16, 8, 8, 8), (2, 5, 7, 5, 3), (1, 8, 3, 2, 2), (1, 200, 4, 4, 4), (3, 64, 5, 2, 7)]
)
@pytest.mark.parametrize("affine", [True, False])
def test_without_a_backward_pass_the_normalisation_is_the_same(shape: tuple[int, ...], affine: bool) -> None:
    x = (3 * torch.randn(shape) + 5).bfloat16().float().to(memory_format=torch.channels_last_3d)
    weight, bias = (torch.rand(shape[1]) + 0.5, torch.randn(shape[1])) if affine else (None, None)
    scale, shift = (None if v is None else v.double() for v in (weight, bias))
    exact = F.instance_norm(x.double(), weight=scale, bias=shift)
    with torch.no_grad():
        quick, half = instance_norm(x, weight, bias), instance_norm(x.bfloat16(), weight, bias)
    torch.testing.assert_close(quick.double(), exact, rtol=0, atol=2e-5)
    assert quick.is_contiguous(memory_format=torch.channels_last_3d)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), exact, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_network_lies_channels_last_on_any_device_unless_it_would_copy_what_it_normalises(device: str) -> None:
    """On "meta", where tensors have a layout and no voxels, as on a GPU."""
    ours = placed(nn.Sequential(nn.Conv3d(4, 6, 3), InstanceNorm(6)), torch.device(device))
    assert ours[0].weight.device.type == device
    assert ours[0].weight.is_contiguous(memory_format=LAST)
    theirs = placed(nn.Sequential(nn.Conv3d(4, 6, 3), nn.InstanceNorm3d(6)), torch.device(device))
    assert theirs[0].weight.is_contiguous()


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_a_gated_mean_is_a_softmax_however_large_the_scores_and_so_is_its_gradient(layout: torch.memory_format) -> None:
    """Trained gates reach hundreds: no exponential may overflow, vanish or be held back."""
    modalities = ModalitySet(("t1n", "t1c", "t2w"))
    present = torch.tensor([[True, False, True], [True, True, True], [False, True, False]])
    latents = [torch.randn(3, 4, 3, 4, 5).to(memory_format=layout).requires_grad_() for _ in modalities]
    scores = [(300 * torch.randn(3, 1, 1, 1, 1) + torch.randn(3, 1, 3, 4, 5)).requires_grad_() for _ in modalities]
    parts = dict(zip(modalities, zip(latents, scores, strict=True), strict=True))
    fused = gated_mean(parts, present, modalities)
    there = present[:, :, None, None, None, None]
    weights = torch.stack(scores, dim=1).masked_fill(~there, -torch.inf).softmax(dim=1)
    plain = (weights * torch.stack(latents, dim=1)).sum(dim=1)
    torch.testing.assert_close(fused, plain)
    assert fused.is_contiguous(memory_format=layout)
    upstream, leaves = torch.randn_like(fused), (*latents, *scores)
    found, expected = (torch.autograd.grad(y, leaves, upstream) for y in (fused, plain))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert torch.isfinite(fused).all()
    near = [torch.randn_like(score).requires_grad_() for score in scores]  # where all weights move
    parts = dict(zip(modalities, zip(latents, near, strict=True), strict=True))
    weights = torch.stack(near, dim=1).masked_fill(~there, -torch.inf).softmax(dim=1)
    plain = (weights * torch.stack(latents, dim=1)).sum(dim=1)
    leaves = (*latents, *near)
    found = torch.autograd.grad(gated_mean(parts, present, modalities), leaves, upstream)
    torch.testing.assert_close(found, torch.autograd.grad(plain, leaves, upstream), atol=1e-5, rtol=1e-4)
