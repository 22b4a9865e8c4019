"""A network as OpenVINO runs it on a CPU: the same weights in one graph a subset, from images to probabilities.

torch computes layer by layer, and each writes its result to memory and the next reads it again. OpenVINO fuses them. It
first has to trace the network, once for each subset of sequences, and then to compile the graph for each size of box:
seconds, which many patients earn back.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from medmap.align import AlignedSegmenter
from medmap.errors import InputError

KEPT = 4
"""Compiled graphs that are kept, for as many sizes of boxes."""

HINTS = {"fp32": "f32", "bf16": "bf16"}


class Compiled:
    """A network, to be asked with the images of a subset; graphs are made when they are first needed.

    network: on the CPU; precision: fp32 | bf16

    >>> from medmap.align import build_segmenter
    >>> from medmap.config import AlignConfig, ModelConfig
    >>> from medmap.core.modality import GLIOMA_MRI
    >>> network = build_segmenter(ModelConfig(size="tiny"), AlignConfig(anchor="none"), GLIOMA_MRI, classes=4).eval()
    >>> answer = Compiled(network, "fp32")({"t2f": torch.randn(1, 1, 16, 24, 16)})
    >>> answer.shape, answer.sum(axis=1).round(3).min()
    ((1, 4, 16, 24, 16), np.float32(1.0))
    """

    def __init__(self, network: AlignedSegmenter, precision: str) -> None:
        # Traced as it is written down in the end: a layout in memory is nothing that a graph has.
        self._network = copy.deepcopy(network).to(memory_format=torch.contiguous_format).eval()
        self._hint = HINTS[precision]
        self._graphs: dict[tuple[str, ...], Any] = {}
        self._ready: OrderedDict[tuple[Any, ...], Callable[[list[NDArray[np.float32]]], Any]] = OrderedDict()

    def __call__(self, images: Mapping[str, Float[Tensor, "1 1 X Y Z"]]) -> Float[NDArray[np.float32], "1 K X Y Z"]:
        """Class probabilities from the images of one patient, a whole number of strides in size.

        Raises InputError for a network that OpenVINO cannot run.
        """
        names = tuple(name for name in self._network.modalities if name in images)
        ask = self._compiled(names, tuple(next(iter(images.values())).shape))
        answer: NDArray[np.float32] = ask([images[name].numpy() for name in names])[0]
        return answer

    def _compiled(self, names: tuple[str, ...], shape: tuple[int, ...]) -> Callable[[list[NDArray[np.float32]]], Any]:
        key = names, shape
        if key not in self._ready:
            import openvino as ov

            if names not in self._graphs:
                self._graphs[names] = self._traced(names)
            graph = self._graphs[names]
            graph.reshape({index: list(shape) for index in range(len(names))})
            settings = {"INFERENCE_PRECISION_HINT": self._hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
            self._ready[key] = ov.compile_model(graph, "CPU", settings)
        self._ready.move_to_end(key)
        while len(self._ready) > KEPT:
            self._ready.popitem(last=False)
        return self._ready[key]

    def _traced(self, names: tuple[str, ...]) -> Any:
        import openvino as ov

        edge = 2 * self._network.stride
        example = tuple(torch.randn(1, 1, edge, edge, edge) for _ in names)
        with warnings.catch_warnings(), torch.inference_mode():
            # Python numbers that a trace would freeze are the subset, which a graph is made for.
            warnings.simplefilter("ignore")
            logging.getLogger("openvino").setLevel(logging.ERROR)
            try:
                return ov.convert_model(_OfSubset(self._network, names), example_input=example)
            except Exception as error:  # whatever of a network it does not know
                kind = type(self._network.backbone).__name__
                what = str(error).strip().splitlines()[-1]
                raise InputError(f"engine openvino cannot run {kind} ({what}); leave --engine out") from error


class _OfSubset(nn.Module):
    """Images of some sequences, in order → class probabilities."""

    def __init__(self, network: AlignedSegmenter, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, *images: Tensor) -> Tensor:
        kept = torch.tensor([[name in self.names for name in self.network.modalities]])
        encoded = self.network.encode(dict(zip(self.names, images, strict=True)), kept)
        return self.network.decode(encoded, kept).logits.softmax(dim=1)
