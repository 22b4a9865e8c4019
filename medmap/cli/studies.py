"""The verbs of evidence: a question with its controls, or methods side by side."""

from __future__ import annotations

import json as json_format
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medmap.cli import beforehand, console
from medmap.cli.options import Device, Json, Ray
from medmap.errors import InputError

if TYPE_CHECKING:
    from medmap.evidence.plan import Data, Study

OUT = Path("docs/studies")
WORK = Path("runs/studies")

Out = Annotated[
    Path, typer.Option("-o", "--out", metavar="DIR", help="Results of runs, pages, figures; what is there is kept.")
]
Work = Annotated[
    Path, typer.Option("--work", metavar="DIR", help="Prepared data, and runs on their way; may be deleted.")
]
Jobs = Annotated[int | None, typer.Option("--jobs", min=1, metavar="N", help="Runs at a time; one per core.")]
Budget = Annotated[
    float | None, typer.Option("--budget", min=0, metavar="HOURS", help="Refuse to begin what would take longer.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where results are; without it a begun study is refused.")]
Own = Annotated[
    Path | None,
    typer.Option("-d", "--data", metavar="DATA", help="Run on these patients: a store, or a folder of cases."),
]
SplitName = Annotated[
    str | None,
    typer.Option("--split", metavar="NAME", help="Of --data: kfold, a published list, or FILE.json."),
]
Folds = Annotated[int, typer.Option("--folds", min=2, metavar="K", help="Of kfold.")]
Grid = Annotated[float | None, typer.Option("--spacing", metavar="MM", help="Voxels that --data is prepared to.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Keys of every run's configuration.")
]


def study(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Which one; see --list.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show all studies with their cost.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Two steps of few runs: does it work?")] = False,
    resume: Resume = False,
    pages: Annotated[bool, typer.Option("--pages", help="Run nothing; write pages and figures anew.")] = False,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, metavar="N", help="Only the first N.")] = None,
    data: Own = None,
    split: SplitName = None,
    folds: Folds = 3,
    spacing: Grid = None,
    settings: Settings = None,
    budget: Budget = None,
    jobs: Jobs = None,
    out: Out = OUT,
    work: Work = WORK,
    device: Device = "auto",
    ray: Ray = None,
    json: Json = False,
) -> None:
    """Answer a question about alignment by an experiment.

    medmap study --list; medmap study anchors --resume

    Every finished run is kept in DIR/runs and never run again.
    """
    from dataclasses import replace

    console.MANNER.json = json
    if listed:
        _list(out)
        return
    if name is None:
        raise typer.BadParameter("name a study, or --list them", param_hint="NAME")
    from medmap.studies import study_named

    chosen = study_named(name)
    if data is not None:
        chosen = _on(chosen, *_own(data, split, folds, spacing))
    chosen = replace(chosen, seeds=min(seeds or chosen.seeds, chosen.seeds))
    own = _words({"--data": data, "--split": split, "--folds": folds, "--spacing": spacing}) if data else []
    command = " ".join(["medmap study", name, *own, *_words({"--seeds": seeds, "--set": settings}), "--resume"])
    if quick:
        out, work = out / "quick", work / "quick"
        chosen = chosen.quick()
    chosen = replace(chosen, arms=tuple(replace(a, settings=(*a.settings, *(settings or []))) for a in chosen.arms))
    _run(chosen, command, resume or quick, pages, budget, jobs, out, work, device, ray, data)


