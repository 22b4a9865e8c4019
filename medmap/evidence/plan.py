"""What a study asks, and the runs that answer it.

A *trial* is one run: a configuration, and the data it learns from and is tested on. Two studies that need the same
trial share it, for a trial is known by what it is and not by who asked. A *study* is a set of arms, each with its
trials, and what is compared with what.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from medmap.config import Config, load_config
from medmap.core.modality import ModalitySet
from medmap.errors import ConfigError
from medmap.phantom import Settings

ALL, FULL, SINGLE, MISSING = "all subsets", "everything", "single ones", "something missing"
"""Groups of subsets of sequences, over which means are taken."""

RECIPE = 2
"""Counts up when medmap simulates, trains or scores differently, so that what was found before is found again."""

IRRELEVANT = ("data.store", "train.precision", "train.checkpoint_every", "train.log_every", "name")
"""Keys that say where and how, and change no result beyond rounding."""


@dataclass(frozen=True)
class Phantoms:
    """Simulated patients: some to learn from, and others to be tested on.

    name:             in tables and file names
    train, val, test: how many; the test patients are complete and stay the same when ``train`` or ``missing`` change
    seed:             of the draw; missing: probability with which each sequence of a patient to learn from is absent;
                      those who validate lack nothing
    settings:         as in `medmap.phantom.Settings`
    others:           further data that the network is tested on
    """

    name: str
    train: int = 160
    val: int = 10
    test: int = 120
    seed: int = 1
    missing: float = 0.0
    settings: Settings = field(default_factory=lambda: Settings(spacing_mm=4.0))
    others: tuple[Data, ...] = ()

    folds = 1


@dataclass(frozen=True)
class Patients:
    """Scans of patients, known by a name; every fold is tested once.

    spacing_mm: of the prepared data; their own where None
    folds:      k of the draw, or 1 where the configuration names a list of cases
    others:     further data that the network is tested on
    """

    name: str
    folds: int = 3
    spacing_mm: float | None = None
    others: tuple[Data, ...] = ()


Data = Phantoms | Patients


@dataclass(frozen=True)
class Trial:
    """One run, known by everything that its result follows from."""

    config: Config
    data: Data

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the result follows from: every setting that is not the default, and the data."""
        config = self.config.model_dump(mode="json", exclude_defaults=True)
        for key in IRRELEVANT:
            *parents, last = key.split(".")
            section = config.get(parents[0], {}) if parents else config
            section.pop(last, None)
        # What names the arm is written out: another default would otherwise rename what is the same.
        config.setdefault("model", {}).update(name=self.config.model.name, size=self.config.model.size)
        config.setdefault("align", {}).update(anchor=self.config.align.anchor)
        split = Path(self.config.data.split)
        if split.suffix == ".json" and split.is_file():  # what it says, not where it lies
            config["data"]["split"] = hashlib.sha256(split.read_bytes()).hexdigest()
        return {"recipe": RECIPE, "config": {k: v for k, v in config.items() if v != {}}, "data": _described(self.data)}

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of the identity."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def key(self) -> str:
        """A file name that a person can read and that no other trial has."""
        model, align, fold = self.config.model, self.config.align, self.config.data.fold
        anchor = "none" if align.anchor == "none" else "-".join(filter(None, (align.anchor, align.fixed)))
        parts = [self.data.name, f"{model.name}-{model.size}", anchor, f"s{self.config.seed}"]
        parts += [f"f{fold}"] if self.data.folds > 1 else []
        return ".".join(re.sub(r"[^\w-]", "-", part) for part in [*parts, self.hash[:10]])


@dataclass(frozen=True)
class Arm:
    """One way of training, with as many runs as the study has seeds (and folds).

    name:       in tables; settings: keys of the configuration, as ``--set`` takes them
    against:    the arm it is compared with; empty for an arm that others are compared with
    series, at: where it stands on a curve: the curve's name, and the number on its axis
    data:       where they are other than the study's; seeds: where there are fewer
    """

    name: str
    settings: tuple[str, ...] = ()
    against: str = ""
    series: str = ""
    at: float | None = None
    data: Data | None = None
    seeds: int | None = None


