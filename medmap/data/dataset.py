"""From prepared patients to training batches. What step t draws is a function of (seed, t) alone.

No state is carried from step to step, so that a run resumed at step t continues as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medmap.config import SUBSETS, Config, SamplingConfig, TrainConfig
from medmap.core.box import Box
from medmap.core.case import Batch, Prepared
from medmap.core.modality import ModalitySet
from medmap.data.augment import Placement, apply_draw, draw, source_size
from medmap.data.source import Source
from medmap.errors import ConfigError, InputError

# Independent streams of random numbers of one seed.
ORDER, CROP, SUBSET, AUGMENT = range(4)
# A crop this much larger than the patch keeps most rotations and zooms free of empty corners.
MARGIN = 1.25
ALL_ROWS = slice(None)


def random_stream(seed: int, stream: int, step: int) -> np.random.Generator:
    """The generator of one stream at one step."""
    return np.random.default_rng([seed, stream, step])


def cases_of_step(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the cases of one step: permutations laid end to end, so that no case comes twice in an epoch.

    >>> sorted(i for step in range(3) for i in cases_of_step(6, 2, seed=0, step=step))
    [0, 1, 2, 3, 4, 5]
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(_order(count, seed, p // count)[p % count]) for p in positions]


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of an epoch, for its many steps and whoever looks ahead of them."""
    order = random_stream(seed, ORDER, epoch).permutation(count)
    order.flags.writeable = False
    return order


