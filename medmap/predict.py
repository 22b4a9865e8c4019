"""Weights + patient → masks, from any subset of sequences.

Every sequence is encoded once, on its own brain box snapped to the network's stride; a subset is decoded on the union
of its members' boxes. What a subset's answer depends on is therefore exactly its members: taking a file away and
declaring it missing are the same computation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medmap.align import AlignedSegmenter
from medmap.card import SHIPPED
from medmap.checkpoint import load_network
from medmap.core.box import Box
from medmap.core.case import Case, Prediction, Prepared
from medmap.core.metrics import postprocess
from medmap.core.modality import ModalitySet
from medmap.data.preprocess import prepare_case, restore
from medmap.errors import CheckpointError, InputError
from medmap.models.backbone import Encoded, blank
from medmap.run import ModelCard, find_runs, read_run

Flip = tuple[int, ...]
"""Axes that are mirrored: 0 left-right, 1 front-back, 2 bottom-top."""


class SubsetAnswer(NamedTuple):
    """Class probabilities Float32[K X Y Z] of one subset on a box of the common grid; outside it is background."""

    subset: ModalitySet
    box: Box
    probabilities: NDArray[np.float32]

    def on_grid(self, shape: tuple[int, int, int]) -> NDArray[np.float32]:
        """The probabilities on the whole common grid, background where no member of the subset has brain."""
        full = np.zeros((len(self.probabilities), *shape), np.float32)
        full[0] = 1
        cut = self.box.within(shape)
        full[(slice(None), *cut.slices)] = self.probabilities[(slice(None), *cut.relative_to(self.box.start).slices)]
        return full


@dataclass(frozen=True)
class SequenceLatents:
    """One sequence, encoded: {level: [1 C x y z]} on its own box."""

    box: Box
    levels: dict[str, Tensor]


def answer_subsets(
    network: AlignedSegmenter,
    prepared: Prepared,
    subsets: Iterable[ModalitySet],
    *,
    mirror: Sequence[int] = (),
    precision: str = "fp32",
) -> Iterator[SubsetAnswer]:
    """Class probabilities of a patient for each subset of sequences, one after the other.

    network:   in evaluation mode
    subsets:   of the sequences the patient has
    mirror:    axes; the mean over all 2^n flips is taken
    precision: fp32 | bf16 (autocast)

    Raises InputError for a subset with a sequence the patient does not have, or the network does not know.
    """
    subsets = list(subsets)
    for subset in subsets:
        absent = [name for name in subset if name not in prepared.images]
        unknown = [name for name in subset if name not in network.modalities]
        if absent or unknown:
            raise InputError(
                f"case {prepared.id}: asked for {subset}, but {', '.join(absent or unknown)} is "
                f"{'missing' if absent else 'unknown to the model'}; "
                f"there are {', '.join(prepared.images if absent else network.modalities)}"
            )
    device = network_device(network)
    flips = [f for size in range(len(mirror) + 1) for f in combinations(sorted(set(mirror)), size)]
    needed = [name for name in network.modalities if any(name in subset for subset in subsets)]
    encoded: dict[Flip, dict[str, SequenceLatents]] = {}
    if network.separable:
        with torch.inference_mode(), autocast(device, precision):
            encoded = {f: {name: encode_alone(network, prepared, name, f) for name in needed} for f in flips}
    for subset in subsets:
        box = Box.union(_network_box(network, prepared, name) for name in subset)
        # Contexts are left before each yield: a generator that sleeps inside one would leave it on for its caller.
        with torch.inference_mode(), autocast(device, precision):
            total = torch.zeros((), device=device)
            for flip in flips:
                if network.separable:
                    logits = _decode_together(network, encoded[flip], subset, box, flip)
                else:
                    logits = _encode_and_decode(network, prepared, subset, box, flip, device)
                total = total + logits.float().softmax(dim=1).flip(_axes(flip))
        yield SubsetAnswer(subset, box, (total / len(flips))[0].cpu().numpy())


def answerable(networks: Sequence[AlignedSegmenter], names: Iterable[str]) -> list[ModalitySet]:
    """The subsets of some sequences that every one of some networks supports; those with fewer sequences first."""
    supported = [{str(subset) for subset in network.backbone.supported_subsets()} for network in networks]
    known = networks[0].modalities.pick(name for name in names if name in networks[0].modalities)
    return [subset for subset in known.subsets() if all(str(subset) in theirs for theirs in supported)]


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """bf16 autocast, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


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
    if device == "auto":
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
    ) -> None:
        self.networks = tuple(networks)
        self.card = card
        self.mirror = tuple(mirror)
        self.device = network_device(networks[0])
        self.precision = resolve_precision(precision, self.device)
        self.et_min_ml = float(et_min_ml)

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
            networks, card, mirror=config.predict.mirror, precision=precision, et_min_ml=config.predict.et_min_ml
        )

    def answers(self, prepared: Prepared, subsets: Iterable[ModalitySet]) -> Iterator[SubsetAnswer]:
        """Class probabilities on the common grid, subset by subset: the mean over the networks."""
        subsets = list(subsets)
        streams = [
            answer_subsets(network, prepared, subsets, mirror=self.mirror, precision=self.precision)
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


def _network_box(network: AlignedSegmenter, prepared: Prepared, name: str) -> Box:
    """A sequence's brain box on the network's lattice, at least two strides wide."""
    box = prepared.images[name].box.snapped(network.stride)
    stop = [max(b, a + 2 * network.stride) for a, b in zip(box.start, box.stop, strict=True)]
    return Box(box.start, (stop[0], stop[1], stop[2]))


def encode_alone(network: AlignedSegmenter, prepared: Prepared, name: str, flip: Flip = ()) -> SequenceLatents:
    """One sequence of a patient through its own encoder, on its own brain box (a separable network)."""
    device = network_device(network)
    box = _network_box(network, prepared, name)
    encoded = network.encode({name: _image(prepared, name, box, flip, device)}, _mask(network, [name], device))
    return SequenceLatents(box, {level: encoded.levels[level][name] for level in network.backbone.strides})


def _decode_together(
    network: AlignedSegmenter, latents: dict[str, SequenceLatents], subset: ModalitySet, box: Box, flip: Flip
) -> Tensor:
    levels = {
        level: {name: _on_box(latents[name], level, stride, box, flip) for name in subset}
        for level, stride in network.backbone.strides.items()
    }
    kept = _mask(network, subset, network_device(network))
    return network.decode(Encoded(levels, box.shape), kept).logits


def _encode_and_decode(
    network: AlignedSegmenter, prepared: Prepared, subset: ModalitySet, box: Box, flip: Flip, device: torch.device
) -> Tensor:
    images = {name: _image(prepared, name, box, flip, device) for name in subset}
    kept = _mask(network, subset, device)
    return network.decode(network.encode(images, kept), kept).logits


def _on_box(latents: SequenceLatents, level: str, stride: int, box: Box, flip: Flip) -> Tensor:
    """A sequence's latents of one level on a larger box: zeros where the sequence has no brain."""
    latent = latents.levels[level]
    if latents.box == box:
        return latent
    place = latents.box.relative_to(box.start)
    mirrored = [
        (n - b, n - a) if axis in flip else (a, b)
        for axis, (a, b, n) in enumerate(zip(place.start, place.stop, box.shape, strict=True))
    ]
    x, y, z = (slice(a // stride, b // stride) for a, b in mirrored)
    canvas = blank(latent, (*latent.shape[:2], *(n // stride for n in box.shape)))
    canvas[:, :, x, y, z] = latent
    return canvas


def _image(prepared: Prepared, name: str, box: Box, flip: Flip, device: torch.device) -> Tensor:
    image = torch.from_numpy(prepared.images[name].window(box).astype(np.float32))
    return image[None, None].flip(_axes(flip)).to(device)


def _mask(network: AlignedSegmenter, names: Iterable[str], device: torch.device) -> Tensor:
    present = set(names)
    return torch.tensor([[name in present for name in network.modalities]], device=device)


def _axes(flip: Flip) -> list[int]:
    return [axis + 2 for axis in flip]


def network_device(network: AlignedSegmenter) -> torch.device:
    """Where a network's weights are."""
    return next(network.parameters()).device
