"""What a trained model says about itself in plain text: sequences, label codes, checkpoints, measured performance.

Read before torch is imported, so that a request it cannot answer is refused at once. Weights: `medmap.checkpoint`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from filecmp import cmp
from functools import cached_property
from math import isnan, prod
from pathlib import Path
from typing import Any

from medmap.core.labels import SCHEMES, LabelScheme, scheme_named
from medmap.core.modality import ModalitySet
from medmap.data.nifti import sha256
from medmap.errors import InputError
from medmap.run import CARD, CHECKPOINTS, checkpoint_folder, find_runs, read_card, steps_done

DEFAULT_LABELS = "brats2023"
CARD_JSON, CARD_TEXT, CARD_PICTURE = "card.json", "card.md", "card.png"
"""The robustness card, which `medmap.robustness` writes."""

SHIPPED = Path(__file__).parent / "weights" / "phantom"
"""The model that comes with medmap."""

GOOD_DICE = 0.7
"""From here on overlap is usually called good (Zijdenbos et al., IEEE Transactions on Medical Imaging 1994)."""

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
        if self.shipped:
            return ABOUT_SHIPPED
        for run in self.runs:
            done, steps = steps_done(run) or (0, 0)
            if done < steps:
                return f"{run} stopped at step {done} of {steps}; go on with `medmap train --resume {run}`"
        return ""

    @cached_property
    def shipped(self) -> bool:
        """Whether these are the weights that come with medmap, wherever the folder lies."""
        ours = SHIPPED / CHECKPOINTS / "best" / "model.safetensors"
        same = (ours.is_file() and file.is_file() and cmp(file, ours, shallow=False) for file in self.weights)
        return self.path == SHIPPED or all(same)

    @cached_property
    def weights_sha256(self) -> dict[str, str]:
        """{run, from the model's folder: SHA-256 of the weights it answers with}."""
        files = zip(self.runs, self.weights, strict=True)
        return {run.relative_to(self.path).as_posix(): sha256(file) for run, file in files}

    @property
    def weights(self) -> list[Path]:
        """The file of each run that it answers with."""
        both = ((folder / "ema.safetensors", folder / "model.safetensors") for folder in self.checkpoints)
        return [smoothed if smoothed.is_file() else plain for smoothed, plain in both]

    @cached_property
    def parameters(self) -> int:
        """Numbers in the weights of one run."""
        from safetensors import safe_open

        with safe_open(self.weights[0], framework="numpy") as file:
            return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no mapping)

    def expected(self, used: str, clean: bool) -> dict[str, Any] | None:
        """What held-out patients with these sequences had: Dice by region with its interval; None where nobody
        measured, or other weights were."""
        try:
            summary = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        rows = {r["region"]: r for r in summary["rows"] if r["subset"] == used and r["metric"] == "dice"}
        if not rows or not self.measured(summary):
            return None
        kept = ("mean", "low", "high", "n", "p10", "p90")
        dice = {
            region: {key: rows[f"{region}-pp" if clean and f"{region}-pp" in rows else region].get(key) for key in kept}
            for region in self.scheme.regions
            if region in rows
        }
        return {"measured_on": summary.get("evaluated", ""), "sequences": used, "dice": dice}

    def measured(self, summary: Mapping[str, Any]) -> bool:
        """Whether a summary is of these weights: the card beside it has their hashes; without one, names must do."""
        try:
            card = json.loads((self.path / CARD_JSON).read_text(encoding="utf-8"))
            measured: dict[str, str] = card["model"]["weights_sha256"]
        except (OSError, ValueError, KeyError):
            return summary.get("checkpoint", "best") == self.which == "best"
        return measured == self.weights_sha256

    def regions_below(self, least: float, used: str, clean: bool) -> dict[str, str]:
        """{region: why}: those that held-out patients with these sequences did not have at a mean Dice of ``least``.

        Raises InputError where nobody measured, and where it is all regions.
        """
        expected = self.expected(used, clean)
        if expected is None:
            raise InputError(
                f"{self.path}: nobody has measured what to expect from {used}, so no region can be left out for it; "
                "run `medmap evaluate` first, or leave --abstain out"
            )
        low = {
            region: f"a mean Dice of {percent(row['mean'], least)} % for {region} from {used} on held-out cases, "
            f"{100 * least:g} % was asked for"
            for region, row in expected["dice"].items()
            if row["mean"] is None or row["mean"] < least
        }
        if len(low) == len(expected["dice"]):
            raise InputError(f"{'; '.join(low.values())}: no region is left to tell of; give more sequences")
        return low


