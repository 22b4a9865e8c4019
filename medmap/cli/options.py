"""Options that several verbs share, so that they read and mean the same everywhere."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

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


class Kind(StrEnum):
    """Number type of probabilities on disk."""

    float16 = "float16"
    float32 = "float32"


Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
Modalities = Annotated[str, typer.Option("--modalities", metavar="LIST", help="Sequences, such as t1c+t2f.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be done; write nothing.")]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")]
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
