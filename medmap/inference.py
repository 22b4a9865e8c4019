"""A patient's latents, and every subset of sequences decoded from them: in one pass, or window by window.

Every sequence is encoded once, on its own brain box snapped to the network's stride; a subset is decoded on the union
of its members' boxes. What a subset's answer depends on is therefore exactly its members: taking a file away and
declaring it missing are the same computation.

Where one pass would need more memory than allowed, windows do it: half a window apart, on a lattice that is fixed on
the patient's grid and so depends on no sequence, their answers averaged with weights that fall off from the middle::

    w(v) = exp(−½ Σ_axis ((v − (n − 1)/2) / (n/8))²)        v: voxel of a window of n voxels

In each window every sequence is encoded once for all subsets, on the part of its own box that lies there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial, reduce
from itertools import accumulate, combinations, groupby, product
from math import prod
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves

from medmap.align import AlignedSegmenter
from medmap.compiled import Compiled
from medmap.core.box import Box, Index3
from medmap.core.case import Prepared
from medmap.core.counted import Counted
from medmap.core.modality import ModalitySet
from medmap.errors import InputError
from medmap.latents import KeptLatents, SequenceLatents
from medmap.models.backbone import Encoded, blank
from medmap.models.convolution import whole_volumes

Flip = tuple[int, ...]
"""Axes that are mirrored: 0 left-right, 1 front-back, 2 bottom-top."""

WEIGHT_SIGMA = 1 / 8
"""Standard deviation of a window's weights, in window edges."""

PROBE_VOXELS = 32
"""Edge of the smaller cube over which a pass is counted, at least."""

ROOM, ANSWERS = 1.1, 3.0
"""What convolutions need besides their input and output, and how many copies of an answer there are: measured."""


class SubsetAnswer(NamedTuple):
    """Class probabilities Float32[K X Y Z] of one subset on a box of the common grid; outside it is background.

    agreement: where OpenVINO computed them, the share of a probe's voxels to which it gives the labels that torch gives
    """

    subset: ModalitySet
    box: Box
    probabilities: NDArray[np.float32]
    agreement: float | None = None

    def on_grid(self, shape: tuple[int, int, int]) -> NDArray[np.float32]:
        """The probabilities on the whole common grid, background where no member of the subset has brain."""
        full = np.zeros((len(self.probabilities), *shape), np.float32)
        full[0] = 1
        cut = self.box.within(shape)
        full[(slice(None), *cut.slices)] = self.probabilities[(slice(None), *cut.relative_to(self.box.start).slices)]
        return full


