"""What `medmap predict` says of masks: of those it made, and of those it would make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medmap.cli import console
from medmap.segment import Task


def say_mask(mask: Path, record: dict[str, Any], alone: bool) -> None:
    """A mask's volumes and origin in a line; of one patient ``alone`` also what to expect of it."""
    from medmap.card import expectation
    from medmap.confidence import confidence_text

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
    for region, why in record["left_out"].items():
        console.say(f"{region} left out: {why}")
    if alone and record["probabilities"]:
        temperature = record["probabilities"]["temperature"]
        nobody = "as the network gives them; nobody has measured from these sequences how right they are"
        console.say(f"probabilities: {nobody if temperature is None else f'calibrated, temperature {temperature:.2f}'}")
    if alone and record["expected"]:
        for line in expectation(record["expected"]):
            console.say(line)
    elif alone:
        console.say("expect: unknown, nobody has evaluated this model on held-out cases (medmap evaluate)")
    if alone and record["confidence"]:
        for line in confidence_text(record["confidence"]):
            console.say(line)


def say_plan(
    model: Path, tasks: list[Task], skipped: list[str], failed: dict[str, str], notes: tuple[str, ...]
) -> None:
    """What a dry run found."""
    plan = {
        "model": str(model),
        "would_make": {
            str(task.mask): {n: task.inputs.worded(str(ref.path)) for n, ref in task.inputs.files.images.items()}
            for task in tasks
        },
        "skipped": skipped,
        "failed": failed,
        "notes": list(notes),
    }
    if console.MANNER.json:
        console.answer_json({"dry_run": True, **plan})
        return
    for task in tasks:
        console.answer(f"would make {task.mask} from {' + '.join(task.inputs.files.images)}")
    console.answer(f"{len(tasks)} to make, {len(skipped)} there already, {len(failed)} cannot be done")
