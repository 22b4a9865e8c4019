"""A trial is known by what it is: two that must differ do, and what changes no result changes no name."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace

import pytest

from medmap.config import load_config
from medmap.core.modality import ModalitySet
from medmap.errors import ConfigError
from medmap.evidence.bench import bench
from medmap.evidence.plan import RECIPE, Arm, Patients, Phantoms, Study, Trial
from medmap.phantom import Settings
from medmap.studies import study_named, study_names

SMALL = Phantoms("small", train=2, val=1, test=2)
TRIAL = Trial(load_config(None, ["align.anchor=pstar", "seed=1"]), SMALL)


def trial(*settings: str, data: Phantoms | Patients = SMALL) -> Trial:
    return Trial(load_config(None, ["align.anchor=pstar", "seed=1", *settings]), data)


def test_the_name_of_a_trial_stays_what_it_was() -> None:
    """Results that are kept belong to names: whoever changes them loses hundreds of runs."""
    assert TRIAL.key == "small.unet-base.pstar.s1.819a632e5a"


def test_whoever_changes_a_default_counts_the_recipe_up() -> None:
    """A trial is named by what is not the default, so that another default would find results that are not its own."""
    config = load_config(None, []).model_dump(mode="json")
    for part in ("name", "predict"):
        config.pop(part)
    for part, key in (("model", "name"), ("model", "size"), ("align", "anchor")):
        config[part].pop(key)  # which the identity of a trial writes out
    defaults = hashlib.sha256(json.dumps([config, asdict(Phantoms(""))], sort_keys=True, default=str).encode())
    assert (RECIPE, defaults.hexdigest()[:10]) == (2, "67cf92fc13"), "count RECIPE of medmap.evidence.plan up"


@pytest.mark.parametrize(
    "same", ["name=other", "data.store=elsewhere", "train.log_every=5", "train.precision=fp32", "align.alpha=0.1"]
)
def test_what_changes_no_result_changes_no_name(same: str) -> None:
    assert trial(same).hash == TRIAL.hash


@pytest.mark.parametrize(
    "other", ["seed=2", "align.alpha=0.2", "align.anchor=none", "train.steps=7", "model.size=tiny"]
)
def test_what_changes_the_result_changes_the_name(other: str) -> None:
    assert trial(other).hash != TRIAL.hash


@pytest.mark.parametrize(
    "other",
    [
        replace(SMALL, train=3),
        replace(SMALL, missing=0.5),
        replace(SMALL, settings=Settings(spacing_mm=3.0)),
        replace(SMALL, settings=Settings(spacing_mm=4.0, modalities=ModalitySet(("t1c", "t2f")))),
        replace(SMALL, others=(Patients("more"),)),
        Patients("small"),
    ],
)
def test_other_data_are_another_trial(other: Phantoms | Patients) -> None:
    assert trial(data=other).hash != TRIAL.hash


def test_folds_and_seeds_are_trials_and_shared_ones_are_run_once() -> None:
    alone = Arm("c", ("align=pstar", "seed=0"), seeds=1)
    arms = (Arm("a", ("align=none",)), Arm("b", ("align=none",), against="a"), alone)
    study = Study("s", "?", "", Patients("p", folds=3), arms, seeds=2)
    assert [len(seed) for seed in study.trials(arms[0])] == [3, 3]
    assert len(study.trials(arms[2])) == 1
    trials = study.all_trials()
    assert len(trials) == 6 + 3
    assert [t.config.seed for t in trials] == [0] * 6 + [1] * 3  # whole comparisons first
    assert sorted({t.config.data.fold for t in trials}) == [0, 1, 2]


@pytest.mark.parametrize("arms", [(Arm("a"), Arm("a")), (Arm("a", against="b"),)])
def test_arms_that_make_no_sense_are_refused(arms: tuple[Arm, ...]) -> None:
    with pytest.raises(ConfigError, match="study s"):
        Study("s", "?", "", SMALL, arms)


@pytest.mark.parametrize("name", study_names())
def test_every_study_asks_one_question_and_compares_something(name: str) -> None:
    study = study_named(name)
    assert study.name == name
    assert study.asks.endswith("?")
    assert len(study.about) > 100
    assert any(arm.against for arm in study.arms)
    assert study.seeds >= 3  # fewer are no evidence
    assert len({trial.key for trial in study.all_trials()}) == len(study.all_trials())


def test_methods_that_name_no_size_have_one_that_two_cores_carry() -> None:
    settings = [
        arm.settings[:2]
        for arm in bench(["unet", "mmformer", "rfnet/faithful"], ["none"], SMALL, (), 1, "b", "small").arms
    ]
    assert settings == [
        ("model.name=unet", "model.size=small"),
        ("model.name=mmformer", "model.size=tiny"),
        ("model.name=rfnet", "model.size=faithful"),
    ]
    (unsized,) = bench(["mmformer"], ["none"], SMALL, (), 1, "b").arms  # a file has the sizes
    assert "model.size" not in " ".join(unsized.settings)