@dataclass(frozen=True)
class Windows:
    """What to do where one pass takes too much memory.

    memory_gb: what one pass may take, by estimate, and what the sums of windows' answers may
    size:      X, Y, Z voxels of a window, multiples of the network's stride and two strides at least
    """

    memory_gb: float
    size: Index3

    def over(self, box: Box, stride: int) -> list[Box]:
        """Windows that cover a box: on a lattice half a window apart, fixed on the grid.

        >>> [w.start[0] for w in Windows(1.0, (32, 32, 32)).over(Box((20, 0, 0), (60, 16, 16)), stride=8)]
        [16, 32]
        """
        steps = [max(n // 2 // stride, 1) * stride for n in self.size]
        lines = [
            range(a // step * step, max(b - n, a // step * step) + step, step)
            for a, b, n, step in zip(box.start, box.stop, self.size, steps, strict=True)
        ]
        return [Box((x, y, z), (x + self.size[0], y + self.size[1], z + self.size[2])) for x, y, z in product(*lines)]

    def weights(self) -> Float[Tensor, "X Y Z"]:
        """w of the head of this file."""
        x, y, z = (torch.exp(-0.5 * ((torch.arange(n) - (n - 1) / 2) / (n * WEIGHT_SIGMA)) ** 2) for n in self.size)
        return x[:, None, None] * y[:, None] * z


def answer_subsets(
    network: AlignedSegmenter,
    prepared: Prepared,
    subsets: Iterable[ModalitySet],
    *,
    mirror: Sequence[int] = (),
    precision: str = "fp32",
    windows: Windows | None = None,
    compiled: Compiled | None = None,
    kept: KeptLatents | None = None,
) -> Iterator[SubsetAnswer]:
    """Class probabilities of a patient for each subset of sequences, one after the other.

    network:   in evaluation mode
    subsets:   of the sequences the patient has
    mirror:    axes; the mean over all 2^n flips is taken
    precision: fp32 | bf16 (autocast)
    windows:   for patients whom one pass would take too much memory for; None: one pass whatever it takes
    compiled:  the same network as a graph, for a single subset in one pass of sequences with one box; torch does others
    kept:      latents of earlier calls with this network and precision, which one pass takes up and adds to

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
    flips = [f for size in range(len(mirror) + 1) for f in combinations(sorted(set(mirror)), size)]
    asked = [(subset, Box.union(network_box(network, prepared, name) for name in subset)) for subset in subsets]
    looked = _Looked(network, prepared, flips, precision, compiled, kept)
    if windows is None:
        yield from looked.in_one_pass(asked)
        return
    need = pass_memory(network, len(flips), precision)
    for fits, some in groupby(asked, lambda one: need.gb(prod(one[1].shape)) <= windows.memory_gb):
        alike = list(some)
        yield from looked.in_one_pass(alike) if fits else looked.by_windows(alike, windows)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """bf16 autocast, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def network_device(network: AlignedSegmenter) -> torch.device:
    """Where a network's weights are."""
    return next(network.parameters()).device


Asked = tuple[ModalitySet, Box]
Latents = dict[Flip, dict[str, SequenceLatents]]


@dataclass(frozen=True)
class _Looked:
    """A patient as a network looks at it: mirrored in some ways, at a precision."""

    network: AlignedSegmenter
    prepared: Prepared
    flips: Sequence[Flip]
    precision: str
    compiled: Compiled | None = None
    kept: KeptLatents | None = None

    def encode(self, asked: Sequence[Asked], window: Box | None = None) -> Latents:
        """Every sequence of the subsets that has brain in the window, mirrored in every way; nothing where the network
        encodes jointly. asked: subsets and the boxes on which they will be decoded."""
        network, prepared = self.network, self.prepared
        if not network.separable:
            return {}
        needed = {name for subset, _ in asked for name in subset}
        own = {m: box for m in network.modalities if m in needed and (box := _box_in(network, prepared, m, window))}
        # Latents that are to be laid on a larger box are still needed as they are.
        alike = set(own) == needed and all(own[name] == box for subset, box in asked for name in subset)
        with torch.inference_mode(), autocast(network_device(network), self.precision):
            if self.kept is not None and window is None:
                return {f: {m: self._kept(self.kept, m, f, alike) for m in own} for f in self.flips}
            return {f: {m: encode_alone(network, prepared, m, f, window, alike) for m in own} for f in self.flips}

    def _kept(self, kept: KeptLatents, name: str, flip: Flip, alike: bool) -> SequenceLatents:
        encode = partial(encode_alone, self.network, self.prepared, name, flip, digested=alike)
        return kept.get((name, flip, alike), self.prepared.images[name], encode)

    def answer(self, encoded: Latents, subset: ModalitySet, box: Box) -> Float[Tensor, "K X Y Z"]:
        """Class probabilities on a box, the mean over the flips."""
        network, device = self.network, network_device(self.network)
        # Contexts are left before anything is yielded: a generator that sleeps inside one would leave it on for its
        # caller.
        with torch.inference_mode(), autocast(device, self.precision):
            answers = []
            for flip in self.flips:
                if network.separable:
                    logits = _decode_together(network, encoded[flip], subset, box, flip)
                else:
                    logits = _encode_and_decode(network, self.prepared, subset, box, flip, device)
                one = logits.contiguous().softmax(dim=1, dtype=torch.float32)
                answers.append(one.flip(_axes(flip)) if flip else one)
            mean: Tensor = reduce(torch.add, answers) / len(answers) if len(answers) > 1 else answers[0]
        return mean[0]

    def in_one_pass(self, asked: Sequence[Asked]) -> Iterator[SubsetAnswer]:
        if self.compiled is not None and len(asked) == 1 and self._alike(*asked[0]):
            yield self.compiled_answer(self.compiled, *asked[0])
            return
        encoded = self.encode(asked)
        for subset, box in asked:
            yield SubsetAnswer(subset, box, self.answer(encoded, subset, box).cpu().numpy())

    def _alike(self, subset: ModalitySet, box: Box) -> bool:
        return all(network_box(self.network, self.prepared, name) == box for name in subset)

    def compiled_answer(self, compiled: Compiled, subset: ModalitySet, box: Box) -> SubsetAnswer:
        """What `answer` gives, from the graph."""
        total = np.zeros((), np.float32)
        for flip in self.flips:
            images = {name: _image(self.prepared, name, box, flip, torch.device("cpu")) for name in subset}
            total = total + np.flip(compiled(images), _axes(flip))[0]
        return SubsetAnswer(subset, box, total / len(self.flips), compiled.agreement(subset.names))

    def by_windows(self, asked: Sequence[Asked], windows: Windows) -> Iterator[SubsetAnswer]:
        """As many subsets at a time as there is room for the sums of their answers."""
        held = [4 * (self.network.backbone.classes + 1) * prod(box.shape) for _, box in asked]
        while asked:
            count = max(1, sum(total <= windows.memory_gb * 1e9 for total in accumulate(held)))
            yield from self._some_by_windows(asked[:count], windows)
            asked, held = asked[count:], held[count:]

    def _some_by_windows(self, asked: Sequence[Asked], windows: Windows) -> Iterator[SubsetAnswer]:
        network, weights = self.network, windows.weights()
        sums = [torch.zeros((network.backbone.classes, *box.shape)) for _, box in asked]
        shares = [torch.zeros(box.shape) for _, box in asked]
        theirs = [set(windows.over(box, network.stride)) for _, box in asked]
        for window in sorted(set().union(*theirs), key=lambda w: w.start):
            present = [i for i, mine in enumerate(theirs) if window in mine]
            encoded = self.encode([(asked[i][0], window) for i in present], window)
            for i in present:
                subset, box = asked[i]
                inside = box.overlap(window)
                if inside is None or all(_box_in(network, self.prepared, name, window) is None for name in subset):
                    continue  # no brain here: background
                found = self.answer(encoded, subset, window).cpu()
                there, here = inside.relative_to(box.start).slices, inside.relative_to(window.start).slices
                sums[i][(slice(None), *there)] += weights[here] * found[(slice(None), *here)]
                shares[i][there] += weights[here]
        for (subset, box), total, share in zip(asked, sums, shares, strict=True):
            nobody = share == 0
            total[0][nobody] = share[nobody] = 1
            yield SubsetAnswer(subset, box, (total / share).numpy())


class PassMemory(NamedTuple):
    """What one pass over a box takes, bytes: whatever its size (weights at another precision), and per voxel."""

    fixed: float
    per_voxel: float

    def gb(self, voxels: float) -> float:
        """GB of a box of so many voxels."""
        return (self.fixed + self.per_voxel * voxels) / 1e9


def pass_memory(network: AlignedSegmenter, flips: int, precision: str) -> PassMemory:
    """What one pass takes, whichever sequences are asked for: a subset's answer does not depend on what else is asked.
    Counted once for a network, in passes of all sequences over two small cubes, whose difference is what voxels take.
    """
    known = _PASSES.setdefault(network, {})
    if (flips, precision) not in known:
        edge = max(2 * network.stride, PROBE_VOXELS)
        (small, few), (large, many) = ((_most(network, flips, precision, n), n**3) for n in (edge, 2 * edge))
        slope = (large - small) / (many - few)
        each = ROOM * slope + ANSWERS * 4 * network.backbone.classes
        known[flips, precision] = PassMemory(ROOM * max(0.0, small - slope * few), each)
    return known[flips, precision]


_PASSES: WeakKeyDictionary[AlignedSegmenter, dict[tuple[int, str], PassMemory]] = WeakKeyDictionary()
"""What was counted; a network that nobody holds any more is let go."""


def _most(network: AlignedSegmenter, flips: int, precision: str, edge: int) -> int:
    """The bytes of the tensors that live at a time in a pass over a cube."""
    device = network_device(network)
    images = {name: torch.zeros(1, 1, edge, edge, edge, device=device) for name in network.modalities}
    everything = torch.ones(1, len(network.modalities), dtype=torch.bool, device=device)
    with torch.inference_mode(), autocast(device, precision), whole_volumes(), Counted() as counted:
        encoded = network.digested(network.encode(images, everything))
        held = tree_leaves([list(encoded.levels.values()), list(encoded.digests.values())])
        latents = sum(z.numel() * z.element_size() for z in held)
        network.decode(encoded, everything)
    return counted.most + (flips - 1) * latents * network.separable  # all flips are encoded before any is decoded


def network_box(network: AlignedSegmenter, prepared: Prepared, name: str) -> Box:
    """A sequence's brain box on the network's lattice, at least two strides wide."""
    box = prepared.images[name].box.snapped(network.stride)
    stop = [max(b, a + 2 * network.stride) for a, b in zip(box.start, box.stop, strict=True)]
    return Box(box.start, (stop[0], stop[1], stop[2]))


def _box_in(network: AlignedSegmenter, prepared: Prepared, name: str, window: Box | None) -> Box | None:
    """The part of a sequence's box that lies in a window, at least two strides wide; None where there is none."""
    box = network_box(network, prepared, name)
    if window is None:
        return box
    inside = box.overlap(window)
    if inside is None:
        return None
    start, stop, least = list(inside.start), list(inside.stop), 2 * network.stride
    for axis in range(3):
        start[axis] = min(start[axis], max(stop[axis] - least, window.start[axis]))
        stop[axis] = max(stop[axis], start[axis] + least)
    return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


def encode_alone(
    network: AlignedSegmenter,
    prepared: Prepared,
    name: str,
    flip: Flip = (),
    window: Box | None = None,
    digested: bool = False,
) -> SequenceLatents:
    """One sequence of a patient through its own encoder, on its own brain box or what of it lies in a window (a
    separable network). digested: see `AlignedSegmenter.digested`"""
    device = network_device(network)
    box = _box_in(network, prepared, name, window)
    assert box is not None, f"{name} has no brain in {window}"
    encoded = network.encode({name: _image(prepared, name, box, flip, device)}, _mask(network, [name], device))
    if digested:
        encoded = network.digested(encoded)
    levels, digests = ({level: z[name] for level, z in some.items()} for some in (encoded.levels, encoded.digests))
    return SequenceLatents(box, levels, digests)


def _decode_together(
    network: AlignedSegmenter, latents: dict[str, SequenceLatents], subset: ModalitySet, box: Box, flip: Flip
) -> Tensor:
    levels, digests = {}, {}
    for level, stride in network.backbone.strides.items():
        there = {name: latents[name] for name in subset if name in latents}
        if all(level in one.digests for one in there.values()):
            digests[level] = {name: one.digests[level] for name, one in there.items()}
            continue
        placed = {name: _on_box(one, level, stride, box, flip) for name, one in there.items()}
        nothing = torch.zeros_like(next(iter(placed.values())))  # of a sequence that has no brain in this window
        levels[level] = {name: placed.get(name, nothing) for name in subset}
    kept = _mask(network, subset, network_device(network))
    return network.decode(Encoded(levels, box.shape, digests=digests), kept).logits


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
