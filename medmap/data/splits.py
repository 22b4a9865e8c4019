"""Which patients teach, which choose, which are asked once: seeded k-fold draws, and lists that papers used."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmap.config import DataConfig
from medmap.errors import InputError

if TYPE_CHECKING:
    from medmap.data.source import Source

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """A division of cases into three parts that share no case.

    name:             ``kfold-F-of-K-seed-S`` or the published list's name
    train, val, test: case ids
    sha256:           of the division, see `sha256_of`; of a published list always that of the whole list
    absent:           cases of a published list that the data do not hold
    unlisted:         cases of the data that a published list does not name; they belong to no part
    """

    name: str
    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    sha256: str
    absent: tuple[str, ...] = ()
    unlisted: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for a run folder's ``splits.json``."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            **{part: list(getattr(self, part)) for part in PARTS},
            "absent": list(self.absent),
            "unlisted": list(self.unlisted),
        }


def sha256_of(train: Iterable[str], val: Iterable[str], test: Iterable[str]) -> str:
    """SHA-256 (hex) of a division: of its lines ``train:ID``, ``val:ID``, ``test:ID`` in this order of parts and the
    order of the ids within them, joined by a line feed, none after the last, in UTF-8.

    >>> sha256_of(["a"], ["b"], ["c"]) == hashlib.sha256(b"train:a\\nval:b\\ntest:c").hexdigest()
    True
    """
    lines = [f"{part}:{case}" for part, ids in zip(PARTS, (train, val, test), strict=True) for case in ids]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def kfold(
    cases: Sequence[tuple[str, str, str | None]], folds: int, fold: int, seed: int, val_fraction: float = 0.2
) -> Split:
    """Fold ``fold`` of a seeded k-fold draw over patients.

    cases:        (case id, patient, group) of every case, in any order; the group (grade, data set) may be None
    folds, fold:  k, and which fold is the test part, 0 … k − 1
    val_fraction: share of the other patients that validates; at least one patient where it is above 0

    All cases of one patient stand on one side. Over the k folds every case is tested once; the test parts differ by at
    most one patient, and so does each group's share of them. The draw orders patients by a hash of seed and name: the
    same on every machine and with every library version.

    Raises InputError for fewer than two folds, a fold that does not exist, a case named twice, or too few patients.

    >>> people = [(f"c{i}", f"p{i}", None) for i in range(6)]
    >>> split = kfold(people, folds=3, fold=0, seed=0)
    >>> len(split.train), len(split.val), len(split.test)
    (3, 1, 2)
    """
    ids_of, group_of = _patients([(case, patient, group) for case, patient, group in cases])
    _check_draw(len(group_of), folds, fold, val_fraction)
    order = _stratified(group_of, f"{seed}:test")
    test = set(order[fold::folds])
    rest = _stratified({patient: group for patient, group in group_of.items() if patient not in test}, f"{seed}:{fold}")
    val = set(_evenly(rest, val_fraction))
    train = [patient for patient in rest if patient not in val]
    parts = [tuple(sorted(case for patient in part for case in ids_of[patient])) for part in (train, val, test)]
    return Split(f"kfold-{fold}-of-{folds}-seed-{seed}", parts[0], parts[1], parts[2], sha256_of(*parts))


def published(name: str, available_ids: Iterable[str]) -> Split:
    """A list that papers used, restricted to the cases at hand.

    brats2018-list1, -list2, -list3: 199/29/57 of the 285 training cases. They are three random draws and **not** a
        cross-validation: their test parts overlap (14, 9 and 14 cases; union 137). Say so when averaging over them.
    brats2020: 219/50/100. brats2021: 876/125/250. brats2023-gli: 875/125/251 (no patient crosses its parts).

    Raises InputError for a name that is not known (with the nearest), and where a part has no case at hand.
    """
    listing = _read(name)
    available = set(available_ids)
    parts = {part: tuple(case for case in listing[part] if case in available) for part in PARTS}
    for part, present in parts.items():
        if not present:
            raise InputError(
                f"split {name}: none of its {len(listing[part])} {part} cases ({_examples(listing[part])}) is in "
                f"the data, which hold {_examples(sorted(available))}; expected at least one. "
                "Choose the list that belongs to these data, or data.split=kfold"
            )
    listed = [case for part in PARTS for case in listing[part]]
    return Split(
        name,
        **parts,
        sha256=listing["sha256_of_lines"],
        absent=tuple(case for case in listed if case not in available),
        unlisted=tuple(sorted(available - set(listed))),
    )


def own_split(file: Path, roster: Sequence[tuple[str, str, str | None]]) -> Split:
    """A division from a JSON file: ``{"train": [ids], "val": [ids], "test": [ids]}``; val and test may be empty or left
    out. Every run's ``splits.json`` is such a file.

    roster: (case id, patient, group) of every case of the data

    Raises InputError for a file that is not one, a case or a patient in two parts, and cases that the data do not hold.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        parts = {part: tuple(map(str, found.get(part, ()))) for part in PARTS}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"split {file}: cannot be read ({error}); expected a JSON file with lists of case ids: train, val, test"
        ) from error
    named = [case for part in PARTS for case in parts[part]]
    if not parts["train"]:
        raise InputError(f"split {file}: names no case to train on; expected a list of case ids under train")
    if twice := [case for case, count in Counter(named).items() if count > 1]:
        raise InputError(f"split {file}: names {_examples(twice)} more than once; a case can stand in one part only")
    patient_of = {case: patient for case, patient, _ in roster}
    if strange := [case for case in named if case not in patient_of]:
        raise InputError(
            f"split {file}: names {_examples(strange)}, which the data do not hold; they hold "
            f"{_examples(sorted(patient_of))}. Choose the data that belong to it"
        )
    sides = {patient_of[case]: part for part in PARTS for case in parts[part]}
    if torn := [case for part in PARTS for case in parts[part] if sides[patient_of[case]] != part]:
        raise InputError(
            f"split {file}: {_examples(torn)} belong to patients who stand in another part as well; put all cases of a "
            "patient into one part"
        )
    rest = tuple(sorted(set(patient_of) - set(named)))
    return Split(file.stem, **parts, sha256=sha256_of(*parts.values()), unlisted=rest)


