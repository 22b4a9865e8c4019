"""Verbs about data: look through it, make some up, prepare it for training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medmap.cli import beforehand, console
from medmap.cli.options import Deep, DryRun, Json, Labels, Spacing
from medmap.errors import InputError

if TYPE_CHECKING:
    from medmap.data.cases import DataFolder
    from medmap.data.check import CheckReport
    from medmap.data.store import Store, StoreReport

DataPath = Annotated[Path, typer.Argument(metavar="PATH", help="Folder of cases, or a CSV table.")]
DataOrStudy = Annotated[
    Path, typer.Argument(metavar="PATH", help="Folder of cases, CSV table, or one DICOM study, a folder or .zip.")
]


def check(path: DataOrStudy, labels: Labels = None, deep: Deep = False, json: Json = False) -> None:
    """Say what is in a data set, and every fault with its cure.

    Layout, label map and on what evidence, who has what, grids, faults. Knows BraTS 2018-2025, MSD Task01, nnU-Net,
    BIDS, phantoms, and a CSV with the columns case,t1n,t1c,t2w,t2f,seg. Of a DICOM study: its series, and what each
    seems to be.
    """
    console.MANNER.json = json
    from medmap.data.dicom import is_study

    if is_study(path):
        if labels is not None:
            raise InputError(f"--labels {labels}: {path} is a DICOM study, which has no masks; leave --labels out")
        _check_study(path, deep)
        return
    from medmap.data.check import check as look_through
    from medmap.data.check import render

    with console.progress("checking") as tell:
        report = look_through(path, labels, deep, lambda done, total: tell(done, total, ""))
    if json:
        console.answer_json(report.to_dict())
    else:
        console.answer(render(report).rstrip())
    raise typer.Exit(report.exit_code)


def _check_study(path: Path, deep: bool) -> None:
    """Print the series of a DICOM study, and what is odd about the voxels of those of use where they are looked at.

    Raises InputError where no series can be used, and as `medmap predict` does where voxels are looked at.
    """
    beforehand.packages("dicom", "pydicom", "dcm2niix")
    from medmap.cli import study
    from medmap.core.modality import GLIOMA_MRI
    from medmap.inputs import examine

    with study.opened(path) as found:
        chosen = study.chosen_series(found, {}, GLIOMA_MRI)
        odd = examine(study.inputs_of(found, chosen, GLIOMA_MRI, resample=False)) if deep else []
        for warning in odd:
            console.warn(warning)
        if console.MANNER.json:
            told = {"path": str(path), "study": study.rows(found, chosen)}
            console.answer_json({**told, "warnings": odd} if deep else told)
    console.answer(f"{path}: DICOM study, {len(found.study.series)} series, of use are {' + '.join(chosen)}")
    console.say(f"next: medmap predict -i {path} -o seg.nii.gz; other verbs want NIfTI: dcm2niix -z y -o FOLDER {path}")


def simulate(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder to write the patients into.")],
    count: Annotated[int, typer.Option("-n", "--number", min=1, metavar="N", help="Number of patients.")],
    seed: Annotated[int, typer.Option("--seed", metavar="S", min=0, help="The same patients for the same seed.")] = 0,
    spacing: Annotated[float, typer.Option("--spacing", metavar="MM", help="Edge of the voxels, 1 to 4.")] = 2.0,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            metavar="X,Y,Z",
            help="Voxels of the box; 240,240,155 at --spacing 1 as in BraTS.",
            show_default="just room enough",
        ),
    ] = None,
    organ: Annotated[
        str, typer.Option("--organ", metavar="NAME", help="brain, with a glioma; or liver, with lesions.")
    ] = "brain",
    modalities: Annotated[
        str | None,
        typer.Option(
            "--modalities",
            metavar="A+B",
            help="Any of the brain's t1n t1c t2w t2f pd t2star dwi adc.",
            show_default="the organ's usual ones",
        ),
    ] = None,
    mode: Annotated[
        str, typer.Option("--mode", metavar="MODE", help="physical, randomised, or the weight of randomised, 0 to 1.")
    ] = "physical",
    gamma: Annotated[
        float, typer.Option("--gamma", metavar="G", help="Random contrast is bent by exponents of at most exp(G).")
    ] = 0.3,
    noise: Annotated[
        float, typer.Option("--noise", metavar="S", help="Its sigma; the brighter of white and grey matter is 1.")
    ] = 0.015,
    correlation: Annotated[
        float, typer.Option("--noise-correlation", metavar="R", help="Of the noise of any two sequences, 0 to 1.")
    ] = 0.0,
    bias_correlation: Annotated[
        float, typer.Option("--bias-correlation", metavar="R", help="Of the coil's bias of any two sequences, 0 to 1.")
    ] = 0.0,
    operated: Annotated[
        float, typer.Option("--operated", metavar="P", help="Share of patients with a resection cavity, 0 to 1.")
    ] = 0.0,
    grown: Annotated[
        float, typer.Option("--grown", metavar="P", help="Share of tumours that grow as tissue lets them, not round.")
    ] = 1.0,
    missing: Annotated[
        float, typer.Option("--missing", metavar="P", min=0, max=1, help="Probability that a sequence does not exist.")
    ] = 0.0,
    layout: Annotated[
        str, typer.Option("--layout", metavar="NAME", help="Names of files and codes of labels: brats2023, brats2021.")
    ] = "brats2023",
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Make up patients with a tumour, as BraTS lays its own out. Goes on where it was interrupted."""
    console.MANNER.json = json
    from medmap.core.modality import ModalitySet
    from medmap.phantom import Settings, write_phantoms
    from medmap.phantom.write import plan_phantoms

    wanted = None
    if modalities is not None:
        wanted = ModalitySet(tuple(name for name in modalities.replace(",", "+").split("+") if name.strip()))
    settings = Settings(
        wanted,
        organ=organ,
        spacing_mm=spacing,
        noise=noise,
        noise_correlation=correlation,
        bias_correlation=bias_correlation,
        randomised=_weight(mode),
        gamma=gamma,
        operated=operated,
        grown=grown,
        shape=_voxels(shape),
    )
    plan_phantoms(out, count, seed, settings, layout=layout, missing=missing)
    beforehand.writable(out, "patients")
    ids: list[str] = []
    if not dry_run:
        with console.progress("simulating") as tell:
            ids = write_phantoms(out, count, seed, settings, layout=layout, missing=missing, on_progress=tell)
    if json:
        console.answer_json({"out": str(out), "dry_run": dry_run, "count": count, "ids": ids})
        return
    grid = "×".join(map(str, settings.box))
    what = f"{console.count(count, 'patient')} with {settings.names} at {spacing:g} mm, {grid} voxels"
    console.answer(f"would write {what} into {out}" if dry_run else f"{out}: {what}, {ids[0]} to {ids[-1]}")
    if not dry_run:
        console.say(f"next: medmap check {out}, or medmap prepare {out} -o STORE")


