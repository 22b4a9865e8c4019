"""Options that several verbs share, so that they read and mean the same everywhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

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
    typer.Option("--labels", metavar="NAME", help="Label map of the data: brats2021, brats2023, brats2024, msd."),
]
Spacing = Annotated[
    float | None,
    typer.Option("--spacing", metavar="MM", help="Edge of the cubic voxels; each case's own where not given."),
]
Deep = Annotated[bool, typer.Option("--deep", help="Read the voxels too, not only names and headers.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or of its folds.")]
