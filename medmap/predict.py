"""Weights + patient → masks, from any subset of sequences; see `medmap.inference` for how."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medmap.align import AlignedSegmenter
from medmap.card import SHIPPED
from medmap.checkpoint import load_network
from medmap.compiled import Compiled
from medmap.core.case import Case, Grid, Prediction, Prepared
from medmap.core.metrics import postprocess
from medmap.core.modality import ModalitySet
from medmap.core.temperature import tempered
from medmap.data.preprocess import prepare_case, restore, restore_classes
from medmap.errors import CheckpointError, InputError
from medmap.inference import SubsetAnswer, Windows, answer_subsets, network_device
from medmap.latents import KeptLatents
from medmap.run import ModelCard, find_runs, read_run


def answerable(networks: Sequence[AlignedSegmenter], names: Iterable[str]) -> list[ModalitySet]:
    """The subsets of some sequences that every one of some networks supports; those with fewer sequences first."""
    supported = [{str(subset) for subset in network.backbone.supported_subsets()} for network in networks]
    known = networks[0].modalities.pick(name for name in names if name in networks[0].modalities)
    return [subset for subset in known.subsets() if all(str(subset) in theirs for theirs in supported)]


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` → bf16 where the machine multiplies it natively, else fp32; other names stay.

    On a CPU without AVX-512 BF16 or AMX, bf16 is emulated and slower than fp32.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "fp32"
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def resolve_engine(engine: str, device: torch.device) -> str:
    """``auto`` → openvino where it is installed and works on the device, a CPU, else torch; other names stay.

    Raises InputError for openvino where it cannot be had.
    """
    there = find_spec("openvino") is not None
    if engine == "auto":
        return "openvino" if there and device.type == "cpu" else "torch"
    if engine == "openvino" and device.type != "cpu":
        raise InputError(f"engine openvino computes on a CPU, not on {device}; leave --engine out, or add --device cpu")
    if engine == "openvino" and not there:
        raise InputError("engine openvino is not installed; pip install 'medmap[cpu]', or leave --engine out")
    return engine


def resolve_device(device: str) -> torch.device:
    """``auto`` → the GPU where there is one. Raises InputError for a device that this machine does not have."""
    if device == "auto" or (device == "cuda" and torch.cuda.is_available()):  # which one is for later: not touched yet
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {device!r} is not to be had here ({error}); expected auto, cpu, cuda or cuda:N"
        ) from error
    return found


@dataclass(frozen=True)
class Begun:
    """A patient ready for the network: own grid, common grid, the subset to be answered, and notes on what was left."""

    grid: Grid
    prepared: Prepared
    used: ModalitySet
    notes: tuple[str, ...]


class Predictor:
    """Loaded once, asked many times: the networks of one run, or of all its folds as an ensemble."""

    def __init__(
        self,
        networks: Sequence[AlignedSegmenter],
        card: ModelCard,
        *,
        mirror: Sequence[int] = (),
        precision: str = "auto",
        et_min_ml: float = 0.5,
        windows: Windows | None = None,
        engine: str = "torch",
    ) -> None:
        self.networks = tuple(networks)
        self.card = card
        self.mirror = tuple(mirror)
        self.device = network_device(networks[0])
        self.precision = resolve_precision(precision, self.device)
        self.et_min_ml = float(et_min_ml)
        self.windows = windows
        self._engine, graphs = engine, resolve_engine(engine, self.device) == "openvino"
        self._compiled = [Compiled(network, self.precision) if graphs else None for network in networks]
        self._kept: list[KeptLatents] | None = None

    @classmethod
    def load(
        cls,
        path: Path = SHIPPED,
        *,
        which: str = "best",
        device: str = "auto",
        precision: str = "auto",
        engine: str = "torch",
    ) -> Predictor:
        """From a run folder, or from a folder of folds or seeds: these answer together, by the mean of probabilities.
        By default what comes with medmap, which was trained on simulated patients alone.

        engine: what computes predictions, torch | openvino | auto, see `resolve_engine`

        Raises CheckpointError when there is no run, or the runs are not of one kind.
        """
        runs = find_runs(path)
        config, card = read_run(runs[0])
        for run in runs[1:]:
            theirs, other = read_run(run)
            if other != card:
                raise CheckpointError(
                    f"{run} and {runs[0]} cannot answer together: their sequences, labels or spacing differ; "
                    "name one of them"
                )
            for (key, found), (_, first) in zip(theirs.predict, config.predict, strict=True):
                if found != first:
                    raise CheckpointError(
                        f"{run} and {runs[0]} cannot answer together: predict.{key} is {found} and {first}; make it "
                        "the same in their config.yaml, or name one of them"
                    )
        networks = [load_network(run, which, resolve_device(device)) for run in runs]
        for run, network in zip(runs, networks, strict=True):
            if network.stride != networks[0].stride:
                raise CheckpointError(
                    f"{run} and {runs[0]} cannot answer together: a network of stride {network.stride} and one of "
                    f"{networks[0].stride} look at other boxes; name one of them"
                )
        return cls(
            networks,
            card,
            mirror=config.predict.mirror,
            precision=precision,
            et_min_ml=config.predict.et_min_ml,
            windows=Windows(config.predict.memory_gb, config.train.patch),
            engine=engine,
        )

    def remembering(self) -> Predictor:
        """The same predictor, which keeps the latents of the patient it was last asked about: to answer from another
        subset of sequences it only decodes. The answers are the same. What windows compute is not kept."""
        twin = copy(self)
        twin._kept = [KeptLatents() for _ in self.networks]
        return twin

    def answers(self, prepared: Prepared, subsets: Iterable[ModalitySet]) -> Iterator[SubsetAnswer]:
        """Class probabilities on the common grid, subset by subset: the mean over the networks."""
        yield from self._answers(prepared, list(subsets), [None] * len(self.networks))

    def _answers(
        self, prepared: Prepared, subsets: Sequence[ModalitySet], graphs: Sequence[Compiled | None]
    ) -> Iterator[SubsetAnswer]:
        how: dict[str, Any] = {"mirror": self.mirror, "precision": self.precision, "windows": self.windows}
        kept = self._kept or [None] * len(self.networks)
        streams = [
            answer_subsets(network, prepared, subsets, compiled=graph, kept=mine, **how)
            for network, graph, mine in zip(self.networks, graphs, kept, strict=True)
        ]
        for several in zip(*streams, strict=True):
            mean = np.mean([answer.probabilities for answer in several], axis=0, dtype=np.float32)
            yield several[0]._replace(probabilities=mean)

    def usable(self, names: Iterable[str]) -> ModalitySet:
        """The sequences among ``names`` that the model knows. Raises InputError when there is none."""
        names = list(names)
        common = [name for name in self.card.modalities if name in names]
        if not common:
            raise InputError(
                f"no sequence in common: the input has {', '.join(names) or 'none'}, the model knows "
                f"{', '.join(self.card.modalities)}"
            )
        return ModalitySet(tuple(common))

    def predict(self, case: Case, *, probabilities: bool = False, clean: bool = True) -> Prediction:
        """The mask of a patient on the patient's own grid, from whatever sequences there are: `begin`, `answer` and
        `finish`, whose errors it raises."""
        begun = self.begin(case)
        return self.finish(begun, self.answer(begun), probabilities=probabilities, clean=clean)

    def __call__(self, case: Case, *, probabilities: bool = False, clean: bool = True) -> Prediction:
        """What `predict` says: a predictor is called as a network is."""
        return self.predict(case, probabilities=probabilities, clean=clean)

    def begin(self, case: Case) -> Begun:
        """A patient on the common grid, with the largest subset of sequences from which the model has an answer.

        Raises InputError when there is none.
        """
        given = self.usable(case.images)
        possible = answerable(self.networks, given)
        if not possible:
            answers = ", ".join(map(str, answerable(self.networks, self.card.modalities)))
            raise InputError(f"case {case.id}: has {given}, from which this model has no answer; it answers {answers}")
        used = max(possible, key=len)
        left = [name for name in given if name not in used]
        notes = (f"{', '.join(left)} not used: the model has no answer from all of {given}",) if left else ()
        known = Case(case.id, {name: case.images[name] for name in used}, case.affine)
        return Begun(case.grid, prepare_case(known, None, self.card.spacing_mm), used, notes)

    def answer(self, begun: Begun) -> SubsetAnswer:
        """Class probabilities on the common grid, by the chosen engine; by torch where ``auto`` chose another one that
        cannot run this network.

        Raises InputError where ``openvino`` was asked for and cannot.
        """
        try:
            (answer,) = self._answers(begun.prepared, [begun.used], self._compiled)
        except InputError:
            if self._engine != "auto":
                raise
            (answer,) = self.answers(begun.prepared, [begun.used])
        return answer

    def finish(
        self,
        begun: Begun,
        answer: SubsetAnswer,
        *,
        probabilities: bool = False,
        clean: bool = True,
        temperature: float = 1.0,
    ) -> Prediction:
        """The mask on the patient's own grid.

        clean:       drop an enhancing tumour that is too small to be believed (``predict.et_min_ml``)
        temperature: of the probabilities (`medmap.core.temperature`); the mask does not depend on it
        """
        answered = answer.on_grid(begun.prepared.grid.shape)
        classes = restore_classes(answered, begun.prepared)
        if clean:
            classes = postprocess(classes, self.card.scheme, begun.grid.spacing_mm, self.et_min_ml)
        regions = None
        if probabilities:
            native = restore(answered, begun.prepared)
            native = native if temperature == 1 else tempered(native, temperature)
            regions = {r: native[list(self.card.scheme.members(r))].sum(axis=0) for r in self.card.scheme.regions}
        return Prediction(begun.prepared.id, begun.grid, classes, begun.used.names, regions, begun.notes)