@dataclass(frozen=True)
class Study:
    """A question, and what would answer it.

    name:    of the study, and of its folder; asks: the question in a line; about: hypothesis, source, how to read it
    data:    of all arms that bring none; recipe: settings of all arms
    arms:    in the order of the tables
    seeds:   runs an arm (times folds); minutes: what a run takes on one core, measured
    axis:    what ``at`` of the arms counts, with its unit
    more:    a function of the results that gives further lines of the page
    draws:   a function of the results that gives a further figure, by file name
    by_subset: show the table of papers, a row a subset, too
    group:   of subsets, over which the outcome is the mean
    also:    further pairs of arms that are compared: (one, the other)
    """

    name: str
    asks: str
    about: str
    data: Data
    arms: tuple[Arm, ...]
    recipe: tuple[str, ...] = ()
    seeds: int = 3
    minutes: float = 2.0
    axis: str = ""
    more: Callable[[Any], Sequence[str]] | None = None
    draws: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    by_subset: bool = False
    group: str = ALL
    also: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        strange = [name for pair in self.pairs() for name in pair if name not in names]
        if strange or len(set(names)) < len(names):
            raise ConfigError(f"study {self.name}: arms {names} with {strange or 'one name twice'}")

    def pairs(self) -> list[tuple[str, str]]:
        """(arm, the arm it is compared with), all of them."""
        return [*((arm.name, arm.against) for arm in self.arms if arm.against), *self.also]

    def data_of(self, arm: Arm) -> Data:
        """What an arm learns from."""
        return arm.data or self.data

    def trials(self, arm: Arm) -> list[list[Trial]]:
        """The runs of an arm: a list a seed, with a trial a fold."""
        data = self.data_of(arm)
        seeds = self.seeds if arm.seeds is None else min(arm.seeds, self.seeds)
        return [[self._trial(arm, data, seed, fold) for fold in range(data.folds)] for seed in range(seeds)]

    def all_trials(self) -> list[Trial]:
        """Every trial once: seed by seed, so that a study that is cut short has whole comparisons."""
        arms = [self.trials(arm) for arm in self.arms]
        ordered = [trial for seed in range(self.seeds) for arm in arms if seed < len(arm) for trial in arm[seed]]
        return list({trial.hash: trial for trial in ordered}.values())

    def _trial(self, arm: Arm, data: Data, seed: int, fold: int) -> Trial:
        chosen = [*self.recipe, *arm.settings, f"seed={seed}"]
        if isinstance(data, Patients) and data.folds > 1:
            chosen += ["data.split=kfold", f"data.folds={data.folds}", f"data.fold={fold}"]
        return Trial(load_config(None, chosen), data)

    def quick(self, every: bool = False) -> Study:
        """The same in seconds: two steps on a handful of small phantoms, one seed, two arms of a kind or every one."""
        arms = [
            replace(
                arm,
                settings=(*arm.settings, *QUICK),
                data=None if arm.data is None else quick_data(arm.data),
            )
            for arm in (self.arms if every else self._few())
        ]
        kept = {arm.name for arm in arms}
        also = tuple(pair for pair in self.also if kept.issuperset(pair))
        return replace(self, data=quick_data(self.data), arms=tuple(arms), seeds=1, also=also)

    def _few(self) -> list[Arm]:
        """Arms enough to see that everything works: those that others are compared with, and two a series."""
        compared = {arm.against for arm in self.arms}
        kept: list[Arm] = []
        for arm in self.arms:
            alike = [a for a in kept if a.series == arm.series and a.against]
            if arm.name in compared or len(alike) < 2:
                kept.append(arm)
        return [arm for arm in kept if not arm.against or any(a.name == arm.against for a in kept)]


QUICK = (
    "train.steps=2",
    "train.batch_size=1",
    "train.patch=[32,32,32]",
    "train.validate_every=2",
    "train.warmup_steps=0",
    "model.size=tiny",
)


def quick_data(data: Data) -> Phantoms:
    """A handful of phantoms in the place of any data."""
    if isinstance(data, Patients):
        return Phantoms("quick", train=2, val=1, test=2)
    return replace(data, train=2, val=1, test=2, settings=replace(data.settings, spacing_mm=4.0), others=())


def _described(data: Data) -> dict[str, Any]:
    """In plain types, without what is as usual, so that a new field with a default changes no identity."""
    usual = type(data)(data.name)
    tree = {f.name: getattr(data, f.name) for f in fields(data) if getattr(data, f.name) != getattr(usual, f.name)}
    if isinstance(data, Phantoms):
        plain = Settings()
        tree["settings"] = {
            f.name: list(value.names) if isinstance(value, ModalitySet) else value
            for f in fields(plain)
            if (value := getattr(data.settings, f.name)) != getattr(plain, f.name)
        }
    if data.others:
        tree["others"] = [_described(other) for other in data.others]
    return {"kind": type(data).__name__, "name": data.name, **tree}
