"""What decided a mask: every subset of a patient's sequences is segmented, and each sequence gets its share.

The game: the players are the n sequences that are there, and a subset S of them is worth how much of the full answer it
gives alone::

    v(S) = Dice(mask from S, mask from all n)        v(∅) = 0        v(all) = 1
    φ_j  = Σ_S |S|! (n − |S| − 1)! / n! · (v(S ∪ j) − v(S))          S: every subset without j

φ_j, the Shapley value of sequence j, is exact: nothing is sampled. The values of a region sum to v(all) = 1. A region
that the full answer lacks has no values: the Dice of two empty masks is 1 by convention, so they would share out how
well sequences agree that nothing is there.

This is influence on a model's answer and not accuracy: no truth is looked at.
Source: L. S. Shapley, A value for n-person games, 1953.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import combinations
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import medmap
from medmap.card import ModelFolder
from medmap.core.box import bounding_box
from medmap.core.case import Case, Grid
from medmap.core.metrics import dice
from medmap.core.modality import ModalitySet
from medmap.data.nifti import write_volume
from medmap.errors import InputError
from medmap.inputs import Inputs, read_patient
from medmap.run import write_text
from medmap.segment import about_model

if TYPE_CHECKING:
    from medmap.predict import Predictor

RECORD, PICTURE, WORDS = "explanation.json", "explanation.png", "explanation.txt"
GAME = "v(S) = Dice(mask from S, mask from all sequences that are there), v(nothing) = 0; shapley: exact, sums to 1"
Told = Callable[[int, int, str], None]
"""Called after each subset with subsets done, subsets in all, its name."""


@dataclass(frozen=True)
class RegionExplanation:
    """One region, as every subset S of the sequences draws it.

    shapley:    {sequence: φ}, which sum to 1; None where the full answer lacks the region
    dice:       {S: Dice of its mask with the full answer's}; None likewise
    volumes_ml: {S: volume of its mask}, all sequences last
    mask:       Bool[X Y Z] on the patient's grid, of the full answer
    agreement:  Float32[X Y Z], share of all S whose mask contains the voxel
    """

    shapley: Mapping[str, float] | None
    dice: Mapping[str, float] | None
    volumes_ml: Mapping[str, float]
    mask: NDArray[np.bool_]
    agreement: NDArray[np.float32]


@dataclass(frozen=True)
class Explanation:
    """What decided a patient's mask; `medmap.explain` has the formulas.

    id:      the patient's name
    grid:    the grid of the patient's files
    used:    the n sequences that the full answer is made from; it is that of `Predictor.predict`
    regions: {region: what every subset has to do with it}, in the order of the model's scheme
    notes:   what a reader should know of the answer
    """

    id: str
    grid: Grid
    used: ModalitySet
    regions: Mapping[str, RegionExplanation]
    notes: tuple[str, ...] = ()


def shapley(worth: Mapping[frozenset[str], float], players: Sequence[str]) -> dict[str, float]:
    """The Shapley value of every player, φ_j of the head of this file.

    worth:   {coalition: v}, one for each of the 2ⁿ − 1 non-empty sets of players; the empty one is worth 0
    players: n names

    Raises InputError where a coalition has no worth.

    >>> worth = {frozenset("a"): 0.2, frozenset("b"): 0.6, frozenset("ab"): 1.0}
    >>> {name: round(value, 3) for name, value in shapley(worth, "ab").items()}
    {'a': 0.3, 'b': 0.7}
    """
    known = {frozenset(): 0.0, **worth}
    values = {}
    for player in players:
        others = [name for name in players if name != player]
        values[player] = 0.0
        for size in range(len(players)):
            weight = 1 / (len(players) * comb(len(others), size))  # |S|! (n − |S| − 1)! / n!
            for subset in map(frozenset, combinations(others, size)):
                lacking = [coalition for coalition in (subset, subset | {player}) if coalition not in known]
                if lacking:
                    raise InputError(
                        f"no worth is known of {'+'.join(sorted(lacking[0]))}; a Shapley value takes all "
                        f"{2 ** len(players) - 1} sets of {', '.join(players)}: give each of them one"
                    )
                values[player] += weight * (known[subset | {player}] - known[subset])
    return values


def explain(predictor: Predictor, case: Case, *, clean: bool = True, told: Told | None = None) -> Explanation:
    """Segment a patient from every subset of the sequences, each encoded once, and say what each has decided.

    clean: drop an enhancing tumour too small to be believed, in every answer, as `Predictor.predict` does
    told:  hears of every subset

    Raises InputError where the model has no answer from some subset, as students of distillation, and as
    `Predictor.begin` does.
    """
    from medmap.predict import answerable

    begun = predictor.begin(case)
    subsets = begun.used.subsets()[::-1]  # the full answer first: the others are held to it
    answered = answerable(predictor.networks, begun.used)
    if len(answered) < len(subsets):
        raise InputError(
            f"case {case.id}: an explanation takes an answer from each of the {len(subsets)} subsets of {begun.used}, "
            f"this model answers only {', '.join(map(str, answered))}; name a model that answers all of them, or a "
            "single sequence"
        )
    scheme = predictor.card.scheme
    tallies: dict[str, _Tally] = {}
    for number, answer in enumerate(predictor.answers(begun.prepared, subsets), start=1):
        classes = predictor.finish(begun, answer, clean=clean).classes
        for region in scheme.regions:
            mask = scheme.region_mask(classes, region)
            tallies.setdefault(region, _Tally(mask)).add(str(answer.subset), mask)
        if told is not None:
            told(number, len(subsets), str(answer.subset))
    voxel_ml = abs(float(np.linalg.det(begun.grid.affine[:3, :3]))) / 1000
    regions = {region: tally.explained(begun.used, voxel_ml) for region, tally in tallies.items()}
    return Explanation(case.id, begun.grid, begun.used, regions, begun.notes)


class _Tally:
    """Adds up the masks of one region."""

    def __init__(self, full: NDArray[np.bool_]) -> None:
        self.full = full
        self.count = np.zeros(full.shape, np.uint16)
        self.voxels: dict[str, int] = {}
        self.dice: dict[str, float] = {}

    def add(self, subset: str, mask: NDArray[np.bool_]) -> None:
        self.count += mask
        self.voxels[subset] = int(np.count_nonzero(mask))
        self.dice[subset] = dice(mask, self.full)

    def explained(self, used: ModalitySet, voxel_ml: float) -> RegionExplanation:
        subsets = [str(subset) for subset in used.subsets()]
        shares = found = None
        if self.full.any():
            found = {subset: self.dice[subset] for subset in subsets}
            shares = shapley({frozenset(subset.split("+")): value for subset, value in found.items()}, used.names)
        agreement = self.count.astype(np.float32) / np.float32(len(subsets))
        volumes = {subset: self.voxels[subset] * voxel_ml for subset in subsets}
        return RegionExplanation(shares, found, volumes, self.full, agreement)


# ---- a folder ----------------------------------------------------------------------------------------------------


def explain_case(
    predictor: Predictor,
    inputs: Inputs,
    out: Path,
    *,
    clean: bool = True,
    model: ModelFolder | None = None,
    told: Told | None = None,
) -> dict[str, Any]:
    """Explain one patient into the folder ``out``; returns what its explanation.json, written last, holds.

    explanation.json       everything in numbers; explanation.txt: the same in sentences; explanation.png: in pictures
    agreement-WT.nii.gz …  Float32, share of the subsets whose mask contains a voxel, one file a region

    inputs: what `medmap.inputs.read_inputs` returned
    model:  named in the JSON, with what held-out patients lost without the sequences that are absent here

    Raises InputError for images that cannot be used, a model that lacks an answer, a place that cannot be written.
    """
    began = time.perf_counter()
    patient = read_patient(inputs, predictor)
    explanation = explain(predictor, patient.case, clean=clean, told=told)
    record: dict[str, Any] = {
        "case": inputs.id,
        **patient.origin,
        "model": about_model(predictor, model),
        "small_enhancing_tumour_dropped_below_ml": predictor.et_min_ml if clean else None,
        "game": GAME,
        **to_record(explanation),
        "other_patients": population(model, explanation.used, clean) if model else None,
        "warnings": [*patient.warnings, *explanation.notes],
        "versions": {"medmap": medmap.__version__, "torch": version("torch")},
    }
    record |= {"sentences": sentences(record), "seconds": round(time.perf_counter() - began, 2)}
    record["made"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / RECORD).unlink(missing_ok=True)
        for region, found in explanation.regions.items():
            write_volume(out / agreement_name(region), found.agreement, explanation.grid.affine)
        _draw(record, explanation, patient.case, out / PICTURE)
        write_text(out / WORDS, "\n".join(record["sentences"]) + "\n")
        write_text(out / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written ({error.strerror or error}); choose a folder with -o that may be written to and "
            "has room"
        ) from error
    return record


def agreement_name(region: str) -> str:
    """The file with a region's agreement.

    >>> agreement_name("WT")
    'agreement-WT.nii.gz'
    """
    return f"agreement-{region}.nii.gz"


# ---- in numbers and in words -------------------------------------------------------------------------------------


def to_record(explanation: Explanation) -> dict[str, Any]:
    """An explanation in plain types: used, subsets, and per region its Shapley values, Dice and volumes in ml.

    mean_agreement: share of the subsets' masks that contain a voxel of the full answer, mean over its voxels
    """
    regions = {}
    for region, found in explanation.regions.items():
        volumes = list(found.volumes_ml.values())
        spread = {"full": volumes[-1], "min": min(volumes), "median": float(np.median(volumes)), "max": max(volumes)}
        mean = None if found.dice is None else round(float(found.agreement[found.mask].mean(dtype=np.float64)), 4)
        regions[region] = {
            "in_full_answer": found.dice is not None,
            "shapley": found.shapley and _rounded(found.shapley, 4),
            "dice_with_full_answer": found.dice and _rounded(found.dice, 4),
            "mean_agreement": mean,
            "volume_ml": _rounded(spread, 3),
            "volumes_ml": _rounded(found.volumes_ml, 3),
        }
    return {"used": list(explanation.used), "subsets": [str(s) for s in explanation.used.subsets()], "regions": regions}


def _rounded(values: Mapping[str, float], digits: int) -> dict[str, float]:
    return {name: round(value, digits) + 0.0 for name, value in values.items()}


def population(model: ModelFolder, used: ModalitySet, clean: bool = True) -> dict[str, Any] | None:
    """Mean Dice against experts' masks of *other*, held-out patients: without the sequences that are absent here, and
    with each of them. None where nobody has measured that. Nothing in it is about the patient at hand.

    >>> from medmap.card import read_model
    >>> found = population(read_model(), ModalitySet(("t1n", "t2w", "t2f")))
    >>> list(found["with"]), found["with"]["t1c"]["ET"]["mean"] > found["without"]["ET"]["mean"]
    (['t1c'], True)
    """
    without = model.expected(str(used), clean)
    if without is None:
        return None
    larger = {name: model.modalities.pick([*used, name]) for name in model.modalities if name not in used}
    beside = {name: model.expected(str(subset), clean) for name, subset in larger.items()}
    return {
        "measured_on": without["measured_on"],
        "without": without["dice"],
        "with": {name: found["dice"] for name, found in beside.items() if found},
    }


def sentences(record: Mapping[str, Any]) -> list[str]:
    """What an explanation.json says, in words."""
    from medmap.figures.style import label

    used, count = record["used"], len(record["subsets"])
    head = f"{record['case']}: what decided the mask that the model makes from {label('+'.join(used))}."
    meaning = "This is influence on the model's answer, not accuracy: a sequence can carry a decision that is wrong."
    sums = " The shares of a region add up to 100 %." if count > 1 else ""
    regions = [_about_region(region, found, used, count) for region, found in record["regions"].items()]
    return [head, meaning + sums, *regions, *_about_absent(record)]


def _about_region(region: str, found: Mapping[str, Any], used: Sequence[str], count: int) -> str:
    from medmap.figures.style import REGION_NAMES, label

    called = f"{region} ({REGION_NAMES[region]})" if region in REGION_NAMES else region
    ml = found["volume_ml"]
    if not found["in_full_answer"]:
        drawn = sum(volume > 0 for volume in found["volumes_ml"].values())
        some = f"{drawn} of the {count} subsets draw it, at most {ml['max']:.1f} ml" if drawn else "no subset draws it"
        return f"{called}: not in the full answer, so there is nothing to share out; {some}."
    if len(used) == 1:
        return f"{called}, {ml['full']:.1f} ml: from {label(used[0])} alone, which therefore carries everything."
    ranked = sorted(found["shapley"].items(), key=lambda share: -share[1])
    (first, most), *others = ranked
    rest = ", ".join(f"{label(name)} {_percent(share)}" for name, share in others)
    less = "+".join(name for name in used if name != first)
    against = " Below 0 %: adding it moves masks away from the full answer." if ranked[-1][1] <= -0.005 else ""
    return (
        f"{called}, {ml['full']:.1f} ml: {label(first)} carries {_percent(most)} of the decision, {rest}.{against} "
        f"Without {label(first)} it would be {found['volumes_ml'][less]:.1f} ml, Dice "
        f"{found['dice_with_full_answer'][less]:.2f} with this mask. The {count} subsets give {ml['min']:.1f} to "
        f"{ml['max']:.1f} ml, median {ml['median']:.1f} ml; on average a voxel of the mask is in "
        f"{_percent(found['mean_agreement'])} of theirs."
    )


def _percent(share: float) -> str:
    """A share as people write it.

    >>> _percent(0.714), _percent(-0.032), _percent(-0.001)
    ('71 %', '−3 %', '0 %')
    """
    return f"{round(100 * share)} %".replace("-", "−")


def _about_absent(record: Mapping[str, Any]) -> list[str]:
    from medmap.figures.style import label

    absent, others = record["sequences"]["missing"], record["other_patients"]
    if not absent:
        return []
    them = "it" if len(absent) == 1 else "they"
    first = f"Not there: {', '.join(map(label, absent))}. What {them} would have changed in this patient is unknown."
    if not others:
        return [first, "Nor has anybody measured that in other patients (medmap evaluate)."]
    rows = [f"had a mean Dice against experts of {_means(others['without'])}"]
    rows += [f"with {label(name)} as well {_means(dice)}" for name, dice in others["with"].items()]
    return [first, f"Other patients, held out ({others['measured_on']}), from these sequences {'; '.join(rows)}."]


def _means(dice: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{region} {'–' if row['mean'] is None else format(row['mean'], '.2f')}" for region, row in dice.items()
    )


# ---- in pictures -------------------------------------------------------------------------------------------------


def _draw(record: Mapping[str, Any], explanation: Explanation, case: Case, file: Path) -> None:
    from medmap.figures.explain import explanation_figure

    figure = explanation_figure(record, views(explanation, case))
    fresh = file.with_name(f".{file.name}")  # its end tells matplotlib the format
    figure.savefig(fresh, dpi=110)
    fresh.replace(file)


def views(explanation: Explanation, case: Case) -> dict[str, Any]:
    """{region: its fullest axial slice}, as `medmap.figures.explain.explanation_figure` wants it: in RAS, cut to the
    brain, on the sequence that carries most of the region."""
    from medmap.core.volume import ras_grid, to_ras

    images = {name: to_ras(case.images[name], case.affine)[0] for name in explanation.used}
    brain = bounding_box(np.logical_or.reduce(list(images.values())))
    assert brain is not None, "an empty image is refused when it is prepared"
    found = {}
    for region, one in explanation.regions.items():
        shares = one.shapley or dict.fromkeys(explanation.used, 0.0)
        under = max(shares, key=lambda name: shares[name])
        mask, agreement = (to_ras(volume, case.affine)[0] for volume in (one.mask, one.agreement))
        area = (mask if mask.any() else agreement).sum(axis=(0, 1))
        z = int(area.argmax()) if area.any() else (brain.start[2] + brain.stop[2]) // 2
        x, y = brain.slices[:2]
        planes = {"image": images[under], "mask": mask, "agreement": agreement}
        spacing = ras_grid(case.grid).spacing_mm[:2]
        found[region] = {"on": under, "spacing_mm": spacing, **{key: one[x, y, z] for key, one in planes.items()}}
    return found
