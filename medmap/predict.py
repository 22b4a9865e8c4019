"""Weights + patient → masks, from any subset of sequences; see `medmap.inference` for how."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from medmap.align import AlignedSegmenter
from medmap.card import SHIPPED
from medmap.checkpoint import load_network
from medmap.core.case import Case, Prediction, Prepared
from medmap.core.metrics import postprocess
from medmap.core.modality import ModalitySet
from medmap.data.preprocess import prepare_case, restore
from medmap.errors import CheckpointError, InputError
from medmap.inference import SubsetAnswer, Windows, answer_subsets, network_device
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
    ) -> None:
        self.networks = tuple(networks)
        self.card = card
        self.mirror = tuple(mirror)
        self.device = network_device(networks[0])
        self.precision = resolve_precision(precision, self.device)
        self.et_min_ml = float(et_min_ml)
        self.windows = windows

    @classmethod
    def load(
        cls, path: Path = SHIPPED, *, which: str = "best", device: str = "auto", precision: str = "auto"
    ) -> Predictor:
        """From a run folder, or from a folder of folds or seeds: these answer together, by the mean of probabilities.
        By default what comes with medmap, which was trained on simulated patients alone.

        Raises CheckpointError when there is no run, or the runs are not of one kind.
        """
        runs = find_runs(path)
        config, card = read_run(runs[0])
        for run in runs[1:]:
            _, other = read_run(run)
            if other != card:
                raise CheckpointError(
                    f"{run} and {runs[0]} cannot answer together: their sequences, labels or spacing differ; "
                    "name one of them"
                )
        networks = [load_network(run, which, resolve_device(device)) for run in runs]
        return cls(
            networks,
            card,
            mirror=config.predict.mirror,
            precision=precision,
            et_min_ml=config.predict.et_min_ml,
            windows=Windows(config.predict.memory_gb, config.train.patch),
        )

    def answers(self, prepared: Prepared, subsets: Iterable[ModalitySet]) -> Iterator[SubsetAnswer]:
        """Class probabilities on the common grid, subset by subset: the mean over the networks."""
        subsets = list(subsets)
        streams = [
            answer_subsets(
                network, prepared, subsets, mirror=self.mirror, precision=self.precision, windows=self.windows
            )
            for network in self.networks
        ]
        for several in zip(*streams, strict=True):
            mean = np.mean([answer.probabilities for answer in several], axis=0, dtype=np.float32)
            yield SubsetAnswer(several[0].subset, several[0].box, mean)

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
        """The mask of a patient on the patient's own grid, from whatever sequences there are.

        A model that does not answer every subset answers from the largest it can, and the notes say what was left out.
        Raises InputError when there is none.

        clean: drop an enhancing tumour that is too small to be believed (``predict.et_min_ml``)
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
        prepared = prepare_case(known, None, self.card.spacing_mm)
        (answer,) = self.answers(prepared, [used])
        native = restore(answer.on_grid(prepared.grid.shape), prepared)
        classes = native.argmax(axis=0).astype(np.uint8)
        if clean:
            classes = postprocess(classes, self.card.scheme, case.grid.spacing_mm, self.et_min_ml)
        regions = None
        if probabilities:
            regions = {r: native[list(self.card.scheme.members(r))].sum(axis=0) for r in self.card.scheme.regions}
        return Prediction(case.id, case.grid, classes, used.names, regions, notes)