def read_model(path: Path = SHIPPED, which: str = "best") -> ModelFolder:
    """Look into a run folder, or a folder of folds, without loading weights; by default what comes with medmap.

    Raises CheckpointError where there is no model, its card is damaged, or it has no such checkpoint.
    """
    runs = find_runs(path)
    card = read_card(runs[0] / CARD)
    folders = tuple(checkpoint_folder(run, which) for run in runs)
    return ModelFolder(path, which, tuple(runs), folders, card.modalities, card.scheme, card.spacing_mm)


def expectation(expected: Mapping[str, Any]) -> Iterator[str]:
    """What `ModelFolder.expected` says, a line for the patients it was measured on and a line a region."""
    rows = expected["dice"]
    cases = max(row["n"] for row in rows.values())
    yield f"expect, from {expected['sequences']}, Dice in % as on {cases} held-out cases ({expected['measured_on']}):"
    for region, row in rows.items():
        mean, low, high, p10, p90 = (percent(row.get(key)) for key in ("mean", "low", "high", "p10", "p90"))
        spread = "" if row.get("p10") is None else f", 8 of 10 cases between {p10} and {p90}"
        known = row["mean"] is not None and row["mean"] >= GOOD_DICE
        yield f"  {region:3} {mean} [{low}, {high}]{spread}" + ("" if known else f": do not use {region} for volumetry")


def percent(value: float | None, least: float = GOOD_DICE) -> str:
    """A Dice in % beside a verdict on it: so many decimals that the eye, too, sees on which side of ``least`` it is.

    >>> percent(0.714), percent(0.6962), percent(0.69996), percent(None)
    ('71', '69.6', '69.996', '–')
    """
    return _seen(value, least, 100, 0)


def fraction(value: float | None, least: float = GOOD_DICE) -> str:
    """The same from 0 to 1.

    >>> fraction(0.714), fraction(0.6962), fraction(None)
    ('0.71', '0.696', '–')
    """
    return _seen(value, least, 1, 2)


def _seen(value: float | None, least: float, scale: int, digits: int) -> str:
    if value is None or isnan(value):
        return "–"
    texts = [f"{scale * value:z.{more}f}" for more in range(digits, 16)]
    return next((text for text in texts if (float(text) >= scale * least) == (value >= least)), texts[-1])


def choose_scheme(known: LabelScheme, asked: str | None = None) -> LabelScheme:
    """The codes of a mask: those asked for, else BraTS 2023's for a glioma model, else the model's own.

    The regions are the model's own, whose names its measurements have.

    Raises InputError for a scheme whose classes the model does not know.

    >>> choose_scheme(SCHEMES["brats2021"]).name, choose_scheme(SCHEMES["brats2023"], "brats2021").codes["et"]
    ('brats2023', 4)
    """
    fitting = [name for name, scheme in SCHEMES.items() if scheme.same_classes(known)]
    if asked is None:
        return _as_told(SCHEMES[DEFAULT_LABELS], known) if DEFAULT_LABELS in fitting else known
    if asked == known.name:
        return known
    scheme = scheme_named(asked)
    if not scheme.same_classes(known):
        raise InputError(
            f"labels {asked}: its classes are {', '.join(scheme.classes[1:])}; the model knows "
            f"{', '.join(known.classes[1:])}. Choose --labels {', '.join(dict.fromkeys([*fitting, known.name]))}"
        )
    return _as_told(scheme, known)


def _as_told(scheme: LabelScheme, known: LabelScheme) -> LabelScheme:
    return scheme if scheme.regions == known.regions else replace(scheme, regions=known.regions)
