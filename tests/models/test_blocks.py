"""Padding to strides, its inverse, and blocks that many networks share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medmap.models.blocks import DecoderLevel, EncoderLevel, cropped, normalise, pad_to_stride, reverse_gradient

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