def begun_split(file: Path, roster: Sequence[tuple[str, str, str | None]]) -> Split:
    """The division that a run was begun with, from the ``splits.json`` it left: whatever has become of the file or the
    draw it came from, who tests this run stays who tests it.

    Raises InputError as `own_split` does.
    """
    split = own_split(file, roster)
    found = json.loads(file.read_text(encoding="utf-8"))
    names = {key: tuple(found.get(key, ())) for key in ("absent", "unlisted")}
    return replace(split, name=str(found.get("name", split.name)), sha256=found.get("sha256", split.sha256), **names)


def choose_split(config: DataConfig, source: Source) -> Split:
    """The division of the patients that a configuration names. Raises InputError where the data do not allow it."""
    if config.source == "phantom":
        return _streamed(source)
    if config.split.endswith(".json"):
        return own_split(Path(config.split), source.roster())
    if config.split != "kfold":
        return published(config.split, source.ids)
    return kfold(source.roster(), config.folds, config.fold, config.split_seed, config.val_fraction)


def _streamed(source: Source) -> Split:
    """Of patients that are simulated as they are needed, the first group validates; none is a test case."""
    train, held_out = (tuple(id for id, _, group in source.roster() if group == part) for part in ("train", "val"))
    return Split("phantoms", train, held_out, (), sha256_of(train, held_out, ()))


def published_names() -> list[str]:
    """The names that `published` knows."""
    return sorted(entry.name.removesuffix(".json") for entry in _folder().iterdir() if entry.name.endswith(".json"))


def _folder() -> Any:
    return files("medmap.data") / "published"


def _read(name: str) -> dict[str, Any]:
    names = published_names()
    if name not in names:
        near = get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"split {name!r} is not known; {hint}expected kfold or one of {', '.join(names)}")
    listing: dict[str, Any] = json.loads((_folder() / f"{name}.json").read_text(encoding="utf-8"))
    found = sha256_of(*(listing[part] for part in PARTS))
    if found != listing["sha256_of_lines"]:
        raise InputError(
            f"split {name}: its cases hash to {found[:12]}…, the published list to {listing['sha256_of_lines'][:12]}…; "
            "the packaged list was altered: install medmap again"
        )
    return listing


def _patients(cases: Sequence[tuple[str, str, str | None]]) -> tuple[dict[str, list[str]], dict[str, str]]:
    ids_of: dict[str, list[str]] = defaultdict(list)
    groups: dict[str, set[str]] = defaultdict(set)
    for case, patient, group in cases:
        ids_of[patient].append(case)
        groups[patient].add(group or "")
    twice = [case for case, count in Counter(case for case, _, _ in cases).items() if count > 1]
    if twice:
        raise InputError(f"case {', '.join(twice[:5])} is named twice; a case can stand in one part only")
    return ids_of, {patient: "+".join(sorted(members)) for patient, members in groups.items()}


def _check_draw(patients: int, folds: int, fold: int, val_fraction: float) -> None:
    if folds < 2 or not 0 <= fold < folds:
        raise InputError(f"fold {fold} of {folds} folds: expected at least 2 folds, counted from 0 to folds − 1")
    if not 0 <= val_fraction < 1:
        raise InputError(f"val_fraction {val_fraction}: expected 0 or more and less than 1")
    training = patients - -(-patients // folds)
    if patients < folds or training < 1 + (val_fraction > 0):
        raise InputError(
            f"{patients} patients cannot be divided into {folds} folds with a training"
            f"{' and a validation' if val_fraction > 0 else ''} part; use fewer folds or more patients"
        )


def _stratified(group_of: Mapping[str, str], key: str) -> list[str]:
    """Patients group by group, within a group in the order of a hash of ``key`` and name."""
    return sorted(group_of, key=lambda p: (group_of[p], hashlib.sha256(f"{key}:{p}".encode()).hexdigest()))


def _evenly(order: Sequence[str], share: float) -> list[str]:
    """round(share · n) items at even distances, at least 1 where the share is above 0, at most all but one."""
    count = min(max(round(share * len(order)), int(share > 0)), len(order) - 1)
    return [order[int((i + 0.5) * len(order) / count)] for i in range(count)]


def _examples(ids: Sequence[str]) -> str:
    return f"{', '.join(ids[:3])}{', …' if len(ids) > 3 else ''}" if ids else "no case"
