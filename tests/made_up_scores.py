"""Prepared patients, run folders and tables of scores for tests of what comes after training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from made_up_network import bright_voxels
from numpy.typing import NDArray

from medmap.config import load_config
from medmap.core.box import Box, Boxed
from medmap.core.case import Prepared
from medmap.core.labels import SCHEMES, LabelScheme
from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.core.temperature import Voxels
from medmap.data.layouts import recognise
from medmap.data.nifti import write_volume
from medmap.data.store import Store, write_store
from medmap.inference import SubsetAnswer
from medmap.run import ENV, SPLITS, ModelCard, write_run
from medmap.scores import Score

GLIOMA = SCHEMES["brats2023"]
SHAPE = (24, 20, 16)
SPACING_MM = 2.0
BRAIN = Box((1, 1, 1), (23, 19, 15))
TUMOUR = Box((8, 6, 4), (16, 14, 12))
"""A cube of 8 voxels an edge: moved by k voxels along an axis, its Dice with itself is 1 − k/8."""
ID = "BraTS-GLI-{:05d}-000"


def tumour(enhancing: bool = True, at: Box = TUMOUR) -> NDArray[np.uint8]:
    """Codes: oedema 2, in its upper half necrosis 1, in the upper quarter's place enhancement 3 where there is any."""
    codes = np.zeros(SHAPE, np.uint8)
    codes[at.slices] = 2
    x, y, z = at.slices
    codes[x, y, (z.start + z.stop) // 2 : z.stop] = 1
    if enhancing:
        codes[x, y, z.stop - (z.stop - z.start) // 4 : z.stop] = 3
    return codes


def head(brain: Box = BRAIN) -> NDArray[np.float32]:
    """A ramp inside a box of brain, 0 outside."""
    image = np.zeros(SHAPE, np.float32)
    image[brain.slices] = 100 + np.arange(np.prod(brain.shape), dtype=np.float32).reshape(brain.shape)
    return image


def write_folder(
    root: Path,
    cases: Mapping[str, NDArray[np.uint8] | None],
    sequences: Mapping[str, Sequence[str]] | None = None,
    *,
    images: Mapping[str, NDArray[np.float32]] | None = None,
    affine: NDArray[np.float64] | None = None,
) -> Path:
    """{case: codes or None} as a folder with BraTS 2023 names; ``sequences`` of a case where it has not all four."""
    turned = np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0]) if affine is None else affine
    for case, codes in cases.items():
        (root / case).mkdir(parents=True)
        for name in (sequences or {}).get(case, GLIOMA_MRI.names):
            write_image(root / case / f"{case}-{name}.nii.gz", (images or {}).get(name, head()), turned)
        if codes is not None:
            write_volume(root / case / f"{case}-seg.nii.gz", codes, turned)
    return root


def write_image(path: Path, values: NDArray[np.float32], affine: NDArray[np.float64]) -> None:
    """Like no other file, whatever its voxels: two equal files are taken for one image under two names."""
    image = nib.Nifti1Image(values, affine)
    image.header["descrip"] = path.name
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def prepared_store(folder: Path, labels: str | None = None, spacing_mm: float | None = None) -> Store:
    """A folder, prepared beside it."""
    out = folder.parent / f"{folder.name}-store"
    write_store(recognise(folder, labels), out, spacing_mm)
    return Store(out)


def card_of(
    modalities: ModalitySet = GLIOMA_MRI, scheme: LabelScheme = GLIOMA, spacing_mm: float | None = SPACING_MM
) -> ModelCard:
    return ModelCard(modalities, scheme, spacing_mm)


class Shifted:
    """A predictor that answers with the truth, ``step`` voxels too far to the right for each sequence not given."""

    def __init__(self, card: ModelCard | None = None, step: int = 1, et_min_ml: float = 0.5) -> None:
        self.card = card or card_of()
        self.networks = (bright_voxels(self.card.modalities),)
        self.step = step
        self.et_min_ml = et_min_ml

    def answers(self, prepared: Prepared, subsets: Iterable[ModalitySet]) -> Iterator[SubsetAnswer]:
        assert prepared.labels is not None
        whole = prepared.labels.window(Box((0, 0, 0), prepared.grid.shape))
        for subset in subsets:
            box = Box.union(prepared.images[name].box for name in subset)
            moved = np.roll(whole, self.step * (len(self.card.modalities) - len(subset)), axis=0)
            yield answer_of(subset, Boxed(moved[box.slices], box), len(self.card.scheme.classes))


def answer_of(subset: ModalitySet, classes: Boxed, count: int = 4) -> SubsetAnswer:
    """Certainty about a class map."""
    return SubsetAnswer(subset, classes.box, np.moveaxis(np.eye(count, dtype=np.float32)[classes.values], -1, 0))


def write_made_up_run(
    run: Path, store: Store, test: Sequence[str], train: Sequence[str] = (), card: ModelCard | None = None
) -> Path:
    """A run folder as far as evaluation reads it; without weights."""
    write_run(run, load_config(None), card or card_of())
    split = {"name": run.name, "sha256": f"hash of {run.name}", "train": list(train), "val": [], "test": list(test)}
    (run / SPLITS).write_text(json.dumps(split), encoding="utf-8")
    (run / ENV).write_text(json.dumps({"store": str(store.path), "store_sha256": store.sha256}), encoding="utf-8")
    return run


def scored(case: str, subset: str, region: str, patient: str = "", **metrics: float) -> list[Score]:
    """Rows of one case, subset and region."""
    return [Score(case, patient or case, subset, region, metric, value) for metric, value in metrics.items()]


def made_up_voxels(
    temperature: float, patients: int = 14, kinds: Sequence[str] = ("t2f",), voxels: int = 2000
) -> list[Voxels]:
    """Answers in whom the truth is drawn from what this temperature makes of the probabilities."""
    answers = []
    for number, kind in product(range(patients), kinds):
        generator = np.random.default_rng([number, *kind.encode()])
        logits = generator.normal([2, 0, 0, 0], 2, (voxels, 4))
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        right = np.exp(log_p / temperature).cumsum(axis=1)
        truth = (generator.uniform(0, right[:, -1])[:, None] > right).sum(axis=1)
        answers.append(Voxels(f"p{number}", kind, log_p.T.astype(np.float16), truth.astype(np.uint8)))
    return answers


def entry_of(entries: Iterable[Mapping[str, Any]], **wanted: str) -> Mapping[str, Any]:
    """The one entry of a summary that has these values."""
    (found,) = [row for row in entries if all(row.get(key) == value for key, value in wanted.items())]
    return found
