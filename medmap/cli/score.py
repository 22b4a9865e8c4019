"""Verbs about how good it is: a table over all subsets, differences between ways of training, a page to show."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medmap.cli import beforehand, console
from medmap.cli.data import open_data
from medmap.cli.options import Checkpoint, Device, Json, Labels, Ray, RunOrMask, Which
from medmap.errors import InputError

if TYPE_CHECKING:
    from medmap.card import ModelFolder

Metric = Annotated[str, typer.Option("--metric", metavar="NAME", help="Number to show: dice, hd95_mm, nsd, ...")]


def evaluate(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="Run, or folder of its folds.")] = None,
    data: Annotated[
        Path | None, typer.Option("-d", "--data", metavar="DATA", help="Other patients: a store, or a folder of cases.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="What to call --data.")] = None,
    labels: Labels = None,
    checkpoint: Which = Checkpoint.best,
    empty: Annotated[
        str, typer.Option("--empty", metavar="RULE", help="Score of a region that is empty: brats, nan, legacy.")
    ] = "brats",
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="NAME", help="Score a floor instead: flair-threshold.")
    ] = None,
    pred: Annotated[
        Path | None, typer.Option("--pred", metavar="FOLDER", help="Score these masks, whoever made them.")
    ] = None,
    truth: Annotated[Path | None, typer.Option("--truth", metavar="FOLDER", help="True masks for --pred.")] = None,
    pred_labels: Annotated[
        str | None, typer.Option("--pred-labels", metavar="NAME", help="Label map of --pred; the truth's otherwise.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="DIR", help="With --pred: keep the table there.")
    ] = None,
    metric: Metric = "dice",
    device: Device = "auto",
    ray: Ray = None,
    json: Json = False,
) -> None:
    """Score all subsets on held-out patients, or any masks.

    medmap evaluate RUN; medmap evaluate RUN --data OTHER; medmap evaluate --pred MASKS --truth FOLDER
    """
    console.MANNER.json = json
    if (pred is None) != (truth is None) or (run is None) == (pred is None):
        raise typer.BadParameter("name a RUN, or both --pred FOLDER and --truth FOLDER")
    if ray is not None:
        if run is None or baseline is not None:
            raise typer.BadParameter("spreads the cases of a RUN; masks and floors need no cluster", param_hint="--ray")
        beforehand.packages("ray", "ray")
    from medmap.core.metrics import METRICS, convention_named

    convention_named(empty)
    if metric not in METRICS:
        raise InputError(f"metric {metric!r} is not known; expected one of {', '.join(METRICS)}")
    if pred is not None and truth is not None:
        summary, place = _score_masks(pred, truth, labels, pred_labels, out, empty), out
    else:
        assert run is not None
        from medmap.card import read_model

        model = read_model(run, checkpoint.value)
        if model.about:
            console.warn(model.about)
        beforehand.writable(run, "the table")
        place = _score_run(model, data, name, labels, empty, baseline, device, ray)
        summary = json_format.loads((place / "summary.json").read_text(encoding="utf-8"))
    if json:
        console.answer_json({"folder": None if place is None else str(place), **summary})
        return
    from medmap.scores import table_text

    console.answer(table_text(summary, metric))
    if place is not None:
        console.say(f"{place / 'subsets.csv'}: every case, subset, region and metric")
    if run is not None and baseline is None:
        console.say(f"{place / 'card.md'}: the robustness card, for whoever uses the model")
        if (place / "confidence.json").is_file():
            console.say(
                f"{place / 'confidence.json'}: what `medmap predict` says of single masks, and how often it held"
            )


def compare(
    arms: Annotated[list[Path], typer.Argument(metavar="A B ...", help="Evaluated runs, or folders of seeds.")],
    metric: Metric = "dice",
    json: Json = False,
) -> None:
    """Say whether ways of training differ.

    Paired on the same patients, over patients and seeds, corrected after Holm; the first is compared with the others.
    """
    console.MANNER.json = json
    for arm in arms:
        beforehand.existing(arm, "an evaluated run, or a folder of seeds")
    if len(arms) < 2:
        raise typer.BadParameter("name two folders or more", param_hint="A B ...")
    from medmap.compare import compare_arms

    comparison = compare_arms(arms, metric)
    if json:
        console.answer_json(comparison.to_dict())
    else:
        console.answer(comparison.text())


def report(
    what: RunOrMask,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FILE", help="The page; RUN/report.html or MASK.html where not given."),
    ] = None,
    study: Annotated[
        Path | None,
        typer.Option(
            "-i", "--input", metavar="STUDY", help="Of a mask made from DICOM: the study, where it lies now elsewhere."
        ),
    ] = None,
    anonymous: Annotated[
        bool, typer.Option("--anonymous", help="Of a mask: no id and no file name on the page.")
    ] = False,
    json: Json = False,
) -> None:
    """Make one HTML page of a run, or of one patient's mask, with nothing outside it.

    medmap report seg.nii.gz

    A mask's page has volumes, pictures, a viewer and what to expect. It shows the patient's images.
    """
    console.MANNER.json = json
    beforehand.existing(what, "a run that `medmap train` wrote, or a mask that `medmap predict` wrote")
    beforehand.packages("report", "matplotlib", "jinja2")
    place = what if what.is_dir() else what.parent
    if out is not None:
        from medmap.report.html import page_name

        page_name(out)
    beforehand.writable(place if out is None else out.parent, "the page")
    page = _case_page(what, study, out, anonymous) if what.is_file() else _run_page(what, study, out, anonymous)
    if json:
        console.answer_json({"report": str(page)})
    else:
        console.answer(str(page))


# ---- parts -------------------------------------------------------------------------------------------------------


def _run_page(run: Path, study: Path | None, out: Path | None, anonymous: bool) -> Path:
    for given, option in ((anonymous, "--anonymous"), (study, "--input")):
        if given:
            raise typer.BadParameter("is for the page of a mask; found a run", param_hint=option)
    from medmap.report import write_report

    return write_report(run, out)


def _case_page(mask: Path, study: Path | None, out: Path | None, anonymous: bool) -> Path:
    from medmap.report.case import beside, case_report, read_record

    inputs = read_record(mask)["inputs"]
    entry = next(iter(inputs.values()))
    if "series_uid" not in entry:
        if study is not None:
            raise InputError(f"{mask}: was made from files and no DICOM study; leave out --input")
        return case_report(mask, out, anonymous=anonymous)
    if study is None and "study" in entry:
        study = next((place for place in beside(mask, Path(entry["study"])) if place.exists()), None)
    if study is None:
        return case_report(mask, out, anonymous=anonymous)  # which says what is lacking
    from medmap.cli.study import opened

    beforehand.existing(study, "the DICOM study that the mask was made from, a folder or .zip")
    beforehand.packages("dicom", "pydicom", "dcm2niix")
    with opened(study, images=False) as found:
        return case_report(mask, out, anonymous=anonymous, images=found.recorded(inputs))


def _score_masks(
    pred: Path, truth: Path, labels: str | None, pred_labels: str | None, out: Path | None, empty: str
) -> dict[str, Any]:
    beforehand.existing(pred, "a folder of masks")
    beforehand.existing(truth, "a folder of true masks")
    if out is not None:
        beforehand.writable(out, "the table")
    from medmap.masks import score_folders

    with console.progress("scoring") as tell:
        return score_folders(
            pred,
            truth,
            labels,
            out,
            prediction_labels=pred_labels,
            convention=empty,
            on_progress=lambda case, done, total: tell(done, total, case),
        )


def _score_run(
    model: ModelFolder,
    data: Path | None,
    name: str | None,
    labels: str | None,
    empty: str,
    baseline: str | None,
    device: str,
    ray: str | None,
) -> Path:
    """Score a run on its own test part or on other data; returns the folder of the table."""
    called = name or (None if data is None else data.resolve().name)
    store = None
    if data is not None:
        store, _ = open_data(data, model.path / f"on-{called}" / "store", model.spacing_mm, labels)
    if baseline is not None:
        from medmap.baseline import evaluate_baseline

        return evaluate_baseline(baseline, model.path, data=store, data_name=called, convention=empty)
    from medmap.evaluate import evaluate as score

    with console.progress("scoring") as tell:
        place = score(
            model.path,
            data=store,
            name=called,
            which=model.which,
            convention=empty,
            device=device,
            ray=ray,
            on_progress=lambda case, done, total: tell(done, total, case),
        )
    from medmap.card import read_model
    from medmap.confidence import LEAST_PATIENTS, write_confidence
    from medmap.robustness import write_card

    several = [read_model(run, model.which) for run in model.runs] if data is None and len(model.runs) > 1 else []
    for about, where in [(model, place), *((one, one.path) for one in several)]:
        write_card(about, where)
        if write_confidence(about, where) is None and about is model:
            console.say(
                f"no confidence.json: nothing is claimed about single masks from fewer than {LEAST_PATIENTS} patients"
            )
    if data is None:
        _exhibit(model, device)
    return place


def _exhibit(model: ModelFolder, device: str) -> None:
    """What the report shows besides numbers."""
    from medmap.evaluate import run_store
    from medmap.exhibits import write_exhibits

    for run in model.runs:
        write_exhibits(run, run_store(run), which=model.which, device=device)
