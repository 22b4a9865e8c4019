"""A network as ONNX graphs of any size, with the mask of sequences as an input.

A separable network becomes one encoder a sequence and a decoder of all of them::

    encoder-t1c.onnx    t1c Float[1 1 X Y Z]  ──▶  x1_t1c … xL_t1c Float[1 C X/s Y/s Z/s], one a level of stride s
    decoder.onnx        mask Bool[1 M], all latents  ──▶  probabilities Float[1 K X Y Z]

Any other becomes network.onnx: mask Bool[1 M], images Float[1 M X Y Z] ──▶ probabilities. X, Y, Z are multiples of the
stride, two strides at least. What stands for a sequence that is not in the mask, an image or latents, is 0.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jaxtyping
import torch
from torch import Tensor, nn

from medmap.align import AlignedSegmenter
from medmap.errors import InputError
from medmap.models.backbone import Encoded, free_masks

OPSET = 20
DECODER, NETWORK = "decoder.onnx", "network.onnx"
IMAGES, MASK, PROBABILITIES = "images", "mask", "probabilities"
LARGEST = 64
"""Strides in an edge of the largest image that a graph is recorded for; it runs for larger ones as well."""

Graphs = dict[str, Any]
"""{file name: onnx.ModelProto}"""


def encoder_file(name: str) -> str:
    """The file of a sequence's encoder."""
    return f"encoder-{name}.onnx"


def latent_name(level: str, name: str) -> str:
    """What latents of a sequence are called: an encoder's output, an input of the decoder."""
    return f"{level}_{name}"


def record(network: AlignedSegmenter) -> Graphs:
    """The graphs of a network, see the head of this file. Raises InputError for a network that cannot be recorded."""
    # As it is written down in the end: a layout in memory is nothing that a graph has.
    network = copy.deepcopy(network).cpu().to(memory_format=torch.contiguous_format).eval()
    try:
        with _quiet(), _sizes_may_be_numbers_of_a_graph(), torch.no_grad():
            return _in_parts(network) if network.separable else {NETWORK: _whole(network)}
    except Exception as error:  # whatever of a network the exporter does not know
        kind, what = type(network.backbone).__name__, str(error).strip().splitlines()[0]
        raise InputError(
            f"{kind}: cannot be recorded as an ONNX graph ({what[:200]}); take --to folder or --to bundle, which "
            "keep it as it is"
        ) from error


def _in_parts(network: AlignedSegmenter) -> Graphs:
    from onnx.utils import Extractor

    names, strides = list(network.modalities), network.backbone.strides
    outputs = {name: [latent_name(level, name) for level in strides] for name in names}
    images = [torch.randn(1, 1, *_edges(network.stride)) for _ in names]
    together = _recorded(
        _Encoders(network),
        tuple(images),
        names,
        [output for name in names for output in outputs[name]],
        (tuple(_axes(name, network.stride, 1) for name in names),),  # each of its own size: nothing of another enters
        full=True,
    )
    graphs = {}
    for name in names:
        graph = Extractor(together).extract_model([name], outputs[name])
        sizes = {name: 1, **{latent_name(level, name): stride for level, stride in strides.items()}}
        graphs[encoder_file(name)] = _cleaned(graph, sizes)
    with free_masks(full=True):
        latents = _Encoders(network)(*images)
    levels = [(level, stride) for _ in names for level, stride in strides.items()]
    given = [output for name in names for output in outputs[name]]
    decoder = _recorded(
        _Decoder(network),
        (torch.ones(1, len(names), dtype=torch.bool), *latents),
        [MASK, *given],
        [PROBABILITIES],
        ({}, tuple(_axes("", network.stride, stride) for _, stride in levels)),
    )
    sizes = dict(zip(given, (stride for _, stride in levels), strict=True))
    graphs[DECODER] = _cleaned(decoder, {**sizes, PROBABILITIES: 1})
    return graphs


