"""What a data set would take on this machine: its first cases are worked on, and the others counted."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from medmap.align import AlignedSegmenter, build_segmenter
from medmap.config import Config
from medmap.core.case import Prepared
from medmap.core.labels import SCHEMES
from medmap.core.modality import ModalitySet
from medmap.criterion import Lesson
from medmap.data.cases import DataFolder
from medmap.data.dataset import training_batch
from medmap.data.layouts import recognise
from medmap.data.store import Store, write_store
from medmap.errors import InputError
from medmap.inference import answer_subsets, autocast
from medmap.models.blocks import placed
from medmap.predict import resolve_device, resolve_precision
from medmap.state import optimizer_of

STEPS = 4
"""Training steps that are timed, after a first one that is not."""


@dataclass(frozen=True)
class Rehearsal:
    """What was measured on one case, times how many there are.

    cases:         in the data set; network: what would be trained, with its defaults
    store_gb:      prepared data; prepare_minutes: to make them, in one process
    train_minutes: one training of all its steps, None where the first case has no segmentation
    evaluate_minutes, predict_minutes: every subset of all cases without their metrics; all sequences of all cases
    """

    cases: int
    network: str
    store_gb: float
    prepare_minutes: float
    train_minutes: float | None
    evaluate_minutes: float
    predict_minutes: float

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


def rehearse(
    data: Path, config: Config | None = None, *, spacing_mm: float | None = None, device: str = "auto"
) -> Rehearsal:
    """Prepare one case of a data set, train a few steps on it, answer from one and from all of its sequences.

    The case is the first of those that have the most sequences, with a segmentation where any has one. Nothing stays
    on the disk.

    spacing_mm: of the prepared data; their own where None

    Raises InputError as `recognise` does, and for a case that cannot be prepared.
    """
    config, folder = config or Config(), recognise(data)
    chosen = max(folder.cases, key=lambda case: (case.labels is not None, len(case.images)))
    scratch = Path(tempfile.mkdtemp(prefix="medmap-"))
    try:
        began = time.perf_counter()
        report = write_store(replace(folder, cases=(chosen,)), scratch / "store", spacing_mm)
        if report.failed:
            raise InputError(f"{data}: case {chosen.id} cannot be prepared ({next(iter(report.failed.values()))})")
        prepare_s, store = time.perf_counter() - began, Store(scratch / "store")
        size = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())
        return _measured(store.load(chosen.id), folder, config, resolve_device(device), prepare_s, size)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _measured(
    case: Prepared, folder: DataFolder, config: Config, device: torch.device, prepare_s: float, size: int
) -> Rehearsal:
    modalities, count = ModalitySet(folder.modalities), len(folder.cases)
    scheme = folder.scheme or SCHEMES["brats2023"]
    network = placed(build_segmenter(config.model, config.align, modalities, len(scheme.classes)), device)
    precision = resolve_precision(config.train.precision, device)
    step_s = None if case.labels is None else _step_s(network, case, modalities, config, precision)
    given = [name for name in modalities if name in case.images]
    one_s, all_s = (_answer_s(network, case, ModalitySet(tuple(names)), precision) for names in (given[:1], given))
    encode_s = (all_s - one_s) / (len(given) - 1) if len(given) > 1 else one_s / 2
    decode_s = max(one_s - encode_s, 0.0)
    return Rehearsal(
        cases=count,
        network=f"{config.model.name} {config.model.size}",
        store_gb=count * size / 1e9,
        prepare_minutes=count * prepare_s / 60,
        train_minutes=None if step_s is None else config.train.steps * step_s / 60,
        evaluate_minutes=count * (len(given) * encode_s + (2 ** len(given) - 1) * decode_s) / 60,
        predict_minutes=count * all_s / 60,
    )


def _step_s(
    network: AlignedSegmenter, case: Prepared, modalities: ModalitySet, config: Config, precision: str
) -> float:
    """Median time of a training step, its batch included."""
    device = next(network.parameters()).device
    lesson, optimizer = Lesson(network.train(), config), optimizer_of(config.train, network)
    times = []
    for step in range(STEPS + 1):
        began = time.perf_counter()
        batch = training_batch([case], modalities, config, step, device)
        with autocast(device, precision):
            loss, *_ = lesson(batch.images, batch.seen, batch.kept, batch.target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()  # on a GPU: waits for the step
        times.append(time.perf_counter() - began)
    return median(times[1:])


def _answer_s(network: AlignedSegmenter, case: Prepared, subset: ModalitySet, precision: str) -> float:
    """The second of two times, so that nothing is measured that happens once."""
    network.eval()
    for _ in range(2):
        began = time.perf_counter()
        list(answer_subsets(network, case, [subset], precision=precision))
    return time.perf_counter() - began
