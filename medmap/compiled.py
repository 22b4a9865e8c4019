"""A network as OpenVINO runs it on a CPU: the same weights in one graph a subset, from images to probabilities.

torch computes layer by layer, and each writes its result to memory and the next reads it again. OpenVINO fuses them. It
first has to trace the network, once for each subset of sequences, and then to compile the graph for each size of box:
seconds, which many patients earn back.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jaxtyping
import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from medmap.align import AlignedSegmenter
from medmap.errors import InputError

KEPT = 4
"""Compiled graphs that are kept, for as many sizes of boxes."""

TOLERANCE = 0.02
"""So much of a probe's probability may go to other classes: half of Σ_k |p_k − q_k|, the mean over voxels."""

HINTS = {"fp32": "f32", "bf16": "bf16"}


class Compiled:
    """A network, to be asked with the images of a subset; graphs are made when they are first needed.

    What a compiler made of a network is believed after it was seen to say the same as torch: a graph is tried on a
    probe, images of noise of several widths, and refused where more than 2 % of the probability goes to other classes.

    network: on the CPU; precision: fp32 | bf16

    >>> from medmap.align import build_segmenter
    >>> from medmap.config import AlignConfig, ModelConfig
    >>> from medmap.core.modality import GLIOMA_MRI
    >>> network = build_segmenter(ModelConfig(size="tiny"), AlignConfig(anchor="none"), GLIOMA_MRI, classes=4).eval()
    >>> compiled = Compiled(network, "fp32")
    >>> answer = compiled({"t2f": torch.randn(1, 1, 16, 24, 16)})
    >>> answer.shape, compiled.agreement(("t2f",)) > 0.999
    ((1, 4, 16, 24, 16), True)
    """

    def __init__(self, network: AlignedSegmenter, precision: str) -> None:
        # Traced as it is written down in the end: a layout in memory is nothing that a graph has.
        self._network = copy.deepcopy(network).to(memory_format=torch.contiguous_format).eval()
        self._precision = precision
        self._graphs: dict[tuple[str, ...], _Graph | InputError] = {}

    def __call__(self, images: Mapping[str, Float[Tensor, "1 1 X Y Z"]]) -> Float[NDArray[np.float32], "1 K X Y Z"]:
        """Class probabilities from the images of one patient, a whole number of strides in size.

        Raises InputError for a network that OpenVINO cannot run, or runs to another result.
        """
        names = tuple(name for name in self._network.modalities if name in images)
        return self._graph(names)([images[name].numpy() for name in names])

    def agreement(self, names: tuple[str, ...]) -> float:
        """The share of the probe's voxels to which the graph of a subset gives the labels that torch gives."""
        return self._graph(names).agreement

    def _graph(self, names: tuple[str, ...]) -> _Graph:
        if names not in self._graphs:
            try:
                self._graphs[names] = _Graph(_OfSubset(self._network, names), self._network.stride, self._precision)
            except InputError as error:
                self._graphs[names] = error
        found = self._graphs[names]
        if isinstance(found, InputError):
            raise found
        return found


class _Graph:
    """The graph of one subset, and what is compiled of it for the sizes that came last."""

    def __init__(self, module: _OfSubset, stride: int, precision: str) -> None:
        self._traced = _traced(module, stride)
        self._hint = HINTS[precision]
        self._ready: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        probe = [_probe(4 * stride, seed) for seed, _ in enumerate(module.names)]
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            expected = module(*probe).float().numpy()
        found = self([image.numpy() for image in probe])
        self.agreement = float((found.argmax(axis=1) == expected.argmax(axis=1)).mean())
        moved = float(np.abs(found - expected).sum(axis=1).mean() / 2)
        if moved > TOLERANCE:
            raise InputError(
                f"engine openvino gives {100 * moved:.1f} % of the probability to other classes than torch, on a "
                f"probe of {'+'.join(module.names)}; at most {100 * TOLERANCE:.0f} % are put down to rounding. Leave "
                "--engine out, or take --engine torch"
            )

    def __call__(self, images: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        shape = images[0].shape
        if shape not in self._ready:
            self._traced.reshape({index: list(shape) for index in range(len(images))})
            settings = {"INFERENCE_PRECISION_HINT": self._hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
            self._ready[shape] = _openvino().compile_model(self._traced, "CPU", settings)
        self._ready.move_to_end(shape)
        while len(self._ready) > KEPT:
            self._ready.popitem(last=False)
        answer: NDArray[np.float32] = self._ready[shape](images)[0]
        return answer


def _traced(module: _OfSubset, stride: int) -> Any:
    example = tuple(torch.randn(1, 1, 2 * stride, 2 * stride, 2 * stride) for _ in module.names)
    with warnings.catch_warnings(), torch.inference_mode(), _sizes_may_be_tensors():
        # Python numbers that a trace would freeze are the subset, which a graph is made for.
        warnings.simplefilter("ignore")
        try:
            return _openvino().convert_model(module, example_input=example)
        except Exception as error:  # whatever of a network it does not know
            kind, what = type(module.network.backbone).__name__, str(error).strip().splitlines()[-1]
            raise InputError(
                f"engine openvino cannot run {kind} ({what}); leave --engine out, or take --engine torch"
            ) from error


def _probe(edge: int, seed: int) -> Float[Tensor, "1 1 X Y Z"]:
    """Noise of several widths, of mean 0 and variance 1, as images are after normalisation."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(1, 1, edge, edge, edge)
    for width in (1, 2, 4, 8):
        noise = torch.randn(1, 1, *[edge // width] * 3, generator=generator)
        total += functional.interpolate(noise, scale_factor=float(width), mode="nearest") / 2
    return total


def _openvino() -> Any:
    """OpenVINO without its telemetry, which would leave an identity in the home directory and send it away."""
    telemetry = "openvino_telemetry"
    if "openvino" not in sys.modules:
        sys.modules[telemetry] = None  # type: ignore[assignment]  # as if it were not installed
    try:
        import openvino
    finally:
        if sys.modules.get(telemetry, ...) is None:
            del sys.modules[telemetry]
    return openvino


@contextmanager
def _sizes_may_be_tensors() -> Iterator[None]:
    """While a network is traced, numbers that come from a shape are tensors; who checks types would refuse them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


class _OfSubset(nn.Module):
    """Images of some sequences, in order → class probabilities."""

    def __init__(self, network: AlignedSegmenter, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, *images: Tensor) -> Tensor:
        kept = torch.tensor([[name in self.names for name in self.network.modalities]])
        encoded = self.network.encode(dict(zip(self.names, images, strict=True)), kept)
        return self.network.decode(encoded, kept).logits.softmax(dim=1)
