"""Options that several verbs share, so that they read and mean the same everywhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from medmap.errors import InputError

COMMON = (
    "Everywhere: -v more words, -q fewer, --debug shows tracebacks. "
    "Exit codes: 0 ok, 1 error, 2 usage, 3 some cases failed."
)


class Checkpoint(StrEnum):
    """Which weights of a run."""

    best = "best"
    last = "last"


class Precision(StrEnum):
    """Arithmetic of a prediction."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Engine(StrEnum):
    """What computes a prediction."""

    auto = "auto"
    torch = "torch"
    openvino = "openvino"


class Kind(StrEnum):
    """Number type of probabilities on disk."""

    float16 = "float16"
    float32 = "float32"


class RayCommand(TyperCommand):
    """``--ray`` may have an address or none."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _with_address(args))


def _with_address(args: Sequence[str]) -> list[str]:
    """What follows --ray is its value only where it is an address, so that an argument may follow as well.

    >>> _with_address(["--ray", "auto", "RUN"]), _with_address(["--ray", "RUN"]), _with_address(["RUN", "--ray"])
    (['--ray', 'auto', 'RUN'], ['--ray=local', 'RUN'], ['RUN', '--ray=local'])
    """
    following = [*args[1:], ""]
    return [
        "--ray=local" if arg == "--ray" and not re.fullmatch(r"auto|local|(ray://)?[^\s/]+:\d+", after) else arg
        for arg, after in zip(args, following, strict=False)
    ]


_ORDER = "medmap.named"


def _noted(ctx: typer.Context, param: typer.CallbackParam, value: Any) -> Any:
    """Options arrive by name; the order in which they were typed says whose grid the result gets."""
    if value:
        ctx.meta.setdefault(_ORDER, []).append(param.name)
    return value


def _file(name: str, what: str) -> Any:
    return typer.Option(f"--{name}", metavar="FILE", help=what, callback=_noted)


def _alias(name: str) -> Any:
    return typer.Option(f"--{name}", metavar="FILE", hidden=True, callback=_noted)


def images_named(ctx: typer.Context) -> dict[str, Path]:
    """{sequence as it was typed: file}, in the order of the command line."""
    found: dict[str, Path] = {}
    for option in ctx.meta.get(_ORDER, []):
        if option != "image":
            found[option] = ctx.params[option]
            continue
        for pair in ctx.params["image"]:
            name, sign, file = pair.partition("=")
            if not sign or not name.strip() or not file:
                raise typer.BadParameter(f"found {pair!r}; expected NAME=FILE, as adc=a.nii.gz", param_hint="--image")
            if name.strip() in found:
                raise InputError(f"{name} is named twice: {found[name.strip()]} and {file}; name each sequence once")
            found[name.strip()] = Path(file)
    return found


T1n = Annotated[Path | None, _file("t1n", "T1, native.")]
T1c = Annotated[Path | None, _file("t1c", "T1 with contrast agent.")]
T2w = Annotated[Path | None, _file("t2w", "T2.")]
T2f = Annotated[Path | None, _file("t2f", "T2-FLAIR.")]
T1 = Annotated[Path | None, _alias("t1")]
T1ce = Annotated[Path | None, _alias("t1ce")]
T2 = Annotated[Path | None, _alias("t2")]
Flair = Annotated[Path | None, _alias("flair")]
Image = Annotated[
    list[str] | None, typer.Option("--image", metavar="NAME=FILE", help="Any other sequence.", callback=_noted)
]
Model = Annotated[
    Path | None,
    typer.Option(
        "--model",
        metavar="RUN",
        help="Run, or folder of folds: their probabilities are averaged.",
        show_default="what comes with medmap, trained on no patient",
    ),
]
Raw = Annotated[bool, typer.Option("--raw", help="Keep enhancing tumour however small.")]
Resample = Annotated[
    bool, typer.Option("--resample", help="Bring registered images of other grids onto the first one named.")
]
Arithmetic = Annotated[Precision, typer.Option("--precision", help="Arithmetic.")]
Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
Modalities = Annotated[str, typer.Option("--modalities", metavar="LIST", help="Sequences, such as t1c+t2f.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be done; write nothing.")]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Spread cases over a Ray cluster: auto, HOST:PORT, ray://HOST:PORT; or over this machine's cores or GPUs "
        "where no address follows. All machines must see the same files.",
    ),
]
Which = Annotated[Checkpoint, typer.Option("--checkpoint", help="Weights of a run to use.")]
Labels = Annotated[
    str | None,
    typer.Option("--labels", metavar="NAME", help="Label map: brats2021, brats2023, brats2024, msd, liver."),
]
Spacing = Annotated[
    float | None,
    typer.Option("--spacing", metavar="MM", help="Edge of the cubic voxels; each case's own where not given."),
]
Deep = Annotated[bool, typer.Option("--deep", help="Read the voxels too, not only names and headers.")]
RunOrMask = Annotated[
    Path, typer.Argument(metavar="RUN|MASK", help="A run, or its folds; or a mask that `medmap predict` wrote.")
]
