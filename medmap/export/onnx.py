"""ONNX graphs of a model, checked against torch, and graphs.json, with which somebody without medmap can use them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import medmap
from medmap.align import AlignedSegmenter
from medmap.card import ModelFolder, choose_scheme
from medmap.checkpoint import load_network
from medmap.core.box import Box
from medmap.core.modality import ModalitySet
from medmap.data.preprocess import prepare_case
from medmap.errors import InputError
from medmap.export.graphs import (
    DECODER,
    IMAGES,
    MASK,
    NETWORK,
    OPSET,
    Graphs,
    encoder_file,
    record,
)
from medmap.export.package import (
    FORMAT,
    LICENCE,
    NOT_A_DEVICE,
    Package,
    licence_name,
    licence_text,
    members,
    packed,
    readme,
    whole,
)
from medmap.phantom import Settings, simulate
from medmap.predict import answerable
from medmap.run import read_run, write_text

DESCRIPTION = "graphs.json"

TOLERANCE = 1e-3
"""No probability may differ by more from torch's, in any voxel of any subset. Rounding is 1e-5."""

PHANTOM_MM = 4.0

Images = Mapping[str, Tensor]
Arrays = Mapping[str, NDArray[Any]]


def export_onnx(model: ModelFolder, out: Path, licence: str | None = None) -> Package:
    """Write the ONNX graphs of a model, one folder a fold where there are several, and graphs.json.

    Every graph is run by onnxruntime before it is believed: on noise of two sizes and on a simulated patient where the
    sequences can be simulated, for every subset that the network answers, no probability may be 1e-3 from torch's.

    Raises InputError where ``out`` exists or cannot be written, a network cannot be recorded, or a graph says
    something else; then nothing is left behind.
    """
    text = licence_text(model, licence)
    networks, graphs, checked = {}, {}, {}
    with whole(out) as fresh:
        for name, run in members(model).items():
            networks[name] = load_network(run, model.which)
            (fresh / name).mkdir(parents=True, exist_ok=True)
            graphs[name] = record(networks[name])
            write_graphs(graphs[name], fresh / name)
            checked[name] = check(networks[name], fresh / name, _phantom_images(networks[name], run), str(run))
        how = {"tolerance": TOLERANCE, "largest_difference": max(one["largest_difference"] for one in checked.values())}
        how |= {"on": next(iter(checked.values()))["on"]}
        about = describe(model, networks, graphs, how) | {"licence": licence_name(text)}
        write_text(fresh / DESCRIPTION, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
        use = f"`{DESCRIPTION}` says how images are prepared and what goes in and comes out of each graph."
        write_text(fresh / "README.md", readme(model, "ONNX graphs of a model of medmap", use, text))
        write_text(fresh / LICENCE, text)
    return packed(out, how)


def write_graphs(graphs: Graphs, folder: Path) -> None:
    """Put graphs in a folder."""
    for name, graph in graphs.items():
        graph.producer_name, graph.producer_version = "medmap", medmap.__version__
        (folder / name).write_bytes(graph.SerializeToString())


def describe(
    model: ModelFolder,
    networks: Mapping[str, AlignedSegmenter],
    graphs: Mapping[str, Graphs],
    checked: Mapping[str, Any],
) -> dict[str, Any]:
    """What somebody needs to use the graphs who has nothing else, in plain types; by members where it says so."""
    first = next(iter(networks.values()))
    config, _ = read_run(model.runs[0])
    scheme, et_min_ml = choose_scheme(model.scheme), config.predict.et_min_ml
    small = {"class": "et", "becomes": "ncr", "below_ml": et_min_ml} if "et" in scheme.classes and et_min_ml else None
    return {
        "format": FORMAT,
        "made_by": f"medmap {medmap.__version__}",
        "about": model.about or NOT_A_DEVICE,
        "backbone": f"{config.model.name} {config.model.size}",
        "modalities": list(model.modalities),
        "subsets": [str(subset) for subset in answerable(list(networks.values()), model.modalities)],
        "classes": list(scheme.classes),
        "codes": {"background": 0, **scheme.codes},
        "regions": {region: list(classes) for region, classes in scheme.regions.items()},
        "spacing_mm": model.spacing_mm,
        "preparing": PREPARING,
        "stride": first.stride,
        "mirror": list(config.predict.mirror),
        "drop_small": small,
        "opset": OPSET,
        "members": [_member(network, graphs[name], name) for name, network in networks.items()],
        "checked": dict(checked),
    }


def _member(network: AlignedSegmenter, graphs: Graphs, folder: str) -> dict[str, Any]:
    place = f"{folder}/" if folder else ""
    told = {
        name: {"file": place + name, "inputs": _shapes(graph.graph.input), "outputs": _shapes(graph.graph.output)}
        for name, graph in graphs.items()
    }
    if NETWORK in graphs:
        return {"network": told[NETWORK]}
    encoders = {name: told[encoder_file(name)] for name in network.modalities}
    return {"levels": dict(network.backbone.strides), "encoders": encoders, "decoder": told[DECODER]}


def _shapes(values: Any) -> dict[str, list[int | str]]:
    """{name: shape} of a graph's inputs or outputs; a size that is free is a word."""
    return {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim] for value in values
    }


