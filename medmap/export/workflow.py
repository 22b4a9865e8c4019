"""What the configuration of a MONAI bundle names: a network that answers for whole patients, reading, writing.

The parts are plain callables and modules, as MONAI composes them; this file imports nothing of MONAI.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from medmap.align import build_segmenter
from medmap.card import choose_scheme
from medmap.config import AlignConfig, ModelConfig
from medmap.core.box import Box, Boxed
from medmap.core.case import Grid, Prepared
from medmap.core.labels import LabelScheme
from medmap.core.modality import ModalitySet
from medmap.core.volume import grid_with_spacing, ras_grid
from medmap.data.layouts import recognise
from medmap.data.nifti import read_header, write_mask
from medmap.data.preprocess import prepare_case
from medmap.errors import InputError
from medmap.inference import SubsetAnswer, Windows
from medmap.inputs import read_inputs, read_patient
from medmap.models.blocks import placed
from medmap.predict import Begun, Predictor, answerable
from medmap.run import ModelCard


class PatientNetwork(nn.Module):
    """Images of a patient [B M X Y Z], as `ReadCase` prepares them → class probabilities [B K X Y Z].

    A channel of zeros is a sequence that the patient does not have. Inside it is medmap's own prediction: each sequence
    on its own brain's box, mirrored as the model wants it, window by window where memory is short.

    model, align: sections of the configuration; modalities, labels, spacing_mm: as in model.yaml
    members:      networks that answer together; mirror, et_min_ml, memory_gb, patch: see `medmap.predict.Predictor`

    Raises InputError in ``forward`` for a patient without any image.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        align: Mapping[str, Any],
        modalities: Sequence[str],
        labels: Mapping[str, Any],
        spacing_mm: float | None,
        *,
        members: int = 1,
        mirror: Sequence[int] = (),
        et_min_ml: float = 0.5,
        memory_gb: float = 4.0,
        patch: Sequence[int] = (96, 96, 96),
    ) -> None:
        super().__init__()
        self.card = ModelCard(ModalitySet(tuple(modalities)), LabelScheme.from_dict(labels), spacing_mm)
        x, y, z = patch
        self._how: dict[str, Any] = {
            "mirror": tuple(mirror),
            "et_min_ml": et_min_ml,
            "windows": Windows(memory_gb, (x, y, z)),
        }
        arguments = ModelConfig(**model), AlignConfig(**align), self.card.modalities, len(self.card.scheme.classes)
        self.members = nn.ModuleList(placed(build_segmenter(*arguments), torch.device("cpu")) for _ in range(members))
        self.eval()

    @property
    def predictor(self) -> Predictor:
        """The same networks, where they are now, as medmap asks them."""
        return Predictor(list(self.members), self.card, **self._how)  # type: ignore[arg-type]

    def forward(self, image: Float[Tensor, "B M X Y Z"]) -> Float[Tensor, "B K X Y Z"]:
        answers = [self._answer(one) for one in torch.as_tensor(image)]
        return torch.stack(answers).to(image.device)

    def _answer(self, image: Float[Tensor, "M X Y Z"]) -> Float[Tensor, "K X Y Z"]:
        predictor, (x, y, z) = self.predictor, image.shape[1:]
        channels = dict(zip(self.card.modalities, image.cpu().numpy(), strict=True))
        images = {name: Boxed.tight(volume.astype(np.float16)) for name, volume in channels.items() if volume.any()}
        possible = answerable(predictor.networks, images)
        if not possible:
            raise InputError(
                f"no answer from {', '.join(images) or 'no sequence at all'}; expected channels "
                f"{', '.join(self.card.modalities)}, of which those that a patient lacks are 0"
            )
        used, grid = max(possible, key=len), Grid((x, y, z), np.eye(4))
        prepared = Prepared("", grid, grid, {name: images[name] for name in used})
        (answer,) = predictor.answers(prepared, [used])
        return torch.from_numpy(answer.on_grid((x, y, z)))


class ReadCase:
    """{"id", "images": {sequence: file}} → {"id", "like": file of the grid, "image": Float32[M X Y Z]}, prepared.

    network: tells which sequences there are, in which order, and the spacing

    Images are looked at as `medmap predict` does, which warns of what is odd in them. Raises InputError for those that
    cannot be used or would mislead (see `medmap.inputs`).
    """

    def __init__(self, network: PatientNetwork) -> None:
        self.network = network

    def __call__(self, case: Mapping[str, Any]) -> dict[str, Any]:
        card = self.network.card
        inputs = read_inputs(case["images"], known=card.modalities, id=case["id"])
        patient = read_patient(inputs, self.network.predictor)
        for odd in patient.warnings:
            warnings.warn(f"{inputs.id}: {odd}", stacklevel=2)
        prepared = prepare_case(patient.case, None, card.spacing_mm)
        everywhere = Box((0, 0, 0), prepared.grid.shape)
        image = np.zeros((len(card.modalities), *prepared.grid.shape), np.float32)
        for m, name in enumerate(card.modalities):
            if name in prepared.images:
                image[m] = prepared.images[name].window(everywhere)
        return {"id": inputs.id, "like": str(inputs.reference.path), "image": torch.from_numpy(image)}


class WriteMask:
    """{"id", "like", "pred": Float32[K X Y Z]} → FOLDER/ID.nii.gz on the patient's own grid, in the model's codes.

    What no file's name may hold is quoted in ID, as `medmap predict` does, so that no id leads out of the folder.
    An enhancing tumour that is too small to be believed is dropped, as `medmap predict` does.
    """

    def __init__(self, network: PatientNetwork, folder: str | Path) -> None:
        self.network, self.folder = network, Path(folder)

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        card, like, pred = self.network.card, Path(data["like"]), torch.as_tensor(data["pred"]).cpu().numpy()
        native = read_header(like).grid
        turned = ras_grid(native)
        grid = turned if card.spacing_mm is None else grid_with_spacing(turned, card.spacing_mm)
        x, y, z = grid.shape
        begun = Begun(native, Prepared(data["id"], grid, native, {}), card.modalities, ())
        answer = SubsetAnswer(card.modalities, Box((0, 0, 0), (x, y, z)), pred)
        prediction = self.network.predictor.finish(begun, answer)
        self.folder.mkdir(parents=True, exist_ok=True)
        mask = self.folder / f"{quote(data['id'], safe=' ')}.nii.gz"
        write_mask(mask, choose_scheme(card.scheme).decode(prediction.classes), like)
        return {**data, "mask": str(mask)}


def cases(folder: str | Path, network: PatientNetwork) -> list[dict[str, Any]]:
    """The patients in a folder of any layout that medmap knows, for `ReadCase`; those without a sequence that the
    network knows are left out. Raises InputError where there is nobody."""
    known = network.card.modalities
    found = [
        {"id": case.id, "images": dict(case.images)}
        for case in recognise(Path(folder)).cases
        if any(name in known for name in case.images)
    ]
    if not found:
        raise InputError(f"{folder}: no patient with any of {', '.join(known)}; give another folder as dataset_dir")
    return found
