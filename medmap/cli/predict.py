"""The verb that makes masks: one patient from files named by sequence, or a whole folder with one model load."""

from __future__ import annotations

import json as json_format
from collections.abc import Callable
from contextlib import closing
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from medmap.cli import beforehand, console
from medmap.cli.options import Checkpoint, Device, DryRun, Engine, Json, Kind, Precision, Ray, Which
from medmap.errors import InputError, MedmapError

if TYPE_CHECKING:
    from medmap.card import ModelFolder
    from medmap.core.labels import LabelScheme
    from medmap.segment import Inputs, Segmenter, Task

_ORDER = "medmap.named"


def _noted(ctx: typer.Context, param: typer.CallbackParam, value: Any) -> Any:
    """Options arrive by name; the order in which they were typed says whose grid the mask gets."""
    if value:
        ctx.meta.setdefault(_ORDER, []).append(param.name)
    return value


def _file(name: str, what: str) -> Any:
    return typer.Option(f"--{name}", metavar="FILE", help=what, callback=_noted)


def _alias(name: str) -> Any:
    return typer.Option(f"--{name}", metavar="FILE", hidden=True, callback=_noted)


def predict(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="MASK|FOLDER", help="The mask, or with -i a folder.")],
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            metavar="RUN",
            help="Run, or folder of folds: these vote.",
            show_default="what comes with medmap, trained on no patient",
        ),
    ] = None,
    t1n: Annotated[Path | None, _file("t1n", "T1, native.")] = None,
    t1c: Annotated[Path | None, _file("t1c", "T1 with contrast agent.")] = None,
    t2w: Annotated[Path | None, _file("t2w", "T2.")] = None,
    t2f: Annotated[Path | None, _file("t2f", "T2-FLAIR.")] = None,
    t1: Annotated[Path | None, _alias("t1")] = None,
    t1ce: Annotated[Path | None, _alias("t1ce")] = None,
    t2: Annotated[Path | None, _alias("t2")] = None,
    flair: Annotated[Path | None, _alias("flair")] = None,
    image: Annotated[
        list[str] | None, typer.Option("--image", metavar="NAME=FILE", help="Any other sequence.", callback=_noted)
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("-i", "--input", metavar="FOLDER", help="Folder of cases in any known layout."),
    ] = None,
    labels: Annotated[
        str | None, typer.Option("--labels", metavar="NAME", help="Codes of the mask; brats2023 for glioma.")
    ] = None,
    regions: Annotated[bool, typer.Option("--regions", help="Also one mask a region.")] = False,
    probabilities: Annotated[
        Kind | None, typer.Option("--probabilities", help="Also each region's probability, as NAME-probabilities.npz.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Keep enhancing tumour however small.")] = False,
    resample: Annotated[
        bool, typer.Option("--resample", help="Bring registered images of other grids onto the first one named.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="With -i: make masks again that are there.")] = False,
    checkpoint: Which = Checkpoint.best,
    device: Device = "auto",
    precision: Annotated[Precision, typer.Option("--precision", help="Arithmetic.")] = Precision.auto,
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
    named = _named(ctx.meta.get(_ORDER, []), ctx.params)
    if bool(named) == (folder is not None):
        raise typer.BadParameter(
            "name the images (--t1n --t1c --t2w --t2f FILE, --image NAME=FILE) or one folder of cases (-i FOLDER)"
            + (", not both" if named else "")
        )
    if ray is not None:
        if folder is None:
            raise typer.BadParameter(
                "spreads the cases of a folder (-i FOLDER); one patient is one task", param_hint="--ray"
            )
        beforehand.packages("ray", "ray")
    from medmap.card import SHIPPED, choose_scheme, read_model
    from medmap.segment import Segmenter, Task, read_inputs

    known = read_model(model or SHIPPED, checkpoint.value)
    if known.about:
        console.say(f"model: {known.about}")
    scheme = choose_scheme(known.scheme, labels)
    if folder is None:
        for name, path in named.items():
            beforehand.existing(path, f"the image {name}")
        beforehand.mask_name(out)
        tasks = [Task(read_inputs(named, resample, known=known.modalities), out)]
        _refuse_overwriting_inputs(out, list(named.values()))
        skipped: list[str] = []
        failed: dict[str, str] = {}
    else:
        tasks, skipped, failed = _tasks_of(folder, out, known, scheme, resample, overwrite)
    beforehand.room(out, sum(_bytes(task, scheme, regions, probabilities) for task in tasks), "the output")
    if dry_run:
        _say_tasks(tasks, skipped, failed, known)
        raise typer.Exit(_code(len(tasks), failed))
    records: dict[str, dict[str, Any]] = {}
    if tasks:
        options = {"scheme": scheme, "regions": regions, "probabilities": probabilities or False, "clean": not raw}
        # A graph is made in seconds, which one patient does not earn back.
        chosen = "torch" if folder is None and engine is Engine.auto else engine.value
        make = partial(Segmenter.load, known, device, precision.value, chosen, options)
        records = _segment(tasks, make, known, device, failed, ray, alone=folder is None)
    if json:
        one = next(iter(records.values()), None)
        whole = {"done": records, "skipped": skipped, "failed": failed}
        console.answer_json(one if folder is None else whole)
    elif folder is not None:
        kept = f", {len(skipped)} were there already" if skipped else ""
        lost = f"; {console.count(len(failed), 'case')} failed" if failed else ""
        console.answer(f"{out}: {console.count(len(records), 'mask')}{kept}{lost}")
    raise typer.Exit(_code(len(records) + len(skipped), failed))


# ---- what is to be done ------------------------------------------------------------------------------------------


def _named(order: list[str], values: dict[str, Any]) -> dict[str, Path]:
    """{sequence as it was typed: file}, in the order of the command line."""
    found: dict[str, Path] = {}
    for option in order:
        if option != "image":
            found[option] = values[option]
            continue
        for pair in values["image"]:
            name, sign, file = pair.partition("=")
            if not sign or not name.strip() or not file:
                raise typer.BadParameter(f"found {pair!r}; expected NAME=FILE, as adc=a.nii.gz", param_hint="--image")
            if name.strip() in found:
                raise InputError(f"{name} is named twice: {found[name.strip()]} and {file}; name each sequence once")
            found[name.strip()] = Path(file)
    return found


def _refuse_overwriting_inputs(mask: Path, images: list[Path]) -> None:
    twin = next((image for image in images if mask.exists() and image.samefile(mask)), None)
    if twin is not None:
        raise InputError(f"{mask}: is the image {twin} itself; give the mask another name with -o")


def _tasks_of(
    folder: Path, out: Path, model: ModelFolder, scheme: LabelScheme, resample: bool, overwrite: bool
) -> tuple[list[Task], list[str], dict[str, str]]:
    """Masks to be made, ids of those that are there, and {id: why} of cases that cannot be done."""
    from medmap.data.layouts import recognise
    from medmap.segment import Task, read_inputs

    beforehand.existing(folder, "a folder of cases, or a CSV table")
    if out.is_file() or out.name.lower().endswith((".nii", ".nii.gz")):
        raise InputError(f"{out}: is no folder; with -i FOLDER the masks go into a folder, -o FOLDER")
    beforehand.writable(out, "masks")
    if out.exists() and out.samefile(folder):
        raise InputError(f"{out}: is the folder of the images; give the masks a folder of their own with -o")
    tasks, skipped = [], []
    failed: dict[str, str] = {}
    for case in recognise(folder).cases:
        mask = out / f"{quote(case.id, safe=' ')}.nii.gz"
        try:
            inputs = read_inputs(case.images, resample, known=model.modalities, id=case.id)
        except MedmapError as error:
            failed[case.id] = str(error).removeprefix(f"case {case.id}: ")
            console.warn(f"left out {case.id}: {failed[case.id]}")
            continue
        if mask.exists() and not overwrite:
            _refuse_other_mask(mask, inputs, model, scheme)
            skipped.append(case.id)
        else:
            tasks.append(Task(inputs, mask))
    return tasks, skipped, failed


def _refuse_other_mask(mask: Path, inputs: Inputs, model: ModelFolder, scheme: LabelScheme) -> None:
    """Raises where a mask is there that this call would not have made."""
    from medmap.segment import record_path

    try:
        record = json_format.loads(record_path(mask).read_text(encoding="utf-8"))
        made = record["model"]["weights_sha256"], record["labels"]["scheme"], set(record["sequences"]["used"])
    except (OSError, ValueError, KeyError, TypeError):
        made = None
    if made != (model.weights_sha256, scheme.name, set(inputs.files.images)):
        raise InputError(
            f"{mask}: is there, but was not made by this model from these sequences with these labels; make it again "
            "with --overwrite, or name another folder with -o"
        )


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
                _say_mask(tasks[index].mask, result, alone)
            elif alone:
                raise result
            else:
                lost[index] = str(result).removeprefix(f"case {id}: ")
                console.warn(f"left out {id}: {lost[index]}")
            if not alone:
                tell(number, len(tasks), id)
    failed |= {tasks[index].inputs.id: lost[index] for index in sorted(lost)}
    return {tasks[index].inputs.id: found[index] for index in sorted(found)}


def _called(task: Task) -> str:
    return f"case {task.inputs.id}"


def _code(done: int, failed: dict[str, str]) -> int:
    return 0 if not failed else 3 if done else 1


def _say_mask(mask: Path, record: dict[str, Any], alone: bool) -> None:
    for warning in record["warnings"]:
        console.warn(f"{record['case']}: {warning}")
    by = record["model"]
    agree = "" if by["engines_agree"] is None else f", which gives {100 * by['engines_agree']:.3f} % of torch's labels"
    engine = f"{by['engine']}{agree}"
    console.detail(f"{mask}: {console.count(by['networks'], 'network')} on {by['device']}, {by['precision']}, {engine}")
    sequences = record["sequences"]
    source = " + ".join(sequences["used"])
    missing = f" ({', '.join(sequences['missing'])} missing)" if sequences["missing"] else ""
    ignored = f", {', '.join(sequences['ignored'])} ignored: unknown to the model" if sequences["ignored"] else ""
    volumes = ", ".join(f"{region} {ml:.1f} ml" for region, ml in record["volumes_ml"].items())
    console.answer(f"{mask}: {volumes}, from {source}{missing}{ignored}, {record['seconds']:.1f} s")
    expected = record["expected"]
    if alone and expected:
        dice = ", ".join(f"{region} {_interval(row)}" for region, row in expected["dice"].items())
        cases = console.count(max(row["n"] for row in expected["dice"].values()), "held-out case")
        console.say(f"expect, from {source}: Dice {dice} on {cases} ({expected['measured_on']})")
    elif alone:
        console.say("expect: unknown, nobody has evaluated this model on held-out cases (medmap evaluate)")


def _interval(row: dict[str, Any]) -> str:
    """A mean with its interval in percent; a dash for what nobody knows."""
    mean, low, high = ("–" if row[key] is None else f"{100 * row[key]:.0f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _say_tasks(tasks: list[Task], skipped: list[str], failed: dict[str, str], model: ModelFolder) -> None:
    plan = {
        "model": str(model.path),
        "would_make": {
            str(task.mask): {name: str(ref.path) for name, ref in task.inputs.files.images.items()} for task in tasks
        },
        "skipped": skipped,
        "failed": failed,
    }
    if console.MANNER.json:
        console.answer_json({"dry_run": True, **plan})
        return
    for task in tasks:
        console.answer(f"would make {task.mask} from {' + '.join(task.inputs.files.images)}")
    console.answer(f"{len(tasks)} to make, {len(skipped)} there already, {len(failed)} cannot be done")