def _voxels(shape: str | None) -> tuple[int, int, int] | None:
    if shape is None:
        return None
    try:
        x, y, z = (int(n) for n in shape.replace("x", ",").split(","))
    except ValueError:
        raise InputError(f"--shape: found {shape!r}; expected three whole numbers, such as 240,240,155") from None
    return x, y, z


def _weight(mode: str) -> float:
    """Weight of the randomised mode."""
    named = {"physical": 0.0, "randomised": 1.0}
    try:
        return named[mode] if mode in named else float(mode)
    except ValueError:
        raise InputError(
            f"--mode: found {mode!r}; expected physical, randomised, or the weight of randomised from 0 to 1"
        ) from None


def prepare(
    path: DataPath,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="STORE", help="Folder of the prepared data.")],
    spacing: Spacing = None,
    labels: Labels = None,
    deep: Deep = False,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Prepare a data set for training.

    RAS, one spacing, each sequence normalised inside its own brain. Goes on where it was interrupted. A case that
    cannot be prepared, or in which check finds an error, is named and left out (exit code 3).
    """
    console.MANNER.json = json
    beforehand.existing(path, "a folder of cases or a CSV table")
    beforehand.writable(out, "the store")
    from medmap.data.check import check as look_through
    from medmap.data.store import plan_store

    with console.progress("checking") as tell:
        found = look_through(path, labels, deep, lambda done, total: tell(done, total, ""))
    _say_notes(found.folder)
    if dry_run:
        if not found.folder.undecided:
            plan_store(found.folder, out, spacing)
        if json:
            console.answer_json({"store": str(out), "dry_run": True, **found.to_dict()})
        else:
            console.answer(f"would prepare {describe(found.folder, spacing)}\ninto {out}")
            for fault in found.faults:
                if fault.severity == "error":
                    console.warn(f"{fault.case or path}: {fault.what}; {fault.cure}")
        none = len(found.unusable) == len(found.folder.cases)
        raise typer.Exit(1 if none or found.folder.undecided else 3 if found.unusable else 0)
    console.say(describe(found.folder, spacing))
    store, report = fill_store(found.folder, out, spacing, found)
    if json:
        console.answer_json(
            {
                "store": str(out),
                "sha256": store.sha256,
                "cases": len(store.ids),
                "prepared": list(report.done),
                "unchanged": list(report.skipped),
                "failed": dict(report.failed),
                "spacing_mm": store.spacing_mm,
                "modalities": list(store.modalities),
                "scheme": None if store.scheme is None else store.scheme.name,
                "notes": list(found.folder.notes),
            }
        )
    else:
        kept = f", {len(report.skipped)} of them as they were" if report.skipped else ""
        failed = f"; {len(report.failed)} failed" if report.failed else ""
        console.answer(f"{out}: {console.count(len(store.ids), 'case')}{kept}{failed}")
        console.answer(f"store hash {store.sha256}")
        console.say(f"next: medmap train -d {out} -o RUN")
    raise typer.Exit(3 if report.failed else 0)


def describe(folder: DataFolder, spacing_mm: float | None) -> str:
    """What will be prepared, in one line."""
    patients = console.count(len({case.patient for case in folder.cases}), "patient")
    labels = "no label map" if folder.scheme is None else f"labels {folder.scheme.name} ({folder.evidence})"
    grid = "each case's own spacing" if spacing_mm is None else f"{spacing_mm:g} mm"
    cases, names = console.count(len(folder.cases), "case"), " ".join(folder.modalities)
    return f"{folder.root}: {cases} of {patients}, {names}, {labels}, {grid}"


def _say_notes(folder: DataFolder) -> None:
    """Warn of what was chosen or left out where a folder holds more than one file for something."""
    for note in folder.notes:
        console.warn(note)


def fill_store(
    folder: DataFolder, out: Path, spacing_mm: float | None, found: CheckReport | None = None
) -> tuple[Store, StoreReport]:
    """Prepare a data folder and open the store; cases that failed are named in warnings. found: what check says"""
    from medmap.data.store import Store, write_store

    with console.progress("preparing") as tell:
        report = write_store(folder, out, spacing_mm, report=found, on_progress=tell)
    for case, reason in report.failed.items():
        console.warn(f"left out {case}: {reason.removeprefix(f'case {case}: ')}")
    return Store(out), report


def open_data(path: Path, beside: Path, spacing_mm: float | None, labels: str | None) -> tuple[Store, dict[str, str]]:
    """A store, or a data folder prepared into ``beside``; with the reasons of the cases that were left out.

    spacing_mm: what the cases must be at; for a store, any where None. Raises InputError for a store at another.
    """
    from medmap.data.layouts import recognise
    from medmap.data.store import Store, refuse_other_spacing

    beforehand.existing(path, "a store that `medmap prepare` wrote, or a folder of cases")
    if is_store(path):
        store = Store(path.resolve())
        refuse_other_spacing(store, spacing_mm)
        return store, {}
    folder = recognise(path, labels)
    _say_notes(folder)
    console.say(f"{describe(folder, spacing_mm)}; prepared into {beside}")
    store, report = fill_store(folder, beside.resolve(), spacing_mm)
    return store, dict(report.failed)


def is_store(path: Path) -> bool:
    """Whether `medmap prepare` wrote the folder."""
    return (path / "manifest.json").is_file()
