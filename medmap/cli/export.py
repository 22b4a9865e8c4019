"""The verb that gives a model away: as ONNX graphs, as a MONAI bundle, as a clean folder."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medmap.cli import beforehand, console
from medmap.cli.options import Checkpoint, DryRun, Json, Which

if TYPE_CHECKING:
    from medmap.card import ModelFolder
    from medmap.export.package import Package


class Form(StrEnum):
    """What a model is written as."""

    onnx = "onnx"
    bundle = "bundle"
    folder = "folder"


PACKAGES = {
    Form.onnx: ("onnx", "onnxscript", "onnxruntime"),
    Form.bundle: ("monai", "ignite", "fire"),
    Form.folder: (),
}
"""What must be installed to write a form, or to use it."""


def export(
    to: Annotated[
        Form,
        typer.Option("--to", help="ONNX graphs, a MONAI bundle, or a folder for medmap predict --model."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FOLDER", help="A folder that does not exist yet.")],
    run: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="Run, or folder of folds.", show_default="what comes with medmap"),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--licence", metavar="FILE|SPDX", help="Of the weights: a text, or a name such as CC-BY-4.0."),
    ] = None,
    checkpoint: Which = Checkpoint.best,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Write a trained model in a form to give away.

    medmap export RUN --to onnx -o FOLDER

    Nothing of patients, of training or of this machine goes along. Several folds go together and answer together.
    """
    console.MANNER.json = json
    from medmap.card import SHIPPED
    from medmap.export.package import NO_LICENCE, absent, licence_text, read_exportable

    model = read_exportable(run or SHIPPED, checkpoint.value)
    absent(out)
    beforehand.writable(out.parent, "the model")
    beforehand.packages("export", *PACKAGES[to])
    weights = _weight_bytes(model)
    beforehand.room(out, 3 * weights, "the model")
    if licence_text(model, licence) == NO_LICENCE:
        console.warn("no licence was given (--licence FILE|SPDX): nobody may use these weights, and the folder says so")
    if dry_run:
        _say_plan(model, to, out, weights)
        return
    console.say(f"{to}: {console.count(len(model.runs), 'network')} for {', '.join(model.modalities)}")
    package = _write(model, to, out, licence)
    if json:
        console.answer_json({"folder": str(out), "to": to.value, "files": package.files, "checked": package.checked})
        return
    for name, size in package.files.items():
        console.answer(f"{_size(size)}  {name}")
    if package.checked:
        on = " and ".join(package.checked["on"])
        console.say(
            f"checked: no probability is more than {package.checked['largest_difference']:.1g} from torch's, on {on}, "
            f"with all subsets; at most {package.checked['tolerance']:g} is allowed"
        )
    console.answer(f"{out}: {console.count(len(package.files), 'file')}, {sum(package.files.values()) / 1e6:.1f} MB")


def _write(model: ModelFolder, to: Form, out: Path, licence: str | None) -> Package:
    if to is Form.onnx:
        from medmap.export.onnx import export_onnx

        return export_onnx(model, out, licence)
    if to is Form.bundle:
        from medmap.export.bundle import export_bundle

        return export_bundle(model, out, licence)
    from medmap.export.folder import export_folder

    return export_folder(model, out, licence)


def _weight_bytes(model: ModelFolder) -> int:
    """What the weights of a model take on the disk."""
    smoothed = [folder / "ema.safetensors" for folder in model.checkpoints]
    files = [file if file.is_file() else file.with_name("model.safetensors") for file in smoothed]
    return sum(file.stat().st_size for file in files if file.is_file())


def _size(count: int) -> str:
    """Bytes as people read them, in a column.

    >>> _size(62), _size(5_869_168)
    ('    0.1 kB', '    5.9 MB')
    """
    return f"{count / 1e6:7.1f} MB" if count >= 1e5 else f"{count / 1e3:7.1f} kB"


def _say_plan(model: ModelFolder, to: Form, out: Path, weights: int) -> None:
    plan = {"model": str(model.path), "to": to.value, "would_make": str(out), "networks": len(model.runs)}
    if console.MANNER.json:
        console.answer_json({"dry_run": True, **plan, "weights_bytes": weights})
        return
    networks = console.count(len(model.runs), "network")
    console.answer(f"would write {out} as {to}: {networks}, {weights / 1e6:.1f} MB of weights on the disk now")
