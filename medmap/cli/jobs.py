"""Which runs a call of `medmap train` means, how far each of them came, and whether they may go on: no torch yet."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from medmap.cli import beforehand
from medmap.cli.data import is_store
from medmap.errors import CheckpointError, ConfigError, InputError

if TYPE_CHECKING:
    from medmap.config import Config
    from medmap.data.source import Source
    from medmap.data.splits import Split

ALL = "all"
NEW, BEGUN, STOPPED, FINISHED = "new", "begun", "stopped", "finished"


@dataclass(frozen=True)
class Job:
    """One run: its configuration, its folder, and how far it came."""

    config: Config
    run: Path
    state: str
    step: int = 0


def refuse_with_resume(**given: Any) -> None:
    """A resumed run is the run that was begun. Raises a usage error for options that would make it another."""
    named = [name for name, value in given.items() if value]
    if named:
        raise typer.BadParameter(
            f"goes on with the run's own configuration; leave out --{', --'.join(named)}, or train another run that "
            "starts from this one with --init",
            param_hint="--resume",
        )


def planned(
    config: Path | None, settings: list[str], fold: str | None, out: Path, data: Path | None
) -> tuple[list[Job], Path | None]:
    """The runs that are asked for, and where their data are; None where they are simulated."""
    from medmap.config import load_config

    chosen = load_config(config, settings)
    folds: list[tuple[list[str], Path]] = [([], out)]
    if fold is not None and chosen.data.split != "kfold":
        raise ConfigError(
            f"--fold {fold}: data.split is {chosen.data.split}, one list; folds belong to data.split=kfold"
        )
    if fold == ALL:
        folds = [([f"data.fold={k}"], out / f"fold{k}") for k in range(chosen.data.folds)]
    elif fold is not None:
        if not fold.isdigit():
            raise typer.BadParameter(f"found {fold!r}; expected a number or {ALL}", param_hint="--fold")
        folds = [([f"data.fold={fold}"], out)]
    if chosen.data.source == "phantom":
        return _streamed(chosen, fold, out, data), None
    source = data or (Path(chosen.data.store) if chosen.data.store else None)
    if source is None:
        raise typer.BadParameter("name the data (or data.store in the configuration)", param_hint="-d DATA")
    beforehand.existing(source, "a store that `medmap prepare` wrote, or a folder of cases")
    where = source if is_store(source) else out / "store"
    placed = f"data.store={json.dumps(str(where.resolve()))}"
    jobs = [standing(load_config(config, [*settings, *more, placed]), run) for more, run in folds]
    for job in jobs:
        _refuse_other(job, go_on=fold == ALL)
    return jobs, source


def _streamed(config: Config, fold: str | None, out: Path, data: Path | None) -> list[Job]:
    """The one run of phantoms that are simulated as training goes."""
    if data is not None or fold is not None:
        raise typer.BadParameter(
            "data.source is phantom: patients are simulated as training goes, there are no folds; leave it out, or "
            "set data.source=store",
            param_hint="-d DATA" if data is not None else "--fold",
        )
    job = standing(config, out)
    _refuse_other(job, go_on=False)
    return [job]


def standing(config: Config, run: Path) -> Job:
    """How far a run came: new, begun (stopped before its first checkpoint), stopped, finished."""
    if not (run / "log.jsonl").is_file():
        return Job(config, run, NEW)
    step = last_step(run)
    if step is None:
        return Job(config, run, BEGUN)
    return Job(config, run, FINISHED if step >= config.train.steps else STOPPED, step)


def last_step(run: Path) -> int | None:
    """The step of the last checkpoint; None where there is none."""
    from medmap.run import STATE, checkpoint_folder

    try:
        return int(json.loads((checkpoint_folder(run, "last") / STATE).read_text(encoding="utf-8"))["step"])
    except CheckpointError:
        return None


def _refuse_other(job: Job, go_on: bool) -> None:
    """Raises where the folder holds a run that this command would not simply go on with."""
    if job.state in (NEW, BEGUN):
        return
    if not go_on:
        raise CheckpointError(
            f"{job.run}: already holds a run, at step {job.step} of {_own_config(job.run).train.steps}; go on with "
            f"medmap train --resume {job.run}, or name another folder with -o"
        )
    old, new = (_comparable(config) for config in (_own_config(job.run), job.config))
    unlike = [f"{key} {old[key]!r}, now {new.get(key)!r}" for key in old if old[key] != new.get(key)]
    if unlike:
        raise ConfigError(
            f"{job.run}: was trained with {'; '.join(unlike[:3])}; name another folder with -o, or give the settings "
            "it had"
        )


def _own_config(run: Path) -> Config:
    from medmap.config import load_config

    return load_config(run / "config.yaml")


def _comparable(config: Config) -> dict[str, Any]:
    """Every key by its dotted name; where the data lie and how the machine computes may change."""
    flat: dict[str, Any] = {}
    for section, keys in config.model_dump(mode="json").items():
        flat |= (
            {f"{section}.{key}": value for key, value in keys.items()} if isinstance(keys, dict) else {section: keys}
        )
    return {key: value for key, value in flat.items() if key not in ("data.store", "train.precision")}


def resumed(run: Path) -> Job:
    """A run to go on with. Raises CheckpointError where there is nothing to go on from, or to."""
    if not (run / "config.yaml").is_file():
        folds = sorted(path.parent.name for path in run.glob("fold*/config.yaml"))
        hint = f"; it holds {', '.join(folds)}: resume one, or give the whole command with --fold all again"
        raise CheckpointError(f"{run}: no config.yaml in it; expected a run of `medmap train`{hint if folds else ''}")
    job = standing(_own_config(run), run)
    if job.state in (NEW, BEGUN):
        raise CheckpointError(f"{run}: was stopped before its first checkpoint; give the command that began it again")
    if job.state == FINISHED:
        raise CheckpointError(f"{run}: is finished, step {job.step}; go further from it with --init {run} -o NEW")
    return job


def data_of(run: Path) -> Path | None:
    """The store a run was begun with; None where its patients are simulated."""
    if _own_config(run).data.source == "phantom":
        return None
    try:
        return Path(json.loads((run / "env.json").read_text(encoding="utf-8"))["store"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{run / 'env.json'}: does not say where the data are; name them with -d") from error


def same_data(run: Path, store: Source) -> None:
    """Raises unless the store is the one the run was begun with: other data would be another run."""
    then = json.loads((run / "env.json").read_text(encoding="utf-8"))["store_sha256"]
    if store.sha256 != then:
        raise InputError(
            f"{store.path}: holds other data (hash {store.sha256[:12]}) than {run} was begun with ({then[:12]}); name "
            "the same ones with -d, or start a new run from it with --init"
        )


def checked(job: Job, store: Source) -> Split:
    """The division of the data; of a run that goes on, its own.

    Raises InputError or ConfigError for what training would stumble over.
    """
    from medmap.data.splits import begun_split, choose_split
    from medmap.run import SPLITS

    config = job.config
    if store.scheme is None:
        raise InputError(f"{store.path}: the data have no segmentations; training needs them")
    if config.data.modalities is not None:
        store.modalities.pick(config.data.modalities)
    if job.state in (STOPPED, FINISHED):
        return begun_split(job.run / SPLITS, store.roster())
    return choose_split(config.data, store)
