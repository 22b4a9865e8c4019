"""Several processes that share one batch: what is summed over its rows must be summed over the rows of all of them.

Each process has as many rows as any other. Where a loss is made of `averaged` sums, it is that of the whole batch on
every process, and the mean over the processes of its gradients is the gradient for the whole batch. One process alone,
which is the rule, meets nobody: everything here then gives back what it got.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")


def processes() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def processes_here() -> int:
    """How many of them share this machine's cores."""
    return int(os.environ.get(HERE, 1))


HERE = "LOCAL_WORLD_SIZE"
"""The name by which torchrun says it."""


def averaged(x: Tensor) -> Tensor:
    """The mean over the processes of a tensor of floats that each of them has, the same on all of them.

    The gradient stops at this process's own x as if it stood alone: the mean over processes is left to whoever takes
    the mean of all gradients.
    """
    if processes() == 1:
        return x
    mean: Tensor = _Averaged.apply(x)  # type: ignore[no-untyped-call]
    return mean


def averaged_where_there(x: Tensor | None, like: Tensor) -> Tensor:
    """The mean of a scalar over those processes that have one; None on the others, but not on all."""
    if x is not None and processes() == 1:
        return x
    zero, one = like.new_zeros(()), like.new_ones(())
    sums = averaged(torch.stack([zero, zero] if x is None else [x, one]))
    return sums[0] / sums[1]


def gathered(value: T) -> list[T]:
    """What each process has, in the order of their numbers; anything that can be pickled."""
    if processes() == 1:
        return [value]
    found: list[Any] = [None] * processes()
    dist.all_gather_object(found, value)
    return found


class _Averaged(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        mean = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(mean)
        return mean.div_(processes())

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient
