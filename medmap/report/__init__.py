"""A run folder becomes one HTML file: everything inlined, nothing loaded from a network, no path of this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml

from medmap import __version__
from medmap.errors import InputError
from medmap.figures.style import METRIC_NAMES, REGION_NAMES, label, number
from medmap.figures.subsets import cells, columns, order_subsets
from medmap.report.pictures import convention, evaluated_on, pictures_of
from medmap.report.run import Run, read_run

__all__ = ["Run", "read_run", "write_report"]

Summary = Mapping[str, Any]


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of a run, or of a folder of folds, to ``out`` (RUN/report.html where None).

    Raises InputError when the folder does not exist or ``out`` cannot be written, CheckpointError when the folder is
    not a run or a file in it is damaged. The file appears whole or not at all.
    """
    out = run / "report.html" if out is None else out
    page = _page(read_run(run))
    part = out.with_name(f".{out.name}.part")
    try:
        part.write_text(page, encoding="utf-8")
        os.replace(part, out)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise InputError(
            f"{out}: the report cannot be written ({error.strerror}); name a file in a folder you may write to: -o FILE"
        ) from error
    return out


def _page(run: Run) -> str:
    template = resources.files("medmap.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"label": label, "number": number}
    summary = run.summary
    return environment.from_string(template).render(
        run=run,
        recipe=_recipe(run),
        evaluated=evaluated_on(summary) if summary else "",
        convention=convention(summary) if summary else "",
        glossary=_glossary(summary) if summary else "",
        headline=_headline(summary) if summary else [],
        regions=columns(summary) if summary else [],
        pictures=list(pictures_of(run)),
        table=_table(summary) if summary else [],
        metrics=_metrics(summary) if summary else {},
        config=yaml.safe_dump(_unplaced(run.config), sort_keys=False, allow_unicode=True),
        facts=_facts(run),
        splits=[_split(name, split) for name, split in run.splits.items()],
        version=__version__,
    )


# ---------------------------------------------------------------------------------------------- words and numbers


def _recipe(run: Run) -> str:
    model, align, train = (_section(run.config, key) for key in ("model", "align", "train"))
    fixed = align.get("fixed") or "?"
    anchors = {
        "none": "no alignment (α = 0)",
        "pstar": "aligned to P* (learned mixture)",
        "pk": f"aligned to {label(str(fixed))} (P^k)",
        "pn": "aligned to the standard normal (P^N)",
        "uniform": "aligned to the plain mean",
    }
    anchor = anchors.get(str(align.get("anchor")), f"anchor {align.get('anchor')}")
    if align.get("anchor") != "none":
        anchor += f" at {', '.join(align.get('levels') or ['?'])}, α = {align.get('alpha')}"
    patch = " × ".join(str(n) for n in train.get("patch") or ["?"])
    return (
        f"{model.get('name')} ({model.get('size')}), {anchor}; {train.get('steps')} steps of "
        f"{train.get('batch_size')} crops of {patch} voxels; seed {run.config.get('seed')}"
    )


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = config.get(key)
    return found if isinstance(found, dict) else {"name": found, "anchor": found}


def _glossary(summary: Summary) -> str:
    names = [f"{region} {REGION_NAMES[region]}" for region in summary["regions"] if region in REGION_NAMES]
    if any(region.endswith("-pp") for region in columns(summary)):
        names.append("-pp: a predicted region below the configured volume is dropped")
    return ", ".join(names)


def _headline(summary: Summary) -> list[dict[str, Any]]:
    """[{name, cells: [row or None]}]: with every sequence, then the groups' means."""
    regions, table = columns(summary), cells(summary, "dice")
    full = frozenset(summary["modalities"])
    groups: dict[str, dict[str, Any]] = {}
    for row in summary.get("groups", []):
        if row["metric"] == "dice":
            groups.setdefault(row["group"], {})[row["region"]] = row
    lines = [{"name": "all sequences given", "cells": [table.get((full, region)) for region in regions]}]
    names = {"all subsets": f"mean over all {2 ** len(full) - 1} subsets"}
    for name, found in groups.items():
        title = names.get(name, f"subsets {label(name)}")
        lines.append({"name": title, "cells": [found.get(region) for region in regions]})
    return lines


def _metrics(summary: Summary) -> dict[str, str]:
    found = {row["metric"] for row in summary["rows"]}
    return {metric: name for metric, name in METRIC_NAMES.items() if metric in found}


def _table(summary: Summary) -> list[dict[str, Any]]:
    """One line a subset and region: the mean of every metric, and the median of the distances."""
    tables = {metric: cells(summary, metric) for metric in _metrics(summary)}
    return [
        {
            "subset": label("+".join(name for name in summary["modalities"] if name in subset)),
            "first": region == columns(summary)[0],
            "region": region,
            "cells": [(metric, table.get((subset, region))) for metric, table in tables.items()],
        }
        for subset in order_subsets(summary["modalities"])
        for region in columns(summary)
    ]


def _facts(run: Run) -> list[tuple[str, str]]:
    """What made these numbers: versions, machine, data."""
    facts = dict(run.env)
    if run.summary:
        facts |= {f"data: {key}": value for key, value in (run.summary.get("store") or {}).items()}
    return [(key, _brief(_unplaced(value))) for key, value in facts.items()]


def _brief(value: Any, longest: int = 160) -> str:
    text = ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)
    return text if len(text) <= longest else f"{text[:longest]}…"


def _split(fold: str, split: Mapping[str, Any]) -> dict[str, Any]:
    parts = {part: split.get(part) or [] for part in ("train", "val", "test")}
    return {"fold": fold, "name": split.get("name"), "sha256": split.get("sha256"), "parts": parts}


_PLACE = re.compile(r"""(?<![^\s='"(\[,;])(?:~|\.{1,2}|[A-Za-z]:)?[/\\][^\s'",;)\]]+""")


def _unplaced(value: Any) -> Any:
    """The value with every path cut down to its last name: a report is passed on, a user's folders are not.

    >>> _unplaced({"store": "/home/ann/stores/glioma", "run": "medmap train -o ../x/y", "ratio": "n/a"})
    {'store': 'glioma', 'run': 'medmap train -o y', 'ratio': 'n/a'}
    """
    if isinstance(value, Mapping):
        return {key: _unplaced(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_unplaced(item) for item in value]
    if isinstance(value, str):
        return _PLACE.sub(lambda found: re.split(r"[/\\]", found.group().rstrip("/\\"))[-1], value)
    return value