# ---- the same as torch? -----------------------------------------------------------------------------------------


def check(network: AlignedSegmenter, folder: Path, phantom: Images | None, what: str) -> dict[str, Any]:
    """How far the graphs in a folder are from torch. Raises InputError where it is too far."""
    sessions = {file.name: session(file) for file in folder.glob("*.onnx")}
    subsets, worst = network.backbone.supported_subsets(), 0.0
    tried = {"noise": list(_noise(network)), "a simulated patient": [phantom] if phantom else []}
    for kind, several in tried.items():
        for images in several:
            for subset, expected, found in answers(network, sessions, images, subsets):
                apart = float(np.abs(expected - found).max())
                if not apart <= TOLERANCE:
                    raise InputError(
                        f"{what}: on {kind} with {subset}, onnxruntime gives probabilities {apart:.2g} from torch's, "
                        f"at most {TOLERANCE:g} is put down to rounding. Nothing was written; take --to folder or "
                        "--to bundle"
                    )
                worst = max(worst, apart)
    return {"largest_difference": worst, "on": [kind for kind, several in tried.items() if several]}


def session(file: Path) -> Any:
    """A graph as onnxruntime runs it on a CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def answers(
    network: AlignedSegmenter, sessions: Mapping[str, Any], images: Images, subsets: list[ModalitySet]
) -> Iterator[tuple[ModalitySet, NDArray[np.float32], NDArray[np.float32]]]:
    """(subset, torch's probabilities, those of the graphs), [1 K X Y Z], for images [1 1 X Y Z] of all sequences.

    torch never meets a sequence that is not in the subset; the graphs are given zeros for it.
    """
    latents = {} if NETWORK in sessions else _latents(sessions, images)
    for subset in subsets:
        mask = torch.tensor([[name in subset for name in network.modalities]])
        with torch.inference_mode():
            encoded = network.encode({name: images[name] for name in subset}, mask)
            expected = network.decode(encoded, mask).logits.softmax(dim=1).numpy()
        given: dict[str, NDArray[Any]] = {MASK: mask.numpy()}
        if NETWORK in sessions:
            shown = [images[name] if name in subset else torch.zeros_like(images[name]) for name in network.modalities]
            given[IMAGES] = torch.cat(shown, dim=1).numpy()
        for name, several in latents.items():
            given |= several if name in subset else {key: np.zeros_like(z) for key, z in several.items()}
        graph = sessions[NETWORK if NETWORK in sessions else DECODER]
        yield subset, expected, graph.run(None, given)[0]


def _latents(sessions: Mapping[str, Any], images: Images) -> dict[str, dict[str, NDArray[Any]]]:
    found = {}
    for name, image in images.items():
        encoder = sessions[encoder_file(name)]
        outputs = [output.name for output in encoder.get_outputs()]
        found[name] = dict(zip(outputs, encoder.run(outputs, {name: image.numpy()}), strict=True))
    return found


def _noise(network: AlignedSegmenter) -> Iterator[dict[str, Tensor]]:
    """Images of other sizes than the graphs were recorded for."""
    generator, unit = torch.Generator().manual_seed(0), max(network.stride, 8)
    for edges in ((3, 2, 2), (2, 4, 3)):
        shape = (1, 1, *(unit * n for n in edges))
        yield {name: torch.randn(shape, generator=generator) for name in network.modalities}


def _phantom_images(network: AlignedSegmenter, run: Path) -> dict[str, Tensor] | None:
    """A simulated patient at 4 mm, prepared; None where these sequences cannot be simulated."""
    config, _ = read_run(run)
    try:
        case = simulate(0, Settings(ModalitySet(network.modalities.names), config.phantom.organ, PHANTOM_MM))
    except InputError:
        return None
    images = prepare_case(case, None).images
    box = Box.union(image.box for image in images.values()).snapped(network.stride)
    assert prod(box.shape)
    return {name: torch.from_numpy(image.window(box).astype(np.float32))[None, None] for name, image in images.items()}


PREPARING = [
    "Turn every image so that its axes point to the patient's right, front and head (RAS+).",
    "Resample it to cubic voxels of spacing_mm where that is not null; by the mean where voxels become larger.",
    "Its brain is where it is not 0: images are skull-stripped, and each sequence has a brain of its own.",
    "z = (x - mean) / standard deviation over that brain, 0 outside; rounded to float16, computed with as float32.",
    "Cut it to its brain's bounding box, widened to multiples of stride from voxel 0, two strides at least.",
    "Encode each sequence in its own box; lay its latents on the box that holds all of them, 0 beyond; decode there. "
    "Where there is no encoder, give the images themselves on that box.",
    "Give 0 for latents, or the image, of a sequence that is absent, and false in the mask, whose order is that of "
    "modalities. Ask for one of subsets.",
    "Answer as well for the images mirrored along the axes in mirror (all combinations), and for every member; the "
    "mean of the probabilities, mirrored back, is the answer. Beyond the box it is background.",
    "Bring the probabilities back to the image's own grid, take the class of the largest, and write its code.",
    "drop_small: where the whole class has less than below_ml, it becomes the other one.",
]
