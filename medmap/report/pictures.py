"""The figures of a report with the words that go with them: what to see, and what not to conclude."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from medmap import figures
from medmap.core.labels import SCHEMES
from medmap.core.metrics import CONVENTIONS
from medmap.core.spread import modality_gap
from medmap.figures.style import label, number
from medmap.report.run import Run

Summary = Mapping[str, Any]


EFFECT = "What alignment did"


@dataclass(frozen=True)
class Picture:
    """A figure with its words. ``image`` is a data URI, or empty where ``missing`` says why there is none.

    ``after``: title of the picture below which this one is folded away; empty for one that stands by itself.
    """

    title: str
    caption: str = ""
    image: str = ""
    missing: str = ""
    command: str = ""
    after: str = ""


def pictures_of(run: Run) -> Iterator[Picture]:
    """Every figure of the report, in the order in which it is told."""
    if run.summary:
        yield from _evaluated(run.summary)
    else:
        yield Picture("Every subset of sequences", missing="Not evaluated yet.", command="medmap evaluate RUN")
    if run.summary:
        yield _reliability(run)
    yield _examples(run)
    yield _curves(run)
    yield _effect(run)
    yield _weights(run)
    yield _latents(run)
    for name, summary in run.elsewhere.items():
        yield _heat(summary, f"On other data: {name}")


def evaluated_on(summary: Summary) -> str:
    """Whom a summary speaks of.

    >>> evaluated_on({"evaluated": "fold 0 of 3, 8 patients", "patients": 8, "cases": 9})
    'fold 0 of 3, 8 patients (9 scans)'
    """
    text, patients, scans = str(summary.get("evaluated", "")), summary["patients"], summary["cases"]
    if f"{patients} patient" not in text:
        text = f"{text}, {patients} patients".lstrip(", ")
    return text if scans == patients else f"{text} ({scans} scans)"


def convention(summary: Summary) -> str:
    """The named rule for empty regions, with its one line where the name is known."""
    name = str(summary.get("convention", "not named"))
    return f"“{name}”: {CONVENTIONS[name].note}" if name in CONVENTIONS else f"“{name}”"


def _evaluated(summary: Summary) -> Iterator[Picture]:
    yield _heat(summary, "Every subset of sequences")
    if summary.get("present"):
        caption = (
            "The same numbers over only those patients whose expert mask has the region. Read beside the figure above, "
            "it tells how much of a mean comes from patients in whom there was nothing to find."
        )
        image = _svg(figures.subset_heatmap(summary, rows="present"))
        yield Picture("Only patients who have the region", caption, image, after="Every subset of sequences")
    if len(summary["modalities"]) > 1:
        yield _cost(summary)


def _heat(summary: Summary, title: str) -> Picture:
    caption = (
        f"Mean Dice ({evaluated_on(summary)}); small numbers are 95 % bootstrap intervals over patients. "
        "Dots: the sequences the network was given. Colours run from 0 to 1 in every report, so two reports can be "
        f"laid side by side. Empty regions follow the convention {convention(summary)}"
    )
    if any(row["region"].endswith("-pp") for row in summary["rows"]):
        caption = caption.rstrip(".") + ". “-pp”: after dropping a predicted region below the configured volume."
    return Picture(title, caption, _svg(figures.subset_heatmap(summary)))


def _cost(summary: Summary) -> Picture:
    sentences = []
    for region in summary["regions"]:
        loss = {name: figures.mean_loss(summary, name, region) for name in summary["modalities"]}
        worst = max(loss, key=lambda name: loss[name])
        sentences.append(f"{region} depends most on {label(worst)} ({number(loss[worst])} Dice)")
    caption = (
        f"{'; '.join(sentences)}. A bar is the mean, over all subsets without the sequence, of the Dice that adding it "
        "brings; grey dots are the single subsets, not patients. Below zero: the network did better without it."
    )
    return Picture("What is lost with each sequence", caption, _svg(figures.cost_of_losing(summary)))


def _reliability(run: Run) -> Picture:
    title = "What the probabilities mean"
    told = (run.confidence or {}).get("temperature")
    if not told:
        why = "Too few held-out patients were scored to say how right the network's probabilities are."
        return Picture(title, missing=why, command="medmap evaluate RUN --data PATIENTS")
    coolest, warmest = min(told["of"].values()), max(told["of"].values())
    caption = (
        "Of all voxels with a probability of 0.7 seven in ten should be the region: on the dotted line they are. "
        f"{told['patients']} patients, each with the temperatures of the others, one for each combination of sequences "
        f"({coolest:.2f} to {warmest:.2f}). Voxels to which the network gives less than 1 % are left out. ECE: mean "
        "distance from the line. Below: how many voxels there are. A temperature never changes a mask."
    )
    return Picture(title, caption, _svg(figures.reliability_diagram(told)))


def _examples(run: Run) -> Picture:
    title = "Examples"
    if run.examples is None:
        return Picture(title, missing="No example slices in this run.", command="medmap evaluate RUN")
    caption = (
        "One axial slice of each patient, seen from below (R: the patient's right). Fill: the mask; regions lie inside "
        "each other, so the colour of one shows where no inner one is. White line: the expert's outermost region. Each "
        "mask lies over a sequence that the network was given for it, named in the corner. Dice is of the whole "
        "volume, not of the slice. Examples illustrate; they are not a measurement."
    )
    regions = list(run.summary["regions"]) if run.summary else ["WT", "TC", "ET"]
    return Picture(title, caption, _png(figures.example_overlays(run.examples, _members(regions))))


def _members(regions: Sequence[str]) -> dict[str, tuple[int, ...]] | None:
    schemes = [scheme for scheme in SCHEMES.values() if set(regions) <= set(scheme.regions)]
    return {region: schemes[0].members(region) for region in regions} if schemes else None


def _curves(run: Run) -> Picture:
    title = "Training"
    if not run.logs:
        return Picture(title, missing="No training log in this run.", command="medmap train -c CONFIG -o RUN")
    seconds = [max(record.get("seconds") or 0 for record in log) for log in run.logs.values()]
    caption = (
        "Left: training loss, as it came (faint) and smoothed. Right: Dice on the validation patients, mean over all "
        "subsets (solid; ★ the checkpoint that is kept) and with every sequence (dashed). A dashed line that falls "
        "while the solid one rises is the sign of too strong an alignment. "
    )
    if max(seconds) > 0:
        caption += f"Time: {sum(seconds) / 60:.0f} minutes on {run.env.get('device', 'an unnamed device')}."
    return Picture(title, caption, _svg(figures.learning_curves(run.logs)))


def _effect(run: Run) -> Picture:
    title = EFFECT
    drawn = figures.alignment_effect(run.logs) if run.logs else None
    if drawn is None:
        return Picture(title, missing="No validation of this run measured latents.", command="medmap train")
    last = [rows[-1] for log in run.logs.values() if (rows := [r for r in log if r["kind"] == "val" and "cost" in r])]
    cost = f" (at the end {100 * sum(r['cost'] for r in last) / len(last):.1f} points)" if last else ""
    aligned = any(name.startswith("align/") for log in run.logs.values() for r in log for name in r.get("terms", {}))
    caption = (
        ("" if aligned else "Nothing was aligned in this run: its deepest latents, to compare with runs that align. ")
        + "All on the validation patients. Gap: share of the latents' variance that lies between sequences; alignment "
        "is there to lower it, and dots are what is left if sequences do not differ. Spread: how much one sequence's "
        "latents vary between voxels and patients, mean over channels and the least (faint: on crops, in training); "
        "below half of its start the latents shrink, which lowers the loss and aligns nothing. Directions in use: "
        "falls in sound training as well, but not to 1 or 2. Dice, over patients who have every sequence: the distance "
        f"between the lines is what missing sequences cost{cost}; a solid line that falls while the dashed one holds "
        "is over-alignment."
    )
    return Picture(title, caption, _svg(drawn))


def _weights(run: Run) -> Picture:
    title = "Weights of the anchor"
    drawn = figures.anchor_weights(run.logs) if run.logs else None
    if drawn is None:
        why = "This run logged no anchor weights: only a learned anchor has them."
        return Picture(title, missing=why, command="medmap train --set align.anchor=pstar")
    last = [rows[-1]["weights"] for log in run.logs.values() if (rows := [r for r in log if r.get("weights")])]
    reach = max(abs(w - 1 / len(level)) for levels in last for level in levels.values() for w in level.values())
    caption = (
        f"At the end no weight is further than {max(reach, 0.001):.3f} from 1/M. Weights that settle at 1/M make "
        "the anchor the plain mean of the latents: they then say nothing about which sequence matters."
    )
    return Picture(title, caption, _svg(drawn))


def _latents(run: Run) -> Picture:
    title = "Latents before and after training"
    if run.latents is None:
        return Picture(title, missing="No latents were kept.", command="medmap evaluate RUN")
    before, after = (modality_gap(run.latents[when], run.latents["modality"]) for when in ("before", "after"))
    caption = (
        f"Share of the latents' variance that lies between sequences: {number(before)} untrained, {number(after)} "
        "trained (0: one patient's sequences are alike; 1: the sequence is all there is; chance: what labels without "
        "meaning would give). A small gap alone proves nothing: latents that all fall onto one point have none either. "
        "Each panel has its own axes."
    )
    return Picture(title, caption, _svg(figures.latent_pca(run.latents)))


def _svg(figure: Figure) -> str:
    # text as outlines: the same picture everywhere, without any font; no date, so equal runs give equal files
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "medmap"}):
        return _inlined(figure, "svg", "image/svg+xml", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))


def _png(figure: Figure) -> str:
    return _inlined(figure, "png", "image/png", dpi=130, metadata={"Software": None})


def _inlined(figure: Figure, form: str, media: str, **options: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, facecolor="white", **options)
    drawn = buffer.getvalue()
    if form == "svg":  # from the first tag on: the prologue names a document type on the network
        drawn = drawn[drawn.index(b"<svg") :]
    return f"data:{media};base64,{base64.b64encode(drawn).decode('ascii')}"