def bench(
    methods: Annotated[
        str, typer.Option("--methods", metavar="A,B", help="Backbones; mmformer/tiny:1 names size and seeds.")
    ] = "unet,mmformer,pmkl:1,acn:1,rfnet:1",
    align: Annotated[
        str, typer.Option("--align", metavar="A,B", help="Anchors; pk:t1c@x4=0.01 names modality, level and α.")
    ] = "none,pstar",
    data: Own = None,
    phantoms: Annotated[bool, typer.Option("--phantoms", help="On simulated patients.")] = False,
    split: SplitName = None,
    folds: Folds = 3,
    spacing: Grid = None,
    config: Annotated[
        Path | None,
        typer.Option("-c", "--config", metavar="YAML", help="Recipe, the main table's if none; {method}: a method."),
    ] = None,
    settings: Settings = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, metavar="N", help="Runs of each.")] = 3,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Of the page.")] = "main",
    resume: Resume = False,
    quick: Annotated[bool, typer.Option("--quick", help="Two steps of each: does it work?")] = False,
    pages: Annotated[bool, typer.Option("--pages", help="Run nothing; write pages and figures anew.")] = False,
    budget: Budget = None,
    jobs: Jobs = None,
    out: Out = OUT,
    work: Work = WORK,
    device: Device = "auto",
    ray: Ray = None,
    json: Json = False,
) -> None:
    """Compare methods on the same patients, splits, masks and budget.

    medmap bench --methods unet,mmformer --align none,pstar --data BraTS2018 --split brats2018-list1

    Without --data: BraTS-Africa in three folds, and BraTS 2021 as another population (see MEDMAP_DATA). With
    --phantoms: simulated patients.
    """
    from medmap.evidence.bench import bench as side_by_side
    from medmap.studies._common import AFRICA, MANY_PHANTOMS, REAL, RECIPE

    console.MANNER.json = json
    listed = [word for word in methods.split(",") if word], [word for word in align.split(",") if word]
    if phantoms and data is not None:
        raise typer.BadParameter("it and --data are two kinds of patients; name one", param_hint="--phantoms")
    usual, usual_recipe, unet = (MANY_PHANTOMS, RECIPE, "tiny") if phantoms else (AFRICA, REAL, "small")
    tested, division = (usual, ()) if data is None else _own(data, split, folds, spacing)
    recipe = (*(usual_recipe if config is None else ()), *division, *(settings or []))
    chosen = side_by_side(*listed, tested, recipe, seeds, name, unet if config is None else None)
    if config is not None:
        chosen = _with_recipe(chosen, config, settings or [])
    own = _words({"--data": data, "--split": split, "--folds": folds, "--spacing": spacing}) if data else []
    own += ["--phantoms"] * phantoms
    asked = _words({"--methods": methods, "--align": align, "-c": config, "--seeds": seeds, "--set": settings})
    command = " ".join(["medmap bench", *asked, *own, *_words({"--name": name}), "--resume"])
    if quick:
        out, work = out / "quick", work / "quick"
        chosen = chosen.quick(every=True)
    _run(chosen, command, resume or quick, pages, budget, jobs, out, work, device, ray, data)


# ---- parts -------------------------------------------------------------------------------------------------------


def _words(options: Mapping[str, object]) -> list[str]:
    """Options as one would type them; a list is an option again and again, None is none."""
    several = [
        (name, one) for name, value in options.items() for one in (value if isinstance(value, list) else [value])
    ]
    return [f"{name} {shlex.quote(str(value))}" for name, value in several if value is not None]


def _own(data: Path, split: str | None, folds: int, spacing_mm: float | None) -> tuple[Data, tuple[str, ...]]:
    """The user's patients, and the settings that divide them."""
    from medmap.evidence.plan import Patients

    beforehand.existing(data, "a store that `medmap prepare` wrote, or a folder of cases")
    called = data.resolve().name
    if split in (None, "kfold"):
        return Patients(called, folds, spacing_mm), ()
    return Patients(called, 1, spacing_mm), (f"data.split={split}",)


def _on(study: Study, data: Data, division: tuple[str, ...]) -> Study:
    """A study on other data. Raises InputError where the question is about data that only a simulator can make."""
    from dataclasses import replace

    if any(arm.data is not None for arm in study.arms):
        raise InputError(f"study {study.name} compares data of its own making; it cannot be run on --data")
    return replace(study, data=data, recipe=(*study.recipe, *division))


