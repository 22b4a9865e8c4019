"""Subsets × patients: every subset of the sequences that each patient has, scored against the truth.

Every sequence of a patient is encoded once; each subset is decoded from these latents (`medmap.inference`). What
becomes of the numbers: `medmap.scores`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medmap.core.box import Box, Boxed
from medmap.core.case import Prepared
from medmap.core.labels import LabelScheme
from medmap.core.metrics import convention_named
from medmap.core.modality import ModalitySet
from medmap.core.temperature import Voxels, drawn
from medmap.core.witnesses import Witnesses
from medmap.data.store import Store
from medmap.errors import CheckpointError, InputError, MedmapError
from medmap.inference import SubsetAnswer
from medmap.predict import Predictor, answerable
from medmap.run import ENV, SPLITS, ModelCard, find_runs, memory_gb, read_run
from medmap.scale import spread
from medmap.scores import Progress, Score, score_classes, write_scores, write_voxels

SAME_SPACING_MM = 0.01

VOXELS = 2000
"""So many of an answer are kept for its temperature. With 30 000, none of 16 patients' moved by more than 0.02."""


def evaluate_cases(
    predictor: Predictor,
    store: Store,
    ids: Sequence[str],
    *,
    convention: str = "brats",
    on_progress: Progress = lambda case, done, total: None,
) -> list[Score]:
    """Score a model on cases of a store: every subset of the sequences that each case has.

    Raises InputError, before any work, where labels mean other classes than the model's, voxels have another size, or a
    case has no segmentation or no sequence that the model knows.
    """
    check_fit(store, ids, predictor.card)
    rows: list[Score] = []
    for number, case in enumerate(ids, start=1):
        rows += score_case(predictor, store, case, convention).rows
        on_progress(case, number, len(ids))
    return rows


class Scored(NamedTuple):
    """Scores of a case, and some voxels of each answer."""

    rows: list[Score]
    voxels: list[Voxels]


def score_case(predictor: Predictor, store: Store, case: str, convention: str = "brats") -> Scored:
    """Score a model on one case: every subset of the sequences that it has, and what speaks for each mask."""
    prepared, scheme = store.load(case), predictor.card.scheme
    spacing_mm, et_min_ml = prepared.grid.spacing_mm, predictor.et_min_ml
    found = Scored([], [])
    witnesses = Witnesses(scheme, prepared.grid.shape, spacing_mm, et_min_ml)
    for answer in predictor.answers(prepared, answerable(predictor.networks, prepared.images)):
        predicted, truth = on_common_box(answer, prepared)
        scores = score_classes(predicted, truth, spacing_mm, scheme, et_min_ml=et_min_ml, convention=convention)
        whose = case, store.patient(case), str(answer.subset)
        found.rows.extend(Score(*whose, region, metric, value) for (region, metric), value in scores.items())
        witnesses.add(str(answer.subset), answer.box, answer.probabilities)  # those with fewer sequences came before
        for region, evidence in witnesses.about(str(answer.subset)).items():
            found.rows.extend(Score(*whose, region, name, value) for name, value in evidence.features().items())
        found.voxels.append(_some_voxels(answer, prepared, store.patient(case)))
    return found


def _some_voxels(answer: SubsetAnswer, prepared: Prepared, patient: str) -> Voxels:
    """Of the box that was answered, as far as it is on the grid."""
    assert prepared.labels is not None
    box = answer.box.within(prepared.grid.shape)
    inside = answer.probabilities[(slice(None), *box.relative_to(answer.box.start).slices)]
    return drawn(patient, str(answer.subset), inside, prepared.labels.window(box), VOXELS)


def check_fit(store: Store, ids: Iterable[str], card: ModelCard) -> None:
    """Raises InputError for cases that cannot be scored, or whose voxels have another size than the model's."""
    check_scorable(store, ids, card.scheme, card.modalities)
    trained_mm = card.spacing_mm  # None: on each data set's own spacing, so that it takes any
    if trained_mm is not None and not (store.spacing_mm and abs(store.spacing_mm - trained_mm) <= SAME_SPACING_MM):
        found = "of several sizes" if store.spacing_mm is None else f"of {store.spacing_mm:g} mm"
        raise InputError(
            f"{store.path}: voxels {found}; the model was trained at {trained_mm:g} mm. "
            f"Prepare the data with --spacing {trained_mm:g}"
        )


