"""The verb that makes masks: one patient from files named by sequence, or a whole folder with one model load."""

from __future__ import annotations

import json as json_format
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from medmap.cli import beforehand, console
from medmap.cli.options import (
    T1,
    T2,
    Arithmetic,
    Checkpoint,
    Device,
    DryRun,
    Engine,
    Flair,
    Image,
    Json,
    Kind,
    Model,
    Precision,
    Raw,
    Ray,
    Resample,
    T1c,
    T1ce,
    T1n,
    T2f,
    T2w,
    Which,
    images_named,
)
from medmap.errors import InputError, MedmapError

if TYPE_CHECKING:
    from medmap.card import ModelFolder
    from medmap.core.labels import LabelScheme
    from medmap.inputs import Inputs
    from medmap.segment import Segmenter, Task


def predict(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="MASK|FOLDER", help="The mask, or with -i a folder.")],
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
            help="Folder of cases in any known layout; or one DICOM study, a folder or .zip: --t1c SERIES then names a "
            "series by its number, where the guess is wrong.",
        ),
    ] = None,
    labels: Annotated[
        str | None, typer.Option("--labels", metavar="NAME", help="Codes of the mask; brats2023 for glioma.")
    ] = None,
    regions: Annotated[bool, typer.Option("--regions", help="Also one mask a region.")] = False,
    probabilities: Annotated[
        Kind | None, typer.Option("--probabilities", help="Also each region's probability, as NAME-probabilities.npz.")
    ] = None,
    dicom_seg: Annotated[
        bool, typer.Option("--dicom-seg", help="From DICOM: also a DICOM SEG beside the mask, NAME.dcm.")
    ] = False,
    bids: Annotated[
        bool, typer.Option("--bids", help="With -i: name the masks as BIDS does, with sidecars and a table of labels.")
    ] = False,
    colours: Annotated[
        Path | None,
        typer.Option(
            "--colours",
            metavar="FOLDER",
            help="Also colour tables of the mask's codes for ITK-SNAP, 3D Slicer, FSLeyes and FreeSurfer.",
        ),
    ] = None,
    raw: Raw = False,
    abstain: Annotated[
        float | None,
        typer.Option("--abstain", metavar="DICE", help="Leave out regions expected below this; the card says."),
    ] = None,
    qc: Annotated[
        bool,
        typer.Option("--qc/--no-qc", help="Say how far each mask can be trusted, where the model can; takes longer."),
    ] = True,
    resample: Resample = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace masks that are there, whoever made them.")
    ] = False,
    checkpoint: Which = Checkpoint.best,
    device: Device = "auto",
    precision: Arithmetic = Precision.auto,
    engine: Annotated[
        Engine, typer.Option("--engine", help="What computes: OpenVINO where it pays, or torch.")
    ] = Engine.auto,
    ray: Ray = None,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Segment patients from whatever sequences there are.

    medmap predict --t2w a.nii.gz --t2f b.nii.gz -o seg.nii.gz

    The mask has the grid of the first image; a JSON beside it says what it was made from.
    """
    console.MANNER.json = json
    named = images_named(ctx)
    from medmap.data.dicom import is_study

    dicom = folder is not None and is_study(folder)
    if bool(named) == (folder is not None) and not dicom:
        raise typer.BadParameter(
            "name the images (--t1n --t1c --t2w --t2f FILE, --image NAME=FILE), one folder of cases (-i FOLDER) or one "
            "DICOM study (-i STUDY)" + (", not both" if named else "")
        )
    _refuse_options(folder is not None and not dicom, dicom, ray, bids, dicom_seg, regions or probabilities is not None)
    from medmap.card import SHIPPED, choose_scheme, read_model
    from medmap.cli.predict_text import say_plan
    from medmap.confidence import read_confidence
    from medmap.data.bids import write_dataset
    from medmap.data.colours import write_colours
    from medmap.inputs import read_inputs
    from medmap.segment import Segmenter, Task, made_so

    if abstain is not None and not 0 < abstain <= 1:
        raise typer.BadParameter(f"found {abstain:g}; expected a Dice between 0 and 1, as 0.7", param_hint="--abstain")
    known = read_model(model or SHIPPED, checkpoint.value)
    if known.about:
        console.say(f"model: {known.about}")
    scheme = choose_scheme(known.scheme, labels)
    alone = folder is None or dicom
    writes = partial(_writes, scheme, regions, probabilities is not None, dicom_seg)
    if dicom:
        from medmap.cli import study

        beforehand.mask_name(out)
        found = ctx.with_resource(study.opened(folder))
        frames = (frame.path for series in found.study.series for frame in series.frames)
        _refuse_overwriting(writes(out), frames, overwrite)
        chosen = study.chosen_series(found, named, known.modalities)
        plan = _Plan([Task(study.inputs_of(found, chosen, known.modalities, resample), out)])
    elif folder is None:
        for name, path in named.items():
            beforehand.existing(path, f"the image {name}")
        beforehand.mask_name(out)
        plan = _Plan([Task(read_inputs(named, resample, known=known.modalities), out)])
        _refuse_overwriting(writes(out), named.values(), overwrite)
    else:
        trust = qc and read_confidence(known) is not None
        same = partial(made_so, known, scheme, abstain, not raw, regions, probabilities, trust)
        plan = _plan(folder, out, known, same, writes, resample, overwrite, bids)
    tasks, skipped, failed = plan.tasks, plan.skipped, plan.failed
    beforehand.room(out, sum(_bytes(task, scheme, regions, probabilities) for task in tasks), "the output")
    if dry_run:
        _refuse_machine(device, engine.value)
        say_plan(known.path, tasks, skipped, failed, plan.notes)
        raise typer.Exit(_code(len(tasks), failed))
    if bids:
        write_dataset(out, folder, scheme)
    if colours is not None:
        console.say("colours: " + ", ".join(map(str, write_colours(colours, scheme))))
    records: dict[str, dict[str, Any]] = {}
    if tasks:
        options = {"scheme": scheme, "regions": regions, "probabilities": probabilities or False, "clean": not raw}
        options |= {"abstain": abstain, "qc": qc}
        # A graph is made in seconds, which one patient does not earn back.
        computes = "torch" if alone and engine is Engine.auto else engine.value
        make = partial(Segmenter.load, known, device, precision.value, computes, options)
        records = _segment(tasks, make, known, device, failed, ray, alone)
    if dicom:
        study.say_how(records[tasks[0].inputs.id])
    if dicom_seg:
        study.write_seg(found, tasks[0], chosen, scheme, records[tasks[0].inputs.id])
    if not (alone or bids) and qc:
        _write_table(out, list(records.values()), skipped)
    if json:
        one = next(iter(records.values()), None)
        whole = {"done": records, "skipped": skipped, "failed": failed, "notes": list(plan.notes)}
        console.answer_json(one if alone else whole)
    elif not alone:
        kept = f", {len(skipped)} were there already" if skipped else ""
        lost = f"; {console.count(len(failed), 'case')} failed" if failed else ""
        console.answer(f"{out}: {console.count(len(records), 'mask')}{kept}{lost}")
    raise typer.Exit(_code(len(records) + len(skipped), failed))


# ---- what is to be done ------------------------------------------------------------------------------------------


def _refuse_options(cases: bool, dicom: bool, ray: str | None, bids: bool, dicom_seg: bool, more_files: bool) -> None:
    """Raises for options that the input does not allow, and for packages that are not there."""
    if ray is not None:
        if not cases:
            raise typer.BadParameter(
                "spreads the cases of a folder (-i FOLDER); one patient is one task", param_hint="--ray"
            )
        beforehand.packages("ray", "ray")
    if bids and not cases:
        raise typer.BadParameter("names the masks of a folder of cases (-i FOLDER)", param_hint="--bids")
    if bids and more_files:
        raise typer.BadParameter("has masks only, neither --regions nor --probabilities", param_hint="--bids")
    if dicom_seg and not dicom:
        raise typer.BadParameter(
            "needs the DICOM that the images come from: -i STUDY, a folder or .zip of DICOM files",
            param_hint="--dicom-seg",
        )
    if dicom:
        beforehand.packages("dicom", "pydicom", "dcm2niix", *(["highdicom"] if dicom_seg else []))


def _writes(scheme: LabelScheme, regions: bool, probabilities: bool, dicom_seg: bool, mask: Path) -> list[Path]:
    """All files that a mask brings, itself first."""
    from medmap.cli.study import seg_path
    from medmap.segment import companions, record_path

    also = companions(mask, scheme.regions if regions else (), probabilities)
    return [mask, *also, record_path(mask), *([seg_path(mask)] if dicom_seg else [])]


def _refuse_overwriting(files: list[Path], inputs: Iterable[Path], overwrite: bool) -> None:
    """Raises InputError where the files of a mask would take the place of an input, or of what medmap did not make."""
    beforehand.no_input_among(files, inputs)
    if not overwrite and (there := _stranger(files)):
        raise InputError(
            f"{there}: is there, and was not made by medmap as it is now; move it, name another place with -o, or "
            "replace it with --overwrite"
        )


def _stranger(files: list[Path]) -> Path | None:
    """One of a mask's files that is there, unless they are medmap's."""
    from medmap.segment import as_made

    there = next((file for file in files if file.exists()), None)
    return None if there is None or as_made(files[0]) else there


def _refuse_machine(device: str, engine: str) -> None:
    """Raises InputError for a device or an engine that is not to be had. Asks torch only where one was named."""
    if device != "auto" or engine != "auto":
        from medmap.predict import resolve_device, resolve_engine

        resolve_engine(engine, resolve_device(device))


@dataclass(frozen=True)
class _Plan:
    """Masks to be made, ids of those that are there, {id: why} of cases that cannot be done, notes on the folder."""

    tasks: list[Task]
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def _plan(
    folder: Path,
    out: Path,
    model: ModelFolder,
    same: Callable[[Path, Inputs], bool],
    writes: Callable[[Path], list[Path]],
    resample: bool,
    overwrite: bool,
    bids: bool,
) -> _Plan:
    """What is to be done for a folder of cases.

    same: whether a mask that is there is what this call would make of a patient; writes: what else a mask brings
    """
    from medmap.data.bids import mask_path, refuse_twins, sidecar
    from medmap.data.layouts import recognise
    from medmap.inputs import read_inputs
    from medmap.segment import Task

    beforehand.existing(folder, "a folder of cases, or a CSV table")
    if out.is_file() or out.name.lower().endswith((".nii", ".nii.gz")):
        raise InputError(f"{out}: is no folder; with -i FOLDER the masks go into a folder, -o FOLDER")
    beforehand.writable(out, "masks")
    if out.exists() and out.samefile(folder):
        raise InputError(f"{out}: is the folder of the images; give the masks a folder of their own with -o")
    found = recognise(folder)
    plan = _Plan([], notes=found.notes)
    for note in found.notes:
        console.warn(note)
    if bids:
        refuse_twins(case.id for case in found.cases)
    for case in found.cases:
        mask = out / (mask_path(case.id) if bids else f"{quote(case.id, safe=' ')}.nii.gz")
        try:
            inputs = read_inputs(case.images, resample, known=model.modalities, id=case.id)
            if mask.exists() and not overwrite and same(mask, inputs):
                plan.skipped.append(case.id)
                continue
            there = None if overwrite else mask if mask.exists() else _stranger(writes(mask))
            if there is not None:
                raise InputError(
                    f"{there}: is there, but was not made by this model from these images with these options; make it "
                    "again with --overwrite, or name another folder with -o"
                )
        except MedmapError as error:
            plan.failed[case.id] = str(error).removeprefix(f"case {case.id}: ")
            console.warn(f"left out {case.id}: {plan.failed[case.id]}")
            continue
        plan.tasks.append(Task(inputs, mask, sidecar(inputs.files.images.values(), folder) if bids else {}))
    made = [file for task in plan.tasks for file in writes(task.mask)]
    beforehand.no_input_among(made, (ref.path for case in found.cases for ref in case.files.values()))
    return plan


def _bytes(task: Task, scheme: LabelScheme, regions: bool, probabilities: Kind | None) -> int:
    """At most this much is written for a case."""
    each = {None: 0, Kind.float16: 2, Kind.float32: 4}[probabilities]
    return prod(task.inputs.reference.grid.shape) * (1 + len(scheme.regions) * (int(regions) + each))


# ---- doing it ----------------------------------------------------------------------------------------------------


def _segment(
    tasks: list[Task],
    make: Callable[[], Segmenter],
    model: ModelFolder,
    device: str,
    failed: dict[str, str],
    ray: str | None,
    alone: bool,
) -> dict[str, dict[str, Any]]:
    """{id: the JSON beside its mask}; one model load for all. A case that fails is added to ``failed``."""
    from medmap.cli.predict_text import say_mask
    from medmap.run import memory_gb
    from medmap.scale import spread

    results = spread(make, tasks, address=ray, device=device, memory_gb=memory_gb(model.runs), called=_called)
    found: dict[int, dict[str, Any]] = {}
    lost: dict[int, str] = {}
    with console.progress("segmenting") as tell, closing(results):
        for number, (index, result) in enumerate(results, start=1):
            id = tasks[index].inputs.id
            if not isinstance(result, MedmapError):
                found[index] = result
                say_mask(tasks[index].mask, result, alone)
            elif alone:
                raise result
            else:
                lost[index] = str(result).removeprefix(f"case {id}: ")
                console.warn(f"left out {id}: {lost[index]}")
            if not alone:
                tell(number, len(tasks), id)
    failed |= {tasks[index].inputs.id: lost[index] for index in sorted(lost)}
    return {tasks[index].inputs.id: found[index] for index in sorted(found)}


def _write_table(out: Path, made: list[dict[str, Any]], skipped: list[str]) -> None:
    """qc.csv, of the masks made and of those that were there."""
    from medmap.confidence import QC_TABLE, write_table
    from medmap.segment import record_path

    there = [record_path(out / f"{quote(id, safe=' ')}.nii.gz") for id in skipped]
    records = [*made, *(json_format.loads(file.read_text(encoding="utf-8")) for file in there)]
    counts = write_table(out / QC_TABLE, records)
    if counts:
        console.say(f"{out / QC_TABLE}: " + ", ".join(f"{number} {light}" for light, number in counts.items()))


def _called(task: Task) -> str:
    return f"case {task.inputs.id}"


def _code(done: int, failed: dict[str, str]) -> int:
    return 0 if not failed else 3 if done else 1