def _with_recipe(study: Study, config: Path, settings: list[str]) -> Study:
    """Every arm with the recipe of its method's own file; what --set says comes last."""
    from dataclasses import replace

    import yaml

    from medmap.config import load_config

    arms = []
    for arm in study.arms:
        method = arm.name.partition(",")[0].partition(" ")[0]
        file = Path(str(config).replace("{method}", method))
        beforehand.existing(file, "a configuration")
        load_config(file)  # which says what is wrong with it
        sections = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).items()
        keys = {f"{name}.{key}": v for name, part in sections if isinstance(part, dict) for key, v in part.items()}
        keys |= {name: value for name, value in sections if name != "name" and not isinstance(value, dict)}
        recipe = [f"{key}={json_format.dumps(value)}" for key, value in keys.items() if key != "data.split"]
        arms.append(replace(arm, settings=(*recipe, *arm.settings, *settings)))
    return replace(study, arms=tuple(arms))


def _list(out: Path) -> None:
    from medmap.evidence.runner import estimate_minutes, open_trials
    from medmap.studies import study_named, study_names

    found = []
    for name in study_names():
        one = study_named(name)
        trials, left = one.all_trials(), open_trials(one, out)
        hours = estimate_minutes(one, out, left) / 60
        found.append({"name": name, "asks": one.asks, "runs": len(trials), "left": len(left), "core_hours": hours})
    if console.MANNER.json:
        console.answer_json(found)
        return
    for row in found:
        todo = f"{row['left']} of {row['runs']} runs to do, about {row['core_hours']:.1f} h of one core"
        console.answer(f"{row['name']:14} {row['asks']}\n{'':14} {todo if row['left'] else 'done'}")


def _run(
    study: Study,
    command: str,
    resume: bool,
    pages_only: bool,
    budget: float | None,
    jobs: int | None,
    out: Path,
    work: Path,
    device: str,
    ray: str | None,
    data: Path | None,
) -> None:
    beforehand.packages("train", "monai", "lightning_fabric")
    beforehand.packages("report", "matplotlib")
    beforehand.packages("study", "sklearn")
    beforehand.writable(out, "the results")
    beforehand.writable(work, "data and runs")
    if ray is not None:
        beforehand.packages("ray", "ray")
    from medmap.evidence.pages import write_pages
    from medmap.evidence.results import read_results
    from medmap.evidence.runner import estimate_minutes, open_trials, places_of, refuse_other_data, run_trials

    left, every = open_trials(study, out), study.all_trials()
    if len(left) < len(every) and not resume and not pages_only:
        raise InputError(
            f"{out}: holds {len(every) - len(left)} of {len(every)} runs of {study.name}; go on with --resume, or name "
            "another folder with -o"
        )
    places = places_of(None) | ({} if data is None else {data.resolve().name: data})
    if not pages_only:
        refuse_other_data(every, out, work, places)
    jobs = jobs or (1 if ray else os.cpu_count() or 1)
    hours = estimate_minutes(study, out, left) / 60 / jobs
    failed: list[str] = []
    if left and not pages_only:
        console.say(f"{study.name}: {len(left)} of {len(every)} runs to do, about {hours:.1f} h with {jobs} at a time")
        if budget is not None and hours > budget:
            raise InputError(
                f"{study.name}: would take about {hours:.1f} h with {jobs} runs at a time, the budget is {budget:g} h; "
                "take fewer --seeds, or a larger --budget"
            )
        with console.progress(study.name) as tell:
            failed = run_trials(left, out, work, places, jobs=jobs, device=device, ray=ray, tell=tell)
    results = read_results(study, out)
    page = write_pages(results, out, command)
    for line in failed:
        console.warn(line)
    if console.MANNER.json:
        from medmap.evidence.findings import plain
        from medmap.scores import without_nan

        console.answer_json(without_nan(plain(results)))
    else:
        from medmap.evidence.findings import plain

        for sentence in plain(results)["verdicts"]:
            console.answer(sentence)
        console.answer(str(page))
    raise typer.Exit(3 if failed else 0)
