"""Convolutions of volumes, fast for a lone small one too, and the one that ends a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

LOOP_NUMBERS = 20480
"""Channels times the first two axes of a sample: up to here torch takes its own loop (ConvParams::use_mkldnn)."""

AHEAD = 4.0
"""By how much the logit of background begins above the others'."""


def conv3d(
    x: Float[Tensor, "B C X Y Z"],
    weight: Float[Tensor, "D C k l m"],
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
) -> Float[Tensor, "B D x y z"]:
    """``F.conv3d``, but for two kinds of small volumes on a CPU.

    torch gives a single sample of few numbers in float32 to a loop of its own, several times slower than the
    convolutions that everything else gets; with two samples it does not. So it gets two: the halves of the volume,
    which overlap by the kernel's reach. Of a volume two planes deep in bf16 its gradient of the kernel is what was in
    memory before (oneDNN, on processors with AVX-512); with a third plane, of zeros, it is right.

    >>> x, weight = torch.randn(1, 2, 9, 8, 7), torch.randn(3, 2, 3, 3, 3)
    >>> torch.allclose(conv3d(x, weight, padding=(1, 1, 1)), F.conv3d(x, weight, padding=1), atol=1e-5)
    True
    """
    (kernel, *_), (step, *_), (pad, *_) = weight.shape[2:], stride, padding
    size = (x.shape[2] + 2 * pad - kernel) // step + 1
    if _gradient_is_garbage(x):
        return F.conv3d(F.pad(x, (0, 0, 0, 0, 0, 1)), weight, bias, tuple(stride), tuple(padding))[:, :, :size]
    if not _left_to_the_slow_loop(x, weight):
        return F.conv3d(x, weight, bias, tuple(stride), tuple(padding))
    half = -(-size // 2)
    start, length = half * step, (half - 1) * step + kernel
    padded = F.pad(x, (0, 0, 0, 0, pad, start + length - pad - x.shape[2]))
    halves = torch.cat([padded[:, :, :length], padded[:, :, start : start + length]])
    out = F.conv3d(halves, weight, bias, tuple(stride), (0, *padding[1:]))
    return torch.cat(out.split(1), dim=2)[:, :, :size]


_WHOLE: ContextVar[bool] = ContextVar("no volume is halved", default=False)


@contextmanager
def whole_volumes() -> Iterator[None]:
    """While this lasts, no volume is halved: what is counted over a small cube shall hold for a large one."""
    before = _WHOLE.set(True)
    try:
        yield
    finally:
        _WHOLE.reset(before)


def _left_to_the_slow_loop(x: Tensor, weight: Tensor) -> bool:
    """What torch decides, and whether halves would be of use; a graph that is being recorded holds for every size."""
    if _WHOLE.get() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    as_float = x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    return (
        x.device.type == "cpu"
        and as_float
        and x.shape[0] == 1
        and x.shape[1] * x.shape[2] * x.shape[3] <= LOOP_NUMBERS
        and 1 < weight.shape[-1] <= 3
        and x.shape[2] > 1
    )


def _gradient_is_garbage(x: Tensor) -> bool:
    """Whether it would be; a graph that is being recorded holds for every size, and is for answers."""
    return (
        x.device.type == "cpu"
        and torch.is_grad_enabled()
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and x.shape[2] == 2
        and (x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu"))
    )


class Conv3d(nn.Conv3d):
    """`conv3d` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        padding = cast(Sequence[int], self.padding)  # a string is taken by no network here
        if self.padding_mode != "zeros" and any(padding):
            x = F.pad(x, [n for size in reversed(padding) for n in (size, size)], mode=self.padding_mode)
            padding = (0, 0, 0)
        return conv3d(x, self.weight, self.bias, self.stride, padding)


def share_of_part(conv: nn.Conv3d, x: Float[Tensor, "B C X Y Z"], index: int) -> Float[Tensor, "B D x y z"]:
    """What part ``index`` of a joined input, all parts having C channels, adds to a convolution of 1³; no bias."""
    return F.conv3d(x, conv.weight[:, index * x.shape[1] : (index + 1) * x.shape[1]])


class Head(nn.Conv3d):
    """The last layer, a convolution of 1³ to logits, which begins by calling every voxel background: b = (4, 0 … 0).

    Most voxels are. A head that begins undecided learns this first, from what most voxels share: features come to mean
    background where they are on, and a tumour is where all are off. There LeakyReLU leaves a hundredth of everything,
    the gradient too, and a network of few channels may never tell one part of a tumour from another. (A start at the
    classes' frequencies: Lin et al., Focal loss for dense object detection, ICCV 2017, section 3.3.)

    >>> Head(8, 4).bias.tolist()
    [4.0, 0.0, 0.0, 0.0]
    """

    bias: nn.Parameter

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__(channels, classes, 1)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            self.bias.zero_()[0] = AHEAD
