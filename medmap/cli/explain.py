"""The verb that says what decided a mask: every subset of a patient's sequences, and what each sequence carries."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medmap.cli import beforehand, console
from medmap.cli.options import (
    T1,
    T2,
    Arithmetic,
    Checkpoint,
    Device,
    DryRun,
    Flair,
    Image,
    Json,
    Model,
    Precision,
    Raw,
    Resample,
    T1c,
    T1ce,
    T1n,
    T2f,
    T2w,
    Which,
    images_named,
)
from medmap.errors import InputError

if TYPE_CHECKING:
    from medmap.card import ModelFolder
    from medmap.inputs import Inputs


def explain(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FOLDER", help="For text, figure, numbers and maps.")],
    model: Model = None,
    t1n: T1n = None,
    t1c: T1c = None,
    t2w: T2w = None,
    t2f: T2f = None,
    t1: T1 = None,
    t1ce: T1ce = None,
    t2: T2 = None,
    flair: Flair = None,
    image: Image = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "-i",
            "--input",
            metavar="FOLDER|STUDY",
            help="Folder of one case in any known layout; or one DICOM study, as for predict.",
        ),
    ] = None,
    raw: Raw = False,
    resample: Resample = False,
    checkpoint: Which = Checkpoint.best,
    device: Device = "auto",
    precision: Arithmetic = Precision.auto,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Say which sequence decided what of a patient's mask.

    medmap explain --t1c a.nii.gz --t2f b.nii.gz -o WHY

    Every subset of the sequences is segmented; each sequence's share of the mask from all of them is its Shapley value.
    This is influence on the model's answer, not accuracy.
    """
    console.MANNER.json = json
    named = images_named(ctx)
    from medmap.data.dicom import is_study

    dicom = folder is not None and is_study(folder)
    if bool(named) == (folder is not None) and not dicom:
        raise typer.BadParameter(
            "name the images (--t1n --t1c --t2w --t2f FILE, --image NAME=FILE), the folder of one case (-i FOLDER) or "
            "one DICOM study (-i STUDY)" + (", not both" if named else "")
        )
    if dicom:
        beforehand.packages("dicom", "pydicom", "dcm2niix")
    from medmap.card import SHIPPED, read_model

    known = read_model(model or SHIPPED, checkpoint.value)
    if known.about:
        console.say(f"model: {known.about}")
    if dicom:
        from medmap.cli import study

        found = ctx.with_resource(study.opened(folder))
        inputs = study.inputs_of(found, study.chosen_series(found, named, known.modalities), known.modalities, resample)
    else:
        inputs = _inputs(named, folder, known, resample)
    _refuse_folder(out, [folder] if dicom else [ref.path.parent for ref in inputs.files.images.values()])
    beforehand.packages("report", "matplotlib")
    beforehand.room(out, 4 * len(known.scheme.regions) * prod(inputs.reference.grid.shape), "the explanation")
    if dry_run:
        _say_plan(inputs, known, out)
        return
    record = _explained(inputs, known, out, device, precision.value, clean=not raw)
    for warning in record["warnings"]:
        console.warn(f"{record['case']}: {warning}")
    if dicom:
        study.say_how(record)
    if json:
        console.answer_json(record)
        return
    for sentence in record["sentences"]:
        console.answer(sentence)
    console.say(
        f"{out}: explanation.png, explanation.txt, explanation.json and maps of agreement, {record['seconds']:.1f} s"
    )


def _inputs(named: dict[str, Path], folder: Path | None, model: ModelFolder, resample: bool) -> Inputs:
    from medmap.data.layouts import recognise
    from medmap.inputs import read_inputs

    if folder is None:
        for name, path in named.items():
            beforehand.existing(path, f"the image {name}")
        return read_inputs(named, resample, known=model.modalities)
    beforehand.existing(folder, "a folder of one case")
    cases = recognise(folder).cases
    if len(cases) != 1:
        raise InputError(
            f"{folder}: holds {len(cases)} cases; one patient is explained at a time: name the folder of one case, or "
            "its images (--t1n --t1c --t2w --t2f FILE)"
        )
    return read_inputs(cases[0].images, resample, known=model.modalities, id=cases[0].id)


def _refuse_folder(out: Path, images: list[Path]) -> None:
    """Raises InputError for a place that cannot be a folder of its own."""
    if out.is_file():
        raise InputError(f"{out}: is a file; an explanation is a folder, name one with -o")
    beforehand.writable(out, "the explanation")
    if out.exists() and any(out.samefile(folder) for folder in images):
        raise InputError(f"{out}: is the folder of the images; give the explanation a folder of its own with -o")


def _explained(
    inputs: Inputs, model: ModelFolder, out: Path, device: str, precision: str, *, clean: bool
) -> dict[str, Any]:
    from medmap.explain import explain_case
    from medmap.predict import Predictor

    predictor = Predictor.load(model.path, which=model.which, device=device, precision=precision)
    with console.progress("subsets") as tell:
        return explain_case(predictor, inputs, out, clean=clean, model=model, told=tell)


def _say_plan(inputs: Inputs, model: ModelFolder, out: Path) -> None:
    from medmap.explain import PICTURE, RECORD, WORDS, agreement_name

    files = [RECORD, PICTURE, WORDS, *map(agreement_name, model.scheme.regions)]
    count = 2 ** len(inputs.files.images) - 1
    if console.MANNER.json:
        images = {name: inputs.worded(str(ref.path)) for name, ref in inputs.files.images.items()}
        plan = {
            "model": str(model.path),
            "images": images,
            "subsets": count,
            "would_make": [str(out / f) for f in files],
        }
        console.answer_json({"dry_run": True, **plan})
        return
    console.answer(f"would segment {console.count(count, 'subset')} of {' + '.join(inputs.files.images)}")
    console.answer(f"would make {', '.join(files)} in {out}")
