"""What a data set would take on this machine: its first cases are worked on, and the others counted."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from medmap.align import AlignedSegmenter, build_segmenter
from medmap.config import Config
from medmap.core.box import Box, Boxed
from medmap.core.case import Prepared
from medmap.core.labels import SCHEMES
from medmap.core.modality import ModalitySet
from medmap.criterion import Lesson
from medmap.data.cases import DataFolder
from medmap.data.dataset import training_batch
from medmap.data.layouts import recognise
from medmap.data.store import Store, write_store
from medmap.errors import InputError
from medmap.inference import Windows, answer_subsets, autocast, network_box, pass_memory
from medmap.models.blocks import placed
from medmap.models.convolution import whole_volumes
from medmap.predict import resolve_device, resolve_precision
from medmap.state import optimizer_of

STEPS = 4
"""Training steps that are timed on a GPU, after a first one that is not; a CPU does one, of one sample."""

PARTS = 4
"""Preparing, two sizes of training step, answering."""

STATE = 5
"""Copies of the weights while they are trained: themselves, their gradients, two moments, the moving average."""

BACK = 2.0
"""What a step takes of what it keeps for its way back, gradients on that way included: measured on a CPU."""

Told = Callable[[int, int, str], None]
"""Called before each part with parts done, parts in all, its name."""


@dataclass(frozen=True)
class Rehearsal:
    """What was measured on one case, times how many there are.

    cases:         in the data set; network: what would be trained, with its defaults
    store_gb:      prepared data; prepare_minutes: to make them, in one process
    train_minutes: one training of all its steps, None where the first case has no segmentation
    evaluate_minutes, predict_minutes: every subset of all cases without their metrics; all sequences of all cases
    train_gb, predict_gb: what tensors take at most, in a training step and for one patient; on a GPU, of its memory
    """

    cases: int
    network: str
    store_gb: float
    prepare_minutes: float
    train_minutes: float | None
    evaluate_minutes: float
    predict_minutes: float
    train_gb: float | None
    predict_gb: float

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


def rehearse(
    data: Path,
    config: Config | None = None,
    *,
    spacing_mm: float | None = None,
    device: str = "auto",
    told: Told = lambda done, total, text: None,
) -> Rehearsal:
    """Prepare one case of a data set, train a little on it, answer from a patch of it, and multiply.

    The case is the first of those that have the most sequences, with a segmentation where any has one. A network takes
    a time in proportion to the voxels it computes, so that a patch tells what a patient takes. Nothing stays on the
    disk.

    spacing_mm: of the prepared data; their own where None
    told:       hears of every part

    Raises InputError as `recognise` does, and for a case that cannot be prepared.
    """
    config, folder = config or Config(), recognise(data)
    chosen = max(folder.cases, key=lambda case: (case.labels is not None, len(case.images)))
    scratch = Path(tempfile.mkdtemp(prefix="medmap-"))
    told(0, PARTS, f"preparing {chosen.id}")
    try:
        began = time.perf_counter()
        report = write_store(replace(folder, cases=(chosen,)), scratch / "store", spacing_mm)
        if report.failed:
            raise InputError(f"{data}: case {chosen.id} cannot be prepared ({next(iter(report.failed.values()))})")
        prepare_s, store = time.perf_counter() - began, Store(scratch / "store")
        size = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())
        return _measured(store.load(chosen.id), folder, config, resolve_device(device), prepare_s, size, told)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _measured(
    case: Prepared,
    folder: DataFolder,
    config: Config,
    device: torch.device,
    prepare_s: float,
    size: int,
    told: Told,
) -> Rehearsal:
    modalities, count = ModalitySet(folder.modalities), len(folder.cases)
    scheme = folder.scheme or SCHEMES["brats2023"]
    network = placed(build_segmenter(config.model, config.align, modalities, len(scheme.classes)), device)
    precision = resolve_precision(config.train.precision, device)
    step_s = train_gb = None
    if case.labels is not None:
        told(1, PARTS, "a training step, small")
        train_gb = _step_gb(network, case, modalities, config, precision)
        told(2, PARTS, "a training step")
        step_s = _step_s(network, case, modalities, config, precision)
    told(3, PARTS, "an answer")
    given = ModalitySet(tuple(name for name in modalities if name in case.images))
    encode_s, decode_s = _answer_s(network, case, given, config, precision)
    times, predict_gb = _patient(network, case, given, config, precision)
    told(PARTS, PARTS, "")
    return Rehearsal(
        cases=count,
        network=f"{config.model.name} {config.model.size}",
        store_gb=count * size / 1e9,
        prepare_minutes=count * prepare_s / 60,
        train_minutes=None if step_s is None else config.train.steps * step_s / 60,
        evaluate_minutes=count * times * (len(given) * encode_s + (2 ** len(given) - 1) * decode_s) / 60,
        predict_minutes=count * times * (len(given) * encode_s + decode_s) / 60,
        train_gb=train_gb,
        predict_gb=predict_gb,
    )


def _step_gb(
    network: AlignedSegmenter, case: Prepared, modalities: ModalitySet, config: Config, precision: str
) -> float:
    """Memory of a training step: the weights' state, and what a small step keeps for its way back, times the voxels."""
    device, train = next(network.parameters()).device, config.train
    patch = tuple(min(n, max(2 * network.stride, n // 2)) for n in train.patch)
    small = _with(config, batch_size=1, patch=patch)
    batch, lesson = training_batch([case], modalities, small, 0, device), Lesson(network.train(), small)
    kept: dict[int, int] = {}

    def noted(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(noted, lambda tensor: tensor)
    with hooks, autocast(device, precision), whole_volumes():
        loss, *_ = lesson(batch.images, batch.seen, batch.kept, batch.target)
    loss.backward()
    network.zero_grad(set_to_none=True)
    weights = {w.untyped_storage().data_ptr(): w.untyped_storage().nbytes() for w in network.parameters()}
    latents = sum(size for place, size in kept.items() if place not in weights)
    times = train.batch_size * prod(train.patch) / prod(patch)
    return (STATE * sum(weights.values()) + BACK * times * latents) / 1e9


def _step_s(
    network: AlignedSegmenter, case: Prepared, modalities: ModalitySet, config: Config, precision: str
) -> float:
    """Median time of a training step, its batch included; a CPU takes a time for each sample."""
    device = next(network.parameters()).device
    steps, rows = (1, 1) if device.type == "cpu" else (1 + STEPS, config.train.batch_size)
    part = _with(config, batch_size=rows)
    lesson, optimizer = Lesson(network.train(), part), optimizer_of(config.train, network)
    times = []
    for step in range(steps):
        began = time.perf_counter()
        batch = training_batch([case], modalities, part, step, device, dropped=network.uses_dropped)
        with autocast(device, precision):
            loss, *_ = lesson(batch.images, batch.seen, batch.kept, batch.target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()  # on a GPU: waits for the step
        times.append(time.perf_counter() - began)
    return median(times[-STEPS:]) * config.train.batch_size / rows


def _with(config: Config, **train: Any) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def _answer_s(
    network: AlignedSegmenter, case: Prepared, given: ModalitySet, config: Config, precision: str
) -> tuple[float, float]:
    """Times to encode a sequence and to decode a subset, on a patch in the middle of the brain."""
    network.eval()
    middle, size = _brain(network, case, given), config.train.patch
    ends, step = zip(middle.start, middle.stop, size, strict=True), network.stride
    x, y, z = ((a + b - n) // 2 // step * step for a, b, n in ends)  # on the lattice, or the patch would be enlarged
    patch = Box((x, y, z), (x + size[0], y + size[1], z + size[2]))
    part = replace(case, images={name: Boxed(case.images[name].window(patch), patch) for name in given}, labels=None)
    began = time.perf_counter()
    answers = answer_subsets(network, part, [given, given], mirror=config.predict.mirror, precision=precision)
    at, end = [time.perf_counter() for _ in answers]
    first, second = at - began, end - at  # the first time sequences are encoded as well
    return max(first - second, 0.0) / len(given), second


def _patient(
    network: AlignedSegmenter, case: Prepared, given: ModalitySet, config: Config, precision: str
) -> tuple[float, float]:
    """How many patches a patient is worth, and the memory that one pass or a window takes."""
    brain, limit = _brain(network, case, given), config.predict.memory_gb
    need = pass_memory(network, 2 ** len(config.predict.mirror), precision)
    patch, whole_gb = prod(config.train.patch), need.gb(prod(brain.shape))
    if whole_gb <= limit:
        return prod(brain.shape) / patch, whole_gb
    return float(len(Windows(limit, config.train.patch).over(brain, network.stride))), need.gb(patch)


def _brain(network: AlignedSegmenter, case: Prepared, given: ModalitySet) -> Box:
    return Box.union(network_box(network, case, name) for name in given)