def check_scorable(store: Store, ids: Iterable[str], scheme: LabelScheme, modalities: ModalitySet) -> None:
    """Raises InputError for cases that cannot be scored: labels of other classes, or none, or no known sequence."""
    if store.scheme is None or not store.scheme.same_classes(scheme):
        theirs = "none" if store.scheme is None else f"{store.scheme.name} {list(store.scheme.classes)}"
        ours = f"the model knows {scheme.name} {list(scheme.classes)}"
        raise InputError(f"{store.path}: label scheme {theirs}; {ours}. Prepare the data with the matching --labels")
    for case in ids:
        if not store.has_labels(case):
            raise InputError(f"{store.path}: case {case} has no segmentation to be compared with; leave it out")
        if not set(modalities) & set(store.sequences(case)):
            has, needed = ", ".join(store.sequences(case)), " or ".join(modalities)
            raise InputError(f"{store.path}: case {case} has {has}; expected {needed}. Leave it out")


def on_common_box(answer: SubsetAnswer, prepared: Prepared) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Predicted and true class maps on one box of the grid.

    The truth may reach beyond the brain of a subset: that is missed. The network's box may pass the grid's end: what it
    says there is in no mask, and is not scored.
    """
    if prepared.labels is None:
        raise InputError(f"case {prepared.id} has no segmentation to be compared with; leave it out")
    box = Box.union([answer.box.within(prepared.grid.shape), prepared.labels.box])
    return class_map(answer).window(box), prepared.labels.window(box)


def class_map(answer: SubsetAnswer) -> Boxed:
    """The most probable class of every voxel, UInt8[X Y Z] on the answer's box."""
    return Boxed(answer.probabilities.argmax(axis=0).astype(np.uint8), answer.box)


def evaluate(
    path: Path,
    *,
    data: Store | None = None,
    name: str | None = None,
    which: str = "best",
    convention: str = "brats",
    device: str = "auto",
    ray: str | None = None,
    on_progress: Progress = lambda case, done, total: None,
) -> Path:
    """Evaluate a run, or a folder of folds, and write subsets.csv, summary.json and voxels.npz; returns their folder.

    Without ``data`` every run is scored on its own test part, and the folds of a folder are pooled. With ``data`` all
    its cases are scored, by the folds together as an ensemble, into PATH/on-NAME. With ``ray``, the address of a Ray
    cluster, cases are spread over its machines (`medmap.scale`), and the tables are the same.

    Raises InputError for an unknown convention, data that cannot be scored, cases that a run learned from and a run
    that tests nobody, CheckpointError for a folder without runs, runs that test one case twice or are not of one kind,
    and data that are gone or were changed; ClusterError where a cluster fails.
    """
    convention_named(convention)
    runs = find_runs(path)
    scored = partial(_scored, which=which, convention=convention, device=device, ray=ray, on_progress=on_progress)
    if data is not None:
        refuse_taught(runs, data)
        (found,), card = scored([_Part(path, data, data.ids)]), read_run(runs[0])[1]
        out = path / f"on-{name or data.path.name}"
        members = f"{len(runs)} networks together" if len(runs) > 1 else "one network"
        evaluated = f"all {len(data.ids)} cases of {out.name[3:]}, {members}"
        about = {"evaluated": evaluated, "runs": len(runs), "checkpoint": which}
        write_scores(out, found.rows, card.modalities, card.scheme, convention, [data], about)
        write_voxels(out, found.voxels)
        return out
    splits, stores = read_splits(runs), [run_store(run) for run in runs]
    refuse_untested(runs, splits)
    parts = [_Part(run, store, split["test"]) for run, split, store in zip(runs, splits, stores, strict=True)]
    card = read_run(runs[0])[1]  # that of all runs: read_splits has looked
    pooled = Scored([], [])
    for run, split, store, found in zip(runs, splits, stores, scored(parts), strict=True):
        about = {"evaluated": f"test part of {split['name']}", "runs": 1, "checkpoint": which}
        about["split_sha256"] = [split["sha256"]]
        write_scores(run, found.rows, card.modalities, card.scheme, convention, [store], about)
        write_voxels(run, found.voxels)
        pooled.rows.extend(found.rows)
        pooled.voxels.extend(found.voxels)
    if runs != [path]:
        about = {"evaluated": f"test parts of {len(runs)} runs, pooled", "runs": len(runs), "checkpoint": which}
        write_scores(path, pooled.rows, card.modalities, card.scheme, convention, stores, about)
        write_voxels(path, pooled.voxels)
    return path


class _Part(NamedTuple):
    """Cases of a store, to be scored by the networks of a folder together."""

    folder: Path
    store: Store
    ids: Sequence[str]


