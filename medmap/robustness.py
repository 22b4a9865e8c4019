"""The robustness card of a model: what every subset of sequences is worth, on whom it was measured, and what is lost.

    card.json   everything below as data
    card.md     for a reader: intended use, training, every subset × region with interval, what each sequence is worth
    card.png    the same as a picture, where matplotlib is installed

Written beside summary.json, from which the numbers are; `medmap predict` quotes the row that applies.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import Any

from medmap.card import CARD_JSON, CARD_PICTURE, CARD_TEXT, GOOD_DICE, ModelFolder, percent
from medmap.config import Config
from medmap.run import ENV, SPLITS, read_run, write_text
from medmap.scores import SUMMARY

FORMAT = 1
WIDTH = 120

USE = (
    "Not a medical device: for research, and never the only ground of a decision about a person. The numbers hold for "
    "patients and scanners like those it was measured on; elsewhere, measure again "
    "(`medmap evaluate RUN --data PATIENTS`)."
)


def write_card(model: ModelFolder, place: Path) -> dict[str, Any]:
    """Put the card of a model into a folder that `medmap evaluate` wrote (summary.json); returns card.json.

    Raises OSError where the folder is none.
    """
    summary = json.loads((place / SUMMARY).read_text(encoding="utf-8"))
    card = card_of(model, summary)
    write_text(place / CARD_JSON, json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    drawn = find_spec("matplotlib") is not None
    if drawn:
        from medmap.figures import subset_heatmap

        subset_heatmap(summary).savefig(place / CARD_PICTURE, dpi=110)
    write_text(place / CARD_TEXT, "\n".join(card_text(card, picture=drawn)) + "\n")
    return card


def card_of(model: ModelFolder, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The card as data: who made the model from what, on whom it was measured, and the Dice part of a summary."""
    configs = [read_run(run)[0] for run in model.runs]

    def dice(part: str) -> list[Any]:
        return [{k: v for k, v in row.items() if k != "metric"} for row in summary[part] if row["metric"] == "dice"]

    return {
        "format": FORMAT,
        "model": {
            "network": f"{configs[0].model.name} {configs[0].model.size}",
            "parameters": model.parameters,
            "align": configs[0].align.anchor,
            "networks": len(model.runs),
            "sequences": list(model.modalities),
            "regions": {region: list(members) for region, members in model.scheme.regions.items()},
            "spacing_mm": model.spacing_mm,
            "weights_sha256": model.weights_sha256,
        },
        "training": [_training(run, config) for run, config in zip(model.runs, configs, strict=True)],
        "measured": {key: summary[key] for key in ("evaluated", "cases", "patients", "convention", "store")},
        "dice": dice("rows"),
        "dice_of_groups": dice("groups"),
        "dice_where_present": dice("present"),
        "lost_without": dice("cost"),
    }


def _training(run: Path, config: Config) -> dict[str, Any]:
    """On whom, and for how long; a model that was given away may not say on how many."""
    about: dict[str, Any] = {"steps": config.train.steps, "medmap": _json(run / ENV).get("medmap")}
    if config.data.source == "phantom":
        return {"on": "simulated patients", "cases": config.phantom.patients, **about}
    split = _json(run / SPLITS)
    return {"on": "cases", "cases": len(split["train"]) if split else None, "split": split.get("name"), **about}


def _json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def card_text(card: Mapping[str, Any], *, picture: bool) -> Iterator[str]:
    """The card as lines of Markdown."""
    made, measured = card["model"], card["measured"]
    yield "# Robustness card"
    yield ""
    yield fill(f"{_made(made)} {_trained(card['training'])} {USE}", WIDTH)
    yield ""
    yield fill(
        f"Measured on {measured['evaluated']}: {measured['cases']} held-out cases of {measured['patients']} patients. "
        f"Empty regions count by the rule `{measured['convention']}`. Dice in percent: mean [95 % interval], "
        "below it the range in which 8 of 10 cases lay. One case in ten was worse than its lower end.",
        WIDTH,
    )
    yield ""
    if picture:
        yield f"![Mean Dice of every subset of sequences and region]({CARD_PICTURE})"
        yield ""
    yield "## What to expect"
    yield ""
    regions = list(dict.fromkeys(row["region"] for row in card["dice"]))
    yield from _table(["sequences given", *regions], _subset_rows(card, regions))
    yield ""
    low = f"{100 * GOOD_DICE:.0f}"
    yield f"Below {low} do not use a region for volumetry; `medmap predict --abstain {GOOD_DICE}` leaves it out."
    yield ""
    if card["dice_where_present"]:
        yield "Not every patient has every region. Over those who have it:"
        yield ""
        present = {**card, "dice": [row for row in card["dice_where_present"] if "subset" in row]}
        some = list(dict.fromkeys(row["region"] for row in present["dice"]))
        yield from _table(["sequences given", *some], _subset_rows(present, some))
        yield ""
    yield "## What a missing sequence costs"
    yield ""
    yield "Dice in percentage points that are lost without it, mean over the subsets that have it and others:"
    yield ""
    losses = {(row["sequence"], row["region"]): row for row in card["lost_without"]}
    rows = [[name, *(_interval(losses.get((name, region))) for region in regions)] for name in made["sequences"]]
    yield from _table(["without", *regions], rows)


def _made(made: Mapping[str, Any]) -> str:
    several = f"{made['networks']} networks that answer together, each a" if made["networks"] > 1 else "A"
    spacing = "" if made["spacing_mm"] is None else f", at {made['spacing_mm']:g} mm"
    align = "without alignment" if made["align"] == "none" else f"aligned to {made['align']}"
    sequences = ", ".join(made["sequences"])
    size = f"{made['parameters'] / 1e6:.1f} M parameters"
    return f"{several} {made['network']} ({size}), {align}, for {sequences}, any of them{spacing}."


def _trained(training: Sequence[Mapping[str, Any]]) -> str:
    first = training[0]
    cases = sorted({str(part["cases"]) for part in training if part["cases"] is not None}, key=int)
    many = f"{' or '.join(cases)} {first['on']}" if cases else first["on"]
    also = ", and on no patient" if first["on"] != "cases" else ""
    return f"Trained on {many} for {first['steps']} steps{also}."


def _subset_rows(card: Mapping[str, Any], regions: Sequence[str]) -> Iterator[list[str]]:
    table = {(row["subset"], row["region"]): row for row in card["dice"]}
    for subset in dict.fromkeys(row["subset"] for row in card["dice"]):
        found = [table.get((subset, region)) for region in regions]
        yield [subset, *(_interval(row) + _spread(row) + _over(row, card["measured"]["cases"]) for row in found)]


def _interval(row: Mapping[str, Any] | None) -> str:
    if row is None or row["mean"] is None:
        return "–"
    bounds = "" if row["low"] is None else f" [{percent(row['low'])}, {percent(row['high'])}]"
    return f"{percent(row['mean'])}{bounds}"


def _spread(row: Mapping[str, Any] | None) -> str:
    return "" if row is None or row["p10"] is None else f"<br>{percent(row['p10'])} – {percent(row['p90'])}"


def _over(row: Mapping[str, Any] | None, cases: int) -> str:
    return "" if row is None or row["n"] == cases else f"<br>n = {row['n']}"


def _table(head: Sequence[str], rows: Iterator[list[str]] | list[list[str]]) -> Iterator[str]:
    for cells in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cells)} |"
