"""What a trained model says about itself in plain text: sequences, label codes, checkpoints, measured performance.

Read before torch is imported, so that a request it cannot answer is refused at once. Weights: `medmap.checkpoint`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from medmap.core.labels import SCHEMES, LabelScheme, scheme_named
from medmap.core.modality import ModalitySet
from medmap.data.nifti import sha256
from medmap.errors import InputError
from medmap.run import CARD, checkpoint_folder, find_runs, read_card, steps_done

DEFAULT_LABELS = "brats2023"
SHIPPED = Path(__file__).parent / "weights" / "phantom"
"""The model that comes with medmap."""

ABOUT_SHIPPED = "the model that comes with medmap, trained on simulated patients alone; not a medical device"


@dataclass(frozen=True)
class ModelFolder:
    """What a run, or a folder of folds, says about itself in plain text.

    path, which: the folder and the checkpoint (best, last); runs: the runs in it, checkpoint folders in the same order
    modalities, scheme, spacing_mm: as in `medmap.checkpoint.ModelCard`
    """

    path: Path
    which: str
    runs: tuple[Path, ...]
    checkpoints: tuple[Path, ...]
    modalities: ModalitySet
    scheme: LabelScheme
    spacing_mm: float | None

    @property
    def about(self) -> str:
        """What a reader of a mask should know of the model; empty where it is the reader's own, and trained."""
        if self.path == SHIPPED:
            return ABOUT_SHIPPED
        for run in self.runs:
            done, steps = steps_done(run) or (0, 0)
            if done < steps:
                return f"{run} stopped at step {done} of {steps}; go on with `medmap train --resume {run}`"
        return ""

    @cached_property
    def weights_sha256(self) -> dict[str, str]:
        """{run, from the model's folder: SHA-256 of the weights it answers with}."""
        found = {}
        for run, folder in zip(self.runs, self.checkpoints, strict=True):
            smoothed = folder / "ema.safetensors"
            file = smoothed if smoothed.is_file() else folder / "model.safetensors"
            found[run.relative_to(self.path).as_posix()] = sha256(file)
        return found

    def expected(self, used: str, clean: bool) -> dict[str, Any] | None:
        """What held-out patients with these sequences had: Dice by region with its interval; None where nobody
        measured, or other weights than the best were."""
        try:
            summary = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        rows = {r["region"]: r for r in summary["rows"] if r["subset"] == used and r["metric"] == "dice"}
        if not rows or self.which != "best":
            return None
        kept = ("mean", "low", "high", "n")
        dice = {
            region: {key: rows[f"{region}-pp" if clean and f"{region}-pp" in rows else region][key] for key in kept}
            for region in self.scheme.regions
            if region in rows
        }
        return {"measured_on": summary.get("evaluated", ""), "sequences": used, "dice": dice}


def read_model(path: Path = SHIPPED, which: str = "best") -> ModelFolder:
    """Look into a run folder, or a folder of folds, without loading weights; by default what comes with medmap.

    Raises CheckpointError where there is no model, its card is damaged, or it has no such checkpoint.
    """
    runs = find_runs(path)
    card = read_card(runs[0] / CARD)
    folders = tuple(checkpoint_folder(run, which) for run in runs)
    return ModelFolder(path, which, tuple(runs), folders, card.modalities, card.scheme, card.spacing_mm)


def choose_scheme(known: LabelScheme, asked: str | None = None) -> LabelScheme:
    """The codes of a mask: those asked for, else BraTS 2023's for a glioma model, else the model's own.

    Raises InputError for a scheme whose classes the model does not know.

    >>> choose_scheme(SCHEMES["brats2021"]).name, choose_scheme(SCHEMES["brats2023"], "brats2021").codes["et"]
    ('brats2023', 4)
    """
    fitting = [name for name, scheme in SCHEMES.items() if scheme.same_classes(known)]
    if asked is None:
        return SCHEMES[DEFAULT_LABELS] if DEFAULT_LABELS in fitting else known
    if asked == known.name:
        return known
    scheme = scheme_named(asked)
    if not scheme.same_classes(known):
        raise InputError(
            f"labels {asked}: its classes are {', '.join(scheme.classes[1:])}; the model knows "
            f"{', '.join(known.classes[1:])}. Choose --labels {', '.join(dict.fromkeys([*fitting, known.name]))}"
        )
    return scheme
