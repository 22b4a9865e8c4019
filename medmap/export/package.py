"""What every export has: a model that may be given away, a folder that appears whole or not at all, and a licence."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import medmap
from medmap.card import ModelFolder, choose_scheme, read_model
from medmap.config import Config
from medmap.errors import InputError
from medmap.run import read_run, steps_done
from medmap.scores import SUMMARY, table_text

FORMAT = 1
LICENCE = "LICENSE"
SHIPPED_LICENCE = "Apache-2.0"
NO_LICENCE = "No licence was given for these weights. Ask whoever made them before you use them.\n"
NOT_A_DEVICE = "Not a medical device: for research, and never the only ground of a decision about a person."


@dataclass(frozen=True)
class Package:
    """What was written.

    folder: where; files: {name in it: bytes}; checked: what was compared, and how far apart it was
    """

    folder: Path
    files: Mapping[str, int]
    checked: Mapping[str, Any] = field(default_factory=dict)


def read_exportable(path: Path, which: str = "best") -> ModelFolder:
    """A model that may be given away. Raises CheckpointError where there is none, InputError for a run that has not
    done all its steps."""
    model = read_model(path, which)
    for run in model.runs:
        done, steps = steps_done(run) or (0, 0)
        if done < steps:
            raise InputError(
                f"{run}: training stopped at step {done} of {steps}; a finished run is expected. Go on with "
                f"`medmap train --resume {run}`"
            )
    return model


def members(model: ModelFolder) -> dict[str, Path]:
    """{folder of a member within the model, "" for the model itself: its run}."""
    return {run.relative_to(model.path).as_posix().removeprefix("."): run for run in model.runs}


def public_config(run: Path) -> Config:
    """A run's configuration without places of the machine that trained it."""
    config, _ = read_run(run)
    split = config.data.split
    split = Path(split).name if split.endswith(".json") else split
    return config.model_copy(update={"data": config.data.model_copy(update={"store": "", "split": split})})


def public_summary(model: ModelFolder) -> dict[str, Any] | None:
    """What was measured on held-out patients, the Dice rows alone; None where nobody measured, or other weights."""
    try:
        summary = json.loads((model.path / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not model.measured(summary):
        return None
    dice = {part: [row for row in summary[part] if row["metric"] == "dice"] for part in ("rows", "groups", "present")}
    kept = ("evaluated", "runs", "checkpoint", "convention", "cases", "patients", "modalities", "regions")
    return {key: summary[key] for key in kept if key in summary} | dice


def licence_text(model: ModelFolder, licence: str | None) -> str:
    """The text of the file LICENSE.

    licence: a file, or the name that SPDX has for it; for what comes with medmap it is Apache-2.0

    Raises InputError for neither.

    >>> from medmap.card import read_model
    >>> licence_text(read_model(), None).splitlines()[0]
    'SPDX-License-Identifier: Apache-2.0'
    """
    if licence is None and model.shipped:
        licence = SHIPPED_LICENCE
    if licence is None:
        return NO_LICENCE
    if Path(licence).is_file():
        return Path(licence).read_text(encoding="utf-8")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9.+-]*", licence) or Path(licence).suffix in (".txt", ".md"):
        raise InputError(
            f"licence {licence!r}: no such file, and no name of a licence; give --licence a file that may be read, or "
            "an SPDX name such as Apache-2.0 or CC-BY-4.0"
        )
    return f"SPDX-License-Identifier: {licence}\n\nThe text of the licence: https://spdx.org/licenses/{licence}.html\n"


def licence_name(text: str) -> str:
    """The SPDX name in a licence's text, or what stands for it.

    >>> licence_name(NO_LICENCE), licence_name("All rights reserved.")
    ('no licence was given', 'see LICENSE')
    """
    found = re.match(r"SPDX-License-Identifier: (\S+)", text)
    return "no licence was given" if text == NO_LICENCE else found[1] if found else f"see {LICENCE}"


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name ``out`` when all is done; nothing is left of it where it is not.

    Raises InputError where there is something already, or nothing may be written.
    """
    absent(out)
    fresh = out.absolute().with_name(f".{out.name}.{os.getpid()}")
    try:
        fresh.mkdir(parents=True)
        yield fresh
        os.replace(fresh, out)
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written ({error.strerror or error}); name a place with -o that may be written to and "
            "has room"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def absent(out: Path) -> None:
    """Raises InputError where there is something of that name."""
    if out.exists():
        raise InputError(f"{out}: is there already; name a folder with -o that does not exist yet, or remove this one")


def packed(out: Path, checked: Mapping[str, Any] | None = None) -> Package:
    """What lies in a folder."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return Package(out, {file.relative_to(out).as_posix(): file.stat().st_size for file in files}, checked or {})


def readme(model: ModelFolder, title: str, use: str, licence: str) -> str:
    """What a stranger is told: what the model is for, how it is used, and how good it was."""
    scheme, count = choose_scheme(model.scheme), len(model.runs)
    grid = "each data set's own spacing" if model.spacing_mm is None else f"{model.spacing_mm:g} mm"
    codes = ", ".join(f"{code} {name}" for name, code in scheme.codes.items())
    summary = public_summary(model)
    about = f"It is {model.about.partition(';')[0]}. " if model.about else ""
    text = (
        f"# {title}\n\n"
        f"Segments {', '.join(scheme.regions)} from any of {', '.join(model.modalities)}, at {grid}; "
        f"{'one network' if count == 1 else f'{count} networks, which vote by the mean of their probabilities'}. "
        f"Codes of a mask: {codes}.\n\n{about}{NOT_A_DEVICE}\n\n{use}\n"
    )
    if summary is None:
        text += "\nNobody has measured these weights on held-out patients.\n"
    else:
        text += f"\nMeasured on held-out patients ({summary['evaluated']}):\n\n```\n{table_text(summary)}\n```\n"
    return f"{text}\nLicence: {licence_name(licence)}. Made by medmap {medmap.__version__}.\n"
