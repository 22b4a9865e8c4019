"""A patient's mask with the JSON beside it, written by `medmap.segment` with a stand-in that knows the answer."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from medmap.card import read_model
from medmap.core.case import Case, Prediction
from medmap.core.labels import SCHEMES, LabelScheme
from medmap.core.modality import GLIOMA_MRI
from medmap.inputs import read_inputs
from medmap.segment import segment_case


class Oracle:
    """Answers with the classes it was given, where a network would compute them."""

    def __init__(self, classes: NDArray[np.uint8], notes: tuple[str, ...] = ()) -> None:
        self.card = SimpleNamespace(modalities=GLIOMA_MRI, scheme=SCHEMES["brats2023"])
        self.networks, self.device, self.precision = (None,), "cpu", "fp32"
        self.mirror, self.et_min_ml = (), 0.5
        self.classes, self.notes = classes, notes

    def usable(self, names: Any) -> Any:
        return self.card.modalities.pick(names)

    def begin(self, case: Case) -> Case:
        return case

    def answer(self, case: Case) -> SimpleNamespace:
        return SimpleNamespace(agreement=None)

    def finish(self, case: Case, answer: Any, **how: Any) -> Prediction:
        used = tuple(name for name in GLIOMA_MRI if name in case.images)
        return Prediction(case.id, case.grid, self.classes, used, None, self.notes)


def make_mask(
    out: Path,
    images: Mapping[str, Path],
    classes: NDArray[np.uint8],
    *,
    scheme: LabelScheme = SCHEMES["brats2023"],
    notes: tuple[str, ...] = (),
    resample: bool = False,
) -> Path:
    """The mask ``classes`` of a patient, as the model that comes with medmap would leave it."""
    inputs = read_inputs(images, resample)
    return segment_case(Oracle(classes, notes), inputs, out, scheme=scheme, model=read_model())  # type: ignore[arg-type]


def study_in(page: str) -> dict[str, Any]:
    """What the viewer of a page is given."""
    return dict(json.loads(re.search(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)[1]))  # type: ignore[index]


def opened(nifti: str) -> Any:
    """A NIfTI file out of a page."""
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(nifti)))