def draw_crop(prepared: Prepared, config: TrainConfig, generator: np.random.Generator) -> Box:
    """A patch of the grid: around a voxel of a random tumour class, or anywhere in the brain; inside the brain's box
    where the box is large enough, else centred on it."""
    brain = Box.union(image.box for image in prepared.images.values())
    foreground = generator.random() < config.foreground
    centre = _tumour_voxel(prepared, generator) if foreground else None
    if centre is None:
        low, high = np.array(brain.start), np.array(brain.stop)
        centre = generator.integers(low, high)
    start = []
    for axis in range(3):
        size, low, high = config.patch[axis], brain.start[axis], brain.stop[axis]
        if high - low <= size:
            start.append((low + high - size) // 2)
        else:
            start.append(int(np.clip(int(centre[axis]) - size // 2, low, high - size)))
    x, y, z = start
    return Box((x, y, z), (x + config.patch[0], y + config.patch[1], z + config.patch[2]))


def draw_kept(
    seen: NDArray[np.bool_],
    config: SamplingConfig,
    generator: np.random.Generator,
    answers: NDArray[np.bool_] | None = None,
) -> NDArray[np.bool_]:
    """Bool[B M]: which of the seen modalities each sample may look at; never none.

    answers: Bool[S M], the subsets that a network can answer, where these are not all; what follows then holds among
             those of them that were seen, and a batch's one mask is sample 0's wherever it is one of these

    uniform:   every non-empty subset of what is seen has the same probability
    counts:    first how many (uniform over 1 … |seen|), then which
    bernoulli: each with ``keep_probability``, drawn again while empty
    full:      all that is seen
    """
    if answers is not None:
        return _kept_of(answers, seen, config, generator)
    kept = np.zeros_like(seen)
    for row, available in enumerate(seen):
        index = np.flatnonzero(available)
        kept[row, _subset_of(index, config, generator)] = True
    if config.per == "batch":
        first = seen & kept[0]
        kept = np.where(first.any(axis=1, keepdims=True), first, kept)
    return kept


def training_batch(
    cases: Sequence[Prepared],
    modalities: ModalitySet,
    config: Config,
    step: int,
    device: torch.device,
    answers: NDArray[np.bool_] | None = None,
    rows: slice = ALL_ROWS,
    dropped: bool = True,
) -> Batch:
    """The batch of one step: cases, crops, subsets and augmentation all follow from (seed, step).

    answers: Bool[S M], the subsets that the network can answer, where these are not all
    rows:    those to make; the others are drawn as well, since each crop follows from the cases before it
    dropped: whether the network looks at images that are seen and not kept; where it does not, they are zeros, which
             takes less time, and all others are as they were
    """
    train = config.train
    chosen = [cases[i] for i in cases_of_step(len(cases), train.batch_size, config.seed, step)]
    generator = random_stream(config.seed, CROP, step)
    windows = [draw_crop(case, train, generator) for case in chosen]
    seen = np.array([[name in case.images for name in modalities] for case in chosen])
    kept = draw_kept(seen, config.sampling, random_stream(config.seed, SUBSET, step), answers)
    made = (seen if dropped else kept)[rows]
    seen_tensor, kept_tensor = (torch.from_numpy(mask[rows]).to(device) for mask in (seen, kept))
    if config.augment.enabled:
        draws = torch.Generator().manual_seed(int(random_stream(config.seed, AUGMENT, step).integers(2**62)))
        what = draw(config.augment, len(chosen), len(modalities), draws).of(rows)
        each = []
        for row, (case, window) in enumerate(zip(chosen[rows], windows[rows], strict=True)):
            this = slice(row, row + 1)
            mine = what.of(this).on(case.grid.spacing_mm)
            wider = _with_margin(window, mine.placements[0]) if mine.placements[0].interpolates else window
            crop = stack_windows([case], [wider], modalities, device, made[this])
            each.append(apply_draw(*crop, torch.from_numpy(made[this]), mine, train.patch))
        images, target = (torch.cat(parts) for parts in zip(*each, strict=True))
    else:
        images, target = stack_windows(chosen[rows], windows[rows], modalities, device, made)
    return Batch(images, seen_tensor, kept_tensor, target, tuple(case.id for case in chosen[rows]))


def stack_windows(
    cases: Sequence[Prepared],
    windows: Sequence[Box],
    modalities: ModalitySet,
    device: torch.device,
    wanted: NDArray[np.bool_] | None = None,
) -> tuple[Tensor, Tensor]:
    """Images [B M X Y Z] in float32 and targets Int64[B X Y Z] cut out of prepared patients; zeros where unseen.

    wanted: Bool[B M], the images to cut, if not all
    """
    shape = windows[0].shape
    images = np.zeros((len(cases), len(modalities), *shape), np.float32)
    target = np.zeros((len(cases), *shape), np.int64)
    for row, (case, window) in enumerate(zip(cases, windows, strict=True)):
        assert case.labels is not None
        target[row] = case.labels.window(window)
        for column, name in enumerate(modalities):
            if name in case.images and (wanted is None or wanted[row, column]):
                images[row, column] = case.images[name].window(window)
    return _moved(images, device), _moved(target, device)


def _moved(array: NDArray[Any], device: torch.device) -> Tensor:
    """To a GPU from memory that the system may not swap: whoever asks need not wait for the copy."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Patients(Sequence[Prepared]):
    """Some cases of a source with some of its modalities; a case's arrays are open only while somebody holds it.

    Raises InputError, naming the cases, where none of the modalities is there or there is no segmentation.
    """

    def __init__(self, source: Source, ids: Sequence[str], modalities: ModalitySet) -> None:
        self.source = source
        self.ids = tuple(ids)
        self.modalities = modalities
        bare = [case for case in ids if not any(name in modalities for name in source.sequences(case))]
        unlabelled = [case for case in ids if not source.has_labels(case)]
        for cases, what in ((bare, f"none of the modalities {', '.join(modalities)}"), (unlabelled, "no segmentation")):
            if cases:
                raise InputError(
                    f"{len(cases)} cases ({', '.join(cases[:5])}) have {what}; "
                    "leave them out of the data and prepare again"
                )

    def __len__(self) -> int:
        return len(self.ids)

    def expect(self, step: int, batch_size: int, seed: int) -> None:
        """Tell where the patients come from which ones the steps from this one on will draw."""
        soon = [i for ahead in range(4) for i in cases_of_step(len(self), batch_size, seed, step + ahead)]
        self.source.expect([self.ids[i] for i in soon])

    def __getitem__(self, index: Any) -> Any:
        case = self.source.load(self.ids[index])
        return replace(case, images={n: image for n, image in case.images.items() if n in self.modalities})


def answers_asked(config: Config, supported: Sequence[ModalitySet], train: Patients) -> NDArray[np.bool_] | None:
    """Bool[S M]: the subsets that training asks for, where these are not all.

    supported: those that the network answers
    Raises ConfigError where the one subset that ``sampling.subsets`` names is none of them, and InputError for patients
    who lack it.
    """
    named = None if config.sampling.subsets in SUBSETS else train.modalities.parse(config.sampling.subsets)
    if named is None:
        every = len(supported) == 2 ** len(train.modalities) - 1
        return None if every else np.array([subset.mask(train.modalities) for subset in supported])
    if named not in supported:
        raise ConfigError(
            f"sampling.subsets: {config.model.name} has no answer from {named}; it answers "
            f"{', '.join(map(str, supported))}"
        )
    lacking = [case for case in train.ids if not set(named) <= set(train.source.sequences(case))]
    if lacking:
        raise InputError(
            f"sampling.subsets: {named} is to be learned from, and {len(lacking)} cases lack some of it "
            f"({', '.join(lacking[:5])}); leave them out, or take uniform"
        )
    return named.mask(train.modalities)[None]


def _tumour_voxel(prepared: Prepared, generator: np.random.Generator) -> NDArray[np.int64] | None:
    if prepared.labels is None or prepared.labels.values.size == 0:
        return None
    values = np.asarray(prepared.labels.values)
    present = np.flatnonzero(np.bincount(values.ravel(), minlength=2)[1:]) + 1
    if present.size == 0:
        return None
    where = np.flatnonzero(values == generator.choice(present))
    local = np.unravel_index(int(generator.choice(where)), values.shape)
    return np.array(local) + np.array(prepared.labels.box.start)


def _subset_of(index: NDArray[np.int64], config: SamplingConfig, generator: np.random.Generator) -> NDArray[np.int64]:
    if config.subsets == "full" or index.size == 1:
        return index
    if config.subsets == "counts":
        return generator.choice(index, size=generator.integers(1, index.size + 1), replace=False)
    if config.subsets == "uniform":
        code = int(generator.integers(1, 2**index.size))
        return index[[bool(code >> bit & 1) for bit in range(index.size)]]
    while True:
        drawn = generator.random(index.size) < config.keep_probability
        if drawn.any():
            return index[drawn]


def _kept_of(
    answers: NDArray[np.bool_], seen: NDArray[np.bool_], config: SamplingConfig, generator: np.random.Generator
) -> NDArray[np.bool_]:
    """For each sample one row of ``answers`` that asks for nothing unseen."""
    kept = np.zeros_like(seen)
    for row, available in enumerate(seen):
        possible = answers[~(answers & ~available).any(axis=1)]
        if not len(possible):
            raise InputError("a case has none of the subsets of sequences that this network answers; leave it out")
        kept[row] = possible[_one_of(possible.sum(axis=1), config, generator)]
        if config.per == "batch" and (possible == kept[0]).all(axis=1).any():
            kept[row] = kept[0]
    return kept


def _one_of(sizes: NDArray[np.int64], config: SamplingConfig, generator: np.random.Generator) -> int:
    """The number of one subset, of which only the sizes matter."""
    keep = config.keep_probability
    if config.subsets == "full" or (config.subsets == "bernoulli" and keep == 1):
        return int(sizes.argmax())
    if config.subsets == "counts":
        return int(generator.choice(np.flatnonzero(sizes == generator.choice(np.unique(sizes)))))
    if config.subsets == "bernoulli":
        odds = (keep / (1 - keep)) ** (sizes - sizes.max() * (keep > 0.5))  # no power overflows
        return int(generator.choice(sizes.size, p=odds / odds.sum()))
    return int(generator.integers(sizes.size))


def _with_margin(patch: Box, placement: Placement) -> Box:
    """About the same middle, so that what is turned or made smaller has something to come from: of flat voxels all that
    it takes, as an axis of few voxels a slice is turned into one of many."""
    size = [int(np.ceil(n * MARGIN / 2) * 2) for n in patch.shape]
    if len(set(placement.edges)) > 1:
        size = [max(pair) for pair in zip(size, source_size(patch.shape, [placement]), strict=True)]
    x, y, z = ((a + b) // 2 - n // 2 for a, b, n in zip(patch.start, patch.stop, size, strict=True))
    return Box((x, y, z), (x + size[0], y + size[1], z + size[2]))