class _Scorer:
    """Scores one case after the other, and keeps the networks that it was last asked for."""

    def __init__(self, which: str, device: str, convention: str) -> None:
        self.which, self.device, self.convention = which, device, convention
        self.warm: tuple[Path, Path] | None = None

    def __call__(self, task: tuple[Path, Path, str]) -> Scored:
        folder, store, case = task
        if self.warm != (folder, store):
            self.predictor, self.store = Predictor.load(folder, which=self.which, device=self.device), Store(store)
            self.warm = folder, store
        return score_case(self.predictor, self.store, case, self.convention)


def _scored(
    parts: Sequence[_Part], *, which: str, convention: str, device: str, ray: str | None, on_progress: Progress
) -> Iterator[Scored]:
    """What was found of part after part, in the order of its cases, as soon as they are whole."""
    for part in parts:
        check_fit(part.store, part.ids, read_run(find_runs(part.folder)[0])[1])
    tasks = [(part.folder, part.store.path, case) for part in parts for case in part.ids]
    make, need_gb = partial(_Scorer, which, device, convention), max(memory_gb(find_runs(p.folder)) for p in parts)
    found: dict[str, Scored] = {}  # no case is in two parts
    results = spread(make, tasks, address=ray, device=device, memory_gb=need_gb, called=lambda task: f"case {task[2]}")
    with closing(results):
        for part in parts:
            while any(case not in found for case in part.ids):
                index, result = next(results)
                if isinstance(result, MedmapError):
                    raise result
                found[tasks[index][2]] = result
                on_progress(tasks[index][2], len(found), len(tasks))
            mine = [found[case] for case in part.ids]
            yield Scored([row for each in mine for row in each.rows], [some for each in mine for some in each.voxels])


def read_splits(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """splits.json of runs that are to be pooled.

    Raises CheckpointError where one is absent, two of them test one case, or their sequences, labels or spacing differ.
    """
    splits, cards = [_read_json(run / SPLITS) for run in runs], [read_run(run)[1] for run in runs]
    tested: dict[str, Path] = {}
    for run, split, card in zip(runs, splits, cards, strict=True):
        if card != cards[0]:
            raise CheckpointError(
                f"{run} and {runs[0]} differ in sequences, labels or spacing, so they cannot be pooled; evaluate them "
                "one by one"
            )
        for case in split["test"]:
            if case in tested:
                raise CheckpointError(
                    f"{run} and {tested[case]} both have case {case} in their test part, so they cannot be pooled; "
                    "evaluate runs of different seeds one by one, then compare them with medmap compare"
                )
            tested[case] = run
    return splits


def run_store(run: Path) -> Store:
    """The prepared data a run was trained on. Raises CheckpointError where they are gone or were changed."""
    environment = _read_json(run / ENV)
    if environment["store"] is None:
        raise CheckpointError(f"{run}: was trained on phantoms simulated as it went; name patients with --data")
    there = Path(environment["store"])
    places = [there, run / there.name, run.parent / there.name]  # beside the run, where both were moved
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise CheckpointError(f"{run}: its data were at {there}, which is not there; name them with --data")
    store = Store(found)
    if store.sha256 != environment["store_sha256"]:
        raise CheckpointError(
            f"{run}: the data at {found} changed since training (hash {store.sha256[:12]}, then "
            f"{environment['store_sha256'][:12]}); prepare them again as they were, or name others with --data"
        )
    return store


def refuse_taught(runs: Sequence[Path], data: Store) -> None:
    """Raises InputError where a run learned from one of the cases, or was chosen by it. Files count, not names."""
    for run in runs:
        try:
            split, own = _read_json(run / SPLITS), run_store(run)
        except CheckpointError:  # a model that was given away, phantoms that lie nowhere, or data that are gone
            continue
        files = {digest for case in (*split["train"], *split["val"]) for digest in own.digests(case)}
        taught = [case for case in data.ids if not files.isdisjoint(data.digests(case))]
        if taught:
            raise InputError(
                f"{data.path}: {len(taught)} of its {len(data.ids)} cases, such as {taught[0]}, are of those that "
                f"{run} learned from or was chosen by, and say nothing of new patients; name others with --data, or "
                f"score the test part: medmap evaluate {run}"
            )


def refuse_untested(runs: Sequence[Path], splits: Sequence[Mapping[str, Any]]) -> None:
    """Raises InputError where a run has no test part: a table of nobody would look like one."""
    for run, split in zip(runs, splits, strict=True):
        if not split["test"]:
            raise InputError(f"{run}: its division {split['name']} has no test part; name patients with --data")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); copy the run again, with all its files") from error
    return content