def _whole(network: AlignedSegmenter) -> Any:
    count = len(network.modalities)
    given = torch.ones(1, count, dtype=torch.bool), torch.randn(1, count, *_edges(network.stride))
    graph = _recorded(
        _Whole(network), given, [MASK, IMAGES], [PROBABILITIES], {MASK: {}, IMAGES: _axes("", network.stride, 1)}
    )
    return _cleaned(graph, {IMAGES: 1, PROBABILITIES: 1})


def _recorded(
    module: nn.Module,
    given: tuple[Tensor, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    sizes: Any,
    full: bool = False,
) -> Any:
    with free_masks(full):
        program = torch.onnx.export(
            module.eval(),
            given,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=sizes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def _edges(stride: int) -> tuple[int, int, int]:
    """Three edges that are unlike, so that no graph takes one for the other."""
    unit = max(stride, 8)
    return 2 * unit, 3 * unit, 4 * unit


def _axes(prefix: str, stride: int, of_level: int) -> dict[int, Any]:
    """{axis: its size as a variable}: s/of_level · n for n strides s."""
    found = {}
    for axis, letter in enumerate("xyz", start=2):
        strides = torch.export.Dim(f"{prefix}_{letter}", min=2, max=max(LARGEST, 512 // stride))
        found[axis] = strides if of_level == stride else stride // of_level * strides
    return found


def _cleaned(graph: Any, strides: Mapping[str, int]) -> Any:
    """A graph without its history, places on this machine among it, and with sizes that are called X, Y, Z."""
    for node in graph.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for part in (graph, graph.graph, *graph.graph.initializer, *graph.graph.input, *graph.graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    graph.graph.ClearField("value_info")
    graph.ClearField("functions")
    for value in (*graph.graph.input, *graph.graph.output):
        if value.name in strides:
            stride = strides[value.name]
            for letter, size in zip("XYZ", value.type.tensor_type.shape.dim[2:], strict=True):
                size.dim_param = letter if stride == 1 else f"{letter}/{stride}"
    return graph


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter has much to say about its own inside."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


@contextmanager
def _sizes_may_be_numbers_of_a_graph() -> Iterator[None]:
    """While a network is recorded, sizes are variables; who checks types would refuse them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def _everything(network: AlignedSegmenter) -> Tensor:
    return torch.ones(1, len(network.modalities), dtype=torch.bool)


class _Encoders(nn.Module):
    """One image a sequence, each of a size of its own → latents, sequence by sequence."""

    def __init__(self, network: AlignedSegmenter) -> None:
        super().__init__()
        self.network = network

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        names = list(self.network.modalities)
        levels = self.network.encode(dict(zip(names, images, strict=True)), _everything(self.network)).levels
        return tuple(levels[level][name] for name in names for level in self.network.backbone.strides)


class _Decoder(nn.Module):
    """Mask and latents → class probabilities."""

    def __init__(self, network: AlignedSegmenter) -> None:
        super().__init__()
        self.network = network

    def forward(self, mask: Tensor, *latents: Tensor) -> Tensor:
        strides, given = self.network.backbone.strides, iter(latents)
        by_name = {name: {level: next(given) for level in strides} for name in self.network.modalities}
        levels = {level: {name: by_name[name][level] for name in by_name} for level in strides}
        finest = min(strides, key=lambda level: strides[level])
        x, y, z = (strides[finest] * n for n in latents[list(strides).index(finest)].shape[2:])
        return self.network.decode(Encoded(levels, (x, y, z)), mask).logits.softmax(dim=1)


class _Whole(nn.Module):
    """Mask and images → class probabilities."""

    def __init__(self, network: AlignedSegmenter) -> None:
        super().__init__()
        self.network = network

    def forward(self, mask: Tensor, images: Tensor) -> Tensor:
        named = {name: images[:, m : m + 1] for m, name in enumerate(self.network.modalities)}
        return self.network.decode(self.network.encode(named, mask), mask).logits.softmax(dim=1)
