"""A run folder becomes one HTML file: everything inlined, nothing loaded from a network, no path of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from medmap.figures.style import METRIC_NAMES, REGION_NAMES, label
from medmap.figures.subsets import cells, columns, order_subsets
from medmap.report.html import part, render, unplaced, write_page
from medmap.report.pictures import convention, evaluated_on, pictures_of
from medmap.report.run import Run, read_run

__all__ = ["Run", "read_run", "write_report"]

Summary = Mapping[str, Any]


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of a run, or of a folder of folds, to ``out`` (RUN/report.html where None).

    Raises InputError when the folder does not exist or ``out`` cannot be written, CheckpointError when the folder is
    not a run or a file in it is damaged. The file appears whole or not at all.
    """
    return write_page(_page(read_run(run)), run / "report.html" if out is None else out)


def _page(run: Run) -> str:
    summary = run.summary
    return render(
        "page.html.j2",
        style=part("page.css"),
        run=run,
        recipe=_recipe(run),
        evaluated=evaluated_on(summary) if summary else "",
        convention=convention(summary) if summary else "",
        glossary=_glossary(summary) if summary else "",
        headline=_headline(summary) if summary else [],
        regions=columns(summary) if summary else [],
        pictures=list(pictures_of(run)),
        warnings=_warnings(run),
        table=_table(summary) if summary else [],
        metrics=_metrics(summary) if summary else {},
        config=yaml.safe_dump(unplaced(run.config), sort_keys=False, allow_unicode=True),
        facts=_facts(run),
        splits=[_split(name, split) for name, split in run.splits.items()],
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
        "precision": "aligned to the precision-weighted mean",
        "moments": "channel moments aligned",
        "ema": "aligned to remembered channel moments",
        "gated": "aligned to a mixture by the case",
        "lckd": "taught by the sequence that is best on validation (LCKD)",
    }
    anchor = anchors.get(str(align.get("anchor")), f"anchor {align.get('anchor')}")
    if align.get("anchor") != "none":
        anchor += f" at {', '.join(align.get('levels') or ['?'])}, α = {align.get('alpha')}"
    patch = " × ".join(str(n) for n in train.get("patch") or ["?"])
    return (
        f"{model.get('name')} ({model.get('size')}), {anchor}; {train.get('steps')} steps of "
        f"{train.get('batch_size')} crops of {patch} voxels; seed {run.config.get('seed')}"
    )


def _warnings(run: Run) -> list[str]:
    """What training warned of, and when."""
    return [
        f"{f'{name}, ' if len(run.folds) > 1 else ''}step {record['step']}: {record['text']}"
        for name, log in run.logs.items()
        for record in log
        if record["kind"] == "warning"
    ]


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
    return [(key, _brief(unplaced(value))) for key, value in facts.items()]


def _brief(value: Any, longest: int = 160) -> str:
    text = ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)
    return text if len(text) <= longest else f"{text[:longest]}…"


def _split(fold: str, split: Mapping[str, Any]) -> dict[str, Any]:
    parts = {part: split.get(part) or [] for part in ("train", "val", "test")}
    return {"fold": fold, "name": split.get("name"), "sha256": split.get("sha256"), "parts": parts}
